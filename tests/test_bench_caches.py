"""bench/bench_caches.py: every cache of the table is in it, and its report says what was run and what was refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import bench_caches as bench  # noqa: E402
import report  # noqa: E402
from unmask.caches import CACHES, NoCache  # noqa: E402


def test_caches_that_are_added_appear_by_themselves(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Other(NoCache):
        name = "other"

    monkeypatch.setitem(CACHES, "other", Other)
    names = [text.partition(":")[0] for text in bench.cases()]
    assert names[0] == "none" and set(names) == {n for n, kind in CACHES.items() if "bidirectional" in kind.visibility} and "block" not in names
    assert set(bench.VARIANTS) <= set(bench.cases()) and len(set(bench.cases())) == len(names)


def test_quick_run(tmp_path, monkeypatch, threads):
    threads(1)
    narrow = dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, ffn_dim=48, rotary_dim=8)
    monkeypatch.setattr(bench, "WIDE", dataclasses.replace(bench.WIDE, **narrow))
    monkeypatch.setattr(bench, "cases", lambda: ["none", "dual", "dkv:greedy=true", "dkv:refresh_every=1"])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_caches.py", "--quick", "--threads", "1"])
    bench.main()
    (file,) = tmp_path.glob("caches-quick-*.json")
    made = json.loads(file.read_text())
    served = {title: {row["cache"]: row for row in rows} for title, rows in made["sections"].items()}
    assert len(served) == 4
    for title, rows in served.items():
        assert set(rows) == {"none", "dual", "dkv:refresh_every=1"} | ({"dkv:greedy=true"} if "left to right" in title or "random order" in title else set())
        assert all(float(row["time"]) > 0 for row in rows.values()) and rows["none"]["time"] == "1.00"
        for exact in ("none", "dkv:refresh_every=1"):
            assert rows[exact]["exact"] and (rows[exact]["positions forwarded"], rows[exact]["tokens as none"]) == ("1.000", "1.000")
            assert rows[exact]["forwards"] == rows["none"]["forwards"] and rows[exact].get("right") == rows["none"].get("right")
        assert float(rows["dual"]["positions forwarded"]) < 0.9 and not rows["dual"]["exact"]
        assert ("right" in rows["none"]) == title.startswith("Embedded")
    refused = [note for note in made["notes"] if "not served" in note]
    assert len(refused) == 2 and all("must be known before the forward" in note for note in refused)
