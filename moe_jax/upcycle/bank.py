"""Changes how many experts a model has: takes some away, adds some, joins those of several models.

Letters: L layers, D model, E experts, C router columns (E, then identity experts), K experts per token, n models.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe_jax import model
from moe_jax.config import ModelConfig
from moe_jax.config.layers import spell
from moe_jax.errors import ConfigError
from moe_jax.tree import flatten
from moe_jax.upcycle.chain import Scores, Transform, by_table, require, require_dense, scaled, shapes_of
from moe_jax.upcycle.experts import BLOCK, Blocks, fixed_sum, moe_config, with_experts

MATRICES = rf"{BLOCK}/moe/(w_gate|w_up|w_down)"  # [L, E, …]
COLUMNS = rf"{BLOCK}/moe/(w_router|router_bias)"  # […, C]
# What has no axis of experts.
OTHERS = (
    r"embed|embed_bias|embed_scale|head|final_norm"
    rf"|{BLOCK}/(attention/.+|attention_norm|mlp_norm|(attention|mlp)_residual/.+|mlp/.+|memory/.+)"
    rf"|{BLOCK}/moe/(w_in|w_out|latent_norm|shared/.+|w_shared_gate|b_shared_gate|router/.+)"
)


def _same(w: Array, _: str) -> Array:
    return w


def _require_model(ok: bool, field: str, value: Any, rule: str, nearest: Any) -> None:
    """Raises ConfigError unless `ok`, about a field of the model that is read."""
    rule = f"the model has {field}={value!r}: {rule}"
    require(ok, "from", f"{field}={value!r}", rule, f"nearest valid: a model with {field}={nearest!r}")


def _require_routers(cfg: ModelConfig) -> None:
    """Raises ConfigError for a model whose experts are not all chosen by routers, one by one."""
    rule, layers = "it has no experts, which this transform changes", cfg.num_layers
    require(cfg.num_moe_layers > 0, "from", f"num_dense_layers={layers}", rule, "nearest valid: a model with experts")
    _require_model(not cfg.table_paths, "layers", cfg.layers, "tables name experts by their old numbers", "")
    for name in ("num_groups", "shard_groups"):
        groups = getattr(cfg.moe, name)
        _require_model(groups == 1, f"moe.{name}", groups, "groups of experts must stay as they are", 1)


def _step(cfg: ModelConfig) -> int:
    """The number whose multiples `moe.num_experts` may become, so that every layer has a whole number of experts."""
    old = cfg.moe.num_experts
    return math.lcm(*(old // math.gcd(e, old) for e in cfg.expert_counts))


def _resized(cfg: ModelConfig, name: str, experts: int, **fields: Any) -> ModelConfig:
    """The model with `experts` experts where it has `moe.num_experts`, and in proportion where it has another number.

    Every parameter keeps its place. fields: more fields of MoEConfig.
    """
    old, step = cfg.moe.num_experts, _step(cfg)
    counts = ", ".join(map(str, cfg.expert_counts))
    rule = f"must be a multiple of {step}, so that layers with {counts} experts change in proportion"
    require(experts % step == 0, name, experts, rule, f"nearest valid: {max(1, round(experts / step)) * step}")
    resized = lambda kind: kind._replace(experts=kind.experts * experts // old)
    units = [(count, tuple(map(resized, unit))) for count, unit in cfg.units]
    try:
        moe = dataclasses.replace(cfg.moe, num_experts=experts, **fields)
        return dataclasses.replace(cfg, layers=spell(units, experts) if cfg.layers else "", moe=moe)
    except ConfigError as e:
        if e.name.startswith("upcycle.") or e.name in fields:
            raise (e if e.name.startswith("upcycle.") else e.inside("upcycle")) from None
        rule = f"makes a model with {e.name}={e.value!r}, which {e.rule}"  # a field of the model, and no option
        raise ConfigError(f"upcycle.{name}", experts, rule, f"of {e.name}, {e.hint}" if e.hint else "") from None


# --- fewer -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prune(Transform):
    """Keeps the experts with the largest scores of each layer, such as counts of tokens, in their order.

    Routers lose the columns of the others: a token takes its best K experts among those that are kept. Scores: `[L, E]`
    for each block with experts, by its path. Source: Z-code M3, arXiv:2109.10465, which keeps those that are used most.

    num_experts: of layers with `moe.num_experts`; layers with another number keep the same share of it.
    """

    num_experts: int
    needs_scores = True

    def config(self, cfg: ModelConfig) -> ModelConfig:
        _require_routers(cfg)
        rule = "experts that choose tokens have equal numbers of them, which say nothing"
        _require_model(cfg.moe.choice == "token", "moe.choice", cfg.moe.choice, rule, "token")
        most, step = cfg.moe.num_experts, _step(cfg)
        least = min(most, -(-cfg.moe.top_k * most // (min(cfg.expert_counts) * step)) * step)
        near = min(max(self.num_experts, least), most)
        rule = f"must be in [{least}, {most}]: from the experts of a token, in each layer, to those of the model"
        require(least <= self.num_experts <= most, "prune", self.num_experts, rule, f"nearest valid: {near}")
        return _resized(cfg, "prune", self.num_experts)

    def score_shapes(self, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The shapes of the scores of a model, by the path of the block."""
        blocks = [pair for stack in cfg.stacks for pair in zip(stack.paths, stack.unit, strict=True)]
        layers = {path: stack.repeat for stack in cfg.stacks for path in stack.paths}
        return {path: (layers[path], kind.experts) for path, kind in blocks if kind.experts}

    def params(
        self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""], scores: Scores
    ) -> dict[str, Array]:
        final = self.config(cfg)
        before, after = Blocks.of(cfg), Blocks.of(final)
        kept = lambda path: best_experts(scores[path.split("/moe/")[0]], after.experts(path))

        def matrices(w, path):
            return jnp.take_along_axis(w, kept(path)[:, :, None, None], axis=1)

        def columns(w, path):
            ids, experts = kept(path), before.experts(path)
            ids = ids if w.ndim == 2 else ids[:, None, :]
            return jnp.concatenate([jnp.take_along_axis(w, ids, axis=-1), w[..., experts:]], axis=-1)

        rules = ((MATRICES, r"\g<0>", matrices), (COLUMNS, r"\g<0>", columns), (OTHERS, r"\g<0>", _same))
        return by_table(rules, shapes_of(final), params)

    def changes(self, cfg: ModelConfig) -> str:
        gone = 1 - self.num_experts / cfg.moe.num_experts
        if not gone:
            return ""
        also = f", and {why}" if (why := _of_another_number(cfg, "fewer")) else ""
        return f"{gone:.0%} of the experts are gone, for the tokens that used them{also}"


