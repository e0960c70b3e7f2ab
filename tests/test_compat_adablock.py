"""compat.adablock against literal loops on plain logits; batches with blocks of their own, users' modules, arguments."""

from __future__ import annotations

import inspect
import math
import types

import pytest
import torch

import author_modules
import unmask
from random_models import make
from unmask.compat import adablock, fast_dllm
from unmask.compat.adablock import dream_generate, dream_generate_parallel

MASK = 60
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
LLADA = (adablock.generate_adablock, adablock.generate_adablock_prefix_cache, adablock.generate_adablock_dual_cache)
FIXED = (fast_dllm.generate, fast_dllm.generate_with_prefix_cache, fast_dllm.generate_with_dual_cache)


@pytest.fixture(scope="module")
def model():
    return make(seed=1)


@pytest.fixture(scope="module")
def dream_model():
    return make(seed=1, shifted=True)


def tokens_and_scores(logits):
    p = logits.double().softmax(-1)
    best = logits.clone()
    best[..., MASK] = -torch.inf
    token = best.argmax(-1)
    return token, p.gather(-1, token[..., None])[..., 0]


def literal(model, prompt, new, size, threshold, delimiters, bar, shifted=False):
    """AdaBlock without a cache, at temperature 0: x, forwards and lengths of the blocks."""
    x = torch.cat([prompt, torch.full((1, new), MASK)], 1)
    start, stop = prompt.shape[1], prompt.shape[1] + new
    forwards, lengths = [], []
    while start < stop:
        end, n = None, 0
        while end is None or (x[0, start:end] == MASK).any():
            logits = model.logits(x)
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1) if shifted else logits
            token, p = tokens_and_scores(logits[0])
            n += 1
            if end is None:
                window = range(start, min(start + int(0.25 * new), stop))
                ends = sorted((-p[j].item(), j) for j in window if token[j] in delimiters)
                end = ends[0][1] + 1 if ends and -ends[0][0] >= bar else min(start + size, stop)
            order = sorted((j for j in range(start, end) if x[0, j] == MASK), key=lambda j: (-p[j].item(), j))
            for rank, j in enumerate(order):
                if rank == 0 or p[j] >= threshold:
                    x[0, j] = token[j]
        forwards.append(n)
        lengths.append(end - start)
        start = end
    return x, forwards, lengths


DELIMITERS = tuple(range(0, 60, 4))


@pytest.mark.parametrize("bar", [0.0, 0.12, 0.3, 5.0, math.inf])
def test_blocks_are_theirs(bar):
    kinds = set()
    for seed in range(6):
        for shifted in (False, True):
            model = make(seed=seed, shifted=shifted)
            for size, threshold in ((4, 0.3), (7, 0.9), (32, 0.2)):
                want, forwards, lengths = literal(model, PROMPT, 22, size, threshold, DELIMITERS, bar, shifted)
                if shifted:
                    out = dream_generate(
                        model, PROMPT, alg="confidence_threshold", max_new_tokens=22, block_length=size, threshold=threshold, mask_token_id=MASK,
                        delimiter_threshold=bar, delimiter_ids=DELIMITERS, return_dict_in_generate=True,
                    )  # fmt: skip
                    got = out.sequences, out.nfe_history, out.block_history
                else:
                    got = adablock.generate_adablock(
                        model, PROMPT, gen_length=22, init_block_length=size, mask_id=MASK, threshold=threshold, delimiter_ids=DELIMITERS,
                        delimiter_threshold=bar,
                    )  # fmt: skip
                assert torch.equal(got[0], want) and got[1:] == (forwards, lengths)
                kinds |= {n == size for n in lengths[:-1]}
    assert kinds == ({True} if bar > 1 else {True, False})


@pytest.mark.parametrize("f, fixed", list(zip(LLADA, FIXED, strict=True)))
def test_no_delimiters_are_fixed_blocks(model, f, fixed):
    args = dict(gen_length=12, mask_id=MASK, threshold=0.3)
    want, nfe = fixed(model, PROMPT, block_length=4, factor=None, **args)
    for off in (dict(), dict(delimiter_ids=[], delimiter_threshold=0.0), dict(delimiter_ids=[59], delimiter_threshold=1.0)):
        x, forwards, lengths = f(model, PROMPT, init_block_length=4, **off, **args)
        assert torch.equal(x, want) and sum(forwards) == nfe and lengths == [4, 4, 4]
    assert f(model, PROMPT, init_block_length=5, **args)[2] == [5, 5, 2]


