"""compat.dream against literal loops on plain logits; its arguments, hooks, padding, binding, sampling, and how it calls a user's module."""

from __future__ import annotations

import inspect
import types

import pytest
import torch

import author_modules
import unmask
from random_models import make
from unmask.compat import dream
from unmask.compat.dream import DreamModelOutput, diffusion_generate

MASK = 60
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
TWO = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def model():
    return make(seed=3, shifted=True)


@pytest.fixture(scope="module")
def module():
    return author_modules.Dream()


def shifted_logits(model, x):
    logits = model.logits(x)
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


def tokens_and_scores(logits, alg, top_p=None, top_k=None):
    """Dream's sample_tokens at temperature 0, with a sort: tokens and what `alg` orders by. The mask token keeps its probability and is no choice."""
    low = torch.finfo(logits.dtype).min
    if top_p is not None:
        ordered, index = logits.sort(-1, descending=True)
        gone = ordered.softmax(-1).cumsum(-1) > top_p
        gone = torch.cat([torch.zeros_like(gone[..., :1]), gone[..., :-1]], -1)
        logits = logits.masked_fill(torch.zeros_like(gone).scatter(-1, index, gone), low)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][..., -1:], low)
    p = logits.softmax(-1)
    best = logits.clone()
    best[..., MASK] = -torch.inf
    token = best.argmax(-1)
    if alg == "topk_margin":
        p[..., MASK] = 0
        top = p.topk(2, -1)[0]
        return token, top[..., 0] - top[..., 1]
    if alg == "entropy":
        return token, (p * (p + 1e-10).log()).sum(-1)
    return token, p.gather(-1, token[..., None])[..., 0]


def best(score, masked, n):
    """The n masked positions of the highest score."""
    return sorted(masked.nonzero()[:, 0].tolist(), key=lambda j: (-score[j].item(), j))[:n]


def literal(model, prompt, new, steps, alg, eps=1e-3, **filters):
    x = torch.cat([prompt, torch.full((1, new), MASK)], 1)
    times = torch.linspace(1, eps, steps + 1)
    history = []
    for i in range(steps):
        masked = x[0] == MASK
        token, score = tokens_and_scores(shifted_logits(model, x)[0], alg, **filters)
        n = int(masked.sum())
        n = n if i == steps - 1 else int(torch.tensor(float(n)) * (1 - times[i + 1] / times[i]))
        for j in best(score, masked, n):
            x[0, j] = token[j]
        history.append(x.clone())
    return x, history


def literal_carry(model, prompt, new, steps, threshold):
    """Fast-dLLM's confidence_threshold on the whole canvas."""
    x = torch.cat([prompt, torch.full((1, new), MASK)], 1)
    each, left, i = new // steps, 0, 0
    while i < steps:
        token, score = tokens_and_scores(shifted_logits(model, x)[0], "maskgit_plus")
        order = best(score, x[0] == MASK, each + left)
        left, extra = 0, 0
        for rank, j in enumerate(order):
            if rank and score[j] < threshold:
                left += 1
                extra = int(i == steps - 1)  # theirs: `steps += 1` in this loop, after which i is the last step no more
            else:
                x[0, j] = token[j]
        if extra:
            each, steps = 0, steps + extra
        i += 1
    return x, i


def counted(model, *args, **kwargs):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        return diffusion_generate(model, *args, **kwargs), len(calls)
    finally:
        handle.remove()


@pytest.mark.parametrize("filters", [{}, dict(top_p=0.6), dict(top_k=3), dict(top_p=0.8, top_k=4)], ids=str)
@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_the_schedule_is_theirs(alg, filters):
    for seed in range(4):
        model = make(seed=seed, shifted=True)
        for steps, eps in ((12, 1e-3), (5, 0.05), (20, 1e-3)):
            want, history = literal(model, PROMPT, 12, steps, alg, eps, **filters)
            settings = dict(max_new_tokens=12, steps=steps, alg=alg, eps=eps, mask_token_id=MASK, **filters)
            out, calls = counted(model, PROMPT, return_dict_in_generate=True, output_history=True, **settings)
            assert torch.equal(out.sequences, want) and calls == steps
            assert all(torch.equal(a, b) for a, b in zip(out.history, history, strict=True))


