"""Answers of conversations: those of weight 0, templates without a generation prompt, answers that are empty."""

import json

import pytest

from moe_jax import data
from moe_jax.data import chat
from tests.conversations import CHAT, PLAIN, TAGGED, documents, prepare, refused, tokenizer_folder, turns

assert tokenizer_folder  # a fixture
HEADER = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{{ (m.content or '') + '<|im_end|>' + '\\n' }}{% endfor %}"
)
# As Mistral and Llama 2 have it: no header, so no generation prompt.
BARE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PARTS = "".join(
    [
        "{% for m in messages %}{% if m.role == 'assistant' %}",
        "{% generation %}{{ m.thinking }}{% endgeneration %}",
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}",
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    ]
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
TOOL = [{"role": "user", "content": "q"}, CALL, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]


def learned(corpus):
    tokenizer = corpus.tokenizer._tokenizer
    return [tokenizer.decode(ids[which].tolist(), skip_special_tokens=False)
            for ids, which in documents(corpus.stores["qa", "train"])]  # fmt: skip


def weighted(*weights):
    """A conversation with an answer for each weight; None: without that key."""
    made = turns(*(text for i in range(len(weights)) for text in (f"q{i}", f"a{i}")))
    for message, weight in zip(made[1::2], weights, strict=True):
        message |= {} if weight is None else {"weight": weight}
    return made


@pytest.mark.parametrize("template", [TAGGED, PLAIN], ids=["tags", "differences"])
def test_an_answer_of_weight_0_is_read_and_not_learned(tmp_path, tokenizer_folder, template):
    rows = [{"messages": weighted(*w)} for w in ((0, 1), (1, 0), (0.0, None), (None, 1), (0, 1, 0, 1))]
    corpus = prepare(tmp_path, rows, template=template, folder=tokenizer_folder, **CHAT)
    end = "<|im_end|>"
    assert learned(corpus) == [f"a1{end}", f"a0{end}", f"a1{end}", f"a0{end}a1{end}", f"a1{end}a3{end}"]
    plain = [{"messages": weighted(*[None] * (len(row["messages"]) // 2))} for row in rows]
    other = prepare(tmp_path / "b", plain, template=template, folder=tokenizer_folder, **CHAT)
    ids = lambda made: [ids.tolist() for ids, _ in documents(made.stores["qa", "train"])]
    assert ids(corpus) == ids(other)


@pytest.mark.parametrize(
    ("rows", "template", "says"),
    [
        (weighted(0, 0), PLAIN, "has no answer to learn, since all have the weight 0: .*a.jsonl:1"),
        (weighted(1, 2), PLAIN, "message 4 that has a 'weight' of 2, not 0 .read. or 1 .learned.: .*a.jsonl:1"),
        (weighted("0"), PLAIN, "has a 'weight' of '0', not 0"),
        (weighted([0]), PLAIN, r"has a 'weight' of \[0\], not 0"),
        ([m | {"thinking": "t"} for m in weighted(0, 1)], PARTS, "renders 4 {% generation %} for 2 answers, so"),
        (turns("Hello", "Hi"), HEADER, "adds no generation prompt, but other text before answer 2, so .* put {% gen"),
        ([*turns("q", "b"), {"role": "user", "content": "c"}, CALL], BARE, "adds no generation prompt|without text"),
        (TOOL, PLAIN, "an answer without text but for special tokens; the template may leave out its tool_calls"),
        (TOOL, TAGGED, "an answer without text but for special tokens; .*: .*a.jsonl:1, "),
        (TOOL, TAGGED.replace("<|im_end|>' }}\n        {%- endg", "' }}\n        {%- endg"), "an answer without text"),
        (turns("q", "<|im_end|>"), PLAIN, "an answer without text but for special tokens"),
    ],
    ids=range(11),
)  # fmt: skip
def test_answers_that_cannot_be_learned(tmp_path, tokenizer_folder, rows, template, says):
    refused(says, tmp_path, [{"messages": rows}], template=template, folder=tokenizer_folder, **CHAT)


def test_templates_without_headers_and_answers_in_parts(tmp_path, tokenizer_folder):
    """No generation prompt is needed without a header; parts that touch are one answer, of which one may be empty."""
    end = "<|im_end|>"
    rows = [{"messages": turns("a", "b", "c", " d")}, {"messages": turns("a", "bé")}]
    made = prepare(tmp_path, rows, template=BARE, folder=tokenizer_folder, **CHAT)
    assert learned(made) == [f" b{end}  d{end}", f" bé{end}"]
    rows = [{"messages": [m | {"thinking": text} for m in turns("a", "b")]} for text in ("", "t")]
    made = prepare(tmp_path / "b", rows, template=PARTS, folder=tokenizer_folder, **CHAT)
    assert learned(made) == [f"b{end}", f"tb{end}"]
    shown = HEADER.replace("(m.content or '')", "(m.content or m.tool_calls|tojson)") + (
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    made = prepare(tmp_path / "c", [{"messages": TOOL}], template=shown, folder=tokenizer_folder, **CHAT)
    assert learned(made) == [f'[{{"function": {{"name": "f", "arguments": "{{}}"}}}}]{end}a{end}']
    silent = [{"messages": [m | ({"weight": 0} if m is CALL else {}) for m in TOOL]}]
    assert learned(prepare(tmp_path / "d", silent, template=PLAIN, folder=tokenizer_folder, **CHAT)) == [f"a{end}"]


@pytest.mark.parametrize(("where", "name"), [("list", "tool_use"), ("list", ""), ("files", "tool_use")])
def test_a_run_finds_its_template_again(tmp_path, tokenizer_folder, where, name):
    """Whichever template it has, and though it keeps that as the default: with the configuration that it saved."""
    folder = tmp_path / "tokenizer"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text("utf-8"))
    both = {"default": PLAIN, "tool_use": TAGGED}
    if where == "list":
        settings["chat_template"] = [{"name": key, "template": text} for key, text in both.items()]
    else:
        (folder / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TAGGED, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    rows, fields = [{"messages": turns("a", "b")}], CHAT | ({"chat_template": name} if name else {})
    first = prepare(tmp_path, rows, folder=folder, **fields)
    first.keep_tokenizer(tmp_path / "run")
    kept = data.load_tokenizer(tmp_path / "run")
    assert chat.of_tokenizer(kept.files) == both | {"default": both[name or "default"]}
    for file in folder.rglob("*.jinja"):
        file.unlink()
    for _ in range(2):
        again = prepare(tmp_path, rows, folder=folder, **fields)
        assert again.stores["qa", "train"].folder == first.stores["qa", "train"].folder
        again.keep_tokenizer(tmp_path / "run")
