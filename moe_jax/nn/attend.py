"""softmax(q·k/√H) · v behind one function: its back ends, and which of them a machine gets.

| back end | segments                            | `[B, N, S, S]` | where                                          |
|----------|-------------------------------------|----------------|------------------------------------------------|
| `xla`    | a mask                              | materialised   | anywhere: the reference                        |
| `cudnn`  | packed sequences, `_cudnn_segments` | never          | NVIDIA GPUs; with segments Hopper or newer     |
| `splash` | compared block by block             | never          | TPU; S a multiple of 128                       |

Letters: N query heads, M key/value heads, H head size, W that of values where it is another (MLA).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.chips import is_hopper
from moe_jax.config import ModelConfig
from moe_jax.nn.remat import keep
from moe_jax.parallel import sharding
from moe_jax.parallel.axes import varying_like

LANES = 128  # splash works on blocks of whole multiples of it
BLOCKS = (512, 256, LANES)  # splash: queries and keys of a block, the largest that divides S
PACKED = 32  # cudnn: segments of a sequence that one call takes


def choose_attention(cfg: ModelConfig, platform: str, device_kind: str, seq_len: int) -> tuple[str, str]:
    """The back end for a platform, and why: printed once at start-up."""
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
    """Why `splash` cannot do a sequence length; "" if it can."""
    return f"splash needs sequences of whole blocks of {LANES}, not {seq_len}" if seq_len % LANES else ""


def cudnn_cannot(cfg: ModelConfig) -> str:
    """Why `cudnn` cannot do a model; "" if it can."""
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
    """softmax(q·k/√H) · v, causal; with `segments` a query sees keys of its own segment only. W = H but for `xla`.

    A segment is a run of equal ids: no back end has to know what ids that come back mean.
    What the backward pass needs of it is kept by `model.remat='selective'`: nothing is attended to twice.
    """
    if backend == "cudnn" and segments is None:
        # Left to itself under a mesh, jax.nn computes a device's own sequences and then gathers all of them everywhere.
        return sharding.per_device(_cudnn, 3)(q, k, v)
    if backend == "splash":
        # The kernel does not say over which axes its results vary, so the check cannot pass. Nothing is lost: every
        # operand and result is cut along the batch over the whole mesh, so there is nothing to reduce.
        return sharding.per_device(_splash, 4, check_vma=False)(q, k, v, segments)
    return sharding.per_device({"xla": _xla, "cudnn": _cudnn_segments}[backend], 4)(q, k, v, segments)


def _xla(q, k, v, segments):
    mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    return keep(plain_attention(q, k, v, mask=mask, is_causal=True), "attention")


def plain_attention(
    q: Float[Array, "B S N H"], k: Float[Array, "B Z M H"], v: Float[Array, "B Z M W"], **how
) -> Float[Array, "B S N W"]:
    """JAX's reference, with its options `how`. It takes heads of one size: smaller ones are filled up with zeros."""
    width, most = v.shape[-1], max(q.shape[-1], v.shape[-1])
    fill = lambda x: x if x.shape[-1] == most else jnp.pad(x, [(0, 0)] * 3 + [(0, most - x.shape[-1])])
    how = {"scale": q.shape[-1] ** -0.5, **how}
    return jax.nn.dot_product_attention(fill(q), fill(k), fill(v), implementation="xla", **how)[..., :width]


# --- TPU -------------------------------------------------------------------------------------------------------------


def _splash(q, k, v, segments, interpret=False):
    """JAX's Pallas kernel. Heads come first there; it keeps its result and a logsumexp a query for its backward pass.

    The scale is put on q, in its own dtype: exact where √H is a power of two, else one rounding more than elsewhere.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    kernel = _splash_kernel(q.shape[1], q.shape[2], interpret)
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    args = heads_first(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)), heads_first(k), heads_first(v)
    ids = None if segments is None else SegmentIds(segments, segments)
    return heads_first(jax.vmap(kernel)(*args, ids))


def _splash_kernel(seq_len: int, heads: int, interpret: bool):
    """Not to be kept between traces: its tables of blocks are constants of the program that is being traced."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in BLOCKS if seq_len % size == 0)
    of = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in of})
    mask = splash.MultiHeadMask([splash.CausalMask((seq_len, seq_len))] * heads)
    return splash.make_splash_mha_single_device(
        mask=mask, block_sizes=sizes, residual_checkpoint_name="attention", interpret=interpret
    )


# --- GPU -------------------------------------------------------------------------------------------------------------


def _cudnn(q, k, v):
    # Its residuals have no names: see remat.py.
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _cudnn_segments(q, k, v, segments):
    """cuDNN's packed sequences: the segments of a row are so many sequences, each with its place and its length.

    A call has room for `PACKED` segments a row, because the room is memory (float32 `[B · PACKED, N, S]`). The rest of
    a row that has more follows in further calls, so that the result never depends on it.
    """
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    run: Int[Array, "B S"] = jnp.cumsum(first, axis=1, dtype=jnp.int32)  # the number of its segment in the row
    if (groups := q.shape[2] // k.shape[2]) > 1 and jax.__version_info__ < (0, 11, 2):
        # Older versions place keys as if there were as many of their heads as of the queries'.
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    y = _packed(q, k, v, run, 0)
    return jnp.where((run < PACKED)[:, :, None, None], y, _packed_rest(q, k, v, run))


def _packed(q, k, v, run, first):
    """Attention of segments first … first + PACKED − 1 of every row; zeros elsewhere, and so are the gradients."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # jax.nn has no way to say where segments are

    ids = (first + jnp.arange(PACKED, dtype=jnp.int32))[None, None, :]
    size = jnp.sum(run[:, :, None] == ids, axis=1, dtype=jnp.int32)
    place = jnp.sum(run[:, :, None] < ids, axis=1, dtype=jnp.int32)
    size, place = (jnp.where(size > 0, x, -1) for x in (size, place))  # −1: there is no such segment
    place = jnp.pad(place, ((0, 0), (0, 1)), constant_values=-1)
    here = ((run >= first) & (run < first + PACKED))[:, :, None, None]
    q, k, v = (jnp.where(here, x, 0) for x in (q, k, v))
    y = cudnn.dot_product_attention(
        q, k, v, q_seqlen=size, kv_seqlen=size, q_offsets=place, kv_offsets=place, scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL, qkv_layout="BTNH",
    )  # fmt: skip
    return jnp.where(here, y, 0)


@jax.custom_vjp
def _packed_rest(q, k, v, run):
    """Attention of all segments from number PACKED on, PACKED at a time; zeros elsewhere. Usually there are none."""
    return _over_rest(run, lambda first: _packed(q, k, v, run, first), varying_like(jnp.zeros(q.shape, q.dtype), q))


def _packed_rest_backward(saved, dy):
    *qkv, run = saved
    of = lambda first: jax.vjp(lambda *x: _packed(*x, run, first), *qkv)[1](dy)
    return *_over_rest(run, of, tuple(varying_like(jnp.zeros(x.shape, x.dtype), x) for x in qkv)), None


_packed_rest.defvjp(lambda *args: (_packed_rest(*args), args), _packed_rest_backward)


def _over_rest(run, of, start):
    """start + Σ of(first) over the first segments of the calls after the first one; no token is in two of them."""
    last = jnp.max(run)
    add = lambda carry: (carry[0] + PACKED, jax.tree.map(jnp.add, carry[1], of(carry[0])))
    first = varying_like(jnp.asarray(PACKED, jnp.int32), run)
    return jax.lax.while_loop(lambda carry: carry[0] <= last, add, (first, start))[1]
