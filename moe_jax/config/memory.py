"""Fields of the product-key memory of `memory` blocks."""

from dataclasses import dataclass

from moe_jax.config.fields import FIXED, FUNCTION, Checked, number, require


@dataclass(frozen=True)
class MemoryConfig(Checked, resume=FIXED, weights=FUNCTION):
    """A product-key memory (arXiv:1907.05242), which a `memory` block of `model.layers` adds to its feed-forward layer.

    It has keys² rows. A token reads the `top` rows of each head whose keys are nearest to its query (docs/layers.md).
    """

    keys: int = number(512, 1)  # keys of each half of a query (n); a pair of them names one of n² rows
    heads: int = number(4, 1)  # queries of a token, each with keys of its own; all read the same rows
    top: int = number(32, 1)  # rows that a head reads, at most keys
    key_dim: int = number(256, 2)  # size of a query; each half of it is compared with the keys of its own; even

    @property
    def rows(self) -> int:
        """Number of rows of the memory."""
        return self.keys**2

    @property
    def reads(self) -> int:
        """Number of rows that a token reads, those that several heads read counted for each of them."""
        return self.heads * self.top

    def check(self):
        n, k = self.keys, self.key_dim
        require(k % 2 == 0, "key_dim", k, "must be even: a query has two halves", f"nearest valid: {k + 1}")
        require(self.rows < 2**31, "keys", n, "keys² must be below 2³¹", "nearest valid: 46340")
        require(self.top <= n, "top", self.top, f"must be ≤ keys={n}", f"nearest valid: {n}")
        require(self.reads <= self.rows, "heads", self.heads, f"heads · top={self.reads} must be ≤ keys²={self.rows}",
                f"nearest valid: {self.rows // self.top}")  # fmt: skip
