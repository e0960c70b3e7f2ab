"""`unmask doctor`: is this installation sound, and what does it run on?"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import time
from typing import Any

EXTRAS = {"rich": "cli (the live view)", "huggingface_hub": "hub (fetching models)", "matplotlib": "plot"}


def run(args: argparse.Namespace) -> int:
    report: dict[str, Any] = {}
    failures: list[str] = []
    try:
        import torch

        from .. import _library, ops
    except (ImportError, OSError) as e:
        print(json.dumps({"failures": [str(e)]}) if args.json else f"FAIL  the op library does not load: {e}")
        return 1
    report["versions"] = versions()
    report["library"] = str(_library.LIBRARY_PATH)
    report["isa"] = {
        "in use": ops.isa(), "best": ops.info.best_isa(), "forced": os.environ.get("UNMASK_ISA"), "threads": torch.get_num_threads(),
    }  # fmt: skip
    report["gemm"] = gemm_formats()
    report["cuda"] = {
        "archs": ops.cuda_archs(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    report["kernels"] = kernels()
    began = time.perf_counter()
    report["self_test"] = self_test()
    report["self_test_seconds"] = time.perf_counter() - began
    report["models"] = models()
    for name, keys in report["kernels"].items():
        if "CPU" not in keys and name not in GPU_ONLY:
            failures.append(f"op {name} has no CPU kernel")
    failures += [f"op {name}: {line}" for name, lines in report["self_test"].items() for line in lines]
    failures += [f"model {m['what']}: {m['problem']}" for m in report["models"] if m.get("problem")]
    report["failures"] = failures
    print(json.dumps(report, indent=1) if args.json else "\n".join(written(report)))
    return 1 if failures else 0


def versions() -> dict[str, str | None]:
    import platform

    import torch

    from .. import __version__
    from .._machine import cpu_model

    found: dict[str, str | None] = {
        "unmask": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    found |= {"system": f"{platform.system()} {platform.machine()}", "cpu": cpu_model()}
    for name in ("safetensors", "tokenizers", *EXTRAS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gemm_formats() -> dict[str, str]:
    """How linear weights are kept on this machine, per dtype of the model."""
    import torch

    from ..ops.linear import choose_format

    return {
        name: choose_format(dtype, torch.device("cpu"), 0)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }


# Ops for one kind of GPU; another op serves every other machine (fused_head_stats: stats_tile). Tested by bench/gpu_check.sh.
GPU_ONLY = frozenset({"fused_head_stats"})
# Ops around oneDNN's packed weights; their parts serve a torch built without it.
PACKED_ONLY = frozenset({"decoder_layer", "head_stats", "moe_experts"})


def not_here() -> dict[str, str]:
    """Op that this machine or torch cannot run -> where it can."""
    from ..ops.linear import packed_weights_available

    packed = {} if packed_weights_available() else dict.fromkeys(PACKED_ONLY, "with a torch that has oneDNN")
    return dict.fromkeys(GPU_ONLY, "by bench/gpu_check.sh, on a GPU") | packed


def kernels() -> dict[str, list[str]]:
    """Op -> backends with a compiled kernel. Ops without tensor arguments (info) serve every backend."""
    import torch

    names = sorted(
        n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("unmask::")
    )
    found = {}
    for name in names:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        keys = [key for key in ("CPU", "CUDA") if has(f"unmask::{name}", key)]
        everywhere = has(f"unmask::{name}", "CompositeExplicitAutograd") or has(
            f"unmask::{name}", "CompositeImplicitAutograd"
        )
        found[name] = ["CPU", "CUDA"] if everywhere and not keys else keys
    return found


def self_test() -> dict[str, list[str]]:
    """Op with a CPU kernel -> differences between that and the reference (empty: it agrees)."""
    import torch

    try:
        from .examples import examples

        tests = {e.op: e for e in examples()}
    except Exception as e:  # whatever is broken here must be reported, not crash the report
        return {"all": [f"the self-test cannot be set up: {e}"]}
    found: dict[str, list[str]] = {}
    elsewhere = not_here()
    with torch.inference_mode():
        for name in kernels():
            if name in elsewhere:
                continue
            if name not in tests:
                found[name] = ["has no self-test"]
                continue
            try:
                found[name] = tests[name].differences()
            except Exception as e:
                found[name] = [f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"]
    return found


def models() -> list[dict[str, Any]]:
    """Where models are looked for, and whether the embedded ones are usable."""
    from ..errors import UnmaskError
    from ..models import checkpoint, hub

    places: list[dict[str, Any]] = [
        {"what": p.label, "path": str(p.path), "exists": p.exists} for p in hub.search_paths()
    ]
    for name in hub.EMBEDDED:
        embedded: dict[str, Any] = {"what": f"{name} (embedded)"}
        try:
            folder = hub.resolve(name)
            info = checkpoint.inspect(folder)
            embedded |= {"path": str(folder), "exists": True, "parameters": info.n_parameters}
        except UnmaskError as e:
            embedded |= {"path": "", "exists": False, "problem": str(e)}
        places.append(embedded)
    return places


def written(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    v, isa = report["versions"], report["isa"]
    lines = [f"unmask {v['unmask']}, torch {v['torch']}, Python {v['python']}, {v['system']}"]
    lines.append(f"CPU      {v['cpu']}, {isa['threads']} threads")
    forced = f" (forced by UNMASK_ISA={isa['forced']})" if isa["forced"] else ""
    lines.append(f"ISA      {isa['in use']} in use{forced}, {isa['best']} is the best here")
    lines.append("GEMM     " + ", ".join(f"{dtype}: {fmt} weights" for dtype, fmt in report["gemm"].items()))
    archs = report["cuda"]["archs"]
    built = (
        "CUDA kernels for sm_" + ", sm_".join(map(str, archs))
        if archs
        else "CPU-only build (no CUDA kernels in the binary)"
    )
    lines.append(f"CUDA     {built}; {report['cuda']['device'] or 'no CUDA device visible to torch'}")
    lines.append(f"library  {report['library']}")
    lines.append(
        "extras   " + ", ".join(f"{name} {v[name] or 'missing: ' + use}" for name, use in EXTRAS.items())
    )
    lines.append("kernels  " + "op".ljust(18) + "CPU  CUDA  self-test")
    elsewhere = not_here()
    for name, keys in report["kernels"].items():
        test = "ok" if not report["self_test"].get(name, ["not run"]) else "FAIL"
        test = elsewhere.get(name, test)
        marks = "  ".join(("yes" if key in keys else "-").ljust(len(key)) for key in ("CPU", "CUDA"))
        lines.append(f"         {name.ljust(18)}{marks}  {test}")
    passed = sum(not lines_ for lines_ in report["self_test"].values())
    lines.append(
        f"self-test {passed}/{len(report['self_test'])} ops agree with the reference, {report['self_test_seconds']:.2f} s"
    )
    lines.append("models are looked for in: an explicit folder, then")
    for place in report["models"]:
        lines.append(
            f"         {place['what']}: {place['path']}" + ("" if place["exists"] else " (not there)")
        )
    lines += [f"FAIL  {line}" for line in report["failures"]] or ["all is well"]
    return lines
