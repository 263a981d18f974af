"""The order of a decoder's blocks in one line: `"12*(dense moe)"`, `"10*(dense moe:32) 2*(dense moe:64)"`.

The line is a list of blocks and of units, each with an optional count: `[n*]block` or `[n*](block block …)`. A block is
one of `KINDS`, with an optional number of experts: `moe:64`. A unit's blocks follow each other, n times. Windows of
attention are not in the line but in `attention_layers` (positions.py); `with_attention` joins the two.
"""

import difflib
import functools
import math
import re
from typing import NamedTuple, NoReturn

from moe_jax.config.positions import FULL, Attends
from moe_jax.errors import ConfigError

# "dense": attention, then a feed-forward layer. "moe": attention, then experts. "late" (shortcut-connected,
# arXiv:2509.01322): a dense block whose experts read what its feed-forward layer reads, but their result is added after
# the last block of the unit, so that their exchange between devices may run beside the blocks in between. "table": like
# "moe", but a random table that is never trained names the experts of each token id (arXiv:2106.04426). "memory": a
# dense block whose feed-forward layer has a product-key memory beside it (arXiv:1907.05242).
KINDS = ("dense", "moe", "late", "table", "memory")


MTP_BLOCK = "mtp/block"  # path, in the parameters, of the blocks of layers of multi-token prediction


class Kind(NamedTuple):
    """A kind of block."""

    name: str
    experts: int = 0  # routed experts; 0 in a dense or memory block
    attends: Attends = FULL


