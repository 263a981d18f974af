"""Samples text from a model with a KV cache: with temperature, top-p, or greedily."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax import model
from moe_jax.config import ModelConfig, RunConfig, SampleConfig
from moe_jax.config.labels import check_label
from moe_jax.data import Tokenizer, tokenizers
from moe_jax.data.documents import as_text
from moe_jax.errors import ConfigError
from moe_jax.evaluate.switches import Switches
from moe_jax.moe.layer import TokenInfo
from moe_jax.moe.pools import Documents
from moe_jax.moe.program import Program
from moe_jax.nn.layers import weight
from moe_jax.parallel import sharding


def pick_token(
    logits: Float[Array, "B V"], key: Array, temperature: float, top_p: float, vocab: int
) -> Int[Array, " B"]:
    """The next token of every row: the most probable one at temperature 0, else a random one.

    The random one is drawn from the most probable tokens that together reach the probability `top_p`.
    """
    logits = jnp.where(jnp.arange(logits.shape[-1])[None, :] < vocab, logits, -jnp.inf)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits / temperature, order, axis=-1)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # 0 for the most probable token, which is always kept
    choice = jax.random.categorical(key, jnp.where(before < top_p, ranked, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def generate(
    cfg: ModelConfig,
    mesh: Mesh,
    params: dict,
    router_bias: dict,
    prompts: Sequence[Sequence[int]],
    tokens: int | Sequence[int],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    vocab: int | None = None,
    switches: Switches | None = None,
    label: int | None = None,
) -> list[list[int]]:
    """Token ids of each prompt (at least one) followed by `tokens` sampled ids: one number, or one of each prompt.

    vocab: tokens of the tokenizer. Larger ids, which a model may have rows for, are never drawn.
    switches: experts that are off or on, for the prompt and what follows.
    label: of the prompts and what follows, for a model that needs one. Raises ConfigError for a wrong one.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and every prompt at least one token")
    counts = np.broadcast_to(tokens, len(prompts)).tolist()
    if not any(counts):
        return [list(p) for p in prompts]
    label = check_label(cfg, label)
    if cfg.moe.choice == "expert" and cfg.num_moe_layers:
        rule = "depends on later tokens, so that the model writes no text"
        raise ConfigError("model.moe.choice", "expert", rule, "train with choice='token'")
    places, longest, most = max((len(p) + count, len(p), count) for p, count in zip(prompts, counts, strict=True))
    if 0 < cfg.max_seq_len < places:
        rule = f"exceeds model.max_seq_len={cfg.max_seq_len} after a prompt of {longest} tokens"
        raise ConfigError("sample.tokens", most, rule, f"nearest valid: {max(cfg.max_seq_len - longest, 0)}")
    sizes = {len(p) for p in prompts}
    # A key is rotated as for the length at which it was written; a pool is taken from a whole prompt at once.
    if (cfg.rope_scaling.by_length or cfg.moe.takes_pools) and len(sizes) > 1:
        found: dict[int, list[int]] = {}
        for size in sorted(sizes):
            rows = [row for row, p in enumerate(prompts) if len(p) == size]
            of = lambda all_rows, rows=rows: [all_rows[row] for row in rows]
            made = generate(cfg, mesh, params, router_bias, of(prompts), of(counts), temperature=temperature,
                            top_p=top_p, seed=seed, vocab=vocab, switches=switches, label=label)  # fmt: skip
            found |= dict(zip(rows, made, strict=True))
        return [found[row] for row in range(len(prompts))]
    padded = -(-len(prompts) // mesh.size) * mesh.size  # the batch is split over the mesh: pad it with copies
    table = np.zeros((padded, places), np.int32)
    lengths = np.zeros(padded, np.int32)
    for row in range(padded):
        prompt = prompts[row % len(prompts)]
        table[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    with jax.set_mesh(mesh):
        run = _decoder(cfg, mesh, min(map(len, prompts)), temperature, top_p, vocab or cfg.vocab_size)
        out = np.asarray(run(params, router_bias, table, lengths, jax.random.key(seed), switches, label))
    return [out[row, : len(p) + counts[row]].tolist() for row, p in enumerate(prompts)]


@functools.lru_cache(maxsize=8)
def _decoder(cfg: ModelConfig, mesh: Mesh, prefill: int, temperature: float, top_p: float, vocab: int):
    """The jitted function (params, bias, table [B, Z], lengths [B], key, switches, label) → the table with
    sampled tokens.

    It runs the first `prefill` tokens of all prompts at once, and then one token at a time.
    """
    graph = model.abstract(cfg, Program.choose(cfg, mesh))
    rows = P(sharding.AXES, None)

    def run(params, bias, table, lengths, key, switches, label):
        net = graph.bind(params, bias)
        table, lengths = sharding.replicate(table), sharding.replicate(lengths)
        batch, places = table.shape
        output = weight(net.output_matrix, cfg.compute_dtype)

        def forward(ids, cache, start, documents=None):
            """Logits after the last of `ids`, whose positions are start, start+1, …"""
            ids = jax.sharding.reshard(ids, rows)
            positions = jnp.broadcast_to(
                start + jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape, out_sharding=rows
            )
            info = TokenInfo(ids >= 0, jnp.zeros_like(ids), documents=documents and documents(jnp.ones_like(ids)))
            info = info._replace(label=None if label is None else jnp.full_like(ids, label))
            out = net(model.Inputs(ids, positions, None, info, switches=switches), cache, start)
            last = jnp.einsum("bd,vd->bv", out.hidden[:, -1], output, preferred_element_type=jnp.float32)
            return sharding.replicate(last), out.cache

        def place(table, logits, at):
            """The table with a sampled token at position `at` of each row whose prompt ends before it."""
            token = pick_token(logits, jax.random.fold_in(key, at), temperature, top_p, vocab)
            known = jax.lax.dynamic_index_in_dim(table, at, axis=1, keepdims=False)
            token = jnp.where(at < lengths, known, token)
            return jax.lax.dynamic_update_index_in_dim(table, token, at, axis=1)

        def step(carry, at):
            table, cache = carry
            logits, cache = forward(jax.lax.dynamic_slice_in_dim(table, at, 1, axis=1), cache, at)
            return (place(table, logits, at + 1), cache), None

        zero = jnp.zeros((), jnp.int32)
        prompt = Documents if cfg.moe.takes_pools else None  # a prompt gives its pool, which stays
        logits, cache = forward(table[:, :prefill], net.empty_cache(batch, places), zero, prompt)
        table = place(table, logits, prefill)
        (table, _), _ = jax.lax.scan(step, (table, cache), jnp.arange(prefill, places - 1, dtype=jnp.int32))
        return table

    return jax.jit(run)


def sample_text(
    cfg: RunConfig,
    mesh: Mesh,
    params: dict,
    router_bias: dict,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | None = None,
    switches: Switches | None = None,
) -> str:
    """The text of a prompt (default: the config's) and its continuation, sampled with the config's `sample` settings.

    It ends at the end-of-text token, or at the model's last position. prompt: text, or the ids of a complete beginning.
    switches: experts that are off or on. Its label, if the model needs one, is that of the settings.
    """
    prompt = cfg.sample.prompt if prompt is None else prompt
    if isinstance(prompt, str):
        prompt = [tokenizers.first_token(tokenizer), *tokenizer.encode([as_text(prompt)])[0].tolist()]
    return continue_texts(cfg.model, mesh, params, router_bias, tokenizer, [prompt], cfg.sample, cfg.seed, switches)[0]


def continue_texts(
    cfg: ModelConfig, mesh: Mesh, params: dict, router_bias: dict, tokenizer: Tokenizer,
    starts: Sequence[Sequence[int]], sample: SampleConfig, seed: int,
    switches: Switches | None = None,
) -> list[str]:  # fmt: skip
    """The texts of prompts, given as token ids, and of their continuations. sample: its `prompt` is not used; its
    `label` is that of all of them.

    Each ends at its end-of-text token, or at the model's last position.
    """
    free = lambda start: max(cfg.max_seq_len - len(start), 0) if cfg.max_seq_len else sample.tokens
    all_ids = generate(
        cfg, mesh, params, router_bias, starts, [min(sample.tokens, free(start)) for start in starts],
        temperature=sample.temperature, top_p=sample.top_p, seed=seed, vocab=tokenizer.vocab_size,
        switches=switches, label=sample.label,
    )  # fmt: skip
    texts, end = [], tokenizer.end_of_text
    for start, ids in zip(starts, all_ids, strict=True):
        made = ids[len(start) :]
        texts.append(tokenizer.decode([*start, *(made[: made.index(end)] if end in made else made)]))
    return texts
