"""Labels refuse each field that they do not work with, by its name."""

import dataclasses

import pytest
from flax import nnx

from moe_jax import config, upcycle
from moe_jax.config import MoEConfig
from moe_jax.errors import ConfigError
from moe_jax.evaluate import overrides
from moe_jax.moe.alone import MoELayer
from moe_jax.run import teacher
from moe_jax.train import knobs
from moe_jax.train.gradients import make_gradients
from tests.labelled import labelled, state_on
from tests.test_invariance import run_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_groups": 2, "compute": "capacity"}, "compute='capacity': has equal room for all experts"),
        ({"label_groups": 3}, "label_groups=3: must divide num_experts=8; nearest valid: 2"),
        ({"label_groups": 4, "top_k": 3}, "top_k=3: must be ≤ num_experts / label_groups = 2"),
        ({"label_groups": 2, "selection_bias": True}, "selection_bias=True: is not available with label_groups"),
        ({"label_groups": 2, "pool_min": 2, "pool_from": "all"}, "pool_min=2: is not available"),
        ({"label_groups": 2, "num_groups": 2}, "num_groups=2: is not available"),
        ({"routers": 2, "router": "cosine"}, "routers=2: is not available with router='cosine'"),
    ],
)
def test_refused_in_a_layer(fields, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig(num_experts=8, **fields)


def test_refused_in_a_run():
    cfg = labelled("groups")
    change = lambda cfg, **groups: dataclasses.replace(
        cfg, **{name: dataclasses.replace(getattr(cfg, name), **fields) for name, fields in groups.items()}
    )
    moe = dataclasses.replace(cfg.model.moe, routers=4)
    said = "routing: each of 2 labels has its own group of experts, router, attention matrices and norms; 1 identity"
    assert knobs.describe(labelled("all")).startswith(f"{said} experts, so 1.60 of 2 compute")
    table = {"layers": "2*table"}
    for groups, message in [
        ({"data": {"labels": {}}}, r"data\.labels=\{\}: must name domains of the labels 0 to 1, for model\.moe\.label"),
        ({"data": {"labels": {"b": 1, "c": 2}}}, "must name domains of the labels 0 to 1"),
        ({"data": {"labels": {"b": 2}}}, r"labels=\{'b': 2\}: must be 0, 1, … without a gap"),
        ({"sample": {"tokens": 4}}, r"sample\.label=-1: must be the label .* valid: 0 \(all other text\), 1 \(b\)"),
        ({"sample": {"label": 2}}, r"sample\.label=2: must be the label of the text"),
        ({"model": {"moe": moe}}, r"moe\.routers=4: is for another number of labels than moe\.label_groups=2"),
        ({"model": {"num_dense_layers": 2}}, r"moe\.label_groups=2: needs layers whose router chooses"),
        ({"model": {"mtp_layers": 1}}, r"mtp_layers=1: is not available with moe\.label_groups=2"),
        ({"explore": {"random": config.RampConfig(0.5, 0.0, 4)}}, r"explore\.random=.*: is not available"),
        ({"model": table}, r"moe\.label_groups=2: needs layers whose router"),
    ]:
        with pytest.raises(ConfigError, match=message):
            change(cfg, **groups)
    with pytest.raises(ConfigError, match=r"lora\.rank=2: is not available with moe\.label_groups=2"):
        dataclasses.replace(cfg.model, lora=config.LoRAConfig(rank=2))
    untied_model = {"untie": 2, "num_dense_layers": 2, "moe": MoEConfig()}
    with pytest.raises(ConfigError, match=r"qkv_bias=True: is not available with untie > 1"):
        dataclasses.replace(cfg.model, **untied_model, qkv_bias=True)
    with pytest.raises(ConfigError, match=r"optim\.qk_clip=1\.0: is not available with model\.untie > 1"):
        change(cfg, model={**untied_model, "qk_norm": False}, optim={"qk_clip": 1.0})
    with pytest.raises(ConfigError, match=r"upcycle\.model\.moe\.label_groups=2: the model depends on labels"):
        upcycle.final_config([], cfg.model)
    with pytest.raises(ConfigError, match=r"model\.moe\.routers=2: needs labels, which the layer alone"):
        MoELayer(8, rngs=nnx.Rngs(0), num_experts=4, routers=2)
    plain = run_config()
    for whole, labels, message in [
        (cfg, {}, r"data\.labels=\{\}: must be the labels of the run of distill\.teacher='runs/a'"),
        (cfg, {"c": 1}, r"data\.labels=\{'c': 1\}: must be the labels of the run .*valid: \{'b': 1\}"),
        (plain, {"b": 1}, r"data\.labels=\{'b': 1\}: has no effect: neither the model, nor a loss, nor distill"),
    ]:
        student = change(plain, distill={"teacher": "runs/a", "coef": 1.0}, data={"labels": labels})
        with pytest.raises(ConfigError, match=message):
            teacher._check_labels(student, whole)
    changes = overrides.changes_results
    assert changes(["sample.label"], texts=True) and not changes(["sample.label"]) and not changes(["sample.tokens"])
    with pytest.raises(ConfigError, match=r"sample\.label=1: has no effect"):
        change(plain, sample={"label": 1})
    mesh, _ = state_on("groups", (1, 1, 1))
    with pytest.raises(ConfigError, match=r"data\.labels=\{'b': 1\}: has no effect"):
        make_gradients(change(plain, data={"labels": {"b": 1}}), mesh)
    term = config.RouterLossConfig("label_information", 0.1)
    for wrong, message in [
        (plain, r"data\.labels=\{\}: must name labels for loss\.more\.a\.kind"),
        (cfg, r"loss\.more\.a\.kind='label_information': is a constant with model\.moe\.label_groups > 1"),
        (
            change(plain, model={"num_dense_layers": 3}, data={"labels": {"b": 1}}),
            r"a\.kind=.*: has no effect: no layer",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_gradients(change(wrong, loss={"more": {"a": term}}), mesh)
