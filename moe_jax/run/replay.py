"""Dumps the step that stopped a run, and replays it: `python train.py … --replay=<workdir>/dumps/<step>`.

A dump is a run directory of its own: `config.json`, `checkpoints/<step before>` with the state before the step,
`batch_<process>.npz` with the rows of each process, and `dump.json` with the results. Any mesh and any number of
processes can replay it.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import RunConfig
from moe_jax.errors import BadNumbers, CheckpointError
from moe_jax.run import checkpoint, config_file, teacher
from moe_jax.train import guard, step
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import TrainState, abstract_state, process_rows, put_batch
from moe_jax.tree import path_of


def dump(
    workdir: Path,
    cfg: RunConfig,
    state: TrainState,
    rows: Mapping[str, np.ndarray],
    skip: guard.Skip,
    limits: np.ndarray | None,
    of_teacher: dict[str, Any] | None = None,
) -> Path:
    """Writes the dump of a skipped step and returns its folder. Every process writes its own rows.

    state: the state after the step, of which a skipped step changes only the count. rows: the rows of this process.
    of_teacher: its record, if the run has one.
    """
    folder = _free(Path(workdir) / "dumps" / str(skip.step), cfg)
    config_file.save_config(folder, cfg)
    with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
        if checkpoints.latest() is None:  # else an earlier start of this run stopped at the same step
            data = {"teacher": of_teacher} if of_teacher else {}
            checkpoints.save(skip.step - 1, state._replace(step=state.step - 1), data)
    np.savez(folder / f"batch_{jax.process_index()}.npz", **rows)
    if jax.process_index() == 0:
        bounds = None if limits is None else [str(x) for x in limits]
        result = {"loss": str(skip.loss), "grad_norm": str(skip.grad_norm), "reason": skip.reason, "limits": bounds}
        (folder / "dump.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return folder


def _free(folder: Path, cfg: RunConfig) -> Path:
    """The folder of a dump: `folder`, or a new one beside it if that has a dump of a start with another config."""
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}.{n}") for n in itertools.count(2)))
    other = lambda name: (name / config_file.NAME).exists() and config_file.differences(name, cfg)
    return next(name for name in names if not other(name))


def give_up(workdir: Path, cfg: RunConfig, state, rows, skip: guard.Skip, limits, of_teacher=None) -> None:
    """Dumps the step and raises BadNumbers with a message that names the dump."""
    folder = dump(workdir, cfg, state, rows, skip, limits, of_teacher)
    raise BadNumbers(
        f"step {skip.step}: {cfg.train.max_skipped} steps in a row were skipped (train.max_skipped), the last: "
        f"{skip.reason}; add --replay={folder} to the command to repeat it; all checkpoints are from before these steps"
    )


def _rows(folder: Path, wanted: list[int]) -> dict[str, np.ndarray]:
    parts = [np.load(path) for path in sorted(folder.glob("batch_*.npz"))]
    if not parts:
        raise CheckpointError(f"{folder} has no batch_0.npz, so it is not a dump; see dumps/ of a run directory")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0].files}
    _, first = np.unique(joined["sequence_ids"], return_index=True)  # several processes may have fed the same row
    return {name: values[first][wanted] for name, values in joined.items()}


def replay(cfg: RunConfig, mesh: Mesh, folder: Path) -> str:
    """Repeats the step. Returns lines with its numbers then and now, and every leaf that is not finite."""
    cfg, _ = config_file.resume(folder, cfg)
    rows = _rows(folder, process_rows(mesh, cfg.data.batch_size))
    then = json.loads((folder / "dump.json").read_text(encoding="utf-8"))
    with checkpoint.Checkpoints(folder) as checkpoints:
        state, saved = checkpoints.restore(abstract_state(cfg, mesh))
    taught = teacher.find(cfg, int(state.step), saved, mesh.shape["expert"])
    lesson, of = (teacher.load(taught, mesh)[0], taught.model) if taught else (None, None)
    batch = put_batch(rows, mesh, cfg)
    with jax.set_mesh(mesh):
        grads = jax.jit(make_gradients(cfg, mesh, None, of))(
            state.params, state.router_bias, batch, state.step, lesson
        ).grads
        broken = jax.device_get(jax.jit(_not_finite)({"params": state.params, "gradient": grads}))
    before = int(state.step)
    limits = then["limits"] and np.float32([float(x) for x in then["limits"]])
    _, report = step.make_train_step(cfg, mesh, None, of)(state, batch, limits, lesson)
    now = {name: str(float(getattr(report, name))) for name in guard.WATCHED}
    lines = [f"step {before + 1} repeated; it was skipped: {then['reason']}"]
    lines += [f"  {name}: {then[name]} then, {now[name]} now" for name in guard.WATCHED]
    same = bool(report.skipped) and all(then[name] == now[name] for name in guard.WATCHED)
    lines.append("  reproduced" if same else "  not reproduced bit for bit")
    for name, values in rows.items():
        if np.issubdtype(values.dtype, np.floating) and (bad := ~np.isfinite(values)).any():
            sequences = sorted(set(rows["sequence_ids"][np.nonzero(bad)[0]].tolist()))
            lines.append(f"  batch {name}: {bad.sum()} of {values.size} not finite, in sequences {sequences}")
    for path, count in jax.tree_util.tree_leaves_with_path(broken):
        if count:
            name = path_of(path)
            lines.append(f"  {name}: {int(count)} not finite")
    return "\n".join(lines)


def _not_finite(tree):
    return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x)), tree)
