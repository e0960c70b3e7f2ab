"""Builds tests/emulate_*.cpp and calls the CUDA kernels in them, lane by lane on the CPU."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from unmask.ops.logit_stats import FIELDS, STATE_WORDS

ROOT = Path(__file__).resolve().parent.parent
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_Pair = c_int64 * 2


class Inputs(ctypes.Structure):  # StatsInputs, csrc/common/logit_stats_params.h
    _fields_ = [
        ("logits", c_void_p), ("type", c_int32), ("row_stride", c_int64), ("col_stride", c_int64), ("offset", c_int64),
        ("count", c_int64), ("vocab", c_int64), ("bias_ids", c_void_p), ("bias", c_void_p), ("n_bias", c_int64),
        ("bias_ids_stride", _Pair), ("bias_stride", _Pair), ("ids", c_void_p), ("n_ids", c_int64), ("ids_stride", _Pair),
        ("seed", c_void_p), ("step", c_void_p), ("pos", c_void_p), ("seed_stride", c_int64), ("step_stride", c_int64),
        ("pos_stride", c_int64), ("temperature", c_float), ("kept", c_int32), ("null_logits", c_void_p), ("null_row_stride", c_int64),
        ("null_col_stride", c_int64), ("guidance", c_float),
    ]  # fmt: skip


class Ids(ctypes.Structure):  # IdSet
    _fields_ = [("ids", c_void_p), ("n", c_int64), ("stride", c_int64)]


class Job(ctypes.Structure):  # StatsJob, csrc/cuda/logit_stats.cuh
    _fields_ = [
        ("inputs", Inputs), ("forbid", Ids), ("suppress", Ids), ("rows", c_void_p), ("rows_stride", c_int64), ("n_rows", c_int64),
        ("entry_begin", c_int64), ("entries", c_int64), ("chunks", c_int64), ("group_chunks", c_int64), ("groups", c_int64),
        ("dense", c_bool), ("sums", c_void_p), ("best", c_void_p), ("id_logit", c_void_p), ("tree", c_bool),
    ]  # fmt: skip


class Outputs(ctypes.Structure):  # StatsOutputs
    _fields_ = [("topk", c_int64), ("n_ids", c_int64), ("ids", c_void_p), ("values", c_void_p), ("status", c_void_p)]


class Tile(ctypes.Structure):  # StateTile, csrc/cuda/logit_stats_fold.cuh
    _fields_ = [("state", c_void_p), ("state_stride", _Pair), ("id_logit", c_void_p), ("id_stride", _Pair)]


@functools.cache
def build(source: str) -> ctypes.CDLL:
    """Compiles tests/<source> for the host and loads it."""
    folder = tempfile.TemporaryDirectory(prefix="unmask-emulated-")
    path = Path(folder.name) / "emulated.so"
    subprocess.run(
        ["g++", "-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Werror",
         f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", str(ROOT / "tests" / source), "-o", str(path)],
        check=True,
    )  # fmt: skip
    lib = ctypes.CDLL(str(path))
    folder.cleanup()
    lib.emulated_error.restype = c_char_p
    return lib


@functools.cache
def library() -> ctypes.CDLL:
    lib = build("emulate_logit_stats.cpp")
    plan = [c_int64, c_int64, c_int64]
    lib.emulated_logit_stats.argtypes = [POINTER(Job), *plan, POINTER(Outputs)]
    lib.emulated_stats_cluster.argtypes = [POINTER(Job), c_int64, POINTER(Outputs)]
    lib.emulated_stats_tile.argtypes = [POINTER(Job), *plan, POINTER(Tile)]
    lib.emulated_stats_finish.argtypes = [POINTER(Tile), POINTER(Outputs), c_int64]
    return lib


def _run(function, *arguments) -> None:
    if function(*arguments) != 0:
        raise RuntimeError(library().emulated_error().decode())


def _ids(t: torch.Tensor | None) -> Ids:
    return Ids(None, 0, 0) if t is None else Ids(t.data_ptr(), t.shape[0], t.stride(0))


def _job(a: dict, entries: int, offset: int, vocab: int) -> Job:
    logits, rows, bias_ids, ids = a["logits"], a.get("rows"), a.get("bias_ids"), a.get("ids")
    x = Inputs(logits.data_ptr(), _TYPES[logits.dtype], logits.stride(0), logits.stride(1), offset, logits.shape[1], vocab)
    if bias_ids is not None:
        x.bias_ids, x.bias, x.n_bias = bias_ids.data_ptr(), a["bias"].data_ptr(), bias_ids.shape[1]
        x.bias_ids_stride, x.bias_stride = _Pair(*bias_ids.stride()), _Pair(*a["bias"].stride())
    if ids is not None:
        x.ids, x.n_ids, x.ids_stride = ids.data_ptr(), ids.shape[1], _Pair(*ids.stride())
    for name in ("seed", "step", "pos"):
        setattr(x, name, a[name].data_ptr())
        setattr(x, f"{name}_stride", a[name].stride(0))
    x.temperature, x.kept = a["temperature"], max(2, a["topk"])
    null = a.get("null_logits")
    if null is not None:
        x.null_logits, x.null_row_stride, x.null_col_stride, x.guidance = null.data_ptr(), *null.stride(), a["guidance"]
    job = Job(x, _ids(a.get("forbid")), _ids(a.get("suppress")), None, 0, logits.shape[0])
    if rows is not None:
        job.rows, job.rows_stride = rows.data_ptr(), rows.stride(0)
    return job


def _outputs(entries: int, n_ids: int, topk: int) -> tuple[tuple[torch.Tensor, ...], Outputs]:
    poison = 0x7FC0DEAD
    out = (
        torch.full((entries, 1 + topk), poison),
        torch.full((entries, FIELDS + 2 * n_ids + topk), 777.0),
        torch.full((entries,), poison, dtype=torch.int32),
    )
    return out, Outputs(topk, n_ids, *(t.data_ptr() for t in out))


def logit_stats(a: dict, group_chunks: int = 0, entries_per_launch: int = 0) -> tuple[torch.Tensor, ...]:
    """The op's outputs, by the CUDA kernels on emulated warps. 0: as the launcher plans it."""
    entries = a["logits"].shape[0] if a.get("rows") is None else len(a["rows"])
    job = _job(a, entries, 0, a["logits"].shape[1])
    out, pointers = _outputs(entries, job.inputs.n_ids, a["topk"])
    _run(library().emulated_logit_stats, byref(job), entries, group_chunks, entries_per_launch, byref(pointers))
    return out


