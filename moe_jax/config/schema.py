"""The fields of a configuration: one frozen dataclass per component, with ranges and rules.

model.py has the model, data.py the data, explore.py what moves in the router during training.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config.balance import check_bias_update
from moe_jax.config.data import GAP_TOKENS, DataConfig
from moe_jax.config.distill import DistillConfig
from moe_jax.config.explore import ExploreConfig, check_routing
from moe_jax.config.fields import FIXED, MAY_CHANGE, Checked, nearest_divisor, newer, number, renamed, require
from moe_jax.config.labels import check_run
from moe_jax.config.mixture import MixtureConfig, check_mixture
from moe_jax.config.model import ModelConfig
from moe_jax.config.pools import check_pools_of_run
from moe_jax.errors import ConfigError

MTP_FIELDS = ("mtp_coef", "mtp_stop", "mtp_late_coef")  # of the loss
Scope = int | Literal["global"]  # sequences that are balanced together; "global": the whole optimizer batch


@dataclass(frozen=True)
class RouterLossConfig(Checked, resume=FIXED):
    """A further loss of the routers with its own weight, scope and steps. The config file chooses its name.

    The loss is logged as `<kind>/<name>`.
    """

    # "load_balance", "router_z", "mutual_information", "label_information", or another name in the table of
    # moe_jax/moe/router_losses.py.
    kind: str = "load_balance"
    coef: float = number(0.0, 0.0)  # weight of this loss
    # Sequences over which the statistics are taken: 1, any divisor of the batch, or "global" (the optimizer batch).
    balance_batch: Scope = "global"
    start_step: int = number(0, 0)  # the last step without this loss; steps count from 1, as in metrics.jsonl
    stop_step: int = number(0, 0)  # the last step with this loss; 0: the run's last step
    # With kind="load_balance": number of equal groups of experts, such as those of one device, that are balanced
    # instead of experts; it divides the experts of every layer. 0: each expert is balanced by itself.
    over: int = number(0, 0)

    def check(self):
        _check_scope(self.balance_batch)
        _check_steps(self.start_step, self.stop_step, "stop_step")


@dataclass(frozen=True)
class LossConfig(Checked, resume=FIXED):
    """Router losses. docs/balancing.md defines them and converts other frameworks' coefficients."""

    load_balance_coef: float = number(0.01, 0.0)  # weight of the load-balancing loss; 0: off
    # Sequences over which expert frequencies are computed: 1, any divisor of the batch, or "global" (the optimizer
    # batch).
    balance_batch: Scope = "global"
    # The last step with this loss, to switch the scope during a run; 0: the run's last step.
    load_balance_stop: int = number(0, 0)
    # A config file makes entries, with `router_loss` of moe_jax.config:
    # `config.loss.more = {"micro": router_loss(kind="load_balance", coef=0.01, balance_batch=1)}`.
    more: dict[str, RouterLossConfig] = field(default_factory=dict, metadata=renamed("more_load_balance"))
    # Ablation (arXiv:2501.11873, §5): tokens are assigned at random to groups as large as balance_batch sequences.
    shuffle_tokens: bool = False
    # "exact": any number of micro-batches gives the loss of the optimizer batch. "running": a micro-batch sees the
    # expert counts so far (arXiv:2501.11873, algorithm 1), an approximation that saves a forward pass. Where no
    # loss needs the counts of other micro-batches, as with balance_batch=1, both are the same.
    accumulation: Literal["exact", "running"] = "exact"
    router_z_coef: float = number(0.001, 0.0)  # weight of the router z-loss; 0: off
    # Whether router losses, load-balancing and z, are averaged or added up over MoE layers, those of multi-token
    # prediction apart.
    router_loss_layers: Literal["mean", "sum"] = "mean"
    # Weight of multi-token prediction, of the mean over the layers of model.mtp_layers and of the losses of their own
    # routers. 0: the decoder trains as without the layers. DeepSeek-V3: 0.3, then 0.1.
    mtp_coef: float = number(0.3, 0.0)
    mtp_stop: int = number(0, 0)  # the last step with mtp_coef; 0: the run's last step
    mtp_late_coef: float = number(0.0, 0.0)  # weight after mtp_stop; 0: off
    # Update of the bias of model.moe.selection_bias after a step: bias + rate · direction. The direction is the sign of
    # target load − load ("sign"), the same minus its mean ("centred", Moonlight), target share − share
    # ("proportional", LongCat-Flash), or AdamW's of that ("adamw", ZAYA1). "quantile" has no rate: it solves for the
    # bias (docs/balancing.md).
    bias_update: Literal["sign", "centred", "proportional", "adamw", "quantile"] = "sign"
    bias_update_rate: float = number(0.001, 0.0)  # rate in the update of the selection bias; not for "quantile"
    bias_target: tuple[float, ...] = ()  # relative target load of each expert, for the selection bias; (): equal loads

    def check(self):
        _check_scope(self.balance_batch)
        for name in self.more:
            require(name.isidentifier(), "more", name, "names must be words of letters, digits and _",
                    "nearest valid: 'micro'")  # fmt: skip
        require(min(self.bias_target, default=1.0) >= 0 and sum(self.bias_target or (1.0,)) > 0, "bias_target",
                self.bias_target, "must be ≥ 0 and not all 0", "nearest valid: ()")  # fmt: skip

    @property
    def router_losses(self) -> dict[str, RouterLossConfig]:
        """A dict of all losses of the routers by the name under which they are logged."""
        main = RouterLossConfig("load_balance", self.load_balance_coef, self.balance_batch, 0, self.load_balance_stop)
        z = RouterLossConfig("router_z", self.router_z_coef)
        return {"load_balance": main, "router_z": z} | {f"{m.kind}/{name}": m for name, m in self.more.items()}

    @property
    def load_balance_coefs(self) -> dict[str, float]:
        """The weight of each load-balancing loss by the name of its field."""
        more = {f"loss.more.{name}.coef": m.coef for name, m in self.more.items() if m.kind == "load_balance"}
        return {"loss.load_balance_coef": self.load_balance_coef} | more

    @property
    def balance_unit(self) -> int:
        """Sequences of the finest balance group, of which every loss' groups consist; 0: the optimizer batch."""
        return math.gcd(*(b.balance_batch for b in self.router_losses.values() if b.balance_batch != "global"))


