"""Chat templates are code of others: each renders or ends in one line, soon, and reaches nothing outside."""

import json
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.config import SourceConfig
from moe_jax.data import chat, roles, tokenizers
from moe_jax.errors import ConfigError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SOON = chat.START + chat.SECONDS


@pytest.fixture(autouse=True)
def fewer_characters(monkeypatch):
    monkeypatch.setattr(chat, "LONGEST", 100_000)


def render(tmp_path, template, messages=MESSAGES):
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8", errors="replace")
    cfg = SourceConfig(name="x", messages_field="messages", chat_template=str(tmp_path / "t.jinja"))
    made = chat.Chat("c", cfg, tokenizers.BytesTokenizer())
    try:
        return made.render(messages, "here:1")
    finally:
        made.close()


def check(tmp_path, template, messages=MESSAGES) -> str:
    """It renders, or says in one line why not, soon. Returns what it says."""
    began = time.monotonic()
    try:
        text, spans = render(tmp_path, template, messages)
        assert all(0 <= begin <= end <= len(text) for begin, end in spans)
        said = ""
    except ConfigError as error:
        said = str(error)
        assert "\n" not in said and said.strip()
    assert time.monotonic() - began < SOON
    return said


LOOPS = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "takes more than 1 seconds",
    "{% set l = range(99999) %}{% for a in l %}{% for b in l %}{% for c in l %}{% endfor %}{% endfor %}{% endfor %}":
        "takes more than 1 seconds",
    "{{ 10 ** (10 ** 10) }}": "takes more than 1 seconds",
    "{{ 'x' * 10 ** 11 }}": "too much memory|OverflowError|more than",
    "{{ 'x' * (10 ** 6 * messages|length) }}": "makes more than 100,000 characters",
    "{% for a in range(99999) %}some text {% endfor %}": "makes more than 100,000 characters",
    "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}": "memory",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "calls itself without end|RecursionError",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}": "calls itself without end|RecursionError",
    "{{ '%1000000000000d' % 1 }}": "memory|OverflowError|more than|ValueError",
    "{{ 'x'.center(10 ** 12) }}": "memory|OverflowError|more than",
    "{{ messages | tojson(indent=10 ** 12) }}": "memory|OverflowError|more than",
    "{{ range(10 ** 9) }}": "OverflowError",
    "(" * 500 + "{{ " + "(" * 5000 + " }}": "cannot be rendered|without end",
}  # fmt: skip
REACHES = [
    "{{ ''.__class__ }}", "{{ messages.__init__ }}", "{{ self.__init__.__globals__ }}", "{{ cycler.__init__ }}",
    "{{ raise_exception.__globals__ }}", "{{ namespace.__init__ }}", "{{ dict.__class__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "{{ namespace(__class__=1) }}",
    "{{ ''|attr('__class__') }}", "{{ '{0.__class__}'.format('') }}", "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}", "{{ messages.clear() }}", "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}", "{% extends 'x' %}", "{{ open('/etc/passwd') }}", "{{ strftime_now.__self__ }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}", "{{ lipsum.__globals__ }}",
]  # fmt: skip


@pytest.mark.parametrize("template", LOOPS, ids=range(len(LOOPS)))
def test_a_template_without_end_ends(tmp_path, template, monkeypatch):
    if LOOPS[template] in ("takes more than 1 seconds", "memory"):  # others have more, for a machine with other work
        monkeypatch.setattr(chat, "SECONDS", 1.0)
        monkeypatch.setattr(chat, "START", 1.0)
    assert re.search(LOOPS[template], said := check(tmp_path, template)), said


@pytest.mark.parametrize("template", REACHES)
def test_nothing_outside_is_reached(tmp_path, template):
    said = check(tmp_path, template)
    assert "cannot be rendered: " in said or "marks no answer" in said, said


