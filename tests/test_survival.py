"""What a run meets from outside, one fault a test: another owner, damaged and missing files, a full disk, SIGTERM."""

import asyncio
import contextlib
import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax import cli
from moe_jax.data import batches as batches_lib
from moe_jax.errors import Busy, CheckpointError, Stopped
from moe_jax.evaluate import held_out
from moe_jax.run import checksums, survive
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.retention import Keep

REPO = Path(__file__).parents[1]


def state(seed: int = 0, size: int = 1 << 12):
    return {"w": jax.device_put(np.random.default_rng(seed).normal(size=(size,)).astype(np.float32))}


def target(size: int = 1 << 12):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"w": jax.ShapeDtypeStruct((size,), np.float32, sharding=sharding)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1, 2 and 3."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir, keep=3) as checkpoints:
        for n in (1, 2, 3):
            checkpoints.save(n, state(n), {"n": n})
    return workdir


# --- a damaged checkpoint --------------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "_CHECKPOINT_METADATA"]


def damages(path: Path) -> dict[str, bytes | None]:
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    return {"flipped": bytes(flipped), "short": data[:-1], "missing": None}


def test_every_damage_to_every_file_is_named(saved, tmp_path):
    """Flipped bits of an array are what Orbax reads without a word; here they are found as any other damage."""
    found = {"flipped": 0, "short": 0, "missing": 0}
    shutil.copytree(saved, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "3"
    for path in files_of(folder):
        if path.name == checksums.NAME:
            continue
        before = path.read_bytes()
        for kind, after in damages(path).items() if before else ():
            path.unlink() if after is None else path.write_bytes(after)
            with Checkpoints(tmp_path / "run") as checkpoints, pytest.raises(CheckpointError) as e:
                checkpoints.restore(target())
            relative = path.relative_to(folder).as_posix()
            assert re_line(str(e.value), relative), f"{kind} {relative}: {e.value}"
            found[kind] += 1
            path.write_bytes(before)
    assert min(found.values()) >= 5
    with Checkpoints(tmp_path / "run") as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(target())[0]["w"], state(3)["w"])


def re_line(text: str, name: str) -> bool:
    return f"3 is damaged: {name} " in text and "--resume_step=2 resumes" in text and "\n" not in text


def test_the_one_before_is_used_on_request(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    (run / "checkpoints" / "3" / checksums.NAME).write_text("{", encoding="utf-8")
    with Checkpoints(run, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match=r"3 is damaged: checksums.json is not readable; --resume_step=2"):
            checkpoints.restore(target())
    with Checkpoints(run, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match=r"--resume_step=7: is not a checkpoint of the run; nearest valid: 3"):
            checkpoints.rewind(7)
        assert checkpoints.rewind(2) == [3]
        got, data = checkpoints.restore(target())
        assert data == {"n": 2}
        np.testing.assert_array_equal(got["w"], state(2)["w"])
        checkpoints.save(3, state(4), {"n": 3}, wait=True)
        np.testing.assert_array_equal(checkpoints.restore(target())[0]["w"], state(4)["w"])
    assert (run / "checkpoints.dropped" / "3" / checksums.NAME).read_text(
        encoding="utf-8"
    ) == "{"  # set aside, not deleted


def test_without_checksums_it_is_read_and_said(saved, tmp_path, capfd):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "3" / checksums.NAME).unlink()
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.restore(target())
        assert "3 has no checksums, so it is read without verification" in capfd.readouterr().err
        checkpoints.restore(target(), 2)
        assert capfd.readouterr().err == ""


# --- which checkpoints stay ------------------------------------------------------------------------------------------


def test_keep_newest_every_and_best():
    scores = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 6: 1.0, 9: 9.0}
    steps = [1, 2, 3, 4, 5, 6, 7, 8]
    assert Keep(2, 0, 0, scores).steps(steps) == {7, 8}
    assert Keep(1, 3, 0, scores).steps(steps) == {3, 6, 8}
    assert Keep(1, 0, 2, scores).steps(steps) == {4, 6, 8}  # of 2 and 4, equally good, the later
    assert Keep(1, 5, 1, {}).steps(steps) == {5, 8}


SCORES = st.lists(st.sampled_from([1.0, 2.0, 3.0, math.inf, -math.inf, math.nan]), max_size=8)


