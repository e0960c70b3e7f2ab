"""S2D2: the authors' recorded runs, and the arguments of their functions."""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import golden_runs
from golden_runs import BLOCK_FAMILIES, GOLDEN
from random_models import make
from s2d2_kit import LIMIT
from unmask.compat.s2d2 import _run, fast_dllm_v2, llada2, sdar
from unmask.errors import SettingError
from unmask.models.backbone import full_forward
from unmask.models.model import Model
from unmask.speculate import s2d2_rule
from unmask.speculate.acceptance import Recorded
from unmask.speculate.s2d2_backend import S2D2Backend
from unmask.speculate.s2d2_options import ESTIMATORS

FUNCTIONS: dict[str, tuple[Any, str, str]] = {
    "sdar": (sdar.block_diffusion_generate, "return_forward_stats", "total_forward_steps"),
    "llada2": (llada2.generate_ssd_policy, "record_decoding_order", "nfe"),
    "fast_dllm_v2": (fast_dllm_v2.generate_ssd_policy, "return_decoding_order", "total_forward_steps"),
}


def recorded(family: str) -> list[dict]:
    return json.loads((GOLDEN / family / "s2d2_ssd.json").read_text())["runs"]


RUNS = [(family, run) for family in BLOCK_FAMILIES for run in recorded(family)]


@pytest.fixture(scope="module")
def golden_models():
    return {family: golden_runs.load(family) for family in BLOCK_FAMILIES}


def test_every_run_is_here():
    assert collections.Counter(family for family, _ in RUNS) == dict(sdar=21, llada2=8, fast_dllm_v2=9)
    routes = collections.Counter(run["args"]["do_verify_policy"] for _, run in RUNS)
    assert set(routes) == set(_run.ROUTES)
    used = {r["args"]["token_acceptance_estimator"] for _, r in RUNS if "token_acceptance_estimator" in r["args"]}
    assert used == set(ESTIMATORS)


class Replay:
    """One recorded run, done again: what it returned, its engine, and what was forwarded."""

    def __init__(self, family: str, run: dict, m: Model, patch: pytest.MonkeyPatch, **changes: Any):
        self.loops: list[_run.SpeculativeLoop] = []
        self.forwards: list[tuple[list[int], list[int]]] = []  # positions and ids of each
        self.hidden: list[torch.Tensor] = []  # of each forward
        self.verifier: list[torch.Tensor] = []  # hidden states of the positions in question
        prepare, run_verify = _run.prepare, s2d2_rule.verify
        patch.setattr(_run, "prepare", lambda *a, **k: self.loops.append(prepare(*a, **k)) or self.loops[-1])
        patch.setattr(s2d2_rule, "verify", lambda *a, **k: self.verifier.append(run_verify(*a, **k)) or self.verifier[-1])
        function, stats, count = FUNCTIONS[family]
        args = dict(uniforms=run["uniforms_per_verify"], resampled=run["resampled_tokens"], **run["args"]) | changes
        handle = m.register_forward_hook(self._note)
        try:
            x, said = function(m, torch.tensor(run["prompt_ids"]), **{stats: True}, **args)
        finally:
            handle.remove()
        self.ids, self.nfe, self.order = x.tolist(), said[count], said.get("decoding_order")
        (self.loop,) = self.loops
        self.engine = self.loop.engine

    def _note(self, _, args, out):
        real = args[0].row >= 0
        self.forwards.append((args[0].pos[real].tolist(), args[0].ids[real].tolist()))
        self.hidden.append(out)


@pytest.mark.parametrize(("family", "run"), RUNS, ids=[f"{f}-{r['id']}" for f, r in RUNS])
def test_run(golden_models, family, run, monkeypatch):
    """Tokens, forwards and what each was, spans, drafts, probabilities and ratios of every verification, and how each position was settled."""
    m = golden_models[family]
    got = Replay(family, run, m, monkeypatch)
    assert got.ids == run["output_ids"]
    assert got.nfe == len(got.forwards) == run["nfe"] == got.loop.row.nfe
    assert json.loads(json.dumps(got.order)) == run["decoding_order"]
    whole = run.get("full_ids", run["output_ids"][0])
    canvas = got.loop.state.canvas[0].tolist()
    assert canvas == whole + [run["args"]["mask_id"]] * (len(canvas) - len(whole))

    steps = [s for s in run["steps"] if s["kind"].startswith("verify")]
    assert len(steps) == len(got.engine.verifications) == len(got.verifier) == len(run["uniforms_per_verify"])
    tempering = run["args"].get("ssd_ratio_tempering_factor", 1.0)
    for step, mine, hidden in zip(steps, got.engine.verifications, got.verifier, strict=True):
        assert mine.span == step["span"] and mine.draft == step["draft_tokens"] and mine.uniforms == step["uniforms"]
        # what was recorded of q is the plain softmax; Fast-dLLM v2's code compares with the one that top_p leaves
        q = m.head.logits(hidden)[: len(mine.span)].double().softmax(-1).gather(1, torch.tensor(mine.draft)[:, None])[:, 0]
        p, expected = torch.tensor(mine.p, dtype=torch.float64), torch.tensor(step["q_verify"], dtype=torch.float64)
        assert (p - torch.tensor(step["p_draft"])).abs().max() <= LIMIT
        assert (q - expected).abs().max() <= LIMIT
        assert (((q / p) ** tempering).clamp_max(1.0) - torch.tensor(step["ratio"])).abs().max() <= LIMIT
        if family != "fast_dllm_v2":
            assert (torch.tensor(mine.ratio) - torch.tensor(step["ratio"])).abs().max() <= LIMIT
    replaced = [v.token for v in got.engine.verifications if v.token is not None]
    assert replaced == run["resampled_tokens"]
    (counts,) = got.engine.counts
    assert counts.verifies == len(steps) and counts.replaced == len(replaced)

    for (positions, ids), step in zip(got.forwards, run["steps"], strict=True):
        if not step["kind"].startswith("verify"):
            assert positions == list(range(step["input_start"], step["input_start"] + step["input_len"]))
            continue
        fed = dict(zip(range(step["input_start"], step["input_start"] + len(step["input_ids"])), step["input_ids"], strict=True))
        drafted = [(p, t) for p, t in zip(positions, ids, strict=True) if t != run["args"]["mask_id"] and p >= step["input_start"]]
        assert all(fed[p] == t for p, t in drafted) and len(drafted) >= step["span"][-1] - step["input_start"]


