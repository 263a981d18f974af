"""Upcycles a run directory: loads weights, transforms them, compares the logits, and saves them with their origin."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from moe_jax import model
from moe_jax.config import LossConfig, ModelConfig, RunConfig
from moe_jax.data import tokenizers
from moe_jax.errors import CheckpointError
from moe_jax.parallel import sharding
from moe_jax.run import config_file, weights
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.train.state import abstract_weights
from moe_jax.tree import flatten, nest
from moe_jax.upcycle.chain import Transform, apply, average, describe, final_config, logits_error, require
from moe_jax.upcycle.experts import SCALES, VirtualGroups, fixed_sum, kappa

ROUTER_SCALES = (0.0, 0.01, 0.1, 1.0)  # multiples of `router_std` for which the error is measured


class Report(NamedTuple):
    """The results of a conversion."""

    cfg: RunConfig
    changes: str  # why the function has changed; "" if it is the same
    error: float | None  # ‖logits after − before‖ / ‖before‖ in float32; None: not measured
    deviation: dict[float, float]  # errors by router_std, for routing whose combine weights have no fixed sum


def source_of(text: str) -> tuple[Path, int | None]:
    """The folder and the step of `RUN` (None: the newest) or `RUN@STEP`."""
    folder, at, number = text.rpartition("@")
    if at and number.isdigit() and not Path(text).exists():
        return Path(folder), int(number)
    return Path(text), None


def mesh_for(expert_counts: Sequence[int]) -> Mesh:
    """A mesh of all devices. The expert axis is the largest that divides all numbers of experts; fsdp has the rest."""
    devices = jax.device_count()
    expert = math.gcd(*expert_counts, devices)
    return sharding.make_mesh((1, devices // expert, expert))


def convert(
    sources: Sequence[str],
    workdir: str | os.PathLike,
    chain: Sequence[Transform],
    *,
    seed: int = 0,
    check: bool = True,
    echo: Callable[[str], Any] = print,
) -> Report:
    """Makes the run directory of weights `workdir` from other run directories. After a failure there is no `workdir`.

    sources: RUN or RUN@STEP, by default the newest step. Several sources are averaged first.
    check: also run the model before and after on random tokens, and print the relative error of the logits.
    Raises ConfigError, or CheckpointError, before anything is compiled or written. Every process calls this.
    """
    runs = [source_of(text) for text in sources]
    require(bool(runs), "from", "", "must name a run directory", "for example --from=runs/a")
    weights.check_free(workdir)
    configs = [_config(folder) for folder, _ in runs]
    for folder, _ in runs[1:]:
        weights.check_same_model(dataclasses.replace(configs[0], init_from=str(folder)))
        _check_same_tokenizer(runs[0][0], folder)
    before, after = configs[0].model, final_config(chain, configs[0].model)
    for folder, number in runs:
        with Checkpoints(folder) as checkpoints:
            checkpoints.contents(number)  # raises if there is no such step
    changes = [reason for reason in _changes(chain, before) if reason]
    cfg = _new_config(configs[0], after, runs[0][0], Path(workdir))
    cfg, gone = _without_lost_groups(cfg)

    mesh = mesh_for(after.expert_counts)
    echo(f"from {', '.join(sources)}: {_size(before)}; mesh {dict(mesh.shape)}")
    origins: list[list[dict]] = []

    def load(run):
        folder, number = run
        abstract = abstract_weights(before, mesh)
        params, _, origin = weights.load_weights(folder, *abstract, step=number, cast=True)
        origins.append(origin)
        return params

    with jax.set_mesh(mesh):
        params = load(runs[0]) if len(runs) == 1 else average(map(load, runs), len(runs))
        for line in [*explain(chain, before), *gone]:
            echo(line)
        _, made = apply(chain, before, params, seed)
    echo(f"now {_size(after)}")
    error, deviation = None, {}
    if check:
        error = logits_error((before, params), (after, made), mesh)
        deviation = _deviation(chain, (before, params), (after, made), mesh)
    same = "changed: " + "; ".join(changes) if changes else "the same as that of the dense model"
    echo(f"function: {same}")
    if error is not None:
        echo(f"relative error of the logits on random tokens: {error:.2g}")
    for std, value in deviation.items():
        echo(f"  with router_std={std:g}: {value:.2g}")

    zeros = jax.tree.map(_zeros, abstract_weights(after, mesh)[1])
    own = {"event": "upcycle", "from": list(sources), "seed": seed, "chain": describe(chain)}
    earlier = origins[0] if len(runs) == 1 else [{"event": "average", "origins": origins}]
    weights.save_weights(workdir, cfg, made, zeros, [*earlier, own], _tokenizer_files(runs[0][0]))
    echo(f"written to {workdir}: weights and their origin; training starts with a fresh optimizer state")
    return Report(cfg, "; ".join(changes), error, deviation)


def _config(folder: Path) -> RunConfig:
    if not folder.is_dir():
        raise CheckpointError(f"--from={folder}: no such run directory")
    cfg = config_file.load_config(folder)
    return dataclasses.replace(cfg, model=cfg.model.base)  # adapters are merged


def _new_config(cfg: RunConfig, after: ModelConfig, source: Path, workdir: Path) -> RunConfig:
    """The source's configuration with the new model. The path of a tokenizer file is that of its copy in `workdir`."""
    tokenizer = cfg.data.tokenizer
    if own := tokenizers.own_file(tokenizer, source):
        tokenizer = dataclasses.replace(tokenizer, path=str(workdir / own.name))
    data, loss = dataclasses.replace(cfg.data, tokenizer=tokenizer), dataclasses.replace(cfg.loss, bias_target=())
    if not after.moe.selection_bias:  # nothing for another update to move
        loss = dataclasses.replace(loss, bias_update=LossConfig.bias_update)
    return dataclasses.replace(cfg, init_from="", model=after, loss=loss, data=data)


