"""The matrix function of Muon: U·Vᵀ of a matrix U·Σ·Vᵀ, approximated by odd polynomials. It knows no mesh.

Sources: Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon); arXiv:2502.16982, eq. 2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.kernels.stacked import residual_product, symmetric_product


class Coefficients(NamedTuple):
    """The polynomials: X ← a·X + (b·A + c·A²)·X, A = X·Xᵀ, for (a, b, c) in `steps`, from X / (prescale · ‖X‖_F)."""

    steps: tuple[tuple[float, float, float], ...]
    prescale: float = 1.0


_JORDAN = (3.4445, -4.7750, 2.0315)
_SAFETY = 1.01  # Polar Express: rounding may push singular values above 1, where its polynomials diverge
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SETS = {  # comments: the interval in which singular values of at least 0.003 ‖X‖_F end
    "jordan": Coefficients((_JORDAN,) * 5),  # [0.68, 1.21]
    "you": Coefficients(  # [0.98, 1.15]; Megatron's "quintic", optax' "dion"
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    "polar_express": Coefficients(  # [0.87, 1.12]; arXiv:2505.16932, algorithm 1
        tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS), _SAFETY
    ),
    "cans": Coefficients(  # [0.83, 1.17]; arXiv:2506.10935. Its error in bf16 is 2 to 4 %, that of the others up to 1 %
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        )
    ),
    "deepseek_v4": Coefficients((_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2),  # [0.998, 1.002]
}


def coefficients(name: str, steps: int = 0) -> Coefficients:
    """Returns the set `name` of SETS. steps: repetitions of Jordan's polynomial; other sets have a fixed number.

    Raises ValueError for another name, and for a number of steps that the set does not have.
    """
    if name not in SETS:
        raise ValueError(f"coefficients={name!r}: must be one of {', '.join(SETS)}")
    if name == "jordan" and steps:
        return Coefficients((_JORDAN,) * steps)
    if steps not in (0, len(SETS[name].steps)):
        raise ValueError(f"coefficients={name!r} are {len(SETS[name].steps)} steps, not {steps}")
    return SETS[name]


def flops(m: int, n: int, steps: int) -> int:
    """FLOPs of the products for one m × n matrix: X·Xᵀ, A² and P·X in each step, with A on the smaller side."""
    m, n = min(m, n), max(m, n)
    return steps * (4 * m * m * n + 2 * m**3)


def orthogonalize(
    x: Float[Array, "*stack m n"], coefficients: Coefficients = SETS["jordan"], dtype: Any = jnp.bfloat16
) -> Float[Array, "*stack m n"]:
    """Approximates U·Vᵀ of each matrix, in `dtype`, at any scale of the matrix (`_unit`). A zero matrix stays zero.

    Two things keep bf16 accurate. First, Z = A − s·I is multiplied and not A, with s about the mean of A's diagonal: as
    rows of X become nearly orthonormal, the diagonal of A nears 1, and its rounding would exceed the other entries. The
    polynomial is the same, (a + b·s + c·s²)·I + P, with P = (b + 2·c·s)·Z + c·Z². Second, X is divided by a power of
    two, which is exact; the rest of the norm goes into the coefficients of the first step. For Gaussian matrices of 64
    to 1152 columns the error against float64 is 0.5 to 0.9 %, and 1.4 to 3.5 % without these two. Singular values near
    0, whose directions bf16 does not keep, make it larger.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -2, -1) if tall else x
    stack = x.reshape(-1, *x.shape[-2:])
    y, left = _unit(stack, coefficients.prescale)
    y = y.astype(dtype)

    def step(carry, abc):
        y, left = carry
        a, b, c = (abc[i] / left ** (2 * i + 1) for i in range(3))  # float32: 3.4445 in bf16 would be 3.4375
        some = y[:, ::8]  # any s gives the same function: every eighth row gives one that is near enough
        s = jnp.sum(jnp.square(some.astype(jnp.float32)), axis=(-2, -1)) / some.shape[1]
        z = symmetric_product(y, jnp.ones_like(s), None, -s)
        p = symmetric_product(z, c, b + 2 * c * s, jnp.zeros_like(s))
        return (residual_product(p, y, a + b * s + c * s * s), jnp.ones_like(left)), None

    (y, _), _ = jax.lax.scan(step, (y, left), np.asarray(coefficients.steps, np.float32))
    y = y.reshape(x.shape)
    return jnp.swapaxes(y, -2, -1) if tall else y


def _unit(x: Float[Array, "stack m n"], prescale: float) -> tuple[Float[Array, "stack m n"], Float[Array, " stack"]]:
    """Divides each matrix by a power of two, in float32. Also returns `prescale` · ‖X‖_F divided by the same.

    The norm is then in [0.5, 1), or 1 for a zero matrix. The largest entry is scaled to [0.5, 1) before entries are
    squared: squares of entries beyond 10¹⁹ or below 10⁻¹⁹ are outside the range of float32 and bf16. So the result does
    not depend on the scale of X, as long as its largest entry is a normal number (from 1.2·10⁻³⁸). Below that a device
    may take X for zero.
    """
    power = lambda k: jnp.ldexp(jnp.ones_like(k, jnp.float32), jnp.clip(k, -126, 126))[:, None, None]
    x = x.astype(jnp.float32)
    _, largest = jnp.frexp(jnp.max(jnp.abs(x), axis=(-2, -1)))
    x = x * power(-largest)
    norm = prescale * jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1)))
    left, exponent = jnp.frexp(norm)
    return x * power(-exponent), jnp.where(norm > 0, left, 1.0)


def orthogonalize_reference(x: np.ndarray, coefficients: Coefficients = SETS["jordan"]) -> np.ndarray:
    """Orthogonalises one matrix at a time in float64: the oracle of `orthogonalize`, on one device and on many."""
    x = np.asarray(x, np.float64)
    if x.ndim > 2:
        return np.stack([orthogonalize_reference(one, coefficients) for one in x])
    norm = coefficients.prescale * np.linalg.norm(x) or 1.0
    y = x / norm
    for a, b, c in coefficients.steps:
        gram = y @ y.T
        y = a * y + b * gram @ y + c * gram @ gram @ y
    return y
