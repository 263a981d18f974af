"""The program that renders chat templates, in a process of its own. It reads and writes lines of JSON.

A template is code of others. The sandbox of Jinja keeps it from Python's internals, and this process from the time and
memory of the caller: it may have `MEMORY` bytes, and `chat.py` ends it when a conversation takes too long. It imports
nothing but Python's library and Jinja, so that it starts at once.

The first line is {"template", "variables", "special", "longest"}: the text of the template, the special tokens that it
may name, the spelling of all special tokens, and the most characters of a conversation. The answer is {"tags"}, whether
the template marks answers with {% generation %}, and "dated", whether it asks for the date. Each further line is a list
of messages, and its answer {"text", "answers"}: characters [begin, end) that the assistant writes, without messages of
`weight` 0. An answer {"error"} says in one line what is wrong.

The environment is that of `apply_chat_template` in transformers 5.24.
"""

import contextlib
import datetime
import itertools
import json
import re
import sys
from typing import Any, ClassVar

MEMORY = 2**30  # bytes that the process may have
DATE = datetime.datetime(2024, 7, 26)  # what strftime_now says, so that a run that is resumed reads the same text
_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning; templates read the first


class Wrong(Exception):
    """A mistake in a template or a conversation, said in one line."""


def _limit() -> None:
    """Limits the memory of this process, and the size of a file that it may write to nothing."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _environment(spans: list[tuple[int, int, str]], blocks: list[str]):
    """The environment of templates. spans: gets (begin, end, text) of each {% generation %} when it is rendered.

    blocks: the text rendered so far, which the caller fills.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        tags: ClassVar = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller):
            text, begin = caller(), sum(map(len, blocks))
            spans.append((begin, begin + len(text), text))
            return text

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args, **kwargs):
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name, value):
            Namespace._check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace may not have the name {name!r}")

    class Dict:
        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": DATE.strftime}
    made.globals |= {"dict": Dict(), "namespace": Namespace}
    return made


class Renderer:
    """Renders conversations with one template."""

    def __init__(self, template: str, variables: dict[str, str], special: list[str], longest: int):
        self._spans: list[tuple[int, int, str]] = []
        self._blocks: list[str] = []
        self._variables, self._special, self._longest = variables, tuple(special), longest
        self._template = _environment(self._spans, self._blocks).from_string(template)
        self.tags, self.dated = bool(_TAG.search(template)), "strftime_now" in template

    def conversation(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The text of a conversation, and the characters of the answers that are learned. Raises Wrong."""
        messages = [_with_reasoning(message) for message in messages]
        text = self._render(messages)
        if not self.tags:
            return {"text": text, "answers": self._differences(messages, text)}
        for begin, end, inside in self._spans:
            if text[begin:end] != _unicode(inside):
                raise Wrong("has {% generation %} inside a macro or a block that is kept, so its place is unknown")
        learned, count = [_is_learned(m) for m in messages if m["role"] == "assistant"], len(self._spans)
        if not all(learned) and count != len(learned):
            why = "so that the place of answers of weight 0 is unknown"
            raise Wrong(f"renders {count} {{% generation %}} for {len(learned)} answers, {why}")
        places = [(begin, end) for begin, end, _ in self._spans]
        return {"text": text, "answers": places if all(learned) else list(itertools.compress(places, learned))}

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        self._spans.clear()
        self._blocks.clear()
        size = 0
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt}
        for block in self._template.generate(**variables, **self._variables):
            size += len(block)
            if size > self._longest:
                raise Wrong(f"makes more than {self._longest:,} characters of a conversation")
            self._blocks.append(_unicode(block))
        return "".join(self._blocks)

    def _differences(self, messages: list[dict[str, Any]], whole: str) -> list[tuple[int, int]]:
        """The places of the answers by rendering the conversation up to each answer, without and with it."""
        found = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not _is_learned(message):
                continue
            before, after = self._render(messages[:i], prompt=True), self._render(messages[: i + 1])
            begin, end = len(before), len(after)
            if not after.startswith(before):
                raise Wrong(f"writes other text before answer {i + 1} when it ends there{_ADVICE}")
            added = after[begin:]
            if added.strip() and not _begins_with(added, message) and before == self._render(messages[:i]):
                raise Wrong(f"adds no generation prompt, but other text before answer {i + 1}{_ADVICE}")
            if added.rstrip().endswith(self._special or ("\0",)):  # what follows the token that ends an answer
                end -= len(added) - len(added.rstrip())
            if whole[:end] != after[:end]:
                raise Wrong(f"writes message {i + 1} in another way when others follow{_ADVICE}")
            found.append((begin, end))
        return found


def _is_learned(message: dict[str, Any]) -> bool:
    return message.get("weight") != 0


def _begins_with(text: str, message: dict[str, Any]) -> bool:
    """Whether a text begins with what a message says, but for space. Templates without headers need no prompt."""
    said = message.get("content")
    return isinstance(said, str) and bool(said.strip()) and text.lstrip().startswith(_unicode(said.strip()))


def _unicode(text: str) -> str:
    """The text with ? for characters that UTF-8 has not. Its length stays."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


_ADVICE = ", so that the place of answers is unknown; put {% generation %} and {% endgeneration %} around them"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates read."""
    text = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if text is None else {"thinking": text, **message, "reasoning_content": text}


def _line(error: BaseException) -> str:
    """Says in one line what an error of a template is, with its line in the template where it is known."""
    if isinstance(error, Wrong):
        return str(error)
    if isinstance(error, MemoryError):
        return "needs too much memory"
    if isinstance(error, RecursionError):
        return "calls itself without end"
    text = " ".join(str(error).split())[:300]
    where = f" in line {error.lineno} of the template" if getattr(error, "lineno", None) else ""
    return f"cannot be rendered: {type(error).__name__}{where}{': ' + text if text else ''}"


def main() -> None:
    """Answers each line of the standard input with one line."""
    _limit()
    sys.stdout.reconfigure(encoding="utf-8")
    renderer = None
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            if renderer is None:
                renderer = Renderer(**asked)
                made = {"tags": renderer.tags, "dated": renderer.dated}
            else:
                made = renderer.conversation(asked)
            answer = json.dumps(made)
        except Exception as error:  # a template is code of others, and may raise anything
            answer = json.dumps({"error": _line(error)})
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
