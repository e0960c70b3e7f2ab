"""What tests of lossless self-speculation share: models, policies, and the comparison of a run with the plain one."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch

import unmask
from random_models import make
from unmask.decode.osdt import Table
from unmask.models.config import Experts
from unmask.models.model import Model
from unmask.speculate import auto
from unmask.speculate.methods import STATIC_RULES

CAUSAL = dict(visibility="block_causal", block_size=12)
EXPERTS = Experts(
    layers=(1,), n_experts=4, top_k=2, expert_dim=24, shared_dim=16, scoring="sigmoid", selection_bias=True, n_groups=1, kept_groups=1, normalized=True,
    scale=1.0,
)  # fmt: skip
SHAPES = {
    "llada": dict(), "one layer": dict(n_layers=1), "dream": dict(n_kv_heads=2, qkv_bias=True, shifted=True),
    "moe": dict(n_kv_heads=2, experts=EXPERTS),
    "sdar": dict(n_kv_heads=2, qk_norm=True, **CAUSAL), "v2": dict(n_kv_heads=1, qkv_bias=True, shifted=True, **CAUSAL),
}  # fmt: skip
CACHES = {True: ("none", "block", "dual"), False: ("none", "prefix", "dual", "prefix:refresh=3", "dual:refresh=2")}
FREQUENCIES = torch.rand(61, generator=torch.Generator().manual_seed(3)) / 61
POLICIES = {
    "quota": dict(policy="quota"),
    "quota steps": dict(policy="quota", steps=10),
    "threshold": dict(threshold=0.35),
    "threshold dinfer": dict(threshold=0.5, variant="dinfer"),
    "threshold minimum": dict(threshold=0.6, minimum=2),
    "factor": dict(policy="factor", factor=1.2),
    "eb": dict(policy="eb", gamma=0.8),
    "eb d2cache": dict(policy="eb", gamma=0.8, variant="d2cache"),
    "pc": dict(policy="pc", frequencies=FREQUENCIES),
    "dus": dict(policy="dus"),
    "dus skip": dict(policy="dus", skip_below=0.2),
    "sdar_static": dict(policy="sdar_static", score="leftmost"),
    "sdar_dynamic": dict(policy="sdar_dynamic", threshold=0.5),
    "llada2": dict(policy="llada2", threshold=0.5),
    "sprint": dict(policy="sprint", threshold=0.7, steps=12),
    "hierarchy": dict(policy="hierarchy", threshold=0.6, low_threshold=0.5),
    "osdt": dict(policy="osdt", table=Table(((0.5, 0.3), (0.6,)))),
    "margin": dict(policy="quota", score="margin"),
    "entropy": dict(score="entropy", threshold=-1.0),
    "random": dict(policy="quota", score="random"),
    "bias": dict(policy="quota", position_bias=0.05),
    "certainty": dict(policy="quota", certainty_sigma=2.0),
    "sampled": dict(policy="quota", temperature=0.3),
    "sampled threshold": dict(threshold=0.4, temperature=0.5),
    "nucleus": dict(policy="quota", temperature=0.4, top_p=0.9),
    "repetition": dict(policy="quota", repetition_penalty=1.3),
    "suppress": dict(policy="quota", suppress=[5, 7], confidence_eos_eot_inf=True),
}  # fmt: skip
STATIC = [name for name, p in POLICIES.items() if p.get("policy") in STATIC_RULES]


@functools.cache
def model(shape: str, seed: int = 3) -> Model:
    return make(seed=seed, **SHAPES[shape])


def causal(shape: str) -> bool:
    return "visibility" in SHAPES[shape]


def story(result: unmask.Result) -> list:
    """Every plain step of a traced run, in order, without the forwards."""
    return [(t["block"], t["step"], t["masks_left"], [(p, i) for p, i, _ in t["committed"]]) for t in result.trace]


def scores(result: unmask.Result) -> list[float]:
    return [s for t in result.trace for _, _, s in t["committed"]]


@pytest.fixture(autouse=True)
def rows_cost_little(monkeypatch):
    """auto must not follow the clock of the machine that runs the tests. For every test of a file that imports it."""
    monkeypatch.setattr(auto, "curve", lambda *_: {1: 1.0, 2: 1.05, 4: 1.2, 8: 1.6})


SAME = ("ids", "canvas", "text", "finish_reason", "exact")


def check(m: Model, rows, method: str = "ssd", draft: int = 4, plain: list | None = None, **settings) -> Counter:
    """Compares a run with the plain one; returns its counts. Scores too agree to the bit, but for attention="tree", whose sums have another order."""
    settings = dict(max_new_tokens=24, block_size=12, eos_stop=False, seeds=list(range(len(rows))), trace=True) | settings
    plain = plain or unmask.generate(m, rows, **settings)
    fast = unmask.generate(m, rows, speculate=method, draft=draft, **settings)
    counts: Counter = Counter()
    for a, b in zip(plain, fast, strict=True):
        assert [getattr(a, n) for n in SAME] == [getattr(b, n) for n in SAME]
        assert story(a) == story(b)
        assert scores(a) == (pytest.approx(scores(b), rel=1e-4, abs=1e-5) if "attention=tree" in method else scores(b))
        assert b.nfe <= a.nfe and b.nfe + b.accepted == a.nfe and len(b.trace) == a.nfe
        assert sum(t["drafted"] for t in b.trace) == b.drafted and sum(t["accepted"] for t in b.trace) == b.accepted
        assert len({t["nfe"] for t in b.trace}) == b.nfe and sum(t["rows"] for t in b.trace) == b.rows_forwarded
        counts.update(drafted=b.drafted, accepted=b.accepted, nfe=b.nfe, plain=a.nfe)
    return counts


def both_paths(counts: Counter) -> None:
    """Drafts were accepted, and drafts were rejected."""
    assert 0 < counts["accepted"] < counts["drafted"], counts


def several(run) -> None:
    """`run(seed)` for other models until its counts show both paths, which some of them must."""
    counts: Counter = Counter()
    for seed in range(3, 9):
        counts += run(seed)
        if 0 < counts["accepted"] < counts["drafted"]:
            return
    both_paths(counts)
