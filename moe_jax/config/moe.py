"""Fields of routing and experts."""

import math
from dataclasses import dataclass
from typing import Literal

from moe_jax.config.fields import FIXED, FUNCTION, Checked, machine, nearest_divisor, number, require
from moe_jax.config.labels import check_layer
from moe_jax.config.pools import check_pools


@dataclass(frozen=True)
class MoEConfig(Checked, resume=FIXED, weights=FUNCTION):
    """Routing and experts of one MoE layer."""

    num_experts: int = number(8, 1)  # routed experts of a layer (E), unless model.layers gives it another number
    top_k: int = number(2, 1)  # routed experts that a token uses (K)
    d_expert: int = number(256, 1)  # hidden width of one expert (F)
    # Experts that every token uses. They are computed as one feed-forward layer of width num_shared_experts · d_expert.
    num_shared_experts: int = number(0, 0)
    # Weights c of a token in c₀ · routed experts + c₁ · shared ones, learned from the token. "none": both are 1.
    # "sigmoid": c₀ is 1, c₁ the sigmoid of a product (Qwen2-MoE). "softmax": the softmax of two products with a bias
    # (PR-MoE). A fresh "sigmoid" gate gives 1 and ½, a fresh "softmax" gate ½ and ½.
    shared_gate: Literal["none", "sigmoid", "softmax"] = "none"
    # Width at which routed experts read and write (BigMac, LatentMoE): one matrix of the layer brings a token to it
    # before it is sent, another brings the sum over experts back. Routers and shared experts have the whole width.
    # 0: that of model.d_model, without these matrices.
    latent: int = number(0, 0)
    # RMSNorm of that sum before it is brought back (Kimi K3). A common factor of a token's combine weights, such as
    # routed_scaling, then has no effect on experts; identity experts are added after it.
    latent_norm: bool = False
    # Where router logits come from (docs/routing.md). "linear": one matrix. "cosine": the cosine of a projection of the
    # token and a vector of each expert, times a learned scale. "mlp": two hidden layers on a projection of the token,
    # to which a share of the layer before's is added.
    router: Literal["linear", "cosine", "mlp"] = "linear"
    router_width: int = number(256, 1)  # size of that projection (R), for router="cosine" and "mlp"
    # Who chooses. "token": a token takes its K best experts. "expert": an expert takes its K/E·S best tokens of each
    # sequence of S, so that loads are equal; not causal, so that such a model writes no text.
    choice: Literal["token", "expert"] = "token"
    # Function that makes scores of router logits: a softmax over the experts, or of each logit the sigmoid or the
    # square root of softplus.
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    # "score_topk" takes the softmax of all logits and then chooses K experts. "topk_score" chooses K logits and takes
    # the softmax over those.
    score_order: Literal["score_topk", "topk_score"] = "score_topk"
    renormalize: bool = False  # divide a token's combine weights by their sum, before routed_scaling
    # The combine weight of a chosen expert: its score, or 1 (EMoE, arXiv:2310.10908). "share": its score divided by the
    # sum of those of the token's choices in the same shard group, so that every group has the same weight.
    combine: Literal["score", "one", "share"] = "score"
    routed_scaling: float = number(1.0, 0.0)  # factor on the combine weights of routed experts
    # Equal groups of experts, for group-limited selection (DeepSeek-V2); 1: no groups.
    num_groups: int = number(1, 1)
    top_groups: int = number(1, 1)  # groups of experts that a token may choose from, at most num_groups
    # What ranks a group: the sum of its two best scores (DeepSeek-V3), or its best one (DeepSeek-V2).
    group_score: Literal["best_two", "best"] = "best_two"
    # Equal groups of experts of which each gives a token K / shard_groups experts (MoGE, arXiv:2505.21411); 1: no such
    # groups. Expert e is in group e mod shard_groups: in an upcycled model the copies of one shard of the dense layer.
    shard_groups: int = number(1, 1)
    # Equal groups of experts, one for each label of tokens (data.labels, docs/labels.md): a token chooses from the
    # group of its label, and from identity experts (MoMa, arXiv:2407.21770); 1: no such groups. The first experts are
    # those of label 0.
    label_groups: int = number(1, 1)
    # Routers of a layer over the same experts, one for each label of tokens (data.labels; Mod-Squad, arXiv:2212.08066);
    # 1: one for all.
    routers: int = number(1, 1)
    # What the table of a table block in model.layers is asked for: the experts of a token's id, or of its label
    # (data.labels), which is the number of its one expert (Mixture-of-Transformers, arXiv:2411.04996).
    table: Literal["token", "label"] = "token"
    # Further choices of the router, which compute nothing (Z): a token that takes one has fewer experts.
    identity_experts: int = number(0, 0)
    # What such a choice adds to the layer's result, times its combine weight: the layer's input, or nothing.
    identity_output: Literal["input", "nothing"] = "input"
    # Experts that a token uses on average, identity experts not counted, which the selection bias aims at; 0: no aim.
    expert_budget: float = machine(number(0.0, 0.0), FIXED)
    # Balance without a loss: add a bias to each expert's score for selection only. loss.bias_update sets how it moves.
    selection_bias: bool = False
    # Document pools (EMO, docs/routing.md): in training the tokens of a document choose from a random number of experts
    # in each layer, those that the document's tokens together prefer. The least number of experts of a pool; 0: no
    # pools.
    pool_min: int = machine(number(0, 0), FIXED)
    pool_max: int = machine(number(0, 0), FIXED)  # the largest number of experts of a pool; 0: all of them
    # Where evaluation and samples take a document's pool from, which has to be said. "all": they have none, and choose
    # from all experts. "prefix": from its first pool_prefix tokens, and in samples and benchmarks from the prompt.
    # "document": from all of its tokens, the scored ones too, a leak that makes losses too low; for measuring it.
    pool_from: Literal["", "all", "prefix", "document"] = machine("", FIXED)
    pool_size: int = machine(number(0, 0), FIXED)  # experts of a pool in evaluation, with "prefix" or "document"
    # Tokens at the beginning of a held-out document that are not scored, because they may give its pool; 0: none.
    pool_prefix: int = machine(number(0, 0), FIXED)
    # Values of the matrices of routed experts: any, or three for each matrix, −s, 0 and s, where s is the mean of its
    # absolute values (BitNet b1.58, MoTE). Training keeps and updates the unrounded ones (docs/layers.md).
    expert_weights: Literal["float", "ternary"] = "float"
    # What routed experts multiply their matrices with: any numbers, or rows rounded to 255 values each.
    expert_inputs: Literal["float", "int8"] = "float"
    # "grouped" sorts rows by expert and drops none. "capacity" gives each expert a fixed number of rows; the rest is
    # dropped and counted. "dense" computes every expert on every token: slow, for comparison.
    compute: Literal["grouped", "dense", "capacity"] = machine("grouped", FIXED)
    # With compute="capacity" an expert takes ⌈capacity_factor · K · T / E⌉ rows.
    capacity_factor: float = machine(number(1.25, 0.01), FIXED)
    # Which rows an expert takes first with compute="capacity": those of early tokens, a random order, or those of the
    # largest combine weight.
    overflow: Literal["first", "random", "score"] = machine("first", FIXED)
    # Leaves out choices of a token whose combine weight is less than this share of its largest one (MC-MoE's online
    # pruning, arXiv:2410.06270), for all layers alike; the others share its weight only with renormalize or
    # score_order="topk_score". An evaluation may set it (docs/routing.md). 0: off.
    min_ratio: float = machine(number(0.0, 0.0, 1.0), FIXED)
    # How tokens reach the experts of other devices (docs/scaling.md). "auto" takes what sends fewer bytes on TPU, and
    # "ring" on CPU and GPU.
    exchange: Literal["auto", "ring", "all_to_all"] = machine("auto")
    # Rows that a device computes at first, as a multiple of the average. Any others are computed in further passes.
    room: float = machine(number(1.25, 0.01))
    # Parts in which a device's tokens are sent and computed; one part may travel while another is computed.
    exchange_chunks: int = machine(number(1, 1))
    # Back end of the matrix products of experts, and of model.untie. "auto" takes the best that runs on the device;
    # "hopper" needs an H100, H200, H800 or GH200, the others run anywhere. "batched" is for other GPUs and dtypes.
    grouped_matmul: Literal["auto", "reference", "ragged_dot", "hopper", "batched"] = machine("auto")

    @property
    def router_columns(self) -> int:
        """Number of choices that the router has: experts, then identity experts (C)."""
        return self.num_experts + self.identity_experts

    @property
    def slots(self) -> int:
        """Length of a token's list of experts: K, or with expert choice every one of them."""
        return self.router_columns if self.choice == "expert" else self.top_k

    @property
    def mean_slots(self) -> float:
        """Number of experts that a token is expected to use: of its slots, those that compute something."""
        own = self.num_experts / self.label_groups  # of the columns that a token may choose
        return self.expert_budget or self.top_k * own / (own + self.identity_experts)

    @property
    def takes_pools(self) -> bool:
        """Whether the tokens of a document choose from a pool in evaluation too."""
        return self.pool_min > 0 and self.pool_from in ("prefix", "document")

    def check(self):
        e, k = self.num_experts, self.top_k
        c = self.router_columns
        named = f"num_experts={e}" + (f" + identity_experts={c - e}" if c > e else "")
        require(k <= c, "top_k", k, f"must be ≤ {named}", f"nearest valid: {c}")
        g = self.num_groups
        require(e % g == 0, "num_groups", g, f"must divide num_experts={e}", f"nearest valid: {nearest_divisor(e, g)}")
        require(self.top_groups <= g, "top_groups", self.top_groups, f"must be ≤ num_groups={g}", f"nearest valid: {g}")
        require(
            self.exchange_chunks == 1 or self.compute != "capacity",
            "exchange_chunks", self.exchange_chunks, "would change which rows compute='capacity' drops",
            "nearest valid: 1",
        )  # fmt: skip
        require(g == 1 or c == e, "identity_experts", c - e, "is not available with num_groups > 1", "nearest valid: 0")
        require(g > 1 or self.group_score == "best_two", "group_score", self.group_score, "needs num_groups > 1",
                "nearest valid: 'best_two'")  # fmt: skip
        most = self.top_groups * (e // g) if g > 1 else c
        require(
            k <= most, "top_k", k, f"must be ≤ top_groups · num_experts/num_groups = {most}", f"nearest valid: {most}"
        )
        self._check_shards()
        require(
            self.score == "softmax" or self.score_order == "score_topk",
            "score_order", self.score_order, "needs score='softmax' (the others do not depend on the other experts)",
            "nearest valid: 'score_topk'",
        )  # fmt: skip
        require(not self.renormalize or self.combine == "score", "renormalize", True,
                f"has no effect with combine={self.combine!r}", "nearest valid: False")  # fmt: skip
        require(self.num_shared_experts or self.shared_gate == "none", "shared_gate", self.shared_gate,
                "needs num_shared_experts > 0", "nearest valid: 'none'")  # fmt: skip
        require(self.latent or not self.latent_norm, "latent_norm", True, "needs latent > 0", "nearest valid: False")
        require(self.identity_experts or self.identity_output == "input", "identity_output", self.identity_output,
                "needs identity_experts > 0", "nearest valid: 'input'")  # fmt: skip
        require(self.compute == "capacity" or self.overflow == "first", "overflow", self.overflow,
                "needs compute='capacity': nothing else drops rows", "nearest valid: 'first'")  # fmt: skip
        require(self.combine == "score" or self.overflow != "score", "overflow", self.overflow,
                "has no effect with combine='one': all weights are equal", "nearest valid: 'first'")  # fmt: skip
        require(self.router != "linear" or self.router_width == MoEConfig.router_width, "router_width",
                self.router_width, "has no effect with router='linear'",
                f"nearest valid: {MoEConfig.router_width}")  # fmt: skip
        if self.min_ratio:
            self._check_ratio()
        if self.expert_budget:
            self._check_budget()
        if self.choice == "expert":
            self._check_expert_choice()
        check_pools(self)
        check_layer(self)

    def _check_shards(self):
        s, e, k = self.shard_groups, self.num_experts, self.top_k
        both, nearest = math.gcd(e, k), nearest_divisor(math.gcd(e, k), s)
        require(both % s == 0, "shard_groups", s, f"must divide num_experts={e} and top_k={k}",
                f"nearest valid: {nearest}")  # fmt: skip
        for name, value in {"identity_experts": 0, "num_groups": 1}.items() if s > 1 else ():
            mine = getattr(self, name)
            require(mine == value, name, mine, "is not available with shard_groups > 1", f"nearest valid: {value}")
        require(s > 1 or self.combine != "share", "combine", self.combine, "needs shard_groups > 1",
                "nearest valid: 'score'")  # fmt: skip

    def _check_ratio(self):
        """Refuses choices whose weights do not say which of them a token needs least."""
        for name, plain in {"choice": "token", "combine": "score", "shard_groups": 1}.items():
            rule = f"is for the choices of tokens by their scores, not with {name}={getattr(self, name)!r}"
            require(getattr(self, name) == plain, "min_ratio", self.min_ratio, rule, "nearest valid: 0.0")
        require(self.top_k > 1, "min_ratio", self.min_ratio, "has no effect with top_k=1", "nearest valid: 0.0")

    def _check_budget(self):
        def rule(ok: bool, text: str) -> None:
            require(ok, "expert_budget", self.expert_budget, text, "nearest valid: 0.0")

        rule(self.identity_experts > 0, "needs identity_experts > 0: what else may a token choose?")
        rule(self.selection_bias, "needs selection_bias=True, which is what it moves")
        k, e, z = self.top_k, self.num_experts, self.identity_experts
        low, high = max(k - z, 0), min(k, e)
        rule(low < self.expert_budget < high, f"must be between {low} and {high}, and neither: a token makes "
             f"top_k={k} choices of num_experts={e} and identity_experts={z}")  # fmt: skip

    def _check_expert_choice(self):
        """Refuses what balances or groups the choices of tokens: with expert choice all loads are equal."""
        usual = {"identity_experts": 0, "num_groups": 1, "shard_groups": 1, "selection_bias": False,
                 "score_order": "score_topk"}  # fmt: skip
        require(self.compute != "capacity", "compute", self.compute, "drops rows, but with choice='expert' loads are "
                "equal", "nearest valid: 'grouped'")  # fmt: skip
        for name, value in usual.items():
            mine = getattr(self, name)
            require(mine == value, name, mine, "is not available with choice='expert'", f"nearest valid: {value!r}")
