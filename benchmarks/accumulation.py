"""Measures the error of the load-balancing loss' gradient under gradient accumulation.

    python -m benchmarks.accumulation

It computes the router's gradient of a batch in 2 to 16 micro-batches of 2,048 tokens, with E = 64, K = 8 and eight
domains that each have a vocabulary of their own. A sequence is of one domain. Micro-batches draw sequences at random,
or hold one domain each. It prints one row a case: cosine and norm ratio to the gradient of the undivided batch, for
exact accumulation, for "running" counts (Algorithm 1 of arXiv:2501.11873), and for a loss inside each micro-batch. It
takes two minutes on two CPU cores.
"""

import jax
import numpy as np

from moe_jax import cli, config
from moe_jax.parallel import sharding
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import init_state, put_batch

DOMAINS, WORDS, SEQUENCES, S = 8, 32, 16, 128  # SEQUENCES of S tokens make a micro-batch


def run_config(micro_batches: int, split: bool, scope: str, accumulation: str) -> config.RunConfig:
    c = config.default_config()
    c.model.update(
        vocab_size=DOMAINS * WORDS, d_model=64, num_layers=1, head_dim=16, compute_dtype="float32", init_std=0.5
    )
    c.model.moe.update(num_experts=64, top_k=8, d_expert=16)
    c.loss.update(load_balance_coef=1.0, router_z_coef=0.0, balance_batch=scope, accumulation=accumulation)
    c.data.update(batch_size=micro_batches * SEQUENCES, seq_len=S)
    c.data.tokenizer.update(kind="huggingface", path="none")
    c.train.micro_batches = micro_batches if split else 1
    return config.build(c)


def batch_rows(micro_batches: int, one_domain_each: bool, seed: int) -> dict[str, np.ndarray]:
    """Sequence i is in micro-batch i mod A. Weights of zero leave the load-balancing loss alone in the gradient."""
    rng = np.random.default_rng(seed)
    b = micro_batches * SEQUENCES
    of = np.arange(b) % micro_batches
    domain = of % DOMAINS if one_domain_each else rng.integers(0, DOMAINS, b)
    tokens = (domain[:, None] * WORDS + rng.integers(0, WORDS, (b, S))).astype(np.int32)
    return {
        "tokens": tokens,
        "targets": tokens,
        "weights": np.zeros((b, S), np.float32),
        "segment_ids": np.ones((b, S), np.int32),
        "positions": np.tile(np.arange(S, dtype=np.int32), (b, 1)),
        # Balance groups are of consecutive ids: those of a micro-batch, for the loss inside each.
        "sequence_ids": (of * SEQUENCES + np.arange(b) // micro_batches).astype(np.int32),
    }


def main(_) -> None:
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    params = init_state(run_config(2, False, "global", "exact"), mesh).params

    def gradient(a: int, rows: dict, split=True, scope="global", accumulation="exact") -> np.ndarray:
        cfg = run_config(a, split, scope, accumulation)
        with jax.set_mesh(mesh):
            grads = jax.jit(make_gradients(cfg, mesh))(params, {}, put_batch(rows, mesh, cfg), 0).grads
        return np.asarray(grads["layers"]["moe"]["w_router"], np.float64).ravel()

    print(f"{'micro-batches':<24} {'A':>3}  cosine (norm ratio) to the gradient of the whole batch")
    for one_domain_each in (False, True):
        for a in (2, 4, 8, 16):
            rows = batch_rows(a, one_domain_each, seed=a)
            whole = gradient(a, rows, split=False)
            cells = []
            for name, how in {
                "exact": {},
                "running": {"accumulation": "running"},
                "inside": {"scope": str(SEQUENCES)},
            }.items():
                g = gradient(a, rows, **how)
                ratio = np.linalg.norm(g) / np.linalg.norm(whole)
                cells.append(f"{name} {g @ whole / np.linalg.norm(g) / np.linalg.norm(whole):.4f} ({ratio:.2f})")
            label = "one domain each" if one_domain_each else "domains at random"
            print(f"{label:<24} {a:>3}  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
