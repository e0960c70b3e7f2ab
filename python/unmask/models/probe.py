"""Whether a model's logits are shifted, found by an experiment: mask single positions of a text and see where the true tokens are likely.

Of a text x the positions i are masked one at a time. If row i of the logits predicts x_i, the model is not shifted; if row i - 1 does, it
is. A position is left out where x_i equals a neighbour: there the row that reads the neighbour (a visible token, which many models give
back) would seem to know x_i. What is compared is log p(x_i), mask token excluded, paired by position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import SettingError

LOWEST, MOST, LONGEST = 16, 64, 4096
"""Fewest tokens and fewest usable positions; most positions tried; longest text."""
MARGIN = 1.0
"""Nats: by how much one reading's mean must beat the other's, and what a uniform guess would give."""
SIGMAS = 4.0
"""Standard errors of the paired difference that its mean must be away from 0."""
_TOKENS = 4096


def shift_of(logits_of: Callable[[torch.Tensor], torch.Tensor], ids: Sequence[int], mask_id: int, block_size: int | None = None) -> bool:
    """True if the logits are shifted.

    logits_of: maps ids int64 [B, L] to logits [B, L, V]. ids: a text that the model should know, 16 to 4096 tokens. block_size: of a
    block-causal model; the text is cut to whole blocks. Raises SettingError if the text is too short, or if the experiment does not decide.
    """
    whole = len(ids) if block_size is None else len(ids) // block_size * block_size
    if not LOWEST <= whole <= LONGEST:
        raise SettingError(f"the probe must be {LOWEST} to {LONGEST} tokens{' in whole blocks' if block_size else ''}, got {whole} of {len(ids)}")
    text = torch.tensor(ids[:whole], dtype=torch.int64)
    positions = _positions(text, mask_id)
    here, before, uniform = _log_probs(logits_of, text, positions, mask_id)
    gain = here - before
    mean, error = float(gain.mean()), float(gain.std() / gain.numel() ** 0.5)
    best = max(float(here.mean()), float(before.mean()))
    told = (
        f"over {gain.numel()} masked tokens the mean log-probability is {float(here.mean()):.2f} read at their own row, {float(before.mean()):.2f} "
        f"read one row earlier (difference {mean:.2f} +- {error:.2f}), {uniform:.2f} for a uniform guess"
    )
    if not torch.isfinite(gain).all():
        raise SettingError(f"shifted cannot be detected, the logits give NaN or infinite log-probabilities: {told}; pass shifted=True or False")
    if abs(mean) < max(MARGIN, SIGMAS * error) or best < uniform + MARGIN:
        raise SettingError(
            f"shifted cannot be detected with this probe: {told}. Needed: a difference of {MARGIN} nat and {SIGMAS:g} standard errors, and "
            f"{MARGIN} nat above the guess. Use a text that the model knows better, or pass shifted=True or False"
        )
    return mean < 0


def _positions(text: torch.Tensor, mask_id: int) -> torch.Tensor:
    """int64 [N]: up to MOST positions, spread evenly, whose token differs from both neighbours."""
    usable = torch.ones_like(text, dtype=torch.bool)
    usable[0] = False  # nothing stands before it
    usable[1:] &= text[1:] != text[:-1]
    usable[:-1] &= text[:-1] != text[1:]
    usable &= text != mask_id
    found = torch.nonzero(usable).flatten()
    if found.numel() < LOWEST:
        raise SettingError(f"the probe must have {LOWEST} positions or more whose token differs from both neighbours, got {found.numel()}; use another text")
    return found[torch.linspace(0, found.numel() - 1, min(MOST, found.numel())).round().long()]


def _log_probs(logits_of: Callable, text: torch.Tensor, positions: torch.Tensor, mask_id: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """float64 [N] each: log p of the true token at its own row and one row earlier, its position alone masked; and that of a uniform guess."""
    here, before, uniform = [], [], 0.0
    with torch.inference_mode():
        for some in positions.split(max(1, _TOKENS // text.numel())):
            row = torch.arange(some.numel())
            x = text.repeat(some.numel(), 1)
            x[row, some] = mask_id
            logits = logits_of(x)
            uniform = -float(torch.log(torch.tensor(logits.shape[2] - 1.0)))
            if int(text.max()) >= logits.shape[2]:
                raise SettingError(f"the probe's token ids must be below the module's vocabulary size {logits.shape[2]}, got {int(text.max())}")
            for at, out in ((some, here), (some - 1, before)):
                z = logits[row, at].double()
                z[:, mask_id] = -torch.inf
                out.append(z.log_softmax(1)[row, text[some]])
    return torch.cat(here), torch.cat(before), uniform
