"""Fields of the model: attention, and the decoder around it. Those of routing and experts: moe.py."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config import layers as layers_lib
from moe_jax.config.fields import FIXED, FUNCTION, Checked, machine, nearest_divisor, number, require
from moe_jax.config.labels import check_model, needs
from moe_jax.config.lora import LoRAConfig
from moe_jax.config.memory import MemoryConfig
from moe_jax.config.moe import MoEConfig
from moe_jax.config.positions import Attends, RopeScalingConfig, read_layers, write_layers
from moe_jax.errors import ConfigError


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
class ModelConfig(Checked, resume=FIXED, weights=FUNCTION):
    """A decoder of `num_layers` blocks: `num_dense_layers` dense ones, then MoE blocks; or by `layers`."""

    vocab_size: int = number(512, 2)  # rows of the embedding (V); at least the tokenizer's tokens
    d_model: int = number(128, 2)  # width of the residual stream (D)
    num_layers: int = number(4, 1)  # blocks, dense ones and MoE ones together (L)
    num_dense_layers: int = number(0, 0)  # dense blocks at the start; num_layers: a dense model
    # Any other order of blocks (docs/layers.md), such as "12*(dense moe)", "10*(dense moe:32) 2*(dense moe:64)" with 32
    # and 64 experts in a block, "4*(late dense)", whose experts are added after the next block, "3*table 9*moe", in
    # which a fixed table names the experts of each token id, or "8*dense memory 3*dense", with a product-key memory in
    # one layer; "": the two numbers above.
    layers: str = ""
    d_ff: int = number(512, 1)  # hidden width of the dense blocks
    # Activation of every feed-forward layer, dense or expert. "swiglu" has gate, up and down matrices; "gelu" and
    # "relu2" (squared ReLU) have no gate.
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    num_heads: int = number(4, 1)  # query heads (N)
    num_kv_heads: int = number(4, 1)  # heads of keys and values (M); divides num_heads
    head_dim: int = number(32, 2)  # size of a head's queries and keys, and of its values except with MLA; even
    mla: MLAConfig = field(default_factory=MLAConfig)
    qkv_bias: bool = False  # a bias on queries, keys and values (Qwen2), before their norm; it begins as 0
    qk_norm: bool = False  # RMSNorm of queries and keys before RoPE
    # What the norm of qk_norm is taken over: each head alone, or all heads together (OLMoE).
    qk_norm_over: Literal["head", "projection"] = "head"
    # Number of labels of tokens (data.labels, docs/labels.md) that each have their own attention matrices and
    # norms in a block. Attention itself is over all tokens (Mixture-of-Transformers, arXiv:2411.04996). 1: all tokens
    # share them. Not with MLA or qkv_bias.
    untie: int = number(1, 1)
    rope_theta: float = number(10_000.0, 1.0)  # base of RoPE's frequencies
    # Numbers of a query's and a key's head that RoPE rotates, the first ones; even. 0: all. With MLA: mla.rope_dim.
    rope_dim: int = number(0, 0)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    # Tokens that a query sees in a layer with a window, its own and those before it; 0: no layer has a window.
    window: int = number(0, 0)
    # Which layers have the window, and which do not rotate queries and keys (docs/layers.md): a list that is repeated
    # from the first layer to the last, such as "3*window full" (OLMo 3) or "3*full full:nope" (SmolLM3); "": all layers
    # have the window, if there is one, and RoPE.
    attention_layers: str = ""
    # Positions that the weights are good for, an upper bound of data.seq_len; 0: not known, any length is accepted.
    max_seq_len: int = machine(number(0, 0), FIXED)
    norm_eps: float = number(1e-6, 0.0, 1.0)  # epsilon of RMSNorm
    # Where a block norms: what attention and the feed-forward layer read ("pre"), or what they add, x + norm(f(x))
    # ("post", OLMo 2). Not "post" with late blocks, or with norm_eps=0.
    norm: Literal["pre", "post"] = "pre"
    # Learned scales and biases of what a block adds, and of what it adds that to (ZAYA1, docs/layers.md). Not with late
    # blocks.
    residual_scale: bool = False
    embedding_multiplier: float = number(1.0, 1e-6)  # fixed factor on embeddings (Granite)
    attention_multiplier: float = number(0.0, 0.0)  # fixed factor on q·k; 0: 1/√head_dim
    # Fixed factor on what attention and feed-forward layers add to the residual stream. Not with late blocks.
    residual_multiplier: float = number(1.0, 1e-6)
    logits_divisor: float = number(1.0, 1e-6)  # fixed divisor of the logits
    tie_embeddings: bool = False  # the output matrix is the embedding
    norm_head: bool = False  # divide each row of the output matrix by its length before logits (NormHead, Ling)
    # Layers of multi-token prediction (docs/layers.md), a head for training: layer k predicts the token k places after
    # the next one. Logits do not depend on them. 0: none. Each has the form of the last block, dense or with experts.
    mtp_layers: int = machine(number(0, 0), FIXED)
    # Standard deviation of a fresh weight, drawn from a normal distribution cut off at 3 standard deviations.
    init_std: float = machine(number(0.02, 0.0), FIXED)
    # Dtype of activations and matrix products. Router, norms and losses compute in float32.
    compute_dtype: Literal["bfloat16", "float32"] = machine("bfloat16", FIXED)
    # Dtype of the weights, and so of their gradients and optimizer states. In bfloat16 small updates are lost to
    # rounding. The weights of routers and the keys of memories are always float32.
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
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    @property
    def stacks(self) -> tuple[layers_lib.Stack, ...]:
        """The order of blocks: every other description of it follows from this one."""
        units = self.units
        if self.window or self.attention_layers:
            units = layers_lib.with_attention(units, self._attention_list)
        return layers_lib.stacks_of(units)

    @property
    def units(self) -> layers_lib.Units:
        """The units of blocks that `layers`, or the two numbers, say, whatever the attention of each."""
        if self.layers:
            return [(s.repeat, s.unit) for s in layers_lib.parse(self.layers, self.moe.num_experts)]
        dense, moe = layers_lib.Kind("dense"), layers_lib.Kind("moe", self.moe.num_experts)
        counts = ((self.num_dense_layers, (dense,)), (self.num_layers - self.num_dense_layers, (moe,)))
        return [(n, unit) for n, unit in counts if n]

    @property
    def _attention_list(self) -> tuple[Attends, ...]:
        """The list of `attention_layers`, once."""
        return read_layers(self.attention_layers) or (Attends(window=self.window > 0),)

    @property
    def attends(self) -> tuple[Attends, ...]:
        """How each layer attends, from the first to the last."""
        repeated = self._attention_list
        return tuple(repeated[i % len(repeated)] for i in range(self.num_layers))

    @property
    def rope_size(self) -> int:
        """Numbers of a head that RoPE rotates."""
        return self.mla.rope_dim if self.mla.kv_rank else self.rope_dim or self.head_dim

    @property
    def base(self) -> "ModelConfig":
        """The model without adapters."""
        return dataclasses.replace(self, lora=LoRAConfig()) if self.lora.rank else self

    @property
    def without_mtp(self) -> "ModelConfig":
        """The model without layers of multi-token prediction."""
        return dataclasses.replace(self, mtp_layers=0) if self.mtp_layers else self

    @property
    def places(self) -> tuple[layers_lib.Place, ...]:
        """The place of each block in the parameters, from the first block to the last."""
        return layers_lib.places_of(self.stacks)

    @property
    def mtp_places(self) -> tuple[layers_lib.Place, ...]:
        """The place of the block of each layer of multi-token prediction, which `places` does not have."""
        kind = self.places[-1].kind
        return tuple(layers_lib.Place(layers_lib.MTP_BLOCK, index, kind) for index in range(self.mtp_layers))

    @property
    def table_paths(self) -> set[str]:
        """The paths of blocks whose experts a table names."""
        blocks = (block for stack in self.stacks for block in zip(stack.paths, stack.unit, strict=True))
        return {path for path, kind in blocks if kind.name == "table"}

    @property
    def labels(self) -> int:
        """The number of labels of tokens that the model is for; 0: it needs none."""
        return max(needs(self).values(), default=0)

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
    def expert_dim(self) -> int:
        """Width of the rows that routed experts read and write: `moe.latent`, or D."""
        return self.moe.latent or self.d_model

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
        self._check_positions()
        self._check_residual()
        if self.mtp_layers:
            self._check_mtp()
        check_model(self)
        if self.lora.rank and self.moe.expert_weights == "ternary":
            self._check_adapters()

    def _check_adapters(self):
        blocks = (block for stack in self.stacks for block in zip(stack.paths, stack.unit, strict=True))
        paths = [f"{path}/moe/w_{name}" for path, kind in blocks if kind.experts for name in ("gate", "up", "down")]
        found = next((path for path in paths if re.search(self.lora.match, path)), "")
        rule = f"gives {found} an adapter, and their sum has more values than moe.expert_weights='ternary'"
        require(not found, "lora.match", self.lora.match, rule, "nearest valid: '/(attention|mlp|shared)/'")

    def _check_mtp(self):
        layers, kind = self.mtp_layers, self.places[-1].kind.name
        rule = "is not available with lora.rank > 0, which would leave them as they are"
        require(not self.lora.rank, "mtp_layers", layers, rule, "nearest valid: 0")
        rule = f"is not available with a last block of kind {kind!r}, whose form such a layer would have"
        require(kind in ("dense", "moe"), "mtp_layers", layers, rule, "nearest valid: 0")
        rule = f"is not available with moe.router={self.moe.router!r}, whose state goes from layer to layer"
        require(kind == "dense" or self.moe.router != "mlp", "mtp_layers", layers, rule, "nearest valid: 0")

    def _check_layers(self):
        text, units, experts = self.layers, self.units, self.moe.num_experts
        blocks = sum(count * len(unit) for count, unit in units)
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
        fixed = [kind.experts for _, unit in units for kind in unit if kind.name == "table"]
        rule = f"a table names experts, of which a token takes top_k={self.moe.top_k}"
        require(min(fixed, default=self.moe.top_k) >= self.moe.top_k, "layers", text, rule,
                f"nearest valid: {self.moe.top_k} experts in a table block")  # fmt: skip
        identity, usual = self.moe.identity_experts, MoEConfig()
        rule = f"is not available with table blocks, whose tables name experts: layers={text!r}"
        require(not (fixed and identity), "moe.identity_experts", identity, rule, "nearest valid: 0")
        combine = self.moe.combine
        rule = f"is not available with table blocks, whose tables know no shard groups: layers={text!r}"
        require(not (fixed and combine == "share"), "moe.combine", combine, rule, "nearest valid: 'score'")
        if fixed and not self.routed_counts:
            names = ("choice", "selection_bias", "shard_groups", *(("router",) if self.moe.combine == "one" else ()))
            for name in names:
                value, default = getattr(self.moe, name), getattr(usual, name)
                require(value == default, f"moe.{name}", value, f"has no effect: tables choose in layers={text!r}",
                        f"nearest valid: {default!r}")  # fmt: skip
        if layers_lib.is_plain(units, experts):
            first = 0 if units[0][1][0].experts else units[0][0]
            rule = f"is the order that num_layers={blocks} and num_dense_layers={first} say without it"
            raise ConfigError("layers", text, rule, f"nearest valid: num_dense_layers={first} without it")
        # Of several spellings of an order the field keeps one, so that a run is resumed with any of them.
        object.__setattr__(self, "layers", layers_lib.spell(units, experts))

    def _check_residual(self):
        """Refuses what late blocks have no place for, and a memory that no block has."""
        kinds = {kind.name for stack in self.stacks for kind in stack.unit}
        rule = f"is not available with late blocks, whose experts are added later: layers={self.layers!r}"
        branches = (
            ("norm", self.norm, "pre"), ("residual_scale", self.residual_scale, False),
            ("residual_multiplier", self.residual_multiplier, 1.0),
        )  # fmt: skip
        for name, value, plain in branches:
            require(value == plain or "late" not in kinds, name, value, rule, f"nearest valid: {plain!r}")
        named = "norm='post'" if self.norm == "post" else "moe.latent_norm=True"
        zeros = self.norm == "post" or (self.num_moe_layers > 0 and self.moe.latent_norm)
        require(not zeros or self.norm_eps > 0, "norm_eps", self.norm_eps,
                f"must be > 0 with {named}, which norms zeros where a token has no expert",
                f"nearest valid: {ModelConfig.norm_eps}")  # fmt: skip
        for f in dataclasses.fields(self.memory):
            value = getattr(self.memory, f.name)
            require("memory" in kinds or value == f.default, f"memory.{f.name}", value,
                    "has no effect without a memory block in layers", f"nearest valid: {f.default}")  # fmt: skip

    def _check_positions(self):
        size, head, scaling, text = self.rope_dim, self.head_dim, self.rope_scaling, self.attention_layers
        hint = f"nearest valid: {min(size + size % 2, head)}"
        require(size <= head, "rope_dim", size, f"must be ≤ head_dim={head}", hint)
        require(size % 2 == 0, "rope_dim", size, "must be even (RoPE rotates pairs)", hint)
        require(not (size and self.mla.kv_rank), "rope_dim", size,
                "has no effect with mla.kv_rank > 0, which has mla.rope_dim", "nearest valid: 0")  # fmt: skip
        for name in ("short_factor", "long_factor"):
            value, pairs = getattr(scaling, name), self.rope_size // 2
            rule = f"must have a number for each of the {pairs} pairs that RoPE rotates"
            require(len(value) in (0, pairs), f"rope_scaling.{name}", value, rule, f"nearest valid: {pairs} numbers")
        require(self.mla.kv_rank or not scaling.mscale_all_dim, "rope_scaling.mscale_all_dim", scaling.mscale_all_dim,
                "needs mla.kv_rank > 0", "nearest valid: 0.0")  # fmt: skip
        listed = self.attends if self.attention_layers else self._attention_list
        windows = {attends.window for attends in listed}
        yarn = scaling.on and scaling.type == "yarn"
        require(self.rope_theta > 1 or not yarn, "rope_theta", self.rope_theta,
                "must be > 1 with rope_scaling.type='yarn'", "nearest valid: a number > 1")  # fmt: skip
        require(self.window or True not in windows, "window", 0,
                f"must be > 0 for the windows of attention_layers={text!r}", "nearest valid: 1")  # fmt: skip
        require(not self.window or True in windows, "window", self.window,
                f"has no effect: no layer of attention_layers={text!r} has one", "nearest valid: 0")  # fmt: skip
        require(scaling.layers == "all" or len(windows) == 2, "rope_scaling.layers", scaling.layers,
                "needs layers with a window and layers without, in attention_layers",
                "nearest valid: 'all'")  # fmt: skip
        nope = not all(attends.rope for attends in listed)
        require(not (nope and self.mla.kv_rank), "attention_layers", text,
                "':nope' is not available with mla.kv_rank > 0", "nearest valid: ''")  # fmt: skip
        late = any(kind.name == "late" for _, unit in self.units for kind in unit)
        require(not late or len(set(listed)) == 1, "attention_layers", text,
                f"must have one word with late blocks, whose units it would cut: layers={self.layers!r}",
                "nearest valid: ''")  # fmt: skip
        # Of several spellings of a list the field keeps one, so that a run is resumed with any of them.
        plain = len(set(listed)) == 1 and listed[0] == Attends(window=self.window > 0)
        object.__setattr__(self, "attention_layers", "" if plain else write_layers(listed))

    def _check_mla(self):
        rope, hint = self.mla.rope_dim, f"nearest valid: {self.mla.rope_dim + 2}"
        require(self.head_dim > rope, "head_dim", self.head_dim, f"must be > mla.rope_dim={rope}", hint)
        n, m = self.num_heads, self.num_kv_heads
        require(m == n, "num_kv_heads", m, f"must be num_heads={n} with mla.kv_rank > 0", f"nearest valid: {n}")
        require(not self.qk_norm, "qk_norm", True, "is not available with mla.kv_rank > 0, which norms its latents",
                "nearest valid: False")  # fmt: skip
        require(not self.qkv_bias, "qkv_bias", True, "is not available with mla.kv_rank > 0", "nearest valid: False")
