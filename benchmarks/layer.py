"""Times one MoE layer (route → experts → combine), forward and backward, at the shapes of SonicMoE's figure.

    python -m benchmarks.layer                       # one Hopper GPU, an estimated 5 minutes
    JAX_PLATFORMS=cpu python -m benchmarks.layer --small

TFLOP/s are counted as in that figure (its repository's benchmarks/moe-cute.py): 6·T·K·D·F forward and 12·T·K·D·F
backward for gate, up and down projections, and nothing for the router. Backward is the time of both minus that of
forward. As in the figure, tokens are random, weights are in the compute dtype (--masters: in float32 and cast in the
layer, as in training), and scores are a softmax over the chosen K. Here scores are float32, and the statistics of the
balancing loss are computed too.

Loads: `own` are the choices of the router with its initial weights. A number adds selection biases that give one expert
that multiple of the mean load, and the others equal loads. They are timed in turns, with one row a shape and load.
"""

import statistics
from typing import NamedTuple

import jax
from absl import flags

from benchmarks.rows import milliseconds, moe_layer, seconds, steer, where
from moe_jax import cli, config
from moe_jax.parallel import sharding
from moe_jax.train import metrics
from moe_jax.train.state import choose_program

LOADS = flags.DEFINE_list("loads", ["own", "1", "1.5", "2", "4"], "own, or maximum load over mean")
SMALL = flags.DEFINE_bool("small", False, "a shape for a CPU")
MASTERS = flags.DEFINE_bool("masters", False, "float32 weights and gradients")
ROUNDS = flags.DEFINE_integer("rounds", 3, "times that every load has its turn", 1)
CALLS = flags.DEFINE_integer("calls", 20, "calls of a turn", 1)
ONLY = flags.DEFINE_list("only", [], "numbers of shapes, from 0; default: all")


class Shape(NamedTuple):
    tokens: int
    d_model: int
    d_expert: int
    experts: int
    top_k: int
    sonic: tuple[int, int] | None = None  # TFLOP/s forward, backward, read off the figure, ± 10


SONIC = "SonicMoE on one H100, arXiv:2512.14080v1, figure 14 (assets/tput.png of its repository, 8565e849), read ±10"
SHAPES = [
    Shape(24576, 1536, 256, 128, 8, (366, 405)),
    Shape(24576, 1536, 1024, 32, 2, (468, 468)),
    Shape(32768, 4096, 256, 256, 16, (430, 461)),
    Shape(32768, 4096, 1024, 64, 4, (553, 556)),
]
SMALL_SHAPES = [Shape(2048, 128, 128, 16, 2)]


def build(shape: Shape, dtype: str) -> config.RunConfig:
    c = config.default_config()
    c.model.update(d_model=shape.d_model, compute_dtype=dtype)
    c.model.moe.update(num_experts=shape.experts, top_k=shape.top_k, d_expert=shape.d_expert)
    c.model.moe.update(score_order="topk_score", selection_bias=True)
    c.data.update(batch_size=1, seq_len=shape.tokens)
    return config.build(c)


def run(shape: Shape, mesh) -> None:
    cfg = build(shape, "float32" if jax.default_backend() == "cpu" else "bfloat16")
    layer = moe_layer(cfg, mesh)
    graph, params, rest = layer.make()
    if not MASTERS.value:
        params = jax.tree.map(lambda w: w.astype(cfg.model.compute_dtype), params)
    x, dy = layer.draw(), 0.2 * layer.draw()

    @jax.jit
    def forward(params, x, rest):
        return layer.apply(params, x, graph, rest)

    @jax.jit
    def both(params, x, rest, dy):
        y, vjp, stats = jax.vjp(lambda params, x: layer.apply(params, x, graph, rest), params, x, has_aux=True)
        return y, vjp(dy), stats

    router_of = jax.jit(lambda params, x, rest: layer.apply(params, x, graph, rest)[1])  # drops the experts
    stats_of = lambda rest: router_of(params, x, rest)
    rests = {load: rest if load == "own" else steer(rest, stats_of, cfg.model.moe, float(load)) for load in LOADS.value}
    turns: dict[str, tuple[list, list]] = {load: ([], []) for load in rests}
    for _ in range(ROUNDS.value):
        for load, rest in rests.items():
            turns[load][0].append(seconds(forward, (params, x, rest), CALLS.value, carry=False)[0])
            turns[load][1].append(seconds(both, (params, x, rest, dy), CALLS.value, carry=False)[0])
    flops = 6 * shape.tokens * shape.top_k * shape.d_model * shape.d_expert
    for load, (one, two) in turns.items():
        forth, total = statistics.median(one), statistics.median(two)
        router = metrics.router_metrics([metrics.to_host(jax.tree.map(lambda a: a[0], stats_of(rests[load])))])
        rates = [flops / forth, 2 * flops / (total - forth), 3 * flops / total]
        peer = f", SonicMoE {shape.sonic[0]} / {shape.sonic[1]}" if shape.sonic else ""
        print(
            f"{' '.join(f'{n}={v}' for n, v in zip('TDFEK', shape[:5], strict=True))}, load {load:<3} "
            f"(max {router['max_load']:.2f}, dropped {router['dropped']:.1%}): forward {milliseconds(one)}, "
            f"with backward {milliseconds(two)}, {shape.tokens / total:.0f} tokens/s, TFLOP/s forward / backward "
            f"{rates[0] / 1e12:.4g} / {rates[1] / 1e12:.4g}{peer}, together {rates[2] / 1e12:.4g}",
            flush=True,
        )


def main(_):
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    shapes = SMALL_SHAPES if SMALL.value else SHAPES
    print(f"{where()}, of which one is used; weights {'float32' if MASTERS.value else 'in the compute dtype'}; "
          f"{choose_program(build(shapes[0], 'bfloat16'), mesh).why}; peer: {SONIC}", flush=True)  # fmt: skip
    with jax.set_mesh(mesh):
        for i, shape in enumerate(shapes):
            if not ONLY.value or str(i) in ONLY.value:
                run(shape, mesh)


if __name__ == "__main__":
    cli.run(main)
