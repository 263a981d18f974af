"""Fields of the data: sources of documents, the tokenizer, and batches."""

import math
from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config.fields import FIXED, Checked, changeable, newer, number, require
from moe_jax.config.template import fields_of
from moe_jax.errors import ConfigError

GAP_TOKENS = 4  # of rows with gaps: the gap, and the modes R, S and X


@dataclass(frozen=True)
class SourceConfig(Checked, resume=FIXED):
    """A source of documents. The config file chooses its name."""

    kind: Literal["tfds", "files"] = "tfds"  # a TFDS data set, or files on this machine
    name: str = ""  # with kind="tfds": "stdlib_text", or any TFDS name such as "c4/en:3.0.1"
    data_dir: str = ""  # with kind="tfds": folder of the prepared data set; "": tfds in data.cache_dir
    path: str = ""  # with kind="files": a path or glob of .txt, .jsonl, .parquet or .csv files, also with .gz
    # What is one document of a .txt file. "file": the complete file; a large one is cut into pieces of about 20,000
    # characters. "auto": with fewer than 20 text files, pieces of about 1 % of the source, cut at blank lines; else
    # like "file". "blank_lines": the text between blank lines. "separator": the text between separators. A number:
    # pieces of about that number of characters.
    documents: int | Literal["auto", "file", "blank_lines", "separator"] = newer("auto", was="file")
    separator: str = ""  # text between two documents, for documents="separator" only
    text_field: str = "text"  # field or column that has the text
    # For fine-tuning on answers (docs/finetuning.md): templates of a document's two parts, with names of fields in
    # braces, such as prompt="{question}\n" and completion="{answer}". The model learns the completion, and reads the
    # prompt. "": every document is a text.
    prompt: str = ""
    completion: str = ""  # the part that is learned, with the end-of-text token after it
    # Field that has a list of messages with `role` and `content`. The model learns the answers, which are the messages
    # of the assistant, but those with `weight` 0. "": none.
    messages_field: str = ""
    # With messages_field: path of a Jinja template of chats, or the name of one of the tokenizer's; "": the tokenizer's
    # own.
    chat_template: str = ""
    domain: str = ""  # label of every document; "": the value of domain_field, else the name of the source
    domain_field: str = ""  # field or column that has a document's label; "": none
    split: str = "train"  # with kind="tfds": split to train on
    validation_split: str = "validation"  # with kind="tfds": split that is held out
    # With kind="files": share of documents that is held out. A hash of the document decides which.
    validation_fraction: float = number(0.05, 0.0, 0.9)
    weight: float = number(1.0, 0.0)  # share of this source in the mixture, relative to the others
    # With mixture.controller="stages": the weights in the stages after the first; (): `weight` in all of them.
    stage_weights: tuple[float, ...] = ()
    # Share of the training rows that have gaps to fill, as in UL2R (docs/mixtures.md). Their four further tokens need
    # room in model.vocab_size.
    denoise: float = number(0.0, 0.0, 1.0)

    def check(self):
        rule, hint = "must be finite numbers ≥ 0", "nearest valid: ()"
        require(all(0 <= w < math.inf for w in self.stage_weights), "stage_weights", self.stage_weights, rule, hint)
        require(self.kind != "tfds" or self.name, "name", self.name, "is needed for kind='tfds'", "try 'stdlib_text'")
        require(self.kind != "files" or self.path, "path", self.path, "is needed for kind='files'", "a file or a glob")
        how, cuts = self.documents, self.documents == "separator"
        require(isinstance(how, str) or how >= 1, "documents", how, "must be ≥ 1 or a word", "nearest valid: 1")
        require(self.kind == "files" or how in ("auto", "file"), "documents", how, "is for .txt files only",
                "nearest valid: 'auto'")  # fmt: skip
        self._check_roles()
        rule = "is needed for documents='separator'" if cuts else "has no effect without documents='separator'"
        require(bool(self.separator) == cuts, "separator", self.separator, rule, "for example '<|endoftext|>'")

    def _check_roles(self) -> None:
        for name, other in (("prompt", "completion"), ("completion", "prompt")):
            template, example = getattr(self, name), f"for example '{{{name}}}'"
            require(bool(template) or not getattr(self, other), name, template, f"is needed beside {other}", example)
            try:
                fields = fields_of(template)
            except ValueError as error:
                raise ConfigError(name, template, str(error), example) from None
            hint = f"nearest valid: '{{{template}}}'" if template.isidentifier() else example
            require(bool(fields) or not template, name, template, "names no field in braces", hint)
        require(not (self.denoise and self.has_roles), "denoise", self.denoise,
                "is for text, not for prompts and answers", "nearest valid: 0.0")  # fmt: skip
        require(not (self.prompt and self.messages_field), "messages_field", self.messages_field,
                "is not for a source with prompt and completion", "nearest valid: ''")  # fmt: skip
        require(self.text_field == "text" or not self.has_roles, "text_field", self.text_field,
                "has no effect on a source of prompts and answers", "nearest valid: 'text'")  # fmt: skip
        require(not self.chat_template or bool(self.messages_field), "chat_template", self.chat_template,
                "has no effect without messages_field", "nearest valid: ''")  # fmt: skip

    def weight_in(self, stage: int) -> float:
        """The weight in a stage, counted from 0."""
        return (self.weight, *self.stage_weights)[stage] if stage and self.stage_weights else self.weight

    @property
    def is_trained(self) -> bool:
        """Whether some of this source is trained on."""
        return max(self.weight, *self.stage_weights, 0.0) > 0

    @property
    def holds_out(self) -> bool:
        """Whether some of this source is held out."""
        return bool(self.validation_split) if self.kind == "tfds" else self.validation_fraction > 0

    @property
    def has_roles(self) -> bool:
        """Whether only the answers in a document are learned."""
        return bool(self.prompt or self.messages_field)


