"""Rounds the weights of a run: calibrates, allocates bits, rounds block by block, and writes a run directory.

The result has the parameters' dtype and the same configuration, so everything that reads a run reads it. quant.json
beside its weights says what was rounded.
"""

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import config, model
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.config.layers import Place
from moe_jax.data import tokenizers
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.optim import groups
from moe_jax.parallel import sharding
from moe_jax.quant import report, smooth
from moe_jax.quant.allocate import METHODS, SCOPES, allocate, by_turns
from moe_jax.quant.balance import balanced
from moe_jax.quant.calibrate import calibration_rows
from moe_jax.quant.grid import LARGEST_BITS, nearest_group
from moe_jax.quant.round import LayerStats, Method, measure_block, round_block, rounded_experts
from moe_jax.quant.taps import EXPERT_MATRICES, BlockTaps, is_dense, is_routed
from moe_jax.quant.walk import check_labels, walk
from moe_jax.run import base, config_file, weights
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.train.state import abstract_weights
from moe_jax.tree import flatten

ALLOCATE = ("uniform", *METHODS)
AS_IT_IS = 16  # bits of dense matrices that stay as they are


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is rounded: the flags of the command."""

    method: str = "gptq"  # or "rtn": to nearest
    bits: float = 3.0  # mean of the weights of routed experts, without scales
    choices: tuple[int, ...] = ()  # bits that an allocation gives; (): whole numbers at most 1.5 from `bits`
    allocate: str = "uniform"
    scope: str = "layer"  # or "model": whether an allocation gives every layer the same mean
    group: int = 128
    symmetric: bool = False
    attention_bits: int = 4  # 16: as they are
    dense_bits: int = 4  # of dense feed-forward layers, shared experts and latent projections; 16: as they are
    calibrate: str = ""
    rows: int = 64
    seed: int = 0
    gated: bool = False
    smooth: bool = False
    balance: bool = False

    @property
    def all_choices(self) -> tuple[int, ...]:
        """The bits that an allocation may give, in increasing order."""
        near = (n for n in range(1, LARGEST_BITS + 1) if abs(n - self.bits) <= 1.5)
        return tuple(sorted(set(self.choices))) or tuple(near)

    @property
    def how(self) -> Method:
        """The method without the bits."""
        return Method(self.method, self.group, self.symmetric)


def require(ok: bool, name: str, value: Any, rule: str, hint: str) -> None:
    """Raises ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(f"quant.{name}", value, rule, hint)


def check(settings: Settings, cfg: ModelConfig) -> None:
    """Raises ConfigError, named `quant.<field>`, for settings that are wrong, or that do not fit a model.

    And by the model's field for a model that depends on labels.
    """
    check_labels(cfg)
    s, clip = settings, lambda n: int(min(max(round(n), 1), LARGEST_BITS))
    for name, value, allowed in (
        ("method", s.method, ("rtn", "gptq")),
        ("allocate", s.allocate, ALLOCATE),
        ("scope", s.scope, SCOPES),
    ):
        require(value in allowed, name, value, f"must be one of {', '.join(allowed)}", f"nearest valid: {allowed[0]!r}")
    finite = isinstance(s.bits, numbers.Real) and math.isfinite(s.bits)
    require(finite, "bits", s.bits, "must be a number", f"nearest valid: {Settings.bits:g}")
    require(
        1 <= s.bits <= LARGEST_BITS, "bits", s.bits, f"must be in [1, {LARGEST_BITS}]", f"nearest valid: {clip(s.bits)}"
    )
    for name in ("group", "attention_bits", "dense_bits", "rows", "seed"):
        whole = isinstance(getattr(s, name), numbers.Integral)
        require(whole, name, getattr(s, name), "must be a whole number", f"nearest valid: {getattr(Settings, name)}")
    whole = all(isinstance(n, numbers.Integral) for n in s.choices)
    require(whole, "choices", s.choices, "must be whole numbers", "nearest valid: (1, 2, 3)")
    if s.allocate == "uniform":
        rule = "must be a whole number with allocate='uniform', which gives all experts the same"
        hint = f"nearest valid: {clip(s.bits)}, or allocate='turns'"
        require(s.bits == int(s.bits), "bits", s.bits, rule, hint)
        require(not s.choices, "choices", s.choices, "has no effect with allocate='uniform'", "nearest valid: ()")
    else:
        low, high = s.all_choices[0], s.all_choices[-1]
        wrong = [n for n in s.choices if not 1 <= n <= LARGEST_BITS]
        require(not wrong, "choices", s.choices, f"must be in [1, {LARGEST_BITS}]", "nearest valid: (1, 2, 3)")
        rule = f"must be between the least and the most of the choices {s.all_choices}"
        require(low <= s.bits <= high, "bits", s.bits, rule, f"nearest valid: {min(max(s.bits, low), high):g}")
    own = s.allocate in ("frequency", "outliers", "mc")
    rule = f"has no effect with allocate={s.allocate!r}"
    require(own or s.scope == "layer", "scope", s.scope, rule, "nearest valid: 'layer'")
    for name in ("attention_bits", "dense_bits"):
        value = getattr(s, name)
        rule = f"must be in [1, {LARGEST_BITS}], or {AS_IT_IS} to leave these matrices as they are"
        near = AS_IT_IS if value > 12 else clip(value)
        require(1 <= value <= LARGEST_BITS or value == AS_IT_IS, name, value, rule, f"nearest valid: {near}")
    for name in ("gated", "balance"):
        rule = "has no effect with method='rtn', which no calibration text changes"
        require(s.method != "rtn" or not getattr(s, name), name, True, rule, "nearest valid: False")
    others = _inputs(cfg, dataclasses.replace(s, attention_bits=AS_IT_IS, dense_bits=Settings.dense_bits))
    dense = not all(path.endswith(tuple(f"/moe/{name}" for name in EXPERT_MATRICES)) for path in others)
    rule = "has no effect on a model without dense layers, shared experts and latent projections"
    usual = s.dense_bits == Settings.dense_bits
    require(dense or usual, "dense_bits", s.dense_bits, rule, f"nearest valid: {Settings.dense_bits}")
    require(s.rows >= 1, "rows", s.rows, "must be ≥ 1", "nearest valid: 1")
    require(s.seed >= 0, "seed", s.seed, "must be ≥ 0", "nearest valid: 0")
    if s.smooth:
        smooth.check(cfg)
    widths = _inputs(cfg, settings)
    wrong = [(path, width) for path, width in widths.items() if s.group < 1 or width % s.group]
    near = nearest_group(s.group, widths.values())
    rule = f"must divide the input widths of the rounded matrices; {wrong[0][0]} has {wrong[0][1]}" if wrong else ""
    require(not wrong, "group", s.group, rule, f"nearest valid: {near}")


