"""softmax(q·k/√H) · v behind one function: its back ends, and the choice among them.

| back end  | segments                     | window          | `[B, N, S, S]` | where it runs                          |
|-----------|------------------------------|-----------------|----------------|----------------------------------------|
| `xla`     | a mask                       | a mask          | materialised   | anywhere: the reference                |
| `chunked` | compared block by block      | only its keys   | never          | anywhere                               |
| `cudnn`   | packed sequences (packed.py) | of the kernel   | never          | NVIDIA GPUs; segments and MLA need     |
|           |                              |                 |                | Hopper or newer; no window with MLA    |
| `splash`  | compared block by block      | only its blocks | never          | TPU; S a multiple of 128               |

With a window of W tokens a query sees its own token and the W − 1 before it.

Letters: N query heads, M key/value heads, H head size of queries and keys, W that of values (in MLA it differs from H).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.chips import is_hopper
from moe_jax.config import ModelConfig, cudnn_refusals
from moe_jax.nn import cudnn
from moe_jax.nn.chunked import chunked_attention
from moe_jax.nn.packed import packed_attention
from moe_jax.nn.remat import keep
from moe_jax.parallel import sharding

LANES = 128  # sizes of splash's blocks are multiples of it
ORDINARY = 128  # numbers of a head up to which every GPU takes it; for more, JAX asks for a Hopper GPU where it traces
BLOCKS = (512, 256, LANES)  # splash: queries and keys of a block; the largest that divides S is taken


def choose_attention(cfg: ModelConfig, platform: str, device_kind: str, seq_len: int) -> tuple[str, str]:
    """Chooses the back end for a platform. Also returns the reason, which is printed at start-up."""
    if cfg.attention != "auto":
        return cfg.attention, "set in the config"
    if platform == "tpu":
        why = splash_cannot(seq_len)
        return ("chunked", why) if why else ("splash", "TPU")
    if platform not in ("gpu", "cuda"):
        return "chunked", platform
    why = cudnn_cannot(cfg, device_kind)
    tried = is_hopper(device_kind) or not cfg.segment_mask
    return ("chunked", why) if why else ("cudnn", device_kind if tried else f"{device_kind}; has run on an H200 only")


def splash_cannot(seq_len: int) -> str:
    """The reason why `splash` does not support a sequence length; "" if it does."""
    return f"splash needs sequences of whole blocks of {LANES}, not {seq_len}" if seq_len % LANES else ""


def cudnn_cannot(cfg: ModelConfig, device_kind: str) -> str:
    """The reason why `cudnn` does not support a model on a GPU; "" if it does."""
    refusals = (f"for cuDNN {field}={value!r} {rule}" for field, value, rule, _ in cudnn_refusals(cfg, device_kind))
    return next(refusals, "")


def attend(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S M H"],
    v: Float[Array, "B S M W"],
    segments: Int[Array, "B S"] | None,
    backend: str,
    window: int = 0,
) -> Float[Array, "B S N W"]:
    """Computes causal softmax(q·k/√H) · v. With `segments`, a query attends only to keys of its own segment.

    A segment is a run of equal ids; an id must not come back later in a row, since back ends differ there.
    window: number of tokens that a query sees, its own included; 0, or S and more: all before it.
    `model.remat='selective'` keeps what the backward pass needs, so attention is not computed again.
    """
    window = window if window < q.shape[1] else 0
    if backend == "cudnn" and segments is None:
        # Without per_device, jax.nn computes each device's own sequences and then gathers all of them on every device.
        ordinary = q.shape[-1] == v.shape[-1] <= ORDINARY
        return sharding.per_device(_with(_cudnn if ordinary else _cudnn_whole_rows, window), 3)(q, k, v)
    if backend == "splash":
        # The kernel does not mark the axes that its results vary over, so the check cannot pass. It is not needed: each
        # operand and result is sharded along the batch over the whole mesh, so nothing has to be reduced.
        return sharding.per_device(_with(_splash, window), 4, check_vma=False)(q, k, v, segments)
    local = {"xla": _xla, "chunked": chunked_attention, "cudnn": _cudnn_segments}[backend]
    return sharding.per_device(_with(local, window), 4)(q, k, v, segments)


def _with(local: Callable, window: int) -> Callable:
    return functools.partial(local, window=window) if window else local


def _xla(q, k, v, segments, window=0):
    mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    if window:
        at = jnp.arange(q.shape[1])
        near = (at[:, None] - at[None, :] < window)[None, None]
        mask = near if mask is None else mask & near
    return keep(plain_attention(q, k, v, mask=mask, is_causal=True), "attention")


def plain_attention(
    q: Float[Array, "B S N H"], k: Float[Array, "B Z M H"], v: Float[Array, "B Z M W"], **options
) -> Float[Array, "B S N W"]:
    """Calls JAX's reference with its `options`."""
    return _of_one_size(functools.partial(jax.nn.dot_product_attention, implementation="xla"), q, k, v, **options)


def _of_one_size(attention: Callable, q, k, v, **options):
    """Calls an attention that needs heads of one size: smaller ones are padded with zeros, which is exact."""
    width, size = v.shape[-1], max(q.shape[-1], v.shape[-1])
    pad = lambda x: x if x.shape[-1] == size else jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])])
    options = {"scale": q.shape[-1] ** -0.5, **options}
    return attention(pad(q), pad(k), pad(v), **options)[..., :width]


# --- TPU -------------------------------------------------------------------------------------------------------------


def _splash(q, k, v, segments, window=0, interpret=False):
    """Calls JAX's Pallas kernel. It keeps its result and the logsumexp of each query for its backward pass.

    The scale multiplies q in its own dtype. This is exact where √H is a power of two; otherwise it rounds once more
    than the other back ends do.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    kernel = _splash_kernel(q.shape[1], q.shape[2], window, interpret)
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    args = heads_first(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)), heads_first(k), heads_first(v)
    ids = None if segments is None else SegmentIds(segments, segments)
    return heads_first(jax.vmap(kernel)(*args, ids))


def _splash_kernel(seq_len: int, heads: int, window: int, interpret: bool):
    """Makes the kernel anew in each trace: its tables of blocks are constants of the program that is traced."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in BLOCKS if seq_len % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
    shape = (seq_len, seq_len)
    one = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    mask = splash.MultiHeadMask([one] * heads)
    return splash.make_splash_mha_single_device(
        mask=mask, block_sizes=sizes, residual_checkpoint_name="attention", interpret=interpret
    )


# --- GPU -------------------------------------------------------------------------------------------------------------


def _cudnn(q, k, v, window=0, **options):
    # Its residuals have no names; `remat.KEPT_PRIMITIVES` keeps them.
    options |= {"local_window_size": (window - 1, 0)} if window else {}
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn", **options)


def _cudnn_whole_rows(q, k, v, window=0):
    both = q.shape[-1] == v.shape[-1] or cudnn.version() >= cudnn.TWO_SIZES
    return cudnn.whole_rows(q, k, v, window) if both else _of_one_size(_with(_cudnn, window), q, k, v)


def _cudnn_segments(q, k, v, segments, window=0):
    return _of_one_size(functools.partial(packed_attention, segments=segments, window=window), q, k, v)
