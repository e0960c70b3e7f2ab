"""bench/quality.py and bench/bench_policies.py: every rule has a case, runs go on where they stopped, steps begin from the same state."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import bench_policies  # noqa: E402
import quality  # noqa: E402
import quality_configs  # noqa: E402
import quality_report  # noqa: E402
import report  # noqa: E402
import unmask  # noqa: E402
from unmask.decode.table import RULES  # noqa: E402
from unmask.tiny.tasks import TASKS  # noqa: E402


@pytest.fixture
def folder(tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def run_quality(monkeypatch, folder, *words: str) -> list[str]:
    """Runs bench/quality.py on three configurations; returns the lines of its progress file."""
    progress = folder / "progress.jsonl"
    monkeypatch.setattr(sys, "argv", ["quality.py", "--count", "1", "--progress", str(progress), *words])
    quality.main()
    return progress.read_text().splitlines()


def few(quick: bool = False) -> list[quality_configs.Config]:
    wanted = ("threshold", "adablock", "osdt", "pc", "plackett_luce")
    found = quality_configs.all_configs()
    chosen = [next(c for c in found if w in (c.rule, c.settings.get("schedule"))) for w in wanted]
    fixed = next(c for c in found if c.group == "schedules" and c.line == chosen[1].line.replace("adablock", "fixed") and c.value == chosen[1].value)
    return [quality_configs.one_per_step(), *chosen, fixed]


def test_every_rule_has_configurations():
    for quick in (True, False):
        assert {c.rule for c in quality_configs.all_configs(quick)} == set(RULES)
    assert len(quality_configs.all_configs(True)) < len(quality_configs.all_configs()) / 3


def test_an_interrupted_run_goes_on_and_the_report_is_whole(folder, monkeypatch, capsys):
    monkeypatch.setattr(quality, "all_configs", few)
    lines = run_quality(monkeypatch, folder)
    assert len(lines) == len(few())
    first = json.loads(next(folder.glob("quality-*.json")).read_text())["rows"]
    (folder / "progress.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # cut in the middle of a line
    judged = []
    judge = quality.judge
    monkeypatch.setattr(quality, "judge", lambda *a: judged.append(a[2]) or judge(*a))
    run_quality(monkeypatch, folder)
    assert judged == few()[2:]
    assert json.loads(next(folder.glob("quality-*.json")).read_text())["rows"] == first
    run_quality(monkeypatch, folder, "--seed", "1")
    assert len(judged) == 2 * len(few()) - 2, "another seed has other prompts"
    text = next(folder.glob("quality-*.md")).read_text()
    assert "wanted: at least 2.5" in text and "AdaBlock against fixed blocks at equal NFE" in text
    assert {p.suffix for p in folder.glob("quality-*")} == {".md", ".json", ".csv", ".png"}
    rows = next(folder.glob("quality-*.csv")).read_text().splitlines()
    assert len(rows) == 1 + len(few()) and rows[0].startswith("group,rule,line,knob,value,accuracy")


def test_one_per_step_is_what_it_says(threads):
    threads(1)
    model = unmask.load("tiny")
    prompts = {task: quality.held_out_examples(task, 1) for task in TASKS}
    got = quality.judge(model, quality.Inputs(model), quality_configs.one_per_step(), prompts, 0)
    for right, count, tokens, nfe in got["tasks"].values():
        assert count == 1 and right <= 1 and 0 < tokens <= nfe <= quality_configs.NEW_TOKENS


def test_frequencies_and_delimiters_are_of_this_vocabulary():
    model = unmask.load("tiny")
    inputs = quality.Inputs(model)
    f = inputs.frequencies()
    assert f.shape == (model.config.vocab_size,) and float(f.sum()) == pytest.approx(1.0)
    eos = model.config.eos_ids[0]
    assert f[eos] == f.max() and f[model.config.mask_id] == 0
    config = next(c for c in quality_configs.all_configs() if "delimiters" in c.settings)
    ids = inputs.settings(config, "json")["delimiters"]
    assert len(set(ids)) == len(quality_configs.DELIMITERS) and all(f[i] > 0 for i in ids)


@pytest.mark.parametrize(("x", "y"), [(1.0, 10.0), (1.5, 15.0), (3.0, 20.0), (0.9, None), (3.1, None)])
def test_a_curve_is_read_between_its_points(x, y):
    assert quality_report.at([(3.0, 20.0), (1.0, 10.0), (2.0, 20.0)], x) == y


# ---- bench_policies

SMALL = 600


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_policies, "VOCAB", SMALL)
    return bench_policies.prepared(torch.float32, SMALL, 0)


def test_every_rule_has_a_case():
    assert {c.settings.get("policy", "threshold") for c in bench_policies.cases()} == set(RULES)


@pytest.mark.parametrize("number", range(len(bench_policies.cases())))
def test_a_step_begins_from_the_same_state_every_time(small, number):
    """Same canvas and logits before, so same canvas after, whatever the rule remembers."""
    case = bench_policies.cases()[number]
    step = bench_policies.Step(case, small)
    after = []
    for _ in range(3):
        step.backend.module.turn = 0
        step()
        after.append((step.state.canvas.clone(), step.state.masked.clone(), vars(step.state.rows[0]) | {}))
        assert step.row["step"] == (0 if case.adaptive else bench_policies.WARM_STEPS)
    for canvas, masked, row in after[1:]:
        assert torch.equal(canvas, after[0][0]) and torch.equal(masked, after[0][1]) and row == after[0][2]
    undecided = bench_policies.BLOCK - case.decided
    assert int(step.start[1].sum()) == undecided
