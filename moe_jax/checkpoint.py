"""Checkpoints: save, restore and the rule of resuming, with Orbax.

A checkpoint is `<workdir>/checkpoints/<step>/`, committed as a whole or not at all, and holds exactly two items:

- `state`: every leaf of `step.TrainState` (step, parameters, router bias, optimizer state), one named array each, in
  its own dtype. The names are the paths through the pytree, so reading it needs no class from the past.
- `data`: the iterator state of the input pipeline as JSON, one entry a process where processes differ.

Beside them are the checksums of all files, compared before anything is read (moe_jax/checksums.py).

What the arrays mean is `<workdir>/config.json` (moe_jax/config_file.py). No pickle anywhere.

Resuming is the same command again:
    1. the newest complete checkpoint in the run directory, if there is one, or the one of `--resume_step`;
    2. else what the configuration starts from (imported or upcycled weights);
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

from moe_jax import checksums, preserve

BARRIER_MS = 20 * 60 * 1000  # a process may still be writing its part of a large model
PLACEHOLDER = ocp.PLACEHOLDER  # `...`: a leaf of `abstract_state` that `restore` leaves out
# Orbax lists folders with a glob of their whole path (etils' epath), and takes "gs:/" in it for a scheme. It would find
# nothing, or the files of another run, and go on. Such a path reaches it by a link.
_TAKEN_FOR_A_PATTERN = re.compile(r"[*?\[\\]|:/")


def barrier(name: str) -> None:
    """Waits until all processes are here, by JAX's coordinator: an exchange between devices may hang on a CPU that has
    fewer cores than devices."""
    if jax.process_count() > 1:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_MS)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read as asked, in one line."""


# --- the two items ---------------------------------------------------------------------------------------------------


def _key(entry: Any) -> str:
    """One step of a path, the same for an attribute, a dictionary key and an index (Orbax stores records as dicts)."""
    return str(next(getattr(entry, field) for field in ("name", "key", "idx") if hasattr(entry, field)))


def _leaves(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(map(_key, path)): leaf for path, leaf in leaves}


def check_fits(abstract_state: Any, saved: Any, where: str) -> None:
    """Raises CheckpointError for the first leaf that the checkpoint does not have exactly so."""
    want, have = _leaves(abstract_state), _leaves(saved)
    if "step" in want and "step" not in have:
        raise CheckpointError(
            f"{where} holds weights only: name its run directory in config.init_from, and another workdir"
        )
    for name, leaf in want.items():
        if name not in have:
            raise CheckpointError(f"{where} has no {name}, which this model has; it was saved from another one")
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
            f"{where} has {extra[0]}, which this model has not ({len(extra)} such); nothing is dropped silently"
        )