def stats_cluster(a: dict) -> tuple[torch.Tensor, ...]:
    """The same by the kernel that takes few rows where there are clusters."""
    entries = a["logits"].shape[0] if a.get("rows") is None else len(a["rows"])
    job = _job(a, entries, 0, a["logits"].shape[1])
    out, pointers = _outputs(entries, job.inputs.n_ids, a["topk"])
    _run(library().emulated_stats_cluster, byref(job), entries, byref(pointers))
    return out


def fused_head_stats(a: dict, hidden: torch.Tensor, weight: torch.Tensor, multiprocessors: int = 3, when: int = 0) -> tuple[torch.Tensor, ...]:
    """The op's outputs. a: as for logit_stats, `logits` left out; when: see block_attention's `eager`."""
    lib = build("emulate_head_stats.cpp")
    lib.emulated_head_stats.argtypes = [POINTER(Job), c_void_p, c_int64, c_void_p, *[c_int64] * 4, POINTER(Outputs)]
    entries, vocab = hidden.shape[0] if a.get("rows") is None else len(a["rows"]), weight.shape[0]
    job = _job(a | {"logits": hidden}, entries, 0, vocab)
    job.entries = entries
    out, pointers = _outputs(entries, job.inputs.n_ids, a["topk"])
    args = (hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), hidden.shape[1], weight.stride(0), multiprocessors, when)
    if lib.emulated_head_stats(byref(job), *args, byref(pointers)) != 0:
        raise RuntimeError(lib.emulated_error().decode())
    return out


def _tile(state: torch.Tensor, id_logit: torch.Tensor | None) -> Tile:
    tile = Tile(state.data_ptr(), _Pair(*state.stride()))
    if id_logit is not None:
        tile.id_logit, tile.id_stride = id_logit.data_ptr(), _Pair(*id_logit.stride())
    return tile


def stats_tile(a: dict, state: torch.Tensor, id_logit: torch.Tensor | None, offset: int, vocab: int) -> None:
    entries = a["logits"].shape[0]
    _run(library().emulated_stats_tile, byref(_job(a, entries, offset, vocab)), entries, 0, 0, byref(_tile(state, id_logit)))


