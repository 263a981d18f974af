"""Saves and loads weights without a training run: import and upcycling write them, `config.init_from` reads them.

A run directory of weights holds `config.json` and `checkpoints/0/`. The `state` item of the checkpoint has only
`params/…` and `router_bias/…`, and its `data` item is `{"origin": [...]}`: the events that made the weights, in order.
`load_weights` reads such a directory and one of train.py alike.
"""

import difflib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import config, model
from moe_jax.config.fields import require
from moe_jax.config.labels import same_labels
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.nn import lora
from moe_jax.run import base
from moe_jax.run.checkpoint import PLACEHOLDER, Checkpoints, barrier, check_fits
from moe_jax.run.config_file import load_config, save_config
from moe_jax.train.state import TrainState, abstract_state, abstract_weights
from moe_jax.tree import flatten, flatten_config, join, nest, split

CASTABLE = ("float32", "bfloat16")
HOST_BYTES = 2 * 2**30  # limit of the host's memory for weights on their way to the disk


def source_of(text: str) -> tuple[Path, int | None]:
    """The folder and the step of `RUN` (None: the newest) or `RUN@STEP`."""
    folder, at, number = text.rpartition("@")
    if at and number.isdigit() and not Path(text).exists():
        return Path(folder), int(number)
    return Path(text), None


def check_free(workdir: str | os.PathLike) -> Path:
    """The path of a new run directory, with `~` and links resolved.

    Raises CheckpointError if there is anything in it, or if it cannot be made, before any work is done.
    """
    try:
        path = Path(workdir).expanduser().resolve()
        above = next(p for p in path.parents if p.exists())
        free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except (OSError, RuntimeError) as e:  # a link to itself, no home, a directory that may not be read
        raise CheckpointError(f"{workdir}: cannot be made: {e}") from None
    if not free:
        raise CheckpointError(f"{path} is not empty, but weights are written to a new run directory only")
    if path.is_dir() and os.path.ismount(path):
        raise CheckpointError(f"{path} is a mount point, which cannot be replaced; name a new directory in it")
    if not above.is_dir():
        raise CheckpointError(f"{path} cannot be made: {above} is not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be made: {above} may not be written to")
    return path


def save_weights(
    workdir: str | os.PathLike,
    cfg: config.RunConfig,
    params: dict,
    router_bias: dict,
    origin: list[dict],
    files: dict[str, bytes] | None = None,
    record: dict[str, Any] | None = None,
) -> None:
    """Makes a run directory of weights. After a failure there is no directory.

    origin: a JSON object for each event that made the weights, in order.
    files: further files for the directory, by name (a tokenizer).
    record: of the base (`load_base`), if `params` are adapters alone.
    Raises CheckpointError for a directory that is not empty. Every process calls this.
    """
    path = check_free(workdir)
    partial = path.with_name(f".{path.name}.partial")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)  # an earlier attempt that was killed
    barrier("weights: begin")
    try:
        save_config(partial, cfg)
        barrier("weights: config")
        with Checkpoints(partial, keep=1, host_bytes=HOST_BYTES) as checkpoints:
            state = {"params": params, "router_bias": router_bias}
            checkpoints.save(0, state, {"origin": origin} | ({"base": record} if record else {}), wait=True)
        barrier("weights: written")  # each process has looked at the files in this folder before it has another name
        if first:
            for name, data in (files or {}).items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_bytes(data)
            os.replace(partial, path)  # this replaces an empty directory
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    barrier("weights: end")


