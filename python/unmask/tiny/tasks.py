"""What the embedded model is taught: eight text tasks, each with a generator of examples and a checker.

Six tasks have one right answer. Two (`pair`, `finish`) have many, and their answers are drawn so that decoding rules
can be told apart: at the first step most positions have a likely token (probability 2/3 to 5/6), yet taking the
likely token at *all* positions is never an answer. A rule that commits dependent positions together fails there.
(Rules about pairs of positions, as in a Latin square, cannot do this: two exclusive events are never both above 1/2.)

Held out is what a hash of the prompt says (`is_held_out`): those prompts are never trained on, in any task.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from . import words
from .tokenizer import MARK


@dataclass(frozen=True)
class Example:
    """One prompt (ending in the mark) and one right answer, as text."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A task: `draw` makes (request, answer), `check` judges an answer to a request."""

    name: str
    draw: Callable[[random.Random], tuple[str, str]]
    check: Callable[[str, str, str], bool]
    many_answers: bool = False


def is_held_out(prompt: str) -> bool:
    """One prompt in ten, by its hash alone: the same split for every seed, machine and version of the generator."""
    return int.from_bytes(blake2b(prompt.encode(), digest_size=8).digest(), "big") % 10 == 0


def _same(request: str, expected: str, text: str) -> bool:
    del request
    return text == expected


# --- one right answer -------------------------------------------------------------------------------------------


