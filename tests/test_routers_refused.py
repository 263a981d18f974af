"""Routers and settings of `explore` that cannot be, or would do nothing, are refused by the name of the field."""

import dataclasses

import pytest
from test_invariance import run_config

from moe_jax.config import ExploreConfig, MoEConfig, RampConfig
from moe_jax.errors import ConfigError
from tests.routed_models import routers_config


@pytest.mark.parametrize("fields", [{"steps": 5}, {"start": 1.0}, {"start": 1.0, "end": 1.0, "form": "exponential"}])
def test_a_ramp_without_effect_is_refused(fields):
    with pytest.raises(ConfigError, match="has no effect"):
        RampConfig(**fields)


REFUSED = {
    "identity experts in a table": (
        "cosine",
        "moe",
        {"identity_experts": 2},
        r"identity_experts=2: is not available with",
    ),
    "K of training in a table": ("cosine", "explore", {"top_k": 3}, r"explore\.top_k=3: is not available with table"),
    "one choice under a threshold": ("identity", "explore", {"top_k": 1, "threshold": 0.1}, r"explore\.threshold=0\.1"),
    "a target beside identity experts": ("identity", "loss", {"bias_target": (1.0,) * 4}, r"loss\.bias_target"),
    "a threshold for experts' choices": ("expert choice", "explore", {"threshold": 0.1}, r"explore\.threshold"),
    "more experts than there are": ("mlp", "explore", {"top_k": 7}, r"explore\.top_k=7: must be ≤ 6"),
    "a balancing loss": ("expert choice", "loss", {"load_balance_coef": 0.1}, r"loss\.load_balance_coef"),
    "a threshold for shards": ("shards", "explore", {"threshold": 0.1}, r"explore\.threshold=0\.1: is not available"),
    "half of the shards in training": ("shards", "explore", {"top_k": 3}, r"as shard_groups must divide"),
    "shares in a table": (
        "cosine",
        "moe",
        {"combine": "share", "shard_groups": 2, "renormalize": False},
        r"moe\.combine='share': is not available with table",
    ),
    "text": ("expert choice", "sample", {"tokens": 4}, r"sample\.tokens=4: must be 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    name, group, changes, message = REFUSED[case]
    cfg = routers_config(name)
    with pytest.raises(ConfigError, match=message):
        if group == "moe":
            group, changes = "model", {"moe": dataclasses.replace(cfg.model.moe, **changes)}
        dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **changes)})


def test_refused_together():
    """The K of training is checked as a model's, and losses must reach a router."""
    cfg = routers_config("identity")
    moe = dataclasses.replace(cfg.model.moe, expert_budget=0.5)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))
    with pytest.raises(ConfigError, match=r"explore\.top_k=6: as expert_budget must be between 2 and 4"):
        dataclasses.replace(cfg, explore=ExploreConfig(top_k=6))
    plain = run_config()
    moe = dataclasses.replace(plain.model.moe, selection_bias=False, combine="one")
    tables = dataclasses.replace(plain.model, layers="2*table", num_layers=2, num_dense_layers=0, moe=moe)
    for changes, name in (({}, "load_balance_coef"), ({"load_balance_coef": 0.0}, "router_z_coef")):
        with pytest.raises(ConfigError, match=rf"loss\.{name}=.* reaches no router"):
            dataclasses.replace(plain, model=tables, loss=dataclasses.replace(plain.loss, **changes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choice": "expert", "selection_bias": True}, "selection_bias"),
        ({"choice": "expert", "identity_experts": 2}, "identity_experts"),
        ({"identity_output": "nothing"}, "identity_output"),
        ({"compute": "capacity", "overflow": "score", "combine": "one"}, "overflow"),
        ({"choice": "expert", "compute": "capacity"}, "compute"),
        ({"router_width": 8}, "router_width"),
        ({"top_k": 4, "shard_groups": 3}, r"shard_groups=3: must divide num_experts=8 and top_k=4; nearest valid: 2"),
        ({"shard_groups": 2, "num_groups": 2, "top_groups": 2}, "num_groups=2: is not available with shard_groups"),
        ({"shard_groups": 2, "num_experts": 6, "identity_experts": 2}, "identity_experts"),
        ({"shard_groups": 2, "choice": "expert"}, "shard_groups"),
        ({"combine": "share"}, "combine='share': needs shard_groups > 1"),
        ({"combine": "share", "shard_groups": 2, "renormalize": True}, "renormalize"),
        ({"overflow": "random"}, "overflow"),
        ({"choice": "expert", "min_ratio": 0.5}, "min_ratio=0.5: is for the choices of tokens"),
        ({"combine": "one", "min_ratio": 0.5}, "min_ratio"),
        ({"shard_groups": 2, "min_ratio": 0.5}, "min_ratio"),
        ({"top_k": 1, "min_ratio": 0.5}, "min_ratio=0.5: has no effect with top_k=1"),
        ({"min_ratio": 1.5}, r"min_ratio=1.5: must be in \[0.0, 1.0\]"),
        ({"identity_experts": 2, "num_groups": 2, "top_groups": 1}, "identity_experts"),
        ({"top_k": 11, "identity_experts": 2}, r"must be ≤ num_experts=8 \+ identity_experts=2"),
    ],
)
def test_refused_in_a_layer(fields, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig(**fields)
