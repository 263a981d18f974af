"""Fields of the model: routing and experts, attention, and the decoder around them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config import layers as layers_lib
from moe_jax.config.fields import FIXED, FUNCTION, Checked, machine, nearest_divisor, number, require
from moe_jax.config.lora import LoRAConfig
from moe_jax.errors import ConfigError


@dataclass(frozen=True)
class MoEConfig(Checked, resume=FIXED, weights=FUNCTION):
    """Routing and experts of one MoE layer."""

    num_experts: int = number(8, 1)  # routed experts of a layer (E), unless model.layers gives it another number
    top_k: int = number(2, 1)  # routed experts that a token uses (K)
    d_expert: int = number(256, 1)  # hidden width of one expert (F)
    # Experts that every token uses. They are computed as one feed-forward layer of width num_shared_experts · d_expert.
    num_shared_experts: int = number(0, 0)
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
    # The combine weight of a chosen expert: its score, or 1 (EMoE, arXiv:2310.10908).
    combine: Literal["score", "one"] = "score"
    routed_scaling: float = number(1.0, 0.0)  # factor on the combine weights of routed experts
    # Equal groups of experts, for group-limited selection (DeepSeek-V2); 1: no groups.
    num_groups: int = number(1, 1)
    top_groups: int = number(1, 1)  # groups of experts that a token may choose from, at most num_groups
    # Further choices of the router, which compute nothing (Z): a token that takes one has fewer experts.
    identity_experts: int = number(0, 0)
    # What such a choice adds to the layer's result, times its combine weight: the layer's input, or nothing.
    identity_output: Literal["input", "nothing"] = "input"
    # Experts that a token uses on average, identity experts not counted, which the selection bias aims at; 0: no aim.
    expert_budget: float = machine(number(0.0, 0.0), FIXED)
    # Balance without a loss: add a bias to each expert's score for selection only. loss.bias_update sets how it moves.
    selection_bias: bool = False
    # "grouped" sorts rows by expert and drops none. "capacity" gives each expert a fixed number of rows; the rest is
    # dropped and counted. "dense" computes every expert on every token: slow, for comparison.
    compute: Literal["grouped", "dense", "capacity"] = machine("grouped", FIXED)
    # With compute="capacity" an expert takes ⌈capacity_factor · K · T / E⌉ rows.
    capacity_factor: float = machine(number(1.25, 0.01), FIXED)
    # Which rows an expert takes first with compute="capacity": those of early tokens, a random order, or those of the
    # largest combine weight.
    overflow: Literal["first", "random", "score"] = machine("first", FIXED)
    # How tokens reach the experts of other devices (docs/scaling.md). "auto" takes what sends fewer bytes on TPU, and
    # "ring" on CPU and GPU.
    exchange: Literal["auto", "ring", "all_to_all"] = machine("auto")
    # Rows that a device computes at first, as a multiple of the average. Any others are computed in further passes.
    room: float = machine(number(1.25, 0.01))
    # Parts in which a device's tokens are sent and computed; one part may travel while another is computed.
    exchange_chunks: int = machine(number(1, 1))
    # Back end of the experts' matrix products. "auto" takes the best that runs on the device; "hopper" needs an H100,
    # H200, H800 or GH200, the others run anywhere. "batched" is for other GPUs and dtypes.
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
        return self.expert_budget or self.top_k * self.num_experts / self.router_columns

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
        most = self.top_groups * (e // g) if g > 1 else c
        require(
            k <= most, "top_k", k, f"must be ≤ top_groups · num_experts/num_groups = {most}", f"nearest valid: {most}"
        )
        require(
            self.score == "softmax" or self.score_order == "score_topk",
            "score_order", self.score_order, "needs score='softmax' (the others do not depend on the other experts)",
            "nearest valid: 'score_topk'",
        )  # fmt: skip
        require(not (self.renormalize and self.combine == "one"), "renormalize", True,
                "has no effect with combine='one'", "nearest valid: False")  # fmt: skip
        require(self.identity_experts or self.identity_output == "input", "identity_output", self.identity_output,
                "needs identity_experts > 0", "nearest valid: 'input'")  # fmt: skip
        require(self.compute == "capacity" or self.overflow == "first", "overflow", self.overflow,
                "needs compute='capacity': nothing else drops rows", "nearest valid: 'first'")  # fmt: skip
        require(self.combine == "score" or self.overflow != "score", "overflow", self.overflow,
                "has no effect with combine='one': all weights are equal", "nearest valid: 'first'")  # fmt: skip
        require(self.router != "linear" or self.router_width == MoEConfig.router_width, "router_width",
                self.router_width, "has no effect with router='linear'",
                f"nearest valid: {MoEConfig.router_width}")  # fmt: skip
        if self.expert_budget:
            self._check_budget()
        if self.choice == "expert":
            self._check_expert_choice()

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
        usual = {"identity_experts": 0, "num_groups": 1, "selection_bias": False, "score_order": "score_topk"}
        require(self.compute != "capacity", "compute", self.compute, "drops rows, but with choice='expert' loads are "
                "equal", "nearest valid: 'grouped'")  # fmt: skip
        for name, value in usual.items():
            mine = getattr(self, name)
            require(mine == value, name, mine, "is not available with choice='expert'", f"nearest valid: {value!r}")


@dataclass(frozen=True)
class MLAConfig(Checked, resume=FIXED, weights=FUNCTION):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads from one latent.

    Of a query head's `model.head_dim` numbers the last `rope_dim` are rotated; their keys are shared by all heads.
    """

    kv_rank: int = number(0, 0)  # size of the latent of keys and values; 0: ordinary attention
    q_rank: int = number(0, 0)  # size of the queries' own latent; 0: queries come from the layer's input
    rope_dim: int = number(64, 2)  # numbers of a query head, and of the shared key, that RoPE rotates; even
    v_dim: int = number(128, 1)  # size of a head's values

    def check(self):
        hint = f"nearest valid: {self.rope_dim + 1}"
        require(self.rope_dim % 2 == 0, "rope_dim", self.rope_dim, "must be even (RoPE rotates pairs)", hint)
        require(self.kv_rank or not self.q_rank, "q_rank", self.q_rank, "needs kv_rank > 0", "nearest valid: 0")


