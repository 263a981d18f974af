"""Chat templates: which one a source uses, and conversations made text by the program of `chat_process.py`.

A template is taken from `chat_template` of the source, else from the tokenizer's files, in the order of transformers:
`chat_template.jinja` with `additional_chat_templates/NAME.jinja`, then `chat_template` of `tokenizer_config.json`.
Of several the one with the name "default" is taken.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from moe_jax.config import SourceConfig
from moe_jax.data import chat_process
from moe_jax.data.begin_of_text import settings_of, token
from moe_jax.data.tokenizers import MORE_TEMPLATES, Tokenizer, read_file
from moe_jax.errors import ConfigError, FileError, nearest

DEFAULT = "chat_template.jinja"
SECONDS = 10.0  # for one conversation
START = 30.0  # seconds for the process to start and compile the template, beside other work
LONGEST = 4_000_000  # characters of one conversation
_LARGEST = 1_000_000  # bytes of a template
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_KEPT = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT")  # environment of the program
_JINJA = (3, 1, 6)  # older versions have known ways out of the sandbox


class Chat:
    """Turns the conversations of a source into text. It runs a process, which the first conversation starts.

    template: its text. fingerprint: changes whenever the text of a conversation could change.
    """

    def __init__(self, name: str, cfg: SourceConfig, tokenizer: Tokenizer):
        self._name, self._cfg = name, cfg
        if tokenizer.words[1] and not tokenizer.special:
            rule = "needs a tokenizer.json: a SentencePiece model reads the special tokens of a template as letters"
            raise self._error("messages_field", rule, "data.tokenizer.kind='huggingface'")
        self._where, self.template = self._find(tokenizer)
        _check_jinja(name, cfg)
        settings = settings_of(tokenizer.files)
        own = dict(zip(_NAMES, tokenizer.words, strict=False))  # words: begin_of_text, end_of_text
        variables = {key: word for key in _NAMES if (word := token(settings, key) or own.get(key, ""))}
        self._setup = {"template": self.template, "variables": variables, "special": list(tokenizer.special)}
        parts = json.dumps([1, self._setup, str(chat_process.DATE)], sort_keys=True)
        self.fingerprint = hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()
        self._process: subprocess.Popen | None = None
        self._lock, self._closed = threading.Lock(), False
        self.lines: tuple[str, ...] = ()

    # --- which template ---

    def _error(self, field: str, rule: str, hint: str = "") -> ConfigError:
        return ConfigError(f"data.sources.{self._name}.{field}", getattr(self._cfg, field), rule, hint)

    def _find(self, tokenizer: Tokenizer) -> tuple[str, str]:
        """The name of the template for messages, and its text."""
        asked, known = self._cfg.chat_template, of_tokenizer(tokenizer.files)
        if asked in known:
            return f"the tokenizer's chat template {asked!r}", known[asked]
        if asked:
            path = Path(os.path.expanduser(asked))
            if not path.is_file():
                names = [*known, *(p.as_posix() for p in path.parent.glob("*.jinja"))]
                raise self._error(
                    "chat_template", "is neither a file nor a template of the tokenizer", nearest(asked, names)
                )
            return "the chat template", _decoded(str(path), read_file(path, _LARGEST))
        if "default" in known:
            return "the tokenizer's chat template", known["default"]
        if known:
            rule = f"must name one of the tokenizer's templates: {', '.join(sorted(known))}"
            raise self._error("chat_template", rule, nearest("default", known))
        raise self._error("messages_field", "needs a chat template, and the tokenizer has none",
                          "set chat_template to the path of a .jinja file")  # fmt: skip

    # --- text ---

    def render(self, messages: list[dict[str, Any]], place: str) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the characters of the answers that are learned, of which some may be empty.

        Raises ConfigError for a broken template.
        """
        with self._lock:
            answer = self._ask(messages, place)
        spans = [(int(begin), int(end)) for begin, end in answer["answers"]]
        if not any(end > begin for begin, end in spans):
            raise self._broken("marks no answer", place)
        return answer["text"], spans

    def _broken(self, why: str, place: str = "") -> ConfigError:
        field = "chat_template" if self._cfg.chat_template else "messages_field"
        return self._error(field, f"{self._where} {why}{': ' + place if place else ''}")

    def _ask(self, messages: list[dict[str, Any]], place: str) -> dict[str, Any]:
        if self._closed:
            raise RuntimeError("the chat template was closed")
        if self._process is None:
            self._start()
        answer = self._say(messages, SECONDS)
        if answer is None:
            self._stop()
            raise self._broken(f"takes more than {SECONDS:g} seconds or too much memory for a conversation", place)
        if "error" in answer:
            raise self._broken(answer["error"], place)
        return answer

    def _start(self) -> None:
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
        command, pipe = [sys.executable, "-BP", chat_process.__file__], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._process.stdout, selectors.EVENT_READ)
        answer = self._say(self._setup | {"longest": LONGEST}, START)
        if answer is None or "error" in answer:
            self._stop()
            raise self._broken(answer["error"] if answer else f"takes more than {START:g} seconds to compile")
        if answer["dated"]:
            rule = f"asks for the date, which is {chat_process.DATE:%d %B %Y} for every document"
            self.lines = (f"data.sources.{self._name}: {self._where} {rule}",)

    def _say(self, asked: Any, seconds: float) -> dict[str, Any] | None:
        """The program's answer to a line; None if it takes too long, or has ended."""
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
            # The program writes nothing but whole lines.
            return json.loads(self._process.stdout.readline() or b"null") if self._ready.select(seconds) else None
        except (OSError, ValueError):  # it has ended, perhaps within a line
            return None

    def _stop(self) -> None:
        """Ends the process. The next conversation starts a new one."""
        process, self._process = self._process, None
        if process is not None:
            self._ready.close()
            process.kill()
            with contextlib.suppress(OSError):  # a line that the program has not read
                process.communicate()

    def close(self) -> None:
        """Ends the process for good."""
        with self._lock:
            self._closed = True
            self._stop()


