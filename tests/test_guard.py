"""Bad numbers: a bad step changes nothing, is counted, and enough of them stop the run with a dump that replays."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from moe_jax import config
from moe_jax.errors import BadNumbers, CheckpointError, ConfigError
from moe_jax.parallel import overlap, sharding
from moe_jax.run import replay
from moe_jax.train import guard, step
from moe_jax.train.metrics import StepMetrics
from moe_jax.train.state import init_state, put_batch

BATCH, SEQ, WINDOW = 8, 16, 8


def run_config(**train) -> config.RunConfig:
    c = config.default_config()
    c.model.update(vocab_size=257, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    c.model.update(compute_dtype="float32")
    c.model.moe.update(num_experts=4, top_k=2, d_expert=16, selection_bias=True)
    c.loss.update(bias_update_rate=1e-3)
    c.optim.update(lr=1e-2, warmup_steps=2, newton_schulz_dtype="float32")
    c.data.update(batch_size=BATCH, seq_len=SEQ)
    c.mesh.update(data=2, fsdp=2, expert=2)
    c.train.update(steps=40, **train)
    return config.build(c)


def rows_of(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, 257, (BATCH, SEQ + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((BATCH, SEQ), np.float32),
        "segment_ids": np.ones((BATCH, SEQ), np.int32),
        "positions": np.tile(np.arange(SEQ, dtype=np.int32), (BATCH, 1)),
        "sequence_ids": np.arange(BATCH, dtype=np.int32),
    }


def poisoned(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows["weights"][5, 3] = np.nan
    return rows


def leaves(tree) -> dict[str, bytes]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}


class Run:
    """train.py's loop as far as it watches, reading every result at once."""

    def __init__(self, cfg: config.RunConfig):
        self.cfg, self.mesh = cfg, sharding.make_mesh((2, 2, 2))
        self.train_step, self.state = step.make_train_step(cfg, self.mesh), init_state(cfg, self.mesh)
        step.compile_ahead(self.train_step, cfg, self.mesh).result()
        self.watch = guard.Watch(cfg.train)

    def take(self, n: int, rows: dict, limits=None) -> dict:
        limits = self.watch.limits(n) if limits is None else limits
        self.state, aux = self.train_step(self.state, put_batch(rows, self.mesh, self.cfg), limits, None)
        self.watch.record(n, aux)
        return jax.device_get(aux)


CHECKED = run_config(spike=6.0, spike_window=WINDOW, max_skipped=3)


@pytest.fixture(scope="module")
def run():
    return Run(CHECKED)


def reset(run: Run) -> Run:
    run.state, run.watch = init_state(run.cfg, run.mesh), guard.Watch(run.cfg.train)
    return run


def test_a_step_that_was_compiled_ahead_is_not_compiled_again(run):
    rows, seen = put_batch(rows_of(1), run.mesh, run.cfg), []
    record = lambda event, seconds, **_: seen.append(event)
    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        run.state, _ = run.train_step(run.state, rows, run.watch.limits(1), None)
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    assert not [event for event in seen if event.startswith("/jax/core/compile")], seen


def test_a_bad_step_changes_nothing_but_the_count(run):
    reset(run)
    for n in (1, 2):
        assert run.take(n, rows_of(n)).skipped == 0
    before = leaves(run.state[1:])
    assert np.asarray(jax.tree.leaves(run.state.router_bias)[0]).any()
    aux = run.take(3, poisoned(rows_of(3)))
    assert aux.skipped == 1 and np.isnan(aux.loss) and np.isnan(aux.grad_norm) and aux.tokens == 0
    assert leaves(run.state[1:]) == before and int(run.state.step) == 3  # params, router bias, optimizer state
    assert (
        run.watch.skipped == run.watch.in_a_row == 1
        and run.watch.last.reason == "not finite: loss nan, gradient norm nan"
    )
    aux = run.take(4, rows_of(4), np.float32([0.5, np.inf]))  # a spike
    assert aux.skipped == 1 and np.isfinite(aux.loss) and leaves(run.state[1:]) == before
    lr = run.take(5, rows_of(5)).lr
    assert run.watch.in_a_row == 0 and run.watch.skipped == 2

    # For the optimizer the skipped steps never were: the same as without them, learning rate included.
    got = leaves(run.state[1:])
    reset(run)
    for n, batch in enumerate((1, 2, 5), 1):
        last = run.take(n, rows_of(batch))
    assert last.lr == lr and leaves(run.state[1:]) == got


@pytest.mark.slow
def test_nothing_bad_is_bit_identical_to_no_check(monkeypatch):
    """Fused as for a user: conftest's quicker way fuses the two programs differently."""
    if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:
        monkeypatch.setattr(overlap, "compiler_options", lambda mesh: {"xla_cpu_use_fusion_emitters": True})
    run, plain = Run(CHECKED), Run(run_config(skip_nonfinite=False))
    for n in (1, 2, 3):
        assert "skipped" not in plain.take(n, rows_of(n))
        run.take(n, rows_of(n))
    assert leaves(run.state) == leaves(plain.state)
    plain.take(4, poisoned(rows_of(4)))  # what would happen without it
    assert not np.isfinite(np.asarray(plain.state.params["embed"], np.float32)).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_three_in_a_row_stop_and_the_dump_replays(run, tmp_path, shape):
    reset(run).take(1, rows_of(1))
    for n in (2, 3, 4):
        assert run.watch.next_skip_stops == (n == 4) and not run.watch.limit_reached
        rows = poisoned(rows_of(n))
        run.take(n, rows)
    assert run.watch.limit_reached
    with pytest.raises(BadNumbers, match=r"step 4: 3 steps in a row .* not finite: loss nan.*--replay=.*dumps/4"):
        replay.give_up(tmp_path, run.cfg, run.state, rows, run.watch.last, run.watch.limits(4))
    folder = tmp_path / "dumps" / "4"
    mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(shape)])
    said = replay.replay(run.cfg, mesh, folder).splitlines()
    assert said[0] == "step 4 repeated; it was skipped: not finite: loss nan, gradient norm nan"
    assert said[3] == "  reproduced" and "  batch weights: 1 of 128 not finite, in sequences [5]" in said
    assert any(line.startswith("  gradient/") for line in said)
    assert not any(line.startswith("  params/") for line in said)
    other = dataclasses.replace(run.cfg, seed=1)
    with pytest.raises(CheckpointError, match=r"config\.seed"):
        replay.replay(other, run.mesh, folder)
    (folder / "batch_0.npz").unlink()
    with pytest.raises(CheckpointError, match="not a dump"):
        replay.replay(run.cfg, run.mesh, folder)


