"""Shared test set-up: hypothesis profiles (>= 200 examples everywhere), seeds, thread count."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parent))  # tests import tests/native.py and friends by name

settings.register_profile("default", max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.register_profile("long", parent=settings.get_profile("default"), max_examples=2000)
settings.register_profile("brief", parent=settings.get_profile("default"), max_examples=25)  # tests/sanitize.sh
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets torch's thread count for a test and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU, for tests that need one: they are skipped where there is none, and only there."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from unmask.ops import cuda_archs

    assert cuda_archs(), "a CUDA device is here, but the op library was built without CUDA kernels"
    return torch.device("cuda")


@pytest.fixture
def six_gb_of_gpu_memory(cuda) -> None:
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free GPU memory")


@pytest.fixture
def hopper(cuda) -> None:
    """For kernels that only sm_90a runs; a Hopper GPU with a library that lacks them is a failure, not a skip."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    from unmask.ops.info import has_hopper_kernels

    assert has_hopper_kernels(), "a Hopper GPU is here, but the op library was built without sm_90a"


@pytest.fixture
def second_gpu(cuda) -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda:1")
