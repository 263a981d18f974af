"""Saves and restores checkpoints with Orbax.

A checkpoint is `<workdir>/checkpoints/<step>/`. It is complete or absent, and holds exactly two items:

- `state`: every leaf of `TrainState` (step, parameters, router bias, optimizer state), each a named array in its own
  dtype. The names are the paths through the pytree, so reading a checkpoint needs no class of the version that wrote
  it.
- `data`: the iterator state of the input pipeline as JSON, with one entry for each process if they differ.

Beside them are the checksums of all files, which are compared before anything is read (moe_jax/run/checksums.py).
`<workdir>/config.json` tells what the arrays mean (moe_jax/run/config_file.py). There is no pickle anywhere.

The same command resumes a run. It starts from
    1. the newest complete checkpoint in the run directory, if there is one, or the one of `--resume_step`;
    2. else the weights of `init_from` (imported or upcycled);
    3. else fresh weights.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost
from orbax.checkpoint import v1 as ocp

from moe_jax.errors import CheckpointError
from moe_jax.run import checksums, retention
from moe_jax.tree import flatten

BARRIER_MS = 20 * 60 * 1000  # a process may still be writing its part of a large model
PLACEHOLDER = ocp.PLACEHOLDER  # `...`: a leaf of `abstract_state` that `restore` leaves out
# Orbax lists folders with a glob of their full path (etils' epath), and treats "gs:/" in it as a scheme. With such a
# path it would silently find nothing, or the files of another run, so it is given a link instead.
_TAKEN_FOR_A_PATTERN = re.compile(r"[*?\[\\]|:/")


def barrier(name: str) -> None:
    """Waits until all processes are here, by JAX's coordinator: an exchange between devices may hang on a CPU that has
    fewer cores than devices."""
    if jax.process_count() > 1:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_MS)


# --- the two items ---------------------------------------------------------------------------------------------------


def check_fits(abstract_state: Any, saved: Any, where: str) -> None:
    """Raises CheckpointError for the first leaf whose presence, shape or dtype differs in the checkpoint."""
    want, have = flatten(abstract_state), flatten(saved)
    if "step" in want and "step" not in have:
        raise CheckpointError(
            f"{where} holds weights only: name its run directory in config.init_from, and another workdir"
        )
    for name, leaf in want.items():
        if name not in have:
            raise CheckpointError(f"{where} has no {name}, which this model has; it was saved from another model")
        if leaf is PLACEHOLDER:
            continue
        for field in ("shape", "dtype"):
            if getattr(have[name], field) != getattr(leaf, field):
                values = getattr(have[name], field), getattr(leaf, field)
                raise CheckpointError(f"{where}: {name} has {field} {values[0]}, this model needs {values[1]}")
        if leaf.sharding is None:
            raise CheckpointError(f"abstract_state: {name} has no sharding, so there is nowhere to restore it to")
    extra = [name for name in have if name not in want]
    if extra:
        raise CheckpointError(
            f"{where} has {extra[0]}, which this model does not have ({len(extra)} such); nothing is dropped silently"
        )


def gather_json(value: Any) -> list[Any]:
    """The values of all processes, in order; one entry if all are equal."""
    try:
        text = json.dumps(value, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"the data state cannot be saved as JSON: {e}") from None
    if jax.process_count() == 1:
        return [json.loads(text)]
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(mine.size))).reshape(-1)
    padded = np.pad(mine, (0, int(sizes.max()) - mine.size))
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    texts = [bytes(row[:size]).decode() for row, size in zip(rows.astype(np.uint8), sizes, strict=True)]
    return [json.loads(t) for t in (texts[:1] if len(set(texts)) == 1 else texts)]


def _own_json(values: list[Any], where: str) -> Any:
    """This process's entry of the result of `gather_json`."""
    if len(values) == 1:
        return values[0]
    if len(values) != jax.process_count():
        raise CheckpointError(
            f"{where}: its data state is of {len(values)} processes that read different data, but this run has "
            f"{jax.process_count()}; resume with {len(values)} processes"
        )
    return values[jax.process_index()]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# --- save and restore ------------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run directory. Every process makes one and calls the same methods in the same order.

    keep: number of newest checkpoints that are kept. None opens the directory for reading only, while another run may
        write to it: nothing is created, cleaned or deleted.
    keep_every: checkpoints of steps that this number divides are kept too; 0: none.
    keep_best: number of checkpoints with the lowest score that are kept too.
    host_bytes: approximate limit of the state's bytes on the host while it is saved, at least one array's part. None:
        no limit, which delays training the least.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        keep: int | None = None,
        host_bytes: int | None = None,
        keep_every: int = 0,
        keep_best: int = 0,
    ):
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._keep, self._host_bytes = keep, host_bytes
        self.scores: dict[int, float] = {}  # held-out loss by step, where it is known
        self._policy = ocp.training.preservation_policies.PreserveAll()
        if keep is not None:
            self._policy = retention.Keep(keep, keep_every, keep_best, self.scores)
        self._checksum_writer: checksums.ChecksumWriter | None = None
        self._response: Any = None  # Orbax's response for the save in progress
        self._saving: int | None = None
        self._expected: dict[str, tuple] = {}  # shapes and dtypes that the save in progress has to write
        self._link: Path | None = None
        self._at: int | None = None  # the step last saved or restored through this object
        self._orbax: ocp.training.Checkpointer | None = None
        if keep is not None or self.directory.is_dir():
            self._open()

    def _path(self) -> Path:
        """A path of the directory that Orbax does not read as a pattern."""
        if not _TAKEN_FOR_A_PATTERN.search(str(self.directory)):
            return self.directory
        if self._link is None:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self._link = Path(tempfile.mkdtemp(prefix="moe_jax-")) / "run"
            os.symlink(self.directory.parent, self._link)
        return self._link / self.directory.name

    def _unlink(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.unlink()
            link.parent.rmdir()

    def _open(self) -> None:
        registry = ocp.handlers.local_registry()
        # The default handler stores a dict of numbers as arrays.
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
        context = ocp.Context()
        context.checkpointables.registry = registry
        context.memory.transfer_concurrent_bytes = self._host_bytes
        self._orbax = ocp.training.Checkpointer(
            self._path(),
            context=context,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the caller decides when
            preservation_policy=self._policy,
            cleanup_tmp_directories=self._keep is not None,
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, after waiting for a save in progress; None if there is none."""
        if self._orbax is None and self.directory.is_dir():
            self._open()
        if self._orbax is None:
            return None
        self.wait()
        if self._keep is None:
            self._orbax.reload()  # another process may have written
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return [] if self.latest() is None else sorted(c.step for c in self._orbax.checkpoints)

    def save(self, step: int, state: Any, data_state: Any, *, wait: bool = False) -> None:
        """Saves state and data state together, in the background. The caller may donate the arrays at once.

        state: any pytree of `jax.Array`s. data_state: JSON values (a tuple comes back as a list).
        A step that this object has just saved or restored is not written again. The next call raises CheckpointError
        for a failure in the background, such as a full disk. So does a step that is not after the newest.
        """
        if self._keep is None:
            raise CheckpointError(f"{self.directory} is open for reading only; give Checkpoints a keep=")
        newest = self.latest()
        if not step == newest == self._at:
            if newest is not None and step <= newest:
                raise CheckpointError(
                    f"{self.directory} already has step {newest}; an earlier step {step} cannot be saved after it"
                )
            items = {"state": state, "data": {"processes": gather_json(data_state)}}
            with self._named(step):
                self._response = self._orbax.save_checkpointables_async(step, items, force=True)
                if self._response is None:
                    raise CheckpointError(f"{self.directory}: Orbax refused to save step {step}")
            self._at = self._saving = step
            self._expected = {name: (leaf.shape, leaf.dtype) for name, leaf in flatten(state).items()}
            if jax.process_index() == 0:
                self._checksum_writer = checksums.ChecksumWriter(self.directory / str(step))
        if wait:
            self.wait()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, Any]:
        """State and data state of a step (the newest by default), on any mesh.

        abstract_state: the state's pytree of `jax.ShapeDtypeStruct`, each with the sharding to restore it to. A leaf
            `...` is not read and comes back as `...`, such as an optimizer state that evaluation does not need.
        Raises CheckpointError that names the first parameter whose presence, shape or dtype differs. Nothing is cast.
        """
        step, saved = self.contents(step)
        check_fits(abstract_state, saved, self.name(step))
        state, data = self.read(abstract_state, step)
        self._at = step
        return state, _own_json(data, self.name(step))

    def _verify(self, step: int) -> None:
        """Raises CheckpointError if a file of the checkpoint differs from its checksum."""
        found = [checksums.damage(self.directory / str(step)) if jax.process_index() == 0 else ""]
        if jax.process_count() > 1:
            found = [text for text in gather_json(found[0]) if text != ""]
        if None in found and jax.process_index() == 0:
            print(
                f"{self.name(step)} has no checksums, so it is read without verification", file=sys.stderr, flush=True
            )
        if damage := next(filter(None, found), ""):
            before = [s for s in self.steps() if s < step]
            resume = f"--resume_step={before[-1]} resumes from the one before" if before else "there is none before it"
            raise CheckpointError(f"{self.name(step)} is damaged: {damage}; {resume}")

    def rewind(self, step: int) -> list[int]:
        """Moves the checkpoints after `step` to `<workdir>/checkpoints.dropped/`, and returns their steps.

        Call it before any other method of this object. Raises CheckpointError if `step` is not a checkpoint.
        """
        steps = self.steps()
        if step not in steps:
            has = f"nearest valid: {min(steps, key=lambda s: abs(s - step))}" if steps else "the run has none"
            raise CheckpointError(f"--resume_step={step}: is not a checkpoint of the run; {has}")
        later = [s for s in steps if s > step]
        self.close()
        self._set_aside(later)
        barrier("rewind")
        self._open()
        return later

    def name(self, step: int) -> str:
        """The path of a checkpoint, for messages."""
        return str(self.directory / str(step))

    def contents(self, step: int | None = None) -> tuple[int, Any]:
        """A step (the newest by default), and the nested dicts of its state's shapes and dtypes.

        Raises CheckpointError if a file differs from its checksum.
        """
        newest = self.latest()
        if newest is None:
            raise CheckpointError(f"{self.directory} has no complete checkpoint")
        step = newest if step is None else step
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(f"{self.directory} has no step {step}; it has {', '.join(map(str, steps))}")
        self._verify(step)
        try:  # a process killed while it deletes an old checkpoint leaves some of its files
            saved = self._orbax.checkpointables_metadata(step).metadata["state"]
        except Exception as e:
            raise CheckpointError(f"{self.name(step)} cannot be read: {_first_line(e)}") from e
        if not flatten(saved):
            raise CheckpointError(f"{self.name(step)} cannot be read: some of its files are missing")
        return step, saved

    def read(self, abstract_state: Any, step: int) -> tuple[Any, list[Any]]:
        """State and the data states of all processes (one if they are equal), without any check."""
        try:
            items = self._orbax.load_checkpointables(step, {"state": abstract_state, "data": None})
            return items["state"], list(items["data"]["processes"])
        except Exception as e:
            raise CheckpointError(f"{self.name(step)} cannot be read: {_first_line(e.__cause__ or e)}") from e

    def data_state(self, step: int | None = None) -> Any:
        """The first process's data state of a step (the newest by default); None if there is no such step.

        Checksums are not compared here; `restore` does that.
        """
        if self.latest() is None or step not in (None, *self.steps()):
            return None
        step = self.latest() if step is None else step
        try:
            return self._orbax.load_checkpointables(step, {"data": None})["data"]["processes"][0]
        except Exception as e:
            raise CheckpointError(f"{self.name(step)} cannot be read: {_first_line(e.__cause__ or e)}") from e

    def wait(self) -> None:
        """Waits until the save in progress is complete. Raises CheckpointError if it failed."""
        if self._orbax is not None:
            self._settle(self._orbax.wait)

    def close(self) -> None:
        """Completes the save in progress. Closing twice does nothing."""
        orbax, self._orbax = self._orbax, None
        try:
            if orbax is not None:
                self._settle(orbax.close)
        finally:
            self._unlink()

    def _settle(self, end: Callable[[], None]) -> None:
        writer, self._checksum_writer = self._checksum_writer, None
        response, self._response = self._response, None
        expected, self._expected = self._expected, {}
        with self._named(self._saving), contextlib.ExitStack() as after:
            if writer is not None:
                after.callback(writer.finish)
            if response is not None:
                # Without this, Orbax's thread and event loop of the save would never end.
                after.callback(response.result)
            end()
        if expected:
            self._check_written(self._saving, expected)

    def _check_written(self, step: int, expected: dict[str, tuple]) -> None:
        """Raises CheckpointError if an array of a save is not on the disk, and moves the checkpoint out of the way."""
        try:
            saved = ocp.checkpointables_metadata(self._path() / str(step)).metadata["state"]
            found = {name: (leaf.shape, leaf.dtype) for name, leaf in flatten(saved).items()}
        except Exception as e:
            why = _first_line(e)
        else:
            why = next((f"{name} is not in it" for name in expected if found.get(name) != expected[name]), "")
        if why:
            self._at = None
            self._set_aside([step])
            if self._orbax is not None:
                self._orbax.reload()
            raise CheckpointError(f"{self.name(step)} could not be saved: {why}; earlier checkpoints are intact")

    def _set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints to `<workdir>/checkpoints.dropped/`, under a new name if there is one of the same step."""
        for name in map(str, steps if jax.process_index() == 0 else []):
            aside = self.directory.with_name("checkpoints.dropped") / name
            free = (aside.with_name(f"{name}.{n}") for n in itertools.count(2))
            while aside.exists():
                aside = next(free)
            if (self.directory / name).is_dir():
                aside.parent.mkdir(exist_ok=True)
                os.rename(self.directory / name, aside)

    @contextlib.contextmanager
    def _named(self, step: int | None) -> Iterator[None]:
        """Turns an exception while saving a step into a CheckpointError of one line."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as e:
            if step is None:
                raise
            self._at = None
            full = isinstance(e, OSError) and e.errno == errno.ENOSPC
            why = "no space left on the device" if full else _first_line(e.__cause__ or e)
            raise CheckpointError(f"{self.name(step)} could not be saved: {why}; earlier checkpoints are intact") from e

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()
