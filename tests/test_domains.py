"""Numbers by domain: all domains together lie under a key that no domain has, whatever domains are called."""

import json
import math

import numpy as np
import pytest

from experiments import upcycling_report
from moe_jax import config
from moe_jax.config import ModelConfig
from moe_jax.errors import ConfigError
from moe_jax.evaluate import held_out
from moe_jax.moe.stats import RouterStats
from moe_jax.train import metrics

NAMES = ("all", "xent", "a/xent", "all domains", "perplexity", "kind", "step", "unseen")
STATS = RouterStats(np.ones((1, 8)), np.ones((1, 8, 2)), np.ones((1, 8, 2)), np.ones((1, 8)), np.zeros((1, 8)))


def result() -> held_out.EvalResult:
    tokens = np.array([10.0, 20, 30, 40, 50, 60, 70, 0])
    places = ModelConfig(num_layers=1).places
    return held_out.EvalResult(
        NAMES,
        tokens * np.arange(1, 9),
        tokens,
        np.full(8, 2.0),
        places,
        {"layers": STATS},
        None,
    )


def test_no_domain_has_the_total_s_numbers():
    made = result()
    rows = made.rows()
    assert [row["domain"] for row in rows] == [*NAMES[:-1], held_out.TOTAL]
    total = sum(n * 10 * n for n in range(1, 8)) / 280
    flat = metrics.eval_metrics(rows)
    assert flat["xent"] == rows[-1]["xent"] == pytest.approx(total) and len(flat) == 3 * 8
    assert {flat[f"{name}/xent"]: name for name in NAMES[:-1]} == dict(
        zip(map(float, range(1, 8)), NAMES, strict=False)
    )


def test_tables_and_files_name_every_domain():
    texts = [(name, name * 50) for name in NAMES[:-1]]
    baselines = held_out.compression_bits_per_byte(texts)
    made = result()
    *body, total, missing = held_out.table(made, baselines).splitlines()[1:]
    assert [line[:12].strip() for line in body] == list(NAMES[:-1]) and total.startswith("all domains  ")
    assert missing == "not evaluated here: unseen"
    of = baselines["gzip -9"]
    assert len(of) == 8 and f"{of['all']:.3f}" in body[0] and f"{of[held_out.TOTAL]:.3f}" in total
    assert "nan" not in total
    written = json.loads(held_out.to_json(4, made, baselines))
    assert written["domains_without_text"] == ["unseen"] and written["domains"][-1]["domain"] == ""
    assert written["domains"][0]["xent"] == 1.0 and written["bits_per_byte_of"]["gzip -9"][""] == of[""]


def test_a_source_s_name_is_not_empty():
    c = config.default_config()
    c.data.sources = {"": config.source(kind="files", path="x")}
    with pytest.raises(ConfigError, match=r"data\.sources='': must have names that are not empty"):
        config.build(c)


def test_reports_read_the_total_of_old_and_new_runs():
    assert upcycling_report.total({"all": 3.0, "": 2.0}) == {"all": 3.0, "": 2.0}  # new, with a domain called "all"
    assert upcycling_report.total({"code": 3.0, "all": 2.0}) == {"code": 3.0, "": 2.0}
    assert math.isnan(upcycling_report.total({})[""])
