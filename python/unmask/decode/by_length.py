"""A plain module on canvases of unequal length: one call per length, so that no module has to know of padding."""

from __future__ import annotations

import torch

from ..ops import LogitStats
from .backend import Plan
from .guided import joined
from .module_backend import ModuleBackend


class ByLengthBackend(ModuleBackend):
    """`ModuleBackend` for rows that are as long as their windows in the plan. Rows of equal length share a call of the module; logits of
    the calls are kept one after the other, [T, V], T positions of all rows."""

    def stats(self, plan: Plan, live: torch.Tensor, shadow: bool = False, **options) -> LogitStats:
        """Runs the module on the canvases of the active rows, each at its own length, and reduces the logits of the live candidates."""
        assert not shadow, "checked before the run: a shadow block needs a model from unmask.load"
        by_length: dict[int, list[int]] = {}
        for entry, (_, _, end, _, _) in enumerate(plan.entries):
            by_length.setdefault(end, []).append(entry)
        first, parts, seen = [0] * len(plan.entries), [], 0
        for length, entries in by_length.items():
            rows = torch.tensor([plan.entries[e][0] for e in entries], device=plan.row.device)
            parts.append(self._call(rows, length).flatten(0, 1))
            for e in entries:
                first[e] = seen
                seen += length
        self.logits = parts[0] if len(parts) == 1 else joined(parts)
        self._check_vocabulary(options.get("suppress"))
        self._first = torch.tensor(first, device=plan.row.device)
        return self.reduce(plan, live, **options)

    def _query(self, plan: Plan) -> torch.Tensor:
        return self._first.index_select(0, plan.cand_entry) + (plan.cand_pos - int(self.shifted)).clamp_min(0)
