"""The cut of block_attention's work on CUDA (csrc/cuda/block_attention_plan.h): pure functions, run on the host."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import emulated
from emulated import MMA_ONLY as H200
from emulated import attention_plan, split_keys

A100, ADA, SM120 = (108, 166912, 167936, False, False), (128, 101376, 102400, False, False), (170, 101376, 102400, True, False)
DEVICES = {"H200": emulated.H200, "H200 without sm_90a": H200, "A100": A100, "sm_89": ADA, "sm_120": SM120}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [8, 64, 72, 128])
@pytest.mark.parametrize("tokens", [1, 16, 17, 32, 64, 4096])
def test_shared_memory_fits_the_device(device, dim, tokens):
    _, per_block, *_ = DEVICES[device]
    plan = attention_plan(tokens, 1, 32, 32, dim, 4096, 2, device=DEVICES[device])
    assert plan["tensor_cores"] and plan["dim"] == (64 if dim <= 64 else 128)
    assert 2 <= plan["stages"] <= (12 if plan["wgmma"] else 4) and plan["shared_bytes"] <= per_block
    if plan["blocks_each"] == 2:
        assert 2 * (plan["shared_bytes"] + 1024) <= DEVICES[device][2]  # two blocks live on one multiprocessor


def test_few_rows_go_to_the_hopper_kernel_on_hopper():
    few = dict(tokens=32, batch=1, q_heads=32, kv_heads=32, dim=128, slots=4096, segments=2)
    plan = attention_plan(**few, device=emulated.H200)
    assert plan["wgmma"] and plan["row_tile"] == 64 and plan["stages"] == 7 and plan["blocks_each"] == 2 and plan["splits"] == 8
    assert attention_plan(**few | dict(dim=64), device=emulated.H200)["stages"] == 12
    assert attention_plan(**few | dict(tokens=512, batch=8), device=emulated.H200)["wgmma"]
    for other in (dict(tokens=65), dict(q_heads=64 * 4), dict(half=False), dict(aligned=False), dict(mappable=False), dict(device=H200)):
        assert not attention_plan(**dict(device=emulated.H200) | few | other)["wgmma"]
    # with batch_invariant the kernel must not depend on the batch
    for tokens, batch in ((1, 1), (64, 1), (4096, 1), (4096, 3)):
        plan = attention_plan(**few | dict(tokens=tokens, batch=batch), batch_invariant=True, device=emulated.H200)
        assert plan["wgmma"] and plan["row_tile"] == 64


def test_row_tiles_follow_the_rows_of_an_entry():
    assert attention_plan(16, 1, 32, 32, 128, 512, 1)["row_tile"] == 16
    assert attention_plan(32, 1, 32, 32, 128, 512, 1)["row_tile"] == 32
    assert attention_plan(32, 1, 28, 4, 128, 512, 1)["row_tile"] == 64  # 224 packed rows
    assert attention_plan(256, 8, 32, 32, 128, 512, 1)["row_tile"] == 32
    assert attention_plan(4096, 1, 32, 32, 128, 4096, 1)["row_tile"] == 64
    for tokens in (1, 32, 4096):
        assert attention_plan(tokens, 1, 32, 32, 128, 4096, 1, batch_invariant=True)["row_tile"] == 32


def test_splits_fill_the_machine_but_stay_long_enough():
    assert attention_plan(32, 1, 32, 32, 128, 4096, 1)["splits"] == 8  # 32 blocks of work, 264 wanted
    assert attention_plan(32, 1, 32, 32, 128, 512, 1)["splits"] == 2  # no split below 256 keys
    assert attention_plan(256, 8, 32, 32, 128, 4096, 1)["splits"] == 1
    assert attention_plan(32, 1, 28, 4, 128, 32768, 1)["splits"] == 8  # as many as a cluster takes
    assert attention_plan(32, 1, 28, 4, 128, 32768, 1, device=A100)["splits"] == 8  # 16 x 8 blocks of 216 that can run
    assert attention_plan(1, 1, 1, 1, 128, 131072, 1)["splits"] == 32
    assert attention_plan(32, 1, 32, 32, 128, 4096, 1, device=ADA)["splits"] == 4  # one block a multiprocessor
    fixed = [attention_plan(32 * b, b, 32, 32, 128, 32768, 1, batch_invariant=True)["splits"] for b in (1, 8, 64)]
    assert fixed == [8, 8, 8]
    for keys in range(1, 20000, 61):  # the splits of an entry follow from its own keys, whatever the capacity
        cuts = set()
        for slots, segments in ((keys, 1), (keys, 2), (keys, 3), (2 * keys + 5, 1), (10 * keys, 3)):
            plan = attention_plan(32, 1, 8, 8, 64, slots, segments, batch_invariant=True)
            cuts.add(split_keys(keys, plan["splits"], plan["min_split_keys"]))
        assert len(cuts) == 1, (keys, cuts)


@pytest.mark.parametrize(
    "case",
    [
        dict(half=False),
        dict(aligned=False),
        dict(dim=136),
        dict(slots=2**30),  # key counts of the tile kernel are 32-bit
    ],
)
def test_what_tensor_cores_do_not_take_goes_to_the_plain_kernel(case):
    sizes = dict(tokens=32, batch=1, q_heads=8, kv_heads=8, dim=64, slots=512, segments=1) | case
    plan = attention_plan(**sizes)
    assert not plan["tensor_cores"] and plan["splits"] == 1 and plan["shared_bytes"] == 4 * 2 * sizes["dim"] * 4 <= 48 * 1024


@given(
    st.lists(st.integers(0, 300), max_size=40),
    st.sampled_from([(32, 32), (28, 4), (7, 1), (8, 2), (0, 1)]),
    st.integers(1, 1 << 20),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
)
def test_the_grid_holds_every_tile(counts, heads, slots, segments, half, invariant):
    q_heads, kv_heads = heads
    group = q_heads // kv_heads
    plan = attention_plan(sum(counts), len(counts), q_heads, kv_heads, 64, slots, segments, half, True, invariant)
    needed = sum(-(-n * group // plan["row_tile"]) for n in counts)
    assert plan["tiles"] >= max(needed, 1 if counts else 0)
    assert plan["tiles"] <= max(1, needed + len(counts))
    assert plan["blocks"] == plan["tiles"] * kv_heads * plan["splits"]
    assert plan["cluster"] == (1 < plan["splits"] <= 8)  # an H200
    through_memory = plan["splits"] > 8
    assert plan["partial_floats"] == (plan["blocks"] * plan["row_tile"] * (plan["dim"] + 2) if through_memory else 0)
    if not invariant:  # the workspace stays small: splits only where blocks are few
        assert plan["splits"] == 1 or plan["blocks"] <= 4 * 2 * H200[0]


@given(st.integers(0, 2**40), st.integers(1, 32), st.integers(1, 4096))
def test_splits_cover_all_keys_in_whole_tiles(keys, splits, least):
    each = split_keys(keys, splits, least)
    assert each % 64 == 0 and each >= least and each * splits >= keys
    used = max(1, -(-keys // each))
    assert used <= splits and (used == 1 or keys > each * (used - 1))


def test_devices_without_clusters_merge_through_the_workspace():
    plan = attention_plan(32, 1, 32, 32, 128, 4096, 1, device=A100)
    assert plan["splits"] == 4 and not plan["cluster"] and plan["partial_floats"] == plan["blocks"] * 32 * 130


def test_sizes_beyond_32_bits_do_not_wrap():
    plan = attention_plan(1 << 33, 1, 32, 32, 128, 1 << 20, 1)
    assert plan["blocks"] == (1 << 33) // 64 * 32  # the launcher refuses more than 2^31 - 1
