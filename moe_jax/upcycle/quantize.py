"""Rounds the experts of a model, in its function: training then goes on from the unrounded weights, which stay."""

import dataclasses

from jaxtyping import Array, Key

from moe_jax.config import ModelConfig
from moe_jax.upcycle.chain import Transform, require


@dataclasses.dataclass(frozen=True)
class Quantize(Transform):
    """Makes routed experts ternary, and what they multiply int8 (`model.moe.expert_weights` and `expert_inputs`).

    Parameters keep every bit. Source: MoTE, arXiv:2506.14435.
    """

    expert_weights: str = "ternary"
    expert_inputs: str = "int8"

    def config(self, cfg: ModelConfig) -> ModelConfig:
        require(cfg.num_moe_layers > 0, "expert_weights", self.expert_weights, "the model has no experts to round",
                "nearest valid: 'float'")  # fmt: skip
        moe = dataclasses.replace(cfg.moe, expert_weights=self.expert_weights, expert_inputs=self.expert_inputs)
        return dataclasses.replace(cfg, moe=moe)

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        return params

    def changes(self, cfg: ModelConfig) -> str:
        what = ["experts have three values a matrix"] if self.expert_weights == "ternary" else []
        what += ["their inputs are rounded"] if self.expert_inputs == "int8" else []
        return " and ".join(what)
