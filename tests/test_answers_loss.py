"""The loss of documents with roles: of answers alone, whatever row a document lies in, on any mesh.

The oracle has every document in a row of its own, on one device, as one batch.
"""

import functools
import itertools
import json
import re

import jax
import numpy as np
import pytest
from test_train import rows, start

from moe_jax import config, data
from moe_jax.data.rows import padding_row
from moe_jax.parallel import sharding
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import abstract_state, put_batch
from tests import programs

S, V = 48, 264
ROWS = {"packed": 16, "alone": 24}  # of a batch, the last of them padding; multiples of 8 devices
DOCUMENTS = 21


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> data.TokenStore:
    root, rng = tmp_path_factory.mktemp("qa"), np.random.default_rng(0)
    word = lambda most: "".join(rng.choice(list("abcdefgh "), rng.integers(1, most)))
    with open(root / "a.jsonl", "w", encoding="utf-8") as file:
        for _ in range(DOCUMENTS):
            file.write(json.dumps({"q": word(22), "a": f"{word(18)}."}) + "\n")
    source = config.SourceConfig(kind="files", path=str(root / "a.jsonl"), prompt="{q}?", completion=" {a}",
                                 validation_fraction=0.0)  # fmt: skip
    cfg = config.DataConfig(seq_len=S, sources={"qa": source}, cache_dir=str(root / "cache"))
    return data.prepare(cfg, workdir=root / "run", seed=0, progress=False).stores["qa", "train"]


def alone(store: data.TokenStore) -> list[dict[str, np.ndarray]]:
    """A row for each document, by the definition."""
    rows = []
    for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
        row, n = padding_row(S, 256), end - begin - 1
        row["tokens"][:n], row["targets"][:n] = store.tokens[begin : end - 1], store.tokens[begin + 1 : end]
        row["weights"][:n], row["segment_ids"][:n] = store.learned[begin + 1 : end], 1
        row["positions"][:n] = range(n)
        rows.append(row)
    return rows


def batch_of(store: data.TokenStore, kind: str) -> dict[str, np.ndarray]:
    """All documents in one batch: "packed", or each "alone" in a row."""
    packed = data.WholeRows(store, S, 0)
    rows = alone(store) if kind == "alone" else [packed[i] for i in range(len(packed))]
    assert len(packed) < DOCUMENTS - 4 and len(rows) <= ROWS[kind]
    rows += [padding_row(S, 256)] * (ROWS[kind] - len(rows))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {
        "sequence_ids": np.arange(ROWS[kind], dtype=np.int32)
    }


def run_config(kind: str, micro=1, remat="none", compute="dense") -> config.RunConfig:
    c = config.default_config()
    c.model.update(vocab_size=V, d_model=16, num_layers=2, num_dense_layers=1, d_ff=24, num_heads=4, num_kv_heads=2,
                   head_dim=4, qk_norm=True, compute_dtype="float32", init_std=0.3, remat=remat)  # fmt: skip
    c.model.moe.update(num_experts=4, top_k=2, d_expert=8, compute=compute)
    c.loss.update(load_balance_coef=0.5, router_z_coef=0.1)
    c.data.update(batch_size=ROWS[kind], seq_len=S)
    c.data.sources = {"qa": config.source(kind="files", path="a.jsonl", prompt="{q}?", completion=" {a}")}
    c.train.micro_batches = micro
    return config.build(c)


@functools.cache
def initial(shape) -> tuple:
    """The mesh, and parameters and the router's biases drawn by NumPy: there is no program to compile."""
    mesh, rng = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))]), np.random.default_rng(1)
    state = abstract_state(run_config("alone"), mesh)
    draw = lambda x: jax.device_put(rng.normal(0.0, 0.3, x.shape).astype(x.dtype), x.sharding)
    return mesh, jax.tree.map(draw, state.params), jax.tree.map(draw, state.router_bias)


@functools.cache
def program(shape, kind, micro, remat, compute):
    cfg = run_config(kind, micro, remat, compute)
    mesh, params, router_bias = initial(shape)
    gradients = jax.jit(make_gradients(cfg, mesh))

    def run(rows: dict) -> dict:
        with jax.set_mesh(mesh):
            made = gradients(params, router_bias, put_batch(rows, mesh, cfg), 0)
        return jax.device_get({"loss": made.loss, "parts": made.parts, "sums": made.sums, "grads": made.grads})

    return run


def oracle(rows: dict) -> dict:
    return program((1, 1, 1), "alone", 1, "none", "dense")(rows)


def same(got: dict, want: dict) -> None:
    def close(path, a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max() + 1e-9, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, got, want)


def check(store, shape, micro, remat="none", compute="dense"):
    got = program(shape, "packed", micro, remat, compute)(batch_of(store, "packed"))
    same(got, oracle(batch_of(store, "alone")))


def test_packed_rows_have_the_loss_and_gradients_of_documents_alone(store):
    check(store, (1, 1, 1), 1, compute="grouped")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize(
    ("micro", "remat", "compute"), [(1, "none", "dense"), (2, "full", "grouped"), (2, "full", "dense")]
)
def test_packed_rows_on_every_mesh(store, shape, micro, remat, compute):
    check(store, shape, micro, remat, compute)


