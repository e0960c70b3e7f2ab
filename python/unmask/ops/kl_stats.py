"""`kl_stats`: how far each row's softmax has moved since an earlier forward."""

from __future__ import annotations

import torch


def kl_stats(
    logits: torch.Tensor,
    previous: torch.Tensor,
    rows: torch.Tensor | None = None,
    previous_rows: torch.Tensor | None = None,
    *,
    lse: torch.Tensor,
    previous_lse: torch.Tensor,
) -> torch.Tensor:
    """KL(p || q) in nats per entry, float32 [T']; p = softmax of a row of logits, q = softmax of a row of previous.

    logits: [N, V], previous: [M, V], both float32, bfloat16 or float16, any strides; each read once. rows, previous_rows: int64 [T'] row of
    each (default: entry e reads row e). lse, previous_lse: float32 [T'], logsumexp of the entry's two rows, as `logit_stats` reports it.

    KL = sum of p (max(ln p, ln 1e-12) - max(ln q, ln 1e-12)): KLASS (arXiv 2511.05664, src/model/llada_klass.py) adds 1e-12 to p and q instead,
    in float64; flooring takes one exponential an id and differs by at most the sum of p min(ln 2, 1e-12 / q), plus 1e-12 V: below 1e-6 unless
    p has mass where q is below 1e-6, where both exceed every threshold in use.
    Equal rows give 0; rounding may give -1e-6.
    Entries: rows -1: 0. previous_rows -1, no history: +inf. A row out of range, NaN in a row or in its lse, or +inf among its logits: NaN.
    Errors: RuntimeError for dtype, shape, device.
    """
    return torch.ops.unmask.kl_stats(logits, previous, rows, previous_rows, lse, previous_lse)


@torch.library.register_fake("unmask::kl_stats")
def _(logits, previous, rows, previous_rows, lse, previous_lse):
    return lse.new_empty((lse.shape[0],))
