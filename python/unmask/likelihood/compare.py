"""`score_masks`: one or more models on identical masks, the building block of preference and policy objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..errors import SettingError
from ..models.foreign import Foreign
from ..values import integer
from .estimate import Estimate, _shown, check_masks, weighted
from .masks import LONGEST, Masks
from .scorer import check_cfg, check_range, masked_log_probs, scorer_of


@dataclasses.dataclass(frozen=True)
class Scores:
    """What each model says of the same masked tokens.

    estimates: one Estimate per model. log_probs: per model float32 [N, L] on its device: log-probability of each scored token, unweighted,
    0 elsewhere.
    """

    estimates: tuple[Estimate, ...]
    log_probs: tuple[torch.Tensor, ...]

    def difference(self, a: int = 0, b: int = 1) -> Estimate:
        """Model a minus model b, sample by sample: on identical masks most of the noise of the two is common and cancels, and the standard
        error is that of the difference (VRPO's use of shared masks, LLaDA 1.5, arXiv 2505.19223)."""
        x, y = self.estimates[a], self.estimates[b]
        return Estimate.of(x.values - y.values, x.masks, x.forwards + y.forwards)


@torch.no_grad()
def score_masks(
    models: torch.nn.Module | Foreign | Sequence[torch.nn.Module | Foreign],
    ids: torch.Tensor,
    masks: Masks | torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    batch_size: int = 16,
    prompt_length: int | None = None,
    cfg_scale: float = 0.0,
    mask_id: int | None = None,
    shifted: bool | None = None,
) -> Scores:
    """Scores every model on the same (sequence, mask, weight) samples.

    models: one or more, each from `unmask.load` or `unmask.wrap`, or any nn.Module that returns logits, in eval mode. ids: int64 [L], one
    sequence under all masks, or [N, L], one per mask. masks: Masks over L positions (`sample_masks(...).after(prompt_length)`), or bool [N, L] with
    weights floating [N]: a sample's value is its weight times the sum of log-probabilities at its masked positions. Rows of a bool tensor
    count as independent samples. batch_size: most rows of a forward. prompt_length: positions that must not be masked; needed with
    cfg_scale, which masks them in the unconditional input. mask_id, shifted: as in `log_likelihood`, for all models.

    For preference pairs (VRPO) score policy and reference with the same masks and take `difference()`. For policy gradients (coupled
    masks, ESPO, GDPO) these are the scores that evaluation and the frozen old policy need: no graph is kept, so the policy's own gradient
    has to come from a forward of the training code on the same masks.
    Errors: SettingError before the first forward; InvalidLogits.
    """
    models = [models] if isinstance(models, (torch.nn.Module, Foreign)) else list(models)
    if not models:
        raise SettingError("models must be at least one model, got none")
    scorers = [scorer_of(model, mask_id, shifted) for model in models]
    cfg_scale = check_cfg(cfg_scale)
    batch_size = integer("batch_size", batch_size, 1, LONGEST)
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() not in (1, 2) or ids.shape[-1] == 0:
        raise SettingError(f"ids must be int64 [L] or [N, L] with L >= 1, got {_shown(ids)}")
    masks = _weighted_masks(masks, weights, ids.shape[-1])
    if ids.dim() == 2 and ids.shape[0] != len(masks):
        raise SettingError(f"ids must have one row per mask, [N, L] = [{len(masks)}, {ids.shape[1]}], got {list(ids.shape)}")
    if prompt_length is None and cfg_scale:
        raise SettingError("cfg_scale needs prompt_length: guidance masks the prompt in the unconditional input")
    prompt_length = 0 if prompt_length is None else integer("prompt_length", prompt_length, 0, ids.shape[-1])
    if bool(masks.masked[:, :prompt_length].any()):
        raise SettingError(f"masks must not cover the prompt, the first {prompt_length} positions")
    for scorer in scorers:
        _check_fits(scorer, ids, masks)
    estimates, log_probs = [], []
    for scorer in scorers:
        placed = masks.to(scorer.device)
        found, forwards = masked_log_probs(
            scorer, ids.to(scorer.device), placed, prompt_length=prompt_length, cfg_scale=cfg_scale, batch_size=batch_size
        )
        estimates.append(Estimate.of(weighted(found, placed), masks, forwards))
        log_probs.append(found)
    return Scores(tuple(estimates), tuple(log_probs))


def _weighted_masks(masks: Masks | torch.Tensor, weights: torch.Tensor | None, length: int) -> Masks:
    if isinstance(masks, Masks):
        if weights is not None:
            raise SettingError("weights come with Masks; pass weights only with a bool tensor of masks")
    elif weights is None:
        raise SettingError("weights must be given with a bool tensor of masks: floating [N], for example L' / (number of masked positions)")
    else:
        masks = Masks(masks, weights)
    check_masks(masks, length)
    return masks


def _check_fits(scorer, ids: torch.Tensor, masks: Masks) -> None:
    check_range("ids", ids, scorer)
    longest = min(scorer.max_positions, LONGEST)
    if ids.shape[-1] > longest:
        raise SettingError(f"ids have {ids.shape[-1]} positions, but {scorer.name} takes at most {longest}")
    if bool(((ids == scorer.mask_id) & masks.masked).any()):
        raise SettingError(f"the mask token {scorer.mask_id} must not be a token to score: no text has it")