def load_weights(
    workdir: str | os.PathLike,
    abstract_params: dict,
    abstract_bias: dict,
    *,
    step: int | None = None,
    cast: bool = False,
    average: bool = False,
) -> tuple[dict, dict, list[dict]]:
    """Parameters, router biases and origin of a run directory, of weights or of training, on any mesh.

    abstract_params, abstract_bias: the results of `abstract_weights`, with the shardings to load the weights to.
        Adapters of a run that has some are loaded beside their base if they are in it, and merged into it if not.
        Layers of multi-token prediction are not read if they are not in it.
    step: a checkpoint of a training run; by default the newest. Its optimizer state is not read.
    cast: True converts between float32 and bfloat16; False refuses a dtype that differs.
    average: True gives the average of the weights (`optim.ema`) instead, in the dtype of the parameters. What has no
        average, router biases and frozen parameters, is that of the checkpoint.
    Raises CheckpointError that names the first parameter whose presence, shape or dtype differs, and for a checkpoint
    without an average.
    """
    return _load(Path(workdir).expanduser(), abstract_params, abstract_bias, step, cast, average)[:3]


def load_identified(workdir: Path, abstract_params: dict, abstract_bias: dict, step: int) -> tuple[dict, dict, str]:
    """Parameters and router biases of a checkpoint, as `load_weights`, and the fingerprint of what the files hold."""
    params, bias, _, found = _load(workdir, abstract_params, abstract_bias, step, False, False, identify=True)
    return params, bias, found


def _load(
    workdir: Path, abstract_params: dict, abstract_bias: dict, step: int | None, cast: bool, average: bool,
    identify: bool = False,
) -> tuple[dict, dict, list[dict], str]:  # fmt: skip
    """The results of `load_weights`, and with `identify` the fingerprint of what the files hold."""
    if not workdir.is_dir():
        raise CheckpointError(f"{workdir}: no such run directory")
    with Checkpoints(workdir) as checkpoints:
        step, saved = checkpoints.contents(step)
        alone = base.has_adapters_only(saved)
        if not alone:
            params, bias, data = _read(checkpoints, step, saved, abstract_params, abstract_bias, cast, average)
    if alone:
        params, bias, data, below = _read_adapters(workdir, step, abstract_params, abstract_bias, cast, average)
    found = ""
    if identify:
        with jax.set_mesh(jax.tree.leaves(abstract_params)[0].sharding.mesh):
            found = base.fingerprint(*below) if alone else base.fingerprint(params, bias)
    params, bias = jax.tree.map(_cast, (params, bias), (abstract_params, abstract_bias))
    origin = data.get("origin", [])
    if "step" in saved:
        origin = [*origin, {"event": "train", "workdir": str(workdir), "steps": step, "tokens": data.get("tokens")}]
        origin[-1] |= {"weights": "ema"} if average else {}
    return params, bias, origin, found