@pytest.mark.parametrize("f", LLADA, ids=lambda f: f.__name__)
def test_rows_of_a_batch_have_their_own_blocks(model, f):
    torch.manual_seed(0)
    prompts = torch.randint(0, 59, (5, 6))
    args = dict(gen_length=20, init_block_length=5, mask_id=MASK, threshold=0.3, delimiter_ids=DELIMITERS, delimiter_threshold=0.05)
    x, forwards, lengths = f(model, prompts, **args)
    for i in range(5):
        alone, n, blocks = f(model, prompts[i : i + 1], **args)
        assert torch.equal(x[i : i + 1], alone) and forwards[i] == n and lengths[i] == blocks and sum(blocks) == 20
    assert len({tuple(b) for b in lengths}) > 1


@pytest.mark.parametrize("f", LLADA, ids=lambda f: f.__name__)
def test_a_users_module_takes_a_batch(f):
    """Rows whose blocks have come apart are forwarded window by window, each against its own K and V."""
    ours, module = unmask.load(author_modules.GOLDEN / "llada" / "checkpoint"), author_modules.LLaDA()
    torch.manual_seed(0)
    prompts = torch.randint(0, 380, (4, 9))
    args = dict(gen_length=24, init_block_length=6, mask_id=383, threshold=0.4, delimiter_ids=list(range(0, 380, 3)), delimiter_threshold=0.3)
    x, forwards, lengths = f(module, prompts, **args)
    want, n, blocks = f(ours, prompts, **args)
    assert torch.equal(x, want) and forwards == n and lengths == blocks and len({tuple(b) for b in lengths}) > 1
    assert len(module.calls) <= sum(map(sum, forwards))
    for cached in (fast_dllm.generate_with_prefix_cache, fast_dllm.generate_with_dual_cache):
        for rule in (dict(threshold=0.4), dict(steps=12)):
            settings = dict(gen_length=24, block_length=6, mask_id=383, **rule)
            module.calls.clear()
            x, nfe = cached(module, prompts, **settings)
            want, steps = cached(ours, prompts, **settings)
            assert torch.equal(x, want) and nfe == len(module.calls) >= steps
            assert nfe == steps or "threshold" in rule  # with fixed steps rows stay together: one forward per step


def test_delimiters_of_sampled_runs():
    """The LLaDA code looks among the sampled tokens, the Dream code among the argmax ones, by their plain confidence."""
    model, differs = make(seed=1, shifted=True), 0
    start = torch.cat([PROMPT, torch.full((1, 40), MASK)], 1)
    logits = model.logits(start)
    token, p = tokens_and_scores(torch.cat([logits[:, :1], logits[:, :-1]], 1)[0])
    delimiters = tuple(set(token[5:15].tolist()))[:3]
    ends = sorted((-p[j].item(), j) for j in range(5, 15) if token[j] in delimiters)
    for seed in range(5):
        torch.manual_seed(seed)
        args = dict(alg="confidence_threshold", max_new_tokens=40, mask_token_id=MASK, delimiter_threshold=0.0, delimiter_ids=delimiters)
        for dual in (False, True):
            out = dream_generate(model, PROMPT, temperature=3.0, dual_cache=dual, return_dict_in_generate=True, **args)
            assert out.block_history[0] == ends[0][1] + 1 - 5 and not (out.sequences == MASK).any()
        plain = make(seed=1)
        lengths = adablock.generate_adablock(
            plain, PROMPT, gen_length=40, mask_id=MASK, temperature=3.0, threshold=0.5, delimiter_ids=DELIMITERS, delimiter_threshold=0.0
        )[2]
        differs += lengths[0] != adablock.generate_adablock(
            plain, PROMPT, gen_length=40, mask_id=MASK, threshold=0.5, delimiter_ids=DELIMITERS, delimiter_threshold=0.0
        )[2][0]
    assert differs


def test_the_dual_cache_of_dream_commits_one_token_where_it_measures(dream_model):
    args = dict(
        alg="confidence_threshold", max_new_tokens=12, block_length=4, threshold=0.0, delimiter_threshold=math.inf, mask_token_id=MASK,
        return_dict_in_generate=True, output_history=True,
    )  # fmt: skip
    plain, dual = dream_generate(dream_model, PROMPT, **args), dream_generate(dream_model, PROMPT, dual_cache=True, **args)
    assert plain.nfe_history == [1, 1, 1] and dual.nfe_history == [2, 2, 2]
    assert (dual.history[0][0] == MASK).nonzero()[:, 0].tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    one = dream_generate(dream_model, PROMPT, **(args | dict(block_length=1)), dual_cache=True)
    assert one.nfe_history == [1] * 12  # no forward too many: they test first


