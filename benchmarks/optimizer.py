"""Times the optimizer alone, at a config's shape: AdamW, moe_jax's Muon, `optax.contrib.muon`, and plain matmuls.

    python -m benchmarks.optimizer --config=configs/olmoe_8l_bench.py
    python -m benchmarks.optimizer --config=configs/olmoe_8l_bench.py --devices=1     # of a machine with several
    python -m benchmarks.optimizer --config=configs/olmoe_8l_bench.py --config.optim.newton_schulz_dtype=bfloat16

Every variant updates the same parameters from the same random gradients, on a mesh of `fsdp` = devices (optax's Muon on
one with Auto axes, since it fails on Explicit ones). Parameters and states are donated, and the variants are timed in
turns. Each has one row: median time and its spread; memory by the compiler (state and temporaries); and norm and cosine
to the gradient of the first update of Muon's matrices, which should be the same on other devices. Then it prints the
TFLOP/s of the Newton–Schulz iteration, from the time of five further steps and the formula 4m²n + 2m³ a step (m ≤ n),
beside those of the same products as plain batched bf16 einsums (Gram Newton–Schulz does fewer FLOPs than the formula
counts); and the optimizer's share of a training step. That step is measured at the config's batch on each device. For
other numbers of tokens the time of forward and backward is assumed to be proportional to them.
"""

import dataclasses
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax.sharding import PartitionSpec as P

from benchmarks.rows import random_rows, seconds
from moe_jax import cli, config, model, optim
from moe_jax.optim import newton_schulz
from moe_jax.parallel import sharding
from moe_jax.train import step
from moe_jax.train.state import abstract_state, init_state, process_rows, put_batch
from moe_jax.tree import path_of

CONFIG = cli.define_config()
ROUNDS = flags.DEFINE_integer("rounds", 3, "times that every variant has its turn", 1)
STEPS = flags.DEFINE_integer("steps", 10, "updates of a turn", 1)
DEVICES = flags.DEFINE_integer("devices", 0, "use this many devices; 0: all", 0)
ONLY = flags.DEFINE_string("only", "", "variants whose name contains this")
TRAIN = flags.DEFINE_bool("train", True, "measure whole training steps too")

TOKENS = (2**14, 2**16, 2**18, 2**19, 2**20)
MORE_STEPS = 5  # of Newton–Schulz, whose time is the difference of two variants
OURS, ADAMW = "moe_jax Muon", "AdamW"


class Variant(NamedTuple):
    optimizer: optax.GradientTransformation
    explicit: bool = True  # on a mesh of Explicit axes
    dtype: Any = jnp.float32  # of the gradients


# --- what is timed ---------------------------------------------------------------------------------------------------


def optax_muon(cfg: config.RunConfig, mine: Any, dtype: Any = None) -> optax.GradientTransformation:
    """`optax.contrib.muon` with the config's settings; every expert is a matrix of its own. mine: as of `muons`."""
    steps, cfg = cfg.train.steps, cfg.optim
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    transform = optax.contrib.muon(
        optim.schedule(cfg, steps),
        ns_steps=cfg.newton_schulz_steps,
        beta=cfg.momentum,
        nesterov=cfg.nesterov,
        weight_decay=cfg.weight_decay,
        mu_dtype=dtype,
        adam_b1=cfg.beta1,
        adam_b2=cfg.beta2,
        adam_weight_decay=cfg.weight_decay,
        muon_weight_dimension_numbers=jax.tree.map(lambda is_mine: numbers if is_mine else None, mine),
        consistent_rms=cfg.update_rms,
    )
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), transform) if cfg.clip_norm else transform


def muons(cfg: config.OptimConfig, labels: Any) -> Any:
    """Which parameters Muon updates, True or False in the tree of `labels`."""
    who = optim.owners(dataclasses.replace(cfg, name="muon"))
    return jax.tree.map(lambda label: who[label] == "muon", labels)