def _cast(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return x if x.dtype == like.dtype else jnp.astype(x, like.dtype)


def _read(
    checkpoints: Checkpoints, step: int, saved: dict, abstract_params: dict, abstract_bias: dict, cast: bool,
    average: bool,
) -> tuple[dict, dict, dict]:  # fmt: skip
    """The parameters, router biases and data state of a checkpoint, in the dtypes of its files. saved: its contents."""
    want = {"params": abstract_params, "router_bias": abstract_bias}
    rest = {name: jax.tree.map(lambda _: PLACEHOLDER, saved[name]) for name in saved if name not in want}
    both = {name: split(saved.get(name) or {}, model.is_prediction) for name in want}
    if "mtp" in want["params"]:
        both = {name: ({}, saved.get(name) or {}) for name in want}
    unread, have = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
    as_saved = jax.tree.map(_in_dtype_of, want, have) if cast and _alike(want, have) else want
    check_fits(as_saved, have, checkpoints.name(step))
    unread = jax.tree.map(lambda _: PLACEHOLDER, unread)
    targets = {**rest, **{n: as_saved[n] | unread[n] for n in want if n in saved}}
    targets = _targets_of_average(targets, saved, checkpoints.name(step)) if average else targets
    state, (data, *_) = checkpoints.read(targets, step)
    loaded = {name: state.get(name) or {} for name in want}
    if average:
        loaded["params"] = nest(flatten(loaded["params"]) | flatten(state["opt_state"]["ema"]))
    loaded = {name: {key: x for key, x in tree.items() if key not in unread[name]} for name, tree in loaded.items()}
    return loaded["params"], loaded["router_bias"], data


def _read_adapters(
    workdir: Path, step: int, abstract_params: dict, abstract_bias: dict, cast: bool, average: bool
) -> tuple[dict, dict, dict, tuple]:
    """The same of a run with adapters, with its base. Without adapters in `abstract_params` they are merged into it.

    The last result are the arguments of `base.fingerprint`.
    """
    cfg, where = load_config(workdir), f"{workdir}, step {step}"
    mesh = jax.tree.leaves(abstract_params)[0].sharding.mesh
    wanted, of_base = split(abstract_params, lora.is_adapter)
    want, own = {"params": of_base, "router_bias": abstract_bias}, abstract_weights(cfg.model.base, mesh)
    have = dict(zip(want, own, strict=True))
    check_fits(jax.tree.map(_in_dtype_of, want, have) if cast and _alike(want, have) else want, have, where)
    adapters, data = load_adapters(workdir, cfg, mesh, step, average)
    if "base" not in data:
        raise CheckpointError(f"{where} holds adapters, but does not say of which base")
    params, bias, _, _ = load_base(workdir, cfg, *own, data["base"])  # in its own dtype, in which it was trained
    below = f"{data['base']['fingerprint']} {cfg.model.lora.scale!r}"
    if not wanted:
        with jax.set_mesh(mesh):
            params = lora.merge(params, adapters, cfg.model.lora.scale)
    return join(params, adapters) if wanted else params, bias, data, (adapters, {}, below)


def load_adapters(
    workdir: str | os.PathLike, cfg: config.RunConfig, mesh: Mesh, step: int | None = None, average: bool = False
) -> tuple[dict, dict]:
    """The adapters of a run alone, or their average, and the data state of the checkpoint.

    step: by default the newest.
    """
    abstract, _ = split(abstract_weights(cfg.model, mesh)[0], lora.is_adapter)
    with Checkpoints(workdir) as checkpoints:
        step, saved = checkpoints.contents(step)
        adapters, _, data = _read(checkpoints, step, saved, abstract, {}, False, average)
    return adapters, data


def load_base(
    workdir: str | os.PathLike,
    cfg: config.RunConfig,
    abstract_params: dict,
    abstract_bias: dict,
    record: dict[str, Any] | None = None,
    average: bool = False,
) -> tuple[dict, dict, list[dict], dict[str, Any]]:
    """Parameters, router biases and origin of the base of a run with adapters, and the record that names it.

    abstract_params, abstract_bias: of the model without adapters. record: of a checkpoint of the run; None before the
        first, when the base is the newest checkpoint of `init_from`, or the average of its weights.
    Raises CheckpointError if the base is not there, or is another one than the record's.
    """
    folder = base.folder_of(Path(workdir), record["from"] if record else cfg.init_from)
    step = record["step"] if record else None
    if step is None:
        with Checkpoints(folder) as checkpoints:
            step = checkpoints.latest()
    average = record["average"] if record else average
    params, bias, origin, found = _load(folder, abstract_params, abstract_bias, step, True, average, identify=True)
    if record:
        base.check(Path(workdir), folder, record, found)
    made = {"from": cfg.init_from, "step": step, "average": average, "fingerprint": found}
    made |= {"imported_from": base.imported_from(origin)}
    return params, bias, origin, record or made


def continues(cfg: config.RunConfig) -> bool:
    """Whether a new run goes on with the adapters of `cfg.init_from`: it has the same matrices, rank and scale.

    Other adapters there are merged into the base.
    """
    if not (cfg.model.lora.rank and cfg.init_from):
        return False
    theirs = load_config(Path(cfg.init_from).expanduser()).model
    if not theirs.lora.rank or not math.isclose(theirs.lora.scale, cfg.model.lora.scale):
        return False
    shapes = lambda m: {path: x.shape for path, x in flatten(model.abstract(m).shapes).items() if lora.is_adapter(path)}
    return shapes(theirs) == shapes(cfg.model)


def load_start(
    workdir: str | os.PathLike, cfg: config.RunConfig, mesh: Mesh, average: bool = False
) -> tuple[dict, dict, list[dict], dict[str, Any] | None]:
    """Parameters, router biases and origin that a new run of `init_from` starts from, and the record of its base.

    The record is None without adapters. There are none among the parameters if they are to be fresh; so it is with
    layers of multi-token prediction.
    average: of the weights of `init_from`, or of its adapters where the run goes on with them.
    """
    has_mtp = bool(load_config(Path(cfg.init_from).expanduser()).model.mtp_layers)
    abstract = abstract_weights(cfg.model.base if has_mtp else cfg.model.base.without_mtp, mesh)
    if not cfg.model.lora.rank:
        return *load_weights(cfg.init_from, *abstract, cast=True, average=average), None
    if not continues(cfg):
        return load_base(workdir, cfg, *abstract, average=average)
    source = Path(cfg.init_from).expanduser()
    adapters, data = load_adapters(source, load_config(source), mesh, average=average)
    params, bias, _, record = load_base(source, cfg, *abstract, data["base"])
    place = base.folder_of(source, record["from"])
    record = record | ({"from": str(place.resolve())} if place == source / base.LINK else {})
    event = {"event": "adapters", "from": cfg.init_from, "tokens": data.get("tokens")}
    event |= {"weights": "ema"} if average else {}
    return join(params, adapters), bias, [*data.get("origin", []), event], record


def describe_start(cfg: config.RunConfig, average: bool) -> str:
    """One line about what `load_start` loads."""
    goes_on = continues(cfg)
    what = ("average of the " if average else "") + ("adapters" if goes_on else "weights")
    has_merged = not goes_on and load_config(Path(cfg.init_from).expanduser()).model.lora.rank
    how = " and their base" if goes_on else ", its adapters merged" if has_merged else ""
    fresh = ", with fresh adapters and" if cfg.model.lora.rank and not goes_on else ", with"
    theirs, ours = load_config(Path(cfg.init_from).expanduser()).model.mtp_layers, cfg.model.mtp_layers
    fresh = ", with fresh layers of multi-token prediction and" if ours and not theirs else fresh
    how += ", without its layers of multi-token prediction" if theirs and not ours else ""
    return f"starting from the {what} of {cfg.init_from}{how}{fresh} a fresh optimizer state"


def restore(
    workdir: str | os.PathLike, checkpoints: Checkpoints, cfg: config.RunConfig, mesh: Mesh
) -> tuple[TrainState, dict[str, Any], dict[str, Any] | None]:
    """The newest state of a training run with its base, what else the checkpoint holds, and the record of the base."""
    state, data = checkpoints.restore(base.kept(cfg, abstract_state(cfg, mesh)))
    if not cfg.model.lora.rank:
        return state, data, None
    abstract = abstract_weights(cfg.model.base, mesh)
    params, bias, _, record = load_base(workdir, cfg, *abstract, data["base"])
    return state._replace(params=join(params, state.params), router_bias=bias), data, record


def _targets_of_average(targets: dict, saved: dict, where: str) -> dict:
    """What to read for the average of the weights: `opt_state/ema`, sharded as the parameters, instead of those."""
    parts, params = saved.get("opt_state"), flatten(targets["params"])
    average = flatten(parts.get("ema", {})) if isinstance(parts, dict) else {}
    if not average:
        raise CheckpointError(f"{where} has no average of the weights (optim.ema=0); nearest valid: the trained ones")
    like = lambda x, a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=x.sharding)
    is_read = lambda path: params[path] is not PLACEHOLDER
    ema = nest({path: like(params[path], a) if is_read(path) else PLACEHOLDER for path, a in average.items()})
    rest = {path: PLACEHOLDER if path in average else x for path, x in params.items()}
    return targets | {"params": nest(rest), "opt_state": targets["opt_state"] | {"ema": ema}}


