"""cuDNN's attention, forward and backward, by the primitives inside JAX's own wrapper.

`jax.nn.dot_product_attention` knows neither values of another head size than the keys' nor documents packed in one row.
The primitives below it know both. Their wrapper places each list of segments row by row and multiplies every offset by
the queries' sizes; here the caller says where each segment begins, so one list serves all rows of a device.

Letters: P rows, T tokens of a row, N query heads, M key/value heads, H head size of queries and keys, W that of values,
R segments of a call.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.errors import UserError
from moe_jax.nn.remat import keep

TWO_SIZES = 91_000  # the first version of cuDNN, 9.10, that takes values of another head size than the keys'


class Packed(NamedTuple):
    """The segments of a call. Each lies in at most T tokens anywhere among the P·T; the number R is a multiple of P."""

    offset: Int[Array, "R"]  # its first token, among all P·T; P·T: there is no such segment
    size: Int[Array, "R"]  # tokens; 0: there is no such segment


def version() -> int:
    """The version of cuDNN, such as 91000 for 9.10. Raises RuntimeError if there is none."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.check_cudnn_version()


def forward(
    q: Float[Array, "P T N H"],
    k: Float[Array, "P T M H"],
    v: Float[Array, "P T M W"],
    packed: Packed | None,
    scale: float,
    window: int = 0,
) -> tuple[Float[Array, "P T N W"], Float[Array, "R N T"]]:
    """Returns causal attention, and the logsumexp of each query, which the backward pass needs.

    window: number of tokens that a query sees, its own included; 0: all before it.

    Without `packed`, each row is one sequence, and R = P. With it, results of tokens outside its segments are rubbish,
    and H must equal W: cuDNN is given one list of offsets for keys and values.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    operands, options = _call(cudnn, q, k, v, packed, scale, window)
    return tuple(cudnn._dot_product_attention_fwd_p.bind(*operands, is_training=True, **options))


def backward(
    q: Float[Array, "P T N H"],
    k: Float[Array, "P T M H"],
    v: Float[Array, "P T M W"],
    packed: Packed | None,
    scale: float,
    lse: Float[Array, "R N T"],
    y: Float[Array, "P T N W"],
    dy: Float[Array, "P T N W"],
    window: int = 0,
) -> tuple[Float[Array, "P T N H"], Float[Array, "P T M H"], Float[Array, "P T M W"]]:
    """Returns the gradients of q, k and v. With `packed`, those of tokens outside its segments are rubbish."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    operands, options = _call(cudnn, q, k, v, packed, scale, window)
    return tuple(cudnn._dot_product_attention_bwd_p.bind(*operands, lse, y, dy, **options))


def _call(cudnn, q, k, v, packed, scale, window):
    """Operands and parameters that both passes have."""
    cudnn.check_cudnn_version()  # raises an error that says so where there is no cuDNN
    none = jnp.zeros(0, q.dtype)
    if packed is None:
        lengths, offsets, mask = (none, none), (none, none), cudnn.MaskType.CAUSAL
    else:
        rows, tokens = q.shape[0], q.shape[0] * q.shape[1]
        if tokens * max(q[0, 0].size, k[0, 0].size) >= 2**31:
            more = "offsets of more than 2³¹ numbers: use more train.micro_batches, or model.attention='chunked'"
            raise UserError(f"attention of {tokens} tokens on a device, {q[0, 0].size} numbers each, needs {more}")
        size = packed.size.reshape(rows, -1)
        # One more offset than segments: the end. An offset counts numbers, not tokens.
        offset = jnp.pad(packed.offset, (0, rows), constant_values=tokens).reshape(rows, -1)
        lengths = size, size
        offsets = offset * np.int32(q[0, 0].size), offset * np.int32(k[0, 0].size)
        mask = cudnn.MaskType.PADDING_CAUSAL
    options = {
        "scale": scale, "seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False),
        "mask_type": mask, "layout": cudnn.AttentionLayout.BTNH.value, "sliding_window_length": window or None,
    }  # fmt: skip
    if jax.__version_info__ >= (0, 12):
        options |= {"score_mod_name": None, "score_mod_jaxpr": None}
    return (q, k, v, none, *lengths, *offsets, none, none), options


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def whole_rows(
    q: Float[Array, "B S N H"], k: Float[Array, "B S M H"], v: Float[Array, "B S M W"], window: int = 0
) -> Float[Array, "B S N W"]:
    """Causal attention of whole rows. Values of another head size than the keys' need cuDNN 9.10 and Hopper."""
    return forward(q, k, v, None, q.shape[-1] ** -0.5, window)[0]


def _whole_rows_forward(q, k, v, window):
    y, lse = keep(forward(q, k, v, None, q.shape[-1] ** -0.5, window), "attention")
    return y, (q, k, v, lse, y)


def _whole_rows_backward(window, saved, dy):
    q, k, v, lse, y = saved
    return backward(q, k, v, None, q.shape[-1] ** -0.5, lse, y, dy, window)


whole_rows.defvjp(_whole_rows_forward, _whole_rows_backward)
