"""Soft masks (arXiv 2510.17206, IBM/soft-masked-diffusion-language-models): an undecided position carries a mix of likely embeddings.

After a step, for a position that is still masked: lambda = w_s sigmoid(w_a (-H - w_b)), H the entropy of its prediction in nats, and its next
input embedding is (1 - lambda) E[mask] + lambda sum_v pi_v E[v] over its k likeliest tokens, pi their softmax. Only the k ids and weights of
each position are kept, and the embedding is a weighted sum of k + 1 rows: nothing of the size of the vocabulary is made.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SettingError
from ..ops.logit_stats import TOPK_MAX
from ..values import integer, number

if TYPE_CHECKING:
    from ..models.backbone import Forward
    from ..ops import LogitStats
    from .backend import Plan
    from .rules.base import StepView
    from .state import DecodeState, Row

SCHEDULES = ("constant", "linear", "stepwise")


@dataclasses.dataclass(frozen=True)
class SoftMasks:
    """scale: w_s in [0, 1] (0 = plain masks, exactly). steepness: w_a > 0. centre: w_b <= 0, nats. k: tokens mixed, 1 to 8.
    schedule of the scale over t = undecided share of the row's region: "constant", "linear" (scale t), "stepwise" (scale where t > 0.5).
    The three parameters are learned; without a model finetuned for them the mix only disturbs it."""

    scale: float = 1.0
    steepness: float = 6.66
    centre: float = -0.75
    k: int = 3
    schedule: str = "constant"

    def __post_init__(self):
        number("soft_masks.scale", self.scale, 0.0, 1.0)
        number("soft_masks.steepness", self.steepness, 0.0, 1e6, open_low=True)
        number("soft_masks.centre", self.centre, -1e6, 0.0)
        integer("soft_masks.k", self.k, 1, TOPK_MAX)
        if self.schedule not in SCHEDULES:
            raise SettingError(f"soft_masks.schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> SoftMasks:
        """From a safetensors file with the learned scalars `scale`, `steepness`, `centre`, as used in the formula (after any sigmoid)."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise SettingError(f"soft_masks: cannot read {path}: {error}") from None
        missing = [n for n in ("scale", "steepness", "centre") if n not in tensors or tensors[n].numel() != 1]
        if missing:
            raise SettingError(f"soft_masks: {path} must hold one number each for scale, steepness and centre; missing or larger: {', '.join(missing)}")
        return cls(**{n: float(tensors[n]) for n in ("scale", "steepness", "centre")}, **changes)

    def weights(self, entropy: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
        """lambda of each position. entropy: float [N] in nats."""
        return scale * torch.sigmoid(self.steepness * (-entropy - self.centre))

    def start(self, state: DecodeState, mask_id: int) -> SoftState:
        return SoftState(self, state, mask_id)


class SoftState:
    """The mixes of one run: ids int64 and weights float32 [B, L, k + 1]; the first is the position's own token. weight 0: nothing mixed."""

    def __init__(self, masks: SoftMasks, state: DecodeState, mask_id: int):
        self.masks, self.state = masks, state
        b, length = state.canvas.shape
        device = state.canvas.device
        self.ids = torch.zeros((b, length, masks.k), dtype=torch.int64, device=device)
        self.weight = torch.zeros((b, length, masks.k + 1), dtype=torch.float32, device=device)
        self.weight[:, :, 0] = 1.0
        regions = [max(r.end - r.start, 1) for r in state.rows]
        self._region = torch.tensor(regions, dtype=torch.float32, device=device)

    def joined(self, row: Row) -> None:
        """A new row takes the place of a finished one."""
        self.weight[row.index] = 0.0
        self.weight[row.index, :, 0] = 1.0
        self._region[row.index] = max(row.end - row.start, 1)

    def options(self) -> dict[str, int]:
        """What the reduction must also return."""
        return dict(topk=self.masks.k)

    def note(self, step: StepView, stats: LogitStats, entropy: torch.Tensor) -> None:
        """After the commit: candidates that are still masked get their mix for the next forward, decided ones lose it. entropy: float [N],
        of the plain softmax."""
        state, masks = self.state, self.masks
        undecided = state.masked.view(-1).index_select(0, step.flat)
        scale: torch.Tensor | float = masks.scale
        if masks.schedule != "constant":
            t = step.spread((state.masked.float().sum(1) / self._region).index_select(0, step.plan.row))
            scale = masks.scale * (t if masks.schedule == "linear" else (t > 0.5).float())
        fits = undecided & (stats.token >= 0)
        amount = torch.where(fits, masks.weights(entropy, scale), 0.0)
        share = torch.softmax(stats.topk_logit, dim=1).nan_to_num(0.0)  # no candidate: -inf throughout
        weight = torch.cat([(1.0 - amount)[:, None], amount[:, None] * share], 1)
        ids, weight = stats.topk_id.clamp_min(0), torch.where(fits[:, None], weight, self._plain(weight))
        if step.plan.reached is not None:  # what this forward left out keeps its last mix
            left_out = (undecided & ~step.plan.reached)[:, None]
            ids = torch.where(left_out, self.ids.view(-1, masks.k).index_select(0, step.flat), ids)
            weight = torch.where(left_out, self.weight.view(-1, masks.k + 1).index_select(0, step.flat), weight)
        self.ids.view(-1, masks.k).index_copy_(0, step.flat, ids)
        self.weight.view(-1, masks.k + 1).index_copy_(0, step.flat, weight)

    @staticmethod
    def _plain(like: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(like)
        out[:, 0] = 1.0
        return out

    def mixed(self, forward: Forward, plan: Plan, real: torch.Tensor | None = None) -> Forward:
        """The forward with mixes for the plan's undecided tokens. real: int64 [T0], where those stand (None: they come first); the others
        (guidance's null copy, a shadow block, padding) stay plain."""
        at = slice(plan.flat.shape[0]) if real is None else real
        ids = forward.ids[:, None].repeat(1, self.masks.k + 1)
        ids[at, 1:] = self.ids.view(-1, self.masks.k).index_select(0, plan.flat)
        weight = self._plain(self.weight.new_zeros((forward.ids.shape[0], self.masks.k + 1)))
        mix = self.weight.view(-1, self.masks.k + 1).index_select(0, plan.flat)
        undecided = self.state.masked.view(-1).index_select(0, plan.flat)[:, None]
        weight[at] = torch.where(undecided, mix, self._plain(mix))
        return dataclasses.replace(forward, mix_ids=ids, mix_weight=weight)
