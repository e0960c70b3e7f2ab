"""What the compat functions of block-causal models share: prompts and finished blocks are stored by forwards of their own, as in the
authors' loops, so that the number of forwards is theirs (unmask.generate fuses a store with the next block's first step)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..decode.backend import NativeBackend
from ..decode.caches import attention_block
from ..decode.engine import Commit, Engine
from ..decode.policy import Policy
from ..decode.schedule import AlignedBlocks
from ..decode.state import DecodeState, Row
from ..errors import SettingError
from ..models.foreign import Foreign
from ..models.model import Model
from ..values import integer, number
from ._loop import LONGEST, _check_native, check_prompt


def check_model(model: object, shifted: bool) -> Model:
    """A block-causal model from unmask.load whose logits stand where the authors' loop reads them."""
    if isinstance(model, Foreign):
        raise SettingError(
            f"model must be one from unmask.load, got {model.name} from unmask.wrap, which cannot store blocks this way; unmask.generate takes it, "
            "without a cache"
        )
    if not isinstance(model, Model):
        raise SettingError(f"model must be one from unmask.load, got {type(model).__name__}; another module cannot store blocks this way")
    c = model.config
    if c.visibility != "block_causal" or c.shifted != shifted:
        kind = f"{c.family}, {c.visibility.replace('_', '-')}, {'shifted' if c.shifted else 'unshifted'} logits"
        raise SettingError(f"model must be block-causal with {'shifted' if shifted else 'unshifted'} logits, got {kind}; use unmask.generate")
    return model


def check_one_prompt(model: Model, input_ids: object, mask_id: int, name: str = "input_ids") -> torch.Tensor:
    """int64 [1, P] on the model's device."""
    integer("mask_id", mask_id, 0, (1 << 31) - 1)
    check_prompt(input_ids, name)
    assert isinstance(input_ids, torch.Tensor)
    if input_ids.shape[0] != 1:
        raise SettingError(f"{name} must hold one prompt [1, P], as in the authors' code, got {list(input_ids.shape)}; unmask.generate decodes batches")
    input_ids = input_ids.to(model.device)
    _check_native(model, input_ids, mask_id)
    return input_ids


def check_lengths(**lengths: int) -> None:
    """Names ending in `length` may be 0 where they count new tokens; block lengths are at least 1."""
    for name, value in lengths.items():
        integer(name, value, 1 if "block" in name else 0, LONGEST)


def bar(name: str, value: object) -> float:
    """A threshold on a probability that must be exceeded: the authors take any number, and nothing exceeds 1."""
    return min(max(float(number(name, value, -math.inf, math.inf, finite=False)), 0.0), 1.0)


def filters(top_k: object, top_p: object) -> tuple[int | None, float | None]:
    """top_k and top_p as a policy takes them. The authors' filters are off at top_k <= 0 and at top_p >= 1."""
    k = None if top_k is None else integer("top_k", top_k, -1)
    p = None if top_p is None else number("top_p", top_p, 0.0, math.inf, open_low=True, finite=False)
    return k if k is not None and k > 0 else None, p if p is not None and p < 1.0 else None


def stop_ids(name: str, ids: object) -> list[int]:
    """A list, tuple, array or tensor of ids; -1 never occurs. None: no ids."""
    if ids is None:
        return []
    listed = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(listed, (list, tuple, set, frozenset)):
        raise SettingError(f"{name} must be a list of token ids or None, got {ids!r}")
    return [integer(f"{name}[{i}]", s, -1) for i, s in enumerate(listed)]


