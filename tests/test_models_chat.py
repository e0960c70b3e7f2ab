"""Chat templates: what Hugging Face templates need, and what a hostile one must not get."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import CheckpointError, SettingError
from unmask.models import chat, llada, render_chat

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "go"},
]

RELEASED = (  # chat_template of LLaDA-8B-Instruct's tokenizer_config.json
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def test_released_template_and_our_default_render_the_same():
    for count in (1, 2, 4):
        theirs = render_chat(MESSAGES[:count], RELEASED, bos_token=llada.BOS_TOKEN)
        assert theirs == render_chat(MESSAGES[:count], llada.CHAT_TEMPLATE, bos_token=llada.BOS_TOKEN)
    assert theirs.startswith(
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    )
    assert theirs.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


TEMPLATES = {
    "{{ messages|length }}": "4",
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.length }}{% endfor %}": "1044213432244314",
    "{% for m in messages %}{{ '<' if loop.first else '' }}{{ m.role[0] }}{{ '>' if loop.last }}{% endfor %}": "<suau>",
    "{% for m in messages %}{% if m.role != 'user' %}{% continue %}{% endif %}{{ m.content }};{% endfor %}": " Hi ;go;",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}.{% endfor %}": "system.user.",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content|trim }}{% endfor %}": "1Hi2go",
    "{% for m in messages[::-1] %}{{ m.role[0] }}{% else %}none{% endfor %}": "uaus",
    "{% for x in [] %}{% else %}none{% endfor %}": "none",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}": "role=system;content=Be brief.;",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}": "4",
    "{% macro say(m, end='!') %}{{ m.role ~ end }}{% endmacro %}{{ say(messages[0]) }}{{ say(messages[1], end='?') }}": "system!user?",
    "{{ messages|map(attribute='role')|join(',') }}": "system,user,assistant,user",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}": "2",
    "{{ (messages|rejectattr('role', 'equalto', 'user')|first).content }}": "Be brief.",
    "{{ messages|map(attribute='content')|map('trim')|map('upper')|list|last }}": "GO",
    "{{ tools|tojson }}": '[{"name": "f", "doc": "<é>"}]',
    "{{ tools|tojson(indent=2) }}": json.dumps([{"name": "f", "doc": "<é>"}], indent=2, ensure_ascii=False),
    "{{ tools[0]|items|list }}": "[('name', 'f'), ('doc', '<é>')]",
    "{{ tools is defined and tools is iterable and tools is not string and nothing is undefined }}": "True",
    "{{ nothing is none }}{{ none is none }}{{ nothing|default('x') }}": "FalseTruex",
    "{{ 'a,b'.split(',')|last }}{{ 'xay'.replace('a', 'b') }}{{ ' q '.strip() }}{{ 'abc'.startswith('ab') }}": "bxbyqTrue",
    "{{ 'a' ~ 1 ~ none }}{{ 'a' * 3 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ [1] + [2] }}{{ 'abc'[1:] }}": "a1Noneaaa11024[1, 2]bc",
    "{{ 'A'|lower|upper|capitalize }}{{ 'a b'|title }}{{ '3'|int + 1 }}{{ 'x'|string }}{{ 'a\nb'|indent(2) }}": "AA B4xa\n  b",
    "{% if messages[0].role == 'system' %}\n  {% set s = messages[0].content %}\n{% endif %}\n{{ s }}": "Be brief.",
    "a{% generation %}b{% endgeneration %}c": "abc",
    "{%- if add_generation_prompt %}yes{% endif %}{{ bos_token }}": "yes<s>",
    "{{ strftime_now('%%') }}": "%",
    "{{ [3, 1, 2]|sort|join }}{{ {'b': 1, 'a': 2}|dictsort }}{{ [1, 1]|unique|list }}{{ 'abc'|reverse }}": "123[('a', 2), ('b', 1)][1]cba",
    "{% set x %}b{{ bos_token }}{% endset %}{{ x }}": "b<s>",
    "{{ messages[1:3]|length }}{{ messages[0].content[:2] }}{{ (1, 2)[::-1] }}": "2Be(2, 1)",
    "{{ 1 < 2 < 3 }}{{ 3 is odd }}{{ 'x' is in 'xyz' }}{{ 'user' in messages|map(attribute='role')|list }}": "TrueTrueTrueTrue",
    "{{ messages[0].get('nope', 'd') }}{{ messages[0].nope }}{{ 'role' in messages[0] }}": "dTrue",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_templates_use(template):
    tools = [{"name": "f", "doc": "<é>"}]
    assert render_chat(MESSAGES, template, tools=tools, bos_token="<s>") == TEMPLATES[template]


THINKING = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" ~ (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and not message.content.startswith('<tool>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.previtem is defined and loop.previtem.role == message.role %}{{- '+' }}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- for call in message.tool_calls or [] %}
        {{- '{"name": "' ~ call.name ~ '", "arguments": ' }}
        {%- if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}
        {{- '}' if loop.last else '},' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' if loop.index0 < ns.last else '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.mark.parametrize("template", [RELEASED, llada.CHAT_TEMPLATE, THINKING])
def test_same_as_plain_jinja(template):
    """Counting does not change what a template means."""
    from jinja2 import Environment

    calls = [{"name": "f", "arguments": {"x": [1, None]}}, {"name": "g", "arguments": "{}"}]
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": "<think>hm</think>\n\nso", "tool_calls": calls},
        {"role": "assistant", "content": "b"},
    ]
    values = {
        "messages": messages,
        "bos_token": "<s>",
        "tools": [{"name": "f", "doc": "<>"}],
        "add_generation_prompt": True,
    }
    plain = Environment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = json.dumps
    assert render_chat(**values, template=template) == plain.from_string(template).render(values)


def test_a_long_conversation_is_fast():
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 100} for i in range(1000)
    ]
    start = time.process_time()
    text = render_chat(messages, RELEASED, bos_token="<s>")
    assert len(text) > 500_000 and time.process_time() - start < 2


def test_raise_exception_is_the_caller_s_error():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}ok"
    with pytest.raises(SettingError, match="the chat template rejects the messages: no system prompt"):
        render_chat(MESSAGES, template)
    assert render_chat(MESSAGES[1:], template) == "ok"


@pytest.mark.parametrize(
    "messages",
    [
        "hi", {"role": "user"}, None, 3, ["hi"], [{"content": "x"}], [{"role": 3}], [None],
        [{"role": "user", "content": object()}], [{"role": "user", "content": b"x"}], [{"role": "user", 3: 4}],
    ],
)  # fmt: skip
def test_bad_messages(messages):
    with pytest.raises(SettingError, match="message"):
        render_chat(messages, "x")


def test_bad_template_and_variables():
    with pytest.raises(SettingError, match="a chat template must be a text"):
        render_chat(MESSAGES, None)
    with pytest.raises(SettingError, match="plain JSON values"):
        render_chat(MESSAGES, "x", run=print)
    nested: list = []
    for _ in range(100):
        nested = [nested]
    with pytest.raises(SettingError, match="nested at most 32 deep"):
        render_chat(MESSAGES, "x", deep=nested)
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(SettingError, match="nested at most 32 deep"):
        render_chat(MESSAGES, "x", deep=cycle)


# --- hostile ----------------------------------------------------------------------------------------------------

BIG = "('a' * 100000)"
GROW = "{% set n = namespace(s='a', t=1) %}{% for i in range(60) %}"
HOSTILE = [
    # time
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(d) %}{% if d %}{{ m(d - 1) }}{{ m(d - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
    "{{ 10 ** 5000 }}",
    "{{ (2 ** 4000) * (2 ** 4000) }}",
    "{% set n = namespace(x=3) %}{% for i in range(99999) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ range(99999)|map('string')|map('indent', 9999)|list|length }}",
    "{% for i in range(99999) %}{{ messages|tojson|length }}{% for j in range(99) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = messages|sort(attribute='role') %}{{ x|length }}{{ x|tojson|length }}{% endfor %}",
    "{% set s = 'ab' * 4000000 %}{% set t = s ~ '' %}" + "{{ s[::-1] == t }}" * 3000,
    "{% set s = 'ab' * 4000000 %}" + "{{ 'ba' * 50 ~ 'c' in s }}" * 2000 + "{{ 1 / 0 }}",
    "{{ 1.5|round(10**9, 'ceil') }}",
    "{{" + "(" * 60000 + "1" + ")" * 60000 + "}}",
    "{{" + "-" * 100000 + "1}}",
    "{{ " + "not " * 25000 + "1 }}",
    "{{ a" + ".a" * 50000 + " }}",
    "{{ 1" + "+1" * 50000 + " }}",
    "{{ " + "[" * 50000 + "]" * 50000 + " }}",
    "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "{% for i in [1] %}" * 200 + "{% endfor %}" * 200,
    "x" * 200000,
    "{{ a }}" * 20000,
    ("{% for i in [1] %}" * 11 + "{% endfor %}" * 11) * 75 + "{{ 1 / 0 }}",
    # memory
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [1] * 10**9 }}",
    "{{ (1,) * 10**9 }}",
    GROW + "{% set n.s = n.s ~ n.s %}{% endfor %}",
    GROW + "{% set n.s = n.s + n.s %}{% endfor %}",
    GROW + "{% set n.s = [n.s, n.s]|join %}{% endfor %}",
    GROW + "{% set n.s = n.s|replace('a', 'aa') %}{% endfor %}",
    GROW + "{% set n.s = n.s.replace('a', 'aa') %}{% endfor %}",
    GROW + "{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.t }}",
    GROW + "{% set n.t = (n.t, n.t) %}{% endfor %}{{ n.t == n.t }}",
    GROW + "{% set n.t = {'a': n.t, 'b': n.t} %}{% endfor %}{{ n.t|tojson }}",
    GROW + "{% set n.t = dict(a=n.t, b=n.t) %}{% endfor %}{{ n.t }}",
    GROW + "{% set n.t = ['', '']|map('default', n.t, true)|list %}{% endfor %}{{ n.t|string }}",
    GROW + "{% set n.t = [n.t] * 2 %}{% endfor %}{{ n.t|length }}",
    GROW + "{% set n.t = [n.t] + [n.t] %}{% endfor %}{{ n.t|length }}",
    "{% set s %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endset %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60 + "{{ s }}",
    "{% set s %}{% for i in range(99999) %}" + "x" * 100000 + "{% endfor %}{% endset %}",
    "{% macro m() %}" + "x" * 100000 + "{% endmacro %}{% set s %}{% for i in range(99999) %}{{ m() }}{% endfor %}{% endset %}",
    "{{ " + BIG + ".replace('a', " + BIG + ") }}",
    "{{ " + BIG + ".replace('', " + BIG + ") }}",
    "{{ " + BIG + "|replace('a', " + BIG + ") }}",
    "{{ " + BIG + "|replace(new=" + BIG + ", old='a') }}",
    "{{ " + BIG + ".join(" + BIG + ") }}",
    "{{ range(100000)|join(" + BIG + ") }}",
    "{{ range(10000)|map('string')|join(d=" + BIG + ") }}",
    "{{ ('a\n' * 100000)|indent(100000) }}",
    "{{ ('a\n' * 100000)|indent(" + BIG + ") }}",
    "{{ ('a\n' * 100000)|indent(width=100000) }}",
    "{{ messages|tojson(indent=10**6) }}",
    "{{ messages|tojson(indent=" + BIG + ") }}",
    "{{ 'a'.center(10**9) }}", "{{ 'a'.ljust(10**9) }}", "{{ 'a'.zfill(10**9) }}", "{{ 'a\t'.expandtabs(10**9) }}",
    "{{ 'a'|center(10**9) }}", "{{ 'a'|center(1000000000) }}", "{{ 'a'|wordwrap(1) }}", "{{ [1]|batch(10**9, 1) }}",
    "{{ 'a'.encode('utf-32') }}", "{{ 'a'.translate({97: 'b'}) }}", "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '%1000000000d'|format(1) }}",
    "{{ '{:1000000000}'.format(1) }}", "{{ '{0:{1}}'.format(1, 10**9) }}", "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "{{ lipsum(n=100000) }}", "{{ range(10**6)|list }}",
    "{% for i in range(99999) %}0123456789012345678901234567890{% endfor %}",
    # escape
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ['']|map(attribute='__class__')|list|first }}{{ (['']|map(attribute='__class__')|list)[0].__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ dict.__subclasses__() }}", "{{ dict.mro() }}", "{{ dict.fromkeys(range(99999)) }}",
    "{% macro m() %}{{ m._func.__globals__ }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ varargs }}{% endmacro %}{{ m(1) }}", "{% macro m() %}{{ kwargs }}{% endmacro %}{{ m(a=1) }}",
    "{% for m in messages %}{{ loop._iterable }}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ messages.append(1) }}", "{{ messages[0].update({'role': 'x'}) }}", "{{ messages[0].clear() }}", "{{ messages.sort() }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}",
    "{{ dict }}", "{{ range(5) }}", "{{ namespace(a=1) }}", "{{ self }}", "{{ raise_exception }}",
    # broken
    "{% if %}", "{{ 1 / 0 }}", "{{ nothing.x }}", "{% for %}", "{{ messages[0]['x'].y }}", "{{ 'a' + 1 }}", "{{ strftime_now('x' * 999) }}",
    "{{ strftime_now(3) }}", "{% generation %}", "{% unknown %}", "{{ 'a'|nofilter }}", "{{ 'a' is notest }}", "{{",
    "{{ nothing|tojson }}", "{{ messages() }}", "{{ none() }}",
]  # fmt: skip


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_end_soon_in_one_error(template):
    start = time.process_time()
    with pytest.raises(CheckpointError, match="cannot render the chat template"):
        render_chat(MESSAGES, template)
    assert time.process_time() - start < 2 * chat.SECONDS
    assert MESSAGES[0] == {"role": "system", "content": "Be brief."}


LARGE = [t for t in HOSTILE if "10**9" in t or BIG in t] + [t for t in HOSTILE if t.startswith(GROW)][::4]


@pytest.mark.parametrize("template", LARGE)
def test_hostile_templates_stay_small(template):
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            render_chat(MESSAGES, template)
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "template",
    ["{{ messages.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ range.__self__ }}", "{{ lipsum }}"],
)
def test_what_is_private_prints_nothing(template):
    assert render_chat(MESSAGES, template) == ""


def test_limits_are_those_of_one_rendering():
    template = "{% for i in range(3000) %}{{ i }}{% endfor %}"
    for _ in range(100):  # 300,000 steps in all
        render_chat(MESSAGES, template)


def test_threads_have_budgets_of_their_own():
    failures = []

    def work(number: int) -> None:
        for _ in range(20):
            text = render_chat(
                [{"role": "user", "content": str(number)}],
                "{% for i in range(2000) %}{{ messages[0].content }}{% endfor %}",
            )
            if text != str(number) * 2000:
                failures.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


pieces = st.sampled_from(
    [
        "{% for i in range(9) %}", "{% endfor %}", "{% if x %}", "{% endif %}", "{{ messages }}", "{{ i }}", "{% set x = 'a' * 99 %}",
        "{{ x ~ x }}", "{{ x|replace('a', x) }}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(x) }}", "{% set x = [x, x] %}", "{{ x|length }}",
        "{{ loop.index }}", "{% set x %}", "{% endset %}", "text\n", "{%- ", " -%}", "{{ messages|map(attribute='role')|list }}", "{# c #}",
        "{% set ns = namespace(a=x) %}", "{{ ns.a }}", "{{ x.__class__ }}", "{% generation %}", "{% endgeneration %}", "{{ 2 ** 99 }}",
    ]
)  # fmt: skip


@given(template=st.lists(pieces, max_size=12).map("".join) | st.text(max_size=40))
def test_any_template_renders_or_is_refused(template):
    start = time.process_time()
    try:
        assert len(render_chat(MESSAGES, template)) <= chat.OUTPUT_CHARS
    except (CheckpointError, SettingError):
        pass
    assert time.process_time() - start < 2 * chat.SECONDS