@dataclass(frozen=True)
class TokenizerConfig(Checked, resume=FIXED):
    """The tokenizer. A run directory keeps its own copy."""

    # "bpe" is trained on the corpus. "huggingface" and "sentencepiece" are read from `path`.
    kind: Literal["bytes", "bpe", "huggingface", "sentencepiece"] = "bytes"
    vocab_size: int = number(4096, 257)  # with kind="bpe": tokens of the vocabulary
    train_bytes: int = number(10_000_000, 1)  # with kind="bpe": bytes of text that it is trained on, at most
    path: str = ""  # with kind="huggingface": a tokenizer.json; with kind="sentencepiece": a .model file
    # Token between documents, where `path` is read; "": the first of the usual names that the tokenizer has.
    end_of_text: str = ""
    # Token that every document begins with. "auto": what the tokenizer's files say; "none": no token but end_of_text
    # between documents; else the name of a token.
    begin_of_text: str = newer("auto", was="none")

    def check(self):
        need = self.kind in ("huggingface", "sentencepiece")
        require(bool(self.path) or not need, "path", self.path, f"is needed for kind={self.kind!r}", "a tokenizer file")
        rule = "must be 'auto', 'none' or a token" if need else f"must be 'auto' or 'none' for kind={self.kind!r}"
        ok = bool(self.begin_of_text) if need else self.begin_of_text in ("auto", "none")
        require(ok, "begin_of_text", self.begin_of_text, rule, "nearest valid: 'auto'")


def _default_sources():
    return {"stdlib": SourceConfig(kind="tfds", name="stdlib_text", domain_field="domain")}


@dataclass(frozen=True)
class DataConfig(Checked, resume=FIXED):
    """Batches and the text in them."""

    batch_size: int = number(16, 1)  # sequences of one optimizer step, over all devices and micro-batches
    seq_len: int = number(256, 2)  # tokens of a sequence (S)
    # A config file makes entries, with `source` of moe_jax.config:
    # `config.data.sources = {"mine": source(kind="files", path="…")}`.
    # The default is one entry, `stdlib`: text of Python's standard library, which is the TFDS data set "stdlib_text".
    sources: dict[str, SourceConfig] = field(default_factory=_default_sources)
    # Labels of tokens, 0, 1, …, by the domain of their document (docs/labels.md). Other domains have the label 0. A
    # config file sets them: `config.data.labels = {"code": 1}`; a name has no dot. {}: tokens have no labels.
    labels: dict[str, int] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    num_workers: int = changeable(number(0, 0, 256))  # reader processes; 0: threads of this process read
    cache_dir: str = changeable("")  # folder of prepared data; "": $MOE_JAX_CACHE, else ~/.cache/moe_jax

    def check(self):
        require(bool(self.sources), "sources", {}, "must name at least one source", "see config.SourceConfig")
        for name in (name for name, source in self.sources.items() if source.denoise and self.seq_len < 16):
            rule = f"must be ≥ 16 with data.sources.{name}.denoise"
            raise ConfigError("seq_len", self.seq_len, rule, "nearest valid: 16")
        require("" not in self.sources, "sources", "", "must have names that are not empty", "nearest valid: 'text'")
        used = {0, *self.labels.values()}
        rule = "must be 0, 1, … without a gap: each is a number of experts' groups, routers or weights"
        ok = used == set(range(len(used))) and (not self.labels or len(used) > 1)
        require(ok, "labels", self.labels, rule, "for example {'code': 1}")
        total = sum(s.is_trained for s in self.sources.values())
        require(total > 0, "sources", {k: s.weight for k, s in self.sources.items()}, "weights must not all be 0")

    @property
    def num_labels(self) -> int:
        """The number of labels that tokens have; 0: they have none."""
        return max(self.labels.values()) + 1 if self.labels else 0

    @property
    def with_gaps(self) -> tuple[str, ...]:
        """The names of the sources whose training rows have gaps."""
        return tuple(name for name, source in self.sources.items() if source.denoise and source.is_trained)

    @property
    def has_roles(self) -> bool:
        """Whether some text that is trained on is read and not learned, as prompts are."""
        return any((source.has_roles or source.denoise) and source.is_trained for source in self.sources.values())