def ceil_to(n: int, size: int) -> int:
    return -(-n // size) * size


def cut(x: list[int], start: int, stop: int) -> list[int]:
    """x without what is behind the first `stop` from position `start` on."""
    return x[: next((i + 1 for i in range(start, len(x)) if x[i] == stop), len(x))]


class BlockState(DecodeState):
    """One row. quotas: positions per step, the same in every block whatever it holds; None: no fixed steps."""

    def __init__(self, *args, quotas: list[int] | None = None):
        self._quotas = quotas
        super().__init__(*args)

    def settle_block(self, row: Row, end: int) -> None:
        super().settle_block(row, end)
        if self._quotas is not None:
            row.quotas = self._quotas


@dataclasses.dataclass
class BlockLoop:
    """One generation, ready to run. forwards: so far, stores included. order: what each forward settled, as `note` puts it."""

    state: BlockState
    engine: Engine
    backend: NativeBackend
    size: int
    note: Callable[[Commit], object] | None = None
    forwards: int = 0
    order: list = dataclasses.field(default_factory=list)
    _later: list = dataclasses.field(default_factory=list)  # notes of what happens between two forwards

    @property
    def row(self) -> Row:
        return self.state.rows[0]

    def prefill(self, length: int) -> torch.Tensor | None:
        """Stores the whole blocks among the first `length` positions; their hidden states, None where there is none."""
        whole = length // self.size * self.size
        return self._store(0, whole) if whole else None

    def store_block(self, row: Row) -> torch.Tensor:
        """Stores the attention block of a finished row's block; its hidden states [block, d_model]."""
        return self._store(*attention_block(row, self.size))

    def _store(self, start: int, end: int) -> torch.Tensor:
        hidden = self.backend.store(self.row.index, start, end)
        self.row.stored = end
        self.row.nfe += 1
        self.forwards += 1
        return hidden

    def begin_again(self) -> None:
        """Looks for the first block anew, once tokens were put behind the prompt."""
        self.order += self._later
        self._later.clear()
        row = self.row
        if row.active:
            row.block, row.block_end = -1, row.start
            self.state.next_block(row)

    def run(self) -> list[int]:
        """Decodes to the end: the canvas, mask_id where nothing was decided."""
        for record in self.engine.run():
            self.forwards += 1
            self.order += [] if self.note is None else [self.note(c) for c in record.commits]
            self.order += self._later
            self._later.clear()
        return self.state.canvas[0].tolist()

    def note_later(self, what: object) -> None:
        """Notes something behind what the running forward settled."""
        self._later.append(what)


def one_row(model: Model, prompt: torch.Tensor, length: int, mask_id: int, part: int, quotas: list[int] | None, keyed: bool) -> BlockState:
    """`length` positions behind prompt int64 [1, P], `part` of them denoised together. keyed: with a seed of torch's default generator."""
    ids, rest = prompt[0].tolist(), length - prompt.shape[1]
    canvas, given = ids + [mask_id] * rest, [True] * len(ids) + [False] * rest
    seeds = torch.randint(0, 2**62, (1,)).tolist() if keyed else [0]
    return BlockState([canvas], [given], mask_id, AlignedBlocks(part), None, seeds, model.device, quotas=quotas)


def prepare(
    model: Model,
    prompt: torch.Tensor,
    policy: Policy,
    *,
    length: int,
    mask_id: int,
    block: int,
    sub_block: int | None = None,
    cache: str = "block",
    quotas: list[int] | None = None,
    note: Callable[[Commit], object] | None = None,
    **engine,
) -> BlockLoop:
    """The loop that fills a canvas of `length` positions behind prompt int64 [1, P], attention being causal over blocks of `block`
    positions and sub_block of them (None: all) denoised together. note: what a forward settled, for BlockLoop.order. engine: more
    arguments of Engine."""
    state = one_row(model, prompt, length, mask_id, sub_block or block, quotas, keyed=policy.sampled)
    backend = NativeBackend(model, state, mask_id)
    backend.attention_block = block  # the argument's, not the config's: SDAR's checkpoints are run with several
    loop = Engine(state, backend, policy, cache=cache, record=note is not None, **engine)
    return BlockLoop(state, loop, backend, block, note)


L = TypeVar("L", bound=BlockLoop)


class Call:
    """One call of a family's function, its arguments checked. arguments: what `prepare` takes of them. loop: once `start` has made it."""

    model: Model
    prompt: torch.Tensor
    policy: Policy
    arguments: dict[str, Any]
    loop: BlockLoop

    @property
    def given(self) -> int:
        """Length of the prompt."""
        return self.prompt.shape[1]

    def start(self, prepare: Callable[..., L], *options: Any, **more: Any) -> L:
        """The loop that `prepare`, of this module or of s2d2, builds."""
        self.loop = loop = prepare(self.model, self.prompt, self.policy, *options, **self.arguments, **more)
        return loop
