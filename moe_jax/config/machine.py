"""Rules that need more than the config: the devices present, the tokenizer, the steps that a run has taken."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from moe_jax.chips import has_packed_attention, has_ragged_exchange, is_hopper
from moe_jax.config.fields import nearest_divisor, require
from moe_jax.config.model import ModelConfig
from moe_jax.config.schema import RunConfig


def check_devices(cfg: RunConfig, num_devices: int, platform: str, device_kind: str = "") -> tuple[int, int, int]:
    """The shape of the mesh on this machine. Raises ConfigError for a config that the machine cannot run."""
    shape = _mesh_shape(cfg, num_devices)
    moe, b, a = cfg.model.moe, cfg.data.batch_size, cfg.train.micro_batches
    counts = cfg.model.expert_counts
    several = f"model.moe.num_experts={moe.num_experts}" if len(counts) == 1 else f"the layers' experts {counts}"
    nearest = nearest_divisor(math.gcd(*counts), shape[2]) if counts else 1
    fits = all(count % shape[2] == 0 for count in counts)
    require(fits, "mesh.expert", shape[2], f"must divide {several}", f"nearest valid: {nearest}")
    unit = num_devices * a
    require(
        b % unit == 0,
        "data.batch_size",
        b,
        f"must be divisible by devices × train.micro_batches = {num_devices} × {a} = {unit}",
        f"nearest valid: {max(unit, round(b / unit) * unit)}",
    )
    tokens, chunks = b // unit * cfg.data.seq_len, moe.exchange_chunks
    require(
        tokens % chunks == 0,
        "model.moe.exchange_chunks",
        chunks,
        f"must divide a device's {tokens} tokens of a micro-batch",
        f"nearest valid: {nearest_divisor(tokens, chunks)}",
    )
    check_back_ends(cfg, shape, platform, device_kind)
    return shape


def check_back_ends(cfg: RunConfig, shape: tuple[int, int, int], platform: str, device_kind: str = "") -> None:
    """Raises ConfigError for a back end of the model that a machine, with a mesh of this shape, does not have."""
    moe = cfg.model.moe
    check_grouped_matmul(cfg.model, platform, device_kind)
    require(
        shape[2] == 1 or moe.exchange != "all_to_all" or has_ragged_exchange(device_kind),
        "model.moe.exchange",
        "all_to_all",
        f"needs a ragged all-to-all, which XLA does not have for {device_kind}",
        "use 'auto' or 'ring'",
    )
    _check_attention(cfg, platform, device_kind or platform)


def check_grouped_matmul(model: ModelConfig, platform: str, device_kind: str = "") -> None:
    """Raises ConfigError for a grouped matmul of the model that a machine does not have."""
    if model.moe.grouped_matmul != "hopper":
        return
    hopper, here = platform == "gpu" and is_hopper(device_kind), device_kind or platform
    require(hopper, "model.moe.grouped_matmul", "hopper", f"needs a Hopper GPU, this is {here}", "use 'auto'")
    rule = "must be 'bfloat16' for model.moe.grouped_matmul='hopper'"
    require(model.compute_dtype == "bfloat16", "model.compute_dtype", model.compute_dtype, rule, "use 'auto'")


def _check_attention(cfg: RunConfig, platform: str, here: str) -> None:
    name, model, s = cfg.model.attention, cfg.model, cfg.data.seq_len
    for backend, kind, article in (("cudnn", "gpu", "a GPU"), ("splash", "tpu", "a TPU")):
        ok = name != backend or platform == kind
        require(ok, "model.attention", backend, f"needs {article}, this is {here}", "use 'auto'")
    if name == "cudnn":
        for field, value, rule, nearest in cudnn_refusals(model, here):
            require(False, field, value, f"for model.attention='cudnn' {rule}", nearest)
    if name == "splash":
        rule = "must be a multiple of 128 for model.attention='splash'"
        require(s % 128 == 0, "data.seq_len", s, rule, f"nearest valid: {max(128, round(s / 128) * 128)}")


def cudnn_refusals(model: ModelConfig, device_kind: str) -> Iterator[tuple[str, Any, str, str]]:
    """Yields what keeps cuDNN's attention from a model on a GPU: field, value, rule, nearest valid choice.

    Sources: checks of JAX 0.10 to 0.12 before its call. Heads of more than 128 numbers are asked of Hopper alone.
    """
    mla, other = model.mla.kv_rank > 0, "use model.attention='chunked'"
    if model.compute_dtype != "bfloat16":
        yield "model.compute_dtype", model.compute_dtype, "must be 'bfloat16'", "use 'auto'"
    most = 256 if is_hopper(device_kind) else 128
    for field, size in (("model.head_dim", model.head_dim), ("model.mla.v_dim", model.mla.v_dim if mla else 8)):
        if size % 8:
            yield field, size, "must be a multiple of 8", f"nearest valid: {-(-size // 8) * 8}"
        if size > most:
            yield field, size, f"must be at most {most} on {device_kind}", f"nearest valid: {most}, or {other}"
    if mla and not is_hopper(device_kind):
        yield "model.mla.kv_rank", model.mla.kv_rank, f"needs a Hopper GPU, this is {device_kind}", other
    if mla and model.window:
        yield "model.window", model.window, "is not available with model.mla.kv_rank > 0", other
    if model.segment_mask and not has_packed_attention(device_kind):
        rule = f"needs a Hopper GPU or a newer one, this is {device_kind}"
        yield "model.segment_mask", True, rule, f"nearest valid: False, or {other}"


def _mesh_shape(cfg: RunConfig, num_devices: int) -> tuple[int, int, int]:
    names = ("data", "fsdp", "expert")
    sizes = [getattr(cfg.mesh, name) for name in names]
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
        rest = sizes.index(-1)
        require(
            num_devices % known == 0,
            f"mesh.{names[rest]}",
            -1,
            f"the other axes' {known} must divide the {num_devices} devices present",
            f"nearest valid product: {nearest_divisor(num_devices, known)}",
        )
        sizes[rest] = num_devices // known
    rule = f"must multiply to the {num_devices} devices present"
    require(math.prod(sizes) == num_devices, "mesh", tuple(sizes), rule, "use -1 for one axis")
    return tuple(sizes)


def check_vocabulary(cfg: RunConfig, tokens: int) -> None:
    """Raises ConfigError if the model has fewer rows of embedding than there are tokens, of the tokenizer and of rows
    with gaps (`Corpus.vocab_size`)."""
    require(cfg.model.vocab_size >= tokens, "model.vocab_size", cfg.model.vocab_size,
             f"must hold the {tokens} tokens of the text", f"nearest valid: {tokens}")  # fmt: skip


def check_steps(cfg: RunConfig, done: int) -> None:
    """Raises ConfigError if train.steps is less than the number of steps already taken."""
    rule = f"the run has already taken {done} steps"
    require(cfg.train.steps >= done, "train.steps", cfg.train.steps, rule, f"nearest valid: {done}")


def for_evaluation(cfg: RunConfig, num_devices: int) -> tuple[RunConfig, tuple[int, int, int]]:
    """A run's config for evaluation on the devices present, and the shape of the mesh: data × 1 × expert.

    Layers of multi-token prediction, which no logits depend on, are left out. The batch is rounded up to a multiple of
    the number of devices.
    """
    cfg, b = cfg.without_mtp, -(-cfg.data.batch_size // num_devices) * num_devices
    data = dataclasses.replace(cfg.data, batch_size=b)
    loss = dataclasses.replace(cfg.loss, balance_batch="global", more={}, shuffle_tokens=False)
    train = dataclasses.replace(cfg.train, micro_batches=1)
    return dataclasses.replace(cfg, data=data, loss=loss, train=train), evaluation_mesh(cfg.model, num_devices)


def evaluation_mesh(model: ModelConfig, num_devices: int) -> tuple[int, int, int]:
    """The shape of the mesh for evaluation of a model: data × 1 × expert."""
    expert = math.gcd(*model.expert_counts, num_devices)
    return num_devices // expert, 1, expert
