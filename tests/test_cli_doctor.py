"""`unmask doctor` and `unmask bench`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from test_cli import _one_thread, cli  # noqa: F401  (fixtures)
from unmask.cli import doctor, examples
from unmask.ops import linear


def test_doctor(cli):  # noqa: F811
    code, out, err = cli("doctor")
    assert code == 0 and err == "", out
    assert "ISA" in out and "models are looked for" in out and "all is well" in out
    count = len(set(doctor.kernels()) - set(doctor.not_here()))
    assert f"self-test {count}/{count} ops agree" in out
    assert "CPU-only build" in out or "CUDA kernels for sm_" in out


def test_doctor_json(cli):  # noqa: F811
    code, out, _ = cli("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["failures"] == [] and report["versions"]["torch"] == torch.__version__
    assert report["self_test_seconds"] < 5 and set(report["self_test"]) == set(report["kernels"]) - set(doctor.not_here())


def test_every_op_has_a_self_test():
    assert sorted(e.op for e in examples.examples()) == sorted(set(doctor.kernels()) - set(doctor.not_here()))


@pytest.mark.parametrize("example", examples.examples(), ids=lambda e: e.op)
def test_examples_agree_and_run_both_ways(example):
    assert example.differences() == []
    getattr(torch.ops.unmask, example.op)(*example.args)
    example.wrapper()


def test_doctor_fails_when_an_op_is_wrong(cli, monkeypatch):  # noqa: F811
    import unmask.reference

    monkeypatch.setattr(unmask.reference, "silu_mul", lambda x: torch.zeros(x.shape[0], x.shape[1] // 2))
    code, out, _ = cli("doctor")
    assert code == 1 and "FAIL  op silu_mul: result 0: off by" in out and "all is well" not in out


def test_doctor_reports_a_library_that_does_not_load(tmp_path):
    env = {**os.environ, "UNMASK_C_LIBRARY": str(tmp_path / "missing.so")}
    done = subprocess.run([sys.executable, "-m", "unmask", "doctor"], capture_output=True, text=True, env=env)
    assert (
        done.returncode == 1
        and "FAIL  the op library does not load" in done.stdout
        and "Traceback" not in done.stderr
    )


# ---- bench


def test_bench_compares_every_op(cli, monkeypatch):  # noqa: F811
    import unmask.cli.bench as bench

    monkeypatch.setattr(bench, "VOCAB", 5000)
    monkeypatch.setattr(bench, "PREFIX", 64)
    monkeypatch.setattr(bench, "HEADS", 2)
    monkeypatch.setattr(bench, "bandwidth", lambda: {"read": 10.0, "copy": 10.0})
    monkeypatch.setattr(
        bench, "measure", lambda fns, **_: {name: (_run(fn), 0.5)[1] for name, fn in fns.items()}
    )
    monkeypatch.setattr(bench, "gemm_seconds", lambda *_: {"linear": 0.01})
    code, out, err = cli("bench", "--json", "--rounds", "1")
    report = json.loads(out)
    assert code == 0 and err == ""
    names = {(r["op"], r["dtype"]) for r in report["results"]}
    assert {
        (op, d)
        for op in ("logit_stats", "block_attention", "rope_append", "head_stats")
        for d in ("fp32", "bf16")
    } <= names
    assert all(rival["ratio"] == 1.0 for r in report["results"] for rival in r["rivals"].values())
    code, out, _ = cli("bench", "--dtype", "fp32")
    rows = out.partition("measured ceilings")[2]  # the line above names the instruction set, which may be avx512bf16
    assert code == 0 and "commit" in rows and "fp32" in rows and "bf16" not in rows


def _run(fn):
    from unmask._timing import _takes_index

    return fn(0) if _takes_index(fn) else fn()


def test_doctor_on_a_torch_without_packed_weights(cli, monkeypatch):  # noqa: F811
    """Ops around packed weights are not expected to run there, and nothing fails."""
    monkeypatch.setattr(linear, "packed_weights_available", lambda: False)
    monkeypatch.setattr(examples, "packed_weights_available", lambda: False)
    code, out, _ = cli("doctor")
    assert code == 0 and out.count("with a torch that has oneDNN") == len(doctor.PACKED_ONLY) and "all is well" in out
