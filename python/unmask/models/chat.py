"""Chat templates: Jinja2 text from a checkpoint, which nobody has to trust, rendered under limits.

The sandbox is Jinja's ImmutableSandboxedEnvironment cut down to what chat templates use (lists below), with the helpers
that Hugging Face templates expect (raise_exception, strftime_now, tojson, trim_blocks, loop controls). Jinja bounds
neither time nor memory, so the template's syntax tree is rewritten to count: every iteration and call is a step, and
everything that a template can create (texts, lists, printed output) is charged by its size, before it is created
wherever it could be far larger than its inputs. What cannot be counted cheaply (recursive loops, format strings,
varargs of macros) is refused. A deadline, checked at every step, bounds the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro, Namespace, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..errors import CheckpointError, SettingError
from .config import shown

OUTPUT_CHARS = 1 << 20
"""Longest rendered prompt."""
TEMPLATE_CHARS = 1 << 16
MAX_DEPTH = 100
"""Deepest nesting of a template's syntax; a loop, macro or block counts 8, as Jinja compiles those in quadratic time."""
MAX_STEPS = 200_000
"""Loop iterations, calls, filters and operators of one rendering."""
CREATED_CHARS = 16 << 20
"""Total size of all values made by one rendering: characters, plus _ELEMENT for each number or element."""
_ELEMENT = 64
SECONDS = 5.0
"""Processor time of the rendering thread."""

_SHALLOW_FILTERS = (
    "count", "d", "default", "dictsort", "first", "items", "last", "length", "list", "reject", "rejectattr",
    "reverse", "select", "selectattr", "sort", "unique",
)  # fmt: skip
"""Filters whose results hold only what was in their input: charged by length alone, as they are used inside loops."""
_DEEP_FILTERS = (
    "abs", "capitalize", "e", "escape", "float", "indent", "int", "join", "lower", "map", "max", "min", "replace",
    "safe", "string", "sum", "title", "tojson", "trim", "truncate", "upper", "wordcount",
)  # fmt: skip
_GROWING = {"replace": ("s", "old", "new"), "join": ("value", "d"), "indent": ("s", "width")}
"""Filters whose result can be far larger than all their inputs: name -> first arguments."""
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace "
        "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip "
        "split splitlines startswith strip swapcase title upper".split()
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}


class _LimitError(TemplateError):
    """A template went beyond a limit of this module."""


class _RaisedError(TemplateError):
    """A template called raise_exception: the conversation does not suit it."""


class _Budget:
    """What is left of one rendering's steps, size and time."""

    def __init__(self) -> None:
        self.steps, self.created, self.deadline = MAX_STEPS, CREATED_CHARS, time.thread_time() + SECONDS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise _LimitError(f"more than {MAX_STEPS:,} steps")
        if time.thread_time() > self.deadline:
            raise _LimitError(f"more than {SECONDS:g} seconds")

    def charge(self, size: float) -> None:
        self.created -= size
        if self.created < 0:
            raise _LimitError(f"the template makes more than {CREATED_CHARS:,} characters")

    def charge_deep(self, value: Any) -> Any:
        """Charge a value with all that is in it; shared parts count each time, as printing or comparing would."""
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                self.charge(len(item))
            elif isinstance(item, Mapping):
                self.charge(_ELEMENT * len(item))
                stack.extend(item)
                stack.extend(item.values())
            elif isinstance(item, (list, tuple)):
                self.charge(_ELEMENT * len(item))
                stack.extend(item)
            else:
                self.charge(_ELEMENT)
        return value


_budget: ContextVar[_Budget] = ContextVar("unmask_chat_budget")


