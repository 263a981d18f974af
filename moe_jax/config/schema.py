"""The schema: one frozen dataclass per component, with its ranges and rules; the model's are in model.py."""

import math
from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config.fields import FIXED, MAY_CHANGE, Checked, changeable, nearest_divisor, newer, number, require
from moe_jax.config.model import ModelConfig

Scope = int | Literal["global"]  # sequences that are balanced together; "global": the whole optimizer batch


@dataclass(frozen=True)
class LoadBalanceConfig(Checked, resume=FIXED):
    """One load-balancing loss: its weight, its scope, and the steps at which it is on, those after `start_step`."""

    coef: float = number(0.0, 0.0)
    balance_batch: Scope = "global"
    start_step: int = number(0, 0)
    stop_step: int = number(0, 0)  # the last step with it, as `metrics.jsonl` counts them, from 1; 0: the run's last

    def check(self):
        _check_scope(self.balance_batch)
        _check_steps(self.start_step, self.stop_step, "stop_step")


@dataclass(frozen=True)
class LossConfig(Checked, resume=FIXED):
    """Router losses. docs/balancing.md has the definitions and what other frameworks' coefficients are here."""

    load_balance_coef: float = number(0.01, 0.0)
    # Sequences over which expert frequencies are taken: 1, any divisor of the batch, or "global" (the optimizer batch).
    balance_batch: Scope = "global"
    load_balance_stop: int = number(0, 0)  # the last step with this loss (to switch the scope); 0: the run's last
    # More load-balancing losses, each with its own coefficient, scope and steps, logged as load_balance/<name>.
    more_load_balance: dict[str, LoadBalanceConfig] = field(default_factory=dict)
    # Ablation (arXiv:2501.11873, §5): tokens are dealt at random to groups as large as balance_batch sequences.
    shuffle_tokens: bool = False
    # "running": micro-batches see the expert counts so far (arXiv:2501.11873, algorithm 1). An approximation.
    accumulation: Literal["exact", "running"] = "exact"
    router_z_coef: float = number(0.001, 0.0)
    router_loss_layers: Literal["mean", "sum"] = "mean"  # over MoE layers, of both kinds of router loss
    # model.moe.selection_bias: b += rate · sign(target − load); "centred" subtracts the mean of the signs (Moonlight).
    bias_update: Literal["sign", "centred"] = "sign"
    bias_update_rate: float = number(0.001, 0.0)
    bias_target: tuple[float, ...] = ()  # relative target load of each expert; (): all alike

    def check(self):
        _check_scope(self.balance_batch)
        for name in self.more_load_balance:
            require(name.isidentifier(), "more_load_balance", name, "names must be words of letters, digits and _",
                    "nearest valid: 'micro'")  # fmt: skip
        require(min(self.bias_target, default=1.0) >= 0 and sum(self.bias_target or (1.0,)) > 0, "bias_target",
                self.bias_target, "must be ≥ 0 and not all 0", "nearest valid: ()")  # fmt: skip

    @property
    def load_balance(self) -> dict[str, LoadBalanceConfig]:
        """All load-balancing losses by the name they are logged under."""
        main = LoadBalanceConfig(self.load_balance_coef, self.balance_batch, 0, self.load_balance_stop)
        return {"load_balance": main} | {f"load_balance/{name}": more for name, more in self.more_load_balance.items()}

    @property
    def balance_unit(self) -> int:
        """Sequences of the finest balance group, of which every loss' groups are made up; 0: the optimizer batch."""
        return math.gcd(*(b.balance_batch for b in self.load_balance.values() if b.balance_batch != "global"))


def _check_scope(scope: int | str) -> None:
    rule = "must be ≥ 1 or 'global'"
    require(scope == "global" or scope >= 1, "balance_batch", scope, rule, "nearest valid: 1")


def _check_steps(start: int, stop: int, name: str) -> None:
    rule = f"must be > start_step={start}, or 0 for never"
    require(stop == 0 or stop > start, name, stop, rule, f"nearest valid: {start + 1}")


