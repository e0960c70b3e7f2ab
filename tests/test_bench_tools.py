"""The timing helper, the result files and the GEMM floor's count of work."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import gemm_floor  # noqa: E402
import gpu_ops  # noqa: E402
import gpu_step  # noqa: E402
import machine  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40))
def test_timing_is_its_median(samples):
    t = timing.Timing(samples)
    assert float(t) == pytest.approx(torch.tensor(samples, dtype=torch.float64).quantile(0.5).item())
    assert min(samples) <= t.p10 <= t <= t.p90 <= max(samples)
    assert t.n == len(samples) and t.samples == tuple(samples)
    json.dumps(t)  # a plain number wherever a number is expected


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_measure_without_warmup_calls_exactly_once_per_round_and_turns_around(rounds):
    order = []
    fns = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timing.measure(fns, rounds=rounds, min_time=0, min_samples=1, sample_time=0, warmup=0)
    assert order == [name for turn in range(rounds) for name in ("cba" if turn % 2 else "abc")]


def test_measure_counts_the_iterations_it_hands_out():
    seen = []
    times = timing.measure(
        {"indexed": seen.append, "plain": lambda: None, "default": lambda i=7: None}, rounds=2, min_time=1e-3
    )
    assert seen == list(range(len(seen))) and len(seen) > 5
    assert all(t >= 0 and t.n >= 10 for t in times.values())


def test_measure_reports_progress_and_refuses_nonsense():
    visits = []
    timing.measure(
        {"a": lambda: None, "b": lambda: None}, rounds=2, min_time=0, min_samples=1, progress=visits.append
    )
    assert visits == ["a", "b", "b", "a"]
    for bad in (dict(fns={}), dict(fns={"a": lambda: None}, rounds=0)):
        with pytest.raises(ValueError, match="measure: expected"):
            timing.measure(**bad)


def test_measure_flushes_outside_the_clock(monkeypatch):
    module = importlib.import_module("unmask._timing")
    flushed = []
    monkeypatch.setattr(module, "flush_cache", lambda: flushed.append(1))
    t = timing.measure({"a": lambda: None}, rounds=2, min_time=0, min_samples=3, flush=True)["a"]
    assert t.n == len(flushed) == 6


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: torch.zeros(256), 1024),
        (lambda: (torch.zeros(64), {"x": torch.zeros(64, dtype=torch.bfloat16)}), 384),
    ],
)
def test_rotating_fills_the_bytes_and_wraps(make, size):
    inputs = timing.rotating(make, total_bytes=10 * 1024)
    assert (len(inputs) - 1) * size < 10 * 1024 <= len(inputs) * size
    assert inputs[len(inputs) + 1] is inputs[1] is not inputs[0]
    assert len(timing.rotating(make, total_bytes=1)) == 2


def test_ceilings_name_every_way_of_a_gemm(threads):
    threads(1)
    found = timing.ceilings(torch.bfloat16, [(16, 32, 48)], rounds=1, min_time=0.0)
    assert found["read"] > 0 and found["copy"] > 0
    rates = found["gemm"]["16x32x48"]
    assert {"linear", "best"} <= set(rates) and rates["best"] == max(rates.values())


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("steps", [4, 8, 16, 128])
def test_floor_counts_every_forward(cache, steps):
    kinds = gemm_floor.forwards(cache, 128, 128, 32, steps)
    assert sum(kinds.values()) == steps
    assert all(tokens % 16 == 0 and rows in (16, 32) for tokens, rows in kinds)
    per_block = steps // 4
    full = sum(n for (tokens, _), n in kinds.items() if tokens == 256)
    assert full == (steps if cache == "none" else 4)
    if cache == "dual":
        assert sum(n for (tokens, _), n in kinds.items() if tokens == 32) == steps - 4
    assert sum(n for (_, rows), n in kinds.items() if rows == 32) == 4 * -(-per_block // 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.5, "2.5 s"),
        (1.0, "1 s"),
        (0.0123, "12.3 ms"),
        (0.9999, "1000 ms"),
        (4.2e-6, "4.2 us"),
        (3e-9, "3 ns"),
    ],
)
def test_seconds(value, text):
    assert report.seconds(value) == text


def test_report_writes_json_and_markdown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = [{"op": "commit", "time": 1.5, "ok": True}, {"op": "logit_stats", "note": "a | b"}]
    path = report.write("test", "A title", {"Ops": iter(rows)}, ["a note"], extra=timing.Timing([1.0, 2.0]))
    text = path.read_text()
    assert text == capsys.readouterr().out.rstrip("\n") + "\n"
    assert (
        text.startswith("# A title\n")
        and "| commit      | 1.5  | yes |" in text
        and text.endswith("- a note\n")
    )
    stored = json.loads(path.with_suffix(".json").read_text())
    assert stored["sections"]["Ops"] == rows and stored["extra"] == 1.5
    assert {"cpu", "cores", "isa", "torch", "threads", "commit", "command", "date"} <= set(stored["origin"])
    assert path.name == f"test-{machine.cpu_slug()}-{stored['origin']['date']}.md"


def test_slug_is_a_file_name():
    assert set(machine.cpu_slug()) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


# ---- the scripts for a GPU, as far as they run without one


@pytest.mark.parametrize("part", ["attention", "head", "rest"])
def test_every_rival_of_an_op_runs(part):
    for case in gpu_ops.cases(True, "cpu", part):
        assert "ours" in case.calls and len(case.calls) > 1
        for fn in case.calls.values():
            fn(0)


@pytest.mark.parametrize(("batch", "prefix"), [(1, 24), (2, 17)])
def test_every_way_of_a_step_chooses_the_same_tokens(batch, prefix):
    with torch.no_grad():
        weights = gpu_step.Weights(gpu_step.TINY, torch.float32, "cpu")
        ran = list(gpu_step.check(gpu_step.TINY, weights, batch, prefix))
    assert {"ours", "S1", "S2 graph, compiled", "S3"} <= set(ran)


def test_floor_of_a_step_is_bytes_or_flops():
    shape = gpu_step.Shape()
    linear, head = 4 * 4096 * 4096 + 3 * 4096 * 12_288, 126_464 * 4096
    cached = 2 * 544 * 4096 * 2  # bytes of K and V of a row of 512 + 32
    by_bytes = gpu_step.floor_seconds(shape, 1, 512, 2, copy=1.0, products=1e9)
    assert by_bytes == {"layers": pytest.approx(4.0 * (2 * linear + cached)), "head": pytest.approx(2.0 * head)}
    by_flops = gpu_step.floor_seconds(shape, 8, 512, 2, copy=1e9, products=1.0)
    assert by_flops["layers"] == pytest.approx(4.0 * (2 * 256 * linear + 4 * 256 * 544 * 4096))
    assert by_flops["head"] == pytest.approx(2.0 * 256 * head)


def test_gpu_check_knows_its_stages(tmp_path):
    script = Path(__file__).resolve().parent.parent / "bench" / "gpu_check.sh"
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    ran = subprocess.run(["bash", str(script), "--dry-run", "bench_step"], env=env, capture_output=True, text=True)
    assert ran.returncode == 0 and "ours, S1 and S2 chose the same tokens" in ran.stdout, ran.stdout + ran.stderr
    wrong = subprocess.run(["bash", str(script), "bench_stap"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and "bench_step" in wrong.stderr
