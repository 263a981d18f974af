"""The matrix function of Muon: U·Vᵀ of a matrix U·Σ·Vᵀ, approximated by odd polynomials. It knows no mesh.

Sources: Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon); arXiv:2502.16982, eq. 2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.kernels.stacked import plain_product, residual_product, symmetric_product, uses_kernel
from moe_jax.parallel import axes

AUTO = "auto"  # the dtype of the iteration is chosen by the device


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


# --- dtype and cost --------------------------------------------------------------------------------------------------


def iteration_dtype(dtype: Any = AUTO) -> Any:
    """Resolves `dtype`: "auto" is float16 on GPUs, bfloat16 on TPUs and float32 on CPUs; others are what they are.

    NVIDIA's tensor cores multiply float16 as fast as bfloat16, and its rounding is eight times finer. TPUs multiply
    bfloat16 alone at full speed, and CPUs gain nothing from either. Devices are those of the current mesh, or, without
    one, of the process.
    """
    if not isinstance(dtype, str) or dtype != AUTO:
        return jnp.dtype(dtype)
    kind = axes.current_kind()
    return jnp.dtype(jnp.bfloat16 if kind.startswith("TPU") else jnp.float32 if kind == "cpu" else jnp.float16)


def flops(m: int, n: int, steps: int, dtype: Any = None) -> int:
    """FLOPs of the products for one m × n matrix, symmetric ones in full: 4m²n + 2m³ a step where m ≤ n.

    dtype: that of `orthogonalize`, so that the products are those of the iteration that it takes; None: the standard
    one.
    """
    gram = dtype is not None and uses_gram(m, n, steps, dtype)
    return _flops(min(m, n), max(m, n), steps, len(_phases(steps)) if gram else 0, 1.0)


def uses_gram(m: int, n: int, steps: int, dtype: Any) -> bool:
    """Whether `orthogonalize` iterates on X·Xᵀ (Gram Newton–Schulz): in float16, where that takes fewer FLOPs.

    It takes fewer if one side is longer than the other and kernels compute half of each symmetric product, and without
    such kernels if it is more than 1.5 times as long. The answer depends on nothing but the arguments and the kind of
    the device. bfloat16 has too few digits: its error would grow threefold, to 15 % for exponential spectra. float32 is
    there to be exact, and its error would grow tenfold.
    """
    m, n = min(m, n), max(m, n)
    half = uses_kernel((m, n), dtype) and uses_kernel((m, m), dtype)
    cost = lambda phases: _flops(m, n, steps, phases, 0.5 if half else 1.0)
    return jnp.dtype(dtype) == jnp.float16 and cost(len(_phases(steps))) < cost(0)


def _flops(m: int, n: int, steps: int, phases: int, symmetric: float) -> int:
    """FLOPs of the standard iteration (phases = 0) or of Gram Newton–Schulz. symmetric: the share that is computed."""
    wide, square = phases or steps, 4 * steps - 3 * phases if phases else steps
    return int(wide * (1 + symmetric) * 2 * m * m * n + square * symmetric * 2 * m**3)


def _phases(steps: int) -> list[int]:
    """The numbers of steps after which Gram Newton–Schulz begins anew: two, then at most three at a time.

    Q multiplies small singular values by about 4 to 8 a step and large ones by about 1, and X is multiplied by Q once:
    so the rounding of Q, relative to its largest entries, falls on the large ones. The first steps, in which the
    singular values lie furthest apart, are therefore fewer. Five steps begin anew once, as published.
    """
    rest = max(steps - 2, 0)
    count = -(-rest // 3)
    return [min(steps, 2), *(rest // count + (i < rest % count) for i in range(count))]


# --- the iteration ---------------------------------------------------------------------------------------------------


def orthogonalize(
    x: Float[Array, "*stack m n"], coefficients: Coefficients = SETS["jordan"], dtype: Any = AUTO
) -> Float[Array, "*stack m n"]:
    """Approximates U·Vᵀ of each matrix, in `dtype`, at any scale of the matrix. A zero matrix stays zero.

    dtype: of the iteration and the result, or "auto" (`iteration_dtype`).

    Two things keep 16 bits accurate. First, Z = A − s·I is multiplied and not A = X·Xᵀ, with s about the mean of A's
    diagonal: as rows of X become nearly orthonormal, the diagonal of A nears 1, and its rounding would exceed the other
    entries. The polynomial is the same, (a + b·s + c·s²)·I + P, with P = (b + 2·c·s)·Z + c·Z². Second, X is divided by
    a power of two, which is exact (`_unit`); the rest of the norm goes into the coefficients of the first step. For
    Gaussian matrices of 64 to 1152 columns the error against float64 is 0.5 to 0.9 % in bfloat16, and 1.4 to 3.5 %
    without these two; it is an eighth of that in float16. Singular values near 0, whose directions 16 bits do not keep,
    make it larger.

    Gram Newton–Schulz (`uses_gram`) is the same function with fewer FLOPs. Its error in float16 is 1 to 3 times that of
    the standard iteration in float16, and a sixth to a third of that in bfloat16 (tests/test_newton_schulz.py); up to
    0.6 of it with CANS' coefficients and 64 rows.

    float16 holds every number of the iteration. Its largest is 65,504. The first X has a largest entry of about
    2¹³, so entries down to 10⁻⁸ of it keep all their digits. No entry of a matrix exceeds its
    largest singular value: below 3 for X after a step, 8 for A, 70 for the products of polynomials. Small entries are
    rounded to multiples of 2⁻²⁴. In an m × n Gaussian matrix those of the first A are about m⁻¹·n⁻¹ᐟ², which are
    subnormal from m = n = 640 on; but P is then as small beside the multiple of I, and what rounding adds to it is at
    most a matrix of the norm m¹ᐟ²·2⁻²².
    """
    dtype = iteration_dtype(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -2, -1) if tall else x
    stack = x.reshape(-1, *x.shape[-2:])
    y, left = _unit(stack, coefficients.prescale, dtype)
    gram = uses_gram(*x.shape[-2:], len(coefficients.steps), dtype)
    y = (_iterate_gram if gram else _iterate)(y, left, coefficients)
    y = y.reshape(x.shape)
    return jnp.swapaxes(y, -2, -1) if tall else y


def _iterate(
    y: Float[Array, "stack m n"], left: Float[Array, " stack"], coefficients: Coefficients
) -> Float[Array, "stack m n"]:
    """The standard iteration from X = Y / `left`."""
    # `left` is in [0.5, 1) and goes into the coefficients, but for float16: there it may be 10⁸, and divides sums.
    narrow = y.dtype == jnp.float16

    def step(carry, abc):
        y, left = carry
        over = 1 / left if narrow else None
        # In float32: 3.4445 in bf16 would be 3.4375.
        a, b, c = (abc[i] * jnp.ones_like(left) if narrow else abc[i] / left ** (2 * i + 1) for i in range(3))
        s = _mean_diagonal(y)
        s = s * over**2 if narrow else s
        z = symmetric_product(y, y, None, over**2 if narrow else jnp.ones_like(s), None, -s)
        p = symmetric_product(z, z, z, c, b + 2 * c * s, jnp.zeros_like(s))
        rest = a + b * s + c * s * s
        return (residual_product(p, y, rest * over if narrow else rest, over), jnp.ones_like(left)), None

    return jax.lax.scan(step, (y, left), np.asarray(coefficients.steps, np.float32))[0][0]


def _iterate_gram(
    y: Float[Array, "stack m n"], left: Float[Array, " stack"], coefficients: Coefficients
) -> Float[Array, "stack m n"]:
    """Gram Newton–Schulz from X = Y / `left`: R ← G·R·G and Q ← G·Q for R = X·Xᵀ, G = a·I + b·R + c·R²; then X ← Q·X.

    R is kept as Z = R − s·I, as A in the standard iteration. G commutes with R and Q, so all products but Q·X are
    symmetric. X and R begin anew after each of `_phases`, which takes what R has gathered of rounding out of it.

    X ← Q·X is a plain product of float16 numbers: Q is multiplied by what makes it 2¹⁴·X. As ‖Y‖_F is between 2¹² and
    2¹³·(m·n)¹ᐟ², that is at least 2⁻¹² up to m·n = 2²⁶. The limits are for zero matrices, whose `left` is 1, and for
    large prescales, which would leave Q too small for float16.
    Source: Dao-AILab's "Gram Newton-Schulz" (2026).
    """
    steps = iter(coefficients.steps)
    one = jnp.ones_like(left)
    for count in _phases(len(coefficients.steps)):
        over = 1 / left
        s = _mean_diagonal(y) * over**2
        z, q = symmetric_product(y, y, None, over**2, None, -s), None
        scale = jnp.clip(2.0**_RESULT * over, 2.0**-12, 4.0)
        for i in range(count):
            a, b, c = next(steps)
            rest, own = a + b * s + c * s * s, scale if count == 1 else one  # G itself is Q, or not
            g = symmetric_product(z, z, z, c * own, (b + 2 * c * s) * own, rest * own)
            to = scale if i == count - 1 else one
            q = g if q is None else symmetric_product(g, q, None, to, None, None)
            if i < count - 1:
                t = rest * s  # G·R is kept less t·I; `rest` is about the diagonal of G
                half = symmetric_product(g, z, g, one, s, -t)
                s = _mean_diagonal(g, half) + t * rest
                z = symmetric_product(g, half, g, one, t, -s)
        y, left = plain_product(q, y), scale * left
    return (y.astype(jnp.float32) / left[:, None, None]).astype(y.dtype)


def _mean_diagonal(x: Float[Array, "stack m n"], y: Float[Array, "stack m n"] | None = None) -> Float[Array, " stack"]:
    """Estimates the mean of the diagonal of X·Yᵀ, or of X·Xᵀ without y: that of every eighth entry.

    Any s gives the same function, and one that is near keeps Z small.
    """
    x = x[:, ::8].astype(jnp.float32)
    products = jnp.square(x) if y is None else x * y[:, ::8].astype(jnp.float32)
    return jnp.sum(products, axis=(-2, -1)) / x.shape[1]


# --- scale -----------------------------------------------------------------------------------------------------------

_TOP = 13  # float16: entries are brought below 2¹³
_RESULT = 14  # Gram Newton–Schulz: X is held times 2¹⁴, so below 3·2¹⁴


def largest_exponent(x: Float[Array, "*stack m n"], axis: Any = (-2, -1)) -> Int[Array, "*stack #m #n"]:
    """The exponent e of the largest entry along the axes `axis`, which is in [2ᵉ⁻¹, 2ᵉ); −1000 where all are zero."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axis, keepdims=True)
    return jnp.where(largest > 0, jnp.frexp(largest)[1], -1000)