def _check_scope(scope: int | str) -> None:
    rule = "must be ≥ 1 or 'global'"
    require(scope == "global" or scope >= 1, "balance_batch", scope, rule, "nearest valid: 1")


def _check_steps(start: int, stop: int, name: str) -> None:
    rule = f"must be > start_step={start}, or 0 for never"
    require(stop == 0 or stop > start, name, stop, rule, f"nearest valid: {start + 1}")


@dataclass(frozen=True)
class GroupConfig(Checked, resume=FIXED):
    """A group of parameters that are trained otherwise, or not at all (docs/finetuning.md). The config file chooses its
    name.

    Where groups overlap their factors are multiplied, one that freezes is enough, and the latest start counts.
    """

    # Regular expression that is searched in the paths of the parameters, such as "^embed$" or "/moe/w_(gate|up|down)$".
    # A group without a parameter is refused.
    match: str = ""
    lr: float = number(1.0, 0.0)  # factor of the learning rate
    weight_decay: float = number(1.0, 0.0)  # factor of the weight decay; 0: these parameters do not decay
    # These parameters stay as they are, without gradients and moments. A frozen router keeps its selection bias too.
    freeze: bool = False
    # Updates of the optimizer before these parameters move. Until then they stay as they are, but gradients, moments
    # and selection biases are those of a run that trains them.
    start: int = number(0, 0)

    def check(self):
        hint = "nearest valid: '^embed$'"
        require(bool(self.match), "match", self.match, "must be a regular expression over paths of parameters", hint)
        try:
            re.compile(self.match)
        except re.error as e:
            hint = f"nearest valid: {re.escape(self.match)!r}"
            raise ConfigError("match", self.match, f"is not a regular expression: {e}", hint) from None
        for name in ("lr", "weight_decay", "start"):
            value, plain = getattr(self, name), getattr(GroupConfig, name)
            rule = "has no effect with freeze=True"
            require(value == plain or not self.freeze, name, value, rule, f"nearest valid: {plain}")


