"""Upcycles a run directory: loads weights, transforms them, compares the logits, and saves them with their origin."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import model
from moe_jax.config import ExploreConfig, LossConfig, ModelConfig, RunConfig
from moe_jax.data import tokenizers
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.optim import groups
from moe_jax.parallel import sharding
from moe_jax.run import config_file, weights
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.train.state import abstract_weights
from moe_jax.tree import flatten, join, nest, split
from moe_jax.upcycle.chain import (
    Scores,
    Transform,
    apply,
    average,
    check_scores,
    describe,
    final_config,
    is_fixed,
    logits_error,
    require,
    shares_of,
)
from moe_jax.upcycle.dense import Importance
from moe_jax.upcycle.experts import SCALES, VirtualGroups, fixed_sum, kappa
from moe_jax.upcycle.scores import read_counts, read_units, training_rows, unit_scores

ROUTER_SCALES = (0.0, 0.01, 0.1, 1.0)  # multiples of `router_std` for which the error is measured


class Report(NamedTuple):
    """The results of a conversion."""

    cfg: RunConfig
    changes: str  # why the function has changed; "" if it is the same
    error: float | None  # ‖logits after − before‖ / ‖before‖ in float32; None: not measured
    deviation: dict[float, float]  # errors by router_std, for routing whose combine weights have no fixed sum


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
    shares: Sequence[float] | None = None,
    scores: str | os.PathLike = "",
    score_sequences: int = 64,
) -> Report:
    """Makes the run directory of weights `workdir` from other run directories. After a failure there is no `workdir`.

    sources: RUN or RUN@STEP, by default the newest step. Several sources are averaged first, unless the chain begins
        with `Merge`.
    check: also run the model before and after on random tokens, and print the relative error of the logits.
    shares: of the sources in their average, divided by their sum; by default equal.
    scores: for `Prune` a run directory with an eval.json, or a file like that; by default the source. For `Importance`
        a NumPy file with an array `[L, F]`; by default it is computed on `score_sequences` sequences of the source's
        training text.
    Raises ConfigError, or CheckpointError, before anything is compiled or written. Every process calls this.
    """
    runs = [weights.source_of(text) for text in sources]
    require(bool(runs), "from", "", "must name a run directory", "for example --from=runs/a")
    weights.check_free(workdir)
    merges = bool(chain) and chain[0].sources > 1
    of_each = None if merges else shares_of(shares, len(runs))
    require(not merges or shares is None, "weights", shares, "has no effect on models that are merged", "leave it out")
    configs = [_config(folder) for folder, _ in runs]
    for folder, _ in runs[1:]:
        weights.check_same_model(dataclasses.replace(configs[0], init_from=str(folder)))
        _check_same_tokenizer(runs[0][0], folder)
    before, after = configs[0].model, final_config(chain, configs[0].model)
    steps = []
    for folder, number in runs:
        with Checkpoints(folder) as checkpoints:
            steps.append(checkpoints.contents(number)[0])  # raises if there is no such step
    given, counted = _given_scores(chain, before, scores, runs, steps)
    if given is not None:
        check_scores(chain, before, given)
    require(not merges or chain[0].sources == len(runs), "from", ",".join(sources),
            f"the chain merges {chain[0].sources if chain else 0} models", f"name {len(runs)} models")  # fmt: skip
    changes = [reason for reason in _changes(chain, before) if reason]
    cfg, unfit = _new_config(configs[0], after, runs[0][0], Path(workdir))
    cfg, lost = groups.without_lost(cfg)

    mesh = mesh_for((*before.expert_counts, *after.expert_counts))
    echo(f"from {', '.join(sources)}: {_size(before)}; mesh {dict(mesh.shape)}")
    for folder, _ in runs:
        if config_file.load_config(folder).model.mtp_layers:
            echo(f"the layers of multi-token prediction of {folder} are left out: no logits need them")
    origins: list[list[dict]] = []

    def load(run):
        folder, number = run
        params, bias, origin = weights.load_weights(folder, *abstract_weights(before, mesh), step=number, cast=True)
        origins.append(origin)
        return join(params, bias)

    with jax.set_mesh(mesh):
        params = _joined(map(load, runs), of_each, sources)
        for line in [*explain(chain, before), *unfit, *lost]:
            echo(line)
        if given is None and any(transform.needs_scores for transform in chain):
            given = _computed_scores(configs[0], runs[0], score_sequences)
        _, made = apply(chain, before, params, seed, given)
    echo(f"now {_size(after)}")
    first = params[0] if isinstance(params, tuple) else params
    error, deviation = None, {}
    if check:
        error = logits_error((before, first), (after, made), mesh)
        deviation = _deviation(chain, (before, first), (after, made), mesh)
    source = f"the average of {len(runs)} models" if of_each and len(runs) > 1 else "the dense model"
    unchanged = "the same as before" if before.num_moe_layers and len(runs) == 1 else f"the same as that of {source}"
    echo(f"function: {'changed: ' + '; '.join(changes) if changes else unchanged}")
    if error is not None:
        to = ", to those of the first model" if merges else f", to those of {source}" if len(runs) > 1 else ""
        echo(f"relative error of the logits on random tokens{to}: {error:.2g}")
    for std, value in deviation.items():
        echo(f"  with router_std={std:g}: {value:.2g}")

    own = {"event": "upcycle", "from": list(sources), "seed": seed, "chain": describe(chain)}
    own |= {"weights": list(shares)} if shares else {}
    own |= {"scores": counted or f"{score_sequences} sequences of training text"} if given is not None else {}
    together = {"event": "merge" if merges else "average", "origins": origins}
    fixed, made = split(made, is_fixed)
    files = _tokenizer_files(runs[0][0])
    weights.save_weights(workdir, cfg, made, fixed, [*(origins[0] if len(runs) == 1 else [together]), own], files)
    echo(f"written to {workdir}: weights and their origin; training starts with a fresh optimizer state")
    return Report(cfg, "; ".join(changes), error, deviation)


def _config(folder: Path) -> RunConfig:
    if not folder.is_dir():
        raise CheckpointError(f"--from={folder}: no such run directory")
    cfg = config_file.load_config(folder)
    return dataclasses.replace(cfg, model=cfg.model.base).without_mtp  # adapters are merged


def _new_config(cfg: RunConfig, after: ModelConfig, source: Path, workdir: Path) -> tuple[RunConfig, list[str]]:
    """The source's configuration with the new model, and a line about each setting that the model does not allow.

    Such settings, of routers and their losses, are left out. The path of a tokenizer file is that of its copy in
    `workdir`.
    """
    tokenizer = cfg.data.tokenizer
    if own := tokenizers.own_file(tokenizer, source):
        tokenizer = dataclasses.replace(tokenizer, path=str(workdir / own.name))
    data, loss = dataclasses.replace(cfg.data, tokenizer=tokenizer), dataclasses.replace(cfg.loss, bias_target=())
    new, lines = {"init_from": "", "model": after, "loss": loss, "data": data, "explore": cfg.explore}, []
    while True:
        try:
            return dataclasses.replace(cfg, **new), lines
        except ConfigError as e:
            gone, fitting = _left_out(e.name, new["loss"])
            if all(new[name] == part for name, part in fitting.items()):
                raise
            lines.append(f"{gone} is left out: {e.name}={e.value!r} {e.rule}")
            new |= fitting


def _left_out(name: str, loss: LossConfig) -> tuple[str, dict[str, Any]]:
    """Returns what to leave out so that a rule about a field of a run's configuration holds: its name, and the group
    without it.

    Rules between model and loss that name a field of the model are those of `loss.bias_update`.
    """
    group, _, field = name.partition(".")
    if group == "explore":
        return group, {"explore": ExploreConfig()}
    if name.startswith("loss.more."):
        kept = {one: fields for one, fields in loss.more.items() if one != field.split(".")[1]}
        return f"loss.more.{field.split('.')[1]}", {"loss": dataclasses.replace(loss, more=kept)}
    field = field if group == "loss" else "bias_update"
    value = 0.0 if field.endswith("_coef") else getattr(LossConfig, field)
    return f"loss.{field}", {"loss": dataclasses.replace(loss, **{field: value})}


def _check_same_tokenizer(first: Path, other: Path) -> None:
    """Raises CheckpointError if two runs have different tokenizers, since their average would have no meaning."""
    (a, _), (b, its) = tokenizers.of_run(first), tokenizers.of_run(other)
    if a is not None and b is not None and a.fingerprint != b.fingerprint:
        rule = f"its tokenizer ({its['kind']}) differs from that of {first}"
        raise CheckpointError(f"--from={other}: {rule}; only runs with the same tokenizer can be averaged")


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer files of a run of train.py or of an import."""
    return tokenizers.companion_files(folder) | tokenizers.read_files(folder, (tokenizers.SETTINGS,))


