"""The compat functions of block-causal models: what their golden runs do not hold, arguments in every form, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import unmask
from block_causal_kit import MASK, model, one
from random_models import make
from unmask.compat import fast_dllm_v2, llada2, sdar
from unmask.errors import SettingError


def test_sdar_never_overwrites_what_is_decided():
    """Its own top-k does, where a step's quota exceeds the masks left: two steps of four positions each, five masks of the prompt's block."""
    prompt = one(11)
    x = sdar.block_diffusion_generate(
        model("sdar", 8), prompt, MASK, 8, 8, denoising_steps=2, remasking_strategy="low_confidence_static", temperature=0.0
    )
    assert x.shape == (1, 24) and x[0, :11].tolist() == prompt[0].tolist() and MASK not in x[0, 11:]
    fused = unmask.generate(model("sdar", 8), prompt[0].tolist(), max_new_tokens=8, policy="quota", steps=4, eos_stop=False)
    assert fused.canvas[:11] == prompt[0].tolist()


def test_sdar_samples_by_torchs_seed_and_replays_what_it_drew():
    m, prompt, drawn = model("sdar", 8), one(6), []
    options = dict(mask_id=MASK, gen_length=16, block_length=4, denoising_steps=4, confidence_threshold=0.4)

    def run(seed: int, **more):
        torch.manual_seed(seed)
        return sdar.block_diffusion_generate(m, {"input_ids": prompt}, return_forward_stats=True, **options | more)

    a, b, c = run(1), run(1), run(2)
    assert a[0].equal(b[0]) and a[1] == b[1] and not a[0].equal(c[0])
    # every step's draw, from the order in which positions were settled
    x = a[0][0].tolist()
    for step in a[1]["decoding_order"]:
        settled = [p for p in step if p != "|"]
        drawn.append([x[settled[0] // 4 * 4 + i] for i in range(4)])
    with pytest.raises(SettingError, match="sampled_tokens must hold the tokens of every step"):
        run(1, sampled_tokens=drawn[:1])
    again = run(3, sampled_tokens=drawn * 4, remasking_strategy="sequential")
    assert again[0].shape == a[0].shape
    for wrong in (dict(temperature=0.5), dict(top_k=3), dict(top_p=0.9)):
        with pytest.raises(SettingError, match="needs temperature=1"):
            run(1, sampled_tokens=drawn, **wrong)
    for wrong_tokens in ([[1, 2]], [[1, 2, 3, 61]], "x"):
        with pytest.raises(SettingError, match="sampled_tokens must hold 4 token ids"):
            run(1, sampled_tokens=wrong_tokens)
    with pytest.raises(SettingError, match="sampled_tokens must not hold the mask token 60"):
        run(1, sampled_tokens=[[1, 2, 3, MASK]])
    filtered = [run(5, temperature=0.7, top_k=1)[0], run(6, temperature=0.7, top_k=1)[0], run(7, temperature=0.7, top_p=1e-6)[0]]
    assert all(f.equal(filtered[0]) for f in filtered)  # one token is left, whatever the seed
    greedy = run(5, temperature=1.0, do_sample=False)[0]
    assert greedy.equal(run(8, temperature=0.0)[0])


def test_v2_sees_a_prompt_of_one_block():
    """The authors' code drops it; its first forward is then the prefill, whose last logits give the first token."""
    m = model("v2", 8)
    options = dict(max_new_tokens=8, mask_id=MASK, threshold=0.5, small_block_size=4, block_size=8, stop_token=59)
    x, y = (fast_dllm_v2.generate(m, one(8, seed), **options) for seed in (1, 2))
    assert not x[0, 8:].equal(y[0, 8:])
    logits = m.logits(one(8, 1))[0, -1].clone()
    logits[MASK] = -torch.inf
    assert x[0, 8] == logits.argmax()


def test_v2_counts_whole_blocks_and_opens_the_next():
    m = model("v2", 8)
    options = dict(mask_id=MASK, threshold=0.5, small_block_size=4, block_size=8, stop_token=59)
    for prompt, new, length in ((5, 8, 9), (5, 15, 9), (5, 16, 17), (8, 8, 17), (8, 7, 9), (5, 7, 5), (11, 16, 25)):
        x = fast_dllm_v2.generate(m, one(prompt), max_new_tokens=new, **options)
        assert 59 in x[0] or x.shape[1] == length, (prompt, new)
    out, stats = fast_dllm_v2.generate(m, one(5), max_length=21, return_dict_in_generate=True, return_decoding_order=True, **options)
    assert out.sequences.equal(fast_dllm_v2.generate(m, one(5), max_new_tokens=16, **options))
    opened = [step[0] for step in stats["decoding_order"] if step[0] != int(step[0])]
    assert opened == [-8.5, -16.5] and stats["total_forward_steps"] == len(stats["decoding_order"])
    torch.manual_seed(0)
    a = fast_dllm_v2.generate(m, one(5), max_new_tokens=16, temperature=1.0, **options)
    torch.manual_seed(0)
    assert a.equal(fast_dllm_v2.generate(m, one(5), max_new_tokens=16, temperature=1.0, **options))


