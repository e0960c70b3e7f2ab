"""Modules from unmask.wrap outside of generate: likelihoods and the authors' functions."""

from __future__ import annotations

import types

import pytest
import torch

import author_modules
import unmask
from random_models import make
from unmask.compat import adablock, dream, fast_dllm, fast_dllm_v2, llada, llada2, sdar
from unmask.compat.s2d2 import fast_dllm_v2 as s2d2_v2
from unmask.compat.s2d2 import llada2 as s2d2_llada2
from unmask.compat.s2d2 import sdar as s2d2_sdar
from unmask.likelihood import log_likelihood, sample_masks, score_masks, suffix_greedy_prediction

MASK = 60
PROMPT, ANSWER = [3, 1, 4, 1], [5, 9, 2]
PROMPTS = torch.tensor([[3, 1, 4, 1], [9, 2, 6, 5]])
KINDS = {"plain": {}, "shifted": dict(shifted=True, qkv_bias=True)}
LLADA = {
    llada.generate: dict(steps=6, gen_length=12, block_length=6),
    fast_dllm.generate: dict(gen_length=12, block_length=6, threshold=0.4),
    fast_dllm.generate_with_prefix_cache: dict(gen_length=12, block_length=6, threshold=0.4),
    fast_dllm.generate_with_dual_cache: dict(gen_length=12, block_length=6, threshold=0.4),
    adablock.generate_adablock: dict(gen_length=12, init_block_length=6, threshold=0.4, delimiter_ids=[7], delimiter_threshold=0.1),
    adablock.generate_adablock_prefix_cache: dict(gen_length=12, init_block_length=6, threshold=0.4),
    adablock.generate_adablock_dual_cache: dict(gen_length=12, init_block_length=6, threshold=0.4),
}