def test_the_next_conversation_is_rendered_after_one_that_takes_too_long(tmp_path, monkeypatch):
    template = "{% if messages[0].content == 'loop' %}{% set x = 10 ** ((9 + messages|length) ** 10) %}{% endif %}" \
               "{% for m in messages %}{{ m.content }}{% generation %}!{% endgeneration %}{% endfor %}"  # fmt: skip
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    cfg = SourceConfig(name="x", messages_field="messages", chat_template=str(tmp_path / "t.jinja"))
    made = chat.Chat("c", cfg, tokenizers.BytesTokenizer())
    try:
        monkeypatch.setattr(chat, "SECONDS", 1.0)
        with pytest.raises(ConfigError, match="takes more than 1 seconds or too much memory for a conversation: here"):
            made.render([{"role": "user", "content": "loop"}], "here")
        monkeypatch.undo()
        assert made.render(MESSAGES, "here") == ("hi!yes!", [(2, 3), (6, 7)])
    finally:
        made.close()


PIECES = """
{% for m in messages %}~{% endfor %}~{% if add_generation_prompt %}~{% endif %}~{% else %}~{{ m.content }}
{% generation %}~{% endgeneration %}~{% set x = messages %}~{{ x }}~{{ '\\ud800' }}~{% break %}~{% continue %}~{#~#}~\0
{% macro f(a) %}~{% endmacro %}~{{ f(1) }}~{% call f() %}~{% endcall %}~{{ messages|tojson }}~{% raw %}~{% endraw %}
{%- set ns = namespace(a=0) -%}~{% set ns.a = ns.a + 1 %}~{{ 1 / 0 }}~{{ bos_token }}~{% filter upper %}
{% set y %}~{% endset %}~{{ loop.index }}~{{ y * 9 }}~{{~}}~{% for i in range(9) %}~{{ messages[-1].content[:2] }}~数
{% endfilter %}~{{ m['role'] }}"""
PIECES = st.sampled_from(PIECES.strip().replace("\n", "~").split("~")) | st.text(max_size=5)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=4), x, max_size=2),
                      max_leaves=4)  # fmt: skip


def fuzz(tmp_path, count):
    @settings(max_examples=count, deadline=None, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])  # fmt: skip
    @given(st.lists(PIECES, max_size=12), st.dictionaries(st.sampled_from(["content", "x", "thinking"]), VALUES))
    def case(pieces, extra):
        extra = json.loads(json.dumps(extra))
        check(tmp_path, "".join(pieces), [{**extra, "role": "user"}, {**extra, "role": "assistant"}])

    case()


def test_templates_of_any_pieces(tmp_path):
    fuzz(tmp_path, 25)


@pytest.mark.slow
def test_templates_of_any_pieces_hundreds(tmp_path):
    fuzz(tmp_path, 300)


ROLE = st.sampled_from(["user", "assistant", "system", "tool", ""]) | VALUES
CONTENT = st.text(max_size=5) | VALUES | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": VALUES}))
MESSAGE = (
    st.fixed_dictionaries({}, optional={"role": ROLE, "content": CONTENT, "tool_calls": VALUES, "weight": VALUES})
    | VALUES
)
ROW = st.fixed_dictionaries({}, optional={"messages": st.lists(MESSAGE, max_size=4) | VALUES, "q": VALUES, "a": VALUES})


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(ROW, st.sampled_from([{"messages_field": "messages"}, {"prompt": "{q}{q} ", "completion": "{a}"}]))
def test_rows_of_any_values(row, fields):
    """A row makes a document with an answer, or is refused in one line that has its place."""
    made = roles.Roles("s", SourceConfig(name="x", **fields))
    try:
        document = made.document(row, "d", "file:7")
    except ConfigError as error:
        assert "file:7" in str(error) and "\n" not in str(error)
        return
    document["text"].encode()
    assert 0 <= document["share"] < 1 and document["domain"] == "d"
    if "answers" in document:
        ((begin, end),) = document["answers"]
        assert document["text"][begin:end].strip() and end == len(document["text"])
    else:
        assert any(message["role"] == "assistant" for message in json.loads(json.dumps(document["messages"])))