@dataclass(frozen=True)
class RopeScalingConfig(Checked, resume=FIXED, weights=FUNCTION):
    """RoPE of Llama 3.1 for longer contexts: it divides slow frequencies by `factor` and keeps fast ones.

    Between the two the divisor goes from one to the other.
    """

    factor: float = number(1.0, 1.0)  # divisor of slow frequencies; 1: off
    low_freq_factor: float = number(1.0, 0.0)  # a frequency is slow if it makes fewer turns in original_length
    # A frequency is fast if it makes more turns in original_length. Greater than low_freq_factor.
    high_freq_factor: float = number(4.0, 0.0)
    original_length: int = number(8192, 1)  # positions that the model was trained on before it was extended

    def check(self):
        high, low = self.high_freq_factor, self.low_freq_factor
        require(high > low, "high_freq_factor", high, f"must be > low_freq_factor={low}", f"nearest valid: {low + 1}")


@dataclass(frozen=True)
class ModelConfig(Checked, resume=FIXED, weights=FUNCTION):
    """A pre-norm decoder of `num_layers` blocks: `num_dense_layers` dense ones, then MoE blocks; or by `layers`."""

    vocab_size: int = number(512, 2)  # rows of the embedding (V); at least the tokenizer's tokens
    d_model: int = number(128, 2)  # width of the residual stream (D)
    num_layers: int = number(4, 1)  # blocks, dense ones and MoE ones together (L)
    num_dense_layers: int = number(0, 0)  # dense blocks at the start; num_layers: a dense model
    # Any other order of blocks (docs/layers.md), such as "12*(dense moe)", "10*(dense moe:32) 2*(dense moe:64)" with 32
    # and 64 experts in a block, "4*(late dense)", whose experts are added after the next block, or "3*table 9*moe", in
    # which a fixed table names the experts of each token id; "": the two numbers above.
    layers: str = ""
    d_ff: int = number(512, 1)  # hidden width of the dense blocks
    # Activation of every feed-forward layer, dense or expert. "swiglu" has gate, up and down matrices; "gelu" and
    # "relu2" (squared ReLU) have no gate.
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    num_heads: int = number(4, 1)  # query heads (N)
    num_kv_heads: int = number(4, 1)  # heads of keys and values (M); divides num_heads
    head_dim: int = number(32, 2)  # size of a head's queries and keys, and of its values except with MLA; even
    mla: MLAConfig = field(default_factory=MLAConfig)
    qk_norm: bool = False  # RMSNorm of queries and keys before RoPE
    # What the norm of qk_norm is taken over: each head alone, or all heads together (OLMoE).
    qk_norm_over: Literal["head", "projection"] = "head"
    rope_theta: float = number(10_000.0, 1.0)  # base of RoPE's frequencies
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    # Positions that the weights are good for, an upper bound of data.seq_len; 0: not known, any length is accepted.
    max_seq_len: int = machine(number(0, 0), FIXED)
    norm_eps: float = number(1e-6, 0.0, 1.0)  # epsilon of RMSNorm
    tie_embeddings: bool = False  # the output matrix is the embedding
    # Standard deviation of a fresh weight, drawn from a normal distribution cut off at 3 standard deviations.
    init_std: float = machine(number(0.02, 0.0), FIXED)
    # Dtype of activations and matrix products. Router, norms and losses compute in float32.
    compute_dtype: Literal["bfloat16", "float32"] = machine("bfloat16", FIXED)
    # Dtype of the weights, and so of their gradients and optimizer states. In bfloat16 small updates are lost to
    # rounding. The router's weights are always float32.
    param_dtype: Literal["float32", "bfloat16"] = machine("float32", FIXED)
    # What the backward pass of a layer computes again, to save memory: nothing, all but plain matrix products, what is
    # cheap, or everything (docs/performance.md).
    remat: Literal["none", "dots", "selective", "full"] = machine("none")
    # Layers, or units of `layers`, in one turn of the loop over them. num_layers: no loop, which is faster to run and
    # slower to compile.
    unroll: int = machine(number(1, 1))
    # Back end of attention (docs/performance.md). "cudnn" needs a GPU, "splash" a TPU, "chunked" runs anywhere; "xla"
    # is the reference, with all logits at once. "auto" takes the best that runs.
    attention: Literal["auto", "xla", "chunked", "cudnn", "splash"] = machine("auto")
    # True: a token sees its own document only. False: attention crosses the borders of documents packed in one row.
    segment_mask: bool = machine(True, FIXED)
    moe: MoEConfig = field(default_factory=MoEConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    @property
    def stacks(self) -> tuple[layers_lib.Stack, ...]:
        """The order of blocks: every other description of it follows from this one."""
        if self.layers:
            return layers_lib.parse(self.layers, self.moe.num_experts)
        dense, moe = layers_lib.Kind("dense"), layers_lib.Kind("moe", self.moe.num_experts)
        counts = ((self.num_dense_layers, (dense,)), (self.num_layers - self.num_dense_layers, (moe,)))
        return layers_lib.stacks_of([(n, unit) for n, unit in counts if n])

    @property
    def base(self) -> "ModelConfig":
        """The model without adapters."""
        return dataclasses.replace(self, lora=LoRAConfig()) if self.lora.rank else self

    @property
    def places(self) -> tuple[layers_lib.Place, ...]:
        """The place of each block in the parameters, from the first block to the last."""
        return layers_lib.places_of(self.stacks)

    @property
    def table_paths(self) -> set[str]:
        """The paths of blocks whose experts a table names."""
        blocks = (block for stack in self.stacks for block in zip(stack.paths, stack.unit, strict=True))
        return {path for path, kind in blocks if kind.name == "table"}

    @property
    def routed_counts(self) -> tuple[int, ...]:
        """The numbers of experts of blocks whose router chooses, the smallest first; () if none does."""
        kinds = {kind for stack in self.stacks for kind in stack.unit}
        return tuple(sorted({kind.experts for kind in kinds if kind.name in ("moe", "late")}))

    @property
    def expert_counts(self) -> tuple[int, ...]:
        """The numbers of experts that its blocks have, the smallest first; () for a dense model."""
        return tuple(sorted({kind.experts for stack in self.stacks for kind in stack.unit} - {0}))

    @property
    def num_moe_layers(self) -> int:
        """Number of blocks with experts."""
        return sum(stack.repeat * sum(bool(kind.experts) for kind in stack.unit) for stack in self.stacks)

    @property
    def v_dim(self) -> int:
        """Size of a head's values."""
        return self.mla.v_dim if self.mla.kv_rank else self.head_dim

    def check(self):
        n, m = self.num_heads, self.num_kv_heads
        require(n % m == 0, "num_kv_heads", m, f"must divide num_heads={n}", f"nearest valid: {nearest_divisor(n, m)}")
        require(self.unroll <= self.num_layers, "unroll", self.unroll, f"must be ≤ num_layers={self.num_layers}",
                f"nearest valid: {self.num_layers}")  # fmt: skip
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even (RoPE rotates pairs)",
                 f"nearest valid: {self.head_dim + 1}")  # fmt: skip
        require(self.num_dense_layers <= self.num_layers, "num_dense_layers", self.num_dense_layers,
                 f"must be ≤ num_layers={self.num_layers}", f"nearest valid: {self.num_layers}")  # fmt: skip
        if self.layers:
            self._check_layers()
        if self.mla.kv_rank:
            self._check_mla()

    def _check_layers(self):
        text, stacks, experts = self.layers, self.stacks, self.moe.num_experts
        blocks = sum(stack.repeat * len(stack.unit) for stack in stacks)
        require(self.num_layers == blocks, "num_layers", self.num_layers, f"layers={text!r} has {blocks} blocks",
                f"nearest valid: {blocks}")  # fmt: skip
        require(self.num_dense_layers == 0, "num_dense_layers", self.num_dense_layers, "has no effect with layers",
                "nearest valid: 0")  # fmt: skip
        counts = self.expert_counts
        nearest = min(counts, key=lambda e: abs(e - experts), default=experts)
        rule = f"no block of layers={text!r} has this number"
        require(not counts or experts in counts, "moe.num_experts", experts, rule, f"nearest valid: {nearest}")
        for e in counts:
            try:
                dataclasses.replace(self.moe, num_experts=e)
            except ConfigError as error:
                rule = f"its blocks with {e} experts: moe.{error.name}={error.value!r} {error.rule}"
                raise ConfigError("layers", text, rule, error.hint) from None
        fixed = [kind.experts for stack in stacks for kind in stack.unit if kind.name == "table"]
        rule = f"a table names experts, of which a token takes top_k={self.moe.top_k}"
        require(min(fixed, default=self.moe.top_k) >= self.moe.top_k, "layers", text, rule,
                f"nearest valid: {self.moe.top_k} experts in a table block")  # fmt: skip
        identity, usual = self.moe.identity_experts, MoEConfig()
        rule = f"is not available with table blocks, whose tables name experts: layers={text!r}"
        require(not (fixed and identity), "moe.identity_experts", identity, rule, "nearest valid: 0")
        if fixed and not self.routed_counts:
            names = ("choice", "selection_bias", *(("router",) if self.moe.combine == "one" else ()))
            for name in names:
                value, default = getattr(self.moe, name), getattr(usual, name)
                require(value == default, f"moe.{name}", value, f"has no effect: tables choose in layers={text!r}",
                        f"nearest valid: {default!r}")  # fmt: skip
        units = [(stack.repeat, stack.unit) for stack in stacks]
        if layers_lib.is_plain(units, experts):
            first = 0 if stacks[0].unit[0].experts else stacks[0].repeat
            rule = f"is the order that num_layers={blocks} and num_dense_layers={first} say without it"
            raise ConfigError("layers", text, rule, f"nearest valid: num_dense_layers={first} without it")
        # Of several spellings of an order the field keeps one, so that a run is resumed with any of them.
        object.__setattr__(self, "layers", layers_lib.spell(units, experts))

    def _check_mla(self):
        rope, hint = self.mla.rope_dim, f"nearest valid: {self.mla.rope_dim + 2}"
        require(self.head_dim > rope, "head_dim", self.head_dim, f"must be > mla.rope_dim={rope}", hint)
        n, m = self.num_heads, self.num_kv_heads
        require(m == n, "num_kv_heads", m, f"must be num_heads={n} with mla.kv_rank > 0", f"nearest valid: {n}")
        require(not self.qk_norm, "qk_norm", True, "is not available with mla.kv_rank > 0, which norms its latents",
                "nearest valid: False")  # fmt: skip
