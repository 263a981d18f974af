"""Models that mix what systems of the literature have: export, generation, several processes and resume.

More of what they do with the rest of the library is in test_stacks.py, test_places.py and test_routers_models.py.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_resume
import two_processes
from test_model import init, inputs_of
from test_resume import write_text

from moe_jax import config, model
from moe_jax.config import ExploreConfig, ModelConfig, RampConfig, RunConfig
from moe_jax.errors import FormatError
from moe_jax.evaluate.generate import generate
from moe_jax.hf.architectures import write_config
from moe_jax.run import checkpoint
from moe_jax.train import step
from moe_jax.train.state import init_state, process_rows, put_batch
from tests.systems import MESH, REPO, batch_rows, mesh_of

PLAIN = ModelConfig(
    vocab_size=512, d_model=16, num_layers=4, num_dense_layers=1, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8,
    qk_norm=True, compute_dtype="float32", moe=config.MoEConfig(num_experts=4, top_k=2, d_expert=8, renormalize=True),
)  # fmt: skip
# Late blocks, two numbers of experts, a table, and a router whose state passes all of them; latent experts with a norm,
# a gate of the shared ones, and biases of queries, keys and values.
MIXED = dataclasses.replace(
    PLAIN, num_layers=7, num_dense_layers=0, layers="2*(late dense moe:8) table", qkv_bias=True,
    moe=dataclasses.replace(PLAIN.moe, selection_bias=True, router="mlp", router_width=8, latent=12, latent_norm=True,
                            num_shared_experts=1, shared_gate="softmax"),
)  # fmt: skip
# A memory, post-norm, scales of the residual stream, fixed multipliers, NormHead.
BANKS = dataclasses.replace(
    PLAIN, num_dense_layers=0, layers="2*(memory moe)", memory=config.MemoryConfig(8, 2, 3, 6), norm="post",
    residual_scale=True, norm_head=True, qkv_bias=True, embedding_multiplier=2.0, attention_multiplier=0.2,
    residual_multiplier=0.5, logits_divisor=2.0,
    moe=dataclasses.replace(PLAIN.moe, latent=12, latent_norm=True, num_shared_experts=1, shared_gate="sigmoid"),
)  # fmt: skip
EXPLORE = ExploreConfig(RampConfig(0.5, 0.0, 3), noise=0.5, threshold=0.1)

NOT_WRITTEN = [
    ("moe.latent", 8), ("qkv_bias", True),
    ("layers", "dense moe dense moe:8"), ("layers", "2*(late dense)"), ("layers", "table 3*moe"),
    ("moe.router", "mlp"), ("moe.router", "cosine"), ("moe.choice", "expert"), ("moe.identity_experts", 2),
    ("moe.score", "sqrt_softplus"), ("moe.label_groups", 2), ("moe.routers", 2), ("untie", 2), ("layers", "4*table"),
]  # fmt: skip


BY_LABEL = config.MoEConfig(num_experts=2, top_k=1, d_expert=8, combine="one", table="label")


@pytest.mark.parametrize(("field", "value"), NOT_WRITTEN)
def test_export_refuses(field, value):
    """Export names the field that it cannot write, before it writes anything."""
    if field.startswith("moe."):
        cfg = dataclasses.replace(PLAIN, moe=dataclasses.replace(PLAIN.moe, **{field.removeprefix("moe."): value}))
    else:
        moe = BY_LABEL if value == "4*table" else PLAIN.moe
        cfg = dataclasses.replace(PLAIN, num_dense_layers=0 if field == "layers" else 1, moe=moe, **{field: value})
    with pytest.raises(FormatError, match=rf"differs in {field} \({re.escape(str(value))} here"):
        write_config(cfg, 16)


@pytest.mark.slow
def test_generation_with_a_cache():
    """Greedy samples are the argmax of the full forward pass over them: no route depends on later tokens."""
    params, bias = init(MIXED)
    out = generate(MIXED, mesh_of(1, 1, 1), params, bias, [[5], [3, 9, 14]], 4)
    for tokens, prompt in zip(out, (1, 3), strict=True):
        with jax.set_mesh(mesh_of(1, 1, 1)):
            hidden = model.abstract(MIXED).bind(params, bias)(inputs_of([tokens])).hidden
        logits = np.asarray(hidden[0] @ params["head"].T)
        assert tokens[prompt:] == logits.argmax(-1)[prompt - 1 : -1].tolist()


def saved_run(model_name: str, root: Path) -> RunConfig:
    return dataclasses.replace(test_resume.run_config(root), model=globals()[model_name], explore=EXPLORE)


def one_step(model_name: str) -> list[float]:
    """Numbers after a step on (2, 2, 2): loss, gradient, weights, and the load of each expert.

    The step is that of `test_resumed`, for which it is compiled already.
    """
    cfg, mesh = saved_run(model_name, REPO), mesh_of(*MESH)
    mine = process_rows(mesh, cfg.data.batch_size)
    rows = {name: values[mine] for name, values in batch_rows(cfg).items()}
    state, report = step.make_train_step(cfg, mesh)(init_state(cfg, mesh), put_batch(rows, mesh, cfg))
    with jax.set_mesh(mesh):
        size = jax.jit(lambda params: sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(params)))(state.params)
    loads = [np.asarray(sums.tokens_per_expert).ravel() for _, sums in sorted(report.router.items())]
    return [float(report.loss), float(report.grad_norm), float(size), *np.concatenate(loads).tolist()]


@pytest.mark.slow
def test_two_processes():
    numbers = {model_name: one_step(model_name) for model_name in ("MIXED", "BANKS")}
    code = f"""
import sys
sys.path.insert(0, "tests")
import numpy as np
import test_systems_mixed
for name, numbers in {numbers}.items():
    np.testing.assert_allclose(test_systems_mixed.one_step(name), numbers, rtol=1e-5, err_msg=name)
"""
    two_processes.run(code)


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["MIXED", "BANKS"])
def test_resumed(model_name, tmp_path):
    """Two steps, and two of a run that was saved after them, are four, bit for bit."""
    write_text(tmp_path)
    cfg = saved_run(model_name, tmp_path)
    straight = test_resume.Run(tmp_path, cfg, MESH).start().go(2)
    with checkpoint.Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        straight.save(checkpoints)
        straight.go(2)
        resumed = test_resume.Run(tmp_path, cfg, MESH).restore(checkpoints, 2).go(2)
    assert resumed.losses == straight.losses[2:]
    test_resume.assert_same_bits(test_resume.leaves(resumed.state), test_resume.leaves(straight.state))
