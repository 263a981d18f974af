"""Weights without a training run around them: what import and upcycling write, and what `config.init_from` reads.

A run directory of weights holds `config.json` and `checkpoints/0/`, whose `state` item has only `params/…` and
`router_bias/…`, and whose `data` item is `{"origin": [...]}`: how the weights came to be, the first event first.
Reading works on such a directory and on one of train.py alike.
"""

import difflib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.checkpoint import PLACEHOLDER, CheckpointError, Checkpoints, barrier, check_fits
from moe_jax.config_file import load_config, save_config

CASTABLE = ("float32", "bfloat16")
HOST_BYTES = 2 * 2**30  # on their way from the devices to the disk


def check_free(workdir: str | os.PathLike) -> Path:
    """The path of a run directory yet to be made, `~` and links followed.

    Raises CheckpointError if there is anything in it, or if it cannot be made: before the work, not at its end.
    """
    try:
        path = Path(workdir).expanduser().resolve()
        above = next(p for p in path.parents if p.exists())
        free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except (OSError, RuntimeError) as e:  # a link to itself, no home, a directory that may not be read
        raise CheckpointError(f"{workdir}: cannot be made: {e}") from None
    if not free:
        raise CheckpointError(f"{path} is not empty: weights are written to a new run directory only")
    if path.is_dir() and os.path.ismount(path):
        raise CheckpointError(f"{path} is a mount point, which nothing can replace: name a new directory in it")
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
) -> None:
    """Makes a run directory of weights, all of it or nothing: a failure leaves the place as it was.

    origin: one JSON object for each thing that happened to the weights, the latest last.
    files: more to put in the directory, by name (a tokenizer).
    Raises CheckpointError for a directory that is not empty. Every process calls this.
    """
    path = check_free(workdir)
    partial = path.with_name(f".{path.name}.partial")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)  # of an attempt that was killed
    barrier("weights: begin")
    try:
        save_config(partial, cfg)
        barrier("weights: config")
        with Checkpoints(partial, keep=1, host_bytes=HOST_BYTES) as checkpoints:
            state = {"params": params, "router_bias": router_bias}
            checkpoints.save(0, state, {"origin": origin}, wait=True)
        if first:
            for name, data in (files or {}).items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_bytes(data)
            os.replace(partial, path)  # an empty directory gives way
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
) -> tuple[dict, dict, list[dict]]:
    """Parameters, router biases and origin of a run directory, of weights or of training, on any mesh.

    abstract_params, abstract_bias: as in `step.abstract_weights`, with the shardings to load them to.
    step: a checkpoint of a training run; by default the newest. Its optimizer state is not read.
    cast: float32 and bfloat16 may stand for each other; else a dtype that differs is refused.
    Raises CheckpointError naming the first parameter whose presence, shape or dtype differs.
    """
    workdir = Path(workdir).expanduser()
    if not workdir.is_dir():
        raise CheckpointError(f"{workdir}: no such run directory")
    want = {"params": abstract_params, "router_bias": abstract_bias}
    with Checkpoints(workdir) as checkpoints:
        step, saved = checkpoints.contents(step)
        rest = {name: jax.tree.map(lambda _: PLACEHOLDER, saved[name]) for name in saved if name not in want}
        have = {name: saved.get(name) or {} for name in want}
        as_saved = jax.tree.map(_in_dtype_of, want, have) if cast and _alike(want, have) else want
        check_fits(as_saved, have, checkpoints.name(step))
        state, (data, *_) = checkpoints.read({**rest, **{n: as_saved[n] for n in want if n in saved}}, step)
    loaded = {name: state.get(name) or {} for name in want}
    loaded = jax.tree.map(lambda x, a: x if x.dtype == a.dtype else jnp.astype(x, a.dtype), loaded, want)
    origin = data.get("origin", [])
    if "step" in saved:
        origin = [*origin, {"event": "train", "workdir": str(workdir), "steps": step, "tokens": data.get("tokens")}]
    return loaded["params"], loaded["router_bias"], origin


def _alike(want: dict, have: dict) -> bool:
    return jax.tree.structure(want) == jax.tree.structure(jax.tree.map(lambda _: 0, have))


def _in_dtype_of(want: jax.ShapeDtypeStruct, have: Any) -> jax.ShapeDtypeStruct:
    both = {str(want.dtype), str(have.dtype)} <= set(CASTABLE)
    return jax.ShapeDtypeStruct(want.shape, have.dtype if both else want.dtype, sharding=want.sharding)


def check_same_model(cfg: config.RunConfig) -> list[str]:
    """That the weights of `cfg.init_from` are of the model `cfg.model`: from its config.json, before compilation.

    Returns lines about what may differ: how the model is computed, the dtype its weights are in, fields that say the
    same function otherwise (`config.plain`).
    Raises ConfigError for what is no run directory, CheckpointError with the fields that make it another model.
    """
    path = Path(cfg.init_from).expanduser()
    if not (path / "config.json").is_file():
        near = [p.as_posix() for p in sorted(path.parent.glob("*")) if (p / "config.json").is_file()]
        close = difflib.get_close_matches(path.as_posix(), near, 1, 0.0)
        hint = f"nearest valid: {close[0]!r}" if close else "import or train one first"
        raise config.ConfigError("init_from", cfg.init_from, "is not a run directory", hint)
    new, old = (_fields({"model": config.to_dict(c.model)}) for c in (cfg, load_config(path)))
    lines = {
        name: f"config.{name}: {json.dumps(old[name])} in {cfg.init_from}, {json.dumps(new[name])} now"
        for name in new
        if new[name] != old[name]
    }
    refused = [line for name, line in lines.items() if not config.is_machine(name)]
    if refused and not _same_function(cfg.model, load_config(path).model):
        raise CheckpointError(f"config.init_from={cfg.init_from!r} has another model ({'; '.join(refused[:5])})")
    return list(lines.values())


def _same_function(a: config.ModelConfig, b: config.ModelConfig) -> bool:
    one, other = (_fields({"model": config.to_dict(config.plain(x))}) for x in (a, b))
    return not any(one[name] != other[name] for name in one if not config.is_machine(name))


def _fields(values: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {name: values}
    return {k: v for key, item in values.items() for k, v in _fields(item, f"{name}.{key}" if name else key).items()}