# --- spikes, on the host ---------------------------------------------------------------------------------------------


def train_config(**fields) -> config.TrainConfig:
    return config.TrainConfig(**{"spike": 3.0, "spike_window": WINDOW, "max_skipped": 2} | fields)


def watched(values, watch=None, first=1) -> guard.Watch:
    watch = watch or guard.Watch(train_config())
    for n, value in enumerate(values, first):
        watch.record(n, StepMetrics(value, 10 * value, skipped=0.0))
    return watch


def test_limits_are_median_and_deviations_of_steps_already_read():
    losses = [5.0, 4.0, 3.0, 4.0, 5.0, 6.0, 4.0, 2.0, 100.0, 100.0]  # the last two are too near
    watch = watched(losses)
    np.testing.assert_array_equal(watch.limits(10), np.float32([4 + 3 * 1, 40 + 3 * 10]))
    np.testing.assert_array_equal(watched(losses[:8]).limits(9), np.float32([np.inf, np.inf]))  # seven so far
    assert guard.Watch(train_config(spike=0.0)).limits(10) is None
    taught = watched(losses, guard.Watch(train_config(), taught=10))
    np.testing.assert_array_equal(taught.limits(10), watch.limits(10))
    np.testing.assert_array_equal(taught.limits(11), np.float32([np.inf, np.inf]))  # none so far without it


def test_limits_are_the_same_after_a_resume_at_any_step():
    losses = np.random.default_rng(0).normal(3, 0.1, 40).tolist()
    for at in (5, 10, 25, 39):
        resumed = guard.Watch(train_config(), watched(losses[:at]).state())
        straight = watched(losses[: at + 1])
        np.testing.assert_array_equal(resumed.limits(at + 1), watched(losses[:at]).limits(at + 1))
        np.testing.assert_array_equal(
            watched(losses[at : at + 1], resumed, at + 1).limits(at + 2), straight.limits(at + 2)
        )


def test_a_skipped_step_is_no_measure_for_the_next():
    watch = watched([3.0, 3.1, 3.2, 3.1, 3.0, 2.9, 3.0, 3.1, 3.0, 3.0])
    before = watch.limits(14).tolist()
    skip = watch.record(11, StepMetrics(9.0, 30.0, skipped=1.0))
    assert skip.reason.startswith("spike: loss 9 above 3.") and "gradient norm" not in skip.reason
    assert watch.limits(14).tolist() == before and watch.next_skip_stops and not watch.limit_reached
    assert guard.row(skip, batch=10) == {"reason": skip.reason, "batch": 10, "loss": 9.0, "grad_norm": 30.0}
    watch.record(12, StepMetrics(9.0, 30.0, skipped=1.0))
    assert watch.limit_reached and watch.skipped == 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"skip_nonfinite": False}, r"spike=3\.0: needs skip_nonfinite=True"),
        ({"spike": -1.0}, r"spike=-1\.0: must be ≥ 0"),
        ({"max_skipped": 0}, r"max_skipped=0: must be ≥ 1; nearest valid: 1"),
        ({"keep_best": 1}, r"keep_best=1: needs an eval_every that divides checkpoint_every=200"),
        ({"keep_best": 1, "eval_every": 150}, r"keep_best=1: needs an eval_every that divides"),
    ],
)
def test_settings_that_cannot_be(fields, says):
    with pytest.raises(ConfigError, match=says):
        train_config(**fields)


# --- the end of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skipped", "says"),
    [
        ([], None),
        ([3], None),
        ([6], None),  # one step, and the ones before it were good
        ([5, 6], r"the last 2 of 6 steps were skipped, the last: not finite: loss nan.*; what is written"),
        ([1, 2, 3, 4, 5, 6], r"all 6 steps were skipped, the last: not finite"),
    ],
)
def test_a_run_that_ends_in_skipped_steps_does_not_end_well(skipped, says):
    watch = guard.Watch(train_config(spike=0.0, max_skipped=10))
    for n in range(1, 7):
        bad = n in skipped
        watch.record(n, StepMetrics(np.nan if bad else 3.0, 1.0, skipped=float(bad)))
    again = guard.Watch(train_config(spike=0.0), watch.state())  # the same command, with nothing left to do
    for one in (watch, again):
        if says is None:
            guard.check_end(one, 6)
        else:
            with pytest.raises(BadNumbers, match=says if one is watch else r"6 steps were skipped; what is"):
                guard.check_end(one, 6)


def test_a_run_of_one_skipped_step():
    watch = guard.Watch(train_config(spike=0.0))
    watch.record(1, StepMetrics(np.inf, 1.0, skipped=1.0))
    with pytest.raises(BadNumbers, match="all 1 steps were skipped"):
        guard.check_end(watch, 1)
