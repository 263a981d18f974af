"""Rounds the experts of a model, in its function: training then goes on from the unrounded weights, which stay."""

import dataclasses
from typing import Literal

from jaxtyping import Array, Key

from moe_jax.config import ModelConfig
from moe_jax.upcycle.chain import Transform, require


@dataclasses.dataclass(frozen=True)
class Quantize(Transform):
    """Makes routed experts ternary, and what they multiply int8 (`model.moe.expert_weights` and `expert_inputs`).

    Parameters keep every bit. None keeps what the model has. Source: MoTE, arXiv:2506.14435.
    """

    expert_weights: Literal["float", "ternary"] | None = "ternary"
    expert_inputs: Literal["float", "int8"] | None = "int8"

    def config(self, cfg: ModelConfig) -> ModelConfig:
        require(cfg.num_moe_layers > 0, "expert_weights", self.expert_weights, "the model has no experts to round",
                "nearest valid: 'float'")  # fmt: skip
        for name, values in (("expert_weights", ("float", "ternary")), ("expert_inputs", ("float", "int8"))):
            value = getattr(self, name)
            require(value is None or value in values, name, value, f"must be {' or '.join(values)}",
                    f"nearest valid: {values[1]!r}")  # fmt: skip
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, **given))

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        return params

    def changes(self, cfg: ModelConfig) -> str:
        was, now = cfg.moe, self.config(cfg).moe
        what = {
            "experts have any values": now.expert_weights == "float" != was.expert_weights,
            "experts have three values a matrix": now.expert_weights == "ternary" != was.expert_weights,
            "their inputs are not rounded": now.expert_inputs == "float" != was.expert_inputs,
            "their inputs are rounded": now.expert_inputs == "int8" != was.expert_inputs,
        }
        return " and ".join(text for text, changed in what.items() if changed)