def draw_add(rng: random.Random) -> tuple[str, str]:
    """`add 47 + 38 low first` -> `5 8`: lowest digit first, so that each digit needs only what is before it."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"add {a} + {b} low first", " ".join(reversed(str(a + b)))


def _letters(rng: random.Random) -> list[str]:
    return rng.choices(words.LETTERS, k=rng.randint(2, 6))


def draw_sort(rng: random.Random) -> tuple[str, str]:
    """`sort d a c` -> `a c d`."""
    letters = _letters(rng)
    return "sort " + " ".join(letters), " ".join(sorted(letters))


def draw_reverse(rng: random.Random) -> tuple[str, str]:
    """`reverse d a c` -> `c a d`."""
    letters = _letters(rng)
    return "reverse " + " ".join(letters), " ".join(reversed(letters))


def draw_close(rng: random.Random) -> tuple[str, str]:
    """`close ([{` -> `}])`: 3 to 10 open brackets of three kinds."""
    opened = rng.choices(words.OPENERS, k=rng.randint(3, 10))
    return "close " + "".join(opened), "".join(words.CLOSER_OF[c] for c in reversed(opened))


def draw_json(rng: random.Random) -> tuple[str, str]:
    """`json ann is 31 and lives in paris` -> `{"name": "ann", "age": 31, "city": "paris"}`; four sentence forms."""
    name, city, job, age = (
        rng.choice(words.NAMES),
        rng.choice(words.CITIES),
        rng.choice(words.JOBS),
        rng.randint(18, 99),
    )
    sentence, keys = rng.choice(
        (
            (f"{name} is {age} and lives in {city}", "name age city"),
            (f"{name} is a {age} year old {job}", "name age job"),
            (f"{name} works in {city} as a {job}", "name city job"),
            (f"the {job} {name} is {age} and lives in {city}", "name age city job"),
        )
    )
    values = {"name": f'"{name}"', "age": str(age), "city": f'"{city}"', "job": f'"{job}"'}
    return "json " + sentence, "{" + ", ".join(f'"{key}": {values[key]}' for key in keys.split()) + "}"


def draw_function(rng: random.Random) -> tuple[str, str]:
    """`function f adds x and y` -> `def f(x, y): return x + y`; fourteen instructions."""
    name = rng.choice(words.FUNCTION_NAMES)
    x, y = rng.sample(words.LETTERS, 2)
    digit = rng.choice(words.DIGITS[2:])
    instruction, arguments, body = rng.choice(
        (
            (f"adds {x} and {y}", f"{x}, {y}", f"{x} + {y}"),
            (f"subtracts {y} from {x}", f"{x}, {y}", f"{x} - {y}"),
            (f"multiplies {x} by {y}", f"{x}, {y}", f"{x} * {y}"),
            (f"divides {x} by {y}", f"{x}, {y}", f"{x} / {y}"),
            (f"checks {x} above {y}", f"{x}, {y}", f"{x} > {y}"),
            (f"checks {x} below {y}", f"{x}, {y}", f"{x} < {y}"),
            (f"checks {x} equals {y}", f"{x}, {y}", f"{x} == {y}"),
            (f"takes the larger of {x} and {y}", f"{x}, {y}", f"max({x}, {y})"),
            (f"takes the smaller of {x} and {y}", f"{x}, {y}", f"min({x}, {y})"),
            (f"adds {digit} to {x}", x, f"{x} + {digit}"),
            (f"multiplies {x} by {digit}", x, f"{x} * {digit}"),
            (f"doubles {x}", x, f"{x} * 2"),
            (f"squares {x}", x, f"{x} * {x}"),
            (f"negates {x}", x, f"-{x}"),
        )
    )
    return f"function {name} {instruction}", f"def {name}({arguments}): return {body}"


# --- many right answers -----------------------------------------------------------------------------------------


def draw_pair(rng: random.Random) -> tuple[str, str]:
    """`pair near 42 with sum 76` -> `52 + 24`, `42 + 34` or `47 + 29`: two numbers with a given sum.

    A base pair falls short by 10, and one of three things makes up for it, each equally often: ten more on the left,
    ten more on the right, or five more on both. Each digit keeps its base value with probability 2/3, but all of them
    together are 10 short. Base tens are even and base ones below 5, so a changed digit can be told by itself.
    """
    a1, b1 = rng.choice("2468"), rng.choice("2468")
    a0, b0 = rng.randint(0, 4), rng.randint(0, 4)
    a, b = 10 * int(a1) + a0, 10 * int(b1) + b0
    return f"pair near {a} with sum {a + b + 10}", rng.choice(pair_answers(a, b))


def pair_answers(a: int, b: int) -> tuple[str, ...]:
    """The answers that training shows for a base pair that is 10 short (`check_pair` accepts others too)."""
    return tuple(f"{left} + {right}" for left, right in ((a + 10, b), (a, b + 10), (a + 5, b + 5)))


def check_pair(request: str, expected: str, text: str) -> bool:
    """Any two 2-digit numbers with the sum asked for, the left one within 10 of the number named."""
    del expected
    fields, parts = request.split(), text.split()
    near, total = int(fields[2]), int(fields[5])
    if (
        len(parts) != 3
        or parts[1] != "+"
        or not all(p.isdigit() and len(p) == 2 for p in (parts[0], parts[2]))
    ):
        return False
    left, right = int(parts[0]), int(parts[2])
    return left + right == total and abs(left - near) <= 10


def _height(text: str) -> int | None:
    """Open brackets left after `text`, or None where it closes one that was never opened (or is no bracket)."""
    height = 0
    for c in text:
        if c not in "()":
            return None
        height += 1 if c == "(" else -1
        if height < 0:
            return None
    return height


def _completions(height: int, length: int) -> int:
    """How many strings of `length` brackets take `height` open ones to balance."""
    if height < 0 or height > length:
        return 0
    if length == 0:
        return 1
    return _completions(height + 1, length - 1) + _completions(height - 1, length - 1)


def draw_finish(rng: random.Random) -> tuple[str, str]:
    """`finish (()( in 4` -> `()))`, `)())` or `))()`: balance a string with a given number of brackets.

    The number is two more than the open brackets. All completions are equally likely: with h open brackets each place
    but the last closes with probability h / (h + 1), but exactly one of them must open.
    """
    while True:
        prefix = "(" + "".join(rng.choices("()", weights=(6, 4), k=rng.randint(1, 11)))
        height = _height(prefix)
        if height is not None and 2 <= height <= 5:
            break
    length = height + 2
    return f"finish {prefix} in {length}", draw_rest(height, length, rng)


def draw_rest(height: int, length: int, rng: random.Random) -> str:
    """One of all strings of `length` brackets that balance `height` open ones, each equally likely."""
    rest = ""
    for left in range(length, 0, -1):
        opens = rng.random() * _completions(height, left) < _completions(height + 1, left - 1)
        rest += "(" if opens else ")"
        height += 1 if opens else -1
    return rest


def check_finish(request: str, expected: str, text: str) -> bool:
    """Exactly the number of brackets asked for, and the whole string balanced."""
    del expected
    _, prefix, _, length = request.split()
    return len(text) == int(length) and _height(prefix + text) == 0


# --- all together -----------------------------------------------------------------------------------------------

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("add", draw_add, _same),
        Task("sort", draw_sort, _same),
        Task("reverse", draw_reverse, _same),
        Task("close", draw_close, _same),
        Task("json", draw_json, _same),
        Task("function", draw_function, _same),
        Task("pair", draw_pair, check_pair, many_answers=True),
        Task("finish", draw_finish, check_finish, many_answers=True),
    )
}


def draw_example(task: Task, rng: random.Random, *, held_out: bool) -> Example:
    """One example of the wanted side of the split (draws again until the hash says so)."""
    while True:
        request, answer = task.draw(rng)
        prompt = f"{request} {MARK}"
        if is_held_out(prompt) == held_out:
            return Example(task.name, prompt, answer)


def training_examples(count: int, rng: random.Random, shares: Mapping[str, float]) -> list[Example]:
    """`count` examples, tasks drawn by their shares, none held out."""
    names = rng.choices(list(shares), weights=list(shares.values()), k=count)
    return [draw_example(TASKS[name], rng, held_out=False) for name in names]


def held_out_examples(name: str, count: int, seed: int = 0) -> list[Example]:
    """Up to `count` held-out examples of one task with distinct prompts (fewer where the task has fewer)."""
    rng = random.Random(f"held-out {name} {seed}")
    found: dict[str, Example] = {}
    for _ in range(count * 60):
        example = draw_example(TASKS[name], rng, held_out=True)
        found.setdefault(example.prompt, example)
        if len(found) == count:
            break
    return list(found.values())


def is_right(example: Example, text: str) -> bool:
    """Whether `text` answers the example's prompt, by the task's checker."""
    request = example.prompt.removesuffix(f" {MARK}")
    return TASKS[example.task].check(request, example.answer, text.strip())
