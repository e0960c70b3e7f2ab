"""The answers a run held on its way: parsed from the fully filled canvas of every step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import SettingError
from ..result import Result
from ..values import as_integer, integer
from .records import read_records


def intermediate_answers(
    source: Any, parse: Callable[[Any], Any], *, decode: Callable[[list[int]], str] | None = None, start: int = 0
) -> list[Any]:
    """What `parse` reads off every step's prediction of the whole canvas, in order; None where it finds no answer.

    source: a Result or a list of trace records of one row whose run had trace='predictions' (key "filled": the canvas before the step's
    commit, each undecided position replaced by its most likely token), or a list of such id sequences.
    parse: called with the ids, or with their text where `decode` is given (`model.tokenizer.decode`); its exceptions pass through.
    start: ids before this canvas position are left out: `len(result.prompt_ids)` after `generate`.
    Raises SettingError where a record has no prediction. Source of the idea: arXiv 2508.09138.
    """
    if not callable(parse):
        raise SettingError(f"parse must be a function of ids or text that returns an answer or None, got {type(parse).__name__}")
    start = integer("start", start, 0)
    answers = []
    for ids in _sequences(source):
        tail = ids[start:]
        answers.append(parse(tail if decode is None else decode(tail)))
    return answers


def clusters(answers: Iterable[Any], same: Callable[[Any, Any], bool] | None = None) -> list[list[int]]:
    """Steps that hold the same answer, per distinct answer, in the order in which the answers were first seen. None is in no cluster.

    same: whether two answers mean the same; each answer joins the first cluster whose first answer it is the same as (the greedy rule
    of semantic entropy, arXiv 2302.09664). Default: equality, and then answers must be hashable (SettingError).
    """
    if same is not None and not callable(same):
        raise SettingError(f"same must be a function of two answers, got {type(same).__name__}")
    found: list[list[int]] = []
    firsts: list[Any] = []
    known: dict[Any, list[int]] = {}
    for step, answer in enumerate(answers):
        if answer is None:
            continue
        if same is None:
            if not _hashable(answer):
                raise SettingError(
                    f"answers must be hashable, step {step} holds a {type(answer).__name__}; let parse return a string, a number or a "
                    "tuple, or pass same="
                )
            members = known.get(answer)
        else:
            members = next((m for m, first in zip(found, firsts, strict=True) if same(first, answer)), None)
        if members is None:
            members = []
            found.append(members)
            firsts.append(answer)
            if same is None:
                known[answer] = members
        members.append(step)
    return found


def _hashable(answer: Any) -> bool:
    if not isinstance(answer, Hashable):
        return False
    try:
        hash(answer)  # a tuple that holds a list says it is Hashable
    except TypeError:
        return False
    return True


def _sequences(source: Any) -> list[list[int]]:
    """The id sequence of every step."""
    if hasattr(source, "tolist"):
        source = source.tolist()
    bare = isinstance(source, (list, tuple)) and bool(source) and not isinstance(source[0], Mapping)
    if not isinstance(source, Result) and bare:
        return [_ids(item, f"step {i}") for i, item in enumerate(source)]
    sequences = []
    for i, record in enumerate(read_records(source)):
        if record.get("filled") is None:
            raise SettingError(f"trace record {i} has no prediction of the whole canvas ('filled'); run with trace='predictions'")
        sequences.append(_ids(record["filled"], f"trace record {i}: filled"))
    return sequences


def _ids(value: Any, what: str) -> list[int]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise SettingError(f"{what} must be a list of token ids, got {type(value).__name__}")
    ids = [as_integer(x) for x in value]
    for j, x in enumerate(ids):
        if x is None:
            raise SettingError(f"{what}: token id {j} must be an integer, got {value[j]!r}")
    return ids  # type: ignore[return-value]
