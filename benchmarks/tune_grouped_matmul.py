"""Finds the fastest tilings of the Hopper kernels for shapes of MoE layers: moe_jax/kernels/hopper_tilings.json.

    python -m benchmarks.tune_grouped_matmul
    python -m benchmarks.tune_grouped_matmul --shapes=64x2048x1024x131072 --out=/tmp/tilings.json

A shape is experts × d_model × d_expert × rows. Each product of a layer is run with every possible tiling, in turns:
rows times weights into the experts and out of them (which are also each other's gradients), and the weight gradients.
Every result is compared with that of the first tiling. It prints one row for each product and tiling: TFLOP/s, best
first. The first tiling is the kernels' default. The table holds only tilings that beat it by MARGIN, since smaller
differences occur between cards and between turns.
"""

import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.grouped_matmul import CALLS, SHAPES, draw_sizes
from moe_jax import cli
from moe_jax.kernels import hopper

CHOSEN = flags.DEFINE_list("shapes", ["x".join(map(str, s)) for s in SHAPES], "experts x d_model x d_expert x rows")
ROUNDS = flags.DEFINE_integer("rounds", 3, "turns of every tiling", 1)
OUT = cli.define_path("out", str(hopper.TABLE), "table to write; its other entries stay")

MARGIN = 1.03


def products(d: int, f: int) -> list[tuple[str, int, int]]:
    """(kind, inner, columns) of a layer's products: x·w, dy·wᵀ, xᵀ·dy for d → f and for f → d."""
    return [(kind, *widths) for kind in ("rows", "rows transposed", "weights") for widths in ((d, f), (f, d))]


def make(kind: str, tiling: hopper.Tiling):
    if kind != "weights":
        how = dict(transpose=kind == "rows transposed", tiling=tiling)
        return jax.jit(lambda x, w, dy, g: hopper.rows_times_weights((x,), (w,), g, **how)[0])
    return jax.jit(lambda x, w, dy, g: hopper.weight_gradients(x, (dy,), g, tiling=tiling)[0])


def turn(fn, arrays) -> float:
    jax.block_until_ready(fn(*arrays))
    began = time.perf_counter()
    for _ in range(CALLS.value):
        out = fn(*arrays)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / CALLS.value


def distance(a, b) -> float:
    return float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32)))


def tune(kind, inner, columns, experts, rows, sizes) -> list[tuple[float, hopper.Tiling]]:
    """(TFLOP/s, tiling), best first."""
    keys = jax.random.split(jax.random.key(0), 3)
    normal = lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16)
    shape = (experts, columns, inner) if kind == "rows transposed" else (experts, inner, columns)
    groups = hopper.find_groups(sizes, rows)
    arrays = (normal(keys[0], (rows, inner)), normal(keys[1], shape), normal(keys[2], (rows, columns)), groups)
    runs, first = {}, None
    for tiling in hopper.candidates(kind, inner, columns):
        try:
            fn = make(kind, tiling)
            out = fn(*arrays)
            first = out if first is None else first
            print(f"    {tiling}: differs from the first by {distance(out, first):.1e}", flush=True)
            runs[tiling] = (fn, [])
        except Exception as error:  # the other tilings can be tried all the same
            print(f"    {tiling}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
    for _ in range(ROUNDS.value):
        for fn, times in runs.values():
            times.append(turn(fn, arrays))
    flops = 2 * rows * inner * columns
    return sorted(((flops / statistics.median(times) / 1e12, t) for t, (_, times) in runs.items()), reverse=True)


def write(out: Path, measured: str, tilings: dict[str, list]) -> None:
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(tiling)}" for key, tiling in sorted(tilings.items()))
    out.write_text(f'{{"measured": {json.dumps(measured)},\n "tilings": {{\n{rows}\n}}}}\n', encoding="utf-8")


def main(_):
    device = jax.devices()[0]
    out = Path(OUT.value)
    table = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"tilings": {}}
    rng = np.random.default_rng(0)
    for text in CHOSEN.value:
        experts, d, f, rows = (int(n) for n in text.split("x"))
        sizes = draw_sizes(rng, experts, rows)
        for kind, inner, columns in products(d, f):
            found = tune(kind, inner, columns, experts, rows, sizes)
            for rate, tiling in found:
                print(f"E={experts} rows={rows} {kind} {inner} → {columns}: {rate:.0f} TFLOP/s {tiling}", flush=True)
            if found:
                (best, tiling), key = found[0], f"{kind} {inner} {columns}"
                table["tilings"].pop(key, None)
                if best > MARGIN * dict(map(reversed, found))[hopper.candidates(kind, inner, columns)[0]]:
                    table["tilings"][key] = list(tiling)
        write(out, f"{device.device_kind}, jax {jax.__version__}", table["tilings"])
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