@dataclass(frozen=True)
class OptimConfig(Checked, resume=FIXED):
    name: Literal["muon", "adamw"] = "muon"
    lr: float = number(1e-3, 0.0)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = number(0, 0)
    decay_fraction: float = number(0.2, 0.0, 1.0)  # wsd: the share of steps spent decaying
    final_lr_fraction: float = number(0.1, 0.0, 1.0)
    weight_decay: float = number(0.1, 0.0)
    clip_norm: float = number(1.0, 0.0)  # global gradient norm; 0 switches clipping off
    beta1: float = number(0.9, 0.0, 1.0)  # AdamW
    beta2: float = number(0.95, 0.0, 1.0)
    eps: float = number(1e-8, 0.0)
    momentum: float = number(0.95, 0.0, 1.0)  # Muon
    nesterov: bool = True
    # Polynomials of Newton–Schulz, with 5 steps but for deepseek_v4's 10; jordan's may be repeated any number of times.
    coefficients: Literal["jordan", "you", "polar_express", "cans", "deepseek_v4"] = "jordan"
    newton_schulz_steps: int = number(5, 1, 20)
    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    scale: Literal["match_rms", "spectral"] = "match_rms"  # update_rms · √max(in, out), or √max(1, out/in)
    update_rms: float = number(0.2, 0.0)
    per_head: bool = False  # each head of w_q, w_k, w_v and w_o is a matrix of its own
    cautious_decay: bool = False  # Muon's matrices decay only where the update shrinks them too (arXiv:2510.12402)
    router: Literal["muon", "adamw"] = "muon"  # who updates the router; Moonlight's released code: Muon
    qk_clip: float = number(0.0, 0.0)  # attention logits above it shrink w_q and w_k (Kimi K2: 100); 0 is off

    def check(self):
        need = {"jordan": self.newton_schulz_steps, "deepseek_v4": 10}.get(self.coefficients, 5)
        rule = f"must be {need} with coefficients={self.coefficients!r}"
        steps = self.newton_schulz_steps
        require(steps == need, "newton_schulz_steps", steps, rule, f"nearest valid: {need}")


@dataclass(frozen=True)
class SourceConfig(Checked, resume=FIXED):
    """One named source of documents."""

    kind: Literal["tfds", "files"] = "tfds"
    name: str = ""  # tfds: "stdlib_text", or any TFDS name such as "c4/en:3.0.1"
    data_dir: str = ""  # tfds: where it is prepared; "" is <data.cache_dir>/tfds
    path: str = ""  # files: a path or glob of .txt .jsonl .parquet .csv, also with .gz
    # What is one document of a .txt. "auto": of a source of fewer than 20 text files, about a hundredth of it, cut at
    # blank lines; else "file". "file": the whole, but of a large one pieces of 20,000 characters. "blank_lines": what
    # stands between them. "separator": what stands between `separator`. A number: about so many characters.
    documents: int | Literal["auto", "file", "blank_lines", "separator"] = newer("auto", was="file")
    separator: str = ""
    text_field: str = "text"
    domain: str = ""  # a constant label; "" takes domain_field, else the source's name
    domain_field: str = ""
    split: str = "train"
    validation_split: str = "validation"
    validation_fraction: float = number(0.05, 0.0, 0.9)  # files: by a hash of the document, so the split is stable
    weight: float = number(1.0, 0.0)

    def check(self):
        require(self.kind != "tfds" or self.name, "name", self.name, "is needed for kind='tfds'", "try 'stdlib_text'")
        require(self.kind != "files" or self.path, "path", self.path, "is needed for kind='files'", "a file or a glob")
        how, cuts = self.documents, self.documents == "separator"
        require(isinstance(how, str) or how >= 1, "documents", how, "must be ≥ 1 or a word", "nearest valid: 1")
        require(self.kind == "files" or how in ("auto", "file"), "documents", how, "is about .txt files",
                "nearest valid: 'auto'")  # fmt: skip
        rule = "is needed for documents='separator'" if cuts else "has no effect without documents='separator'"
        require(bool(self.separator) == cuts, "separator", self.separator, rule, "for example '<|endoftext|>'")