def variants(cfg: config.RunConfig, mine: Any) -> dict[str, Variant]:
    def made(**fields) -> Variant:
        return Variant(
            optim.make_optimizer(dataclasses.replace(cfg.optim, **fields), cfg.train.steps, cfg.model.head_dim)
        )

    found = {ADAMW: made(name="adamw"), OURS: made(name="muon")}
    if cfg.optim.coefficients == "jordan":  # of the other sets, no part can be repeated
        more = cfg.optim.newton_schulz_steps + MORE_STEPS
        found[f"{OURS}, {more} steps"] = made(name="muon", newton_schulz_steps=more)
    if newton_schulz.iteration_dtype(cfg.optim.newton_schulz_dtype) != jnp.bfloat16:
        found[f"{OURS} in bfloat16"] = made(name="muon", newton_schulz_dtype="bfloat16")
    theirs = "optax.contrib.muon"
    found[theirs] = Variant(optax_muon(cfg, mine), False)
    found[f"{theirs}, bf16 gradients and momentum"] = Variant(optax_muon(cfg, mine, jnp.bfloat16), False, jnp.bfloat16)
    return found


def step_flops(groups: dict[tuple[int, int], int]) -> int:
    """Of one Newton–Schulz step of all matrices; groups: {(m, n): number of matrices}."""
    return sum(count * newton_schulz.flops(m, n, 1) for (m, n), count in groups.items())


# --- clocks ----------------------------------------------------------------------------------------------------------


class Bench:
    """One variant: its arrays live only during its turn, so that each has the device's memory for itself."""

    def __init__(self, variant: Variant, abstract: Any, mine: Any, devices: list[jax.Device]):
        self.variant, self.turns, self.note = variant, [], ""
        self._mine, self._update = mine, None
        kind = jax.sharding.AxisType.Explicit if variant.explicit else jax.sharding.AxisType.Auto
        self.mesh = jax.make_mesh((1, len(devices), 1), sharding.AXES, axis_types=(kind,) * 3, devices=devices)
        self._shardings = jax.tree.map(lambda x: jax.sharding.NamedSharding(self.mesh, x.sharding.spec), abstract)
        leaves, tree = jax.tree.flatten(abstract)

        def draw(seed, scale):
            keys = jax.random.split(jax.random.key(seed), len(leaves))
            return jax.tree.unflatten(tree, [scale * self._normal(k, x) for k, x in zip(keys, leaves, strict=True)])

        cast = lambda p: jax.tree.map(lambda x: x.astype(variant.dtype), p)
        self._draw = jax.jit(draw, out_shardings=self._shardings)
        self._init = jax.jit(lambda p: self._place(variant.optimizer.init(cast(p))))

    def _normal(self, key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        spec = like.sharding.spec if self.variant.explicit else None
        return jax.random.normal(key, like.shape, like.dtype, out_sharding=spec)

    def _start(self) -> tuple:
        params, grads = self._draw(0, 0.02), self._draw(1, 1e-3)
        return params, grads, self._init(params)

    def _place(self, tree: Any) -> Any:
        """Under Auto axes, parameters and moments are kept sharded by hand, each moment like its parameter."""
        if self.variant.explicit:
            return tree
        known = {path_of(path): place for path, place in jax.tree_util.tree_leaves_with_path(self._shardings)}

        def keep(path, x):
            name = "/" + path_of(path)
            place = next((place for key, place in known.items() if x.ndim and name.endswith(f"/{key}")), None)
            return jax.lax.with_sharding_constraint(x, place or jax.sharding.NamedSharding(self.mesh, P()))

        return jax.tree_util.tree_map_with_path(keep, tree)

    def _one(self, params, grads, state):
        grads = jax.tree.map(lambda g: g.astype(self.variant.dtype), grads)
        updates, state = self.variant.optimizer.update(grads, state, params)
        updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
        return self._place(optax.apply_updates(params, updates)), self._place(state)

    def compile(self) -> None:
        """Compiles the update, looks at it once, and writes the note."""
        with jax.set_mesh(self.mesh):
            params, grads, state = jax.block_until_ready(self._start())
            self._update = jax.jit(self._one, donate_argnums=(0, 2)).lower(params, grads, state).compile()
            size = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)) / 2**30
            memory = self._update.memory_analysis().temp_size_in_bytes / 2**30
            new, state = jax.block_until_ready(self._update(params, grads, state))
            del state, params
            norm, cosine = jax.jit(self._fingerprint)(new, self._draw(0, 0.02), grads)
            self.note = f"state {size:.2f} GiB and temporaries {memory:.2f} GiB a device, "
            self.note += f"update {float(norm):.5g}, cosine {float(cosine):.6f}"

    def _fingerprint(self, new, old, grads) -> tuple:
        """Norm of the update of Muon's matrices, and its cosine to the gradient."""
        dots = jnp.zeros(3)
        leaves = (jax.tree.leaves(tree) for tree in (new, old, grads, self._mine))
        for a, b, g, mine in zip(*leaves, strict=True):
            if mine:
                dots += jnp.stack([jnp.sum((a - b) ** 2), jnp.sum((a - b) * g), jnp.sum(g * g)])
        return jnp.sqrt(dots[0]), dots[1] / jnp.sqrt(dots[0] * dots[2])

    def turn(self) -> None:
        with jax.set_mesh(self.mesh):
            params, grads, state = self._start()
            again = lambda params, state: self._update(params, grads, state)
            self.turns.append(seconds(again, (params, state), STEPS.value)[0])