def test_carry_over_takes_their_number_of_forwards():
    extra = 0
    for seed in range(5):
        model = make(seed=seed, shifted=True)
        for threshold in (0.0, 0.2, 0.35, 0.5, 2.0):
            for steps in (1, 2, 6, 12):
                want, nfe = literal_carry(model, PROMPT, 12, steps, threshold)
                got, calls = counted(model, PROMPT, max_new_tokens=12, steps=steps, alg="confidence_threshold", threshold=threshold, mask_token_id=MASK)
                assert torch.equal(got, want) and calls == nfe
                extra += nfe > steps
    assert extra > 10  # the quirk was exercised


class Sharp(torch.nn.Module):
    """A model so sure that many of its probabilities are 1 in float32."""

    def __init__(self, seed):
        super().__init__()
        self.inner = [make(seed=seed, shifted=True)]

    def logits(self, ids):
        return self.inner[0].logits(ids) * 30

    forward = logits


def test_confidence_has_the_precision_of_the_logits():
    """A threshold of 1 commits what rounds to 1, positions that round alike in their order."""
    together = 0
    for seed in range(4):
        model = Sharp(seed)
        for steps in (4, 6):
            want, nfe = literal_carry(model, PROMPT, 12, steps, 1.0)
            got = diffusion_generate(
                model, PROMPT, max_new_tokens=12, steps=steps, alg="confidence_threshold", threshold=1.0, mask_token_id=MASK,
                return_dict_in_generate=True,
            )  # fmt: skip
            assert torch.equal(got.sequences, want) and got.nfe_history == [nfe]
            together += nfe < 12
    assert together


def test_rows_of_a_batch_are_rows_alone(model):
    for settings in (
        dict(alg="entropy", steps=7), dict(alg="confidence_threshold", steps=6, threshold=0.3), dict(alg="confidence_threshold", block_length=4, threshold=0.3, steps=6),
        dict(alg="confidence_threshold", block_length=6, dual_cache=True, threshold=0.2), dict(alg="entropy", block_length=6, dual_cache=True, steps=8),
    ):  # fmt: skip
        settings = dict(max_new_tokens=12, mask_token_id=MASK) | settings
        settings.setdefault("steps", 512)
        together = diffusion_generate(model, TWO, **settings)
        assert torch.equal(together, torch.cat([diffusion_generate(model, row[None], **settings) for row in TWO]))
        padded = torch.cat([torch.full((1, 3), 59), PROMPT], 1)
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
        assert torch.equal(diffusion_generate(model, padded, attention_mask=mask, **settings)[:, 3:], together[:1])


@pytest.mark.parametrize(
    "settings",
    [
        dict(alg="maskgit_plus", steps=5), dict(alg="confidence_threshold", steps=6, threshold=0.4),
        dict(alg="confidence_threshold", steps=6, block_length=4, threshold=0.4),
        dict(alg="confidence_threshold", steps=6, block_length=6, threshold=0.4, dual_cache=True),
    ],
    ids=str,
)  # fmt: skip
def test_a_users_module_gives_what_our_model_gives(module, settings):
    """Batches whose rows finish their blocks at different steps, and padding, through the module's own arguments."""
    ours = unmask.load(author_modules.GOLDEN / "dream" / "checkpoint")
    torch.manual_seed(5)
    prompt = torch.randint(0, 380, (4, 7))
    mask = torch.ones_like(prompt)
    mask[1, :3] = mask[3, :5] = 0
    for padding in ({}, dict(attention_mask=mask)):
        args = dict(max_new_tokens=12, **settings, **padding)
        assert torch.equal(diffusion_generate(module, prompt, **args), diffusion_generate(ours, prompt, **args))


def test_the_block_loop_opens_with_its_first_position(model):
    out, calls = counted(
        model, PROMPT, max_new_tokens=8, block_length=4, steps=8, alg="confidence_threshold", threshold=0.0, mask_token_id=MASK,
        return_dict_in_generate=True, output_history=True,
    )  # fmt: skip
    assert calls == 4 and out.nfe_history == [2, 2] and out.block_history == [4, 4]
    masks = [(h[0] == MASK).nonzero()[:, 0].tolist() for h in out.history]
    assert masks == [[6, 7, 8, 9, 10, 11, 12], [9, 10, 11, 12], [10, 11, 12], []]
    # a block of one position is done after its full forward; the cached one runs all the same
    assert counted(model, PROMPT, max_new_tokens=3, block_length=1, steps=3, alg="confidence_threshold", mask_token_id=MASK)[1] == 6