def stats_finish(state: torch.Tensor, id_logit: torch.Tensor | None, topk: int) -> tuple[torch.Tensor, ...]:
    assert state.shape[1] == STATE_WORDS
    entries, n_ids = state.shape[0], 0 if id_logit is None else id_logit.shape[1]
    out, pointers = _outputs(entries, n_ids, topk)
    _run(library().emulated_stats_finish, byref(_tile(state, id_logit)), byref(pointers), entries)
    return out


def commit(canvas, masked, cu, row, pos, token, score, cost, eligible, editable, rule, params, quota, threshold, status) -> tuple[torch.Tensor, ...]:
    """The op's outputs, by the CUDA kernel on emulated warps; canvas, masked and status are written in place."""
    lib = build("emulate_commit.cpp")
    lib.emulated_commit.argtypes = [POINTER(c_void_p), POINTER(c_int64), ctypes.c_double, ctypes.c_double]
    n, batch = pos.shape[0], row.shape[0]
    out = torch.ones(n, dtype=torch.bool), torch.full((batch,), -77), torch.full((batch,), -77)
    strided = (cu, row, pos, token, quota, cost, score, threshold, eligible, editable, status)
    pointers = [None if t is None else t.data_ptr() for t in (canvas, masked, *strided, *out)]
    numbers = [*canvas.stride(), *masked.stride(), *canvas.shape, n, batch, int(rule)]
    numbers += [0 if t is None or t.shape[0] == 0 else t.stride(0) for t in strided]
    numbers += [score.dtype is torch.float64, threshold is not None and threshold.dtype is torch.float64]
    edit = float(params[1]) if len(params) > 1 else 0.0
    args = (c_void_p * len(pointers))(*pointers), (c_int64 * len(numbers))(*map(int, numbers))
    if lib.emulated_commit(*args, float(params[0]) if params else 0.0, edit) != 0:
        raise RuntimeError(lib.emulated_error().decode())
    return out


def norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, aligned: bool) -> torch.Tensor:
    """rms_norm, or add_rms_norm with a residual (written in place), by the CUDA kernel. Elements of a row are dense."""
    lib = build("emulate_elementwise.cpp")
    lib.emulated_norm.argtypes = [c_void_p] * 4 + [c_int64] * 4 + [c_float, c_int64, c_bool]
    out = torch.full(x.shape, 777.0, dtype=x.dtype)
    r = (None, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    args = (x.data_ptr(), r[0], weight.data_ptr(), out.data_ptr(), x.stride(0), r[1], x.shape[1], _TYPES[x.dtype], eps, x.shape[0], aligned)
    if lib.emulated_norm(*args) != 0:
        raise RuntimeError(lib.emulated_error().decode())
    return out


def silu_mul(gate_up: torch.Tensor, aligned: bool) -> torch.Tensor:
    lib = build("emulate_elementwise.cpp")
    lib.emulated_silu.argtypes = [c_void_p] * 2 + [c_int64] * 4 + [c_bool]
    width = gate_up.shape[1] // 2
    out = torch.full((gate_up.shape[0], width), 777.0, dtype=gate_up.dtype)
    if lib.emulated_silu(gate_up.data_ptr(), out.data_ptr(), gate_up.stride(0), width, _TYPES[gate_up.dtype], gate_up.shape[0], aligned) != 0:
        raise RuntimeError(lib.emulated_error().decode())
    return out


def rope_append(q, k, v, k_cache, v_cache, row, pos, slot, v_slot, q_weight, k_weight, inv_freq, eps, status, launches: int = 1) -> torch.Tensor:
    """The op by the CUDA kernels; caches and status are written in place. launches=2: lost writes are found in a launch before."""
    lib = build("emulate_rope_append.cpp")
    lib.emulated_rope_append.argtypes = [POINTER(c_void_p), POINTER(c_int64), c_float]
    v_slot = slot if v_slot is None else v_slot
    out = torch.full(q.shape, 777.0, dtype=q.dtype)
    tensors = (q, k, v, out, k_cache, v_cache, row, pos, slot, v_slot, q_weight, k_weight, inv_freq, status)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    numbers = [*q.shape[:2], k.shape[1], q.shape[2], len(inv_freq), k_cache.shape[0], k_cache.shape[2]]
    for t in (q, k, v, k_cache, v_cache, row, pos, slot, v_slot):
        numbers += t.stride()
    numbers += [0 if status is None else status.stride(0), _TYPES[q.dtype], launches == 2]
    args = (c_void_p * len(pointers))(*pointers), (c_int64 * len(numbers))(*map(int, numbers))
    if lib.emulated_rope_append(*args, eps) != 0:
        raise RuntimeError(lib.emulated_error().decode())
    return out


PLAN = ("tensor_cores", "wgmma", "dim", "row_warps", "row_tile", "stages", "shared_bytes", "blocks_each", "splits", "min_split_keys", "tiles", "blocks", "cluster", "partial_floats")
# multiprocessors; bytes of shared memory per block and per multiprocessor; clusters; wgmma
H200 = (132, 232448, 233472, True, True)
MMA_ONLY = (*H200[:4], False)  # an H200 as a library without sm_90a sees it
DEVICE = MMA_ONLY  # what the functions below plan for; tests set it


def attention_plan(tokens, batch, q_heads, kv_heads, dim, slots, segments, half=True, aligned=True, batch_invariant=False, device=None, mappable=True) -> dict[str, int]:
    """plan_attention of csrc/cuda/block_attention_plan.h."""
    lib = build("emulate_block_attention.cpp")
    numbers = (tokens, batch, q_heads, kv_heads, dim, slots, segments, half, aligned, mappable, batch_invariant, *(device or DEVICE))
    out = (c_int64 * len(PLAN))()
    lib.attention_plan((c_int64 * len(numbers))(*map(int, numbers)), out)
    return dict(zip(PLAN, out, strict=True))


def split_keys(keys: int, splits: int, least: int) -> int:
    function = build("emulate_block_attention.cpp").attention_split_keys
    function.argtypes, function.restype = [c_int64] * 3, c_int64
    return function(keys, splits, least)


def _divisible(t: torch.Tensor, size: int) -> bool:
    return t.stride(-1) == 1 and t.data_ptr() % size == 0 and all(s * t.element_size() % size == 0 for s in t.stride()[:-1])


def block_attention(
    q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status=None, batch_invariant=False, *, device=None, eager: int = 0, **plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op by the CUDA kernels; status is written in place. plan: fields of the plan to change (no other field follows them). eager: asynchronous work
    is done 0 as late as allowed, 1 at once, and the last warp runs ahead, 2 copies at once and products late."""
    lib = build("emulate_block_attention.cpp")
    lib.emulated_block_attention.argtypes = [POINTER(c_void_p), POINTER(c_int64), c_float]
    tokens, heads, dim = q.shape
    rows, kv_heads, slots, _ = k_cache.shape
    batch, segments = seg.shape[:2]
    half = q.dtype is not torch.float32
    aligned = half and _divisible(k_cache, 16) and _divisible(v_cache, 16) and _divisible(q, 4)
    mappable = all(n > 0 and (n == 1 or s > 0) for t in (k_cache, v_cache) for n, s in zip(t.shape, t.stride(), strict=True))
    p = attention_plan(tokens, batch, heads, kv_heads, dim, slots, segments, half, aligned, batch_invariant, device, mappable) | plan
    out, lse = torch.full(q.shape, 777.0, dtype=q.dtype), torch.full((tokens, heads), 777.0)
    if p["blocks"] == 0:
        return out, lse
    tensors = (q, k_cache, v_cache, out, lse, cu_q, kv_row, seg, q_end, mask, status)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    numbers = [tokens, heads, kv_heads, dim, rows, slots, batch, segments, *((0, 0) if mask is None else mask.shape[1:])]
    for t, n in ((q, 3), (k_cache, 4), (v_cache, 4), (cu_q, 1), (kv_row, 1), (seg, 3), (q_end, 1), (mask, 3), (status, 1)):
        numbers += [0] * n if t is None else [0 if i == 0 and t is mask and mask.shape[0] == 1 else s for i, s in enumerate(t.stride())]
    numbers += [_TYPES[q.dtype], *p.values(), eager]
    args = (c_void_p * len(pointers))(*pointers), (c_int64 * len(numbers))(*map(int, numbers))
    if lib.emulated_block_attention(*args, scale * 1.4426950408889634) != 0:
        raise RuntimeError(lib.emulated_error().decode())
    return out, lse