class Theirs(torch.nn.Module):
    """Somebody's module, whose config says nothing: logits of a model of ours."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.calls, self.drop = [model], 0, torch.nn.Dropout(0.5)

    def forward(self, ids):
        self.calls += 1
        return types.SimpleNamespace(logits=self.inner[0].logits(ids))


def pair(kind: str, **arguments):
    """(a model, its logits in a wrapper)."""
    ours = make(seed=12, **KINDS[kind])
    return ours, unmask.wrap(Theirs(ours).eval(), mask_id=MASK, shifted=ours.config.shifted, eos_ids=59, **arguments)


def first(out):
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("estimator", ["llada", "dream", "ar"])
def test_likelihoods_of_a_wrapped_module(kind, estimator, cfg_scale):
    ours, theirs = pair(kind)
    args = dict(estimator=estimator, samples=16, batch_size=4, cfg_scale=cfg_scale)
    got, want = log_likelihood(theirs, PROMPT, ANSWER, **args), log_likelihood(ours, PROMPT, ANSWER, **args)
    torch.testing.assert_close(got.values, want.values, rtol=1e-5, atol=1e-4)
    assert got.forwards == want.forwards == theirs.module.calls


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_greedy_agreement_of_a_wrapped_module(kind):
    ours, theirs = pair(kind)
    ids, masks = torch.tensor(PROMPT + ANSWER), sample_masks(len(ANSWER), 8, 4, seed=1).after(len(PROMPT))
    scores = score_masks([ours, theirs], ids, masks)
    torch.testing.assert_close(*scores.log_probs, rtol=1e-5, atol=1e-4)
    assert torch.equal(score_masks(theirs, ids, masks).log_probs[0], scores.log_probs[1])
    right = unmask.generate(ours, PROMPT, max_new_tokens=3, block_size=3, policy="quota", eos_stop=False).canvas[4:]
    assert suffix_greedy_prediction(theirs, PROMPT, right) is True
    assert suffix_greedy_prediction(theirs, PROMPT, [(right[0] + 1) % 59, *right[1:]]) is False


def test_given_arguments_come_before_the_wrapper():
    ours, plain = pair("plain")
    got = log_likelihood(plain, PROMPT, ANSWER, estimator="ar", mask_id=50, shifted=True)
    want = log_likelihood(make(seed=12, shifted=True), PROMPT, ANSWER, estimator="ar", mask_id=50)
    torch.testing.assert_close(got.values, want.values, rtol=1e-5, atol=1e-4)
    for mask in (50, MASK):
        theirs, given = unmask.wrap(Theirs(ours).eval(), mask_id=50, shifted=False), dict(mask_id=mask, steps=6, gen_length=6, block_length=6)
        assert torch.equal(llada.generate(theirs, PROMPTS, **given), llada.generate(ours, PROMPTS, **given))


def test_likelihoods_that_a_wrapper_rules_out():
    ours, theirs = pair("plain")
    causal = unmask.wrap(Theirs(ours).eval(), mask_id=MASK, shifted=False, visibility="block_causal", block_size=4)
    training = unmask.wrap(Theirs(ours).train(), mask_id=MASK, shifted=False)
    for model, text in (
        (causal, "visibility must be 'bidirectional' for these likelihoods, got 'block_causal'"), (training, r"in training mode .* call module\.eval\(\) first"),
        (types.SimpleNamespace(config=None), "a model from unmask.load or a torch.nn.Module, bare or from unmask.wrap, got SimpleNamespace"),
    ):  # fmt: skip
        with pytest.raises(unmask.SettingError, match=text):
            log_likelihood(model, PROMPT, ANSWER)
    with pytest.raises(unmask.SettingError, match="must not hold the mask token 60"):
        log_likelihood(theirs, PROMPT, [1, MASK])
    assert causal.module.calls == theirs.module.calls == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("f", [f for f in LLADA if "cache" not in f.__name__], ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_the_authors_functions_take_the_wrappers_mask_and_shift(f, kind):
    ours, theirs = pair(kind)
    want = first(f(ours, PROMPTS, mask_id=MASK, **LLADA[f]))
    for call in (lambda: f(theirs, PROMPTS, **LLADA[f]), lambda: f(model=theirs, prompt=PROMPTS, **LLADA[f]), lambda: f(theirs, PROMPTS, mask_id=MASK, **LLADA[f])):
        assert torch.equal(first(call()), want)
    bare = first(f(theirs.module, PROMPTS, mask_id=MASK, **LLADA[f]))
    assert torch.equal(bare, want) == (kind == "plain")  # a bare module's logits are read as LLaDA's


def test_a_mask_given_by_place_stands():
    ours, theirs = pair("plain")
    by_place = (PROMPTS, None, 6, 6, 6, 0.0, 0.0, "low_confidence", 50)
    assert torch.equal(llada.generate(theirs, *by_place), llada.generate(ours, *by_place))
    assert not torch.equal(llada.generate(theirs, *by_place), llada.generate(theirs, *by_place[:-1]))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("f", LLADA, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_the_authors_cached_functions_call_the_module_inside(f, shifted):
    ours = unmask.load(author_modules.GOLDEN / "llada" / "checkpoint", overrides={"shifted": shifted})
    module = author_modules.LLaDA()
    theirs = unmask.wrap(module, shifted=shifted)
    assert theirs.config.mask_id == 383
    torch.manual_seed(0)
    prompts = torch.randint(0, 380, (3, 7))
    assert torch.equal(first(f(theirs, prompts, **LLADA[f])), first(f(ours, prompts, mask_id=383, **LLADA[f])))
    assert ("cache" in f.__name__) == any(given for _, given in module.calls)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", [dict(alg="maskgit_plus", steps=5), dict(alg="entropy", steps=4), dict(alg="confidence_threshold", steps=6, threshold=0.4)], ids=str)
def test_dream_takes_the_wrappers_mask_and_shift(kind, arguments):
    ours, theirs = pair(kind)
    want = dream.diffusion_generate(ours, PROMPTS, max_new_tokens=12, **arguments)
    assert torch.equal(dream.diffusion_generate(theirs, PROMPTS, max_new_tokens=12, **arguments), want)
    module = dream.diffusion_generate(theirs.module, PROMPTS, max_new_tokens=12, mask_token_id=MASK, **arguments)
    assert torch.equal(module, want) == (kind == "shifted")  # a bare module's logits are read as Dream's
    if arguments["alg"] != "confidence_threshold":  # a hook sees the logits where they belong
        seen = []

        def hook(step, x, logits):
            seen.append(logits)
            return logits

        hooked = dream.diffusion_generate(theirs, PROMPTS, max_new_tokens=12, generation_logits_hook_func=hook, **arguments)
        assert torch.equal(hooked, want) and len(seen) == arguments["steps"]
        x = torch.nn.functional.pad(PROMPTS, (0, 12), value=MASK)
        logits = ours.logits(x)
        assert torch.equal(seen[0], torch.cat([logits[:, :1], logits[:, :-1]], 1) if kind == "shifted" else logits)


@pytest.mark.parametrize("f", [dream.diffusion_generate, adablock.dream_generate, adablock.dream_generate_parallel], ids=lambda f: f.__name__)
def test_dreams_cached_functions_call_the_module_inside(f):
    ours, module = unmask.load(author_modules.GOLDEN / "dream" / "checkpoint"), author_modules.Dream()
    torch.manual_seed(5)
    prompt, mask = torch.randint(0, 380, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    args = dict(max_new_tokens=12, alg="confidence_threshold", steps=6, block_length=6, threshold=0.4, attention_mask=mask, dual_cache=True)
    theirs = unmask.wrap(module, shifted=True)
    assert torch.equal(f(theirs, prompt, **args), f(ours, prompt, **args))
    assert f is adablock.dream_generate_parallel or any("replace_position" in given for _, given in module.calls)
    assert f(theirs, prompt).shape == (2, 27) if f is dream.diffusion_generate else True  # max_length's default


def test_llada_likelihood_takes_the_wrappers_mask_and_shift():
    ours, theirs = pair("shifted")
    prompt, answer = torch.tensor(PROMPT), torch.tensor(ANSWER)
    values = []
    for model, more in ((ours, dict(mask_id=MASK)), (theirs, {}), (theirs, dict(mask_id=MASK))):
        torch.manual_seed(3)
        values.append(llada.get_log_likelihood(model, prompt, answer, mc_num=16, batch_size=4, **more))
    assert values[1] == values[2] == pytest.approx(values[0], rel=1e-5)


def test_end_tokens_are_the_wrappers():
    ours, theirs = pair("plain")
    args = dict(steps=12, gen_length=12, block_length=6, logits_eos_inf=True)
    got = llada.generate(theirs, PROMPTS, **args)
    assert torch.equal(got, llada.generate(ours, PROMPTS, mask_id=MASK, **args)) and not (got[:, 4:] == 59).any()
    without = unmask.wrap(theirs.module, mask_id=MASK, shifted=False, eos_ids=[])
    with pytest.raises(unmask.SettingError, match=r"this model's config names none; pass unmask\.wrap\(module, eos_ids=\.\.\.\)"):
        llada.generate(without, PROMPTS, **args)


def test_what_a_wrapped_module_cannot_do_there():
    ours, theirs = pair("plain")
    causal = unmask.wrap(Theirs(ours).eval(), mask_id=MASK, shifted=False, visibility="block_causal", block_size=4)
    for f, arguments in (*LLADA.items(), (dream.diffusion_generate, {})):
        with pytest.raises(unmask.SettingError, match="model must be bidirectional, got Theirs wrapped as block-causal: .* use unmask.generate"):
            f(causal, PROMPTS, **arguments)
        with pytest.raises(unmask.SettingError, match="bare or from unmask.wrap, got int"):
            f(3, PROMPTS, **arguments)
    with pytest.raises(unmask.SettingError, match="must not be one from unmask.load inside unmask.wrap; pass the model itself"):
        llada.generate(unmask.wrap(ours, shifted=True), PROMPTS)
    for f in (fast_dllm.generate_with_prefix_cache, adablock.generate_adablock_dual_cache):
        with pytest.raises(unmask.SettingError, match=r"Theirs\.forward lacks past_key_values"):
            f(theirs, PROMPTS, **LLADA[f])
    stores = (
        (sdar.block_diffusion_generate, ({"input_ids": PROMPTS[:1]}, MASK)), (llada2.generate, (PROMPTS[:1],)), (fast_dllm_v2.generate, (PROMPTS[:1], None)),
        (s2d2_llada2.generate_ssd_policy, (PROMPTS[:1],)), (s2d2_v2.generate_ssd_policy, (PROMPTS[:1],)),
        (s2d2_sdar.block_diffusion_generate, ({"input_ids": PROMPTS[:1]}, MASK)),
    )  # fmt: skip
    for f, arguments in stores:
        with pytest.raises(unmask.SettingError, match="model must be one from unmask.load, got Theirs from unmask.wrap, .* unmask.generate takes it"):
            f(theirs, *arguments)
    assert theirs.module.calls == causal.module.calls == 0