@pytest.mark.parametrize("dual", [False, True])
def test_one_step_per_block(model, dual):
    """Their loop leaves all but the first position of a block masked; that is off unless asked for."""
    settings = dict(max_new_tokens=8, block_length=4, steps=2, alg="entropy", dual_cache=dual, mask_token_id=MASK)
    x, calls = counted(model, PROMPT, **settings)
    assert calls == 4 and not (x == MASK).any()
    x, calls = counted(model, PROMPT, leave_masked=True, **settings)
    assert calls == 4 and (x[0] == MASK).nonzero()[:, 0].tolist() == [6, 7, 8, 10, 11, 12]


def test_lengths(model):
    settings = dict(steps=4, alg="entropy", mask_token_id=MASK)
    assert diffusion_generate(model, PROMPT, **settings).shape == (1, 25)  # the default max_length counts behind the prompt
    assert diffusion_generate(model, PROMPT, max_length=9, **settings).shape == (1, 9)
    assert diffusion_generate(model, PROMPT, max_length=9, max_new_tokens=6, **settings).shape == (1, 11)
    assert diffusion_generate(model, PROMPT, dict(max_length=9), **settings).shape == (1, 9)
    short = make(seed=3, shifted=True, max_positions=10)
    assert diffusion_generate(short, PROMPT, **settings).shape == (1, 10)
    assert diffusion_generate(model, TWO, max_new_tokens=4, num_return_sequences=3, **settings).shape == (6, 9)
    out = diffusion_generate(model, TWO, max_new_tokens=4, num_return_sequences=2, **settings)
    assert torch.equal(out[0], out[1]) and torch.equal(out[2], out[3]) and torch.equal(out[::2], diffusion_generate(model, TWO, max_new_tokens=4, **settings))


def test_a_generation_config_stands_behind_the_keywords(model):
    config = types.SimpleNamespace(max_new_tokens=6, steps=3, alg="topk_margin", mask_token_id=MASK, return_dict_in_generate=True)
    out = diffusion_generate(model, PROMPT, config)
    assert isinstance(out, DreamModelOutput) and out.history is None
    want = diffusion_generate(model, PROMPT, max_new_tokens=6, steps=3, alg="topk_margin", mask_token_id=MASK)
    assert torch.equal(out.sequences, want) and torch.equal(out["sequences"], want) and torch.equal(out[0], want)
    assert torch.equal(diffusion_generate(model, PROMPT, config, alg="entropy").sequences, diffusion_generate(model, PROMPT, vars(config) | dict(alg="entropy")).sequences)
    with pytest.raises(KeyError):
        out["history"]


def test_bound_as_a_method(model, module):
    for target, prompt, mask in ((model, PROMPT, {}), (module, PROMPT, {})):
        target.diffusion_generate = types.MethodType(dream.diffusion_generate, target)
        args = dict(max_new_tokens=6, steps=3, alg="entropy") | mask
        assert torch.equal(target.diffusion_generate(prompt, **args), diffusion_generate(target, prompt, **args))


def test_the_signature_is_theirs():
    kinds = {n: (p.default, p.kind) for n, p in inspect.signature(diffusion_generate).parameters.items()}
    P = inspect.Parameter
    assert kinds == dict(
        model=(P.empty, P.POSITIONAL_OR_KEYWORD), inputs=(None, P.POSITIONAL_OR_KEYWORD), generation_config=(None, P.POSITIONAL_OR_KEYWORD),
        kwargs=(P.empty, P.VAR_KEYWORD),
    )  # fmt: skip


SAMPLED = [
    dict(alg="entropy", temperature=0.8, top_p=0.9, top_k=20), dict(alg="maskgit_plus", alg_temp=0.7), dict(alg="origin"),
    dict(alg="topk_margin", temperature=1.5, top_p=0.95), dict(alg="confidence_threshold", temperature=1.0, top_k=10),
    dict(alg="confidence_threshold", temperature=1.0, block_length=6, dual_cache=True), dict(alg="entropy", temperature=1.0, alg_temp=0.5, block_length=6),
]  # fmt: skip


