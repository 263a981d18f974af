"""Back ends of attention against `xla`, values and gradients, with and without segments, under Explicit axes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_jax import config
from moe_jax.config import ModelConfig
from moe_jax.errors import ConfigError
from moe_jax.nn import attend
from moe_jax.parallel import sharding

MESH = (2, 1, 1)


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


def operands(b=2, s=256, n=4, m=2, h=16, segments=6, seed=0):
    """q, k, v, a cotangent, and segments that begin anywhere; the last one of row 0 is padding (id 0)."""
    rng = np.random.default_rng(seed)
    q, k, v, dy = (rng.normal(size=(b, s, heads, h)).astype(np.float32) for heads in (n, m, m, n))
    ids = 1 + np.sort(rng.integers(0, segments, (b, s)), axis=1).astype(np.int32)
    ids[0] = np.where(ids[0] == segments, 0, ids[0])
    return (q, k, v), dy, ids


def put(tree):
    return jax.device_put(tree, NamedSharding(mesh_of(*MESH), sharding.BATCH))


def with_gradients(fn, qkv, dy, segments):
    """y and the gradients of Σ y·dy, under the mesh."""

    def loss(qkv, dy, segments):
        y = fn(*qkv, segments)
        return jnp.sum(y * dy), y

    with jax.set_mesh(mesh_of(*MESH)):
        return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(put(qkv), put(dy), put(segments)))


def check(fn, qkv, dy, segments):
    got = with_gradients(fn, qkv, dy, segments)
    want = with_gradients(functools.partial(attend.attend, backend="xla"), qkv, dy, segments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


# --- TPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segmented", [False, True])
def test_splash_equals_xla(segmented):
    """In Pallas' interpreter, 2 blocks of 128 and grouped queries."""
    qkv, dy, ids = operands()
    local = functools.partial(attend._splash, interpret=True)
    fn = lambda *args: sharding.per_device(local, 4, check_vma=False)(*args)
    check(fn, qkv, dy, ids if segmented else None)


# --- GPU: only lowered here; benchmarks/attention.py compares on a GPU -----------------------------------------------


def cpu_packed(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, qkv_layout):
    """What cuDNN computes, by its interface: of every row the segments that are named, and rubbish everywhere else."""
    assert (mask_type.name, qkv_layout) == ("PADDING_CAUSAL", "BTNH")
    assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
    assert q_seqlen.dtype == q_offsets.dtype == jnp.int32 and q_offsets.shape[1] == q_seqlen.shape[1] + 1
    at = jnp.arange(q.shape[1])[None, :, None]
    inside = (
        (at >= q_offsets[:, None, :-1]) & (at < (q_offsets[:, :-1] + q_seqlen)[:, None, :]) & (q_seqlen > 0)[:, None]
    )
    segment = jnp.where(inside.any(2), inside.argmax(2), -1)
    mask = (segment[:, :, None] == segment[:, None, :])[:, None]
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, scale=scale)
    return jnp.where((segment >= 0)[:, :, None, None], y, jnp.nan + 0 * y)


@pytest.mark.parametrize("segments", [3, 23])
def test_cudnn_with_segments_names_every_segment_once(monkeypatch, segments):
    """The arithmetic around the kernel: 8 segments a call, so 3 need one and 23 need three. No rubbish gets out."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(attend, "PACKED", 8)
    monkeypatch.setattr(cudnn, "dot_product_attention", cpu_packed)
    qkv, dy, ids = operands(segments=segments, s=128)
    check(functools.partial(attend.attend, backend="cudnn"), qkv, dy, ids)


@pytest.mark.parametrize("segmented", [False, True])
def test_cudnn_lowers_forward_and_backward(monkeypatch, segmented):
    """For CUDA, from here: cuDNN's calls for a device's own sequences, with what they need to know of segments; no
    logits, and nothing that is left to the partitioner, which would gather the results everywhere."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    qkv, dy, ids = operands(h=64)

    def loss(qkv, dy, segments):
        return jnp.sum(attend.attend(*qkv, segments, "cudnn") * dy)

    with jax.set_mesh(mesh_of(*MESH)):
        args = put((*jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (qkv, dy)), ids if segmented else None))
        text = jax.jit(jax.grad(loss)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
    assert len(calls) == (4 if segmented else 2)  # with segments both again, in the loop over further ones
    for call in calls:
        if segmented:
            assert "PADDING_CAUSAL" in call and f"max_seg_per_batch\\22: {attend.PACKED}," in call
        assert re.search(rf"\(tensor<{len(qkv[0]) // math.prod(MESH)}x256x\d+x64xbf16>", call)
    assert "Partitioning" not in text
    assert not re.search(r"tensor<(\d+x)*256x256x", text)


# --- which one -------------------------------------------------------------------------------------------------------


def test_what_auto_chooses():
    def choose(platform, seq_len=4096, kind="", **fields):
        return attend.choose_attention(ModelConfig(head_dim=64, **fields), platform, kind, seq_len)

    for mask in (False, True):
        assert choose("tpu", segment_mask=mask) == ("splash", "TPU")
        assert choose("cpu", segment_mask=mask) == ("xla", "cpu")
    assert choose("tpu", 4000)[0] == "xla" and "blocks of 128, not 4000" in choose("tpu", 4000)[1]
    assert choose("gpu", segment_mask=False)[0] == choose("gpu", kind="NVIDIA H200")[0] == "cudnn"
    name, why = choose("gpu", kind="NVIDIA A100")
    assert name == "xla" and "Hopper GPU, this is NVIDIA A100" in why
    name, why = choose("gpu", segment_mask=False, compute_dtype="float32")
    assert name == "xla" and "bfloat16" in why
    assert choose("gpu", attention="cudnn") == ("cudnn", "set in the config")


@pytest.mark.parametrize(
    ("fields", "platform", "says"),
    [
        ({"attention": "splash"}, "gpu", "needs a TPU"),
        ({"attention": "splash", "seq_len": 200}, "tpu", "data.seq_len=200: must be a multiple of 128"),
        ({"attention": "cudnn"}, "tpu", "needs a GPU"),
        ({"attention": "cudnn", "compute_dtype": "float32"}, "gpu", "must be 'bfloat16'"),
        ({"attention": "cudnn", "head_dim": 12}, "gpu", "must be a multiple of 8"),
        ({"attention": "splash"}, "tpu", None),
        ({"attention": "cudnn"}, "gpu", None),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(fields, platform, says):
    c = config.default_config()
    c.data.seq_len = fields.pop("seq_len", 256)
    c.model.update(fields)
    if says is None:
        assert config.check_devices(config.build(c), 1, platform) == (1, 1, 1)
        return
    with pytest.raises(ConfigError, match=re.escape(says)):
        config.check_devices(config.build(c), 1, platform)