@dataclass(frozen=True)
class OptimConfig(Checked, resume=FIXED):
    """The optimizer and its learning rate. docs/muon.md has Muon's formulas."""

    # "muon" updates weight matrices with Muon, and embedding, output matrix and norms with AdamW.
    name: Literal["muon", "adamw"] = "muon"
    lr: float = number(1e-3, 0.0)  # highest learning rate, of both Muon and AdamW
    # Learning rate after the warm-up. It decreases along a cosine or a line, is constant and then decreases linearly
    # ("wsd"), or stays constant.
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = number(0, 0)  # steps in which the learning rate rises to lr; fewer than train.steps
    decay_fraction: float = number(0.2, 0.0, 1.0)  # share of the steps after the warm-up in which "wsd" decreases
    final_lr_fraction: float = number(0.1, 0.0, 1.0)  # learning rate of the last step / lr; not for "constant"
    # Decoupled weight decay, multiplied by the learning rate. Every parameter decays, norms included, but for what
    # `groups` says.
    weight_decay: float = number(0.1, 0.0)
    clip_norm: float = number(1.0, 0.0)  # a gradient with a larger global norm is scaled down to this norm; 0: off
    beta1: float = number(0.9, 0.0, 1.0)  # AdamW's decay of the first moment
    beta2: float = number(0.95, 0.0, 1.0)  # AdamW's decay of the second moment
    eps: float = number(1e-8, 0.0)  # AdamW's epsilon
    momentum: float = number(0.95, 0.0, 1.0)  # Muon's momentum μ
    nesterov: bool = True  # Muon orthogonalises G + μ·M; False: M
    # Polynomials of Muon's Newton–Schulz iteration. "deepseek_v4" has 10 steps, "jordan" any number of steps of one
    # polynomial, and the others 5 steps.
    coefficients: Literal["jordan", "you", "polar_express", "cans", "deepseek_v4"] = "jordan"
    newton_schulz_steps: int = number(5, 1, 20)  # steps of the iteration; `coefficients` decides which are valid
    # Dtype of the iteration. "auto" is float16 on GPUs, bfloat16 on TPUs and float32 on CPUs, also where a run is
    # resumed on another kind of device.
    newton_schulz_dtype: Literal["auto", "float16", "bfloat16", "float32"] = newer("auto", was="bfloat16")
    # Scale of Muon's update: "match_rms" multiplies it by update_rms · √max(in, out), "spectral" by √max(1, out/in).
    scale: Literal["match_rms", "spectral"] = "match_rms"
    update_rms: float = number(0.2, 0.0)  # RMS of Muon's update before the learning rate, with scale="match_rms"
    per_head: bool = False  # orthogonalise each head of w_q, w_k, w_v and w_o as a separate matrix
    # Muon decays only those entries of a matrix that the update shrinks too (arXiv:2510.12402).
    cautious_decay: bool = False
    router: Literal["muon", "adamw"] = "muon"  # optimizer of the router, when name="muon"
    # Largest attention logit of a head (Kimi K2: 100). A head above it has w_q and w_k scaled down after the step;
    # 0: off. Not with model.qk_norm.
    qk_clip: float = number(0.0, 0.0)
    # Decay of an exponential moving average of the weights, which is evaluated and saved beside them; 0: off
    # (docs/finetuning.md).
    ema: float = number(0.0, 0.0, 1.0)
    # A config file makes entries, with `parameter_group` of moe_jax.config:
    # `config.optim.groups = {"embedding": parameter_group(match="^embed$", weight_decay=0.0)}`.
    groups: dict[str, GroupConfig] = field(default_factory=dict)

    def check(self):
        for name in self.groups:
            require(name.isidentifier(), "groups", name, "names must be words of letters, digits and _",
                    "nearest valid: 'embedding'")  # fmt: skip
        require(self.ema < 1, "ema", self.ema, "must be < 1: an average with it would never move",
                "nearest valid: 0.999")  # fmt: skip
        need = {"jordan": self.newton_schulz_steps, "deepseek_v4": 10}.get(self.coefficients, 5)
        rule = f"must be {need} with coefficients={self.coefficients!r}"
        steps = self.newton_schulz_steps
        require(steps == need, "newton_schulz_steps", steps, rule, f"nearest valid: {need}")


