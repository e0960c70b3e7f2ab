"""`log_likelihood`: estimates of log p(answer | prompt), and the record that they come in."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..errors import SettingError, check_names
from ..models.foreign import Foreign
from ..values import integer
from .masks import ESTIMATORS, LONGEST, Masks, chain_masks, check_samples, check_seed, sample_masks
from .scorer import check_cfg, check_sequence, masked_log_probs, read_ids, scorer_of


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate in nats.

    value: the mean of `values` (their sum for the chain rule). standard_error: of that mean, from the means of independent replicates
    (stratified batches); nan where there is one replicate only, 0 where nothing is random. samples: their number N. values: float64 [N],
    one per sample, on the CPU. masks: what was masked; `log_likelihood(..., masks=estimate.masks)` scores the same again.
    forwards: calls of the model.
    """

    value: float
    standard_error: float
    samples: int
    values: torch.Tensor
    masks: Masks
    forwards: int

    @classmethod
    def of(cls, values: torch.Tensor, masks: Masks, forwards: int) -> Estimate:
        """From one value per sample, float64 [N]."""
        value = values.sum() if masks.additive else values.mean()
        return cls(float(value), _standard_error(values, masks), len(masks), values, masks, forwards)


@torch.no_grad()
def log_likelihood(
    model: torch.nn.Module | Foreign,
    prompt_ids: object,
    answer_ids: object,
    *,
    estimator: str = "llada",
    samples: int = 128,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    seed: int = 0,
    masks: Masks | torch.Tensor | None = None,
    mask_id: int | None = None,
    shifted: bool | None = None,
) -> Estimate:
    """Estimates log p(answer | prompt) in nats. No prompt position is ever masked.

    model: from `unmask.load` or `unmask.wrap`, or any nn.Module that returns logits [B, L, V] (or an object with `.logits`), in eval mode.
    prompt_ids, answer_ids: token ids, a list or an int64 tensor [n]; the prompt may be empty.
    estimator:
      "llada": masks of stratified size n, the sum over masked tokens of log p times L' / n, a bound from below in expectation (arXiv
        2502.09992). An answer of one token needs one sample and is exact.
      "dream": Bernoulli masks at stratified probabilities p, weight 1 / p. The first and the last position of the sequence are never masked
        (the authors' BOS and EOS), so the last answer token is not scored (arXiv 2508.15487, eval/eval.py).
      "ar": the chain rule from left to right, exact, one row per answer token (Dream's `ar_ftb`); samples and seed are not used.
    samples: a multiple of batch_size. batch_size: samples stratified together, and most rows of a forward (a long sequence takes fewer: see
    `scorer.TOKENS`). cfg_scale: guidance w, logits u + (w + 1)(c - u) with the prompt masked in u; 0 = off. seed: same seed, same masks.
    masks: replay instead of drawing: Masks over the answer, which hold all that an estimator decides, or (for "llada") bool [N, L'], N a
    multiple of batch_size.
    mask_id, shifted: default: what the model's config or wrapper says (a bare module's config: mask_token_id or mask_id, and shifted, else
    False). shifted: row i of the logits predicts position i + 1.
    Returns an Estimate. There is no gradient. Errors: SettingError before the first forward; InvalidLogits for NaN or nothing but -inf.
    """
    check_names("estimator", [estimator], ESTIMATORS)
    scorer = scorer_of(model, mask_id, shifted)
    cfg_scale = check_cfg(cfg_scale)
    seed = check_seed(seed)
    batch_size = integer("batch_size", batch_size, 1, LONGEST)
    if estimator != "ar" and masks is None:
        check_samples("samples", samples, batch_size)
    prompt = read_ids("prompt_ids", prompt_ids, scorer)
    answer = read_ids("answer_ids", answer_ids, scorer, low=1)
    check_sequence(scorer, prompt, answer)
    p, length = prompt.shape[0], answer.shape[0]
    if masks is not None:
        drawn = _given(masks, estimator, length, batch_size)
    elif estimator == "ar":
        drawn = chain_masks(length, scorer.device)
    elif estimator == "llada":
        drawn = sample_masks(length, samples, batch_size, seed=seed, device=scorer.device)
    else:
        protect = {length - 1, 0} if p == 0 else {length - 1}
        if len(protect) == length:
            raise SettingError(
                f"estimator 'dream' never masks the first and the last position of the sequence, which leaves nothing of {length} answer "
                f"token(s) after {p} prompt tokens; use estimator='llada' or 'ar'"
            )
        drawn = sample_masks(length, samples, batch_size, estimator="dream", seed=seed, protect=sorted(protect), device=scorer.device)
    placed = drawn.to(scorer.device).after(p)
    log_probs, forwards = masked_log_probs(
        scorer, torch.cat([prompt, answer]), placed, prompt_length=p, cfg_scale=cfg_scale, batch_size=batch_size
    )
    return Estimate.of(weighted(log_probs, placed), drawn, forwards)


def weighted(log_probs: torch.Tensor, masks: Masks) -> torch.Tensor:
    """Each sample's value, float64 [N] on the CPU: the sum over its scored positions of log-probability times weight."""
    return (log_probs.double().sum(dim=1) * masks.weights).cpu()


def _standard_error(values: torch.Tensor, masks: Masks) -> float:
    if masks.exact:
        return 0.0
    means = values.view(-1, masks.replicate).mean(dim=1)
    if means.numel() < 2:
        return math.nan
    return float(means.std()) / math.sqrt(means.numel())


def _given(masks: Masks | torch.Tensor, estimator: str, length: int, batch_size: int) -> Masks:
    """The masks to replay, checked; LLaDA's weights follow from the masks."""
    if isinstance(masks, torch.Tensor):
        if estimator != "llada":
            raise SettingError(f"masks must be Masks (with their weights) for estimator={estimator!r}, got a tensor; see unmask.likelihood.sample_masks")
        check_mask_shape(masks, length)
        counts = masks.sum(dim=1)
        if not bool((counts > 0).all()):
            raise SettingError("masks must mask at least one position in every row: LLaDA's weight is L' / n")
        check_samples("the number of rows of masks", masks.shape[0], batch_size)
        return Masks(masks, length / counts.double(), batch_size, exact=length == 1)
    if not isinstance(masks, Masks):
        raise SettingError(f"masks must be Masks or a bool tensor [N, {length}], got {type(masks).__name__}")
    check_masks(masks, length)
    return masks


def check_masks(masks: Masks, length: int) -> None:
    """Raises SettingError unless the parts of `masks` fit each other and sequences of `length` positions."""
    check_mask_shape(masks.masked, length)
    n = masks.masked.shape[0]
    if not isinstance(masks.weights, torch.Tensor) or masks.weights.shape != (n,) or not masks.weights.is_floating_point():
        raise SettingError(f"weights must be floating point [N] = [{n}], one per row of masks, got {_shown(masks.weights)}")
    check_samples("the number of rows of masks", n, masks.replicate)
    if masks.scored is not None:
        check_mask_shape(masks.scored, length, rows=n, name="scored")
        if bool((masks.scored & ~masks.masked).any()):
            raise SettingError("scored must be a part of masked: a visible token says nothing about the model")


def check_mask_shape(masks: object, length: int, rows: int | None = None, name: str = "masks") -> None:
    ok = isinstance(masks, torch.Tensor) and masks.dtype is torch.bool and masks.dim() == 2 and masks.shape[1] == length
    if not ok or masks.shape[0] == 0 or masks.shape[0] != (rows or masks.shape[0]):
        raise SettingError(f"{name} must be bool [N, L] = [{rows or 'at least 1'}, {length}], got {_shown(masks)}")


def _shown(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
