"""LLaDA's `generate` and `get_log_likelihood` (ML-GSAI/LLaDA, files of these names; arXiv 2502.09992) on unmask's ops."""

from __future__ import annotations

import torch

from ..decode.policy import Policy
from ..decode.schedule import FixedBlocks
from ..errors import SettingError
from ..likelihood import log_likelihood
from ..likelihood.masks import check_samples
from ..models.foreign import UNLIMITED, Foreign
from ..models.model import Model
from ..values import number
from . import _loop

EOS_ID, EOT_ID = 126081, 126348  # LLaDA-8B's; the authors' code hard-codes them


@_loop.wrapped_mask
def generate(
    model: torch.nn.Module | Foreign,
    prompt: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
) -> torch.Tensor:
    """Fixed-steps denoising, left to right in blocks; returns x int64 [B, P + gen_length].

    model: from `unmask.load`, or any module that returns logits [B, L, V] (or an object with `.logits`), bare or from `unmask.wrap` (then mask_id
    is by default the wrapper's, and logits are shifted where it says so). prompt: int64 [B, P].
    attention_mask: [B, P], zeros on the left for padding. steps is the number of forwards, also when it exceeds the number of masks (the
    surplus commits nothing, as in the authors' code). cfg_scale: logits u + (w + 1)(c - u), with the prompt masked in u
    (combined before the head, which is linear; in bf16 that rounds once where the authors round twice, so near ties may fall otherwise).
    remasking: "low_confidence" or "random". logits_eos_inf, confidence_eos_eot_inf: as the authors' flags, the second with its quirk (at
    temperature > 0 only EoT loses its confidence). Differences: the mask token is never predicted, ties go to the lowest index, prompt
    positions never change even if they hold mask_id, and samples (temperature > 0, remasking="random") come from a counter-based
    generator seeded from torch's default one. Raises SettingError (a ValueError) for bad arguments.
    """
    _loop.check_model(model)
    blocks = _loop.check_arguments(prompt, steps, gen_length, block_length, temperature, remasking, mask_id, quota=True)
    w = number("cfg_scale", cfg_scale, -1e30, 1e30)
    eos, eot = _end_ids(model) if logits_eos_inf or confidence_eos_eot_inf else (EOS_ID, EOT_ID)
    drops = ()
    if confidence_eos_eot_inf:
        drops = (eot,) if temperature > 0 else (eos, eot)
    policy = Policy(
        rule="quota",
        score=_loop.REMASKING[remasking],
        temperature=float(temperature),
        suppress=(eos,) if logits_eos_inf else (),
        confidence_drops=drops,
        rounded=True,
    )
    per_block = steps // blocks if blocks else 0
    return _loop.prepare(
        model, prompt, policy, gen_length=gen_length, mask_id=mask_id, schedule=FixedBlocks(block_length), steps=steps,
        cfg_scale=w if w > 0 else 0.0,  # the authors test w > 0
        attention_mask=attention_mask, min_steps=lambda row: per_block,
    ).run()[0]  # fmt: skip


@_loop.wrapped_mask
def get_log_likelihood(
    model: torch.nn.Module | Foreign,
    prompt: torch.Tensor,
    answer: torch.Tensor,
    mc_num: int = 128,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    mask_id: int = 126336,
) -> float:
    """Monte-Carlo estimate of log p(answer | prompt) in nats: `unmask.likelihood.log_likelihood` with the authors' arguments.

    model: as in `generate`. prompt, answer: int64 [P] and [L']. mc_num: samples, a multiple of batch_size. Differences: equal masks are scored once,
    cross-entropies are in float32, and the masks come from a counter-based generator seeded from torch's default one. Raises SettingError (a
    ValueError) for bad arguments.
    """
    check_samples("mc_num", mc_num, batch_size)
    w = number("cfg_scale", cfg_scale, -1e30, 1e30)
    seed = int(torch.randint(0, 2**62, ()))
    w = w if w > 0 else 0.0  # the authors test w > 0
    return log_likelihood(model, prompt, answer, samples=mc_num, batch_size=batch_size, cfg_scale=w, seed=seed, mask_id=mask_id).value


def _end_ids(model: torch.nn.Module | Foreign) -> tuple[int, int]:
    """EOS and EoT: LLaDA-8B's, or the end-of-sequence ids of a smaller model of the same layout."""
    if not isinstance(model, (Model, Foreign)) or EOT_ID < model.config.vocab_size < UNLIMITED:
        return EOS_ID, EOT_ID
    if not model.config.eos_ids:
        todo = "; pass unmask.wrap(module, eos_ids=...)" if isinstance(model, Foreign) else ""
        raise SettingError(f"logits_eos_inf and confidence_eos_eot_inf need an end-of-sequence id, and this model's config names none{todo}")
    return model.config.eos_ids[0], model.config.eos_ids[-1]
