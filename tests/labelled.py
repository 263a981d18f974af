"""Models whose weights depend on labels, their states on meshes, and batches with labels."""

import dataclasses
import functools

import jax
import numpy as np

from moe_jax import config
from moe_jax.parallel import sharding
from moe_jax.train.state import abstract_state, init_state
from tests.test_invariance import V, batch_rows, run_config

T, E, M = 24, 8, 2
WAYS = {
    "groups": {"label_groups": 2},
    "routers": {"routers": 2},
    "experts": {"label_groups": 2, "choice": "expert", "score": "sigmoid"},
    "untied": {},
    "all": {"label_groups": 2, "routers": 2, "identity_experts": 1},
    "table": {"num_experts": 2, "top_k": 1, "combine": "one", "table": "label"},
}
MODEL = {"untied": {"untie": 2}, "all": {"untie": 2}, "table": {"untie": 2, "layers": "2*table"}}


def rows_of(padding: float) -> dict[str, np.ndarray]:
    """The batch of test_invariance.py with labels: two documents a row, and a row may have both labels.

    No token is twice in a row: two that begin a document, or follow their like there, would have equal scores, and
    rounding would decide which one an expert chooses.
    """
    rows, rng = batch_rows(padding), np.random.default_rng(3)
    low = np.minimum(rows["tokens"].min(1, keepdims=True), V - 16)  # unlike vocabulary
    rows["tokens"] = low + np.array([rng.permutation(16)[:8] for _ in low], np.int32)
    of_document = np.random.default_rng(2).integers(0, M, (len(rows["tokens"]), 2)).astype(np.int32)
    return rows | {"label": np.repeat(of_document, 4, axis=1)}


def labelled(way: str, *args, **kwargs) -> config.RunConfig:
    cfg = run_config(*args, **kwargs)
    own = {"selection_bias": False, "num_experts": 8} | WAYS[way]
    routed = dataclasses.replace(cfg.model.moe, **own)
    fields = {"num_layers": 2, "num_dense_layers": 0} | MODEL.get(way, {})
    model = dataclasses.replace(cfg.model, **fields, moe=routed)
    told = way in ("table", "groups", "experts")  # an expert tells the label, so that the loss would be a constant
    more = {} if told else {"apart": config.RouterLossConfig("label_information", 0.3)}
    coefs = {"load_balance_coef": 0.5 * (way not in ("experts", "table")), "router_z_coef": 0.1 * (way != "table")}
    loss = dataclasses.replace(cfg.loss, more=more, **coefs)
    data = dataclasses.replace(cfg.data, labels={"b": 1})
    sample = dataclasses.replace(cfg.sample, tokens=0)
    return dataclasses.replace(cfg, model=model, loss=loss, data=data, sample=sample)


@functools.cache
def state_on(way, shape):
    """The mesh and a fresh state on it; the values are those of one device."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    if mesh.size == 1:
        return mesh, init_state(labelled(way), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(labelled(way), mesh))
    return mesh, jax.device_put(jax.device_get(state_on(way, (1, 1, 1))[1]), shardings)