def gather_json(value: Any) -> list[Any]:
    """Every process's value, in order; one entry if all are equal."""
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
    """This process's entry of what `gather_json` returned."""
    if len(values) == 1:
        return values[0]
    if len(values) != jax.process_count():
        raise CheckpointError(
            f"{where}: its data state is of {len(values)} processes that read different parts, this run has "
            f"{jax.process_count()}; resume with {len(values)}"
        )
    return values[jax.process_index()]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# --- save and restore ------------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run directory. Every process makes one and calls the same methods in the same order.

    keep: how many of the newest checkpoints stay. None opens the directory for reading only, beside a run that may be
        writing to it: nothing is created, cleaned or deleted.
    keep_every, keep_best: besides, those of steps that `keep_every` divides, and so many with the lowest score.
    host_bytes: about so much of the state is on the host at a time while it is saved, at least one array's part; None:
        all of it, so that saving holds up training the least.
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
        self.scores: dict[int, float] = {}  # held-out loss by step, as far as it is known
        self._policy = ocp.training.preservation_policies.PreserveAll()
        if keep is not None:
            self._policy = preserve.Keep(keep, keep_every, keep_best, self.scores)
        self._sealer: checksums.Sealer | None = None
        self._response: Any = None  # what Orbax gave for the save under way
        self._saving: int | None = None
        self._expected: dict[str, tuple] = {}  # what the save under way has to write
        self._link: Path | None = None
        self._at: int | None = None  # the step last saved or restored through this object
        self._orbax: ocp.training.Checkpointer | None = None
        if keep is not None or self.directory.is_dir():
            self._open()

    def _path(self) -> Path:
        """The directory by a name that Orbax takes as it stands."""
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
        registry.add(
            ocp.handlers.JsonHandler, checkpointable_name="data"
        )  # the default stores a dict of numbers as arrays
        context = ocp.Context()
        context.checkpointables.registry = registry
        context.memory.transfer_concurrent_bytes = self._host_bytes
        self._orbax = ocp.training.Checkpointer(
            self._path(),
            context=context,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # when is the caller's say
            preservation_policy=self._policy,
            cleanup_tmp_directories=self._keep is not None,
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, after waiting for a save under way; None if there is none."""
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
        """Steps of the complete checkpoints, rising."""
        return [] if self.latest() is None else sorted(c.step for c in self._orbax.checkpoints)

    def save(self, step: int, state: Any, data_state: Any, *, wait: bool = False) -> None:
        """Saves state and data state together; writes in the background, the arrays may be donated at once.

        state: any pytree of `jax.Array`s. data_state: JSON-serialisable (a tuple comes back as a list).
        A step this object has just saved or restored is not written again. A failure in the background, such as a full
        disk, is raised by the next call. Raises CheckpointError for that and for a step that is not after the newest.
        """
        if self._keep is None:
            raise CheckpointError(f"{self.directory} is open for reading only; give Checkpoints a keep=")
        newest = self.latest()
        if not step == newest == self._at:
            if newest is not None and step <= newest:
                raise CheckpointError(f"{self.directory} has step {newest} already; step {step} would rewrite the past")
            items = {"state": state, "data": {"processes": gather_json(data_state)}}
            with self._named(step):
                self._response = self._orbax.save_checkpointables_async(step, items, force=True)
                if self._response is None:
                    raise CheckpointError(f"{self.directory}: Orbax refused to save step {step}")
            self._at = self._saving = step
            self._expected = {name: (leaf.shape, leaf.dtype) for name, leaf in _leaves(state).items()}
            if jax.process_index() == 0:
                self._sealer = checksums.Sealer(self.directory / str(step))
        if wait:
            self.wait()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, Any]:
        """State and data state of a step (the newest by default), on any mesh.

        abstract_state: the state's pytree of `jax.ShapeDtypeStruct`, each with the sharding to restore it to; a leaf
            `...` is not read and comes back as `...` (an optimizer state that evaluation does not need).
        Raises CheckpointError naming the first parameter whose presence, shape or dtype differs; nothing is cast.
        """
        step, saved = self.contents(step)
        check_fits(abstract_state, saved, self.name(step))
        state, data = self.read(abstract_state, step)
        self._at = step
        return state, _own_json(data, self.name(step))

    def _verify(self, step: int) -> None:
        found = [checksums.damage(self.directory / str(step)) if jax.process_index() == 0 else ""]
        if jax.process_count() > 1:
            found = [text for text in gather_json(found[0]) if text != ""]
        if None in found and jax.process_index() == 0:
            print(f"{self.name(step)} has no checksums; read unverified", file=sys.stderr, flush=True)
        if damage := next(filter(None, found), ""):
            before = [s for s in self.steps() if s < step]
            way = f"--resume_step={before[-1]} goes on from the one before" if before else "there is none before it"
            raise CheckpointError(f"{self.name(step)} is damaged: {damage}; {way}")

    def rewind(self, step: int) -> list[int]:
        """Sets the checkpoints after `step` aside, into `<workdir>/checkpoints.dropped/`, and returns their steps.

        Nothing else may have used this object yet. Raises CheckpointError if `step` is not a checkpoint.
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
        return str(self.directory / str(step))

    def contents(self, step: int | None = None) -> tuple[int, Any]:
        """A step (the newest by default), and the nested dicts of its state's shapes and dtypes.

        Raises CheckpointError, here already, if a file is not as it was written.
        """
        newest = self.latest()
        if newest is None:
            raise CheckpointError(f"{self.directory} has no complete checkpoint")
        step = newest if step is None else step
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(f"{self.directory} has no step {step}; it has {', '.join(map(str, steps))}")
        self._verify(step)
        try:  # a process killed while deleting an old checkpoint leaves a part of it
            saved = self._orbax.checkpointables_metadata(step).metadata["state"]
        except Exception as e:
            raise CheckpointError(f"{self.name(step)} cannot be read: {_first_line(e)}") from e
        if not _leaves(saved):
            raise CheckpointError(f"{self.name(step)} cannot be read: a part of its files is missing")
        return step, saved

    def read(self, abstract_state: Any, step: int) -> tuple[Any, list[Any]]:
        """State and the data states of all processes (one if they are equal), unchecked."""
        try:
            items = self._orbax.load_checkpointables(step, {"state": abstract_state, "data": None})
            return items["state"], list(items["data"]["processes"])
        except Exception as e:
            raise CheckpointError(f"{self.name(step)} cannot be read: {_first_line(e.__cause__ or e)}") from e

    def data_state(self, step: int | None = None) -> Any:
        """The data state of a step (the newest by default), of the first process; None if there is no such step.

        It is not compared with its checksums, as `restore` does that.
        """
        if self.latest() is None or step not in (None, *self.steps()):
            return None
        step = self.latest() if step is None else step
        try:
            return self._orbax.load_checkpointables(step, {"data": None})["data"]["processes"][0]
        except Exception as e:
            raise CheckpointError(f"{self.name(step)} cannot be read: {_first_line(e.__cause__ or e)}") from e

    def wait(self) -> None:
        """Returns when the save under way is complete, or raises CheckpointError with what went wrong with it."""
        if self._orbax is not None:
            self._settle(self._orbax.wait)

    def close(self) -> None:
        """Completes the save under way. Closing twice does nothing."""
        orbax, self._orbax = self._orbax, None
        try:
            if orbax is not None:
                self._settle(orbax.close)
        finally:
            self._unlink()

    def _settle(self, end: Callable[[], None]) -> None:
        sealer, self._sealer = self._sealer, None
        response, self._response = self._response, None
        expected, self._expected = self._expected, {}
        with self._named(self._saving), contextlib.ExitStack() as after:
            if sealer is not None:
                after.callback(sealer.finish)
            if response is not None:
                after.callback(response.result)  # else Orbax's thread of this save and its event loop stay for ever
            end()
        if expected:
            self._check_written(self._saving, expected)

    def _check_written(self, step: int, expected: dict[str, tuple]) -> None:
        """A save counts when what was to be written is found. Else it is set aside, so that nothing resumes from it."""
        try:
            saved = ocp.checkpointables_metadata(self._path() / str(step)).metadata["state"]
            found = {name: (leaf.shape, leaf.dtype) for name, leaf in _leaves(saved).items()}
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
        """Moves checkpoints into `<workdir>/checkpoints.dropped/`; what is there already stays."""
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
        """What goes wrong while saving, in one line."""
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
