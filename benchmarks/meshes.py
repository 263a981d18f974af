"""What `benchmarks.expert_parallel` times, models of some kinds on some meshes, and a figure of its rows."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from moe_jax.errors import UserError
from moe_jax.evaluate.analysis import INK, QUIET
from moe_jax.evaluate.drawing import GRID

OF_TRAINING = ("pairs", "late")  # kinds that order blocks, of which one layer has none
NEEDED = ("what", "name", "line", "kind", "devices", "tokens_per_second", "where")  # of a row, to draw it
COLOURS = ("#2f6fb0", "#c4572e", "#3c8d53", "#8a5fa8", "#b08a2f", "#4aa3a3", "#a84a6f", "#6f6f6f")


class Variant(NamedTuple):
    mesh: tuple[int, int, int]
    exchange: str = "ring"
    chunks: int = 1
    padded: bool = False
    kind: str = "plain"

    @property
    def devices(self) -> int:
        return math.prod(self.mesh)

    @property
    def name(self) -> str:
        _, fsdp, expert = self.mesh
        return self._titled(f"fsdp={fsdp}", f"expert={expert}") if self.devices > 1 else self._titled("1 device")

    @property
    def line(self) -> str:
        """Its name without the number of devices that grows from machine to machine."""
        _, fsdp, expert = self.mesh
        return self._titled("fsdp", "expert" if fsdp == 1 else f"expert={expert}")

    def _titled(self, sharded: str, by_expert: str = "") -> str:
        _, fsdp, expert = self.mesh
        axes = [sharded] * (fsdp > 1 or self.devices == 1) + [by_expert] * (expert > 1)
        how = f", {'padded ' * self.padded}{self.exchange}" + f", {self.chunks} chunks" * (self.chunks > 1)
        return f"{self.kind}, " * (self.kind != "plain") + " ".join(axes) + how * (expert > 1)


def variants(n: int, kinds: Sequence[str], chunks: Sequence[str], pads: Sequence[bool]) -> list[Variant]:
    """The variants for `n` devices: of each kind one device, `fsdp`, and the exchanges of `expert` and of both axes.

    chunks: values of model.moe.exchange_chunks. pads: whether the all-to-all is of full blocks, each value a variant.
    """
    found = [Variant((1, 1, 1))]
    if n > 1:
        found += [Variant((1, n, 1))]
        ways = [("ring", False), *(("all_to_all", padded) for padded in pads)]
        found += [Variant((1, 1, n), name, int(chunk), pad) for name, pad in ways for chunk in chunks]
        both = [(1, n // expert, expert) for expert in range(2, n) if n % expert == 0]
        found += [Variant(mesh, name) for mesh in both for name in ("ring", "all_to_all")]
    return [v._replace(kind=kind) for kind in kinds for v in found]


def change(c: Any, kind: str) -> None:
    """Makes the config's model one of a kind, in place."""
    m, width = c.model, c.model.moe.top_k * c.model.moe.d_expert
    if kind == "latent":
        m.moe.update(latent=m.d_model // 4, num_experts=4 * m.moe.num_experts, top_k=4 * m.moe.top_k)
    elif kind in OF_TRAINING:
        first, m.d_ff = ("moe", width) if kind == "pairs" else ("late", width // 2)
        m.layers, m.unroll = f"{m.num_layers // 2}*({first} dense)", max(1, min(m.unroll, m.num_layers // 2))


# --- rows and figure -------------------------------------------------------------------------------------------------


def read(path: str) -> list[dict[str, Any]]:
    """The rows of a file, one JSON object each. Raises UserError for a file without any, or with something else."""
    if not Path(path).is_file():
        raise UserError(f"--rows={path}: no such file")
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or (missing := [name for name in NEEDED if name not in row]):
            what = f"has no {missing[0]!r}" if isinstance(row, dict) else "is not an object of JSON"
            raise UserError(f"--rows={path}: line {number} {what}, which a row of this benchmark has")
        rows.append(row)
    if not rows:
        raise UserError(f"--rows={path}: has no row to draw")
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Tokens/s of all devices against their number, a line for each way to spread the model.

    A panel has the rows of one kind of model, of one kind of device with one version. Of rows of the same name and
    number the last one counts. Grey: as many times one device.
    """
    machine = lambda row: row["where"].partition(" × ")[2]
    panels: dict[tuple, list[dict[str, Any]]] = {(row["what"], row["kind"], machine(row)): [] for row in rows}
    for row in {(row["what"], row["name"], row["devices"], machine(row)): row for row in rows}.values():
        panels[row["what"], row["kind"], machine(row)].append(row)
    machines = dict.fromkeys(map(machine, rows))
    figure = Figure((4.6 * len(panels) + 0.4, 4.0), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((_, kind, where), mine) in zip(axes, panels.items(), strict=True):
        counts = sorted({row["devices"] for row in mine})
        total = lambda row: row["devices"] * row["tokens_per_second"]
        alone = [(1, total(row)) for row in mine if row["devices"] == 1]
        if alone:
            axis.plot(counts, [n * alone[0][1] for n in counts], color=QUIET, lw=1.2, ls="--", label="one × devices")
        lines = dict.fromkeys(row["line"] for row in mine if row["devices"] > 1)
        for line, colour in zip(lines, COLOURS * (1 + len(lines) // len(COLOURS)), strict=False):
            points = sorted(alone + [(row["devices"], total(row)) for row in mine if row["line"] == line])
            axis.plot(*zip(*points, strict=True), color=colour, marker="o", ms=4, lw=1.6, label=line)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("devices", fontsize=9)
        axis.set_title(kind + f", {where}" * (len(machines) > 1), fontsize=9, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color=GRID, lw=0.7)
        axis.legend(fontsize=7, frameon=False, loc="upper left")
    figure.axes[0].set_ylabel("tokens/s", fontsize=9)
    whats = dict.fromkeys(row["what"].partition(":")[0] for row in rows)
    figure.suptitle("; ".join(whats) + f", {next(iter(machines))}" * (len(machines) == 1), fontsize=10, color=INK)
    return figure
