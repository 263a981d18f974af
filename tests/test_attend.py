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
from moe_jax.errors import ConfigError
from moe_jax.nn import attend, chunked, packed
from moe_jax.parallel import sharding

MESH = (2, 1, 1)


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


def operands(b=2, s=256, n=4, m=2, h=16, w=None, segments=6, seed=0):
    """q, k, v, a cotangent, and segments that begin anywhere; the last one of row 0 is padding (id 0)."""
    rng = np.random.default_rng(seed)
    sizes = (n, h), (m, h), (m, w or h), (n, w or h)
    q, k, v, dy = (rng.normal(size=(b, s, *size)).astype(np.float32) for size in sizes)
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


def check(fn, qkv, dy, segments, window=0):
    got = with_gradients(fn, qkv, dy, segments)
    want = with_gradients(functools.partial(attend.attend, backend="xla", window=window), qkv, dy, segments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


# --- anywhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    ("length", "w", "cut"),
    [
        (30, 16, [(0, 30, 30)]),
        (128, 24, [(0, 64, 64), (64, 128, 64)]),
        (90, 8, [(0, 48, 48), (48, 96, 48)]),
        (92, 16, [(0, 32, 16), (32, 64, 16), (64, 96, 16)]),
    ],
)
def test_chunked_equals_xla(monkeypatch, length, w, cut, segmented):
    """One block; whole blocks; a last block on padding; several blocks of a span, in a loop. Heads of two sizes."""
    if len(cut) == 3:
        monkeypatch.setattr(chunked, "SPANS", 3)
        monkeypatch.setattr(chunked, "BLOCK", (16, 16))
    assert [span[:3] for span in chunked.spans(length)] == cut
    qkv, dy, ids = operands(s=length, w=w)
    check(functools.partial(attend.attend, backend="chunked"), qkv, dy, ids if segmented else None)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 511, 512, 513, 1024, 4096, 4097, 5000, 65536])
def test_chunked_covers_every_query_with_few_programs(length):
    cut = chunked.spans(length)
    assert [span.start for span in cut] == [0, *(span.stop for span in cut[:-1])]
    assert cut[-1].start < length <= cut[-1].stop and len(cut) <= chunked.SPANS
    assert all(span.block <= 256 and (span.stop - span.start) % span.block == 0 for span in cut)
    blocks = sum(span.stop - span.start for span in cut) // cut[0].block
    assert cut[-1].stop - length < 8 * blocks or len(cut) == 1


def test_chunked_needs_memory_for_a_block_of_queries():
    """The compiled gradient: twice the sequence takes twice the temporaries. With `xla` it would be four times."""

    def temporaries(length):
        x, ids = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
        loss = lambda x, ids: jnp.sum(attend.attend(x, x, x, ids, "chunked"))
        return jax.jit(jax.grad(loss)).lower(x, ids).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(4096), temporaries(8192)
    assert large < 2.2 * small and small < 4 * 4096**2  # less than one float32 matrix


# --- TPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segmented", "w"),
    [pytest.param(False, 16, marks=pytest.mark.slow), pytest.param(True, 16, marks=pytest.mark.slow), (True, 8)],
)
def test_splash_equals_xla(segmented, w):
    """Runs in Pallas' interpreter, with 2 blocks of 128, grouped queries, and values of another head size."""
    qkv, dy, ids = operands(w=w)
    local = functools.partial(attend._splash, interpret=True)
    fn = lambda *args: sharding.per_device(local, 4, check_vma=False)(*args)
    check(fn, qkv, dy, ids if segmented else None)


# --- GPU: only lowered here; benchmarks/attention.py compares on a GPU -----------------------------------------------