def _inputs(cfg: ModelConfig, settings: Settings) -> dict[str, int]:
    """The input width of each matrix that is rounded, by path."""
    shapes = flatten(model.abstract(cfg).shapes)
    found = {}
    for stack in cfg.stacks:
        for block in stack.paths:
            for path, x in shapes.items():
                inside = path.removeprefix(f"{block}/")
                if inside != path and bits_of(inside, settings, 1) is not None:
                    found[path] = x.shape[-2]
    return found


def bits_of(path: str, settings: Settings, experts: Any) -> Any:
    """The bits of the matrix at a path in a block; None: it stays as it is. experts: those of routed experts."""
    if is_routed(path):
        return experts
    if not is_dense(path):
        return None
    bits = settings.attention_bits if path.startswith("attention/") else settings.dense_bits
    return None if bits == AS_IT_IS else bits


def quantise(
    source: str, workdir: str | os.PathLike, settings: Settings = Settings(), *,
    progress: bool = True, echo: Callable[[str], Any] = print,
) -> dict[str, Any]:  # fmt: skip
    """Makes the run directory of rounded weights `workdir`, and returns the content of its quant.json.

    source: RUN or RUN@STEP, by default the newest step. After a failure there is no `workdir`. Raises ConfigError, or
    CheckpointError, before anything is compiled or written. Every process calls this.
    """
    folder, step = weights.source_of(source)
    weights.check_free(workdir)
    cfg = _source_config(folder)
    check(settings, cfg.model)
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.contents(step)[0]  # raises if there is no such step
    if cfg.model.mtp_layers:
        echo(f"the layers of multi-token prediction of {folder} are left out: no logits need them")
    cfg = cfg.without_mtp
    mesh = sharding.make_mesh(config.evaluation_mesh(cfg.model, jax.device_count()))
    rows, where = calibration_rows(cfg, folder, settings.rows, settings.seed, settings.calibrate)
    echo(f"from {source}, step {step}; mesh {dict(mesh.shape)}; calibration: {settings.rows} rows of {where}")
    params, bias, origin = weights.load_weights(folder, *abstract_weights(cfg.model, mesh), step=step, cast=True)
    if base.rounded_by(origin):
        echo(f"{source} is rounded already: its weights are rounded again")
    params, found = rounded(cfg.model, mesh, params, bias, rows, settings, progress=progress)
    for line in found.lines():
        echo(line)
    own = {"event": "quantize", "from": f"{folder}@{step}", **dataclasses.asdict(settings)}
    own["choices"] = list(settings.choices)
    body = {**own, "rows_of": where, **found.to_dict()}
    new, lost = groups.without_lost(_config_in(cfg, folder, Path(workdir)))
    for line in lost:
        echo(line)
    files = tokenizers.companion_files(folder) | tokenizers.read_files(folder, (tokenizers.SETTINGS,))
    files |= {report.NAME: (json.dumps(body, indent=1, allow_nan=False) + "\n").encode()}
    weights.save_weights(workdir, new, params, bias, [*origin, own], files)
    echo(f"written to {workdir}: rounded weights, and {report.NAME}; eval.py --workdir={workdir} evaluates them")
    return body


