"""Makes dense models deeper and wider, before upcycling. Source: arXiv:2408.06567 (AquilaMoE)."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Key

from moe_jax import model
from moe_jax.config import ModelConfig
from moe_jax.tree import flatten
from moe_jax.upcycle.chain import Transform, by_table, require, require_dense, scaled


@dataclass(frozen=True)
class Depth(Transform):
    """Adds layers, which are copies of the old ones.

    order: "interpolate" puts copies beside their original (0 0 1 1 2 …), "stack" repeats all layers (0 1 2 0 1 …).
    new: "identity" sets the copies' output matrices to zero, so that they are the identity at first
        (arXiv:2401.02415, LLaMA Pro). Learned scales of their residual stream are then 1, and its biases 0.
    """

    num_layers: int
    order: Literal["interpolate", "stack"] = "interpolate"
    new: Literal["copy", "identity"] = "copy"

    def config(self, cfg: ModelConfig) -> ModelConfig:
        require_dense(cfg)
        n = self.num_layers
        require(n >= cfg.num_layers, "depth", n, f"must be ≥ num_layers={cfg.num_layers}",
                f"nearest valid: {cfg.num_layers}")  # fmt: skip
        for name, valid in (("order", ("interpolate", "stack")), ("new", ("copy", "identity"))):
            value = getattr(self, name)
            require(value in valid, f"depth_{name}", value, f"must be {' or '.join(valid)}",
                    f"nearest valid: {valid[0]!r}")  # fmt: skip
        return dataclasses.replace(cfg, num_layers=n, num_dense_layers=n)

    def sources(self, layers: int) -> list[int]:
        """The old layer of which each new layer is a copy."""
        stacked = self.order == "stack"
        return [i % layers if stacked else i * layers // self.num_layers for i in range(self.num_layers)]

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        sources = self.sources(cfg.num_layers)
        original = jnp.asarray([source not in sources[:i] for i, source in enumerate(sources)])
        index = jnp.asarray(sources)

        def layer(w, path):
            grown = w[index]
            if self.new == "copy" or not path.endswith(("w_o", "w_down", "_scale", "_bias")):
                return grown
            return jnp.where(original.reshape(-1, *[1] * (w.ndim - 1)), grown, float(path.endswith("_scale")))

        rest = r"embed|embed_bias|embed_scale|head|final_norm"
        rules = ((r"dense_layers/.+", r"\g<0>", layer), (rest, r"\g<0>", lambda w, _: w))
        return by_table(rules, flatten(model.abstract(self.config(cfg)).shapes), params)

    def changes(self, cfg: ModelConfig) -> str:
        added = self.num_layers - cfg.num_layers
        return f"{added} more layers" if added and self.new == "copy" else ""


@dataclass(frozen=True)
class Width(Transform):
    """Widens a model without changing its function (FPI, arXiv:2110.07143): copies of a unit share its output weights.

    d_model and heads grow by integer factors, since an RMSNorm keeps its mean only if every channel has the same number
    of copies. d_ff may become any larger width. Copies stay equal until something, such as noise on the experts, makes
    them different.
    """

    d_model: int = 0  # 0: unchanged
    d_ff: int = 0
    num_heads: int = 0  # key and value heads grow by the same factor

    def config(self, cfg: ModelConfig) -> ModelConfig:
        require_dense(cfg)
        rule = "is not available for a model with latent attention (mla.kv_rank > 0)"
        require(not cfg.mla.kv_rank, "width", self.d_model, rule, "nearest valid: 0")
        for name, flag in (("d_model", "width"), ("num_heads", "heads")):
            now, new = getattr(cfg, name), getattr(self, name)
            nearest = max(now, round(new / now) * now)
            require(new % now == 0 and new >= 0, flag, new, f"must be a multiple of {name}={now}",
                    f"nearest valid: {nearest}")  # fmt: skip
        require(self.d_ff == 0 or self.d_ff >= cfg.d_ff, "d_ff", self.d_ff, f"must be ≥ the model's d_ff={cfg.d_ff}",
                f"nearest valid: {cfg.d_ff}")  # fmt: skip
        _, heads = self._factors(cfg)
        return dataclasses.replace(
            cfg, d_model=self.d_model or cfg.d_model, d_ff=self.d_ff or cfg.d_ff,
            num_heads=heads * cfg.num_heads, num_kv_heads=heads * cfg.num_kv_heads,
        )  # fmt: skip

    def _factors(self, cfg: ModelConfig) -> tuple[int, int]:
        return max(1, self.d_model // cfg.d_model), max(1, self.num_heads // cfg.num_heads)

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        wide, heads = self._factors(cfg)
        unit_F = jnp.arange(self.d_ff or cfg.d_ff) % cfg.d_ff
        copies_F = jnp.zeros(cfg.d_ff).at[unit_F].add(1.0)[unit_F]
        channels = lambda w, axis: jnp.repeat(w, wide, axis=axis)  # copies have the value of their original
        inputs = lambda w: scaled(channels(w, 1), 1.0 / wide)  # and are averaged where they are read
        down = lambda w: scaled(w[:, unit_F], 1.0 / copies_F[None, :, None])
        rules = (
            (r"embed|head", r"\g<0>", lambda w, _: channels(w, 1)),
            # An average, too; but rows of length 1 are divided by √wide already.
            (r"final_norm", r"\g<0>", lambda w, _: scaled(channels(w, 0), wide ** (-0.5 if cfg.norm_head else -1.0))),
            (r"embed_bias|embed_scale", r"\g<0>", lambda w, _: channels(w, 0)),
            (r"dense_layers/(attention_norm|mlp_norm|.+_residual/.+)", r"\g<0>", lambda w, _: channels(w, 1)),
            (r"dense_layers/attention/(q_norm|k_norm)", r"\g<0>",
             lambda w, _: w if cfg.qk_norm_over == "head" else jnp.tile(w, (1, heads))),
            (r"dense_layers/attention/w_[qkv]", r"\g<0>", lambda w, _: jnp.tile(inputs(w), (1, 1, heads))),
            (r"dense_layers/attention/b_[qkv]", r"\g<0>", lambda w, _: jnp.tile(w, (1, heads))),
            (r"dense_layers/attention/w_o", r"\g<0>",
             lambda w, _: scaled(jnp.tile(channels(w, 2), (1, heads, 1)), 1.0 / heads)),
            (r"dense_layers/mlp/w_(gate|up)", r"\g<0>", lambda w, _: inputs(w)[:, :, unit_F]),
            (r"dense_layers/mlp/w_down", r"\g<0>", lambda w, _: down(channels(w, 2))),
        )  # fmt: skip
        return by_table(rules, flatten(model.abstract(self.config(cfg)).shapes), params)

    def changes(self, cfg: ModelConfig) -> str:
        return ""
