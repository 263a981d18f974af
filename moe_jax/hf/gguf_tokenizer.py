"""Reads and writes the tokenizer in a GGUF file: byte-level BPE that splits text in a way llama.cpp has a name for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax.data.begin_of_text import settings_of
from moe_jax.data.tokenizers import companion_files, of_run

# Types of tokens: words, special tokens, words that are never split, and ids without a word.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# What a BPE of tokenizer.json must have; a key may be missing.
PLAIN = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
         "byte_fallback": False, "ignore_merges": False}  # fmt: skip


def _splits() -> dict[str, list]:
    """The ways to split text before BPE, by their names in llama.cpp."""
    from tokenizers import pre_tokenizers

    return {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }


def tokenizer_files(value: Callable[[str], Any]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE with a supported pre-tokenizer; {} for any other."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

    splits = _splits()
    if value("tokenizer.ggml.model") != "gpt2" or value("tokenizer.ggml.pre") not in splits:
        return {}
    words, merges = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.merges")
    types = value("tokenizer.ggml.token_type") or [NORMAL] * len(words)
    used = {word: i for i, (word, kind) in enumerate(zip(words, types, strict=False)) if kind != UNUSED}
    bpe = models.BPE(used, [tuple(pair.split(" ")) for pair in merges])
    made = tokenizers.Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizers.Sequence(splits[value("tokenizer.ggml.pre")])
    made.decoder = decoders.ByteLevel()
    for word, kind in zip(words, types, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(word, normalized=False, special=kind == CONTROL)])
    begins = bool(value("tokenizer.ggml.add_bos_token"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": begins}
    for name in ("bos", "eos", "unknown"):
        if (i := value(f"tokenizer.ggml.{name}_token_id")) is not None:
            settings[f"{name[:3]}_token"] = words[i]
    if template := value("tokenizer.chat_template"):
        settings["chat_template"] = template
    if begins and "bos_token" in settings:  # transformers reads it from the post-processor
        word = settings["bos_token"]
        front = [(word, words.index(word))]
        made.post_processor = processors.TemplateProcessing(f"{word} $A", f"{word} $A {word}:1 $B:1", front)
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": text.encode()}


# --- export ----------------------------------------------------------------------------------------------------------


def tokenizer_keys(workdir: Path, vocab_size: int, echo: Callable[[str], Any]) -> dict[str, Any]:
    """The keys of a run's tokenizer in a GGUF file; {} with a line for a tokenizer that GGUF has no name for.

    vocab_size: rows of the embedding, each of which has a token in the file.
    """
    files = companion_files(workdir)
    tokenizer, _ = of_run(workdir)
    spec = json.loads(files["tokenizer.json"]) if tokenizer is not None and "tokenizer.json" in files else {}
    pre = _name_of_split(spec)
    if not pre:
        echo("the tokenizer is not written: GGUF takes a tokenizer.json of byte-level BPE that splits text as "
             f"{' or '.join(_splits())} does")  # fmt: skip
        return {}
    words = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for word, i in spec["model"]["vocab"].items():
        words[i], types[i] = word, NORMAL
    for added in spec.get("added_tokens", []):
        words[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    begin = tokenizer.begin_of_text
    keys = {"model": "gpt2", "pre": pre, "tokens": words, "token_type": types, "merges": merges,
            "eos_token_id": int(tokenizer.end_of_text), "add_bos_token": begin is not None}  # fmt: skip
    made = {f"tokenizer.ggml.{name}": value for name, value in keys.items() if value != []}
    if begin is not None:
        made["tokenizer.ggml.bos_token_id"] = int(begin)
    template = settings_of(files).get("chat_template")
    return made | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _name_of_split(spec: dict[str, Any]) -> str:
    """The name of the way in which a tokenizer.json splits text before byte-level BPE; "" if it has none."""
    from tokenizers import pre_tokenizers

    model, steps = spec.get("model") or {}, spec.get("pre_tokenizer") or {}
    plain = all((model.get(key) or None) == (value or None) for key, value in PLAIN.items())
    decoder = (spec.get("decoder") or {}).get("type")
    if model.get("type") != "BPE" or not plain or decoder != "ByteLevel" or spec.get("normalizer"):
        return ""
    listed = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    bare = lambda steps: [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for name, split in _splits().items():
        written = json.loads(pre_tokenizers.Sequence(split).__getstate__())
        if bare(listed) == bare(written["pretokenizers"]):
            return name
    return ""
