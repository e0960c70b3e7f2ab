"""Would greedy decoding have produced the answer? The `is_greedy` flag of evaluation harnesses."""

from __future__ import annotations

import torch

from ..models.foreign import Foreign
from .scorer import check_cfg, check_sequence, null_input, raise_on_invalid, read_ids, scorer_of, source_rows


@torch.no_grad()
def suffix_greedy_prediction(
    model: torch.nn.Module | Foreign,
    prompt_ids: object,
    answer_ids: object,
    *,
    cfg_scale: float = 0.0,
    mask_id: int | None = None,
    shifted: bool | None = None,
) -> bool:
    """True if decoding as many tokens as the answer has, one per step, the most confident first, gives the answer.

    Confidence is the probability of the best token; ties go to the lowest position and the lowest id; the mask token is never chosen. A
    committed token never changes, so the first wrong one settles the result and ends the run: a right answer of n tokens takes n forwards,
    a wrong one at most as many. Arguments as in `unmask.likelihood.log_likelihood`.
    Source: LLaDA, arXiv 2502.09992, eval_llada.py; Dream's eval.py has the same. Errors: SettingError, InvalidLogits.
    """
    scorer = scorer_of(model, mask_id, shifted)
    cfg_scale = check_cfg(cfg_scale)
    prompt = read_ids("prompt_ids", prompt_ids, scorer)
    answer = read_ids("answer_ids", answer_ids, scorer, low=1)
    check_sequence(scorer, prompt, answer)
    p, n = prompt.shape[0], answer.shape[0]
    x = torch.cat([prompt, torch.full_like(answer, scorer.mask_id)])[None]
    forbid = torch.tensor([scorer.mask_id], device=scorer.device)
    left = torch.ones(n, dtype=torch.bool, device=scorer.device)
    for step in range(n):
        pos = p + left.nonzero()[:, 0]
        at = source_rows(scorer, torch.zeros_like(pos), pos, p + n)
        parts = scorer.stats(x, null_input(scorer, x, p, cfg_scale), at, cfg_scale, forbid=forbid)
        raise_on_invalid(parts, pos, lambda e, step=step: f"step {step}")
        best = int(torch.cat([part.confidence for part in parts]).argmax())
        token, where = torch.cat([part.token for part in parts])[best], pos[best]
        if token != answer[where - p]:
            return False
        x[0, where] = token
        left[where - p] = False
    return True
