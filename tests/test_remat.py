"""What `model.remat` keeps of a layer between its forward and its backward pass, number by number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from moe_jax import model
from moe_jax.config import MemoryConfig, ModelConfig, MoEConfig
from moe_jax.model.blocks import Inputs
from moe_jax.moe import experts
from moe_jax.moe.layer import TokenInfo
from moe_jax.moe.routing import Routing
from moe_jax.nn import attend, remat
from moe_jax.parallel import sharding

MOE = MoEConfig(num_experts=16, top_k=4, d_expert=24, num_shared_experts=2)
BANK = dataclasses.replace(MOE, latent=8, shared_gate="softmax")
CFG = ModelConfig(
    vocab_size=32, d_model=20, num_layers=3, num_dense_layers=1, d_ff=36, num_heads=4, num_kv_heads=2, head_dim=6,
    qk_norm=True, moe=MOE,
)  # fmt: skip


def traced(cfg, batch, fn):
    """fn(forward pass as a function of the parameters, parameters), of shapes only: `batch` rows of 4 tokens."""
    ints = jax.ShapeDtypeStruct((batch, 4), jnp.int32, sharding=jax.NamedSharding(mesh(), sharding.BATCH))
    inputs = Inputs(ints, ints, ints, TokenInfo(ints.update(dtype=jnp.bool_), ints))
    graph = model.abstract(cfg)

    def forward(params, inputs):
        out = graph.bind(params, {})(inputs)
        return out.hidden, out.stats

    with jax.set_mesh(mesh()):
        return jax.eval_shape(lambda p, i: fn(lambda p: forward(p, i), p), graph.shapes, inputs)


@functools.cache
def mesh():
    return sharding.make_mesh((1, 1, 1), jax.devices()[:1])


@functools.cache
def kept(cfg, batch):
    """Bytes of all that the backward pass is given."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(traced(cfg, batch, lambda f, p: jax.vjp(f, p)[1])))


def of_a_token(cfg, **more_layers):
    """Bytes a token in one more layer: neither weights nor anything that a batch or a model has once."""
    larger = dataclasses.replace(cfg, **more_layers)
    return ((kept(larger, 4) - kept(larger, 2)) - (kept(cfg, 4) - kept(cfg, 2))) / 8


def test_selective_keeps_what_its_table_says():
    """The table of remat.py, in bytes a token, for an MoE, a dense layer and a memory; bfloat16."""
    cfg = dataclasses.replace(CFG, remat="selective")
    both = 2 * (20 + (24 + 2 * 12) + 24 + 20)  # the layer's input, qkv, attention, residual
    assert of_a_token(cfg, num_layers=4, num_dense_layers=2) == both + 2 * 2 * 36
    assert of_a_token(cfg, num_layers=4) == both + 4 * 16 + 2 * 4 * 4 + 2 * 2 * (4 * 24 + 2 * 24)
    memory = MemoryConfig(keys=16, heads=3, top=5, key_dim=8)
    cfg = dataclasses.replace(cfg, num_layers=2, num_dense_layers=0, layers="2*memory", memory=memory)
    larger = of_a_token(cfg, num_layers=3, layers="3*memory")
    assert larger == both + 2 * 2 * 36 + 2 * 3 * 8 + (4 + 4) * 3 * 5


@pytest.mark.slow
def test_selective_keeps_what_latent_experts_read_and_what_a_gate_weighs():
    cfg = dataclasses.replace(CFG, remat="selective")
    bank = dataclasses.replace(cfg, moe=BANK)
    more = 2 * 2 * 8 + 2 * 2 * 20  # in and out of the latent; the two results that the gate weighs
    assert of_a_token(bank, num_layers=4) == of_a_token(cfg, num_layers=4) + more