@dataclass(frozen=True)
class TokenizerConfig(Checked, resume=FIXED):
    kind: Literal["bytes", "bpe", "huggingface", "sentencepiece"] = "bytes"
    vocab_size: int = number(4096, 257)  # bpe: trained on the corpus and kept in the run directory
    train_bytes: int = number(10_000_000, 1)  # bpe: at most this much text is used for training it
    path: str = ""  # huggingface: a tokenizer.json; sentencepiece: a .model file
    end_of_text: str = ""  # the token between documents; "" looks for the usual names
    # The token that every document begins with: "auto" is what the tokenizer's own files say, "none" is end_of_text
    # alone, between documents; else a token's name.
    begin_of_text: str = newer("auto", was="none")

    def check(self):
        need = self.kind in ("huggingface", "sentencepiece")
        require(bool(self.path) or not need, "path", self.path, f"is needed for kind={self.kind!r}", "a tokenizer file")
        rule = "must be 'auto', 'none' or a token" if need else f"must be 'auto' or 'none' for kind={self.kind!r}"
        ok = bool(self.begin_of_text) if need else self.begin_of_text in ("auto", "none")
        require(ok, "begin_of_text", self.begin_of_text, rule, "nearest valid: 'auto'")


def _default_sources():
    return {"stdlib": SourceConfig(kind="tfds", name="stdlib_text", domain_field="domain")}


@dataclass(frozen=True)
class DataConfig(Checked, resume=FIXED):
    batch_size: int = number(16, 1)  # sequences of one optimizer step, over all devices and micro-batches
    seq_len: int = number(256, 2)
    sources: dict[str, SourceConfig] = field(default_factory=_default_sources)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    num_workers: int = changeable(number(0, 0, 256))  # reader processes; 0 reads in threads of this process
    cache_dir: str = changeable("")  # "" is $MOE_JAX_CACHE or ~/.cache/moe_jax

    def check(self):
        require(bool(self.sources), "sources", {}, "must name at least one source", "see config.SourceConfig")
        require("" not in self.sources, "sources", "", "must have names that are not empty", "nearest valid: 'text'")
        total = sum(s.weight for s in self.sources.values())
        require(total > 0, "sources", {k: s.weight for k, s in self.sources.items()}, "weights must not all be 0")


@dataclass(frozen=True)
class MeshConfig(Checked, resume=MAY_CHANGE):
    """Sizes of the mesh axes; −1, at most once, takes the devices that are left."""

    data: int = number(-1, -1)
    fsdp: int = number(1, -1)
    expert: int = number(1, -1)

    def check(self):
        for name in ("data", "fsdp", "expert"):
            require(getattr(self, name) != 0, name, 0, "must be ≥ 1, or −1 for the devices that are left",
                    "nearest valid: 1")  # fmt: skip
        sizes = (self.data, self.fsdp, self.expert)
        require(sizes.count(-1) <= 1, "data", self.data, f"only one of data, fsdp, expert={sizes} may be −1", "use 1")


@dataclass(frozen=True)
class TrainConfig(Checked, resume=MAY_CHANGE):
    steps: int = number(1000, 1)
    micro_batches: int = number(1, 1)  # the batch is computed in this many parts; never changes the objective
    log_every: int = number(10, 1)
    eval_every: int = number(0, 0)  # 0: only at the end
    eval_batches: int = number(0, 0)  # 0: the whole held-out split
    checkpoint_every: int = number(200, 1)
    keep_checkpoints: int = number(2, 1)  # the newest so many stay, and …
    keep_every: int = number(0, 0)  # … those of steps that it divides; 0: none …
    keep_best: int = number(0, 0)  # … and so many with the lowest held-out loss
    skip_nonfinite: bool = True  # a step whose loss or gradient is not finite changes nothing (moe_jax/train/guard.py)
    spike: float = number(0.0, 0.0)  # nor one so many median deviations above the median; 0 is off
    spike_window: int = number(128, 8)  # … of so many good steps before it
    max_skipped: int = number(10, 1)  # so many skipped steps in a row stop the run
    tensorboard: bool = True
    wandb_project: str = ""  # "" is off

    def check(self):
        require(self.skip_nonfinite or not self.spike, "spike", self.spike, "needs skip_nonfinite=True",
                "nearest valid: 0.0")  # fmt: skip
        told = self.eval_every > 0 and self.checkpoint_every % self.eval_every == 0
        rule = f"needs an eval_every that divides checkpoint_every={self.checkpoint_every}, to tell the best"
        require(told or not self.keep_best, "keep_best", self.keep_best, rule, "nearest valid: 0")


