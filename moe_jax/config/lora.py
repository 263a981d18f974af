"""Fields of LoRA: which weights get an adapter, and how large it is."""

import re
from dataclasses import dataclass

from moe_jax.config.fields import FIXED, MACHINE, Checked, number, require


@dataclass(frozen=True)
class LoRAConfig(Checked, resume=FIXED, weights=MACHINE):
    """LoRA (arXiv:2106.09685): a matrix W becomes W + scale · A · B, of which A and B alone are trained.

    The other weights are those of `init_from`, and stay as they are. Expert stacks have an A and a B for each expert.
    If `init_from` has adapters of the same matrices, rank and scale, they are trained on; others are merged first.
    """

    rank: int = number(0, 0)  # columns of A, and rows of B, of each adapter; 0: no adapters, all weights are trained
    alpha: float = number(16.0, 0.0)  # scale · rank; with rslora scale · √rank
    rslora: bool = False  # scale = alpha/√rank (arXiv:2312.03732); False: alpha/rank
    # Regular expression. A matrix gets an adapter if it is found in the matrix's path, such as layers/attention/w_q or
    # layers/moe/w_up. The default takes attention, dense layers, routed and shared experts. Embedding, output matrix,
    # routers, biases, norms, memories and the gate of shared experts get none.
    match: str = "/(attention|mlp|moe|shared)/"

    def check(self):
        try:
            re.compile(self.match)
        except re.error as e:
            require(False, "match", self.match, f"is not a regular expression: {e}", f"nearest valid: {_DEFAULT!r}")
        require(self.alpha > 0 or not self.rank, "alpha", self.alpha, "must be > 0, or the adapters do nothing",
                "nearest valid: 16.0")  # fmt: skip
        for name, default in {"alpha": LoRAConfig.alpha, "rslora": False, "match": _DEFAULT}.items():
            value = getattr(self, name)
            require(self.rank or value == default, name, value, "has no effect without rank",
                    f"nearest valid: {default!r}, or a rank > 0")  # fmt: skip

    @property
    def scale(self) -> float:
        """The factor on A · B."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


_DEFAULT = LoRAConfig.match