def test_every_kept_name_is_used_and_no_other():
    names = set()

    def note(f, params):
        found = equations(jax.make_jaxpr(f)(params).jaxpr)
        names.update(eqn.params["name"] for eqn in found if eqn.primitive.name == "name")
        return 0

    traced(dataclasses.replace(CFG, moe=BANK), 2, note)
    traced(dataclasses.replace(CFG, num_dense_layers=0, layers="memory 2*moe"), 2, note)
    assert names == set(remat.KEPT)
    with pytest.raises(ValueError, match="'queries' is not in"):
        remat.keep(jnp.zeros(3), "queries")


def equations(jaxpr, skip=()):
    """Of a jaxpr and all in it, except in loops of the kinds in `skip` and in what has no result, which XLA drops."""
    for eqn in jaxpr.eqns:
        if not eqn.outvars:
            continue
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if (hasattr(value, "eqns") or hasattr(value, "jaxpr")) and eqn.primitive.name not in skip:
                yield from equations(getattr(value, "jaxpr", value), skip)


@pytest.mark.parametrize(
    ("backend", "forward", "both"),
    [
        ("splash", 1, 3),
        ("cudnn", 1, 2),
        ("cudnn two sizes", 1, 2),
        ("cudnn with segments", 2, 4),
        ("chunked", 2 * 2, 7 * 2),
        ("chunked with segments", 2 * 2, 7 * 2),
    ],
)
def test_selective_attends_once(monkeypatch, backend, forward, both):
    """Attention kernels of forward and backward pass together: as many as without remat; full remat repeats the forward
    ones. cuDNN's loops over further segments, which usually do nothing, are not counted. For `chunked`, which has two
    blocks here, products are: two forward, and five in the backward pass."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    at = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh(), sharding.BATCH))
    x, ids = at((2, 128, 4, 16), jnp.bfloat16), at((2, 128), jnp.int32) if "with" in backend else None

    def kernels(policy):
        # Between something that needs its operand and something that needs its result, as in a layer.
        def layer(x, ids):
            q, k, v = [jnp.cos(x)] * 3
            return jnp.sin(attend.attend(q, k, v[..., :8] if "two" in backend else v, ids, backend.split()[0]))

        layer = jax.checkpoint(layer, policy=remat.POLICIES[policy]) if policy != "none" else layer
        with jax.set_mesh(mesh()):
            jaxpr = jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(layer(*args))))(x, ids).jaxpr
        names = [eqn.primitive.name for eqn in equations(jaxpr, ("while",))]
        counted = ("dot_general",) if "chunked" in backend else ("pallas_call", "dot_product_attention_")
        return sum(name.startswith(counted) for name in names)

    assert kernels("none") == kernels("selective") == both
    assert kernels("full") == both + forward


def test_selective_repeats_no_expert_matmul():
    """Three forward, two gradients of each; full remat repeats gate and up. The down projection's result has no use in
    the backward pass, whose combine weights sit on its input."""
    t, e, (d, f) = 6, MOE.num_experts, (20, 24)
    of = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    routing = Routing(of((t, 4), jnp.int32), of((t, 4), jnp.float32), of((t, 4), jnp.bool_))
    weights = experts.ExpertWeights(of((e, d, f)), of((e, d, f)), of((e, f, d)))

    def matmuls(policy):
        def layer(x, combine, w, ids, valid):
            x = jnp.cos(x)  # as in a layer, something needs the operand's value
            y, _ = experts.grouped(x, Routing(ids, combine, valid), w, experts.ExpertCompute(MOE, "ragged_dot"))
            return y

        layer = jax.checkpoint(layer, policy=remat.POLICIES[policy]) if policy != "none" else layer
        total = lambda *args: jnp.sum(jnp.sin(layer(*args)))
        args = (of((t, d)), routing.weights, weights, routing.experts, routing.valid)
        program = jax.jit(jax.grad(total, (0, 1, 2))).trace(*args).jaxpr
        return sum(eqn.primitive.name == "ragged_dot_general" for eqn in equations(program.jaxpr))

    assert matmuls("none") == matmuls("selective") == 9
    assert matmuls("full") == 11