def render_chat(
    messages: Sequence[Mapping[str, Any]], template: str, add_generation_prompt: bool = True, **variables: Any
) -> str:
    """The prompt text of a conversation.

    Args:
        messages: [{"role": "user", "content": "..."}, ...]; plain JSON values only.
        template: Jinja2 text.
        add_generation_prompt: end with the header of the assistant's turn, where the template knows it.
        variables: further values for the template, e.g. bos_token; plain JSON values only.
    Raises:
        SettingError: unusable messages, or the template rejected them (raise_exception).
        CheckpointError: the template is broken, unsafe, or goes beyond a limit of this module.
    """
    if not isinstance(template, str):
        raise SettingError(f"a chat template must be a text, got {shown(template)}")
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise SettingError(f"messages must be a list of {{'role', 'content'}} dicts, got {shown(messages)}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise SettingError(f"a message must be a dict with a 'role', got {shown(message)}")
    token = _budget.set(_Budget())
    try:
        values = _plain({**variables, "messages": list(messages)})
        values["add_generation_prompt"] = bool(add_generation_prompt)
        pieces, size = [], 0
        for piece in _compiled(template).generate(values):
            size += len(piece)
            if size > OUTPUT_CHARS:
                raise _LimitError(f"the prompt is longer than {OUTPUT_CHARS:,} characters")
            pieces.append(piece)
        return "".join(pieces)
    except _RaisedError as error:
        raise SettingError(f"the chat template rejects the messages: {error.message}") from None
    except (CheckpointError, SettingError):
        raise
    except (
        Exception,
        RecursionError,
    ) as error:  # a template can raise nearly any error, and all mean the same here
        reason = str(error) if isinstance(error, _LimitError) else f"{type(error).__name__}: {error}"
        raise CheckpointError("cannot render the chat template", shown(reason, 300)) from None
    finally:
        _budget.reset(token)


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    if len(template) > TEMPLATE_CHARS:
        raise _LimitError(
            f"a template of {len(template):,} characters; at most {TEMPLATE_CHARS:,} are accepted"
        )
    environment = _environment()
    parsed = environment.parse(template)
    _check_depth(parsed)
    tree = _Counted().visit(parsed)
    return Template.from_code(environment, environment.compile(tree), environment.globals)


def _check_depth(tree: nodes.Node) -> None:
    stack = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        depth += (
            8
            if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Block))
            else 1
        )
        if depth > MAX_DEPTH:
            raise _LimitError("the template is nested too deeply")
        stack.extend((child, depth) for child in node.iter_child_nodes())


class _Counted(NodeTransformer):
    """Rewrites a template: what is not a call, filter or operator passes through the counting filters below."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise _LimitError("recursive loops are not supported")
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node = self.generic_visit(node)
        node.iter = self._through("_iterations", node.iter, nodes.Const(text))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        return self._through("_concat", nodes.Tuple(self.generic_visit(node).nodes, "load"))

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        return self._through("_charged", self.generic_visit(node))

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        return self._through("_charged", self.generic_visit(node))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        node = self.generic_visit(node)
        return node if node.ctx == "store" else self._through("_charged", node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        return self._through("_stepped", self.generic_visit(node))

    def visit_Test(self, node: nodes.Test) -> nodes.Expr:
        return self._through("_stepped", self.generic_visit(node))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        node = self.generic_visit(node)
        return self._through("_sliced", node) if isinstance(node.arg, nodes.Slice) else node

    def _through(self, name: str, value: nodes.Expr, *arguments: nodes.Expr) -> nodes.Filter:
        node = nodes.Filter(value, name, list(arguments), [], None, None)
        return node.set_lineno(value.lineno or 1)


def _iterations(values: Iterable[Any], text: int) -> Iterator[Any]:
    """Loop values, one step each; `text` is the size of the loop body's literal text."""
    budget = _budget.get()
    for value in values:
        budget.step()
        budget.charge(text)
        yield value


class _Iterations:
    """`_iterations` with a length, which loop.length and loop.revindex ask for."""

    def __init__(self, values: Iterable[Any], text: int):
        self._values, self._text = values, text

    def __iter__(self) -> Iterator[Any]:
        return _iterations(self._values, self._text)

    def __len__(self) -> int:
        return len(self._values)  # a TypeError makes Jinja collect the values, through __iter__


def _charged(value: Any) -> Any:
    _budget.get().step()
    return _budget.get().charge_deep(value)


def _stepped(value: Any) -> Any:
    _budget.get().step()
    return value


def _sliced(value: Any) -> Any:
    budget = _budget.get()
    budget.step()
    budget.charge(
        len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, (list, tuple)) else 8
    )
    return value


def _concat(values: tuple[Any, ...]) -> str:
    budget = _budget.get()
    budget.step()
    return "".join(map(str, budget.charge_deep(values)))