@given(SCORES, st.integers(0, 4))
def test_what_is_not_a_number_is_never_the_best(values, best):
    """The best stay in any order of the scores, and they are those that would stay if the others had none."""
    scores = dict(enumerate(values, start=1))
    numbers = {step: score for step, score in scores.items() if math.isfinite(score)}
    ranked = sorted(numbers, key=lambda step: (numbers[step], -step))[:best]
    assert Keep(1, 0, best, scores).steps([*scores, 99]) == {*ranked, 99}


def test_a_restart_knows_of_an_evaluation_that_gave_no_number(tmp_path):
    """metrics.jsonl has null for it; it was made, and is not made again."""
    rows = ['{"kind": "eval", "step": 4, "xent": 2.5}', '{"kind": "eval", "step": 8, "xent": null}']
    (tmp_path / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    found = held_out.scores(tmp_path, 8)
    assert list(found) == [4, 8] and found[4] == 2.5 and math.isnan(found[8])
    assert Keep(1, 0, 1, found).steps([4, 8, 9]) == {4, 9}


def test_the_policy_is_applied_and_survives_a_restart(tmp_path):
    loss = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 5.0, 6: 6.0}
    for steps in ((1, 2, 3), (4, 5, 6)):
        with Checkpoints(tmp_path, keep=1, keep_every=4, keep_best=1) as checkpoints:
            checkpoints.scores.update({n: value for n, value in loss.items() if n < steps[0]})
            for n in steps:
                checkpoints.scores[n] = loss[n]
                checkpoints.save(n, state(n), {})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 4, 6]


# --- one owner -------------------------------------------------------------------------------------------------------

OWNER = """
import os, sys, time
from moe_jax.run import survive
lock = survive.RunLock(sys.argv[1])
if os.fork() == 0:  # a reader process that nobody ends; it speaks, so that it has let go of the lock by then
    print("mine", flush=True)
    time.sleep(15)
    os._exit(0)
time.sleep(60)
"""


def test_a_second_start_is_refused_until_the_first_is_gone(tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], env=env, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        assert owner.stdout.readline() == "mine\n"
        with pytest.raises(Busy, match=rf"another run is training in it \(process {owner.pid} on "):
            survive.RunLock(tmp_path)
        assert f"process {owner.pid}" in (tmp_path / "lock").read_text(encoding="utf-8")
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
    with survive.RunLock(tmp_path):  # nothing is left behind
        with pytest.raises(Busy):
            survive.RunLock(tmp_path)
    survive.RunLock(tmp_path).close()


# --- a full disk -----------------------------------------------------------------------------------------------------

FULL = """
import resource, sys
import jax, numpy as np
from moe_jax import cli
from moe_jax.run import checkpoint, survive
def main(argv):
    state = {"w": jax.device_put(np.random.default_rng(0).normal(size=(1 << 18,)).astype(np.float32))}
    with checkpoint.Checkpoints(argv[1], keep=3) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        checkpoints.save(2, state, {})
        checkpoints.save(3, state, {})
cli.run(main)
"""