@pytest.mark.parametrize("settings", SAMPLED, ids=str)
def test_sampling_follows_torch_seed(model, settings):
    args = dict(max_new_tokens=12, steps=6, mask_token_id=MASK) | settings
    outs = []
    for seed in (1, 1, 2, 3):
        torch.manual_seed(seed)
        outs.append(diffusion_generate(model, TWO, **args))
    assert torch.equal(outs[0], outs[1]) and not (outs[0] == MASK).any()
    assert not torch.equal(outs[0], outs[2]) or not torch.equal(outs[0], outs[3])


def test_top_k_of_one_is_the_argmax_at_any_temperature(model):
    args = dict(max_new_tokens=8, steps=8, alg="maskgit_plus", mask_token_id=MASK)
    forced = diffusion_generate(model, PROMPT, temperature=5.0, top_k=1, **args)
    logits = shifted_logits(model, torch.cat([PROMPT, torch.full((1, 8), MASK)], 1))
    logits[..., MASK] = -torch.inf
    first = counted(model, PROMPT, temperature=5.0, top_k=1, return_dict_in_generate=True, output_history=True, **args)[0].history
    step = next(h for h in first if not (h[0, 5:] == MASK).all())  # the first forward that commits still saw nothing but masks
    done = (step[0, 5:] != MASK).nonzero()[:, 0] + 5
    assert torch.equal(step[0, done], logits[0, done].argmax(-1)) and torch.equal(forced, first[-1])


def test_uniforms_replay_origin(model):
    settings = dict(max_new_tokens=4, steps=2, alg="origin", mask_token_id=MASK)
    half = [[0.0, 0.9, 0.2, 0.8], [0.5, 0.5]]
    out = diffusion_generate(model, PROMPT, uniforms=half, return_dict_in_generate=True, output_history=True, **settings)
    assert (out.history[0][0] == MASK).nonzero()[:, 0].tolist() == [6, 8]
    both = diffusion_generate(model, TWO, uniforms=[half[0] + [0.9, 0.1, 0.1, 0.9], torch.rand(4)], **settings)
    assert torch.equal(both[:1], out.sequences)
    with pytest.raises(unmask.SettingError, match=r"uniforms\[1\] must hold one number per masked position, 2 here, got 3"):
        diffusion_generate(model, PROMPT, uniforms=[half[0], [0.5] * 3], **settings)


class TestHooks:
    args = dict(max_new_tokens=8, steps=6, alg="maskgit_plus", mask_token_id=MASK)

    def test_they_see_every_step(self, model):
        seen = []

        def tokens(step, x, logits):
            seen.append(("tokens", step, tuple(x.shape), None if logits is None else tuple(logits.shape)))
            return x

        def edit(step, x, logits):
            seen.append(("logits", step, tuple(x.shape), tuple(logits.shape)))
            assert torch.equal(logits, shifted_logits(model, x))
            return logits

        out = diffusion_generate(model, TWO, generation_tokens_hook_func=tokens, generation_logits_hook_func=edit, **self.args)
        assert torch.equal(out, diffusion_generate(model, TWO, **self.args))
        steps = [(kind, i, (2, 13), (2, 13, 61)) for i in range(6) for kind in ("logits", "tokens")]
        assert seen == [("tokens", None, (2, 13), None), *steps]

    def test_logits_that_are_edited_decide(self, model):
        def edit(step, x, logits):
            logits[..., 7] = 100.0
            return logits

        assert (diffusion_generate(model, PROMPT, generation_logits_hook_func=edit, **self.args)[0, 5:] == 7).all()

    @pytest.mark.parametrize("alg", ["maskgit_plus", "confidence_threshold", "origin"])
    def test_tokens_that_are_set_before_the_start_stay(self, model, module, alg):
        def tokens(step, x, logits):
            if step is None:
                x[:, -2:] = torch.tensor([11, 12])
            return x

        for target in (model, module):
            args = dict(self.args, alg=alg, mask_token_id=MASK if target is model else 382)
            out, calls = counted(target, PROMPT, generation_tokens_hook_func=tokens, **args)
            assert out[0, -2:].tolist() == [11, 12] and not (out == args["mask_token_id"]).any()
            assert calls >= 6

    def test_tokens_may_be_masked_again(self, model):
        def tokens(step, x, logits):
            if step == 2:
                x[:, 5:] = MASK
            return x

        out = diffusion_generate(
            model, PROMPT, generation_tokens_hook_func=tokens, return_dict_in_generate=True, output_history=True, **self.args
        )
        assert (out.history[2][0, 5:] == MASK).all() and not (out.sequences == MASK).any()

    def test_what_they_return_is_checked(self, model):
        with pytest.raises(unmask.SettingError, match=r"generation_tokens_hook_func must return x, int64 \[1, 13\], got NoneType"):
            diffusion_generate(model, PROMPT, generation_tokens_hook_func=lambda *_: None, **self.args)
        with pytest.raises(unmask.SettingError, match=r"generation_logits_hook_func must return logits \[1, 13, 61\], got \[1, 12, 61\]"):
            diffusion_generate(model, PROMPT, generation_logits_hook_func=lambda s, x, z: z[:, 1:], **self.args)
        with pytest.raises(unmask.SettingError, match="must return logits .*, got NoneType"):
            diffusion_generate(model, PROMPT, generation_logits_hook_func=lambda s, x, z: None, **self.args)
        with pytest.raises(unmask.SettingError, match="may not mask positions before"):
            diffusion_generate(
                model, PROMPT, generation_tokens_hook_func=lambda s, x, z: x if s is None else torch.full_like(x, MASK), **self.args
            )