def test_recorded_numbers_decide(golden_models, monkeypatch):
    """The same run with other numbers takes another course, both ways; without recorded numbers it depends on torch's seed alone."""
    run = recorded("sdar")[0]
    m = golden_models["sdar"]
    none = [[0.0] * 8] * 99
    with monkeypatch.context() as patch:
        patch.setattr(Recorded, "uniforms", lambda self, row, forward, positions: none[0][: len(positions)])
        eager = Replay("sdar", run, m, patch)
    assert eager.nfe < run["nfe"] and all(v.kept == len(v.span) for v in eager.engine.verifications)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with monkeypatch.context() as patch:
            outs.append(Replay("sdar", run, m, patch, uniforms=None, resampled=None).ids)
    assert outs[0] == outs[1] != outs[2]


def test_logits_inside_a_run(golden_models, monkeypatch):
    """Of a prefill, of a draft, and of the authors' 2L verification: rows of the draft half, then of the mask half."""
    run, m = recorded("sdar")[0], golden_models["sdar"]
    data = load_file(GOLDEN / "sdar" / "run_logits.safetensors")
    got = Replay("sdar", run, m, monkeypatch)
    seen = 0
    for key in (k for k in data if k.startswith(f"{run['id']}/forward")):
        k = int(key.split("/forward")[1])
        step, expected = run["steps"][k], data[key][0]
        positions, ids = got.forwards[k]
        logits = m.head.logits(got.hidden[k])[: len(positions)]
        if step["kind"] == "verify_2L":
            length, mask = step["input_len"] // 2, run["args"]["mask_id"]
            rows = [p - step["input_start"] + (length if t == mask else 0) for p, t in zip(positions, ids, strict=True)]
            assert len(rows) == len(set(rows)) == 7 + 6
            expected = expected[rows]
            seen += 1
        assert (logits - expected).abs().max() <= LIMIT
    assert seen == 1


GENERATE = dict(mask_id=383)


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("sdar", dict(do_verify_policy="always"), "do_verify_policy"), ("sdar", dict(do_verify_score_type="ratio"), "do_verify_score_type"),
        ("sdar", dict(token_acceptance_estimator="x"), "token_acceptance_estimator"),
        ("sdar", dict(remasking_strategy="entropy_bounded"), "remasking_strategy"),
        ("sdar", dict(min_ssd_span_length=1.5), "min_ssd_span_length"), ("sdar", dict(ssd_ratio_tempering_factor=-1), "ssd_ratio_tempering_factor"),
        ("sdar", dict(uniforms=[[0.5]]), r"uniforms\[0\] must hold 6 numbers"), ("sdar", dict(uniforms=[[2.0] * 6]), r"uniforms\[0\]"),
        ("sdar", dict(uniforms=[]), "uniforms must hold a list per verification"), ("sdar", dict(uniforms=5), "list of numbers"),
        ("sdar", dict(uniforms=[[0.999999] * 6] * 99, resampled=[]), "resampled must hold a token"), ("sdar", dict(resampled=[384]), r"resampled\[0\]"),
        ("sdar", dict(temperature=-1.0), "temperature"), ("sdar", dict(block_length=0), "block_length"),
        ("llada2", dict(do_verify_policy="contextual_bandit_ucb"), "do_verify_policy"),
        ("llada2", dict(token_acceptance_estimator="soft_confidence_power"), "token_acceptance"),
        ("llada2", dict(hysteresis_threshold_on=-3.0, do_verify_policy="score_hysteresis"), "above off"),
        ("llada2", dict(num_to_transfer=0), "num_to_transfer"),
        ("fast_dllm_v2", dict(use_ssd_cache=True), "use_ssd_cache"), ("fast_dllm_v2", dict(output_scores=True), "output_scores"),
        ("fast_dllm_v2", dict(use_block_cache=True, draft_ver=True), "draft_ver"), ("fast_dllm_v2", dict(max_new_tokens=None), "max_new_tokens"),
        ("fast_dllm_v2", dict(small_block_size=7), "small_block_size"), ("fast_dllm_v2", dict(top_p=0.0), "top_p"),
    ],
)  # fmt: skip
def test_hostile_arguments_of_the_authors_functions(golden_models, family, arguments, words):
    function, *_ = FUNCTIONS[family]
    length = dict(max_new_tokens=32) if family == "fast_dllm_v2" else dict(gen_length=16, block_length=8)
    with pytest.raises(SettingError, match=words):
        function(golden_models[family], torch.tensor([list(range(10))]), **(length | GENERATE | arguments))
    other = golden_models["fast_dllm_v2" if family != "fast_dllm_v2" else "sdar"]
    with pytest.raises(SettingError, match="block-causal with"):
        function(other, torch.tensor([[1, 2, 3]]), **(length | GENERATE))


