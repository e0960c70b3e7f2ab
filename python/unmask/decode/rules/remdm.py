"""ReMDM (arXiv 2503.00307, kuleshov-group/remdm): masked diffusion whose reverse step may return decided tokens to masks.

Time runs from 1 to about 0 in T steps, alpha_t = 1 - t. A decided token returns with probability sigma; a masked position commits with
probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), its token drawn from the model. sigma_max = min(1, (1 - alpha_s) / alpha_t).

| strategy | sigma |
|---|---|
| cap | min(eta, (1 - alpha_s) / alpha_t) |
| rescale | eta sigma_max |
| conf | sigma_max times a softmax, over the decided tokens, of minus their probability when they were decided |
| loop | 0 while t > t_on; eta between t_on and t_off at alpha fixed to alpha_on; 0 below t_off |

The last step commits every mask, by confidence as always. sigma = 0 is plain masked diffusion. Given tokens never return.
"""

from __future__ import annotations

import torch

from ...errors import SettingError
from ...ops import LogitStats, uniform
from .base import Rule, Run, Selection, StepView

ETA = {"cap": 0.008, "rescale": 0.015, "conf": 0.015, "loop": 0.02}
LAST_TIME = 1e-5


def transition(strategy: str, eta: float, step: int, steps: int, t_on: float, t_off: float, alpha_on: float) -> tuple[float, float, float]:
    """(alpha_t, alpha_s, sigma) of one step; for strategy conf sigma is sigma_max."""
    dt = (1.0 - LAST_TIME) / steps
    t = 1.0 - step * dt
    s = t - dt

    def alpha(time: float) -> float:
        if strategy != "loop":
            return 1.0 - time
        if time > t_on:
            return (1.0 - time) * alpha_on / (1.0 - t_on)
        return alpha_on if time > t_off else 1.0 - time * (1.0 - alpha_on) / t_off

    a_t, a_s = alpha(t), max(alpha(s), alpha(t))
    highest = 1.0 if a_t <= 0.0 else min(1.0, (1.0 - a_s) / a_t)
    if strategy == "cap":
        sigma = min(eta, highest)
    elif strategy == "rescale":
        sigma = eta * highest
    elif strategy == "conf":
        sigma = highest
    else:
        sigma = min(eta, highest) if t_off < t <= t_on else 0.0
    return a_t, a_s, sigma


class ReMDM(Rule):
    """Device state: psi float64 [B L], probability of each decided token when it was decided."""

    revises = True

    def __init__(self, run: Run):
        super().__init__(run)
        if self.knobs["t_off"] > self.knobs["t_on"]:
            raise SettingError(f"t_off must be at most t_on (time runs from 1 to 0), got t_off={self.knobs['t_off']}, t_on={self.knobs['t_on']}")
        self._psi = torch.full((run.state.canvas.numel(),), torch.inf, dtype=torch.float64, device=run.device)

    def joined(self, row) -> None:
        self._psi.view(self.run.state.canvas.shape)[row.index] = torch.inf

    def steps(self, row) -> int:
        return self.knobs["steps"] or max(2 * row.masks, 1)

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        k = self.knobs
        eta = ETA[k["strategy"]] if k["eta"] is None else float(k["eta"])
        parts = [transition(k["strategy"], eta, r.step, self.steps(r), k["t_on"], k["t_off"], k["alpha_on"]) for r in step.rows]
        a_t, a_s, sigma = (step.spread(step.per_entry([p[i] for p in parts], torch.float64)) for i in range(3))
        last = step.spread(step.per_entry([r.step + 1 >= self.steps(r) for r in step.rows], torch.bool))
        decided = ~step.masked & ~step.given
        if k["strategy"] == "conf":
            sigma = sigma * self._share(step, decided)
        u = uniform(**step.key).double()
        commit = u < (a_s - (1.0 - torch.where(step.masked, 0.0 if k["strategy"] == "conf" else sigma, sigma)) * a_t) / (1.0 - a_t).clamp_min(1e-12)
        self._back = decided & ~last & (u < sigma)
        return self.exactly(step, score, step.masked & (commit | last))

    def _share(self, step: StepView, decided: torch.Tensor) -> torch.Tensor:
        """float64 [N]: softmax of -psi over the decided tokens of each entry, 0 elsewhere."""
        psi = torch.where(decided, -self._psi.index_select(0, step.flat), -torch.inf)
        top = step.spread(step.highest(psi, decided))
        e = torch.where(decided, torch.exp(psi - top), 0.0)
        return e / step.spread(step.total(e)).clamp_min(1e-300)

    def after(self, step: StepView, stats: LogitStats, selection: Selection, committed: torch.Tensor) -> torch.Tensor:
        psi = self._psi.index_select(0, step.flat)
        self._psi.index_copy_(0, step.flat, torch.where(committed, stats.p.double(), psi))
        return self._back

    def finished(self, row, left: int, flag: int) -> bool:
        return row.step >= self.steps(row)
