"""How a model is computed: one record, made once from the configuration and the mesh, and passed to every layer."""

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.config import ModelConfig
from moe_jax.kernels import choose_backend
from moe_jax.moe.exchange import choose_exchange
from moe_jax.nn.attend import choose_attention


@dataclasses.dataclass(frozen=True)
class Program:
    """Back ends, number of balance groups, and what the output records. The default back ends run anywhere."""

    attention: str = "xla"
    exchange: str = "ring"  # of tokens between devices
    grouped_matmul: str = "reference"
    balance_groups: int = 1  # in evaluation the domains
    record: bool = False  # each token's choices: `Output.choices`
    residual: bool = False  # the residual stream after each block: `Output.residual`
    mtp: bool = False  # layers of multi-token prediction: `Output.ahead`, and statistics of their routers
    max_logit: bool = False  # each head's largest attention logit: `Output.max_logit`
    histogram_bins: int = 0  # bins of `RouterStats.histogram`; 0: none
    labels: int = 0  # labels of which `RouterStats.by_label` has sums; 0: none
    frozen: frozenset[str] = frozenset()  # paths of parameters that nothing differentiates by
    why: str = dataclasses.field(default="", compare=False)  # one line about the choice of the back ends

    @classmethod
    def choose(cls, cfg: ModelConfig, mesh: Mesh, tokens: int = 1, seq_len: int = 1) -> "Program":
        """Chooses the back ends for a mesh. tokens: the number on one device in a forward pass."""
        platform, kind = mesh.devices.flat[0].platform, mesh.devices.flat[0].device_kind
        attention, why_a = choose_attention(cfg, platform, kind, seq_len)
        matmul, why_m = choose_backend(cfg.moe.grouped_matmul, platform, kind, cfg.compute_dtype)
        itemsize, peers = jnp.dtype(cfg.compute_dtype).itemsize, mesh.shape["expert"]
        exchange, why_e = choose_exchange(cfg.moe, platform, peers, cfg.expert_dim, tokens, itemsize, kind)
        why = f"attention: {attention} ({why_a}); "
        named = f"grouped matmul: {matmul} ({why_m})"
        if cfg.num_moe_layers:
            grouped = cfg.moe.compute == "grouped"
            why += f"experts: {cfg.moe.compute}{f', {named}' if grouped else ''}; exchange: {why_e}"
        else:
            grouped = False
            why += "no experts"
        why += f"; matrices by label: {named}" if cfg.untie > 1 and not grouped else ""
        return cls(attention, exchange, matmul, why=why)
