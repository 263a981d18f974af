"""Find the fastest tilings of the Hopper kernels for shapes of MoE layers: moe_jax/kernels/hopper_tilings.json.

    python -m benchmarks.tune_grouped_matmul
    python -m benchmarks.tune_grouped_matmul --shapes=64x2048x1024x131072 --out=/tmp/tilings.json

A shape is experts × d_model × d_expert × rows. Each of a layer's products is run with every tiling that can do it, in
turns: rows times weights both ways (into the experts and out of them, which are also each other's gradients), and the
weight gradients. Every result is compared with the first tiling's. One row a product and tiling: TFLOP/s, best first.
"""

import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.grouped_matmul import SHAPES, draw_sizes
from moe_jax.kernels import hopper

CHOSEN = flags.DEFINE_list("shapes", ["x".join(map(str, s)) for s in SHAPES], "experts x d_model x d_expert x rows")
ROUNDS = flags.DEFINE_integer("rounds", 3, "turns of every tiling", 1)
CALLS = flags.DEFINE_integer("calls", 10, "calls in a turn", 1)
OUT = flags.DEFINE_string("out", str(hopper.TABLE), "table to write; its other entries stay")


def products(experts: int, d: int, f: int, rows: int) -> list[tuple[str, int, int, bool]]:
    """(kind, inner, columns, transposed) of a layer's products: x·w, dy·wᵀ, xᵀ·dy for d → f and for f → d."""
    both = [("rows", d, f, False), ("rows", d, f, True), ("rows", f, d, False), ("rows", f, d, True)]
    return [*both, ("weights", d, f, False), ("weights", f, d, False)]


def make(kind: str, transposed: bool, tiling: hopper.Tiling):
    if kind == "rows":
        return jax.jit(lambda x, w, dy, g: hopper.rows_times_weights(x, w, g, transpose=transposed, tiling=tiling))
    return jax.jit(lambda x, w, dy, g: hopper.weight_gradient(x, dy, g, tiling=tiling))


def turn(fn, arrays) -> float:
    jax.block_until_ready(fn(*arrays))
    began = time.perf_counter()
    for _ in range(CALLS.value):
        out = fn(*arrays)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / CALLS.value


def distance(a, b) -> float:
    return float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32)))


def tune(kind, inner, columns, transposed, experts, rows, sizes) -> list[tuple[float, hopper.Tiling]]:
    """(TFLOP/s, tiling), best first."""
    keys = jax.random.split(jax.random.key(0), 3)
    normal = lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16)
    shape = (experts, columns, inner) if transposed else (experts, inner, columns)
    groups = hopper.find_groups(sizes, rows)
    arrays = (normal(keys[0], (rows, inner)), normal(keys[1], shape), normal(keys[2], (rows, columns)), groups)
    runs, first = {}, None
    for tiling in hopper.candidates(kind, inner, columns):
        try:
            fn = make(kind, transposed, tiling)
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


def main(_):
    device = jax.devices()[0]
    out = Path(OUT.value)
    table = json.loads(out.read_text()) if out.is_file() else {"tilings": {}}
    rng = np.random.default_rng(0)
    best: dict[str, tuple[float, hopper.Tiling]] = {}
    for text in CHOSEN.value:
        experts, d, f, rows = (int(n) for n in text.split("x"))
        sizes = draw_sizes(rng, experts, rows)
        for kind, inner, columns, transposed in products(experts, d, f, rows):
            found = tune(kind, inner, columns, transposed, experts, rows, sizes)
            for rate, tiling in found:
                what = f"E={experts} rows={rows} {kind} {inner} → {columns}{' transposed' * transposed}"
                print(f"{what}: {rate:.0f} TFLOP/s {tiling}", flush=True)
            key = f"{kind} {inner} {columns}"
            if found and not transposed:  # one entry serves both
                best[key] = max(best.get(key, found[0]), found[0])
    table["tilings"] |= {key: list(tiling) for key, (_, tiling) in best.items()}
    table["measured"] = f"{device.device_kind}, jax {jax.__version__}"
    out.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    app.run(main)