BAD = [
    (dict(inputs=None), "inputs must be an int64 tensor"),
    (dict(inputs=[[1]]), "inputs must be an int64 tensor"),
    (dict(inputs=torch.tensor([[61]])), r"token id at \[0, 0\] must be in 0..60, got 61"),
    (dict(max_new_token=3), "unknown argument 'max_new_token'; did you mean 'max_new_tokens'"),
    (dict(alg="entopy"), "unknown alg 'entopy'; did you mean 'entropy'"),
    (dict(steps=0), "steps must be an integer in 1"),
    (dict(steps=2.5), "steps must be an integer in 1"),
    (dict(eps=2.0), r"eps must be a number in \[0, 1\]"),
    (dict(eps=float("nan")), r"eps must be a number in \[0, 1\]"),
    (dict(temperature=-1), "temperature must be a number"),
    (dict(top_p=0.0), r"top_p must be a number in \(0, 1\]"),
    (dict(top_p=1.5), r"top_p must be a number in \(0, 1\]"),
    (dict(top_k=0), "top_k must be an integer >= 1"),
    (dict(alg_temp=-0.1), "alg_temp must be a number"),
    (dict(threshold=float("nan"), alg="confidence_threshold"), "threshold must be a number"),
    (dict(max_new_tokens=0), "max_new_tokens must be an integer in 1"),
    (dict(max_new_tokens=None, max_length=5), "max_length must be above the length of the inputs, 5, got 5"),
    (dict(mask_token_id=61), "mask_id must be below the model's vocabulary size 61"),
    (dict(mask_token_id=-1), "mask_token_id must be an integer in 0"),
    (dict(num_return_sequences=0), "num_return_sequences must be an integer in 1"),
    (dict(return_dict_in_generate=1), "return_dict_in_generate must be True or False"),
    (dict(attention_mask=torch.ones(1, 4)), r"attention_mask must be \[B, P\]"),
    (dict(attention_mask=torch.tensor([[1, 1, 1, 1, 0]])), "zeros on the left"),
    (dict(alg="confidence_threshold", steps=5), "a number of masks that is a multiple of steps=5, got 12"),
    (dict(block_length=5, steps=6), "the number of new tokens must be a multiple of block_length=5, got 12"),
    (dict(block_length=4, steps=7), "steps must be a multiple of the number of blocks, new tokens / block_length = 3, got steps=7"),
    (dict(block_length=0), "block_length must be an integer in 1"),
    (dict(dual_cache="yes", block_length=4, steps=6), "dual_cache must be True or False"),
    (dict(leave_masked=True), "leave_masked is for the block version"),
    (dict(leave_masked=1, block_length=4, steps=6), "leave_masked must be True or False"),
    (dict(uniforms=[[0.1] * 12] * 6, alg="entropy"), "uniforms is for alg='origin'"),
    (dict(uniforms=[[0.1] * 12], alg="origin"), "uniforms must hold the draws of each step, 6 here, got 1"),
    (dict(uniforms=3, alg="origin"), "uniforms must hold the draws of each step"),
    (dict(uniforms=[[0.1]], alg="origin", block_length=4), "uniforms is for the version on the whole canvas"),
    (dict(generation_tokens_hook_func=3), "generation_tokens_hook_func must be a function"),
    (dict(generation_logits_hook_func=lambda *_: None, dual_cache=True), "generation_logits_hook_func is for the version on the whole canvas"),
    (dict(generation_tokens_hook_func=lambda s, x, z: x, inputs=TWO, alg="confidence_threshold"), "need one prompt per call"),
    (
        dict(generation_logits_hook_func=lambda s, x, z: z, attention_mask=torch.tensor([[0, 1, 1, 1, 1]])),
        "hooks need whole logits .* without padding only",
    ),
]