@dataclass(frozen=True)
class MeshConfig(Checked, resume=MAY_CHANGE):
    """Sizes of the mesh axes (docs/scaling.md). One of them may be −1, which takes all remaining devices."""

    data: int = number(-1, -1)  # number of copies of the parameters, each of which computes its own sequences
    fsdp: int = number(1, -1)  # number of devices that share parameters, gradients and optimizer states
    expert: int = number(1, -1)  # number of devices that share the experts; divides each layer's

    def check(self):
        for name in ("data", "fsdp", "expert"):
            require(getattr(self, name) != 0, name, 0, "must be ≥ 1, or −1 for the remaining devices",
                    "nearest valid: 1")  # fmt: skip
        sizes = (self.data, self.fsdp, self.expert)
        require(sizes.count(-1) <= 1, "data", self.data, f"only one of data, fsdp, expert={sizes} may be −1", "use 1")


@dataclass(frozen=True)
class TrainConfig(Checked, resume=MAY_CHANGE):
    """Length of a run, its logs and checkpoints, and the treatment of bad steps (docs/survival.md)."""

    # Optimizer steps of the run. If you change it on resume, the schedule of the learning rate follows.
    steps: int = number(1000, 1)
    # Parts in which the batch is computed, to save memory; divides data.batch_size. The objective stays the same
    # (docs/exact.md).
    micro_batches: int = number(1, 1)
    log_every: int = number(10, 1)  # steps from one row of metrics to the next
    eval_every: int = number(0, 0)  # steps from one held-out evaluation to the next; 0: only at the end
    eval_batches: int = number(0, 0)  # held-out batches of an evaluation; 0: the whole held-out split
    checkpoint_every: int = number(200, 1)  # steps from one checkpoint to the next
    keep_checkpoints: int = number(2, 1)  # number of newest checkpoints that are kept
    keep_every: int = number(0, 0)  # checkpoints of steps that this number divides are kept too; 0: none
    # Number of checkpoints with the lowest held-out loss that are kept too. It needs an eval_every that divides
    # checkpoint_every.
    keep_best: int = number(0, 0)
    skip_nonfinite: bool = True  # a step whose loss or gradient is not finite changes nothing
    # Also skip a step whose loss or gradient norm is this many median deviations above the median; 0: off.
    spike: float = number(0.0, 0.0)
    spike_window: int = number(128, 8)  # good steps that the median of `spike` is taken over
    max_skipped: int = number(10, 1)  # skipped steps in a row that stop the run
    tensorboard: bool = True  # write TensorBoard events
    wandb_project: str = ""  # project in Weights & Biases; "": off

    def check(self):
        require(self.skip_nonfinite or not self.spike, "spike", self.spike, "needs skip_nonfinite=True",
                "nearest valid: 0.0")  # fmt: skip
        scored = self.eval_every > 0 and self.checkpoint_every % self.eval_every == 0
        rule = f"needs an eval_every that divides checkpoint_every={self.checkpoint_every}, to know which is the best"
        require(scored or not self.keep_best, "keep_best", self.keep_best, rule, "nearest valid: 0")