def best_experts(scores: Float[Array, "L E"], count: int) -> Int[Array, "L count"]:
    """The experts with the largest scores of each layer, in ascending order. Of equal scores the lower number stays."""
    best = jnp.argsort(-jnp.asarray(scores, jnp.float32), axis=1, stable=True)
    return jnp.sort(best[:, :count], axis=1)


def _of_another_number(cfg: ModelConfig, number: str) -> str:
    """The reason why experts that no token chooses are a part of the function; "" if they are not.

    number: "more" or "fewer", for the reason.
    """
    if cfg.moe.score == "softmax" and (_ranked_by_all(cfg) or not fixed_sum(cfg.moe)):
        return f"the softmax is over {number} experts"
    return f"compute='capacity' gives each of {number} experts other rows" if cfg.moe.compute == "capacity" else ""


def _ranked_by_all(cfg: ModelConfig) -> bool:
    """Whether selection biases are added to a softmax over all experts, so that all logits decide what they change."""
    return cfg.moe.selection_bias and cfg.moe.score == "softmax" and cfg.moe.score_order == "score_topk"


# --- more ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grow(Transform):
    """Adds experts that are mixtures of the old ones, and closes them to tokens by the bias of the selection.

    A new expert's matrices and router column are one mixture of those of all old experts of its layer. The coefficients
    are normal, their vector of length 1. The expert's selection bias is the least old one − 1. Scores are in (0, 1), so
    no token chooses it. The update of selection biases (`loss.bias_update`) raises the bias of what has few tokens,
    which opens the new columns: "sign" after at most 1 / `loss.bias_update_rate` steps.
    Source: MixtureGrowth, arXiv:2311.04251, which grows layers as new mixtures of trained weights.

    num_experts: of layers with `moe.num_experts`; layers with another number grow in proportion.
    """

    num_experts: int

    def config(self, cfg: ModelConfig) -> ModelConfig:
        _require_routers(cfg)
        least = cfg.moe.num_experts
        rule = f"must be ≥ the model's num_experts={least}"
        require(self.num_experts >= least, "grow", self.num_experts, rule, f"nearest valid: {least}")
        for name, good in (("score", ("softmax", "sigmoid")), ("score_order", ("score_topk",)), ("choice", ("token",))):
            value, rule = getattr(cfg.moe, name), "a bias closes only columns that a token ranks by scores in (0, 1)"
            _require_model(value in good, f"moe.{name}", value, rule, good[0])
        return _resized(cfg, "grow", self.num_experts, selection_bias=True)

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        final = self.config(cfg)
        before, after = Blocks.of(cfg), Blocks.of(final)
        shapes = shapes_of(final)
        if not cfg.moe.selection_bias:  # its biases were 0
            size = lambda path: before.experts(path) + cfg.moe.identity_experts
            zeros = {path: jnp.zeros((x.shape[0], size(path))) for path, x in shapes.items() if "router_bias" in path}
            params = params | zeros

        def mixed(w, letters, path):
            """The mixtures of the old experts' `w` that the new experts are."""
            old = before.experts(path)
            drawn = jax.random.normal(after.key(key, path), (w.shape[0], after.experts(path) - old, old))
            mixture = drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
            product = jnp.einsum(letters, mixture, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
            return product.astype(w.dtype)

        def matrices(w, path):
            return jnp.concatenate([w, mixed(w, "lne,leij->lnij", path)], axis=1)

        def columns(w, path):
            old, passed = jnp.split(w, [before.experts(path)], axis=-1)
            return jnp.concatenate([old, mixed(old, "lne,lde->ldn", path), passed], axis=-1)

        def biases(b, path):
            old, passed = jnp.split(b, [before.experts(path)], axis=-1)
            shape = (b.shape[0], after.experts(path) - before.experts(path))
            closed = jnp.broadcast_to(jnp.min(b, axis=-1, keepdims=True) - 1.0, shape)
            return jnp.concatenate([old, closed, passed], axis=-1)

        rules = (
            (MATRICES, r"\g<0>", matrices),
            (rf"{BLOCK}/moe/w_router", r"\g<0>", columns),
            (rf"{BLOCK}/moe/router_bias", r"\g<0>", biases),
            (OTHERS, r"\g<0>", _same),
        )
        return by_table(rules, shapes, params)

    def changes(self, cfg: ModelConfig) -> str:
        return _of_another_number(cfg, "more") if self.num_experts > cfg.moe.num_experts else ""


# --- of several models -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merge(Transform):
    """Makes one model of several: their experts in one bank for each layer, and the mean of everything else.

    Dense models become experts, one of each model, behind a fresh router (Branch-Train-MiX, arXiv:2403.07816). Models
    with experts have their banks joined, with their router columns and selection biases (Z-code M3's aggregation of
    experts, arXiv:2109.10465); dense layers and shared experts are averaged. Biases that are added to a softmax over
    all experts are divided by the number of models, as its scores are where models are equal.

    sources: number of models. All have the same configuration.
    top_k: experts of a token. By default all that the models together use, so that models which are equal become the
        same function; for dense models 2, and any number would do.
    """

    sources: int = 2
    top_k: int = 0  # 0: the default above
    router_std: float = 0.02  # of the fresh router of dense models
    dense_layers: int = 0  # of dense models: number of layers at the start that stay dense
    layers: str = ""  # of dense models: which layers get experts; "": all but dense_layers

    def config(self, cfg: ModelConfig) -> ModelConfig:
        n = self.sources
        require(n >= 1, "sources", n, "must be ≥ 1", "nearest valid: 1")
        return self._of_banks(cfg) if cfg.num_moe_layers else self._of_dense(cfg)

    def _of_dense(self, cfg: ModelConfig) -> ModelConfig:
        require_dense(cfg)
        n, k = self.sources, self.top_k or min(2, self.sources)
        rule, near = f"must be in [1, {n}]: each model is an expert", min(max(k, 1), n)
        require(1 <= k <= n, "top_k", k, rule, f"nearest valid: {near}")
        require(self.router_std >= 0, "router_std", self.router_std, "must be ≥ 0", "nearest valid: 0.0")
        moe = moe_config(num_experts=n, top_k=k, d_expert=cfg.d_ff, score_order="topk_score")
        final = with_experts(cfg, moe, self.dense_layers, self.layers)
        rule = f"each of {n} models is an expert, in each layer with experts"
        require(final.expert_counts == (n,), "layers", self.layers, rule, "nearest valid: moe without a number")
        return final

    def _of_banks(self, cfg: ModelConfig) -> ModelConfig:
        _require_routers(cfg)
        n, moe = self.sources, cfg.moe
        for name in ("dense_layers", "layers", "router_std"):
            value, usual = getattr(self, name), getattr(type(self), name)
            require(value == usual, name, value, "the models have experts and routers", f"nearest valid: {usual!r}")
        identity, rule = moe.identity_experts, "those of several models would be one, which a token chooses once"
        _require_model(not identity, "moe.identity_experts", identity, rule, 0)
        k, most = self.top_k or n * moe.top_k, n * min(cfg.expert_counts)
        require(1 <= k <= most, "top_k", k, f"must be in [1, {most}]", f"nearest valid: {min(max(k, 1), most)}")
        # Weights that do not sum to 1, nor shrink with the number of experts.
        summed = moe.combine == "one" or (moe.score != "softmax" and not fixed_sum(moe))
        scale = moe.routed_scaling * (moe.top_k / k if summed else 1.0)
        return _resized(cfg, "sources", n * moe.num_experts, top_k=k, routed_scaling=scale)

    def params(self, cfg: ModelConfig, params: Any, key: Key[Array, ""]) -> dict[str, Array]:
        several = params if isinstance(params, tuple) else (params,)
        final = self.config(cfg)
        together = {path: tuple(one[path] for one in several) for path in several[0]}  # rules get those of all models
        if not cfg.num_moe_layers:
            return by_table(self._rules_of_dense(final, key), flatten(model.abstract(final).shapes), together)
        joined = lambda axis, factor=1.0: lambda ws, _: scaled(jnp.concatenate(ws, axis=axis), factor)
        rules = (
            (MATRICES, r"\g<0>", joined(1)),
            (rf"{BLOCK}/moe/w_router", r"\g<0>", joined(-1)),
            (rf"{BLOCK}/moe/router_bias", r"\g<0>", joined(-1, 1 / self.sources if _ranked_by_all(cfg) else 1.0)),
            (OTHERS, r"\g<0>", lambda ws, _: _mean(ws)),
        )
        return by_table(rules, shapes_of(final), together)

    def _rules_of_dense(self, final: ModelConfig, key: Key[Array, ""]) -> tuple:
        blocks = Blocks.of(final)

        def router(_, path):
            shape = (len(blocks.depths(path)), final.d_model, self.sources)
            return self.router_std * jax.random.truncated_normal(blocks.key(key, path), -3.0, 3.0, shape, jnp.float32)

        averaged = lambda how: lambda ws, path: how(_mean(ws), path)
        stacked = lambda ws, path: jnp.stack([blocks.take(w, path) for w in ws], axis=1)
        return (
            *((pattern, source, averaged(how)) for pattern, source, how in blocks.carried()),
            (MATRICES, r"dense_layers/mlp/\1", stacked),
            (rf"{BLOCK}/moe/w_router", "", router),
        )

    def changes(self, cfg: ModelConfig) -> str:
        if self.sources > 1:
            return f"{self.sources} models are one, which is the same function only if they are equal"
        fewer = cfg.num_moe_layers and self.config(cfg).moe.top_k != cfg.moe.top_k
        return f"a token uses {self.top_k} experts" if fewer else ""


def _mean(ws: tuple[Array, ...]) -> Array:
    """The mean of a parameter of several models, in float32; of one it is that parameter."""
    if len(ws) == 1:
        return ws[0]
    return (sum(w.astype(jnp.float32) for w in ws) / len(ws)).astype(ws[0].dtype)