@pytest.mark.parametrize(("segmented", "w"), [(False, 64), (True, 64), (False, 48), (True, 48)])
def test_cudnn_lowers_forward_and_backward(monkeypatch, segmented, w):
    """For CUDA, from here: cuDNN's calls for a device's own sequences, with what they need to know of segments; no
    logits, and nothing that is left to the partitioner, which would gather the results everywhere."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    qkv, dy, ids = operands(h=64, w=w)

    def loss(qkv, dy, segments):
        return jnp.sum(attend.attend(*qkv, segments, "cudnn") * dy)

    with jax.set_mesh(mesh_of(*MESH)):
        args = put((*jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (qkv, dy)), ids if segmented else None))
        text = jax.jit(jax.grad(loss)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
    # With segments both for the first call and the first further one; both again, in the loop over more of them.
    assert len(calls) == (7 if segmented else 2)
    found = set()
    for call in calls:
        rows, length, sizes = re.search(
            r"\(tensor<(\d+)x(\d+)x\d+x(64)xbf16>.*?x\d+xbf16>.*?x(?:\d+)xbf16>", call
        ).groups()
        found.add((int(rows), int(length), int(re.search(r"max_seg_per_batch\\22: (\d+)", call).group(1))))
        assert ("PADDING_CAUSAL" in call) == segmented and sizes == "64"
    local = len(qkv[0]) // math.prod(MESH)
    sizes = packed.shapes(local, 256)
    calls_wanted = {(local, 256, sizes.whole // local), (sizes.rows, sizes.length, sizes.rest // sizes.rows)}
    assert found == (calls_wanted if segmented else {(local, 256, 1)})
    assert "Partitioning" not in text
    assert not re.search(r"tensor<(\d+x)*256x256x", text)


def test_old_cudnn_is_given_padded_values(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(attend, "_cudnn", functools.partial(plain, sizes=(sizes := set())))
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 90_900)
    qkv, dy, _ = operands(s=32, w=8)
    check(functools.partial(attend.attend, backend="cudnn"), qkv, dy, None)
    assert sizes == {16}


def plain(q, k, v, sizes, **options):
    sizes.update(x.shape[-1] for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, **options)


# --- which one -------------------------------------------------------------------------------------------------------


H200, A100 = "NVIDIA H200", "NVIDIA A100"
LATENT = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 192, "mla": {"kv_rank": 64, "rope_dim": 64, "v_dim": 128}}


@pytest.mark.parametrize(
    ("platform", "kind", "fields", "chosen", "why"),
    [
        ("tpu", "", {}, "splash", "TPU"),
        ("tpu", "", {"segment_mask": False}, "splash", "TPU"),
        ("tpu", "", LATENT, "splash", "TPU"),
        ("tpu", "", {"seq_len": 4000}, "chunked", "blocks of 128, not 4000"),
        ("cpu", "", {}, "chunked", "cpu"),
        ("cpu", "", LATENT, "chunked", "cpu"),
        ("gpu", H200, {}, "cudnn", H200),
        ("gpu", H200, {"segment_mask": False}, "cudnn", H200),
        ("gpu", H200, LATENT, "cudnn", H200),
        ("gpu", "NVIDIA B200", {}, "cudnn", "NVIDIA B200"),
        ("gpu", "NVIDIA B200", LATENT, "chunked", "head_dim=192 must be at most 128 on NVIDIA B200"),
        ("gpu", A100, {"segment_mask": False}, "cudnn", A100),
        ("gpu", A100, {}, "chunked", "segment_mask=True needs a Hopper GPU or a newer one, this is NVIDIA A100"),
        ("gpu", A100, {"segment_mask": False, "head_dim": 256}, "chunked", "head_dim=256 must be at most 128"),
        ("gpu", H200, {"head_dim": 264}, "chunked", "head_dim=264 must be at most 256"),
        ("gpu", H200, {"compute_dtype": "float32"}, "chunked", "must be 'bfloat16'"),
        ("gpu", A100, {"attention": "xla"}, "xla", "set in the config"),
    ],
)
def test_what_auto_chooses(platform, kind, fields, chosen, why):
    fields = {"head_dim": 64, **fields}
    seq_len = fields.pop("seq_len", 4096)
    name, found = attend.choose_attention(config.build_model(fields), platform, kind, seq_len)
    assert name == chosen and why in found


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({"attention": "splash"}, H200, "needs a TPU"),
        ({"attention": "splash", "seq_len": 200}, "TPU", "data.seq_len=200: must be a multiple of 128"),
        ({"attention": "cudnn"}, "TPU", "needs a GPU"),
        ({"attention": "cudnn", "compute_dtype": "float32"}, H200, "must be 'bfloat16'"),
        ({"attention": "cudnn", "head_dim": 12}, H200, "must be a multiple of 8"),
        ({"attention": "cudnn", "head_dim": 264}, H200, "must be at most 256 on NVIDIA H200; nearest valid: 256, or"),
        ({"attention": "cudnn"}, A100, "model.segment_mask=True: for model.attention='cudnn' needs a Hopper GPU"),
        ({"attention": "cudnn", "segment_mask": False, **LATENT, "head_dim": 128}, A100, "kv_rank=64: for"),
        ({"attention": "cudnn", **LATENT, "mla": {**LATENT["mla"], "v_dim": 100}}, H200, "v_dim=100: for"),
        ({"attention": "splash"}, "TPU", None),
        ({"attention": "splash", **LATENT}, "TPU", None),
        ({"attention": "cudnn"}, H200, None),
        ({"attention": "cudnn", **LATENT}, H200, None),
        ({"attention": "chunked", **LATENT}, A100, None),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(fields, kind, says):
    c = config.default_config()
    fields = dict(fields)
    c.data.seq_len = fields.pop("seq_len", 256)
    c.model.update(fields)
    platform = "tpu" if kind == "TPU" else "gpu"
    if says is None:
        assert config.check_devices(config.build(c), 1, platform, kind) == (1, 1, 1)
        return
    with pytest.raises(ConfigError, match=re.escape(says)):
        config.check_devices(config.build(c), 1, platform, kind)