class Stack(NamedTuple):
    """Equal units of a few blocks, over which `jax.lax.scan` runs."""

    name: str  # in the parameters
    repeat: int
    unit: tuple[Kind, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The path of each block of the unit in the parameters, whose leading axis has `repeat` entries."""
        several = len(self.unit) > 1
        return tuple(f"{self.name}/block_{i}" for i in range(len(self.unit))) if several else (self.name,)


class Place(NamedTuple):
    """The place of a block of the decoder in the parameters."""

    path: str
    index: int  # into the leading axis
    kind: Kind


Units = list[tuple[int, tuple[Kind, ...]]]  # counts and units


@functools.lru_cache(maxsize=64)
def parse(text: str, num_experts: int) -> tuple[Stack, ...]:
    """The stacks of a line. num_experts: that of a block which names no number.

    Raises ConfigError, which points at the place in the text.
    """
    units = _Reader(text, num_experts).units
    simple = simplest(units)
    if simple != units:
        rule = "has a shorter spelling: counts for what repeats, units only for what repeats as a whole"
        hint = f"nearest valid: {spell(simple, num_experts)!r}"
        if is_plain(simple, num_experts):
            dense = sum(count for count, (kind,) in simple if not kind.experts)
            hint = f"nearest valid: num_dense_layers={dense} without it"
        raise ConfigError("layers", text, rule, hint)
    return stacks_of(units)


def with_attention(units: Units, attends: tuple[Attends, ...]) -> Units:
    """The same blocks, each with its attention: a list that is repeated from the first block to the last.

    A unit grows until the list fits into it a whole number of times, so that one loop runs over equal units; blocks
    that are left over follow by themselves, as does all of a stack that has no two such units.
    """
    made, first = [], 0
    for count, unit in units:
        kinds = tuple(kind._replace(attends=attends[(first + i) % len(attends)]) for i, kind in enumerate(unit * count))
        first += len(kinds)
        size = math.lcm(len(unit), len(attends))
        times = len(kinds) // size if len(kinds) >= 2 * size else 0
        parts = [(times, kinds[:size]), (1, kinds[times * size :])]
        made += simplest([(times, part) for times, part in parts if times and part])
    return made


def is_plain(units: Units, num_experts: int) -> bool:
    """Whether the fields num_layers and num_dense_layers can say this order."""
    dense, moe = (Kind("dense"),), (Kind("moe", num_experts),)
    return [unit for _, unit in units] in ([dense], [moe], [dense, moe])


def stacks_of(units: Units) -> tuple[Stack, ...]:
    """The stacks of these units, with their names: `dense_layers` for dense blocks alone, else `layers`; a second is
    `layers_2`."""
    found, used = [], {}
    for repeat, unit in units:
        name = "dense_layers" if all(kind.name == "dense" for kind in unit) else "layers"
        used[name] = used.get(name, 0) + 1
        found.append(Stack(name if used[name] == 1 else f"{name}_{used[name]}", repeat, unit))
    return tuple(found)


def places_of(stacks: tuple[Stack, ...]) -> tuple[Place, ...]:
    """The place of each block of the decoder, from the first to the last."""
    return tuple(
        Place(path, index, kind)
        for stack in stacks
        for index in range(stack.repeat)
        for path, kind in zip(stack.paths, stack.unit, strict=True)
    )


def spell(units: Units, num_experts: int) -> str:
    """The line of these units. It leaves out a number of experts that is `num_experts`."""
    word = lambda kind: kind.name + (f":{kind.experts}" if kind.experts not in (0, num_experts) else "")
    times = lambda count, text: f"{count}*{text}" if count > 1 else text

    def blocks(unit):
        runs = simplest([(1, (kind,)) for kind in unit])
        return " ".join(times(count, word(kind)) for count, (kind,) in runs)

    return " ".join(times(n, f"({blocks(unit)})" if len(unit) > 1 else blocks(unit)) for n, unit in units)


def units_of(kinds: tuple[Kind, ...]) -> Units:
    """Units for blocks of these kinds: one unit that is repeated, if there is one, else runs of equal blocks."""
    return simplest([(1, kinds)])


def simplest(units: Units) -> Units:
    """The same blocks, where no unit repeats a smaller one, each is repeated or has a late block, and no two neighbours
    are equal."""
    found: Units = []
    for count, unit in units:
        size = next(n for n in range(1, len(unit) + 1) if len(unit) % n == 0 and unit == unit[:n] * (len(unit) // n))
        count, unit = count * (len(unit) // size), unit[:size]
        again = bool(found) and found[-1][1] == unit
        once = count == 1 and not again and not any(kind.name == "late" for kind in unit)
        for times, part in [(1, (kind,)) for kind in unit] if once else [(count, unit)]:
            before = found.pop()[0] if found and found[-1][1] == part else 0
            found.append((before + times, part))
    return found


TOKENS = re.compile(
    r"(?P<count>\d+)\s*\*|(?P<bare>\d+)\s*[x×]?(?=\s*[(A-Za-z])|(?P<open>\()|(?P<close>\))|(?P<block>[A-Za-z]\w*)(?P<experts>:\w*)?(?P<window>@\w*)?|(?P<other>\S)"
)


LARGEST = 9999  # count


def _number(text: str) -> int:
    """The number of these digits; 0 if they are not a number, or one of more than nine digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


class _Reader:
    """Reads a line into `units`."""

    def __init__(self, text: str, num_experts: int, *, hints: bool = True):
        """hints: whether an error tries to mend the text."""
        self.text, self.num_experts, self.hints = text, num_experts, hints
        self.units: Units = []
        inside: list[Kind] | None = None
        count, outer, opened = None, 1, None
        token = None
        for token in TOKENS.finditer(text):
            if token["count"]:
                if count is not None:
                    self.fail(token, "a second count: a count is followed by a block or a unit")
                if not 0 < (count := _number(token["count"])) <= LARGEST:
                    self.fail(token, f"a count must be in [1, {LARGEST}]", "1*")
            elif token["bare"]:
                self.fail(token, "a count is followed by '*'", f"{token['bare']}*")
            elif token["open"]:
                if inside is not None:
                    self.fail(token, "a unit inside a unit: name its blocks one by one")
                inside, outer, count, opened = [], count or 1, None, token
            elif token["close"]:
                if inside is None:
                    self.fail(token, "closes a unit that was not opened", "")
                if not inside or count is not None:
                    self.fail(token, "a unit needs a block here: (dense moe)")
                if inside[-1].name == "late":
                    self.fail(token, "a unit that ends with 'late': its experts would have nothing to run beside; "
                              "end it with 'dense' or 'moe'")  # fmt: skip
                self.units.append((outer, tuple(inside)))
                inside = None
            elif token["block"]:
                kind = self.block(token)
                if inside is not None:
                    inside += [kind] * (count or 1)
                elif kind.name == "late":
                    self.fail(token, "'late' outside a unit: (late dense) says after which block its experts are added")
                else:
                    self.units.append((count or 1, (kind,)))
                count = None
            else:
                self.fail(token, "is not a block, a count or a unit", " ")
        if inside is not None:
            self.fail(opened, "opens a unit that is not closed")
        if count is not None:
            self.fail(token, "a count without a block or a unit")
        if not self.units:
            raise ConfigError("layers", text, "names no block", "nearest valid: ''")

    def block(self, token: re.Match) -> Kind:
        """The kind of block that a token names."""
        name, experts = token["block"], token["experts"]
        if name not in KINDS:
            close = (difflib.get_close_matches(name, KINDS, 1, 0.0) or ["moe"])[0]
            self.fail(token, f"must be one of {', '.join(KINDS)}", token[0].replace(name, close, 1))
        if token["window"]:
            plain = token[0].removesuffix(token["window"])
            self.fail(token, "'@' is not used: model.attention_layers says which layers have windows", plain)
        if name in ("dense", "memory"):
            if experts:
                self.fail(token, f"a {name} block has no experts", name)
            return Kind(name)
        number = _number(experts[1:]) if experts else self.num_experts
        if not number:
            self.fail(token, "':' is followed by a number of experts ≥ 1", f"{name}:{self.num_experts}")
        return Kind(name, number)

    def fail(self, token: re.Match, rule: str, instead: str | None = None) -> NoReturn:
        """Raises ConfigError at a token. instead: what would be valid in its place."""
        hint = "see docs/layers.md"
        if instead is not None and self.hints:
            mended = " ".join((self.text[: token.start()] + instead + self.text[token.end() :]).split())
            try:
                _Reader(mended, self.num_experts, hints=False)
                hint = f"nearest valid: {mended!r}"
            except ConfigError:  # another mistake is in the rest
                pass
        raise ConfigError("layers", self.text, f"at character {token.start() + 1}, {token[0]!r}: {rule}", hint)