def time_variants(chosen: dict[str, Variant], abstract: Any, mine: Any, devices: list[jax.Device]) -> dict[str, float]:
    """Median seconds by name; prints a row each. A variant that cannot run here says why."""
    benches = {name: Bench(variant, abstract, mine, devices) for name, variant in chosen.items()}
    for name, bench in list(benches.items()):
        try:
            bench.compile()
        except Exception as error:  # the others can be compared all the same
            print(
                f"{name:<50} cannot run here: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True
            )
            del benches[name]
    for _ in range(ROUNDS.value):
        for bench in benches.values():
            bench.turn()
    for name, bench in benches.items():
        median, spread = statistics.median(bench.turns), max(bench.turns) - min(bench.turns)
        print(f"{name:<50} {1e3 * median:8.2f} ms (spread {1e3 * spread:.2f}), {bench.note}", flush=True)
    return {name: statistics.median(bench.turns) for name, bench in benches.items()}


@jax.jit
def products(x):
    gram = jnp.einsum("lmk,lnk->lmn", x, x)
    square = jnp.einsum("lmk,lkn->lmn", gram, gram)
    return jnp.einsum("lmk,lkn->lmn", square, x)


def time_products(groups: dict[tuple[int, int], int], devices: int) -> tuple[float, float]:
    """FLOPs and seconds of the iteration's three products as plain batched bf16 einsums, matrices spread evenly."""
    flops, total = 0.0, 0.0
    for (m, n), count in groups.items():
        m, n = min(m, n), max(m, n)
        shape = (-(-count // devices) * devices, m, n)
        draw = lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16, out_sharding=P(sharding.AXES, None, None))
        x = jax.jit(draw, static_argnums=1)(jax.random.key(0), shape) / jnp.bfloat16(n**0.5)
        flops += shape[0] * newton_schulz.flops(m, n, 1)
        total += seconds(products, (x,), STEPS.value, carry=False)[0]
    return flops, total


def time_training(cfg: config.RunConfig, mesh: Any) -> float:
    batch = put_batch(random_rows(cfg, process_rows(mesh, cfg.data.batch_size)), mesh, cfg)
    run = step.make_train_step(cfg, mesh)
    one = lambda state: (run(state, batch)[0],)
    _, carry = seconds(one, (init_state(cfg, mesh),), 2)
    return seconds(one, carry, STEPS.value)[0]


# --- rows ------------------------------------------------------------------------------------------------------------


def build(devices: int) -> config.RunConfig:
    c = CONFIG.value.copy_and_resolve_references()
    c.unlock()
    c.mesh.update(data=1, fsdp=devices, expert=1)
    c.data.batch_size *= devices
    return config.build(c)


def iteration_rows(times: dict[str, float], cfg: config.RunConfig, groups: dict, n: int) -> None:
    """n: devices."""
    flops = step_flops(groups)
    done, ceiling_seconds = time_products(groups, n)
    ceiling = done / ceiling_seconds / n
    print(f"plain batched bf16 products: {ceiling / 1e12:.4g} TFLOP/s a device, {1e3 * ceiling_seconds:.2f} ms a step")
    if OURS in times:
        whole = flops * cfg.optim.newton_schulz_steps / times[OURS] / n
        print(f"{OURS}, everything counted as iteration: {whole / 1e12:.4g} TFLOP/s a device, {whole / ceiling:.1%}")
    longer = next((name for name in times if name.startswith(f"{OURS},")), None)
    if OURS in times and longer:
        extra = times[longer] - times[OURS]
        rate = flops * MORE_STEPS / extra / n
        print(f"{OURS}, the iteration: {rate / 1e12:.4g} TFLOP/s a device, {rate / ceiling:.1%} of the products', "
              f"{1e3 * extra:.2f} ms for {MORE_STEPS} steps")  # fmt: skip


def share_rows(times: dict[str, float], cfg: config.RunConfig, mesh: Any) -> None:
    """The optimizer's share of a step, forward and backward being the step measured with AdamW less AdamW."""
    tokens = cfg.data.batch_size * cfg.data.seq_len
    measured = {name: time_training(dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, name=short)), mesh)
                for name, short in ((ADAMW, "adamw"), (OURS, "muon")) if name in times}  # fmt: skip
    for name, value in measured.items():
        print(f"training step of {tokens:,} tokens with {name}: {1e3 * value:.2f} ms, measured, "
              f"optimizer {times[name] / value:.1%}")  # fmt: skip
    if ADAMW not in measured:
        return
    rest = measured[ADAMW] - times[ADAMW]
    print(f"{'share of a step':<50} " + "  ".join(f"{t:>11,}" for t in sorted({*TOKENS, tokens})) + " tokens")
    for name, value in times.items():
        if name.startswith(f"{OURS},"):
            continue
        cells = []
        for t in sorted({*TOKENS, tokens}):
            share = value / (value + rest * t / tokens)
            cells.append(f"{share:>10.2%}" + (" " if t == tokens else "*"))
        print(f"{name:<50} " + "  ".join(cells))
    print(f"{'':<50} * extrapolated from {tokens:,} tokens: forward and backward proportional to the tokens")