def of_tokenizer(files: dict[str, bytes]) -> dict[str, str]:
    """The templates in a tokenizer's files by name, where "default" is the plain one. Raises FileError.

    Beside files with templates, `tokenizer_config.json` gives the names that no file has, but no "default". So a run to
    which `keep` has added a file knows the names that it knew before.
    """
    found = {}
    for name, raw in files.items():
        if name == DEFAULT:
            found["default"] = _decoded(name, raw)
        elif name.startswith(f"{MORE_TEMPLATES}/"):
            found[Path(name).stem] = _decoded(name, raw)
    value = settings_of(files).get("chat_template")
    if isinstance(value, str) or value is None:
        return found or ({} if value is None else {"default": value})
    try:
        listed = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        listed = {"": None}
    if not all(isinstance(text, str) for pair in listed.items() for text in pair):
        if found:  # transformers does not read the setting either
            return found
        raise FileError("tokenizer_config.json: chat_template is neither text nor a list of name and template")
    return {name: text for name, text in listed.items() if not (found and name == "default")} | found


def keep(tokenizer: Tokenizer, template: str) -> None:
    """Adds the only template of a run to the files of its tokenizer, so that an export has the one of training."""
    if "tokenizer.json" in tokenizer.files and of_tokenizer(tokenizer.files).get("default") != template:
        tokenizer.files = tokenizer.files | {DEFAULT: template.encode()}


def _decoded(name: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise FileError(f"{name}: is not UTF-8") from None


def _check_jinja(name: str, cfg: SourceConfig) -> None:
    """Raises ConfigError if Jinja is not installed, or too old."""
    try:
        found = importlib.metadata.version("jinja2")
    except importlib.metadata.PackageNotFoundError:
        found = ""
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:3])
    if numbers < _JINJA:
        rule = f"needs jinja2 3.1.6 or newer, {f'not {found}' if found else 'which is not installed'}"
        field = f"data.sources.{name}.messages_field"
        raise ConfigError(field, cfg.messages_field, rule, "pip install 'jinja2>=3.1.6'")