def test_no_room_for_a_save_ends_in_one_line_and_the_last_one_is_whole(tmp_path):
    """A limit on the size of a file stands for the full disk: writing fails in the same places."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path], env=env, capture_output=True, timeout=300, encoding="utf-8"
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert "checkpoints/2 could not be saved: " in errors[0] and "earlier checkpoints are intact" in errors[0]
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.restore(target(1 << 18))
        checkpoints.save(2, state(2), {}, wait=True)
        assert checkpoints.steps() == [1, 2]


def test_no_room_for_a_log_line_is_one_line(capsys, monkeypatch):
    def main(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")

    monkeypatch.setattr(cli.app, "run", lambda guarded, flags_parser: guarded([]))
    with pytest.raises(SystemExit) as e:
        cli.run(main)
    assert e.value.code == 2
    assert capsys.readouterr().err.startswith("error: no space left on the device (runs/a/metrics.jsonl); the newest")


def test_too_little_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cli.app, "run", lambda guarded, flags_parser: guarded([]))
    with pytest.raises(SystemExit) as e:
        cli.run(lambda argv: jax.block_until_ready(jax.numpy.zeros((1 << 20, 1 << 30))))
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: not enough memory on cpu \(Out of memory .*--config\.train\.micro_batches.*\n", said)


@pytest.mark.parametrize("said", [{}, {"XLA_CLIENT_MEM_FRACTION": ".3"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".3"}])
def test_the_share_of_a_gpu_is_the_users_or_most_of_it(said, monkeypatch):
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX refuses both at a time
    for name in names:
        monkeypatch.setenv(name, said.get(name, ""))
    monkeypatch.setattr(cli.app, "run", lambda *_, **__: None)
    cli.run(None)
    assert {n: os.environ[n] for n in names if os.environ[n]} == (said or {names[0]: "0.9"})


def test_told_to_stop_before_and_between():
    """SIGTERM ends the program at once while nothing can be lost, else after the step."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        told = survive.Preemption(several=False)
        with pytest.raises(SystemExit) as e:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert e.value.code == 0
        told = survive.Preemption(several=False)
        told.begin()
        assert told.interruptibly(lambda: 5) == 5 and not told.reached(1)

        ended = []

        def evaluation():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            ended.append(True)

        assert told.interruptibly(evaluation) is None and not ended
        os.kill(os.getpid(), signal.SIGTERM)  # again, and no exception
        assert told.reached(2)
        with pytest.raises(Stopped):
            told.end()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_told_to_stop_inside_a_library(saved):
    """Orbax makes an error of its own of what ends its restore, or goes on with a part. Neither counts."""
    before, ends = signal.getsignal(signal.SIGTERM), []

    def restore(after: float):
        with survive.Preemption(several=False) as told:
            timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM))
            timer.start()
            with Checkpoints(saved) as checkpoints:
                checkpoints.restore(target())
            timer.join()
            told.begin()

    try:
        restore_once = lambda: Checkpoints(saved).restore(target())
        restore_once()
        began = time.perf_counter()
        restore_once()
        whole = time.perf_counter() - began
        while len(ends) < 16 or (CheckpointError not in ends and len(ends) < 200):
            with pytest.raises(Stopped) as e:
                restore(whole * (len(ends) % 16 + 0.5) / 16)
            ends.append(type(e.value.__cause__))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert CheckpointError in ends  # else this test has not been where it wants to be


@pytest.mark.parametrize("answer", [RuntimeError, asyncio.CancelledError, "a part of it"])
def test_told_to_stop_and_a_library_answers_otherwise(answer):
    before = signal.getsignal(signal.SIGTERM)

    def evaluation():
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        if isinstance(answer, str):
            return answer
        raise answer

    try:
        told = survive.Preemption(several=False)
        told.begin()
        assert told.interruptibly(evaluation) is None and told.reached(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_and_a_closed_terminal_lose_no_step(monkeypatch, capfd):
    """Both are heard like SIGTERM; a second Ctrl-C ends at once, and a shell's loop around the program ends too."""
    send = lambda number: signal.pthread_kill(threading.main_thread().ident, number)
    handlers = lambda: [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP)]
    as_others, before, term = [], handlers(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "raise_signal", lambda n: as_others.append((n, signal.getsignal(n))))
    ended = [(signal.SIGINT, signal.SIG_DFL)]
    try:
        # The tests themselves may run under nohup, or in the background of a script.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, twice, ends in (
            (signal.SIGINT, KeyboardInterrupt, ended),
            (signal.SIGHUP, Stopped, []),
        ):
            with pytest.raises(Stopped), survive.Preemption(several=False):
                send(number)  # before the first step
            with pytest.raises(twice), survive.Preemption(several=False) as told:
                told.begin()
                send(number)
                assert told.reached(1)
                send(number)
                raise Stopped  # as train.py does once the step is saved
            assert as_others == 2 * ends
            as_others.clear()
            signal.signal(signal.SIGINT, signal.default_int_handler)
        assert "Ctrl-C again" in capfd.readouterr().err
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with survive.Preemption(several=False):
            send(signal.SIGHUP)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGHUP, signal.SIGTERM), (*before, term), strict=True):
            signal.signal(number, handler)
    assert handlers() == before


def test_readers_that_are_killed_are_started_again(monkeypatch, capsys):
    """The batch that was due is delivered by new ones; the second time that they deliver nothing is an error."""
    begun, deliveries = [], 2

    def readers(elements, batch_size, rows, first, num_workers):
        begun.append(first)
        yield from ({"number": np.array([first + i])} for i in range(deliveries))
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")

    monkeypatch.setattr(batches_lib, "read_batches", readers)
    batches = batches_lib.TrainIterator(None, 2, [0], num_workers=1)
    assert [int(next(batches)["number"][0]) for _ in range(5)] == [0, 1, 2, 3, 4] and begun == [0, 2, 4]
    assert capsys.readouterr().err.count("exit code -9.); new ones start at batch") == 2
    deliveries = 0
    next(batches)
    with pytest.raises(RuntimeError, match="exit code -9"):
        next(batches)