@pytest.mark.parametrize("change, text", BAD, ids=["-".join(map(str, c))[:60] for c, _ in BAD])
def test_bad_arguments(model, change, text):
    args = dict(inputs=PROMPT, max_new_tokens=12, steps=6, mask_token_id=MASK) | change
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(unmask.SettingError, match=text):
            diffusion_generate(model, **args)
    finally:
        handle.remove()
    assert not calls


def test_padding_without_a_mask_is_pointed_out(model):
    with pytest.warns(UserWarning, match="no attention_mask says which of them are padding"):
        diffusion_generate(model, PROMPT, max_new_tokens=2, steps=2, pad_token_id=3, mask_token_id=MASK)


class Plain(torch.nn.Module):
    """ids -> shifted logits, and nothing else; counts its calls. more: another class's forward for its signature."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.calls = [model], 0

    def forward(self, ids):
        self.calls += 1
        return self.inner[0].logits(ids)


class Swallows(Plain):
    """As HF's own Dream class: unknown arguments vanish."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **loss_kwargs):
        return super().forward(input_ids)


class NoPast(Plain):
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return types.SimpleNamespace(logits=super().forward(input_ids))


def test_modules_that_cannot(model):
    args = dict(max_new_tokens=12, steps=6, mask_token_id=MASK)
    plain = Plain(model)
    for alg in ("entropy", "confidence_threshold"):
        assert torch.equal(diffusion_generate(plain, TWO, alg=alg, **args), diffusion_generate(model, TWO, alg=alg, **args))
    plain.calls = 0
    for target, more, text in (
        (plain, dict(block_length=4), "prefix cache needs a model loaded with unmask.load, or .* Plain.forward lacks past_key_values, use_cache"),
        (plain, dict(attention_mask=torch.tensor([[0, 1, 1, 1, 1]])), "attention_mask with padding needs a module called as forward"),
        (Swallows(model), dict(dual_cache=True, block_length=4), "Swallows.forward lacks replace_position, dual_cache"),
    ):
        with pytest.raises(unmask.SettingError, match=text):
            diffusion_generate(target, PROMPT, **more, **args)
        assert target.calls == 0
    with pytest.raises(unmask.SettingError, match=r"NoPast, called with use_cache=True, must return past_key_values"):
        diffusion_generate(NoPast(model), PROMPT, block_length=4, **args)
    with pytest.raises(unmask.SettingError, match="mask_token_id must be given"):
        diffusion_generate(plain, PROMPT, max_new_tokens=12, steps=6)
    for wrong in ("tiny", None):
        with pytest.raises(unmask.SettingError, match="model must be a model from unmask.load or a torch.nn.Module"):
            diffusion_generate(wrong, PROMPT, **args)


class Wrapped(torch.nn.Module):
    """As DistributedDataParallel: passes everything on."""

    def __init__(self, module):
        super().__init__()
        self.module, self.config = module, module.config

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapper_is_looked_through(module):
    args = dict(max_new_tokens=8, steps=4, block_length=4, dual_cache=True, alg="confidence_threshold")
    assert torch.equal(diffusion_generate(Wrapped(module), PROMPT, **args), diffusion_generate(module, PROMPT, **args))
