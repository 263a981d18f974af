"""The teacher of a run (`config.distill`): a run directory, checked before anything is compiled, and its weights.

`data` of a checkpoint of a run with a teacher has

    {"teacher": {"from": "runs/a", "step": 200, "fingerprint": "0123…"}}

A resumed run takes the same step of it, though the teacher may have been trained on, and refuses other weights. The
run directory may have moved: `distill.teacher` names the new place.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from moe_jax import model
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.config.fields import nearest_divisor, require
from moe_jax.config.labels import same_labels
from moe_jax.data import tokenizers
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.moe import router_losses
from moe_jax.run import weights
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.config_file import load_config
from moe_jax.train.state import abstract_weights


class Teacher(NamedTuple):
    """A teacher without its weights."""

    folder: Path
    step: int  # of its checkpoint
    model: ModelConfig  # without adapters, which are merged; its back ends are chosen on this machine
    record: dict[str, Any] | None  # of the checkpoint of the run that is resumed


def find(cfg: RunConfig, done: int = 0, saved: dict[str, Any] | None = None, experts: int = 1) -> Teacher | None:
    """The teacher of a run that has taken `done` steps; None if no further step has one.

    saved: `data` of the checkpoint that the run goes on from. experts: size of the mesh's `expert` axis.
    Raises ConfigError or CheckpointError for a teacher that is not there, or does not fit the student.
    """
    record = (saved or {}).get("teacher")
    if done >= cfg.train.steps:
        return None
    if not cfg.distill.is_on(done + 1):
        still = record and not cfg.distill.teacher
        require(not still, "distill.teacher", "", f"the run began with {record and record['from']}",
                "nearest valid: its run directory")  # fmt: skip
        return None
    rule = f"the run has taken {done} steps without a teacher"
    require(not (done and record is None), "distill.teacher", cfg.distill.teacher, rule, "nearest valid: ''")
    folder, step = weights.source_of(cfg.distill.teacher)
    folder = folder.expanduser()
    began = record["step"] if record else step
    require(step in (None, began), "distill.teacher", cfg.distill.teacher, f"the run began with step {began}",
            f"nearest valid: '{folder.as_posix()}@{began}'")  # fmt: skip
    if not (folder / "config.json").is_file():
        runs = [p.as_posix() for p in sorted(folder.parent.glob("*")) if (p / "config.json").is_file()]
        close = difflib.get_close_matches(folder.as_posix(), runs, 1, 0.0)
        hint = f"nearest valid: {close[0]!r}" if close else "train one first"
        raise ConfigError("distill.teacher", cfg.distill.teacher, "is not a run directory", hint)
    whole = load_config(folder)
    theirs, gaps = whole.model, cfg.data.with_gaps
    _check(cfg, theirs, experts)
    _check_labels(cfg, whole)
    require(not gaps or bool(whole.data.with_gaps), "distill.teacher", cfg.distill.teacher,
            f"has learned no tokens of gaps, which data.sources.{gaps and gaps[0]}.denoise puts before it",
            "nearest valid: a run with denoise")  # fmt: skip
    with Checkpoints(folder) as checkpoints:
        step, _ = checkpoints.contents(began)
    moe = dataclasses.replace(theirs.moe, exchange="auto", exchange_chunks=1, grouped_matmul="auto")
    here = dataclasses.replace(theirs.base.without_mtp, attention="auto", remat="none", moe=moe)
    return Teacher(folder, step, here, record)


def _check(cfg: RunConfig, theirs: ModelConfig, experts: int) -> None:
    """Raises ConfigError for a teacher that the student cannot learn from."""
    where, own = cfg.distill.teacher, cfg.model
    same = own.vocab_size == theirs.vocab_size
    require(same, "model.vocab_size", own.vocab_size, f"differs from that of distill.teacher={where!r}",
            f"nearest valid: {theirs.vocab_size}")  # fmt: skip
    longest = theirs.max_seq_len or cfg.data.seq_len
    require(cfg.data.seq_len <= longest, "data.seq_len", cfg.data.seq_len,
            f"must be ≤ model.max_seq_len={longest} of distill.teacher={where!r}",
            f"nearest valid: {longest}")  # fmt: skip
    causal = theirs.moe.choice == "token" or not theirs.routed_counts
    require(causal, "distill.teacher", where, "has model.moe.choice='expert', whose predictions depend on later tokens",
            "nearest valid: a causal model")  # fmt: skip
    leak = theirs.moe.pool_min > 0 and theirs.moe.pool_from == "document"
    rule = "has model.moe.pool_from='document', whose predictions depend on later tokens"
    require(not leak, "distill.teacher", where, rule, "nearest valid: a run with pool_from='all'")
    counts = theirs.expert_counts
    require(all(count % experts == 0 for count in counts), "mesh.expert", experts,
            f"must divide the experts {counts} of distill.teacher={where!r}",
            f"nearest valid: {nearest_divisor(counts[0], experts) if counts else 1}")  # fmt: skip
    for name in ("d_model", "num_layers") if cfg.distill.hidden_coef else ():
        mine, other = getattr(own, name), getattr(theirs, name)
        rule = f"compares blocks, and distill.teacher={where!r} has model.{name}={other}, not {mine}"
        require(mine == other, "distill.hidden_coef", cfg.distill.hidden_coef, rule, "nearest valid: 0.0")


def _check_labels(cfg: RunConfig, whole: RunConfig) -> None:
    """Raises ConfigError if domains have other labels than in the run of a teacher that depends on them, and for labels
    that nothing reads."""
    labels, theirs, where = cfg.data.labels, whole.data.labels, cfg.distill.teacher
    read = cfg.model.labels or whole.model.labels or router_losses.counted_labels(cfg)
    rule = f"has no effect: neither the model, nor a loss, nor distill.teacher={where!r} reads labels (docs/labels.md)"
    require(read or not labels, "data.labels", labels, rule, "nearest valid: {}")
    same = not whole.model.labels or same_labels(labels, theirs)
    rule = f"must be the labels of the run of distill.teacher={where!r}, which depends on them"
    require(same, "data.labels", labels, rule, f"nearest valid: {theirs}")


def check_tokenizer(teacher: Teacher, tokenizer: tokenizers.Tokenizer) -> list[str]:
    """Raises ConfigError if the tokens of the teacher are others. Returns a line if it has no tokenizer to compare."""
    theirs, _ = tokenizers.of_run(teacher.folder)
    if theirs is None:
        return [f"{teacher.folder} has no tokenizer, so whether the teacher reads the same tokens is unknown"]
    rule = f"has another tokenizer (fingerprint {theirs.fingerprint}) than this run ({tokenizer.fingerprint})"
    require(theirs.fingerprint == tokenizer.fingerprint, "distill.teacher", str(teacher.folder), rule,
            "use its tokenizer: data.tokenizer.kind='huggingface' and the path of its file")  # fmt: skip
    return []


def load(teacher: Teacher, mesh: Mesh) -> tuple[tuple[dict, dict], dict[str, Any]]:
    """The weights of a teacher, (params, router_bias), sharded as those of any model, and the record of it.

    They keep the dtype of the teacher's run. Raises CheckpointError if they are not those of the record.
    """
    abstract = abstract_weights(teacher.model, mesh)
    params, bias, found = weights.load_identified(teacher.folder, *abstract, teacher.step)
    record = teacher.record
    if record and record["fingerprint"] != found:
        raise CheckpointError(
            f"{teacher.folder}, step {teacher.step}, is not the teacher that this run began with: the fingerprint of "
            f"its weights is {found}, that of {record['from']} was {record['fingerprint']}"
        )
    return (params, bias), {"from": str(teacher.folder), "step": teacher.step, "fingerprint": found}


def describe(cfg: RunConfig, teacher: Teacher) -> str:
    """One line about a teacher and its terms."""
    d, flops = cfg.distill, model.flops_per_token(teacher.model, cfg.data.seq_len) / 3
    named = "KL(teacher ‖ student)" if d.divergence == "forward" else "symmetric KL"
    terms = [f"{d.coef:g} · {d.temperature:g}² · {named} at temperature {d.temperature:g}"] if d.coef else []
    terms += [f"{d.hidden_coef:g} · squared distance of the residual streams"] if d.hidden_coef else []
    until = f" until step {d.stop_step}" if d.stop_step else ""
    counts = model.count_parameters(teacher.model)
    return (f"teacher: {teacher.folder}, step {teacher.step}, {counts.total:,} parameters, {flops / 1e6:.2f} MFLOP a "
            f"token, which mfu does not count; {' + '.join(terms)}{until}")  # fmt: skip
