"""Pairs and conversations as tests have them: templates, a tokenizer, and the corpus of one source."""

import json

import pytest
import tokenizers as hf_tokenizers

from moe_jax import data
from moe_jax.config import DataConfig, SourceConfig, TokenizerConfig
from moe_jax.errors import ConfigError

ROW = {"question": "q", "answer": "a"}
PAIR = {"prompt": "Q: {question}\nA:", "completion": " {answer}"}
CHAT = {"messages_field": "messages"}
# As SmolLM2-Instruct has it, and the same with tags.
PLAIN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TAGGED = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")


def turns(*contents, system=""):
    """A conversation whose contents are the user's and the assistant's in turn."""
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


CONVERSATIONS = [
    turns("Hello", "Hello! What can I do?"),
    turns("Add 2 and 3", "5", "And 4?", "9", system="You can count."),
    turns("naïve café?", "数学, 🙂 and more"),
    turns("def f(x):\n    return x", "def f(x):\n    return x + 1\n"),
    turns("  spaces  ", "  kept here  "),
    turns("a", "b", "c", "d", "e", "f"),
    turns("same", "same"),
    turns("is it <b>?", "<b>yes & no</b> {{ braces }} {% not a tag %}"),
    turns("last is the user's", "an answer", "no answer to this"),
    turns("line\n\nline\n", "\n\nbegins with lines", system="  "),
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A byte-level tokenizer.json with special tokens, and its config."""
    made = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    made.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = hf_tokenizers.decoders.ByteLevel()
    made.post_processor = hf_tokenizers.processors.ByteLevel(trim_offsets=True)
    alphabet = sorted(hf_tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = hf_tokenizers.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["Hello! an answer is kept here and there\n\n" * 9], trainer)
    made.add_special_tokens(list(SPECIAL))
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def prepare(tmp_path, rows, seq_len=256, tokenizer=None, template="", file="a.jsonl", folder=None, **fields):
    """The corpus of one source `qa`. template: the text of a chat template."""
    tmp_path.mkdir(exist_ok=True)
    if isinstance(rows, list):
        (tmp_path / file).write_text(lines(rows), encoding="utf-8")
    if template:
        (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
        fields["chat_template"] = str(tmp_path / "t.jinja")
    source = SourceConfig(kind="files", path=str(tmp_path / file), **{"validation_fraction": 0.0} | fields)
    path = "" if folder is None else str(folder / "tokenizer.json")
    cfg = tokenizer or TokenizerConfig(kind="huggingface" if path else "bytes", path=path)
    made = DataConfig(batch_size=2, seq_len=seq_len, cache_dir=str(tmp_path / "cache"), sources={"qa": source},
                      tokenizer=cfg)  # fmt: skip
    return data.prepare(made, workdir=tmp_path / "run", seed=1, progress=False)


def documents(store):
    """(ids, learned) of each document of a store."""
    for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
        yield store.tokens[begin:end].astype(int), store.learned[begin:end].astype(bool)


def refused(match, *args, name="", **fields):
    with pytest.raises(ConfigError, match=match) as error:
        prepare(*args, **fields)
    assert "\n" not in str(error.value) and error.value.name == f"data.sources.qa.{name}" if name else True
