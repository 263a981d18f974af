"""softmax(q·k/√H) · v behind one function: its back ends, and the choice among them.

| back end | segments                            | `[B, N, S, S]` | where it runs                                  |
|----------|-------------------------------------|----------------|------------------------------------------------|
| `xla`    | a mask                              | materialised   | anywhere: the reference                        |
| `cudnn`  | packed sequences, `_cudnn_segments` | never          | NVIDIA GPUs; with segments Hopper or newer     |
| `splash` | compared block by block             | never          | TPU; S a multiple of 128                       |

Letters: N query heads, M key/value heads, H head size of queries and keys, W that of values (in MLA it differs from H).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.chips import is_hopper
from moe_jax.config import ModelConfig
from moe_jax.nn.remat import keep
from moe_jax.parallel import sharding
from moe_jax.parallel.axes import varying_like

LANES = 128  # sizes of splash's blocks are multiples of it
BLOCKS = (512, 256, LANES)  # splash: queries and keys of a block; the largest that divides S is taken
PACKED = 32  # cudnn: segments of a sequence that one call handles


def choose_attention(cfg: ModelConfig, platform: str, device_kind: str, seq_len: int) -> tuple[str, str]:
    """Chooses the back end for a platform. Also returns the reason, which is printed at start-up."""
    if cfg.attention != "auto":
        return cfg.attention, "set in the config"
    if cfg.mla.kv_rank:
        return "xla", "the only one for MLA, whose heads have two sizes"
    if platform == "tpu":
        why = splash_cannot(seq_len)
        return ("xla", why) if why else ("splash", "TPU")
    if platform not in ("gpu", "cuda"):
        return "xla", platform
    why = cudnn_cannot(cfg)
    if cfg.segment_mask and not is_hopper(device_kind):
        why = why or f"cuDNN's packed sequences need a Hopper GPU, this is {device_kind}"
    return ("xla", why) if why else ("cudnn", device_kind)


def splash_cannot(seq_len: int) -> str:
    """The reason why `splash` does not support a sequence length; "" if it does."""
    return f"splash needs sequences of whole blocks of {LANES}, not {seq_len}" if seq_len % LANES else ""


def cudnn_cannot(cfg: ModelConfig) -> str:
    """The reason why `cudnn` does not support a model; "" if it does."""
    if cfg.compute_dtype != "bfloat16":
        return f"cuDNN needs bfloat16, not {cfg.compute_dtype}"
    small = cfg.head_dim % 8 == 0 and cfg.head_dim <= 128
    return "" if small else f"cuDNN needs a head size up to 128 that 8 divides, not {cfg.head_dim}"


def attend(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S M H"],
    v: Float[Array, "B S M W"],
    segments: Int[Array, "B S"] | None,
    backend: str,
) -> Float[Array, "B S N W"]:
    """Computes causal softmax(q·k/√H) · v. With `segments`, a query attends only to keys of its own segment.

    A segment is a run of equal ids; an id must not come back later in a row, since back ends differ there. Only `xla`
    allows W ≠ H. `model.remat='selective'` keeps what the backward pass needs, so attention is not computed again.
    """
    if backend == "cudnn" and segments is None:
        # Without per_device, jax.nn computes each device's own sequences and then gathers all of them on every device.
        return sharding.per_device(_cudnn, 3)(q, k, v)
    if backend == "splash":
        # The kernel does not mark the axes that its results vary over, so the check cannot pass. It is not needed: each
        # operand and result is sharded along the batch over the whole mesh, so nothing has to be reduced.
        return sharding.per_device(_splash, 4, check_vma=False)(q, k, v, segments)
    return sharding.per_device({"xla": _xla, "cudnn": _cudnn_segments}[backend], 4)(q, k, v, segments)


def _xla(q, k, v, segments):
    mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    return keep(plain_attention(q, k, v, mask=mask, is_causal=True), "attention")


def plain_attention(
    q: Float[Array, "B S N H"], k: Float[Array, "B Z M H"], v: Float[Array, "B Z M W"], **options
) -> Float[Array, "B S N W"]:
    """Calls JAX's reference with its `options`. It needs heads of one size, so smaller ones are padded with zeros."""
    width, size = v.shape[-1], max(q.shape[-1], v.shape[-1])
    pad = lambda x: x if x.shape[-1] == size else jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])])
    options = {"scale": q.shape[-1] ** -0.5, **options}
    return jax.nn.dot_product_attention(pad(q), pad(k), pad(v), implementation="xla", **options)[..., :width]


