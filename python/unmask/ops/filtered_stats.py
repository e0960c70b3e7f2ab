"""`filtered_stats`: `logit_stats` of the tempered softmax that top-k and top-p leave, without a sort."""

from __future__ import annotations

import torch

from .logit_stats import FIELDS, LogitStats


def filtered_stats(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    forbid: torch.Tensor | None = None,
    suppress: torch.Tensor | None = None,
    bias_ids: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    top_k_first: bool = False,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    pos: torch.Tensor | None = None,
) -> LogitStats:
    """Token, its probability, top-2, entropy and logsumexp per row, all from the softmax of logits / temperature over the ids that the filters keep.

    logits, rows, forbid, suppress, bias_ids, bias, temperature, seed, step, pos: as in `logit_stats`. temperature 0: token = argmax, and the
    statistics come from the logits as they are. top_p: at least 0; 1 or more = off. top_k: 0 or less, or V or more = off.

    Order: ids by (logit desc, id asc), after bias and suppression. top_p keeps the shortest head of that order with a mass above top_p: an id
    goes iff the ids before it have more than top_p (the id that crosses stays, so the first always does). top_k removes ids below the k-th
    largest logit; ties with it stay. Default: top-p of the softmax, then top-k among what is left. top_k_first: top-k, then top-p of the softmax
    renormalised over what is left.
    Forbidden ids count in every mass and in the k, cannot be the token, and stay in the softmax where the filters keep them. The best candidate
    is always kept, even if the filters leave nothing but forbidden ids.

    Token: the kept candidate with the largest logit, or with the largest temperature * g + logit, noise g as in `logit_stats`; with filters off it
    is the token of `logit_stats` with the same keys. Ties: lowest id. Returns LogitStats without top-k and at_ids: p of the token, p1 and p2 of the
    two best kept candidates (p2 0 if there is one), entropy in nats, logsumexp of the kept logits / temperature, p_rest = 1 - p. Invalid rows as in
    `logit_stats`. k kept ids at +inf share the mass.
    Masses are exact up to 1e-6: a cut may differ from exact arithmetic, or between CPU and CUDA, only where the mass before an id is within 1e-6
    of top_p. Errors: RuntimeError for dtype, shape, device, temperature, top_p, a missing seed.

    Rules: Dream (arXiv 2508.15487, `sample_tokens` of HKUNLP/Dream's generation_utils.py: temperature, top-p, top-k, confidence from what is
    left); SDAR (JetAstra/SDAR generate.py: top-k first).
    """
    return LogitStats(
        *torch.ops.unmask.filtered_stats(
            logits, rows, forbid, suppress, bias_ids, bias, temperature, top_p, top_k, top_k_first, seed, step, pos
        )
    )


@torch.library.register_fake("unmask::filtered_stats")
def _(logits, rows, forbid, suppress, bias_ids, bias, temperature, top_p, top_k, top_k_first, seed, step, pos):
    entries = logits.shape[0] if rows is None else rows.shape[0]
    return (
        logits.new_empty((entries, 1), dtype=torch.int64),
        logits.new_empty((entries, FIELDS), dtype=torch.float32),
        logits.new_empty((entries,), dtype=torch.int32),
    )
