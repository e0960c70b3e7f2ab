"""The compat functions against slow, literal loops on plain logits: flags, guidance, padding, foreign modules, bad arguments."""

from __future__ import annotations

import inspect
import types

import pytest
import torch

import unmask
from random_models import make
from unmask.compat import fast_dllm, llada

MASK = 60


def literal_llada(model, prompt, steps, gen_length, block_length, cfg_scale=0.0, drop_before=(), drop_after=()):
    """LLaDA's fixed-steps sampler at temperature 0, written down step by step on full logits (batch of one)."""
    x = torch.cat([prompt, torch.full((1, gen_length), MASK)], dim=1)
    given = x != MASK
    p, blocks = prompt.shape[1], gen_length // block_length
    per_block = steps // blocks
    for block in range(blocks):
        end = p + (block + 1) * block_length
        masks = int((x[0, :end] == MASK).sum())
        for i in range(per_block):
            logits = model.logits(x).double()
            if cfg_scale:
                empty = torch.where(given, MASK, x)
                uncond = model.logits(empty).double()
                logits = uncond + (cfg_scale + 1) * (logits - uncond)
            logits[..., list(drop_before)] = -torch.inf
            choice = logits.clone()
            choice[..., MASK] = -torch.inf
            token = choice.argmax(-1)
            logits[..., list(drop_after)] = -torch.inf
            confidence = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
            eligible = (x == MASK) & (torch.arange(x.shape[1]) < end)
            confidence = torch.where(eligible, confidence, -1.0)
            n = masks // per_block + (i < masks % per_block)
            best = sorted(range(x.shape[1]), key=lambda j: (-confidence[0, j].item(), j))[:n]
            for j in best:
                if eligible[0, j]:
                    x[0, j] = token[0, j]
    return x


class Foreign(torch.nn.Module):
    """Somebody's own module: logits from a model of ours, as a tensor or in an object, with or without an attention mask."""

    def __init__(self, model, wrap=True):
        super().__init__()
        self.model, self.wrap, self.calls = model, wrap, []

    def forward(self, ids, attention_mask=None):
        self.calls.append((ids.shape, None if attention_mask is None else attention_mask.shape))
        logits = self.model.logits(ids)
        return types.SimpleNamespace(logits=logits) if self.wrap else logits


@pytest.fixture(scope="module")
def model():
    return make(seed=12)


PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize(
    "settings, drops",
    [
        ({}, {}),
        (dict(cfg_scale=1.5), {}),
        (dict(logits_eos_inf=True), dict(drop_before=[59])),
        (dict(confidence_eos_eot_inf=True), dict(drop_after=[59])),
        (dict(logits_eos_inf=True, cfg_scale=0.5), dict(drop_before=[59])),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps, gen, block", [(12, 12, 12), (12, 12, 4), (4, 16, 8), (6, 4, 2)])
def test_llada_flags(model, settings, drops, steps, gen, block):
    expected = literal_llada(model, PROMPT, steps, gen, block, settings.get("cfg_scale", 0.0), **drops)
    assert llada.generate(model, PROMPT, steps=steps, gen_length=gen, block_length=block, mask_id=MASK, **settings).tolist() == expected.tolist()


@pytest.mark.parametrize("wrap", [True, False])
def test_foreign_modules_give_the_same_tokens(model, wrap):
    prompt = torch.cat([PROMPT, PROMPT.flip(1)])
    args = dict(steps=12, gen_length=12, block_length=6, mask_id=MASK)
    foreign = Foreign(model, wrap)
    assert torch.equal(llada.generate(foreign, prompt, **args), llada.generate(model, prompt, **args))
    assert len(foreign.calls) == 12 and all(shape == (2, 17) for shape, _ in foreign.calls)
    mask = torch.ones_like(prompt)
    assert torch.equal(llada.generate(foreign, prompt, mask, cfg_scale=1.0, **args), llada.generate(model, prompt, mask, cfg_scale=1.0, **args))
    assert foreign.calls[-1] == ((4, 17), (4, 17))
    ours, nfe = fast_dllm.generate(model, prompt, gen_length=12, block_length=6, mask_id=MASK, threshold=0.4)
    theirs, foreign_nfe = fast_dllm.generate(foreign, prompt, gen_length=12, block_length=6, mask_id=MASK, threshold=0.4)
    assert torch.equal(ours, theirs) and nfe == foreign_nfe
    for cached in (fast_dllm.generate_with_prefix_cache, fast_dllm.generate_with_dual_cache):
        with pytest.raises(unmask.SettingError, match="needs a model loaded with unmask.load"):
            cached(foreign, prompt, gen_length=12, block_length=6, mask_id=MASK)


def test_a_module_with_the_wrong_output_is_named():
    class Wrong(torch.nn.Module):
        def forward(self, ids):
            return torch.zeros(ids.shape[0], 61)

    with pytest.raises(ValueError, match=r"must return logits \[B, L, V\]"):
        llada.generate(Wrong(), PROMPT, gen_length=4, block_length=4, steps=4, mask_id=MASK)


def test_padding_does_not_change_a_row(model):
    args = dict(steps=8, gen_length=8, block_length=4, mask_id=MASK)
    alone = llada.generate(model, PROMPT, **args)
    padded = torch.cat([torch.full((1, 3), 59), PROMPT], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    other = torch.arange(8)[None]
    out = llada.generate(model, torch.cat([padded, other]), torch.cat([mask, torch.ones(1, 8, dtype=torch.int64)]), **args)
    assert out[0, 3:].tolist() == alone[0].tolist() and out[0, :3].tolist() == [59] * 3
    assert out[1].tolist() == llada.generate(model, other, **args)[0].tolist()
    with pytest.raises(unmask.SettingError, match="zeros on the left"):
        llada.generate(model, padded, mask.flip(1), **args)
    with pytest.raises(unmask.SettingError, match=r"attention_mask must be \[B, P\]"):
        llada.generate(model, PROMPT, mask, **args)


def test_more_steps_than_masks_run_and_commit_nothing(model):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    a = llada.generate(model, PROMPT, steps=24, gen_length=8, block_length=4, mask_id=MASK)
    handle.remove()
    assert len(calls) == 24
    assert torch.equal(a, llada.generate(model, PROMPT, steps=8, gen_length=8, block_length=4, mask_id=MASK))


@pytest.mark.parametrize("cached", [fast_dllm.generate_with_prefix_cache, fast_dllm.generate_with_dual_cache])
def test_superfluous_forward(model, cached):
    """threshold 0 finishes each block in its full forward; the authors' first revision then ran one more."""
    args = dict(gen_length=12, block_length=4, mask_id=MASK)
    x, nfe = cached(model, PROMPT, threshold=0.0, **args)
    y, less = cached(model, PROMPT, threshold=0.0, superfluous_forward=False, **args)
    assert (nfe, less) == (6, 3) and torch.equal(x, y)
    assert cached(model, PROMPT, threshold=0.0, factor=None, **args)[1] == 3  # AdaBlock's callers pass both
    assert cached(model, PROMPT, 128, 12, 4, 0.0, "low_confidence", MASK, 0.0, None)[1] == 3
    assert cached(model, PROMPT, factor=1e9, **args)[1] == 3 and cached(model, PROMPT, factor=1e9, superfluous_forward=True, **args)[1] == 6


def test_random_remasking_and_temperature_follow_torch_seed(model):
    args = dict(steps=8, gen_length=8, block_length=8, mask_id=MASK)
    for settings in (dict(remasking="random"), dict(temperature=1.0), dict(temperature=0.5, remasking="random")):
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(llada.generate(model, PROMPT, **settings, **args))
        assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_random_order_is_uniform(model):
    """remasking="random" at one token per step commits in a uniformly random order: each position comes first equally often."""
    firsts = torch.zeros(4)
    for seed in range(400):
        r = unmask.generate(model, [1, 2], max_new_tokens=4, policy="quota", score="random", seed=seed, trace=True, eos_stop=False)
        firsts[r.trace[0]["committed"][0][0] - 2] += 1
    chi2 = ((firsts - 100) ** 2 / 100).sum()
    assert chi2 < 16.3  # 3 degrees of freedom, alpha 1e-3


def test_signatures_and_defaults_are_the_authors():
    def parameters(f):
        return {n: p.default for n, p in inspect.signature(f).parameters.items() if p.kind is not p.KEYWORD_ONLY}

    empty = inspect.Parameter.empty
    assert parameters(llada.generate) == dict(
        model=empty, prompt=empty, attention_mask=None, steps=128, gen_length=128, block_length=128, temperature=0.0, cfg_scale=0.0,
        remasking="low_confidence", mask_id=126336, logits_eos_inf=False, confidence_eos_eot_inf=False,
    )  # fmt: skip
    for f in (fast_dllm.generate, fast_dllm.generate_with_prefix_cache, fast_dllm.generate_with_dual_cache):
        assert parameters(f) == dict(
            model=empty, prompt=empty, steps=128, gen_length=128, block_length=128, temperature=0.0, remasking="low_confidence",
            mask_id=126336, threshold=None, factor=None,
        )  # fmt: skip


BAD = [
    (dict(steps=0), "steps must be an integer in 1..1048576, got 0"),
    (dict(steps=2**70), "steps must be an integer in 1..1048576"),
    (dict(gen_length=10**12), "gen_length must be an integer in 0..1048576"),
    (dict(temperature=1e308), r"temperature must be a number in \[0, 1e\+30\]"),
    (dict(remasking=["low_confidence"]), "unknown remasking"),
    (dict(steps=7), "steps must be a multiple of the number of blocks"),
    (dict(gen_length=10), "gen_length must be a multiple of block_length"),
    (dict(block_length=0), "block_length must be an integer in 1"),
    (dict(temperature=-1.0), "temperature must be a number"),
    (dict(remasking="low_confidense"), "did you mean 'low_confidence'"),
    (dict(mask_id=-1), "mask_id must be an integer in 0"),
    (dict(mask_id=61), "mask_id must be below the model's vocabulary size 61, got 61; this model's is 60"),
    (dict(prompt=[[1]]), "prompt must be an int64 tensor"),
    (dict(prompt=torch.tensor([1])), "prompt must be an int64 tensor"),
    (dict(prompt=torch.tensor([[61]])), r"token id at \[0, 0\] must be in 0..60, got 61"),
]


@pytest.mark.parametrize("change, text", BAD, ids=[str(c) for c, _ in BAD])
@pytest.mark.parametrize("f", [llada.generate, fast_dllm.generate, fast_dllm.generate_with_dual_cache], ids=lambda f: f.__name__)
def test_bad_arguments(model, f, change, text):
    args = dict(prompt=PROMPT, steps=8, gen_length=8, block_length=4, mask_id=MASK) | change
    with pytest.raises(unmask.SettingError, match=text):
        f(model, **args)


def test_more_bad_arguments(model):
    args = dict(gen_length=8, block_length=4, steps=8, mask_id=MASK)
    with pytest.raises(unmask.SettingError, match="cfg_scale must be a number"):
        llada.generate(model, PROMPT, cfg_scale=float("nan"), **args)
    with pytest.raises(unmask.SettingError, match="give threshold or factor, not both"):
        fast_dllm.generate(model, PROMPT, threshold=0.5, factor=1.0, **args)
    with pytest.raises(unmask.SettingError, match="threshold must be a number"):
        fast_dllm.generate(model, PROMPT, threshold=float("nan"), **args)


    for factor in ("abc", [1], 0, float("inf")):
        with pytest.raises(unmask.SettingError, match="factor must be a number"):
            fast_dllm.generate_with_dual_cache(model, PROMPT, factor=factor, **args)
    for f in (llada.generate, fast_dllm.generate):
        for wrong in ("tiny", None):
            with pytest.raises(unmask.SettingError, match="model must be a model from unmask.load or a torch.nn.Module"):
                f(wrong, PROMPT, **args)


class Returns(torch.nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, ids):
        return self.out


@pytest.mark.parametrize(
    "out, settings, text",
    [
        ((torch.zeros(1, 13, 61),), {}, "must return logits .* or an object with .logits, got tuple"),
        (torch.zeros(1, 13, 61, dtype=torch.float64), {}, "must be float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(1, 5, 61), {}, r"must return logits \[B, L, V\] = \[1, 13, any\]"),
        (torch.zeros(1, 13, 60), {}, "mask_id must be below the module's vocabulary size 60, got 60"),
        (torch.zeros(1, 13, 61), dict(logits_eos_inf=True), "an id to suppress must be below the module's vocabulary size 61, got 126081"),
    ],
)
def test_what_a_foreign_module_returns_is_checked(out, settings, text):
    with pytest.raises(unmask.SettingError, match=text):
        llada.generate(Returns(out), PROMPT, gen_length=8, block_length=4, steps=8, mask_id=MASK, **settings)


def test_a_model_without_eos_ids():
    model, args = make(eos_ids=()), dict(gen_length=8, block_length=4, steps=8, mask_id=MASK)
    assert llada.generate(model, PROMPT, **args).shape == (1, 13)
    with pytest.raises(unmask.SettingError, match="need an end-of-sequence id"):
        llada.generate(model, PROMPT, logits_eos_inf=True, **args)


def test_steps_do_not_matter_to_threshold_and_factor(model):
    args = dict(gen_length=8, block_length=4, mask_id=MASK)
    for rule in (dict(threshold=0.9), dict(factor=1.0)):
        x, nfe = fast_dllm.generate(model, PROMPT, steps=1, **rule, **args)
        y, other = fast_dllm.generate(model, PROMPT, steps=128, **rule, **args)
        assert torch.equal(x, y) and nfe == other


def test_cfg_scale_of_zero_and_below_is_off(model):
    args = dict(gen_length=8, block_length=4, steps=8, mask_id=MASK)
    assert torch.equal(llada.generate(model, PROMPT, cfg_scale=-1.0, **args), llada.generate(model, PROMPT, **args))


def literal_fast_dllm(model, prompt, gen_length, block_length, steps=None, threshold=None):
    """Fast-dLLM's loop without a cache at temperature 0, with its float64 softmax."""
    x = torch.cat([prompt, torch.full((1, gen_length), MASK)], dim=1)
    nfe = 0
    for begin in range(prompt.shape[1], x.shape[1], block_length):
        quotas, end = None, begin + block_length
        if threshold is None:
            per_block = steps * block_length // gen_length
            quotas = [block_length // per_block + (i < block_length % per_block) for i in range(per_block)]
        while (x[0, begin:end] == MASK).any():
            logits = model.logits(x)[0, begin:end].double()
            choice = logits.clone()
            choice[:, MASK] = -torch.inf
            token = choice.argmax(-1)
            p = logits.softmax(-1).gather(-1, token[:, None])[:, 0]
            p[x[0, begin:end] != MASK] = -torch.inf
            order = sorted(range(block_length), key=lambda j: (-p[j].item(), j))
            live = int((p > -torch.inf).sum())
            n = quotas.pop(0) if quotas is not None else max(1, int((p >= threshold).sum()))
            for j in order[: min(n, live)]:
                x[0, begin + j] = token[j]
            nfe += 1
    return x, nfe


class Sure(torch.nn.Module):
    """A model whose logits are spread until most of its probabilities are 1.0 in float32."""

    def __init__(self, seed):
        super().__init__()
        self.model = [make(seed=seed)]

    def logits(self, ids):
        return self.model[0].logits(ids) * 24.0

    forward = logits


@pytest.mark.parametrize("rule", [dict(threshold=1.0), dict(threshold=0.9999999), dict(steps=8), dict(steps=6)], ids=str)
def test_sure_models_are_ordered_in_float64(rule):
    """The authors compare float64, where 1 - 1e-9 and 1 - 1e-12 are two numbers."""
    sure = 0
    for seed in range(12):
        model, prompt = Sure(seed), torch.tensor([[seed, 7, 9]])
        settings = dict(gen_length=16, block_length=8, **rule)
        x, nfe = fast_dllm.generate(model, prompt, mask_id=MASK, **settings)
        want, steps = literal_fast_dllm(model, prompt, **settings)
        assert torch.equal(x, want) and nfe == steps
        p = model.logits(torch.cat([prompt, torch.full((1, 16), MASK)], 1))[0, 3:].softmax(-1).amax(-1)
        sure += int((p == 1.0).sum())
    assert sure > 20


def test_llada_rounds_confidence_to_the_logits(model):
    """LLaDA's softmax has the dtype of the logits: among positions that round to the same value the first one goes first."""
    from unmask.decode.policy import Policy
    from unmask.decode.rules.base import Run
    from unmask.decode.schedule import FixedBlocks
    from unmask.decode.scores import Score
    from unmask.decode.state import DecodeState
    from unmask.ops import logit_stats

    state = DecodeState([[MASK] * 2], [[False] * 2], MASK, FixedBlocks(2), None, [0], torch.device("cpu"))

    def score(stats, dtype, **options):
        return Score(Run(Policy("quota", **options), state, MASK))(None, stats, dtype)

    x = torch.zeros(2, 50)
    x[:, 3] = torch.tensor([30.0, 31.0])
    stats = logit_stats(x)
    exact, rounded = score(stats, torch.float32), score(stats, torch.float32, rounded=True)
    assert exact[0] < exact[1] and rounded[0] == rounded[1] == 1.0
    x[:, 3] = torch.tensor([5.0300, 5.0302])
    stats = logit_stats(x)
    assert score(stats, torch.bfloat16, rounded=True).unique().numel() == 1


def test_nothing_to_generate(model):
    assert torch.equal(llada.generate(model, PROMPT, gen_length=0, block_length=4, mask_id=MASK), PROMPT)
    x, nfe = fast_dllm.generate_with_dual_cache(model, PROMPT, gen_length=0, block_length=4, mask_id=MASK)
    assert torch.equal(x, PROMPT) and nfe == 0
    empty = torch.empty((0, 5), dtype=torch.int64)
    assert llada.generate(model, empty, gen_length=4, block_length=4, steps=4, mask_id=MASK).shape == (0, 9)
