"""What the model is: routing and experts, attention, the decoder around them."""

from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config.fields import FIXED, FUNCTION, Checked, machine, nearest_divisor, number, require


@dataclass(frozen=True)
class MoEConfig(Checked, resume=FIXED, weights=FUNCTION):
    """Routing and experts of one MoE layer."""

    num_experts: int = number(8, 1)
    top_k: int = number(2, 1)
    d_expert: int = number(256, 1)  # hidden width of one expert
    num_shared_experts: int = number(0, 0)  # always on; computed as one GLU of width num_shared_experts · d_expert
    score: Literal["softmax", "sigmoid"] = "softmax"
    score_order: Literal["score_topk", "topk_score"] = "score_topk"  # softmax over all experts, or over the chosen K
    renormalize: bool = False  # combine weights of a token sum to 1 (before routed_scaling)
    combine: Literal["score", "one"] = "score"  # "one": every chosen expert weighs 1 (EMoE, arXiv:2310.10908)
    routed_scaling: float = number(1.0, 0.0)
    num_groups: int = number(1, 1)  # group-limited selection (DeepSeek-V2): experts in equal groups …
    top_groups: int = number(1, 1)  # … of which a token may use this many
    selection_bias: bool = False  # a bias per expert added for selection only (`router_bias` of the train state)
    compute: Literal["grouped", "dense", "capacity"] = machine("grouped", FIXED)
    # compute="capacity": an expert takes ⌈factor · K · T / E⌉ rows.
    capacity_factor: float = machine(number(1.25, 0.01), FIXED)
    # How tokens reach the experts of other devices; "auto": what sends fewer bytes (moe_jax/moe/exchange.py).
    exchange: Literal["auto", "ring", "all_to_all"] = machine("auto")
    # × the average: rows a device computes at first; what is more, in further turns.
    room: float = machine(number(1.25, 0.01))
    # A device's tokens are sent and computed in so many parts, which may overlap.
    exchange_chunks: int = machine(number(1, 1))
    grouped_matmul: Literal["auto", "reference", "ragged_dot", "hopper"] = machine("auto")

    def check(self):
        e, k = self.num_experts, self.top_k
        require(k <= e, "top_k", k, f"must be ≤ num_experts={e}", f"nearest valid: {e}")
        g = self.num_groups
        require(e % g == 0, "num_groups", g, f"must divide num_experts={e}", f"nearest valid: {nearest_divisor(e, g)}")
        require(self.top_groups <= g, "top_groups", self.top_groups, f"must be ≤ num_groups={g}", f"nearest valid: {g}")
        require(
            self.exchange_chunks == 1 or self.compute != "capacity",
            "exchange_chunks", self.exchange_chunks, "would change which rows compute='capacity' drops",
            "nearest valid: 1",
        )  # fmt: skip
        room = self.top_groups * (e // g)
        require(
            k <= room, "top_k", k, f"must be ≤ top_groups · num_experts/num_groups = {room}", f"nearest valid: {room}"
        )
        require(
            not (self.score == "sigmoid" and self.score_order == "topk_score"),
            "score_order", self.score_order, "needs score='softmax' (a sigmoid does not depend on the other experts)",
            "nearest valid: 'score_topk'",
        )  # fmt: skip
        require(not (self.renormalize and self.combine == "one"), "renormalize", True,
                "has no effect with combine='one'", "nearest valid: False")  # fmt: skip


@dataclass(frozen=True)
class MLAConfig(Checked, resume=FIXED, weights=FUNCTION):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads from one latent.

    Of a query head's `model.head_dim` numbers the last `rope_dim` are rotated; their keys are shared by all heads.
    """

    kv_rank: int = number(0, 0)  # size of the latent; 0: ordinary attention
    q_rank: int = number(0, 0)  # queries come from a latent too; 0: from the layer's input
    rope_dim: int = number(64, 2)
    v_dim: int = number(128, 1)  # a head's values

    def check(self):
        near = f"nearest valid: {self.rope_dim + 1}"
        require(self.rope_dim % 2 == 0, "rope_dim", self.rope_dim, "must be even (RoPE rotates pairs)", near)
        require(self.kv_rank or not self.q_rank, "q_rank", self.q_rank, "needs kv_rank > 0", "nearest valid: 0")


@dataclass(frozen=True)
class RopeScalingConfig(Checked, resume=FIXED, weights=FUNCTION):
    """RoPE of Llama 3.1 for longer contexts: slow frequencies divided by `factor`, fast ones kept, a ramp between."""

    factor: float = number(1.0, 1.0)  # 1: off
    low_freq_factor: float = number(1.0, 0.0)  # slow: fewer turns than this in `original_length`
    high_freq_factor: float = number(4.0, 0.0)  # fast: more
    original_length: int = number(8192, 1)

    def check(self):
        high, low = self.high_freq_factor, self.low_freq_factor
        require(high > low, "high_freq_factor", high, f"must be > low_freq_factor={low}", f"nearest valid: {low + 1}")


@dataclass(frozen=True)
class ModelConfig(Checked, resume=FIXED, weights=FUNCTION):
    """A pre-norm decoder: `num_dense_layers` dense blocks, then MoE blocks, `num_layers` in all."""

    vocab_size: int = number(512, 2)
    d_model: int = number(128, 2)
    num_layers: int = number(4, 1)
    num_dense_layers: int = number(0, 0)  # num_layers: a dense model
    d_ff: int = number(512, 1)  # hidden width of the dense blocks
    # Of every feed-forward layer, dense or expert: gated (gate, up and down matrices), or plain ones without a gate.
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    num_heads: int = number(4, 1)
    num_kv_heads: int = number(4, 1)
    head_dim: int = number(32, 2)  # of queries and keys, and of values but for MLA
    mla: MLAConfig = field(default_factory=MLAConfig)
    qk_norm: bool = False
    qk_norm_over: Literal["head", "projection"] = "head"  # each head alone, or all together (OLMoE)
    rope_theta: float = number(10_000.0, 1.0)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    max_seq_len: int = machine(number(0, 0), FIXED)  # positions that the weights are good for; 0: not known, any
    norm_eps: float = number(1e-6, 0.0, 1.0)
    tie_embeddings: bool = False
    init_std: float = machine(number(0.02, 0.0), FIXED)
    compute_dtype: Literal["bfloat16", "float32"] = machine("bfloat16", FIXED)
    # Of the weights, and so of their gradients and optimizer states. In bfloat16 small updates round away; the router's
    # weights stay float32.
    param_dtype: Literal["float32", "bfloat16"] = machine("float32", FIXED)
    # What the backward pass computes again of a layer: nothing, all but plain matmuls, what is cheap, everything
    # (moe_jax/nn/remat.py).
    remat: Literal["none", "dots", "selective", "full"] = machine("none")
    # Layers in one turn of the loop over layers. A loop has what layers keep and their gradients copied into stacks of
    # all layers; a turn of all layers has not, and compiles longer.
    unroll: int = machine(number(1, 1))
    attention: Literal["auto", "xla", "cudnn", "splash"] = machine("auto")
    segment_mask: bool = machine(True, FIXED)  # False: attention crosses the borders of documents packed in one row
    moe: MoEConfig = field(default_factory=MoEConfig)

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

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
        if self.mla.kv_rank:
            self._check_mla()

    def _check_mla(self):
        rope, near = self.mla.rope_dim, f"nearest valid: {self.mla.rope_dim + 2}"
        require(self.head_dim > rope, "head_dim", self.head_dim, f"must be > mla.rope_dim={rope}", near)
        n, m = self.num_heads, self.num_kv_heads
        require(m == n, "num_kv_heads", m, f"must be num_heads={n} with mla.kv_rank > 0", f"nearest valid: {n}")
        require(not self.qk_norm, "qk_norm", True, "is not for mla.kv_rank > 0, which norms its latents",
                "nearest valid: False")  # fmt: skip
        backend, rule = self.attention, "takes heads of one size: with mla.kv_rank > 0 it must be 'auto' or 'xla'"
        require(backend in ("auto", "xla"), "attention", backend, rule, "nearest valid: 'auto'")
