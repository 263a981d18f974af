"""Reads from XLA's text of a compiled program what it sends: its collectives, by kind, mesh axis, bytes and number.

The text is of one device. A collective in the body of a loop of n turns counts n times.
"""

import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("ragged-all-to-all", "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"f64": 8, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}  # else 4
NETWORK = "network"  # kind of a transfer out of a TPU slice, which XLA passes to the host

_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_SENDS = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_TO_HOST = re.compile(r"= (.*?) send\(.*is_host_transfer=true.*megascale")
_MESH = re.compile(
    r"replica_groups=(?:@?\w*)?mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_CALLS = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")


class Collective(NamedTuple):
    """A collective operation of a compiled program."""

    kind: str
    shapes: list[tuple[int, ...]]  # shapes of the results on one device
    size: int  # bytes of the results
    axes: tuple[str, ...]  # mesh axes over which it communicates
    peers: int  # number of devices that communicate
    times: int  # executions in a run of the program
    name: str  # JAX's name, from the source

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a run of the program, around a ring, and with full buffers if it is ragged."""
        p = self.peers
        share = {"all-reduce": 2 * (p - 1) / p, "reduce-scatter": p - 1, "collective-permute": 1, NETWORK: 1}
        return self.times * self.size * share.get(self.kind, (p - 1) / p)


def collectives(text: str, sizes: dict[str, int]) -> list[Collective]:
    """All collectives in a compiled module's text. sizes: those of the mesh's axes (in one slice of several)."""
    bodies, entry = _computations(text)
    times = _times(bodies, entry)
    out = []
    for computation, lines in bodies.items():
        for line in lines:
            if found := _collective(line, computation, sizes):
                out.append(found._replace(times=times[computation]))
    return out


def _collective(line: str, computation: str, sizes: dict[str, int]) -> Collective | None:
    name = re.search(r'op_name="([^"]*)"', line)
    name = name[1] if name else ""
    if host := _TO_HOST.search(line):
        kind, size = _SHAPE.findall(host[1])[0]
        return Collective(NETWORK, [_dims(size)], _bytes(kind, size), ("data",), 2, 1, name)
    if not (found := _SENDS.search(line)):
        return None
    result, kind, start = found.groups()
    shapes = _SHAPE.findall(result)
    if start and kind != "all-reduce":  # operands, results, and perhaps two numbers of the transfer
        shapes = [s for s in shapes if s != ("u32", "")]
        shapes = shapes[len(shapes) // 2 :]
    axes, peers = _axes(line, sizes)
    size = sum(_bytes(*s) for s in shapes)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # a fusion keeps this device's part
        kind, size = "reduce-scatter", size // peers
    return Collective(kind, [_dims(dims) for _, dims in shapes], size, axes, peers, 1, name)


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _bytes(kind: str, dims: str) -> int:
    return BYTES.get(kind, 4) * math.prod(_dims(dims))


def _axes(line: str, sizes: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes over which the first group of devices extends, and the size of the group."""
    count = math.prod(sizes.values())
    group = np.arange(count)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        dims, turn = _dims(iota[3]), _dims(iota[4] or "")
        ids = np.arange(math.prod(dims)).reshape(dims)
        group = (ids.transpose(turn) if turn else ids).reshape(int(iota[1]), int(iota[2]))[0]
    elif named := _MESH.search(line):
        group = _along(*named.groups())
    elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        group = np.array(_dims(listed[1]))
    elif pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        ends = [_dims(pair) for pair in re.findall(r"[\d,]*\d", pairs[1])]
        group = np.array(next(([a, b] for a, b in ends if a != b), [0]))
    where = np.unravel_index(group, tuple(sizes.values()))
    return tuple(a for a, at in zip(sizes, where, strict=True) if len(set(at.tolist())) > 1), len(group)


def _along(mesh: str, dims: str | None, turn: str | None, names: str) -> np.ndarray:
    """The first group of devices along axes of XLA's own mesh. `'a':(2)4`: a factor 4 of an axis, after a factor 2."""
    axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(axes.values()))
    if dims:
        ids = ids.reshape(_dims(dims)).transpose(_dims(turn) if turn else None)
    parts = {name: (before or "1", size) for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", names)}
    shape, pick = [], []
    for name, n in axes.items():
        before, size = (int(parts[name][0]), int(parts[name][1] or n)) if name in parts else (n, 1)
        shape += [before, size, n // before // size]
        pick += [0, slice(None), 0]
    return ids.reshape(shape)[tuple(pick)].reshape(-1)


# --- number of executions --------------------------------------------------------------------------------------------


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation of a module, and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            current = head[2]
            bodies[current] = []
            entry = current if head[1] else entry
        elif current:
            bodies[current].append(line)
    return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """The number of times that each computation runs. A conditional counts as if all its branches ran."""
    callers: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    for name, lines in bodies.items():
        for line in lines:
            for called in _CALLS.findall(line):
                turns = _turns(line, bodies) if " while(" in line else 1
                for callee in re.findall(r"[\w.\-]+", called):
                    if callee in callers:
                        callers[callee].append((name, turns))
    times = {entry: 1}

    def of(name: str) -> int:
        if name not in times:
            times[name] = 0  # HLO has no recursion
            times[name] = sum(of(caller) * turns for caller, turns in callers[name])
        return times[name]

    return {name: of(name) for name in bodies}


def _turns(line: str, bodies: dict[str, list[str]]) -> int:
    """Turns of a loop: the trip count that XLA gives, else the constant in its condition; 1 if there is neither."""
    if known := re.search(r'known_trip_count"?[:=]\{"n":"(\d+)"\}', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = bodies.get(condition[1], []) if condition else []
    return max([int(n) for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(lines))], default=1)
