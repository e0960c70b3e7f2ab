"""`verify_greedy` and `verify_ratio`: how much of a draft stands, decided on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _library as _library  # noqa: F401  (loads _C)


class GreedyResult(NamedTuple):
    last: torch.Tensor  # int64 [B]: the last accepted node, -1 if there is none
    length: torch.Tensor  # int64 [B]: accepted nodes, the root among them


class RatioResult(NamedTuple):
    accepted: torch.Tensor  # int64 [B]: length of the accepted prefix of each span
    next: torch.Tensor  # int64 [B]: the token for the first rejected position, -1 if there is none
    log_ratio: torch.Tensor  # float32 [N]: temper (ln q(token) - ln p(token)); 0 at inactive positions, NaN at invalid ones
    status: torch.Tensor  # int32 [B]: `Status` bits of each span


def verify_greedy(
    node: torch.Tensor,
    after: torch.Tensor,
    parent: torch.Tensor | None,
    count: torch.Tensor,
    mask_id: int = -1,
    subset: bool = False,
    status: torch.Tensor | None = None,
) -> GreedyResult:
    """Which draft nodes of each row step-by-step decoding would have passed through, judged by contents.

    node, after: int64 [B, N, W], any strides: the window of draft node j of row b, and what one plain decoding step makes of that window.
    count: int64 [B], the row's nodes, 0 to N; what lies behind them is not read. mask_id: read with subset only.

    subset=False (SSD, arXiv 2510.04147): node 0, the root, is accepted; node j is accepted iff its parent is and after[parent] == node[j] in
    every position. parent: int64 [B, N], -1 for the root and else below j (a later node with parent -1 is never reached); None: a chain, the
    parent of j is j - 1. The walk goes from the root to the lowest matching child until there is none.
    subset=True (FreeDave, arXiv 2510.00294, generation/core.py): from node `cur` = 0 to the largest j > cur of which every token that is not
    mask_id equals after[cur] at that place, until there is none; parent must be None.

    Returns the last node of the path and how many it has. Rows do not influence each other. count 0: (-1, 0).
    Bad contents (count outside 0..N, or among the row's nodes a parent below -1 or not below its node, for the root too) give (-1, 0), read
    nothing out of range and set BAD_SEGMENT in status[b] (int32 [B], bits are added). Errors: RuntimeError for dtype, shape, device, a parent
    given with subset.
    """
    return GreedyResult(*torch.ops.unmask.verify_greedy(node, after, parent, count, mask_id, subset, status))


def verify_ratio(
    p_logits: torch.Tensor,
    q_logits: torch.Tensor,
    p_row: torch.Tensor,
    q_row: torch.Tensor,
    token: torch.Tensor,
    cu: torch.Tensor,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    pos: torch.Tensor | None = None,
    *,
    temper: float = 1.0,
    temperature: float = 1.0,
    uniforms: torch.Tensor | None = None,
    forbid: torch.Tensor | None = None,
    resample: bool = True,
) -> RatioResult:
    """Speculative sampling: the prefix of each drafted span that the target accepts, and what it says instead at the first rejection.

    p_logits: [P, V], q_logits: [Q, V], one dtype of float32, bfloat16, float16, any strides: the draft's and the target's rows. p_row, q_row:
    int64 [N], the rows of packed position n; -1 in either: inactive, the span ends before it. token: int64 [N], what was drafted there. cu:
    int64 [B + 1]: span b has positions cu[b]:cu[b+1]. seed, step, pos: int64 [N], the keys of the noise.

    p = softmax(p_logits[p_row] / temperature) over the ids that are not in `forbid` (int64 [F]), q likewise: forbidden ids (mask_id) are removed
    from both and the rest renormalised, as a draft drawn with `logit_stats(forbid=...)` is. A forbidden drafted token is rejected.
    Accepted: ln u < min(0, r), r = temper (ln q(token) - ln p(token)); r is +inf if p(token) = 0 < q(token), -inf if q(token) = 0. temper: S2D2's
    exponent (arXiv 2603.25702). At the first rejection, with resample, next is drawn from norm((q - p)_+), or from q if no id has q > p: argmax of
    ln(mass) + Gumbel noise, lowest id on ties; without resample, and where the whole span stands, it is -1. With temper = 1, resample and drafts
    drawn from p the committed tokens are distributed as q (Leviathan et al., arXiv 2211.17192), up to fp32 masses: some 1e-7 of q.

    Noise: u = 1 - v with v from the first word of Philox4x32-10 at (0, pos, step, 2); the residual's from word id % 4 at (id // 4, pos, step, 3);
    key = seed. `logit_stats` draws at (id // 4, pos, step, 0), so a draft with the same seed, step and pos is independent of its verification.
    uniforms: float32 or float64 [N] in [0, 1], replaces u (to replay a published run); without resample no key is needed then.

    log_ratio[n] is r, whatever span n belongs to. A position depends on nothing but itself: bits are the same alone, in any batch and at any
    thread count; on CUDA sums are grouped differently, so r may differ by some 1e-6.
    Bad contents, anywhere in a span before it ends, set bits in its status and give accepted 0, next -1: NaN in a row NAN, no id above -inf
    ALL_INF, a row out of range BAD_ROW, a token outside [0, V) BAD_ID, a uniform outside [0, 1] NAN_SCORE, cu out of range or falling BAD_SEGMENT.
    An id to forbid >= V sets BAD_ID everywhere and changes nothing else; below 0 it forbids nothing.
    Errors: RuntimeError for dtype, shape, device, temper, temperature, a missing key.
    """
    return RatioResult(
        *torch.ops.unmask.verify_ratio(
            p_logits, q_logits, p_row, q_row, token, cu, seed, step, pos, uniforms, forbid, temper, temperature, resample
        )
    )


@torch.library.register_fake("unmask::verify_greedy")
def _(node, after, parent, count, mask_id, subset, status=None):
    return count.new_empty(count.shape), count.new_empty(count.shape)


@torch.library.register_fake("unmask::verify_ratio")
def _(p_logits, q_logits, p_row, q_row, token, cu, seed, step, pos, uniforms, forbid, temper, temperature, resample):
    spans = cu.shape[0] - 1
    return (
        cu.new_empty((spans,)),
        cu.new_empty((spans,)),
        p_logits.new_empty(p_row.shape, dtype=torch.float32),
        cu.new_empty((spans,), dtype=torch.int32),
    )