def rounded(
    cfg: ModelConfig, mesh: Mesh, params: dict, router_bias: dict, rows: dict[str, np.ndarray], settings: Settings, *,
    stats: list[LayerStats] | None = None, progress: bool = False,
) -> tuple[dict, report.Report]:  # fmt: skip
    """The rounded parameters of a model, and how they were rounded. `params` is used up.

    rows: of calibration text, as `walk.walk` takes them. stats: `measured` of the same rows, to not measure again.
    """
    check(settings, cfg)
    found = report.Report(cfg, settings.how)
    sizes = {number: place.kind.experts for number, place in enumerate(cfg.places) if place.kind.experts}
    bits = dict.fromkeys(sizes, int(settings.bits))
    if settings.allocate != "uniform":
        if settings.allocate == "turns":
            made = by_turns([*sizes.values()], settings.all_choices, settings.bits)
        else:
            if stats is None:
                loss = settings.allocate == "mc"
                params, stats = measured(cfg, mesh, params, router_bias, rows, settings, loss=loss, progress=progress)
            made = allocate(settings.allocate, stats, settings.all_choices, settings.bits, settings.scope)
        bits, found.unspent = dict(zip(sizes, made.bits, strict=True)), made.budget - made.used

    def change(number, place, own, taps):
        own, taps = _smoothed(cfg, settings, place, own, taps)
        own, made = round_block(own, taps, lambda path: bits_of(path, settings, bits.get(number)), settings.how)
        found.add(number, place, taps, made)
        return own

    slots, label = balanced if settings.balance else None, "round" if progress else ""
    params = walk(cfg, mesh, params, router_bias, rows, change, gated=settings.gated, slots=slots, progress=label)
    return params, found


def measured(
    cfg: ModelConfig, mesh: Mesh, params: dict, router_bias: dict, rows: dict[str, np.ndarray], settings: Settings, *,
    loss: bool = True, progress: bool = False,
) -> tuple[dict, list[LayerStats]]:  # fmt: skip
    """The parameters, and what allocations read of each layer with experts. `params` is used up.

    loss: also the loss at all choices of bits of the settings, which `mc` alone reads, for one pass more a choice.
    """
    stats: list[LayerStats] = []

    def measure(number, place, own, taps):
        if place.kind.experts:
            own, taps = _smoothed(cfg, settings, place, own, taps)
            stats.append(measure_block(number, own, taps))

    def others(own, taps):
        own, taps = smooth.smooth(cfg, own, taps)[:2] if settings.smooth else (own, taps)
        return own, (rounded_experts(own, taps, bits, settings.how) for bits in settings.all_choices)

    label = "measure" if progress else ""
    given = {"gated": settings.gated, "others": others if loss else None}
    params = walk(cfg, mesh, params, router_bias, rows, measure, **given, progress=label)
    return params, stats


def _smoothed(cfg: ModelConfig, settings: Settings, place: Place, own: dict, taps: BlockTaps) -> tuple[dict, BlockTaps]:
    """A block and its statistics as it is rounded."""
    return smooth.smooth(cfg, own, taps)[:2] if settings.smooth and place.kind.experts else (own, taps)


def _source_config(folder: Path) -> RunConfig:
    """The configuration of the run that is rounded. Raises for runs that cannot be."""
    if not folder.is_dir():
        raise CheckpointError(f"--from={folder}: no such run directory")
    cfg = config_file.load_config(folder)
    if cfg.model.lora.rank:
        rule = f"--from={folder}: has adapters (model.lora.rank={cfg.model.lora.rank}), which are not rounded"
        merge = f"python -m moe_jax.upcycle --method=none --from={folder} --workdir=MERGED"
        raise CheckpointError(f"{rule}; merge them first: {merge}")
    rule, hint = "has no layer with experts (model.num_moe_layers is 0)", "name a run of a Mixture of Experts"
    require(cfg.model.num_moe_layers > 0, "from", str(folder), rule, hint)
    ternary = cfg.model.moe.expert_weights == "ternary"
    rule = "has experts of three values already (model.moe.expert_weights='ternary')"
    require(not ternary, "from", str(folder), rule, "name a run whose experts have any values")
    return cfg


def _config_in(cfg: RunConfig, source: Path, workdir: Path) -> RunConfig:
    """The configuration of the new run directory, which has its own copy of the tokenizer."""
    tokenizer = cfg.data.tokenizer
    if own := tokenizers.own_file(tokenizer, source):
        tokenizer = dataclasses.replace(tokenizer, path=str(workdir / own.name))
    return dataclasses.replace(cfg, init_from="", data=dataclasses.replace(cfg.data, tokenizer=tokenizer))