def to_float16(x: Float[Array, "*stack m n"], exponent: Int[Array, "*stack #m #n"]) -> Float[Array, "*stack m n"]:
    """Rounds X to float16 after dividing it by 2^(exponent − 13), so that its entries are below 2¹³."""
    # That power itself may be no float32. Neither factor is a constant: XLA would make one array of it for all leaves
    # of as many numbers, in one layout, and transpose those whose layout is another.
    half = exponent // 2
    return (x.astype(jnp.float32) * _power(_TOP - half) * _power(half - exponent)).astype(jnp.float16)


def _power(k: Int[Array, "..."]) -> Float[Array, "..."]:
    return jnp.ldexp(jnp.ones_like(k, jnp.float32), jnp.clip(k, -126, 126))


def _unit(
    x: Float[Array, "stack m n"], prescale: float, dtype: Any
) -> tuple[Float[Array, "stack m n"], Float[Array, " stack"]]:
    """Divides each matrix by a power of two, in float32. Also returns `prescale` · ‖X‖_F divided by the same.

    The norm is then in [0.5, 1), or 1 for a zero matrix. The largest entry is scaled to [0.5, 1) before entries are
    squared: squares of entries beyond 10¹⁹ or below 10⁻¹⁹ are outside the range of float32 and bf16. So the result does
    not depend on the scale of X, as long as its largest entry is a normal number (from 1.2·10⁻³⁸). Below that a device
    may take X for zero. In float16 the largest entry is in [2¹², 2¹³], whatever the norm: below it is then the whole
    range of float16, and a matrix that was rounded so before (`to_float16`) stays as it is.
    """
    power = lambda k: _power(k)[:, None, None]
    x = x.astype(jnp.float32)
    if dtype == jnp.float16:
        x = to_float16(x, largest_exponent(x))
        norm = prescale * jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1)))
        return x, jnp.where(norm > 0, norm, 1.0)
    _, largest = jnp.frexp(jnp.max(jnp.abs(x), axis=(-2, -1)))
    x = x * power(-largest)
    norm = prescale * jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1)))
    left, exponent = jnp.frexp(norm)
    return (x * power(-exponent)).astype(dtype), jnp.where(norm > 0, left, 1.0)


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