def test_the_authors_functions_return_what_theirs_do(golden_models):
    ids = torch.tensor([list(range(20, 30))])
    x = sdar.block_diffusion_generate(golden_models["sdar"], ids, mask_id=383, gen_length=8, attention_mask=torch.ones_like(ids), eb_threshold=1, unknown=3)
    assert x.dtype == torch.int64 and x.shape[0] == 1 and torch.equal(x[:, :10], ids)
    x = llada2.generate_ssd_policy(golden_models["llada2"], ids, mask_id=383, eos_id=381, block_length=8, gen_length=8, return_stats=False)
    assert isinstance(x, torch.Tensor) and 10 < x.shape[1] <= 18
    x, said = llada2.generate_ssd_policy(golden_models["llada2"], ids, mask_id=383, eos_id=381, block_length=8, max_gen_toks=8)
    assert set(said) == {"nfe"}
    out = fast_dllm_v2.generate_ssd_policy(golden_models["fast_dllm_v2"], ids, mask_id=383, stop_token=381, max_length=42, return_dict_in_generate=True)
    assert out.sequences.shape[1] > 10
    sampled = [
        sdar.block_diffusion_generate(golden_models["sdar"], ids, mask_id=383, gen_length=8, do_sample=True, temperature=1.2, top_k=20, top_p=0.9)
        for _ in range(2)
    ]
    assert all(383 not in s for s in sampled)


@pytest.mark.parametrize("cache_ver", [False, True])
@pytest.mark.parametrize("prompt", [1, 3])
def test_sdar_stores_a_block_as_its_last_draft_saw_it(prompt, cache_ver, monkeypatch):
    """draft_ver: tokens before the draft's first mask see no further than themselves, and their K/V are stored so; cache_ver: all of them."""
    m = make(seed=2, n_layers=3, qk_norm=True, visibility="block_causal", block_size=4, family="sdar")
    stored, store = [], S2D2Backend.store

    def watched(self, row, start, end):
        stored.append((self, end))
        return store(self, row, start, end)

    monkeypatch.setattr(S2D2Backend, "store", watched)
    ids = torch.arange(7, 7 + prompt)[None]
    x = sdar.block_diffusion_generate(
        m, ids, mask_id=60, gen_length=12 - prompt, block_length=4, denoising_steps=1, temperature=0.0, draft_ver=True, cache_ver=cache_ver,
        min_ssd_span_length=99,
    )  # fmt: skip
    backend, end = stored[0]
    assert end == 4
    f = full_forward(x[:, :4], 4)  # one step decides the block: its first mask stood behind the prompt
    place = torch.arange(f.pos.shape[0])
    causal = place < (4 if cache_ver else prompt)
    wanted = m.new_cache(1, 4)
    m.backbone(dataclasses.replace(f, q_end=torch.where(causal, place + 1, f.q_end)), wanted)
    for got, want in ((backend.cache.k, wanted.k), (backend.cache.v, wanted.v)):
        torch.testing.assert_close(got[:, 0, :, :4], want[:, 0, :, :4], rtol=1e-5, atol=1e-5)
    whole = m.new_cache(1, 4)
    m.backbone(f, whole)
    assert prompt == 1 and not cache_ver or not torch.allclose(whole.k[1:, 0], wanted.k[1:, 0], atol=1e-4)


def test_filters_may_be_absent_and_counts_extreme(golden_models):
    ids = torch.tensor([list(range(20, 30))])
    options = dict(mask_id=383, gen_length=8, temperature=0.8, do_sample=False)
    for more in (dict(top_p=None, top_k=None), dict(top_p=1.5, top_k=-1), dict(ucb_entropy_bins=0, ucb_span_length_bins=-3), dict(min_ssd_span_length=1 << 40)):
        torch.manual_seed(0)
        assert sdar.block_diffusion_generate(golden_models["sdar"], ids, **options | more).shape[1] >= 18
    more = dict(mask_id=383, eos_id=-1, block_length=8, gen_length=16, temperature=1e-7)
    assert llada2.generate_ssd_policy(golden_models["llada2"], ids, **more)[0].shape[1] == 26
