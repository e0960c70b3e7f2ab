"""Templates with holes and JSON scaffolds: literals stay bit for bit, nulls end their field and nothing else, whatever a model writes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

import random_models
import unmask
from unmask.errors import SettingError
from unmask.models import Tokenizer
from unmask.templates import Scaffold, end_fields, escape, parse_template

MASK, EOS, PAD, NULL = 0, 1, 2, 3


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE with a few hundred merges, so that pieces would merge across holes if they could; it spells any text."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    corpus = ['```json\n{\n  "name": "', '"name": "Ann", "age": 31,\n', " city of Rome \\n [[ ]] ", "<none> <none>"] * 3
    special = ["<|mask|>", "<|eos|>", "<|pad|>", "<|null|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator(corpus, trainer)
    return Tokenizer(".", SimpleNamespace(mask_id=MASK, eos_ids=(EOS,)), rust, None, {"pad_token": "<|pad|>"})


TOKENIZER = byte_tokenizer()
TEXTS = st.one_of(st.text(alphabet="[]\\MASK*12 a", max_size=24), st.text(max_size=12).filter(lambda s: "<|" not in s))


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special=False)


# Text templates


def test_a_template():
    canvas = parse_template('{"name": "[[MASK*3]]", "age": [[MASK]]}', TOKENIZER)
    assert canvas == [*encode('{"name": "'), None, None, None, *encode('", "age": '), None, *encode("}")]
    assert parse_template("", TOKENIZER) == [] and parse_template("[[MASK*2]]", TOKENIZER) == [None] * 2
    assert parse_template("[[MASK]][[MASK*02]]", TOKENIZER) == [None] * 3
    assert encode('name": "') != [*encode("na"), *encode('me": "')]  # else the next line shows nothing
    assert parse_template('na[[MASK]]me": "', TOKENIZER) == [*encode("na"), None, *encode('me": "')]


@pytest.mark.parametrize(
    "text, want",
    [
        (r"\[[", ["[["]),
        (r"\[[MASK]]", ["[[MASK]]"]),
        (r"\\[[MASK]]", ["\\", 1]),
        (r"\\\[[MASK]]", [r"\[[MASK]]"]),
        ("[[[MASK*2]]]", ["[", 2, "]"]),
        (r"\\[[[MASK]]]", ["\\[", 1, "]"]),
        (r"\[[[MASK]]", ["[[[MASK]]"]),
        (r"\[[[[MASK]]", ["[[", 1]),
        (r"a\b]] [x] \\ [", [r"a\b]] [x] \\ ["]),
        (r"[[MASK]]\[[", [1, "[["]),
    ],
)
def test_brackets_and_backslashes(text, want):
    canvas = []
    for piece in want:
        canvas += encode(piece) if isinstance(piece, str) else [None] * piece
    assert parse_template(text, TOKENIZER) == canvas


@given(TEXTS)
def test_escaped_text_is_itself(text):
    assert parse_template(escape(text), TOKENIZER) == encode(text)
    assert TOKENIZER.decode(parse_template(escape(text), TOKENIZER)) == text
    assert parse_template(escape(text, True) + "[[MASK]]", TOKENIZER) == [*encode(text), None]


@given(st.lists(st.tuples(TEXTS, st.integers(1, 5)), max_size=5), TEXTS)
def test_literals_and_holes_come_back(parts, tail):
    text = "".join(f"{escape(literal, True)}[[MASK*{n}]]" for literal, n in parts) + escape(tail)
    canvas = parse_template(text, TOKENIZER)
    assert canvas.count(None) == sum(n for _, n in parts)
    assert canvas == [i for literal, n in parts for i in [*encode(literal), *[None] * n]] + encode(tail)
    filled = [NULL if i is None else i for i in canvas]  # special, so decode drops it
    assert TOKENIZER.decode(filled) == "".join(literal for literal, _ in parts) + tail


@given(st.text(alphabet="[]\\MASK*0129 ", max_size=30))
def test_any_text_is_a_template_or_an_error_with_its_offset(text):
    try:
        parse_template(text, TOKENIZER)
    except SettingError as error:
        offset = int(str(error).split("offset ")[1].split(":")[0])
        assert text.startswith("[[", offset)


@pytest.mark.parametrize(
    "text, message",
    [
        ("ab [[MASK*0]]", "offset 3: a hole must be of 1..1048576 positions, got 0"),
        ("[[MASK*000]]", "got 000"),
        ("[[MASK*1048577]]", "got 1048577"),
        ("[[MASK*" + "9" * 10_000 + "]]", "got a number of 10000 digits"),
        ("[[MASK*1048576]]x", "offset 16: the canvas must be at most 1048576 positions, got 1048577"),
        ("x[[MASK*1048570]][[MASK*6]]", "offset 17: the canvas must be at most"),
        ("[[MASK*two]]", r"offset 0: \[\[ must open"),
        ("[[MASK*-1]]", "must open"),
        ("[[MASK*1.5]]", "must open"),
        ("[[MASK*]]", "must open"),
        ("[[MASK* 3]]", "must open"),
        ("[[MASK*٣]]", "must open"),
        ("[[mask]]", "must open"),
        ("[[MASK*3]", "must open"),
        ("ok [[MASK]] then [[", "offset 17"),
        ("a[[0, 1]]", r"offset 1: .* a literal \[\[ is written \\\[\["),
    ],
)
def test_malformed_holes_name_their_offset(text, message):
    with pytest.raises(SettingError, match=message):
        parse_template(text, TOKENIZER)


def test_hostile_lengths_are_read_in_linear_time():
    assert parse_template("[[MASK*1048576]]", TOKENIZER).count(None) == 1 << 20
    for text in ("\\" * 200_000, "[ " * 100_000, r"\[[" * 50_000):
        assert parse_template(escape(text), SpellsAll()) == list(map(ord, text))
    assert parse_template("[" * 50_000 + "[[MASK]]", SpellsAll()) == [91] * 50_000 + [None]


class SpellsAll:
    """The smallest tokenizer that will do: characters. No eos_ids, no mask_id, no special tokens."""

    def encode(self, text, add_special=True):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_what_the_tokenizer_cannot_spell_is_refused():
    tiny = unmask_tiny_tokenizer()
    assert parse_template("sort d a => [[MASK*2]]", tiny) == [*tiny.encode("sort d a => ", add_special=False), None, None]
    with pytest.raises(SettingError, match="template, offset 8: the tokenizer cannot spell '~~'"):
        parse_template("[[MASK]]~~", tiny)
    with pytest.raises(SettingError, match="reads back as 'sort'"):
        parse_template("Sort", tiny)
    with pytest.raises(SettingError, match="schema, literal .* the tokenizer cannot spell"):
        Scaffold.from_schema({"type": "object", "properties": {"name": {"type": "string"}}}, tiny, null="low")


def unmask_tiny_tokenizer() -> Tokenizer:
    from pathlib import Path

    from unmask.models import inspect

    folder = Path(unmask.__file__).parent / "tiny" / "model"
    return Tokenizer.load(folder, inspect(folder).config)


@pytest.mark.parametrize("call", [parse_template, lambda text, t: Scaffold.from_schema(SCHEMA, t)])
@pytest.mark.parametrize("tokenizer", [None, "gpt", SimpleNamespace(encode=len)])
def test_tokenizers_are_checked(call, tokenizer):
    with pytest.raises(SettingError, match="tokenizer must have encode"):
        call("a", tokenizer)


def test_template_must_be_text():
    with pytest.raises(SettingError, match="a template must be a str, got bytes"):
        parse_template(b"a", TOKENIZER)


# Scaffolds

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "full\n  name"},
        "age": {"type": ["integer", "null"]},
        "home": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["rome", "oslo"]}, "far": {"type": "boolean"}},
            "required": ["city"],
        },
        "tags": {"type": "array", "items": {"type": "string"}},
        "size": {"type": "number"},
        "more": {"type": "object", "properties": {}},
    },
    "required": ["name"],
}
LAYOUT = """```json
{
  "name": "#",
  "age": #,
  "home": {
    "city": "#",
    "far": #
  },
  "tags": [#],
  "size": #,
  "more": {}
}
```"""


def scaffold(**settings) -> Scaffold:
    return Scaffold.from_schema(SCHEMA, TOKENIZER, **settings)


def fill(s: Scaffold, **texts: str | list[int]) -> list[int]:
    """The canvas with texts (or ids) in its fields, "home_city" for "home.city", and nulls behind them."""
    ids = [i if i is not None else -1 for i in s.canvas]
    for name, (a, b) in s.spans.items():
        text = texts.get(name.replace(".", "_"), "")
        content = encode(text) if isinstance(text, str) else list(text)
        assert len(content) <= b - a, "the budget is too small for the test"
        ids[a:b] = [*content, *[s.null_ids[i % len(s.null_ids)] for i in range(b - a - len(content))]]
    return ids


def test_layout():
    s = scaffold(budget={"age": 4, "home.city": 8})
    assert list(s.spans) == ["name", "age", "home.city", "home.far", "tags", "size"]
    assert [b - a for a, b in s.spans.values()] == [16, 4, 8, 16, 16, 16]
    assert s.canvas.count(None) == 16 * 4 + 4 + 8
    assert {i for a, b in s.spans.values() for i in range(a, b)} == {i for i, x in enumerate(s.canvas) if x is None}
    shown = list(s.canvas)
    for a, b in reversed(s.spans.values()):
        shown[a:b] = encode("#")
    assert TOKENIZER.decode(shown) == LAYOUT
    bare = scaffold(fenced=False, budget=1)
    assert TOKENIZER.decode([encode("#")[0] if i is None else i for i in bare.canvas]) == LAYOUT[8:-4]


def test_flat_pieces_are_those_of_the_authors():
    """spec of S3: every piece is tokenised on its own, the closing quote and the comma too."""
    s = Scaffold.from_schema({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}, TOKENIZER, budget=2)
    want = []
    for piece in ("```json\n", "{\n", '  "a": "', 2, '"', ",\n", '  "b": "', 2, '"', "\n", "}", "\n```"):
        want += encode(piece) if isinstance(piece, str) else [None] * piece
    assert s.canvas == want


def test_read_and_json():
    s = scaffold(null=NULL, budget=24)
    ids = fill(s, name='Ann \\"A\\" B', age=" 31", home_city="rome", home_far="true", tags='"x", "y\\n"', size="-1.5e2")
    want = {
        "name": 'Ann "A" B', "age": 31, "home": {"city": "rome", "far": True}, "tags": ["x", "y\n"], "size": -150.0, "more": {},
    }  # fmt: skip
    assert s.read(ids) == want and json.loads(s.json(ids)) == want and s.problems(ids) == []
    assert s.read(torch.tensor(ids)) == s.read([7, 8, *ids]) == want  # a prompt in front
    empty = fill(s)
    assert s.read(empty) == {"name": None, "age": None, "home": {"city": None, "far": None}, "tags": None, "size": None, "more": {}}
    assert s.problems(empty) == ["name is required, got nothing", "home.city is required, got nothing"]


@pytest.mark.parametrize(
    "ids, want",
    [
        ([*encode("Ann"), NULL, *encode("junk")], "Ann"),
        ([*encode("Ann"), EOS, *encode("junk")], "Ann"),
        ([*encode("Ann "), PAD, PAD], "Ann"),
        ([NULL, *encode("Ann")], None),
        ([EOS], None),
        (encode("Ann <|null|>x"), "Ann"),
    ],
)
def test_a_field_is_read_up_to_its_end(ids, want):
    s = scaffold(null=NULL)
    assert s.null == "<|null|>" and s.null_ids == (NULL,) and s.eos_ids == (EOS, PAD) and s.fill_id == NULL
    assert s.read(fill(s, name=ids))["name"] == want


def test_a_null_of_several_tokens():
    s = scaffold(null="<zip>")
    assert len(s.null_ids) > 1 and s.end_ids == (s.null_ids, EOS, PAD) and s.fill_id == EOS
    assert TOKENIZER.decode(s.null_ids) == "<zip>"
    assert s.read(fill(s, name=[*encode("a<z"), *s.null_ids, *encode("b")]))["name"] == "a<z"
    s = scaffold(null="<none>")
    other = [i for c in "a <none>b" for i in encode(c)]  # the same text from other tokens
    assert not any(tuple(other[i : i + len(s.null_ids)]) == s.null_ids for i in range(len(other)))
    assert s.read(fill(s, name=other))["name"] == "a"
    no_eos = Scaffold.from_schema(SCHEMA, SpellsAll())
    assert no_eos.eos_ids == () and no_eos.end_ids == (tuple(map(ord, "<none>")),) and no_eos.fill_id == ord(">")


@pytest.mark.parametrize(
    "field, text, want, problem",
    [
        ("age", "about 5", "about 5", "age must be a whole number, got 'about 5'"),
        ("age", "12.0", 12, None),
        ("age", "12.5", "12.5", "age must be a whole number"),
        ("age", "true", "true", "age must be a whole number"),
        ("size", "1e999", "1e999", "size must be a number"),
        ("size", "NaN", "NaN", "size must be a number"),
        ("size", "-Infinity", "-Infinity", "size must be a number"),
        ("size", '"3"', '"3"', "size must be a number"),
        ("home_far", "True", "True", "home.far must be true or false"),
        ("home_far", "0", "0", "home.far must be true or false"),
        ("home_city", "paris", "paris", 'home.city must be one of ["rome", "oslo"], got \'paris\''),
        ("tags", '"a", 3', '"a", 3', "tags must be a list of values, each text"),
        ("tags", "], [", "], [", "tags must be a list"),
        ("tags", "[" * 16, "[" * 16, "tags must be a list"),
        ("tags", "null", "null", "tags must be a list"),
        ("name", 'quo"te', 'quo"te', None),
        ("name", "back\\slash", "back\\slash", None),
        ("name", "line\nbreak\x00", "line\nbreak\x00", None),
        ("name", "\\ud800", "\\ud800", None),  # half a surrogate pair
        ("name", "\\u00e9\\t!", "é\t!", None),
        ("name", '", "age": 9, "x": "', '", "age": 9, "x": "', None),  # no way out of the field
    ],
)
def test_whatever_stands_in_a_field_json_is_valid(field, text, want, problem):
    s = scaffold(null=NULL, budget=24)
    ids = fill(s, **{"name": "n", "home_city": "rome", field: text})
    got = s.read(ids)
    value = got["home"][field[5:]] if field.startswith("home_") else got[field]
    assert value == want and type(value) is type(want)
    assert json.loads(s.json(ids).encode()) == got
    problems = s.problems(ids)
    assert (problems == []) if problem is None else (len(problems) == 1 and problems[0].startswith(problem))


def test_nesting_beyond_the_parser_is_text():
    schema = {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "number"}}}}
    s = Scaffold.from_schema(schema, SpellsAll(), budget=200_000, null=ord("~"))
    text = "[" * 190_000
    ids = [i if i is not None else -1 for i in s.canvas]
    a, b = s.spans["tags"]
    ids[a:b] = [*map(ord, text), *[ord("~")] * 10_000]
    assert s.read(ids) == {"tags": text} and json.loads(s.json(ids)) == {"tags": text}


@given(st.lists(st.integers(1, TOKENIZER.vocab_size - 1), min_size=6 * 5, max_size=6 * 5))
def test_json_of_any_tokens(tokens):
    s = scaffold(null=NULL, budget=5)
    ids = [i if i is not None else tokens.pop() for i in s.canvas]
    assert json.loads(s.json(ids).encode()) == s.read(ids)
    for name, (a, b) in s.spans.items():  # what stands behind an end does not matter
        end = next((i for i in range(a, b) if ids[i] in (NULL, EOS, PAD)), b)
        changed = [*ids[: end + 1], *[NULL] * (b - end - 1), *ids[b:]] if end < b else ids
        assert s.read(changed) == s.read(ids), name


def test_reading_what_is_not_there():
    s = scaffold(null=NULL)
    ids = fill(s, name="a")
    wrong = list(ids)
    wrong[0] += 1
    undecided = list(ids)
    undecided[s.spans["age"][0]] = MASK
    for bad, text in (
        (wrong, r"position 0 of it is the literal token \d+, got \d+; pass the canvas of infill"),
        (ids[:-1], "one filled canvas of at least"),
        (ids[1:] + [5], "ids must end with the scaffold"),
        (undecided, "position .* is undecided"),
        (s.canvas, "undecided"),
        ("text", "got str"),
        (5, "got int"),
    ):
        with pytest.raises(SettingError, match=text):
            s.read(bad)


def test_instructions():
    text = scaffold(null=NULL).instructions()
    for line in (
        "- name (text): full name", "- age (a whole number)", '- home.city (text; one of "rome", "oslo")', "- home.far (true or false)",
        "- tags (a list of values, each text)", "- size (a number)",
    ):  # fmt: skip
        assert line in text.split("\n")
    assert "write <|null|> in its place" in text


def test_names_are_escaped():
    properties = {'a"b\\': {"type": "string"}, "ü\n": {"type": "integer"}, "[[MASK]]": {"type": "string"}}
    s = Scaffold.from_schema({"type": "object", "properties": properties}, TOKENIZER, fenced=False, null=NULL)
    ids = fill(s)
    assert s.read(ids) == dict.fromkeys(properties)
    a, b = s.spans["ü\n"]
    spelled = [*ids[:a], *encode("7"), *ids[b:]]
    text = TOKENIZER.decode(spelled)
    assert json.loads(text) == {'a"b\\': "", "ü\n": 7, "[[MASK]]": ""}


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def itself() -> dict:
    schema = nested(2)
    schema["properties"]["a"]["properties"]["a"] = schema
    return schema


STRING = {"type": "string"}


@pytest.mark.parametrize(
    "schema, settings, text",
    [
        (None, {}, "schema must be a JSON schema"),
        ({"type": "string"}, {}, "schema must have type 'object', got 'string'"),
        ({}, {}, "schema: type must be one of object, array, string"),
        ({"type": "object"}, {}, "at least one field"),
        ({"type": "object", "properties": {"a": 3}}, {}, "schema field 'a' must be a JSON schema"),
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, {}, "unknown type of schema field 'a' 'strin'; did you mean 'string'"),
        ({"type": "object", "properties": {"a": {"type": ["string", "number"]}}}, {}, "schema field 'a': type must be one of"),
        ({"type": "object", "properties": {"a": {"anyOf": [STRING]}}}, {}, "schema field 'a': anyOf is not supported"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, {}, r"\$ref is not supported"),
        ({"type": "object", "properties": {"a": {"type": "array"}}}, {}, "schema field 'a': items must be a JSON schema"),
        ({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "object"}}}}, {}, "type of the items of 'a' 'object'"),
        ({"type": "object", "properties": {"a": {"type": "string", "enum": []}}}, {}, "enum must be a list of JSON values"),
        ({"type": "object", "properties": {"a": {"type": "string", "enum": [{1}]}}}, {}, "enum must be a list of JSON values"),
        ({"type": "object", "properties": {"a": {"type": "string", "description": 4}}}, {}, "description must be a str"),
        ({"type": "object", "properties": {1: STRING}}, {}, "properties must be a dict"),
        ({"type": "object", "properties": [STRING]}, {}, "properties must be a dict"),
        ({"type": "object", "properties": {"a": STRING}, "required": ["b"]}, {}, "unknown required field of schema 'b'"),
        ({"type": "object", "properties": {"a": STRING}, "required": True}, {}, "required must be a list"),
        ({"type": "object", "properties": {"a.b": STRING, "a": {"type": "object", "properties": {"b": STRING}}}}, {}, "two fields are called 'a.b'"),
        (nested(40), {}, "at most 16 deep"),
        (itself(), {}, "at most 16 deep"),
        (SCHEMA, {"budget": 0}, "budget must be an integer in 1..1048576, got 0"),
        (SCHEMA, {"budget": 1 << 20}, "budget must be at most 1048576 positions in all"),
        (SCHEMA, {"budget": {"nam": 3}}, "unknown field in budget 'nam'; did you mean 'name'"),
        (SCHEMA, {"budget": {"name": "3"}}, "budget of 'name' must be an integer"),
        (SCHEMA, {"null": " "}, "null must be a text that can be seen"),
        (SCHEMA, {"null": -1}, "null .* must be an integer"),
        (SCHEMA, {"null": 10**6}, "null must be a token with a text"),
        (SCHEMA, {"null": MASK}, "null must not hold the mask token"),
        (SCHEMA, {"null": "<|mask|>"}, "null must not hold the mask token"),
        (SCHEMA, {"fenced": 1}, "fenced must be True or False"),
        (SCHEMA, {"eos_ids": ["x"]}, "an id in eos_ids must be an integer"),
    ],
)
def test_bad_schemas_are_named(schema, settings, text):
    with pytest.raises(SettingError, match=text):
        Scaffold.from_schema(schema, TOKENIZER, **settings)


# Ending fields


def slow_end_fields(canvas, masked, field, ends, fill_id):
    """The definition, position by position."""
    canvas, filled = [list(r) for r in canvas], [[False] * len(r) for r in canvas]
    runs = [(e,) if isinstance(e, int) else tuple(e) for e in ends]
    for b, row in enumerate(canvas):
        given_row = list(row)
        over = set()
        for p in range(len(row)):
            f = field[b][p]
            if not 0 <= f < len(row):
                continue
            if f in over and masked[b][p]:
                row[p], filled[b][p] = fill_id, True
            for run in runs:
                where = range(p - len(run) + 1, p + 1)
                if where[0] >= 0 and all(not masked[b][i] and field[b][i] == f for i in where):
                    if tuple(given_row[i] for i in where) == run:
                        over.add(f)
    return canvas, filled


@st.composite
def situations(draw):
    rows, length = draw(st.integers(0, 3)), draw(st.integers(1, 14))

    def table(values):
        return draw(st.lists(st.lists(values, min_size=length, max_size=length), min_size=rows, max_size=rows))

    kinds = draw(st.sampled_from([(-1, 3), (-3, 20)]))  # the second: numbers that name no field
    return table(st.integers(0, 5)), table(st.booleans()), table(st.integers(*kinds)), length


@given(situations(), st.lists(st.one_of(st.integers(3, 5), st.lists(st.integers(3, 5), min_size=1, max_size=3)), max_size=3), st.integers(0, 9))
def test_end_fields_is_its_definition(situation, ends, fill_id):
    ids, undecided, fields, length = situation
    canvas = torch.tensor(ids, dtype=torch.int64).reshape(-1, length)
    masked = torch.tensor(undecided, dtype=torch.bool).reshape(-1, length)
    field = torch.tensor(fields, dtype=torch.int64).reshape(-1, length)
    before, undecided_before, pointers = canvas.clone(), masked.clone(), (canvas.data_ptr(), masked.data_ptr())
    filled = end_fields(canvas, masked, field, ends, fill_id)
    want, want_filled = slow_end_fields(ids, undecided, fields, ends, fill_id)
    assert canvas.tolist() == want and filled.tolist() == want_filled
    assert pointers == (canvas.data_ptr(), masked.data_ptr())
    assert torch.equal(masked, undecided_before & ~filled)
    assert torch.equal(canvas[~filled], before[~filled]) and not (filled & ~undecided_before).any()
    if all(isinstance(e, int) for e in ends):
        again, still = before.clone(), undecided_before.clone()
        assert torch.equal(end_fields(again, still, field, torch.tensor(ends, dtype=torch.int64), fill_id), filled)
        assert torch.equal(again, canvas) and torch.equal(still, masked)
        if fill_id in ends:  # what it fills ends nothing new
            assert not end_fields(canvas, masked, field, ends, fill_id).any()


def test_end_fields_example():
    canvas = torch.tensor([[9, 0, 3, 0, 0, 9, 3, 0, 9, 0]])
    masked = torch.tensor([[False, True, False, True, True, False, True, True, False, True]])
    field = torch.tensor([[-1, 0, 0, 0, 0, -1, 1, 1, -1, -1]])
    filled = end_fields(canvas, masked, field, (3,), 3)
    assert canvas.tolist() == [[9, 0, 3, 3, 3, 9, 3, 0, 9, 0]]  # slot 1 stays open; the 3 at 6 is not decided; field 1 and -1 stay
    assert filled.nonzero()[:, 1].tolist() == [3, 4] and masked.nonzero()[:, 1].tolist() == [1, 6, 7, 9]


def test_a_run_does_not_cross_fields():
    canvas, field = torch.tensor([[3, 4, 0, 3, 4, 0]]), torch.tensor([[0, 1, 1, 2, 2, 2]])
    masked = canvas == 0
    assert end_fields(canvas, masked, field, ((3, 4),), 7).tolist() == [[False] * 5 + [True]]
    assert canvas.tolist() == [[3, 4, 0, 3, 4, 7]]


def test_end_fields_on_strided_tensors_and_none():
    wide = torch.tensor([[3, 7, 0, 7, 0, 7]])
    canvas, masked = wide[:, ::2], torch.tensor([[False, True, True]]).t().contiguous().t()
    end_fields(canvas, masked, torch.zeros(1, 3, dtype=torch.int64), (3,), 5)
    assert wide.tolist() == [[3, 7, 5, 7, 5, 7]] and not masked.any()
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert end_fields(empty, empty.bool(), empty, (3, (3, 4)), 5).shape == (2, 0)


def test_end_fields_reads_nothing_on_the_host():
    """No value may leave the device: a meta tensor has none to give."""
    ids = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    for ends in ((3, (3, 4)), torch.zeros(2, dtype=torch.int64, device="meta")):
        assert end_fields(ids, ids.bool(), ids, ends, 3).shape == (2, 8)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (lambda c, m, f: (c.int(), m, f), r"end_fields: canvas must be int64 \[B, L\], got int32 \[2, 4\]"),
        (lambda c, m, f: (c[0], m, f), "canvas must be int64"),
        (lambda c, m, f: (c, m.long(), f), r"masked must be bool \[B, L\] = \[2, 4\], got int64"),
        (lambda c, m, f: (c, m, f[:1]), r"field must be int64 \[B, L\] = \[2, 4\], got int64 \[1, 4\]"),
        (lambda c, m, f: (c, m, f.to("meta")), "field must be on cpu like canvas, got meta"),
    ],
)
def test_end_fields_checks_its_tensors(arguments, text):
    canvas = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=text):
        end_fields(*arguments(canvas, canvas.bool(), canvas), (3,), 3)


def test_field_map():
    s = scaffold(null=NULL, budget=2)
    field = s.field_map(offset=3)
    assert field.dtype is torch.int64 and len(field) == 3 + len(s.canvas) and s.field_map(len(field) + 4, 3)[-4:].tolist() == [-1] * 4
    for i, (a, b) in enumerate(s.spans.values()):
        assert field[3 + a : 3 + b].tolist() == [i] * (b - a)
    assert (field >= 0).sum() == s.canvas.count(None)
    with pytest.raises(SettingError, match="length .* must be an integer >="):
        s.field_map(5)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_decoding_loop_with_ends(seed, one_token):
    """Commits at random places, `end_fields` after each: it ends sooner, literals and decided slots stay, the values are those decided
    before each end."""
    generator = torch.Generator().manual_seed(seed)
    s = scaffold(null=NULL if one_token else "<zip>", budget=6)
    vocabulary = torch.tensor([*s.null_ids, EOS, *encode("abc12")])
    canvas = torch.tensor([[MASK if i is None else i for i in s.canvas]] * 2)
    masked = torch.tensor([[i is None for i in s.canvas]] * 2)
    given_, field = ~masked, s.field_map().expand(2, -1)
    literals = canvas[given_].clone()
    while masked.any():
        before, open_before = canvas.clone(), masked.clone()
        for row in range(2):
            holes = masked[row].nonzero().flatten()
            if len(holes):
                at = holes[torch.randperm(len(holes), generator=generator)[:3]]
                canvas[row, at] = vocabulary[torch.randint(len(vocabulary), (len(at),), generator=generator)]
                masked[row, at] = False
        end_fields(canvas, masked, field, s.end_ids, s.fill_id)
        assert torch.equal(canvas[~open_before], before[~open_before])
    assert torch.equal(canvas[given_], literals)
    for row in canvas.tolist():
        assert json.loads(s.json(row)) == s.read(row)


# With the decoder


def test_infill_keeps_the_literals():
    model = random_models.make(vocab_size=340, mask_id=MASK, eos_ids=(EOS,), pad_id=PAD)
    s = Scaffold.from_schema({"type": "object", "properties": {"a": STRING, "b": {"type": "integer"}}}, TOKENIZER, budget=5, null=NULL)
    prompt = encode(s.instructions())
    result = unmask.infill(model, prompt + s.canvas, block_size=8)
    assert result.canvas[: len(prompt)] == prompt and len(result.ids) == 10
    kept = result.canvas[len(prompt) :]
    assert all(given is None or have == given for given, have in zip(s.canvas, kept, strict=True))
    assert s.read(result) == s.read(kept) and json.loads(s.json(result)) == s.read(result)


def test_infill_of_a_text_template():
    model = unmask.load("tiny")
    canvas = parse_template("sort d a c => [[MASK*3]]", model.tokenizer)
    result = unmask.infill(model, canvas)
    assert [i for i, c in zip(result.canvas, canvas, strict=True) if c is not None] == [i for i in canvas if i is not None]
    assert model.tokenizer.decode(result.ids) == "a c d"
