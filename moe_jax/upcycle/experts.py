"""Makes experts from dense feed-forward layers: virtual groups (copies if G = 1), and which layers get experts.

Letters: L layers, D model, F hidden width of the dense layer, f = F/G hidden width of an expert, E experts, K experts
per token, G shards of a dense layer, S shared experts. docs/upcycling.md has the formulas.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moe_jax import model
from moe_jax.config import ModelConfig, MoEConfig, nearest_divisor
from moe_jax.config.layers import Place, is_plain, parse
from moe_jax.errors import ConfigError
from moe_jax.nn.layers import ACTIVATIONS
from moe_jax.tree import flatten
from moe_jax.upcycle.chain import Transform, by_table, require, require_dense, scaled

# Exponents of κ by matrix. Together the factors must scale the layer's output by κ. Those of `exact` do: the hidden
# activations are linear in `up` (SwiGLU), or homogeneous of degree 2 in it (squared ReLU); for GELU only `down` is
# scaled. `paper` is arXiv:2410.07524, §2.3.1, and its code (Megatron-Core), whose cube root treats SiLU as linear.
SCALES: dict[str, dict[str, dict[str, float]]] = {
    "exact": {
        "swiglu": {"w_gate": 0.0, "w_up": 1 / 2, "w_down": 1 / 2},
        "gelu": {"w_up": 0.0, "w_down": 1.0},
        "relu2": {"w_up": 1 / 3, "w_down": 1 / 3},
    },
    "paper": {
        "swiglu": {"w_gate": 1 / 3, "w_up": 1 / 3, "w_down": 1 / 3},
        "gelu": {"w_up": 1 / 2, "w_down": 1 / 2},
        "relu2": {"w_up": 1 / 3, "w_down": 1 / 3},
    },
    "none": {name: {"w_gate": 0.0, "w_up": 0.0, "w_down": 0.0} for name in ACTIVATIONS},
}


def expected_weight(moe: MoEConfig) -> float:
    """The mean combine weight of a token's chosen experts, for which the scale compensates.

    It is exact for every router if a token's weights have a fixed sum, and else for a router of zeros.
    """
    if moe.combine == "one":
        return moe.routed_scaling
    if moe.combine == "share":
        return moe.routed_scaling * moe.shard_groups / moe.top_k
    if moe.renormalize or moe.score_order == "topk_score":
        return moe.routed_scaling / moe.top_k
    return moe.routed_scaling * (1 / moe.num_experts if moe.score == "softmax" else 1 / 2)


def fixed_sum(moe: MoEConfig) -> bool:
    """Whether a token's combine weights have the same sum for every token."""
    return moe.combine != "score" or moe.renormalize or moe.score_order == "topk_score"


def kappa(moe: MoEConfig, granularity: int) -> float:
    """The factor κ = G / (K · w̄) by which the dense layer's output exceeds the sum of the routed experts.

    A token uses K/G copies of the layer with the mean weight w̄. κ is G if the weights sum to 1, 1 if those of each
    shard group do, and E·G/K for a softmax over all E experts (arXiv:2410.07524 writes E·G²/T; its E is E/G here and
    its T is K), all divided by `routed_scaling`.
    """
    return granularity / (moe.top_k * expected_weight(moe))