def _without_lost_groups(cfg: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration without groups of parameters that match none of the new model, and a line about each."""
    paths = flatten(model.abstract(cfg.model).shapes) if cfg.optim.groups else {}
    has = {name: any(re.search(g.match, path) for path in paths) for name, g in cfg.optim.groups.items()}
    kept = {name: group for name, group in cfg.optim.groups.items() if has[name]}
    lines = [f"optim.groups.{name} is left out: it matches no parameter of the new model" for name in has.keys() - kept]
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, groups=kept)), sorted(lines)


def _check_same_tokenizer(first: Path, other: Path) -> None:
    """Raises CheckpointError if two runs have different tokenizers, since their average would have no meaning."""
    (a, _), (b, its) = tokenizers.of_run(first), tokenizers.of_run(other)
    if a is not None and b is not None and a.fingerprint != b.fingerprint:
        rule = f"its tokenizer ({its['kind']}) differs from that of {first}"
        raise CheckpointError(f"--from={other}: {rule}; only runs with the same tokenizer can be averaged")


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer files of a run of train.py or of an import."""
    return tokenizers.companion_files(folder) | tokenizers.read_files(folder, (tokenizers.SETTINGS,))


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jax.numpy.zeros(like.shape, like.dtype), out_shardings=like.sharding)()


def _size(cfg: ModelConfig) -> str:
    counts, experts = model.count_parameters(cfg), ""
    if cfg.num_moe_layers:
        moe, numbers = cfg.moe, " or ".join(map(str, cfg.expert_counts))
        experts = f" with {numbers} experts of width {moe.d_expert}, {moe.top_k} a token"
    shape = f"{cfg.num_moe_layers} MoE of {cfg.num_layers} layers{experts}" if experts else f"{cfg.num_layers} layers"
    return f"{shape}, width {cfg.d_model}, {counts.total:,} parameters, {counts.active:,} active"


def _changes(chain: Sequence[Transform], cfg: ModelConfig) -> list[str]:
    out = []
    for transform in chain:
        out.append(transform.changes(cfg))
        cfg = transform.config(cfg)
    return out


def explain(chain: Sequence[Transform], cfg: ModelConfig) -> list[str]:
    """Lines about each transform, with the factors of the matrices if experts are scaled."""
    lines = []
    for transform in chain:
        fields = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}
        line = f"{type(transform).__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"
        after = transform.config(cfg)
        if isinstance(transform, VirtualGroups):
            for experts in after.expert_counts:
                k = kappa(dataclasses.replace(after.moe, num_experts=experts), transform.granularity)
                factors = {n: k**power for n, power in SCALES[transform.scale][cfg.activation].items() if power}
                where = f" of layers with {experts} experts" if len(after.expert_counts) > 1 else ""
                line += f"\n  the sum of the routed experts{where} is 1/κ of the dense layer, κ = {k:.4g}: "
                line += ", ".join(f"{name} × {factor:.4g}" for name, factor in factors.items()) or "nothing is scaled"
        lines.append(line)
        cfg = after
    return lines


def _deviation(chain: Sequence[Transform], before, after, mesh: Mesh) -> dict[float, float]:
    """The errors by router_std, for routing whose combine weights have no fixed sum; {} for other routing."""
    made = [t for t in chain if isinstance(t, VirtualGroups)]
    if not made or fixed_sum(after[0].moe):
        return {}

    def at(scale):
        scaled = {name: scale * w if name.endswith("/moe/w_router") else w for name, w in flatten(after[1]).items()}
        return logits_error(before, (after[0], nest(scaled)), mesh)

    return {scale * made[0].router_std: at(scale) for scale in ROUTER_SCALES}