def literal_parallel(model, prompt, new, size, steps, eps=1e-3):
    """The entropy schedule of generation_utils_block's semi-autoregressive loop."""
    x = torch.cat([prompt, torch.full((1, new), MASK)], 1)
    per_block = steps * size // new
    times, forwards = torch.linspace(1, eps, per_block + 1), []
    for start in range(prompt.shape[1], prompt.shape[1] + new, size):
        block, i = x[0, start : start + size], 1
        while (block == MASK).any():
            logits = model.logits(x)
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)[0, start : start + size]
            token, _ = tokens_and_scores(logits)
            p = logits.softmax(-1)
            entropy = (p * (p + 1e-10).log()).sum(-1)
            left = (block == MASK).nonzero()[:, 0].tolist()
            n = len(left) if i >= per_block - 1 else int(torch.tensor(float(len(left))) * (1 - times[i + 1] / times[i]))
            for j in sorted(left, key=lambda j: (-entropy[j].item(), j))[:n]:
                block[j] = token[j]
            i += 1
        forwards.append(i - 1)
    return x, forwards


def test_fixed_blocks_by_entropy():
    for seed in range(4):
        model = make(seed=seed, shifted=True)
        for size, steps in ((4, 12), (6, 8), (12, 5), (3, 8), (4, 6)):
            want, forwards = literal_parallel(model, PROMPT, 12, size, steps)
            out = dream_generate_parallel(
                model, PROMPT, alg="entropy", max_new_tokens=12, block_length=size, steps=steps, mask_token_id=MASK, return_dict_in_generate=True
            )
            assert torch.equal(out.sequences, want) and out.nfe_history == forwards and out.block_history == [size] * (12 // size)
            assert forwards == [steps * size // 12 - 1] * (12 // size)


def test_one_step_per_block(dream_model):
    args = dict(alg="entropy", max_new_tokens=12, block_length=4, steps=3, mask_token_id=MASK, return_dict_in_generate=True)
    out = dream_generate_parallel(dream_model, PROMPT, **args)
    assert not (out.sequences == MASK).any() and out.nfe_history == [1, 1, 1]
    out = dream_generate_parallel(dream_model, PROMPT, leave_masked=True, **args)
    assert (out.sequences[0, 5:] == MASK).all() and out.nfe_history == [1, 1, 1]


@pytest.mark.parametrize("f", [*LLADA, dream_generate, dream_generate_parallel], ids=lambda f: f.__name__)
def test_sampling_follows_torch_seed(model, dream_model, f):
    if f in LLADA:
        target, settings = model, [dict(temperature=1.0), dict(temperature=0.5, remasking="random"), dict(remasking="random")]
        settings = [s | dict(gen_length=16, init_block_length=8, mask_id=MASK, threshold=0.5, delimiter_ids=DELIMITERS, delimiter_threshold=0.1) for s in settings]
    else:
        target, settings = dream_model, [dict(temperature=1.0), dict(temperature=0.9, top_p=0.9, top_k=20)]
        settings = [s | dict(alg="confidence_threshold", max_new_tokens=16, block_length=8, steps=16, threshold=0.5, mask_token_id=MASK) for s in settings]
    for args in settings:
        outs = []
        for seed in (1, 1, 2, 3):
            torch.manual_seed(seed)
            out = f(target, PROMPT, **args)
            outs.append(out[0] if f in LLADA else out)
        assert torch.equal(outs[0], outs[1]) and not (outs[0] == MASK).any()
        assert not torch.equal(outs[0], outs[2]) or not torch.equal(outs[0], outs[3])


def test_steps_do_not_matter(model, dream_model):
    args = dict(gen_length=8, init_block_length=4, threshold=0.5, mask_id=MASK)
    assert torch.equal(adablock.generate_adablock(model, PROMPT, steps=1, **args)[0], adablock.generate_adablock(model, PROMPT, steps=77, **args)[0])
    args = dict(alg="confidence_threshold", max_new_tokens=8, mask_token_id=MASK)
    assert torch.equal(dream_generate(dream_model, PROMPT, steps=1, **args), dream_generate(dream_model, PROMPT, steps=77, **args))


def test_signatures_and_defaults_are_the_authors():
    empty = inspect.Parameter.empty
    for f in LLADA:
        parameters = {n: p.default for n, p in inspect.signature(f).parameters.items()}
        assert list(parameters.items()) == list(
            dict(
                model=empty, prompt=empty, steps=128, gen_length=128, init_block_length=128, temperature=0.0, remasking="low_confidence",
                mask_id=126336, threshold=None, delimiter_ids=(198,), delimiter_threshold=math.inf,
            ).items()
        )  # fmt: skip
    assert len(adablock.DREAM_DELIMITERS) == 24


def test_bound_as_a_method(dream_model):
    args = dict(alg="confidence_threshold", max_new_tokens=8, block_length=4, steps=8)
    for f in (dream_generate, dream_generate_parallel):
        dream_model.diffusion_generate = types.MethodType(f, dream_model)
        assert torch.equal(dream_model.diffusion_generate(PROMPT, **args), f(dream_model, PROMPT, **args))


def refused(model, f, text, *args, **kwargs):
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(unmask.SettingError, match=text):
            f(model, *args, **kwargs)
    finally:
        handle.remove()
    assert not calls


BAD = [
    (dict(threshold=None), "threshold must be given: a number"),
    (dict(threshold=float("nan")), "threshold must be a number"),
    (dict(init_block_length=0), "init_block_length must be an integer in 1"),
    (dict(steps=0), "steps must be an integer in 1"),
    (dict(gen_length=-1), "gen_length must be an integer in 0"),
    (dict(temperature=-1.0), "temperature must be a number"),
    (dict(remasking="low_confidense"), "did you mean 'low_confidence'"),
    (dict(mask_id=61), "mask_id must be below the model's vocabulary size 61"),
    (dict(delimiter_ids=198), "delimiter_ids must be token ids, got 198"),
    (dict(delimiter_ids=[1.5]), r"delimiters\[0\] must be an integer"),
    (dict(delimiter_ids=[-1]), r"delimiters\[0\] must be an integer"),
    (dict(delimiter_threshold=-0.1), r"delimiter_threshold must be a number in \[0, inf\)"),
    (dict(delimiter_threshold=None), "delimiter_threshold must be a number"),
    (dict(prompt=torch.tensor([1])), "prompt must be an int64 tensor"),
]


@pytest.mark.parametrize("change, text", BAD, ids=[str(c) for c, _ in BAD])
@pytest.mark.parametrize("f", LLADA, ids=lambda f: f.__name__)
def test_bad_arguments(model, f, change, text):
    refused(model, f, text, **(dict(prompt=PROMPT, gen_length=8, init_block_length=4, threshold=0.5, mask_id=MASK) | change))


BAD_DREAM = [
    (dream_generate, dict(alg="entropy"), "unknown alg 'entropy'; valid: confidence_threshold"),
    (dream_generate, dict(alg="origin"), "unknown alg 'origin'; valid: confidence_threshold"),
    (dream_generate, dict(uniforms=[]), "unknown argument 'uniforms'"),
    (dream_generate, dict(delimiter_threshold=float("nan")), "delimiter_threshold must be a number"),
    (dream_generate, dict(delimiter_ids="abc"), r"delimiters\[0\] must be an integer"),
    (dream_generate, dict(block_length=0), "block_length must be an integer"),
    (dream_generate, dict(dual_cache=1), "dual_cache must be True or False"),
    (dream_generate_parallel, dict(alg="maskgit_plus"), "unknown alg 'maskgit_plus'; valid: confidence_threshold, entropy"),
    (dream_generate_parallel, dict(block_length=5), "the number of new tokens must be a multiple of block_length=5, got 8"),
    (dream_generate_parallel, dict(steps=7, block_length=4), "steps must be a multiple of the number of blocks"),
    (dream_generate_parallel, dict(delimiter_threshold=0.3), "unknown argument 'delimiter_threshold'"),
    (dream_generate_parallel, dict(dual_cache=None), "dual_cache must be True or False"),
]


@pytest.mark.parametrize("f, change, text", BAD_DREAM, ids=[str(c[1]) for c in BAD_DREAM])
def test_bad_arguments_of_dream(dream_model, f, change, text):
    args = dict(alg="confidence_threshold", max_new_tokens=8, steps=8, block_length=4, mask_token_id=MASK) | change
    refused(dream_model, f, text, PROMPT, **args)


class Plain(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = [model]

    def forward(self, ids, **others):
        return self.inner[0].logits(ids)


def test_modules_without_a_cache(model):
    args = dict(gen_length=8, init_block_length=4, threshold=0.5, mask_id=MASK, delimiter_ids=DELIMITERS, delimiter_threshold=0.1)
    plain = Plain(model)
    ours, theirs = (adablock.generate_adablock(m, PROMPT, **args) for m in (model, plain))
    assert torch.equal(ours[0], theirs[0]) and ours[1:] == theirs[1:]
    for f, lacks in ((LLADA[1], "past_key_values, use_cache"), (LLADA[2], "past_key_values, use_cache, replace_position")):
        refused(plain, f, f"Plain.forward lacks {lacks}", PROMPT, **args)


def test_nothing_to_generate(model):
    x, forwards, lengths = adablock.generate_adablock_dual_cache(model, PROMPT, gen_length=0, threshold=0.5, mask_id=MASK)
    assert torch.equal(x, PROMPT) and forwards == lengths == []