def shards(w: Float[Array, "L m n"], name: str, granularity: int) -> Float[Array, "L G m n"]:
    """The shards of a matrix along F: the last dimension of gate and up, the first of down. Shard g is expert g's."""
    layers, rows, columns = w.shape
    if name == "w_down":
        return w.reshape(layers, granularity, rows // granularity, columns)
    return jnp.moveaxis(w.reshape(layers, rows, granularity, columns // granularity), 2, 1)


# Fields with weights, or router columns, of their own.
NOT_OF_COPIES = {"router": "linear", "latent": 0, "shared_gate": "none", "identity_experts": 0}


@dataclass(frozen=True)
class VirtualGroups(Transform):
    """Sparse upcycling into `expansion` copies of each dense layer, each cut into `granularity` experts.

    Expert e·G + g is shard g of copy e. The G experts of a copy have the same router row, so the top K, a multiple of
    G, are complete copies. Source: arXiv:2410.07524, §2.3; G = 1: arXiv:2212.05055.
    choice: "copies" takes the K best of all experts, which are complete copies until training tells the rows of a copy
        apart. "shards" takes the K/G best of each shard, so that a token always has every shard K/G times, be it of
        different copies (`moe.shard_groups`).
    combine: `moe.combine`; "share" gives every shard the same weight.
    """

    expansion: int = 8
    granularity: int = 1
    top_k: int = 2
    scale: Literal["exact", "paper", "none"] = "exact"
    score: Literal["softmax", "sigmoid"] = "softmax"
    score_order: Literal["topk_score", "score_topk"] = "topk_score"
    renormalize: bool = False
    routed_scaling: float = 1.0
    choice: Literal["copies", "shards"] = "copies"
    combine: Literal["score", "share"] = "score"
    router_std: float = 0.02
    dense_layers: int = 0  # number of layers at the start that stay dense
    layers: str = ""  # which layers get experts, as `model.layers` of the result; "": all but dense_layers
    num_shared_experts: int = 0  # experts of every token: S/G complete copies of the dense layer
    moe: dict[str, Any] = dataclasses.field(default_factory=dict)  # more fields of MoEConfig, e.g. selection_bias

    def config(self, cfg: ModelConfig) -> ModelConfig:
        require_dense(cfg)
        f, g, k, e, s = cfg.d_ff, self.granularity, self.top_k, self.expansion, self.num_shared_experts
        for name in ("granularity", "expansion", "top_k"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be ≥ 1", "nearest valid: 1")
        require(f % g == 0, "granularity", g, f"must divide the dense d_ff={f}",
                f"nearest valid: {nearest_divisor(f, g)}")  # fmt: skip
        nearest = min(max(g, round(k / g) * g), e * g)
        rule = f"must be a multiple of granularity={g}, so that a token uses complete copies of the dense layer"
        require(k % g == 0, "top_k", k, rule, f"nearest valid: {nearest}")
        require(k <= e * g, "top_k", k, f"must be ≤ expansion × granularity = {e * g}", f"nearest valid: {e * g}")
        require(s >= 0 and s % g == 0, "num_shared_experts", s,
                f"must be a multiple of granularity={g}, so that they are complete copies of the dense layer",
                f"nearest valid: {max(0, round(s / g) * g)}")  # fmt: skip
        require(self.scale in SCALES, "scale", self.scale, f"must be one of {', '.join(SCALES)}",
                "nearest valid: 'exact'")  # fmt: skip
        require(self.router_std >= 0, "router_std", self.router_std, "must be ≥ 0", "nearest valid: 0.0")
        require(self.choice in ("copies", "shards"), "choice", self.choice, "must be copies or shards",
                "nearest valid: 'copies'")  # fmt: skip
        require(g > 1 or self.choice == "copies", "choice", self.choice, "needs granularity > 1: there is one shard",
                "nearest valid: 'copies'")  # fmt: skip
        names = ("score", "score_order", "renormalize", "routed_scaling", "combine")
        routing = {name: getattr(self, name) for name in names}
        routing["shard_groups"] = g if self.choice == "shards" else 1
        require(self.combine != "share" or self.choice == "shards", "combine", self.combine, "needs choice='shards'",
                "nearest valid: 'score'")  # fmt: skip
        moe = moe_config(self.moe, num_experts=e * g, top_k=k, d_expert=f // g, num_shared_experts=s, **routing)
        for name, usual in NOT_OF_COPIES.items():
            rule = "is not a part of copies of a dense layer"
            require(getattr(moe, name) == usual, f"moe.{name}", getattr(moe, name), rule, f"nearest valid: {usual!r}")
        require(moe.routed_scaling > 0, "routed_scaling", moe.routed_scaling, "must be > 0", "nearest valid: 1.0")
        require(e % moe.num_groups == 0, "num_groups", moe.num_groups,
                f"must divide expansion={e}, so that no copy is in two groups",
                f"nearest valid: {nearest_divisor(e, moe.num_groups)}")  # fmt: skip
        final = with_experts(cfg, moe, self.dense_layers, self.layers)
        for n in final.expert_counts:
            rule, nearest = f"moe:{n} needs a multiple of granularity={g} experts", max(g, round(n / g) * g)
            require(n % g == 0, "layers", self.layers, rule, f"nearest valid: moe:{nearest}")
            unit = g * moe.num_groups
            rule = f"moe:{n} needs a multiple of granularity × num_groups = {unit}, so that no copy is in two groups"
            nearest = max(unit, round(n / unit) * unit)
            require(n % unit == 0, "layers", self.layers, rule, f"nearest valid: moe:{nearest}")
        return final

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        final = self.config(cfg)
        moe, g, blocks = final.moe, self.granularity, Blocks.of(final)
        slots, k, s = moe.top_k + moe.num_shared_experts, moe.top_k, moe.num_shared_experts
        # Routed and shared experts contribute to the layer's output in proportion to their number.
        shared = g / slots
        exponents = SCALES[self.scale][cfg.activation]

        def experts(w, path):
            name, n = path.rsplit("/", 1)[-1], blocks.experts(path)
            routed = kappa(dataclasses.replace(moe, num_experts=n), g) * k / slots
            return jnp.tile(scaled(shards(blocks.take(w, path), name, g), routed ** exponents[name]), (1, n // g, 1, 1))

        def shared_experts(w, path):
            name = path.rsplit("/", 1)[-1]
            copies = (1, s // g, 1) if name == "w_down" else (1, 1, s // g)
            return jnp.tile(scaled(blocks.take(w, path), shared ** exponents[name]), copies)

        def router(_, path):
            shape = (len(blocks.depths(path)), cfg.d_model, blocks.experts(path) // g)
            own = blocks.key(key, path)
            rows = self.router_std * jax.random.truncated_normal(own, -3.0, 3.0, shape, jnp.float32)
            return jnp.repeat(rows, g, axis=-1)

        rules = (
            *blocks.carried(),
            (rf"{BLOCK}/moe/(w_gate|w_up|w_down)", r"dense_layers/mlp/\1", experts),
            (rf"{BLOCK}/moe/shared/(w_gate|w_up|w_down)", r"dense_layers/mlp/\1", shared_experts),
            (rf"{BLOCK}/moe/w_router", "", router),
        )
        return by_table(rules, flatten(model.abstract(final).shapes), params)

    def changes(self, cfg: ModelConfig) -> str:
        moe = self.config(cfg).moe
        if self.scale != "exact" and not self._harmless(cfg, moe):
            return f"scale={self.scale!r}"
        if not fixed_sum(moe) and self.router_std:
            return f"the combine weights of {moe.score} over all experts have a different sum for every token"
        what = {
            "compute='capacity' drops tokens": moe.compute == "capacity",
            "choice='expert' gives tokens different numbers of experts": moe.choice == "expert",
            "experts have three values a matrix": moe.expert_weights == "ternary",
            "the experts' inputs are rounded": moe.expert_inputs == "int8",
        }
        return next((why for why, so in what.items() if so), "")

    def _harmless(self, cfg: ModelConfig, moe: MoEConfig) -> bool:
        """Whether a scale other than "exact" is exact too: κ = 1, or the paper's scale for squared ReLU."""
        counts = self.config(cfg).expert_counts
        ones = [kappa(dataclasses.replace(moe, num_experts=n), self.granularity) == 1.0 for n in counts]
        one = all(ones) and not self.num_shared_experts
        return one or SCALES[self.scale][cfg.activation] == SCALES["exact"][cfg.activation]


def copy(expansion: int = 8, top_k: int = 2, **fields) -> VirtualGroups:
    """Virtual groups of granularity 1: every expert is a copy of the dense layer."""
    return VirtualGroups(expansion, 1, top_k, **fields)


def moe_config(more: dict[str, Any] | None = None, **fields) -> MoEConfig:
    """A MoEConfig of these fields, and of more that a user names. Its errors are named `upcycle.<field>`."""
    known, more = {f.name for f in dataclasses.fields(MoEConfig)}, more or {}
    for name in set(more) - known:
        raise ConfigError(f"upcycle.moe.{name}", more[name], "is not a field of MoEConfig", "see docs/config.md")
    for name in set(more) & set(fields):
        rule = "is set by the transform and its own fields"
        raise ConfigError(f"upcycle.moe.{name}", more[name], rule, f"nearest valid: {fields[name]!r}, without moe")
    try:
        return MoEConfig(**fields, **more)
    except ConfigError as e:
        raise e.inside("upcycle") from None


# --- which layers get experts ----------------------------------------------------------------------------------------

BLOCK = r"(?:dense_)?layers(?:_\d+)?(?:/block_\d+)?"  # the path of a block in the parameters


def with_experts(
    cfg: ModelConfig, moe: MoEConfig, dense_layers: int, layers: str, *, tables: bool = False
) -> ModelConfig:
    """The dense model with experts in some layers: those that `layers` names, or all but the first `dense_layers`.

    tables: whether a block's experts may be named by a table.
    """
    last = cfg.num_layers - 1
    rule = f"must be in [0, {last}]: it is the number of the {last + 1} layers that stay dense; all others get experts"
    nearest = min(max(dense_layers, 0), last)
    require(0 <= dense_layers <= last, "dense_layers", dense_layers, rule, f"nearest valid: {nearest}")
    if not layers:
        return dataclasses.replace(cfg, num_dense_layers=dense_layers, moe=moe)
    require(not dense_layers, "dense_layers", dense_layers, "has no effect with layers", "nearest valid: 0")
    try:
        stacks = parse(layers, moe.num_experts)
        blocks = sum(stack.repeat * len(stack.unit) for stack in stacks)
        rule = f"has {blocks} blocks, but the model has {cfg.num_layers} layers"
        require(blocks == cfg.num_layers, "layers", layers, rule, "name each layer of the model")
        names = {kind.name for stack in stacks for kind in stack.unit}
        rule = "a late block has its feed-forward layer beside the experts, so it would not compute the dense layer"
        require("late" not in names, "layers", layers, rule, "name dense and moe only")
        rule = "the table of a table block would not choose what the copies need"
        require(tables or "table" not in names, "layers", layers, rule, "name dense and moe only")
        rule = "a memory would be fresh, so that the model would not compute the dense one's function"
        require("memory" not in names, "layers", layers, rule, "name dense and moe only")
        rule = f"has no block with {moe.num_experts} experts, the number that the other options make"
        named = any(kind.experts == moe.num_experts for stack in stacks for kind in stack.unit)
        require(named, "layers", layers, rule, "nearest valid: moe without a number")
        first = 0 if stacks[0].unit[0].experts else stacks[0].repeat
        plain = is_plain([(stack.repeat, stack.unit) for stack in stacks], moe.num_experts)
        rule = f"is the order that dense_layers={first} says without it"
        require(not plain, "layers", layers, rule, f"nearest valid: dense_layers={first}")
        return dataclasses.replace(cfg, num_dense_layers=0, layers=layers, moe=moe)
    except ConfigError as e:
        raise (e if e.name.startswith("upcycle.") else e.inside("upcycle")) from None


class Blocks(NamedTuple):
    """The blocks of a model that is made of a dense one: which layers of that one each of its parameters comes from."""

    places: tuple[Place, ...]

    @classmethod
    def of(cls, cfg: ModelConfig) -> "Blocks":
        return cls(cfg.places)

    def depths(self, path: str) -> list[int]:
        """The numbers of the layers that a parameter of a block stacks."""
        block = re.match(BLOCK, path)[0]
        return [depth for depth, place in enumerate(self.places) if place.path == block]

    def experts(self, path: str) -> int:
        """The number of experts of the block of a parameter."""
        return self.places[self.depths(path)[0]].kind.experts

    def take(self, w: Array, path: str) -> Array:
        """The layers of a dense model's parameter that a parameter of a block comes from."""
        depths = self.depths(path)
        first, last = depths[0], depths[-1]
        return w[first : last + 1] if last - first + 1 == len(depths) else w[jnp.asarray(depths)]

    def key(self, key: Key[Array, ""], path: str) -> Key[Array, ""]:
        """The random key of a block with experts: `key` itself for the first one, so that it is all of most models."""
        block = re.match(BLOCK, path)[0]
        number = list(dict.fromkeys(place.path for place in self.places if place.kind.experts)).index(block)
        return jax.random.fold_in(key, 2**20 + number) if number else key  # no key that a block makes of its own

    def carried(self) -> tuple:
        """Rules for parameters that do not change: all but the feed-forward layers, and these in dense blocks."""
        own = r"attention/.+|attention_norm|mlp_norm|(attention|mlp)_residual/.+|mlp/.+"
        return (
            (r"embed|embed_bias|embed_scale|head|final_norm", r"\g<0>", lambda w, _: w),
            (rf"{BLOCK}/({own})", r"dense_layers/\1", self.take),
        )
