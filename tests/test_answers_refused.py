"""Documents with roles whose settings, rows or templates cannot be: each mistake is one line."""

import pytest

from moe_jax import config
from moe_jax.config import SourceConfig, TokenizerConfig
from moe_jax.data import chat
from moe_jax.errors import ConfigError
from tests.conversations import CHAT, PAIR, PLAIN, ROW, TAGGED, refused, tokenizer_folder, turns

assert tokenizer_folder  # a fixture


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "question", "completion": "{a}"}, r"prompt='question': names no field .* valid: '\{question\}'"),
        ({"prompt": "{q}"}, "completion='': is needed beside prompt"),
        ({"completion": "{q}"}, "prompt='': is needed beside completion"),
        ({"prompt": "{q.__class__}", "completion": "{a}"}, r"and nothing else, not \{q.__class__\}"),
        ({"prompt": "{q[0]}", "completion": "{a}"}, r"not \{q\[0\]\}"),
        ({"prompt": "{q!r}", "completion": "{a}"}, r"not \{q!r\}"),
        ({"prompt": "{q:>99999999}", "completion": "{a}"}, r"not \{q:>99999999\}"),
        ({"prompt": "{}", "completion": "{a}"}, r"not \{\}"),
        ({"prompt": "{q", "completion": "{a}"}, "is not a template .* a brace in the text is written twice"),
        ({**PAIR, **CHAT}, "is not for a source with prompt and completion"),
        ({**PAIR, "text_field": "body"}, "text_field='body': has no effect"),
        ({"chat_template": "x"}, "has no effect without messages_field"),
    ],
)
def test_fields_that_do_not_fit(fields, says):
    with pytest.raises(ConfigError, match=says):
        SourceConfig(name="x", **fields)


@pytest.mark.parametrize(
    ("rows", "fields", "name", "says"),
    [
        ([ROW, {"qestion": "q", "answer": "a"}], PAIR, "prompt",
         r"names 'question', which is missing or null: .*a.jsonl:2 has qestion, answer; nearest valid: 'qestion'"),
        ([ROW, {"question": "q", "answer": None}], PAIR, "completion", r"names 'answer', .*a.jsonl:2 has question"),
        ([ROW, {"question": "q", "answer": " \n"}], PAIR, "completion", r"is empty: .*a.jsonl:2"),
        ([{"question": ["q"], "answer": "a"}], PAIR, "prompt", "holds list, not text or a whole number: .*:1"),
        ([{"question": "q", "answer": 1.5}], PAIR, "completion", "holds float, not text or a whole number"),
        ([{"chat": []}], CHAT, "messages_field", "names 'messages', .* has chat; nearest valid: 'chat'"),
        ([{"messages": []}], CHAT, "messages_field", "has no message: .*a.jsonl:1"),
        ([{"messages": "hello"}], CHAT, "messages_field", "is str, not a list of messages"),
        ([{"messages": "[oops"}], CHAT, "messages_field", "is text, not a list of messages"),
        ([{"messages": {"a": 1}}], CHAT, "messages_field", "is an object, not a list of messages"),
        ([{"messages": ["hi"]}], CHAT, "messages_field", "message 1 that is str, not an object"),
        ([{"messages": [{"from": "gpt", "value": "x"}]}], CHAT, "messages_field", "has no 'role', but 'from, value'"),
        ([{"messages": turns("only the user")}], CHAT, "messages_field", "no message of the role 'assistant', only"),
        ([{"messages": turns("a", " ")}], CHAT, "messages_field", "message 2 that is an answer without text"),
        ([{"messages": [{"role": "assistant", "content": 3}]}], CHAT, "messages_field", "'content' of int, not text"),
        ([{"messages": turns("a", "b")}], CHAT | {"template": "{{ messages[0].content"}, "chat_template",
         "the chat template cannot be rendered: TemplateSyntaxError in line 1 of the template"),
        ([{"messages": turns("a", "b")}], CHAT | {"template": "{{ ''.__class__.__mro__ }}"}, "chat_template",
         "SecurityError: access to attribute '__class__' of 'str' object is unsafe.: .*a.jsonl:1"),
        ([{"messages": turns("a", "b")}], CHAT | {"template": "{{ raise_exception('no tools\nhere') }}"},
         "chat_template", "TemplateError: no tools here: .*a.jsonl:1"),
        ([{"messages": turns("a", "b")}], CHAT | {"template": "{{ messages[0].contents.text }}"}, "chat_template",
         "UndefinedError"),
        ([{"messages": turns("a", "b")}], CHAT | {"template": "{% generation %}{% endgeneration %}x"}, "chat_template",
         "marks no answer"),
        ([{"messages": turns("a", "b")}],
         CHAT | {"template": "{% set x %}{% generation %}b{% endgeneration %}{% endset %}long {{ x }}"},
         "chat_template", "inside a macro or a block that is kept"),
        ([{"messages": turns("a", "b", "c", "d")}], CHAT | {"template": PLAIN.replace(
            "message['content']", "(message['content'] if loop.last or loop.index % 2 else '')")}, "chat_template",
         "writes message 2 in another way when others follow"),
        ([{"messages": turns("a", "b")}], CHAT | {"chat_template": "nowhere.jinja"}, "chat_template",
         "is neither a file nor a template of the tokenizer"),
        ([{"messages": turns("a", "b")}], CHAT, "messages_field", "needs a chat template, and the tokenizer has none"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_row_or_a_template_is_one_line(tmp_path, tokenizer_folder, rows, fields, name, says):
    if fields == CHAT:
        fields = {**fields, "template": TAGGED} if "chat template" not in says else fields
    refused(says, tmp_path, rows, name=name, folder=tokenizer_folder, **fields)


def test_a_field_of_a_header_and_a_file_without_fields(tmp_path):
    (tmp_path / "a.csv").write_text("question,anwser\nq,a\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    refused("names 'answer', which is not a field of a.csv: question, anwser; nearest valid: 'anwser'", tmp_path, None,
            file="a.csv", name="completion", **PAIR)  # fmt: skip
    refused("is set, but a.txt has no fields", tmp_path, None, file="a.txt", name="prompt", **PAIR)


def test_begin_of_text_twice(tmp_path, tokenizer_folder):
    cfg = TokenizerConfig(kind="huggingface", path=str(tokenizer_folder / "tokenizer.json"), begin_of_text="<s>")
    refused("writes the begin-of-text token '<s>' twice", tmp_path, [{"messages": turns("a", "b")}], tokenizer=cfg,
            template="{{ bos_token }}" + TAGGED, **CHAT)  # fmt: skip


def test_without_jinja(tmp_path, tokenizer_folder, monkeypatch):
    def missing(_):
        raise chat.importlib.metadata.PackageNotFoundError

    for version, says in ((missing, "which is not installed"), (lambda _: "3.1.5", "not 3.1.5")):
        monkeypatch.setattr(chat.importlib.metadata, "version", version)
        refused(f"needs jinja2 3.1.6 or newer, {says}; pip install", tmp_path, [{"messages": turns("a", "b")}],
                template=TAGGED, folder=tokenizer_folder, **CHAT)  # fmt: skip


def test_documents_that_see_one_another():
    c = config.default_config()
    c.data.sources = {"qa": config.source(kind="files", path="a.jsonl", **PAIR)}
    c.model.segment_mask = False
    with pytest.raises(ConfigError, match=r"model\.segment_mask=False: must be True with data\.sources\.qa"):
        config.build(c)
