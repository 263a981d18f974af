"""The figure of a training run: what its lines and points are, and runs that lack a part of it."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_jax.evaluate import figures


def written(folder, losses, loads=None, evals=()):
    """A run's metrics.jsonl: a row every 10 steps, held-out losses by step."""
    rows = [{"kind": "train", "step": 10 * (i + 1), "xent": x} for i, x in enumerate(losses)]
    for i, load in enumerate(loads or ()):
        rows[i]["max_load"] = load
    rows += [{"kind": "eval", "step": step, "xent": x} for step, x in evals]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def lines(figure: Figure, axis: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """x and y of what the legend names."""
    return {line.get_label(): line.get_data() for line in figure.axes[axis].get_lines() if line.get_label()[0] != "_"}


def test_the_mean_is_where_the_run_is(tmp_path):
    """A short run's mean is its values; a long one's does not lag where the loss falls, but at its ends."""
    losses = [6.4, 5.9, 5.4, 5.1, 4.93]
    (_, (_, mean)) = lines(figures.training(written(tmp_path, losses, [1.5] * 5))).values()
    np.testing.assert_allclose(mean, losses)

    falling = 8 - 4 * np.linspace(0, 1, 500)
    _, (_, mean) = lines(figures.training(written(tmp_path, falling.tolist(), [1.5] * 500))).values()
    assert np.abs(mean - falling).max() < 0.02 * 4 and np.abs(mean - falling)[80:-80].max() < 0.002

    decay = 1 - 50 / 500  # by the definition
    noisy = np.random.default_rng(0).normal(size=500)
    _, (_, mean) = lines(figures.training(written(tmp_path, noisy.tolist(), [1.5] * 500))).values()
    for i in (0, 1, 250, 499):
        weights = decay ** np.abs(np.arange(500) - i)
        np.testing.assert_allclose(mean[i], weights @ noisy / weights.sum())


def test_held_out_points_and_a_legend(tmp_path):
    written(tmp_path, [6.0, 5.0, 4.0], [2.0, 1.5, 1.2], [(20, 5.2), (30, 4.4)])
    figure = figures.training(tmp_path)
    x, y = lines(figure)["held-out text"]
    assert (x.tolist(), y.tolist()) == ([20, 30], [5.2, 4.4])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(lines(figure))
    assert len(figure.axes) == 2


def test_missing_values_leave_a_gap(tmp_path):
    """A step whose loss was not finite has null in its row."""
    (_, (_, each)), (_, (_, mean)) = lines(
        figures.training(written(tmp_path, [6.0, None, 5.0, 4.0], [2.0] * 4))
    ).items()
    np.testing.assert_array_equal(np.isnan(each), [False, True, False, False])
    np.testing.assert_allclose(mean, [6.0, np.nan, 5.0, 4.0])


@pytest.mark.parametrize(
    "case",
    [
        {"losses": [6.0, 5.0]},  # dense
        {"losses": []},  # stopped before the first row
        {"losses": [], "evals": [(4, 5.0)]},
        {"losses": [None], "loads": [None], "evals": [(10, None)]},
        {"losses": [6.0], "loads": [1.5]},
    ],
    ids=str,
)
def test_runs_that_lack_a_part(tmp_path, case):
    figure = figures.training(written(tmp_path, **case))
    assert len(figure.axes) == 1 + ("loads" in case)
    figure.savefig(tmp_path / "loss.png")