@dataclass(frozen=True)
class SampleConfig(Checked, resume=MAY_CHANGE):
    """The text written at the end of a run."""

    prompt: str = "def "
    tokens: int = number(120, 0)
    temperature: float = number(0.8, 0.0)  # 0 is greedy
    top_p: float = number(0.95, 0.0, 1.0)


@dataclass(frozen=True)
class RunConfig(Checked, resume=FIXED):
    seed: int = number(0, 0, 2**31 - 1)
    init_from: str = ""  # a run directory whose weights a new run starts from; "": fresh weights
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def check(self):
        b, a = self.data.batch_size, self.train.micro_batches
        require(b % a == 0, "train.micro_batches", a, f"must divide data.batch_size={b}",
                 f"nearest valid: {nearest_divisor(b, a)}")  # fmt: skip
        self._check_loss(b)
        t = self.data.tokenizer
        need = {"bytes": 257, "bpe": t.vocab_size}.get(t.kind, 0)
        require(self.model.vocab_size >= need, "model.vocab_size", self.model.vocab_size,
                 f"must hold the tokenizer's {need} tokens", f"nearest valid: {need}")  # fmt: skip
        require(self.optim.warmup_steps < self.train.steps, "optim.warmup_steps", self.optim.warmup_steps,
                 f"must be < train.steps={self.train.steps}", f"nearest valid: {self.train.steps - 1}")  # fmt: skip
        require(not (self.optim.qk_clip and self.model.qk_norm), "optim.qk_clip", self.optim.qk_clip,
                 "has no effect with model.qk_norm=True, which undoes any scale of w_q and w_k and bounds the logits",
                 "nearest valid: 0.0")  # fmt: skip

        require(not (self.optim.per_head and self.model.mla.kv_rank), "optim.per_head", True,
                "is not for model.mla.kv_rank > 0, whose heads have several sizes", "nearest valid: False")  # fmt: skip
        longest = self.model.max_seq_len
        require(self.data.seq_len <= (longest or self.data.seq_len), "data.seq_len", self.data.seq_len,
                f"must be ≤ model.max_seq_len={longest}", f"nearest valid: {longest}")  # fmt: skip

    def _check_loss(self, b: int) -> None:
        more = self.loss.more_load_balance.items()
        scopes = {"": self.loss.balance_batch} | {f"more_load_balance.{n}.": m.balance_batch for n, m in more}
        for prefix, g in scopes.items():
            near = nearest_divisor(b, g) if g != "global" else g
            rule = f"must divide data.batch_size={b} or be 'global'"
            name = f"loss.{prefix}balance_batch"
            require(g == "global" or b % g == 0, name, g, rule, f"nearest valid: {near}")
        e, target = self.model.moe.num_experts, self.loss.bias_target
        require(not target or self.model.moe.selection_bias, "loss.bias_target", target,
                 "needs model.moe.selection_bias=True", "nearest valid: ()")  # fmt: skip
        rule = f"must have model.moe.num_experts={e} numbers, or none"
        require(len(target) in (0, e), "loss.bias_target", target, rule, "nearest valid: ()")

    @property
    def balance_unit(self) -> int:
        """Sequences of the finest balance group."""
        return self.loss.balance_unit or self.data.batch_size

    @property
    def balance_groups(self) -> int:
        """G: how many of the finest balance groups an optimizer batch has."""
        return self.data.batch_size // self.balance_unit