def main(_):
    devices = jax.devices()[: DEVICES.value or None]
    cfg = build(len(devices))
    config.check_devices(cfg, len(devices), devices[0].platform, devices[0].device_kind)
    mesh = sharding.make_mesh((1, len(devices), 1), devices)
    shapes = model.abstract(cfg.model).shapes
    labels = optim.label_params(shapes)
    print(f"{model.count_parameters(cfg.model).total / 1e9:.2f}B parameters, {cfg.data.batch_size} × "
          f"{cfg.data.seq_len} tokens a step, {len(devices)} × {devices[0].device_kind}, mesh {dict(mesh.shape)}, "
          f"jax {jax.__version__}, optax {optax.__version__}", flush=True)  # fmt: skip
    muon = dataclasses.replace(cfg.optim, name="muon")
    plan = optim.muon_plan(muon, model.abstract(cfg.model), dict(mesh.shape), cfg.model.head_dim)
    print(plan, flush=True)
    mine = muons(cfg.optim, labels)
    chosen = {name: variant for name, variant in variants(cfg, mine).items() if ONLY.value in name}
    times = time_variants(chosen, abstract_state(cfg, mesh).params, mine, devices)
    groups: dict[tuple[int, int], int] = {}
    for row in plan.rows:
        groups[row.shape] = groups.get(row.shape, 0) + row.matrices
    with jax.set_mesh(mesh):
        iteration_rows(times, cfg, groups, len(devices))
    if TRAIN.value:
        share_rows(times, cfg, mesh)
    peak = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices)
    print(f"peak memory of all of this: {peak / 2**30:.1f} GiB a device")


if __name__ == "__main__":
    cli.run(main)