def test_llada2_forwards_once_more_where_editing_is_off():
    """As the authors' loop: with post steps allowed, a block without masks is forwarded once, edits nothing and ends."""
    m, options = model("sdar", 8), dict(gen_length=19, block_length=8, threshold=0.5, mask_id=MASK, eos_id=59)
    (x, short), (y, long) = (llada2.generate_cached(m, one(5), editing_threshold=2.0, max_post_steps=n, **options) for n in (0, 16))
    assert x.equal(y) and long["nfe"] == short["nfe"] + 3
    assert llada2.generate(m, one(5), return_stats=False, editing_threshold=2.0, **options).equal(x)
    torch.manual_seed(0)
    a, _ = llada2.generate_cached(m, one(5), temperature=1.0, top_k=5, top_p=0.9, **options)
    torch.manual_seed(0)
    b, _ = llada2.generate_cached(m, one(5), temperature=1.0, top_k=5, top_p=0.9, **options)
    assert a.equal(b)


def test_arguments_in_every_form_that_the_authors_take():
    """Stop ids in a tensor or an array, a list of none; filters that are off at -1 and above 1; ids that never come."""
    m, options = model("sdar", 8), dict(mask_id=MASK, gen_length=24, block_length=4, temperature=0.0)
    whole = sdar.block_diffusion_generate(m, one(6), **options)
    first = int(whole[0, 6])
    stopped = sdar.block_diffusion_generate(m, one(6), stopping_criteria_idx=[first], **options)
    assert stopped.eq(MASK).any() and not whole.eq(MASK).any()
    for ids in (torch.tensor([first]), np.array([first, 59]), (first,), [-1, first], torch.tensor([first, -1])):
        assert sdar.block_diffusion_generate(m, one(6), stopping_criteria_idx=ids, **options).equal(stopped)
    for ids in ([], [-1], None):
        assert sdar.block_diffusion_generate(m, one(6), stopping_criteria_idx=ids, **options).equal(whole)
    refused(lambda: sdar.block_diffusion_generate(m, one(6), stopping_criteria_idx=7, **options), "must be a list of token ids or None, got 7")
    refused(lambda: sdar.block_diffusion_generate(m, one(6), stopping_criteria_idx=[0.5], **options), "stopping_criteria_idx[0] must be an integer >= -1")

    def drawn(call, **filters):
        torch.manual_seed(0)
        out = call(one(6), temperature=1.0, **filters)
        return out[0] if isinstance(out, tuple) else out

    def sdar_(prompt, **more):
        return sdar.block_diffusion_generate(m, prompt, **options | more)

    def llada2_(prompt, **more):
        return llada2.generate_cached(m, prompt, gen_length=24, block_length=8, mask_id=MASK, **dict(eos_id=-1) | more)

    def v2(prompt, **more):
        return fast_dllm_v2.generate(model("v2", 8), prompt, **dict(max_new_tokens=16, block_size=8, small_block_size=4, mask_id=MASK, stop_token=-1) | more)

    for call, off in ((sdar_, dict(top_k=-1, top_p=2.0)), (llada2_, dict(top_k=-1, top_p=1.5, eos_early_stop=True)), (v2, dict(top_p=1.5))):
        plain = dict(top_p=1.0)
        assert drawn(call, **off).equal(drawn(call, **plain))
        refused(lambda call=call: drawn(call, top_p=0.0), "top_p must be a number in (0, inf)")
    for edits in (-1.0, math.inf):
        assert llada2_(one(6), editing_threshold=edits)[0].equal(llada2_(one(6), editing_threshold=min(max(edits, 0.0), 1.0))[0])


def refused(call, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        call()
    assert words in str(caught.value)


def test_compat_refuses():
    m, shifted, ids = model("sdar", 8), model("v2", 8), one(5)
    two = torch.cat([ids, ids])
    for call in (
        lambda m, x, **o: llada2.generate(m, x, **dict(mask_id=MASK, eos_id=59, gen_length=8) | o),
        lambda m, x, **o: sdar.block_diffusion_generate(m, x, **dict(mask_id=MASK, gen_length=8) | o),
    ):
        refused(lambda c=call: c(shifted, ids), "unshifted logits, got")
        refused(lambda c=call: c(make(), ids), "block-causal")
        refused(lambda c=call: c(torch.nn.Linear(1, 1), ids), "one from unmask.load, got Linear")
        refused(lambda c=call: c(m, two), "one prompt [1, P]")
        refused(lambda c=call: c(m, ids.float()), "int64 tensor")
        refused(lambda c=call: c(m, ids, mask_id=61), "mask_id must be below the model's vocabulary size 61")
        refused(lambda c=call: c(m, ids, block_length=0), "block_length must be an integer")
        refused(lambda c=call: c(m, ids, gen_length=-1), "gen_length must be an integer")
        refused(lambda c=call: c(m, ids, temperature=-1.0), "temperature")
    refused(lambda: sdar.block_diffusion_generate(m, ids, MASK, remasking_strategy="entropy_bounded"), "low_confidence_dynamic")
    refused(lambda: llada2.generate(m, ids, mask_id=MASK, eos_id=59, num_to_transfer=0), "num_to_transfer")
    v2 = dict(max_new_tokens=8, mask_id=MASK, stop_token=59, block_size=8, small_block_size=4)
    refused(lambda: fast_dllm_v2.generate(m, ids, **v2), "with shifted logits, got llada, block-causal, unshifted")
    refused(lambda: fast_dllm_v2.generate(shifted, ids, **v2 | dict(small_block_size=3)), "multiple of small_block_size")
    refused(lambda: fast_dllm_v2.generate(shifted, ids, **v2 | dict(max_new_tokens=None)), "give max_new_tokens or max_length")
    refused(lambda: fast_dllm_v2.generate(shifted, ids, **v2 | dict(threshold=float("nan"))), "threshold")
