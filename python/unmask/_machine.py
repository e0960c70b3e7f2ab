"""Facts about this machine and this build that every printed number needs beside it."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def memory_bytes() -> int:
    """Installed memory in bytes (0 where the system does not say)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def cpu_slug() -> str:
    """The CPU's name, fit for a file name."""
    name = re.sub(r"\((R|TM|r|tm)\)|CPU|Processor|@.*", " ", cpu_model())
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "cpu"


def facts() -> dict[str, object]:
    """CPU, cores, memory, ISA in use and best, threads, versions. Loads torch and the op library."""
    import torch

    from . import ops
    from .ops.info import best_isa

    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gb": round(memory_bytes() / 2**30, 1),
        "isa": ops.isa(),
        "best_isa": best_isa(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