@dataclass(frozen=True)
class SampleConfig(Checked, resume=MAY_CHANGE):
    """The text written at the end of a run."""

    # How the text begins; "": with the first words, or the prompt, of a document that is held out.
    prompt: str = newer("", was="def ")
    tokens: int = number(120, 0)  # tokens that are drawn after it
    temperature: float = number(0.8, 0.0)  # divisor of the logits; 0: always the most probable token
    top_p: float = number(0.95, 0.0, 1.0)  # draw from the most probable tokens that together reach this probability
    label: int = number(-1, -1)  # label of the text, for a model that needs it (data.labels); −1: none


@dataclass(frozen=True)
class RunConfig(Checked, resume=FIXED):
    """A run: these two fields, and the groups below."""

    seed: int = number(0, 0, 2**31 - 1)  # decides fresh weights, the order of the data and the sample
    init_from: str = ""  # a run directory whose weights a new run starts from; "": fresh weights
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    explore: ExploreConfig = field(default_factory=ExploreConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def check(self):
        b, a = self.data.batch_size, self.train.micro_batches
        require(b % a == 0, "train.micro_batches", a, f"must divide data.batch_size={b}",
                 f"nearest valid: {nearest_divisor(b, a)}")  # fmt: skip
        self._check_loss(b)
        check_routing(self)
        check_mixture(self)
        check_pools_of_run(self)
        check_run(self)
        t = self.data.tokenizer
        gaps = GAP_TOKENS * bool(self.data.with_gaps)
        need = {"bytes": 257, "bpe": t.vocab_size}.get(t.kind, 0)
        need, more = need + gaps, f" and {gaps} of gaps (data.sources.*.denoise)" if gaps else ""
        require(self.model.vocab_size >= need, "model.vocab_size", self.model.vocab_size,
                 f"must hold the tokenizer's {need - gaps} tokens{more}", f"nearest valid: {need}")  # fmt: skip
        require(self.optim.warmup_steps < self.train.steps, "optim.warmup_steps", self.optim.warmup_steps,
                 f"must be < train.steps={self.train.steps}", f"nearest valid: {self.train.steps - 1}")  # fmt: skip
        for name, group in self.optim.groups.items():
            require(group.start < self.train.steps, f"optim.groups.{name}.start", group.start,
                    f"must be < train.steps={self.train.steps}; freeze=True trains them never",
                    f"nearest valid: {self.train.steps - 1}")  # fmt: skip
        require(not (self.optim.qk_clip and self.model.qk_norm), "optim.qk_clip", self.optim.qk_clip,
                 "has no effect with model.qk_norm=True, which undoes any scale of w_q and w_k and bounds the logits",
                 "nearest valid: 0.0")  # fmt: skip
        require(not (self.optim.per_head and self.model.mla.kv_rank), "optim.per_head", True,
                "is not available with model.mla.kv_rank > 0, whose heads have several sizes",
                "nearest valid: False")  # fmt: skip
        for name in (name for name, source in self.data.sources.items() if source.has_roles):
            require(self.model.segment_mask, "model.segment_mask", False, f"must be True with data.sources.{name}, "
                    "whose documents have prompts and must not see one another", "nearest valid: True")  # fmt: skip
        if self.model.lora.rank:
            self._check_lora()
        longest = self.model.max_seq_len
        require(self.data.seq_len <= (longest or self.data.seq_len), "data.seq_len", self.data.seq_len,
                f"must be ≤ model.max_seq_len={longest}", f"nearest valid: {longest}")  # fmt: skip

    def _check_lora(self) -> None:
        rule = "must name the run directory of the base for model.lora.rank > 0"
        require(bool(self.init_from), "init_from", "", rule, "import or train one first")
        clip = self.optim.qk_clip
        require(not clip, "optim.qk_clip", clip, "scales w_q and w_k, which model.lora.rank > 0 does not train",
                "nearest valid: 0.0")  # fmt: skip

    @property
    def trained(self) -> ModelConfig:
        """The model as it is trained: with `explore.top_k` experts a token."""
        if not self.explore.top_k:
            return self.model
        return dataclasses.replace(self.model, moe=dataclasses.replace(self.model.moe, top_k=self.explore.top_k))

    @property
    def without_mtp(self) -> "RunConfig":
        """The run of the model without layers of multi-token prediction."""
        off = {name: getattr(LossConfig, name) for name in MTP_FIELDS}
        return dataclasses.replace(self, model=self.model.without_mtp, loss=dataclasses.replace(self.loss, **off))

    def _check_loss(self, b: int) -> None:
        more = self.loss.more.items()
        scopes = {"": self.loss.balance_batch} | {f"more.{n}.": m.balance_batch for n, m in more}
        for prefix, g in scopes.items():
            nearest = nearest_divisor(b, g) if g != "global" else g
            rule = f"must divide data.batch_size={b} or be 'global'"
            name = f"loss.{prefix}balance_batch"
            require(g == "global" or b % g == 0, name, g, rule, f"nearest valid: {nearest}")
        self._check_mtp()
        counts = self.model.expert_counts
        for name, m in more:
            alone = m.over == 1 and not self.model.moe.identity_experts
            require(
                not alone, f"loss.more.{name}.over", 1, "is one group, which is always balanced", "nearest valid: 0"
            )
            fits = not m.over or all(count % m.over == 0 for count in counts)
            require(fits, f"loss.more.{name}.over", m.over, f"must divide the layers' numbers of experts, {counts}",
                    f"nearest valid: {nearest_divisor(math.gcd(*counts) or 1, m.over)}")  # fmt: skip
        e, target = self.model.moe.num_experts, self.loss.bias_target
        rule = f"needs layers with one number of experts, not {self.model.expert_counts}"
        require(not target or len(self.model.expert_counts) <= 1, "loss.bias_target", target, rule, "nearest valid: ()")
        require(not target or self.model.moe.selection_bias, "loss.bias_target", target,
                 "needs model.moe.selection_bias=True", "nearest valid: ()")  # fmt: skip
        identity = self.model.moe.identity_experts
        require(not (target and identity), "loss.bias_target", target, "is not available with identity_experts",
                "nearest valid: ()")  # fmt: skip
        rule = f"must have model.moe.num_experts={e} numbers, or none"
        require(len(target) in (0, e), "loss.bias_target", target, rule, "nearest valid: ()")
        check_bias_update(self.loss, self.model)

    def _check_mtp(self) -> None:
        loss, layers, s = self.loss, self.model.mtp_layers, self.data.seq_len
        for name in MTP_FIELDS:
            value, default = getattr(loss, name), getattr(LossConfig, name)
            require(layers or value == default, f"loss.{name}", value, "has no effect with model.mtp_layers=0",
                    f"nearest valid: {default}")  # fmt: skip
        rule = "has no effect with mtp_stop=0"
        require(loss.mtp_stop or not loss.mtp_late_coef, "loss.mtp_late_coef", loss.mtp_late_coef, rule,
                "nearest valid: 0.0")  # fmt: skip
        rule = f"must be < data.seq_len={s}: a row of {s} tokens has no token so far ahead"
        require(layers < s, "model.mtp_layers", layers, rule, f"nearest valid: {s - 1}")

    @property
    def balance_unit(self) -> int:
        """Sequences of the finest balance group."""
        return self.loss.balance_unit or self.data.batch_size

    @property
    def balance_groups(self) -> int:
        """G: number of the finest balance groups in an optimizer batch."""
        return self.data.batch_size // self.balance_unit