# --- TPU -------------------------------------------------------------------------------------------------------------


def _splash(q, k, v, segments, interpret=False):
    """Calls JAX's Pallas kernel. It keeps its result and the logsumexp of each query for its backward pass.

    The scale multiplies q in its own dtype. This is exact where √H is a power of two; otherwise it rounds once more
    than the other back ends do.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    kernel = _splash_kernel(q.shape[1], q.shape[2], interpret)
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    args = heads_first(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)), heads_first(k), heads_first(v)
    ids = None if segments is None else SegmentIds(segments, segments)
    return heads_first(jax.vmap(kernel)(*args, ids))


def _splash_kernel(seq_len: int, heads: int, interpret: bool):
    """Makes the kernel anew in each trace: its tables of blocks are constants of the program that is traced."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in BLOCKS if seq_len % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
    mask = splash.MultiHeadMask([splash.CausalMask((seq_len, seq_len))] * heads)
    return splash.make_splash_mha_single_device(
        mask=mask, block_sizes=sizes, residual_checkpoint_name="attention", interpret=interpret
    )


# --- GPU -------------------------------------------------------------------------------------------------------------


def _cudnn(q, k, v):
    # Its residuals have no names; `remat.KEPT_PRIMITIVES` keeps them.
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _cudnn_segments(q, k, v, segments):
    """Calls cuDNN with packed sequences: each segment of a row is a sequence with its own offset and length.

    A call handles `PACKED` segments a row, because it needs memory for each (float32 `[B · PACKED, N, S]`). Further
    calls compute the rest of rows that have more, so the result does not depend on `PACKED`.
    """
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    segment: Int[Array, "B S"] = jnp.cumsum(first, axis=1, dtype=jnp.int32)  # its number in the row, from 0
    if (groups := q.shape[2] // k.shape[2]) > 1 and jax.__version_info__ < (0, 11, 2):
        # Older versions compute the offsets of keys as if there were as many key heads as query heads.
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    y = _packed(q, k, v, segment, 0)
    return jnp.where((segment < PACKED)[:, :, None, None], y, _packed_rest(q, k, v, segment))


def _packed(q, k, v, segment, first):
    """Attention of segments first … first + PACKED − 1 of every row. Results and gradients of others are zeros."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # jax.nn does not take the offsets

    ids = (first + jnp.arange(PACKED, dtype=jnp.int32))[None, None, :]
    size = jnp.sum(segment[:, :, None] == ids, axis=1, dtype=jnp.int32)
    offset = jnp.sum(segment[:, :, None] < ids, axis=1, dtype=jnp.int32)
    size, offset = (jnp.where(size > 0, x, -1) for x in (size, offset))  # −1: there is no such segment
    offset = jnp.pad(offset, ((0, 0), (0, 1)), constant_values=-1)
    inside = ((segment >= first) & (segment < first + PACKED))[:, :, None, None]
    q, k, v = (jnp.where(inside, x, 0) for x in (q, k, v))
    y = cudnn.dot_product_attention(
        q, k, v, q_seqlen=size, kv_seqlen=size, q_offsets=offset, kv_offsets=offset, scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL, qkv_layout="BTNH",
    )  # fmt: skip
    return jnp.where(inside, y, 0)


@jax.custom_vjp
def _packed_rest(q, k, v, segment):
    """Attention of segments from number PACKED on, PACKED at a time; zeros elsewhere. Usually there are none."""
    start = varying_like(jnp.zeros(q.shape, q.dtype), q)
    return _sum_over_rest(segment, lambda first: _packed(q, k, v, segment, first), start)


def _packed_rest_backward(saved, dy):
    *qkv, segment = saved
    gradients = lambda first: jax.vjp(lambda *x: _packed(*x, segment, first), *qkv)[1](dy)
    return *_sum_over_rest(segment, gradients, tuple(varying_like(jnp.zeros(x.shape, x.dtype), x) for x in qkv)), None


_packed_rest.defvjp(lambda *args: (_packed_rest(*args), args), _packed_rest_backward)


def _sum_over_rest(segment, fn, start):
    """Returns start + Σ fn(first) for first = PACKED, 2·PACKED, … up to the last segment. A token is in one call."""
    last = jnp.max(segment)
    add = lambda carry: (carry[0] + PACKED, jax.tree.map(jnp.add, carry[1], fn(carry[0])))
    first = varying_like(jnp.asarray(PACKED, jnp.int32), segment)
    return jax.lax.while_loop(lambda carry: carry[0] <= last, add, (first, start))[1]
