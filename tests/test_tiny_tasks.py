"""The embedded model's data: right answers, an honest split, and many-answer tasks that do punish parallel commits."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from unmask.tiny import tasks
from unmask.tiny.tasks import (
    TASKS,
    Example,
    check_finish,
    check_pair,
    draw_example,
    held_out_examples,
    is_held_out,
)
from unmask.tiny.tokenizer import BAR, EOS, MASK, UNK, build_tokenizer, vocabulary

FORMS = {
    "add": ("add 47 + 38 low first", "5 8"),
    "sort": ("sort d a c b", "a b c d"),
    "reverse": ("reverse d a c b", "b c a d"),
    "close": ("close ([{", "}])"),
    "json": ("json ann is 31 and lives in paris", '{"name": "ann", "age": 31, "city": "paris"}'),
    "function": ("function f adds x and y", "def f(x, y): return x + y"),
    "pair": ("pair near 42 with sum 76", "42 + 34"),
    "finish": ("finish (()( in 4", "()))"),
}


@pytest.mark.parametrize("name", TASKS)
def test_generated_answers_are_right_and_spellable(name: str) -> None:
    tokenizer = build_tokenizer()
    unknown = tokenizer.token_to_id(UNK)
    rng = random.Random(1)
    for _ in range(500):
        example = draw_example(TASKS[name], rng, held_out=False)
        assert tasks.is_right(example, example.answer)
        assert not tasks.is_right(example, example.answer + ")") and not tasks.is_right(example, "")
        text = f"{example.prompt} {example.answer}"
        prompt_ids, ids = tokenizer.encode(example.prompt).ids, tokenizer.encode(text).ids
        assert unknown not in ids
        assert ids[: len(prompt_ids)] == prompt_ids, "the canvas begins where the prompt's tokens end"
        assert (
            tokenizer.decode(ids) == text
            and tokenizer.decode(ids[len(prompt_ids) :]).strip() == example.answer
        )


@pytest.mark.parametrize("name", TASKS)
def test_documented_forms(name: str) -> None:
    request, answer = FORMS[name]
    assert TASKS[name].check(request, answer, answer)


def test_split_is_by_the_prompt_alone() -> None:
    for name in TASKS:
        held_out = held_out_examples(name, 60)
        assert len(held_out) >= 30 and len({e.prompt for e in held_out}) == len(held_out)
        assert all(is_held_out(e.prompt) for e in held_out)
    trained = tasks.training_examples(4000, random.Random(2), dict.fromkeys(TASKS, 1.0))
    assert {e.task for e in trained} == set(TASKS)
    assert not any(is_held_out(e.prompt) for e in trained)
    share = sum(is_held_out(f"sort {i} =>") for i in range(20000)) / 20000
    assert 0.09 < share < 0.11


def test_answers_of_python_functions_run() -> None:
    rng = random.Random(3)
    for _ in range(300):
        example = draw_example(TASKS["function"], rng, held_out=False)
        compile(example.answer, "answer", "exec")


@pytest.mark.parametrize(
    ("request_", "text", "right"),
    [
        ("pair near 42 with sum 76", "52 + 24", True),
        ("pair near 42 with sum 76", "47 + 29", True),
        ("pair near 42 with sum 76", "43 + 33", True),
        ("pair near 42 with sum 76", "42 + 24", False),
        ("pair near 42 with sum 76", "66 + 10", False),
        ("pair near 42 with sum 76", "52 24", False),
        ("pair near 42 with sum 76", "5 2 + 24", False),
    ],
)
def test_check_pair(request_: str, text: str, right: bool) -> None:
    assert check_pair(request_, "", text) is right


def test_check_finish_against_enumeration() -> None:
    for prefix, length in (("((", 4), ("(()(", 6), ("((((", 6)):
        right = {"".join(s) for s in itertools.product("()", repeat=length) if _balanced(prefix + "".join(s))}
        for s in itertools.product("()", repeat=length):
            text = "".join(s)
            assert check_finish(f"finish {prefix} in {length}", "", text) is (text in right)
    assert not check_finish("finish (( in 4", "", "))") and not check_finish("finish (( in 4", "", "a)))")


def _balanced(text: str) -> bool:
    while "()" in text:
        text = text.replace("()", "")
    return not text


def _answers(request: str, rng: random.Random) -> list[str]:
    """600 answers to one request, drawn as training draws them."""
    fields = request.split()
    if fields[0] == "pair":
        near, total = int(fields[2]), int(fields[5])
        return [rng.choice(tasks.pair_answers(near, total - near - 10)) for _ in range(600)]
    height = fields[1].count("(") - fields[1].count(")")
    return [tasks.draw_rest(height, int(fields[3]), rng) for _ in range(600)]


@pytest.mark.parametrize("request_", ["pair near 42 with sum 76", "finish (()( in 4", "finish (((( in 6"])
def test_likely_token_everywhere_is_never_an_answer(request_: str) -> None:
    """Each place has a token of probability above 1/2, but those tokens together are wrong: what the tasks are for."""
    check = TASKS[request_.split()[0]].check
    answers = _answers(request_, random.Random(4))
    assert all(check(request_, "", answer) for answer in answers)
    modes = [Counter(column).most_common(1)[0] for column in zip(*answers, strict=True)]
    assert min(count for _, count in modes) > 0.55 * len(answers)
    assert not check(request_, "", "".join(token for token, _ in modes))


def test_vocabulary_is_small_and_unique() -> None:
    tokens = vocabulary()
    assert len(tokens) == len(set(tokens)) <= 256
    assert build_tokenizer().get_vocab_size() == len(tokens)


@pytest.mark.parametrize(
    ("typed", "back"),
    [
        ("Sort  d a\tc =>", "sort d a c =>"),
        ("close ([{ =>", "close ([{ =>"),
        ("  add 47 + 38 low first ", "add 47 + 38 low first"),
        ("", ""),
    ],
)
def test_typed_text_comes_back(typed: str, back: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer.encode(typed).ids) == back


def test_unknown_words_and_masks_are_single_tokens() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.encode("sort zebra =>").tokens == [BAR + "sort", UNK, BAR + "=>"]
    assert tokenizer.encode(f"sort b a => a {MASK} {EOS}").tokens[-3:] == [BAR + "a", MASK, EOS]


def test_example_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Example("sort", "sort b a =>", "a b").answer = ""  # type: ignore[misc]
