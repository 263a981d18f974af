"""Multi-head latent attention: the keys and values of all heads come from one latent, and only it is cached.

Source: DeepSeek-V2, arXiv:2405.04434, §2.1. The key of a head has two parts: one made from the latent, and one that is
rotated (RoPE) and shared by all heads. A query has the same two parts. Letters: N heads, H size of a query or key, W
size of a value. `latent` is the size of the latent, `rotated` that of the rotated part.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.config.positions import FULL, Attends
from moe_jax.nn.attend import attend
from moe_jax.nn.attention import scaled_queries
from moe_jax.nn.cache import KVCache, attend_and_write
from moe_jax.nn.layers import Init, linear, rms_norm, times
from moe_jax.nn.lora import whole_matrix
from moe_jax.nn.qk_clip import max_logits
from moe_jax.nn.remat import keep
from moe_jax.nn.rope import rotate, rotation
from moe_jax.parallel import sharding

LATENT_EPS = 1e-6  # in the norms of latents: released models have this value, whatever their `norm_eps`


class MLA(nnx.Module):
    """Multi-head latent attention."""

    def __init__(self, cfg: ModelConfig, init: Init, out_std: float, backend: str, attends: Attends = FULL):
        self.cfg, self.backend, self.attends = cfg, backend, attends
        self.window = cfg.window if attends.window else 0
        m, d, n = cfg.mla, cfg.d_model, cfg.num_heads
        if m.q_rank:
            self.w_q_down = init.normal((d, m.q_rank), "embed latent")
            self.q_norm = init.ones((m.q_rank,), "norm")
            self.w_q_up = init.normal((m.q_rank, n * cfg.head_dim), "latent heads")
        else:
            self.w_q = init.normal((d, n * cfg.head_dim), "embed heads")
        self.w_kv_down = init.normal((d, m.kv_rank), "embed latent")
        self.w_k_rope = init.normal((d, m.rope_dim), "embed latent")
        self.kv_norm = init.ones((m.kv_rank,), "norm")
        self.w_k_up = init.normal((m.kv_rank, n * (cfg.head_dim - m.rope_dim)), "latent heads")
        self.w_v_up = init.normal((m.kv_rank, n * m.v_dim), "latent heads")
        self.w_o = init.normal((n * m.v_dim, d), "heads embed", out_std)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None,
        cache: KVCache | None = None,
        start: Int[Array, ""] | None = None,
        counted: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None, Float[Array, "B N"] | None]:
        """Returns what `attention.Attention` does. The cache holds `[latent, rotated key]` of a token, once."""
        cfg, size = self.cfg, self.cfg.mla.rope_dim
        heads = lambda x, h: sharding.reshape_tail(x, 2, -1, h)
        mapped = lambda x, name: keep(linear(x, self, name), "qkv")
        if cfg.mla.q_rank:
            q = mapped(rms_norm(mapped(x, "w_q_down"), self.q_norm[...], LATENT_EPS), "w_q_up")
        else:
            q = mapped(x, "w_q")
        q = scaled_queries(heads(q, cfg.head_dim), cfg)
        latent = rms_norm(mapped(x, "w_kv_down"), self.kv_norm[...], LATENT_EPS)
        turn = rotation(cfg, self.attends, x.shape[1] if cache is None else start + x.shape[1])
        q_plain, q_rope = jnp.split(q, [cfg.head_dim - size], axis=-1)
        q_rope = rotate(q_rope, positions, turn)
        k_rope: Float[Array, "B S 1 rotated"] = rotate(heads(mapped(x, "w_k_rope"), size), positions, turn)
        if cache is not None:
            scale = cfg.head_dim**-0.5 * turn.logit_factor
            y, cache = self._cached(q_plain, q_rope, latent, k_rope, cache, start, scale)
            return linear(sharding.reshape_tail(y, 2, -1), self, "w_o"), cache, None
        k_plain = heads(mapped(latent, "w_k_up"), cfg.head_dim - size)
        v = heads(mapped(latent, "w_v_up"), cfg.mla.v_dim)
        q = times(jnp.concatenate([q_plain, q_rope], axis=-1), turn.logit_factor)
        k = jnp.concatenate([k_plain, jnp.broadcast_to(k_rope, q_rope.shape)], axis=-1)
        max_logit = None if counted is None else max_logits(q, k, segments, counted, self.window)
        y = attend(q, k, v, segments, self.backend, self.window)
        return linear(sharding.reshape_tail(y, 2, -1), self, "w_o"), None, max_logit

    def _cached(self, q_plain, q_rope, latent, k_rope, cache: KVCache, start: Int[Array, ""], scale: float):
        """Attends in the space of latents: maps queries there and results back, and makes no key or value of a head."""
        cfg, rank = self.cfg, self.cfg.mla.kv_rank
        up = lambda name: sharding.reshape_tail(whole_matrix(self, name, latent.dtype), 1, cfg.num_heads, -1)
        q: Float[Array, "B S N latent+rotated"] = jnp.concatenate(
            [jnp.einsum("bsnh,cnh->bsnc", q_plain, up("w_k_up")), q_rope], axis=-1
        )
        k = jnp.concatenate([latent[:, :, None], k_rope], axis=-1)
        y, cache = attend_and_write(q, k, None, cache, start, scale, self.window)
        return jnp.einsum("bsnc,cnw->bsnw", y[..., :rank], up("w_v_up")), cache