def _joined(models: Iterable[dict], shares: Sequence[float] | None, sources: Sequence[str]) -> dict | tuple[dict, ...]:
    """The average of models, one at a time in memory; without shares all of them. Raises ConfigError for two tables."""
    if shares is None:
        return tuple(models)
    if len(shares) == 1:
        return next(iter(models))
    tables: list[dict] = []

    def learned(one):
        table, rest = split(one, lambda path: path.endswith("/table"))
        tables.append(table)
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), tables[0], table)
        rule = "their tables name other experts for a token, and have no average"
        require(all(jax.tree.leaves(same)), "from", ",".join(sources), rule, "name runs with the same tables")
        return rest

    mean = average(map(learned, models), len(shares), shares)
    return join(mean, tables[0])


def _given_scores(
    chain: Sequence[Transform], before: ModelConfig, scores: str | os.PathLike, runs: list, steps: list[int]
) -> tuple[Scores | None, str]:
    """The scores for a chain that a file has, and where they are from; None where there are none, or are computed."""
    at = next((i for i, transform in enumerate(chain) if transform.needs_scores), None)
    require(at is not None or not str(scores), "scores", str(scores), "no transform uses scores", "leave it out")
    if at is None:
        return None, ""
    cfg = final_config(chain[:at], before)
    if isinstance(chain[at], Importance):
        if str(scores):
            return read_units(scores), str(scores)
        rule = "are not known for what is made before: they are computed on the model that is read"
        require(at == 0 and len(runs) == 1, "scores", "", rule, "name a file of scores")
        rule = "computes scores in one process only"
        require(jax.process_count() == 1, "distributed", True, rule, "name a file of scores")
        return None, ""
    require(bool(str(scores)) or len(runs) == 1, "scores", "", "each of several models has its own counts",
            "name a run directory or a file")  # fmt: skip
    rule = "are not known: the model that is read has no experts"
    require(bool(str(scores)) or before.num_moe_layers > 0, "scores", "", rule, "name a run directory or a file")
    source = Path(scores or runs[0][0]).expanduser()
    found, step = read_counts(source, cfg)
    own = {number: folder for (folder, _), number in zip(runs, steps, strict=True)
           if source.resolve() in (folder.resolve(), folder.resolve() / "eval.json")}  # fmt: skip
    for number, folder in own.items():
        rule = f"its eval.json is of step {step}, its weights of step {number}"
        require(step in own, "scores", str(scores), rule, f"nearest valid: --from={folder}@{step}")
    return found, str(source) if step is None else f"{source}@{step}"


def _computed_scores(cfg: RunConfig, run: tuple[Path, int | None], count: int) -> Scores:
    """The importance of the hidden units of a dense run, on its training text."""
    folder, step = run
    mesh = sharding.make_mesh((1, 1, 1), jax.local_devices()[:1])
    rows = training_rows(cfg, folder, count)
    with jax.set_mesh(mesh):
        params, _, _ = weights.load_weights(folder, *abstract_weights(cfg.model, mesh), step=step, cast=True)
        found = unit_scores(cfg.model, params, rows)
    return jax.tree.map(np.asarray, found)


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
