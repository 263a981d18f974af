"""The loss curve of 20 steps, committed: the same on every supported Python, JAX and mesh.

Rewrite tests/golden.json only when a change of the numbers is meant, and say why in the commit:

    python -m tests.test_golden --write
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from moe_jax import config
from moe_jax.parallel import sharding
from moe_jax.train import step
from moe_jax.train.state import init_state, put_batch

GOLDEN = Path(__file__).with_name("golden.json")
STEPS, BATCH, SEQ, VOCAB = 20, 16, 32, 257
NAMES = ("loss", "xent", "load_balance", "router_z", "grad_norm")


def run_config() -> config.RunConfig:
    c = config.default_config()
    c.model.update(vocab_size=VOCAB, d_model=32, num_layers=3, num_dense_layers=1, d_ff=64, num_heads=4, num_kv_heads=2,
                   head_dim=8, qk_norm=True, compute_dtype="float32")  # fmt: skip
    c.model.moe.update(num_experts=4, top_k=2, d_expert=32, num_shared_experts=1)
    c.optim.update(name="muon", newton_schulz_dtype="float32", lr=1e-2, warmup_steps=4)
    c.data.update(batch_size=BATCH, seq_len=SEQ)
    c.mesh.update(data=2, fsdp=2, expert=2)
    c.train.update(steps=STEPS, micro_batches=2)
    return config.build(c)


def batches():
    """Noisy counting, two segments a row, the last row half padding; from raw bits, which no NumPy version changes."""
    bits = np.random.Philox(key=7)
    for _ in range(STEPS):
        raw = bits.random_raw(BATCH * (SEQ + 2)).reshape(BATCH, SEQ + 2).astype(np.uint64) >> np.uint64(32)
        stride, noise = raw[:, :1] % 5 + 1, raw[:, 1:] % 4
        tokens = ((np.arange(SEQ + 1, dtype=np.uint64) * stride + noise) % (VOCAB - 1)).astype(np.int32)
        segments = np.where(np.arange(SEQ) < SEQ // 2, 1, 2).astype(np.int32) * np.ones((BATCH, 1), np.int32)
        segments[-1, SEQ // 2 :] = 0
        yield {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": (segments > 0).astype(np.float32),
            "segment_ids": segments,
            "positions": np.tile(np.arange(SEQ, dtype=np.int32) % (SEQ // 2), (BATCH, 1)),
            "sequence_ids": np.arange(BATCH, dtype=np.int32),
        }


def curves() -> dict[str, list[float]]:
    cfg = run_config()
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), "cpu"))
    state, train_step = init_state(cfg, mesh), step.make_train_step(cfg, mesh)
    out = {name: [] for name in NAMES}
    for rows in batches():
        state, aux = train_step(state, put_batch(rows, mesh, cfg))
        for name in NAMES:
            value = aux.terms[name] if name in aux.terms else getattr(aux, name)
            out[name].append(float(f"{float(value):.8g}"))
    return out


def test_golden():
    want = json.loads(GOLDEN.read_text(encoding="utf-8"))
    got = curves()
    assert want["loss"][-1] < want["loss"][0] - 1.0  # it learns, so that the curve depends on every part
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-4)
    for name in NAMES:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-3, err_msg=name)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    from tests import conftest  # noqa: F401  8 virtual devices

    GOLDEN.write_text(
        json.dumps({"written_with": f"jax {jax.__version__}"} | curves(), indent=1) + "\n", encoding="utf-8"
    )