@pytest.mark.slow
def test_four_micro_batches(store):
    check(store, (1, 1, 1), 4, compute="grouped")


def test_nothing_of_a_prompt_gets_loss_and_all_of_it_is_read(store):
    """Other targets in a prompt change no bit, another prompt does. Routers count prompts, and no padding."""
    rows = batch_of(store, "alone")
    want = oracle(rows)
    prompt = (rows["weights"] == 0) & (rows["segment_ids"] > 0)
    assert 0.15 < prompt.mean() < 0.6
    got = oracle(rows | {"targets": np.where(prompt, 7, rows["targets"])})
    jax.tree.map(np.testing.assert_array_equal, got, want)
    read = oracle(rows | {"tokens": np.where(prompt & (rows["positions"] > 0), 7, rows["tokens"])})
    assert abs(read["loss"] - want["loss"]) > 1e-3
    sums = want["sums"]
    assert sums.weights == rows["weights"].sum() == store.targets_per_document().sum()
    (router,) = sums.router.values()
    assert router.tokens.sum() == (rows["segment_ids"] > 0).sum() > sums.weights


def backwards(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with its rows, and the documents in each, in the opposite order."""
    made = {name: x.copy() for name, x in rows.items()}
    for r, segments in enumerate(rows["segment_ids"]):
        order = np.concatenate([np.flatnonzero(segments == k) for k in range(segments.max(), -1, -1)])
        for name in made:
            if name != "sequence_ids":
                made[name][r] = rows[name][r][order]
    made["segment_ids"] = np.where(made["segment_ids"] > 0, 9 - made["segment_ids"], 0)
    return {name: x if name == "sequence_ids" else x[::-1] for name, x in made.items()}


def test_the_order_of_documents_does_not_matter(store):
    run, rows = program((2, 2, 2), "packed", 2, "full", "dense"), batch_of(store, "packed")
    assert (backwards(rows)["tokens"][::-1] != rows["tokens"]).any()
    same(run(backwards(rows)), run(rows))


RUN = """
from moe_jax import config as config_lib


def get_config():
    config = config_lib.default_config()
    parts = dict(prompt="{q}=", completion="{a}")
    config.data.sources = {"qa": config_lib.source(kind="files", path="@/a.jsonl", validation_fraction=0.2, **parts)}
    config.data.update(batch_size=16, seq_len=64)
    config.model.update(vocab_size=257, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16)
    config.model.moe.update(num_experts=4, d_expert=32)
    config.optim.update(lr=1e-2, warmup_steps=2)
    config.train.update(steps=40, log_every=1, checkpoint_every=20)
    config.sample.update(tokens=12, temperature=0.0)  # the prompt is one of the text
    return config
"""


@pytest.mark.slow
def test_a_run_learns_answers_and_not_the_noise_of_prompts(tmp_path):
    """Prompts of random letters, which nobody can predict (3.3 nats), and one answer to all."""
    rng = np.random.default_rng(0)
    letters = lambda: "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 12))
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"q": letters(), "a": "an answer"}) + "\n" for _ in range(300))
    (tmp_path / "config.py").write_text(RUN.replace("@", str(tmp_path)), encoding="utf-8")
    flag = f"--config={tmp_path / 'config.py'}"
    done = programs.run(tmp_path, "train.py", flag)
    found = r"alone, ([\d,]+) of ([\d,]+) tokens are learned, ([\d,]+) of ([\d,]+) held-out tokens are evaluated"
    learned, seen, held, all_held = (int(n.replace(",", "")) for n in re.search(found, done.stdout).groups())
    assert (learned + held, seen + all_held) == (3000, 23 * 300)
    steps = rows(tmp_path, "train")
    assert steps[0]["xent"] > 5 and steps[-1]["xent"] < 0.5
    for before, row in itertools.pairwise(steps):
        learned, seen = row["tokens"] - before["tokens"], row["tokens_per_second"] * row["step_seconds"]
        assert 100 < learned < 0.6 * seen < 0.6 * 16 * 64
    held = json.loads((tmp_path / "run" / "eval.json").read_text(encoding="utf-8"))
    (domain, total) = held["domains"]
    documents = domain["tokens"] // 10  # 9 letters and the end
    assert 30 < documents < 90 and domain["tokens"] == 10 * documents == total["tokens"]
    assert total["bits_per_byte"] == pytest.approx(total["xent"] / np.log(2) * 10 / 9)
    assert np.sum(held["tokens_per_layer_and_domain"][0]) == 23 * documents  # prompts are routed too
    again = programs.run(tmp_path, "eval.py")
    assert "compressors see them without their prompts" in again.stdout and "an answer" in again.stdout
    changed = start(tmp_path, "train.py", flag, "--config.data.sources.qa.prompt={q} =")
    _, said = changed.communicate(timeout=300)
    assert changed.returncode and "config.data.sources.qa.prompt" in said