def _alike(want: dict, have: dict) -> bool:
    return jax.tree.structure(want) == jax.tree.structure(jax.tree.map(lambda _: 0, have))


def _in_dtype_of(want: jax.ShapeDtypeStruct, have: Any) -> jax.ShapeDtypeStruct:
    both = {str(want.dtype), str(have.dtype)} <= set(CASTABLE)
    return jax.ShapeDtypeStruct(want.shape, have.dtype if both else want.dtype, sharding=want.sharding)


def check_same_model(cfg: config.RunConfig) -> list[str]:
    """Checks from config.json, before compilation, that the weights of `cfg.init_from` are of the model `cfg.model`.

    Returns lines about permitted differences: how the model is computed, the dtype of its weights, and fields that
    describe the same function in another way (`config.plain`), and one about rounded weights.
    Raises ConfigError if `init_from` is not a run directory, has another number of layers of multi-token prediction, or
    has rounded weights that are to be the base of adapters; CheckpointError with the fields of another model.
    """
    path = Path(cfg.init_from).expanduser()
    if not (path / "config.json").is_file():
        runs = [p.as_posix() for p in sorted(path.parent.glob("*")) if (p / "config.json").is_file()]
        close = difflib.get_close_matches(path.as_posix(), runs, 1, 0.0)
        hint = f"nearest valid: {close[0]!r}" if close else "import or train one first"
        raise ConfigError("init_from", cfg.init_from, "is not a run directory", hint)
    theirs, ours = load_config(path).model.mtp_layers, cfg.model.mtp_layers
    rule = f"must be the number of {cfg.init_from}, {theirs}, or 0"
    require(theirs == ours or not (theirs and ours), "model.mtp_layers", ours, rule, f"nearest valid: {theirs}")
    new, old = (flatten_config({"model": config.to_dict(c.model)}) for c in (cfg, load_config(path)))
    lines = {
        name: f"config.{name}: {json.dumps(old[name])} in {cfg.init_from}, {json.dumps(new[name])} now"
        for name in new
        if not config.same_value(new[name], old[name])
    }
    refused = [line for name, line in lines.items() if not config.is_machine(name)]
    if refused and not _same_function(cfg.model, load_config(path).model):
        raise CheckpointError(f"config.init_from={cfg.init_from!r} has another model ({'; '.join(refused[:5])})")
    labels = [c.data.labels for c in (load_config(path), cfg)]
    moved = cfg.model.labels and not same_labels(*labels)
    told = f"config.data.labels: {json.dumps(labels[0])} in {cfg.init_from}, {json.dumps(labels[1])} now"
    return [*lines.values(), *([told] if moved else []), *_about_rounded(cfg, path)]


def _about_rounded(cfg: config.RunConfig, path: Path) -> list[str]:
    """A line if the weights of a run directory are rounded (quant/). Raises ConfigError if they shall have adapters."""
    with Checkpoints(path) as checkpoints:
        data = checkpoints.data_state() or {}
    # A training run counts tokens, and keeps the origin of the weights that it started from, not of its own.
    found = None if "tokens" in data else base.rounded_by(data.get("origin", []))
    if not found:
        return []
    base.check_not_rounded(found, cfg.init_from, cfg.model.lora.rank)
    return [f"config.init_from: the weights of {cfg.init_from} are rounded; training moves them off their grids"]


def _same_function(a: config.ModelConfig, b: config.ModelConfig) -> bool:
    one, other = (flatten_config({"model": config.to_dict(config.plain(x))}) for x in (a, b))
    return all(config.same_value(one[name], other[name]) for name in one if not config.is_machine(name))
