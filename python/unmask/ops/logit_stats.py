"""`logit_stats`: token and softmax statistics of rows of logits in one read; `stats_tile` and `stats_finish`: the same over tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch

CHUNK = 4096  # ids reduced at once; tiles start at multiples of it (csrc/common/online.h)
STATE_WORDS = 25  # int32 words of one entry's running state (csrc/common/online.h)
TOPK_MAX = 8
FIELDS = 6  # p, p1, p2, entropy, logsumexp, p_rest


class LogitStats(NamedTuple):
    """What `logit_stats` returns, per entry of rows: the op's three tensors; every property is a view of one of them."""

    ids: torch.Tensor  # int64 [T', 1 + K]: token, then top-k ids
    values: torch.Tensor  # float32 [T', 6 + 2 J + K]: p, p1, p2, entropy, logsumexp, p_rest, then at_ids, then top-k logits
    status: torch.Tensor  # int32 [T'], bits of Status

    @classmethod
    def pack(cls, token, stats, status, at_ids, topk_id, topk_logit) -> LogitStats:
        """From separate tensors, shaped and typed as the properties of these names."""
        return cls(torch.cat((token[:, None], topk_id), 1), torch.cat((stats, at_ids.flatten(1), topk_logit), 1), status)

    @property
    def token(self) -> torch.Tensor:
        """int64 [T']; -1: none or invalid."""
        return self.ids[:, 0]

    @property
    def stats(self) -> torch.Tensor:
        """float32 [T', 6]: p, p1, p2, entropy, logsumexp, p_rest."""
        return self.values[:, :FIELDS]

    @property
    def p(self) -> torch.Tensor:
        """Probability of the token, float32 [T']."""
        return self.values[:, 0]

    @property
    def p1(self) -> torch.Tensor:
        """Probability of the best candidate, float32 [T']."""
        return self.values[:, 1]

    @property
    def p2(self) -> torch.Tensor:
        """Probability of the second best candidate, float32 [T']; 0 if there is one only."""
        return self.values[:, 2]

    @property
    def margin(self) -> torch.Tensor:
        """p1 - p2, float32 [T']."""
        return self.values[:, 1] - self.values[:, 2]

    @property
    def entropy(self) -> torch.Tensor:
        """Entropy of the softmax in nats, float32 [T']."""
        return self.values[:, 3]

    @property
    def logsumexp(self) -> torch.Tensor:
        """float32 [T']."""
        return self.values[:, 4]

    @property
    def p_rest(self) -> torch.Tensor:
        """1 - p, float32 [T'], with the relative precision that p itself loses near 1."""
        return self.values[:, 5]

    @property
    def confidence(self) -> torch.Tensor:
        """p as float64 [T'], good to a relative 1e-6 of the smaller of p and 1 - p: orders positions that all read p = 1 in float32.

        Near 1 it is 1 / (1 + (1 - p) / p), which has the steps of a softmax in float64: a sum near 1 moves by 2.2e-16.
        """
        rest = self.p_rest.double()
        return torch.where(rest < 0.5, 1.0 / (1.0 + rest / (1.0 - rest)), self.p.double())

    @property
    def at_ids(self) -> torch.Tensor:
        """float32 [T', J, 2]: log-probability and logit."""
        end = self.values.shape[1] - self.topk_id.shape[1]
        return self.values[:, FIELDS:end].unflatten(1, ((end - FIELDS) // 2, 2))

    @property
    def topk_id(self) -> torch.Tensor:
        """int64 [T', K], best first; -1: none."""
        return self.ids[:, 1:]

    @property
    def topk_logit(self) -> torch.Tensor:
        """float32 [T', K]; -inf: none."""
        return self.values[:, self.values.shape[1] - self.topk_id.shape[1] :]


def logit_stats(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    forbid: torch.Tensor | None = None,
    suppress: torch.Tensor | None = None,
    bias_ids: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    topk: int = 0,
    temperature: float = 0.0,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    pos: torch.Tensor | None = None,
    null_logits: torch.Tensor | None = None,
    guidance: float = 1.0,
) -> LogitStats:
    """Token, its probability, top-2, entropy and logsumexp of rows of logits, which are read once and never stored in another dtype.

    logits: [N, V] float32, bfloat16 or float16, any strides. rows: int64 [T'] rows to reduce, -1 = none (default: all N in order).
    forbid: int64 [F] ids that cannot win but stay in the softmax (mask_id). suppress: int64 [U] ids removed from it (logit -inf).
    bias_ids, bias: int64 and float32 [T', J], added to the logits; a repeated id adds up in order. ids: int64 [T', J] where to report
    log-probability and logit. topk: 0 to 8. In every id list an id < 0 means none and an id >= V sets Status.BAD_ID (that id is left out,
    the entry stays valid). temperature: 0 = argmax; else Gumbel-max sampling with temperature in (0, 1e30]: argmax of
    temperature * g + logit, g keyed by (seed, step, pos, id), int64 [T'] each and then required.
    null_logits: [N, V], the dtype and device of logits, any strides: classifier-free guidance (Ho and Salimans, arXiv 2207.12598; in this
    form LLaDA, arXiv 2502.09992, with guidance = its scale + 1). The logits then are null_logits + guidance * (logits - null_logits), rounded
    to the dtype after each of the three operations, so that the results have the bits of the call on that torch expression, which is never
    stored. guidance: finite in float32; only with null_logits may it differ from 1.

    Candidates are the ids that are neither forbidden nor suppressed, with a logit above -inf. Ties: lowest id. All of stats comes from the
    softmax at temperature 1 without noise, over all ids that are not suppressed. k ids at +inf share the mass: p1 = 1/k, entropy ln k.
    Returns LogitStats. Entries: row -1: token -1, stats and at_ids 0, status 0. NaN in the row (Status.NAN), no candidate
    (Status.ALL_INF), row out of range (Status.BAD_ROW): token -1, stats and at_ids NaN. Missing top-k: id -1, logit -inf.
    Errors: RuntimeError for dtype, shape, device, temperature, topk, guidance, a missing seed or null_logits. Noise: csrc/common/noise.h (Philox: Salmon et al. SC11).
    """
    return LogitStats(
        *torch.ops.unmask.logit_stats(
            logits, rows, forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos, null_logits, guidance
        )
    )


def new_state(n: int, device: torch.device | str | None = None) -> torch.Tensor:
    """An empty running state for n entries: int32 zeros [n, STATE_WORDS]."""
    return torch.zeros((n, STATE_WORDS), dtype=torch.int32, device=device)


def stats_tile(
    logits: torch.Tensor,
    state: torch.Tensor,
    id_logit: torch.Tensor | None = None,
    *,
    offset: int,
    vocab: int,
    forbid: torch.Tensor | None = None,
    suppress: torch.Tensor | None = None,
    bias_ids: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    topk: int = 0,
    temperature: float = 0.0,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    pos: torch.Tensor | None = None,
) -> None:
    """Folds the logits of ids [offset, offset + C) of a vocabulary of `vocab` ids into `state`, in place.

    logits: [T', C]; row e belongs to entry e. offset: a multiple of 4,096; C too, unless the tile ends the vocabulary. Tiles come in
    order, with the same other arguments (see `logit_stats`); an entry whose tile is out of order, or whose topk changed, gets
    Status.BAD_SEGMENT. state: `new_state(T')`. id_logit: float32 [T', J], required with `ids`; filled in place, need not be initialised.
    """
    torch.ops.unmask.stats_tile(
        logits, state, id_logit, offset, vocab, forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos
    )


def stats_finish(state: torch.Tensor, id_logit: torch.Tensor | None = None, topk: int = 0) -> LogitStats:
    """What `logit_stats` returns, from a state that has seen every tile, bit for bit. topk: at most max(2, that of the tiles), else
    Status.BAD_SEGMENT. An empty state gives what row -1 gives."""
    return LogitStats(*torch.ops.unmask.stats_finish(state, id_logit, topk))


def _outputs(like: torch.Tensor, entries, n_ids, topk: int):
    new = like.new_empty
    return (
        new((entries, 1 + topk), dtype=torch.int64),
        new((entries, FIELDS + 2 * n_ids + topk), dtype=torch.float32),
        new((entries,), dtype=torch.int32),
    )


@torch.library.register_fake("unmask::logit_stats")
def _(logits, rows, forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos, null_logits=None, guidance=1.0):
    entries = logits.shape[0] if rows is None else rows.shape[0]
    return _outputs(logits, entries, 0 if ids is None else ids.shape[1], topk)


@torch.library.register_fake("unmask::stats_tile")
def _(logits, state, id_logit, offset, vocab, forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos):
    return None


@torch.library.register_fake("unmask::stats_finish")
def _(state, id_logit, topk):
    return _outputs(state, state.shape[0], 0 if id_logit is None else id_logit.shape[1], topk)