def _finalize(value: Any) -> Any:
    """What `{{ value }}` prints: only plain values, charged by size."""
    if not isinstance(value, (str, int, float, list, tuple, dict, Undefined, type(None))):
        raise _LimitError(f"a template cannot print a {type(value).__name__}")
    return _budget.get().charge_deep(value)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps Jinja's marks for filters that take the environment or context first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        given = args[1:] if getattr(function, "jinja_pass_arg", None) else args
        if name in _GROWING:
            _charge_growth(name, given, kwargs)
        elif name not in _SHALLOW_FILTERS and name != "map":
            budget.charge_deep(given)  # many filters print their input first
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):  # lazy filters: collected, so that their size is known
            result = list(result)
        if name in _SHALLOW_FILTERS:
            budget.charge(_ELEMENT * len(result) if isinstance(result, (list, tuple)) else _ELEMENT)
        else:
            budget.charge_deep(result)
        return result

    return bounded


def _charge_growth(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Charge for the result of an operation that can be much longer than its inputs, before it runs.

    Arguments are those of Jinja's filter, by position or name: replace(s, old, new), join(value, d), indent(s, width).
    """
    budget = _budget.get()
    given = dict(zip(_GROWING[name], args, strict=False)) | kwargs
    budget.charge_deep(list(given.values()))
    if name == "replace":
        text, old, new = (str(given.get(part, "")) for part in ("s", "old", "new"))
        budget.charge(text.count(old) * len(new))
    elif name == "join":
        parts = given.get("value", ())
        if not hasattr(parts, "__len__"):
            raise _LimitError(f"join of a {type(parts).__name__}")
        budget.charge(len(parts) * len(str(given.get("d", ""))))
    else:
        width = given.get("width", 4)
        budget.charge(
            (str(given.get("s", "")).count("\n") + 1) * (width if isinstance(width, int) else len(str(width)))
        )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face templates expect it: plain JSON, without Jinja's HTML escapes."""
    if isinstance(value, Undefined):
        raise _LimitError("tojson of an undefined value")
    if indent is not None and (not isinstance(indent, int) or not 0 <= indent <= 16):
        raise _LimitError("tojson takes an indent of 0 to 16")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise _RaisedError(shown(message, 300) if not isinstance(message, str) else message[:300])


def _strftime_now(pattern: str) -> str:
    if not isinstance(pattern, str) or len(pattern) > 100:
        raise _LimitError("strftime_now takes a text of at most 100 characters")
    return datetime.now().strftime(pattern)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training; here it renders what is inside."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in _METHODS.items():
            if isinstance(obj, kind):
                return attr in allowed
        plain = isinstance(obj, (int, float, bytes, type)) or obj is None
        return not plain and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No str.format: its widths make texts of any size. (is_safe_attribute then refuses the method.)"""
        return None

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        budget = _budget.get()
        budget.step()
        if isinstance(__obj, Macro) and (__obj.catch_varargs or __obj.catch_kwargs):
            raise _LimitError("varargs and kwargs of macros are not supported")
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name in ("replace", "join"):
            _charge_growth(name, (owner, *args) if name == "replace" else (*args[:1], owner), kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, (str, dict)) or isinstance(owner, str):
            budget.charge_deep(result)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.step()
        if operator == "%" and isinstance(left, (str, bytes)):
            raise _LimitError("format strings are not supported")
        if operator == "*":
            for many, count in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)):
                    budget.charge(_ELEMENT * len(many) * max(0, count if isinstance(count, int) else 0))
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > 4096:
                raise _LimitError("a number is too large")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, (str, list, tuple)):
            budget.charge(len(result) if isinstance(result, str) else _ELEMENT * len(result))
        return result


@lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    # Not optimized: constant expressions would be computed while compiling, outside of the budget.
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=_finalize,
        extensions=[_Generation, loopcontrols],
    )
    builtin = {**environment.filters, "tojson": _tojson}
    environment.filters = {
        name: _bounded_filter(name, builtin[name]) for name in _SHALLOW_FILTERS + _DEEP_FILTERS
    }
    counting = (("_iterations", _Iterations), ("_charged", _charged), ("_concat", _concat))
    environment.filters |= dict(counting) | {"_stepped": _stepped, "_sliced": _sliced}
    builtin_range = environment.globals["range"]
    environment.globals = {
        "range": builtin_range,
        "dict": dict,
        "namespace": Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy made of str, int, float, bool, None, lists and dicts; SettingError for anything else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > 32:
        raise SettingError("messages and variables must be nested at most 32 deep")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise SettingError(f"messages and variables must be plain JSON values, got {shown(value)}")
