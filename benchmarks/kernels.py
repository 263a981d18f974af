"""Kernels of a profile: which part of the model and which kind each is, and what ran beside collectives."""

import re
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*op_name=\"([^\"]*)\"", re.M)
# What sends between devices, by the operation, since an instruction may have another's name: of psum, or of a fusion.
COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%?([\w.\-]+) = [^\n]*? (?:all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all"
    r"|collective-permute|collective-broadcast|send|recv)(?:-start|-done)?\(",
    re.M,
)
KINDS = (  # of a kernel's name, the first that fits
    ("grouped matmul", "mosaic|_rows_block|_weights_block|ragged(?![-_]all)"),
    ("attention", "flash|fmha|cudnn|splash"),
    ("matmul", "gemm|cutlass|nvjet|xmma|cublas|dot|triton_gemm"),
    ("sort", "sort|radix|onesweep|histogram"),
    ("gather or scatter", r"(?<!all[-_])gather|(?<!reduce[-_])scatter"),
    ("reduction", r"(?<!all[-_])reduce(?![-_]scatter)"),
    ("copy or transposition", "copy|memcpy|transpose|memset"),
)


# The named scopes of the model, inner ones first.
SCOPES = ("router", "sort", "dispatch", "experts", "combine", "statistics", "norm", "attention", "embedding", "output",
          "optimizer", "mlp", "moe")  # fmt: skip


class Kernel(NamedTuple):
    name: str
    part: str
    phase: str
    kind: str


def place(op_name: str) -> tuple[str, str]:
    """(part, phase) of an instruction, from the names it was traced under."""
    names = re.split(r"[/()]", op_name)
    part = next((scope for scope in SCOPES if scope in names), "other")
    if part == "optimizer":
        return part, "update"
    if "rematted_computation" in names:
        return part, "recomputed"
    return part, "backward" if "transpose" in names else "forward"


def kind_of(name: str) -> str:
    """The kind of a kernel that is no collective, by its name, its instruction's and what was traced."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.I)), "elementwise")


def origins(program: str) -> dict[str, str]:
    """{instruction: op_name} of a compiled program's text."""
    return dict(INSTRUCTION.findall(program))


def collectives(program: str) -> frozenset[str]:
    """The instructions of a compiled program's text that send between devices."""
    return frozenset(COLLECTIVE.findall(program))


class Event(NamedTuple):
    """A kernel that ran, with the instruction that it belongs to."""

    name: str
    instruction: str
    start: float  # in milliseconds
    milliseconds: float


def beside(events: list[tuple[bool, float, float]]) -> tuple[float, float]:
    """The time in which collectives run, and the part of it in which other kernels run too.

    events: (whether it is a collective, start, duration).
    """
    changes = []  # time, and by how much the numbers of collectives and of other kernels change
    for collective, start, took in events:
        for at, by in ((start, 1), (start + took, -1)):
            changes.append((at, by * collective, by * (not collective)))
    running, others, last, alone, both = 0, 0, 0.0, 0.0, 0.0
    for at, more, more_others in sorted(changes):
        if running:
            both, alone = (both + at - last, alone) if others else (both, alone + at - last)
        running, others, last = running + more, others + more_others, at
    return alone + both, both


def table(times: dict[tuple[str, str], float], columns: list[str], total: float) -> str:
    rows = sorted({row for row, _ in times}, key=lambda r: -sum(times.get((r, c), 0.0) for c in columns))
    lines = [f"{'':<24}" + "".join(f"{c:>14}" for c in (*columns, "all", "share"))]
    for row in rows:
        cells = [times.get((row, c), 0.0) for c in columns]
        lines.append(
            f"{row:<24}" + "".join(f"{c:>14.2f}" for c in (*cells, sum(cells))) + f"{sum(cells) / total:>14.1%}"
        )
    return "\n".join(lines)
