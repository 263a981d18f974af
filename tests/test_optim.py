"""The learning rate of every step, against the formulas in float64, and what a resumed run is told of it."""

import dataclasses

import numpy as np
import pytest

from moe_jax import config, optim
from moe_jax.config import OptimConfig
from moe_jax.run import changes

LR, FINAL = 0.3, 0.1


def rates(name: str, warmup: int, steps: int, **fields) -> np.ndarray:
    """Of every step that is taken."""
    cfg = OptimConfig(lr=LR, schedule=name, warmup_steps=warmup, final_lr_fraction=FINAL, **fields)
    return np.array([float(optim.schedule(cfg, steps)(step)) for step in range(steps)])


def expected(name: str, warmup: int, steps: int, fraction: float) -> np.ndarray:
    """From the promise: `warmup` rising steps, of which the last is at LR; then down, the last step at FINAL · LR."""
    top = max(warmup - 1, 0)
    down = np.arange(steps - top) / max(steps - 1 - top, 1)  # 0 at the top, 1 at the last step
    if name == "cosine":
        down = (1 - np.cos(np.pi * down)) / 2
    elif name == "wsd":
        decay = min(max(1, round((steps - warmup) * fraction)), max(steps - 1 - top, 1))
        down = np.clip(1 - np.arange(steps - top)[::-1] / decay, 0, 1)
    elif name == "constant":
        down = np.zeros(steps - top)
    return LR * np.concatenate([np.arange(1, top + 1) / warmup if top else [], 1 - (1 - FINAL) * down])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 12), (1, 12), (4, 12), (11, 12), (0, 2), (1, 2), (0, 1)])
def test_the_last_step_taken_has_the_last_rate(name, warmup, steps):
    for fraction in (0.0, 0.4, 1.0) if name == "wsd" else (0.2,):
        got = rates(name, warmup, steps, decay_fraction=fraction)
        if steps > 1:  # the one step of the shortest run is at LR
            np.testing.assert_allclose(got, expected(name, warmup, steps, fraction), rtol=1e-6)
            np.testing.assert_allclose(got[-1], LR * (FINAL if name != "constant" else 1), rtol=1e-6)
        np.testing.assert_allclose(got[max(warmup - 1, 0)], LR, rtol=1e-6)
        assert got[0] > 0 and got.max() <= LR * (1 + 1e-6)


def test_a_stretched_schedule_is_told_in_one_line():
    cfg = OptimConfig(lr=2e-3, warmup_steps=0)
    line = optim.describe_stretch(cfg, 40, 62, 38)
    before, after = (float(optim.schedule(cfg, steps)(38)) for steps in (40, 62))
    assert line == (
        "the learning rate's schedule is that of 62 steps, no longer of 40: "
        f"{after:.3g} in the next step instead of {before:.3g}, 0.0002 in the last"
    )
    assert optim.describe_stretch(cfg, 40, 40, 38) == ""
    assert optim.describe_stretch(dataclasses.replace(cfg, schedule="constant"), 40, 62, 38) == ""


def test_what_changed_since_a_run_began():
    """A run of before there were revisions, with each optimizer and schedule that changed; a run of today's."""
    lines = lambda revision, **fields: changes.since(revision, config.RunConfig(optim=OptimConfig(**fields)))
    muon, schedule = lines(0)
    assert "Muon" in muon and "scale" in muon and "final_lr_fraction" in schedule
    assert lines(0, name="adamw") == [schedule] and lines(0, schedule="constant") == [muon]
    assert lines(changes.REVISION) == lines(0, name="adamw", schedule="constant") == []
