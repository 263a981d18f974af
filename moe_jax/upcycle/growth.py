"""Makes models deeper or less deep, and dense models wider. Source: arXiv:2408.06567 (AquilaMoE)."""

import dataclasses
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from moe_jax import model
from moe_jax.config import ModelConfig
from moe_jax.config.layers import LARGEST, Place
from moe_jax.moe.routers import ROUTERS
from moe_jax.tree import flatten
from moe_jax.upcycle.chain import Transform, by_table, require, require_dense, scaled, shapes_of, with_units


@dataclass(frozen=True)
class Depth(Transform):
    """Adds layers, which are copies of the old ones, or takes layers away.

    In a model whose blocks are units, such as "6*(dense moe)", whole units are copied or taken away, so that a late
    block keeps the blocks behind it. Experts, routers, selection biases and tables are copied with their block.
    `attention_layers` gives windows to places: what would bring a layer to a place of another attention is refused.

    order: "interpolate" puts copies beside their original (0 0 1 1 2 …), "stack" repeats all layers (0 1 2 0 1 …). With
        fewer layers "interpolate" keeps the first, the last, and layers evenly spread between them; "stack" keeps the
        first ones.
    new: "identity" sets the copies' output matrices to zero, so that they are the identity at first
        (arXiv:2401.02415, LLaMA Pro). Learned scales of their residual stream are then 1, and its biases 0.
    """

    num_layers: int
    order: Literal["interpolate", "stack"] = "interpolate"
    new: Literal["copy", "identity"] = "copy"

    def config(self, cfg: ModelConfig) -> ModelConfig:
        for name, valid in (("order", ("interpolate", "stack")), ("new", ("copy", "identity"))):
            value = getattr(self, name)
            require(value in valid, f"depth_{name}", value, f"must be {' or '.join(valid)}",
                    f"nearest valid: {valid[0]!r}")  # fmt: skip
        moe, identity = cfg.moe, self.new == "identity"
        passed = cfg.num_moe_layers and moe.identity_experts and moe.identity_output == "input"
        rule = f"a layer with identity_experts={moe.identity_experts}, which add its input, is not the identity"
        require(not (identity and passed), "depth_new", self.new, rule, "nearest valid: 'copy'")
        units, n = _units(cfg), self.num_layers
        near = min(max(n, 1), LARGEST)
        require(1 <= n <= LARGEST, "depth", n, f"must be in [1, {LARGEST}]", f"nearest valid: {near}")
        kept, nearest = self._kept(units)
        rule = f"is no number of blocks of whole units of the model's layers={cfg.layers!r}"
        require(bool(kept), "depth", n, rule, f"nearest valid: {nearest}")
        final = with_units(cfg, [(1, tuple(place.kind for place in units[i])) for i in kept])
        pattern = max(cfg.attends, final.attends, key=len)
        moved = lambda m: [place.kind.attends for i in self._with(m)._kept(units)[0] for place in units[i]]
        toward = range(n, cfg.num_layers, 1 if n < cfg.num_layers else -1)[:16]
        near = next((m for m in toward if moved(m) == list(pattern[:m])), cfg.num_layers)
        rule = f"would give layers another attention than they have in attention_layers={cfg.attention_layers!r}"
        require(near == n, "depth", n, rule, f"nearest valid: {near}")
        return final

    def _with(self, num_layers: int) -> "Depth":
        return dataclasses.replace(self, num_layers=num_layers)

    def _kept(self, units: list[tuple[Place, ...]]) -> tuple[list[int], int]:
        """The old unit of each new one, [] if no number of units has `num_layers` blocks; and the nearest that has."""
        total = sum(map(len, units))
        about = self.num_layers * len(units) // total
        near = range(max(1, about - len(units) - 1), about + len(units) + 2)
        found = [self.origins(len(units), count) for count in near]
        sizes = {sum(len(units[i]) for i in one): one for one in found}
        return sizes.get(self.num_layers, []), min(sizes, key=lambda size: abs(size - self.num_layers))

    def origins(self, old: int, new: int | None = None) -> list[int]:
        """The old layer, or unit, of which each of `new` is a copy. new: by default `num_layers`."""
        new = self.num_layers if new is None else new
        if self.order == "stack":
            return [i % old for i in range(new)]
        if new < old:
            return [(2 * i * (old - 1) + new - 1) // (2 * (new - 1)) if new > 1 else 0 for i in range(new)]  # rounded
        return [i * old // new for i in range(new)]

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        units, final = _units(cfg), self.config(cfg)
        kept = self._kept(units)[0]
        sources = [place for i in kept for place in units[i]]
        original = [i not in kept[:n] for n, i in enumerate(kept) for _ in units[i]]
        at: dict[str, list[int]] = {}  # the new layers of each block
        for depth, place in enumerate(final.places):
            at.setdefault(place.path, []).append(depth)

        def layer(path: str) -> Array:
            block = next(block for block in at if path.startswith(f"{block}/"))
            rest = path.removeprefix(block)
            runs = itertools.groupby(at[block], lambda depth: sources[depth].path)
            parts = [params[old + rest][jnp.asarray([sources[d].index for d in depths])] for old, depths in runs]
            grown = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
            scale = re.search(r"_residual/.+_scale$", rest) is not None
            if self.new == "copy" or not (scale or re.search(r"/(w_o|w_down|memory/values)$|_residual/.+_bias$", rest)):
                return grown
            first = jnp.asarray([original[depth] for depth in at[block]])
            return jnp.where(first.reshape(-1, *[1] * (grown.ndim - 1)), grown, float(scale))

        rest = re.compile(r"embed|embed_bias|embed_scale|head|final_norm")
        return {path: params[path] if rest.fullmatch(path) else layer(path) for path in shapes_of(final)}

    def changes(self, cfg: ModelConfig) -> str:
        added = self.num_layers - cfg.num_layers
        if added > 0 and self.new == "identity":
            passes = cfg.num_moe_layers and ROUTERS[cfg.moe.router].has_state
            return f"{added} more routers change the state that later ones see" if passes else ""
        return f"{abs(added)} {'more' if added > 0 else 'fewer'} layers" if added else ""


def _units(cfg: ModelConfig) -> list[tuple[Place, ...]]:
    """The units of a model, one after the other: the places of their blocks."""
    return [
        tuple(Place(path, index, kind) for path, kind in zip(stack.paths, stack.unit, strict=True))
        for stack in cfg.stacks
        for index in range(stack.repeat)
    ]


@dataclass(frozen=True)
class Width(Transform):
    """Widens a model without changing its function (FPI, arXiv:2110.07143): copies of a unit share its output weights.

    d_model and heads grow by integer factors, since an RMSNorm keeps its mean only if every channel has the same number
    of copies. d_ff may become any larger width. Copies stay equal until something, such as noise on the experts, makes
    them different.

    aki: True takes what a matrix computes for new heads, hidden units and channels from the same matrix of the next
        layer (AKI, arXiv:2110.07143), and from its own in the last layer: another function, in which only the last
        layer's new units are copies. Embeddings and norms stay copies. `Width` comes before `Depth`, after which the
        next layer may be a copy of the same one.
    """

    d_model: int = 0  # 0: unchanged
    d_ff: int = 0
    num_heads: int = 0  # key and value heads grow by the same factor
    aki: bool = False

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
        wider = lambda w: jnp.tile(w, (1,) * (w.ndim - 1) + (heads,))
        is_head = lambda w: jnp.arange(w.shape[-1]) >= w.shape[-1] // heads
        is_unit = lambda w: jnp.arange(w.shape[-1]) >= cfg.d_ff
        is_channel = lambda w: jnp.arange(w.shape[-1]) % wide != 0
        rules = (
            (r"embed|head", r"\g<0>", lambda w, _: channels(w, 1)),
            # An average, too; but rows of length 1 are divided by √wide already.
            (r"final_norm", r"\g<0>", lambda w, _: scaled(channels(w, 0), wide ** (-0.5 if cfg.norm_head else -1.0))),
            (r"embed_bias|embed_scale", r"\g<0>", lambda w, _: channels(w, 0)),
            (r"dense_layers/(attention_norm|mlp_norm|.+_residual/.+)", r"\g<0>", lambda w, _: channels(w, 1)),
            (r"dense_layers/attention/(q_norm|k_norm)", r"\g<0>",
             lambda w, _: w if cfg.qk_norm_over == "head" else wider(w)),
            (r"dense_layers/attention/w_[qkv]", r"\g<0>",
             lambda w, _: self._new(w, lambda w: wider(inputs(w)), is_head)),
            (r"dense_layers/attention/b_[qkv]", r"\g<0>", lambda w, _: self._new(w, wider, is_head)),
            (r"dense_layers/attention/w_o", r"\g<0>", lambda w, _: self._new(
                w, lambda w: scaled(jnp.tile(channels(w, 2), (1, heads, 1)), 1.0 / heads), is_channel)),
            (r"dense_layers/mlp/w_(gate|up)", r"\g<0>",
             lambda w, _: self._new(w, lambda w: inputs(w)[:, :, unit_F], is_unit)),
            (r"dense_layers/mlp/w_down", r"\g<0>",
             lambda w, _: self._new(w, lambda w: down(channels(w, 2)), is_channel)),
        )  # fmt: skip
        return by_table(rules, flatten(model.abstract(self.config(cfg)).shapes), params)

    def _new(self, w: Array, widen: Callable[[Array], Array], is_new: Callable[[Array], Bool[Array, " n"]]) -> Array:
        """A matrix `[L, m, n]` made wider. is_new: which outputs of a wide matrix are new."""
        wide = widen(w)
        if not self.aki:
            return wide
        return jnp.where(is_new(wide), widen(jnp.concatenate([w[1:], w[-1:]])), wide)

    def changes(self, cfg: ModelConfig) -> str:
        grows = any(getattr(self, name) > getattr(cfg, name) for name in ("d_model", "d_ff", "num_heads"))
        return "new units come from the next layer (AKI)" if self.aki and grows else ""
