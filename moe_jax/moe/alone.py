"""The MoE layer for a model of one's own in flax.nnx: a short constructor, and errors that say what to change."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import build_model, check_grouped_matmul
from moe_jax.config.fields import require
from moe_jax.config.layers import Kind
from moe_jax.config.model import ModelConfig
from moe_jax.errors import ConfigError
from moe_jax.kernels import choose_backend
from moe_jax.moe.exchange import choose_exchange
from moe_jax.moe.layer import MoE, MoEOutput, TokenInfo
from moe_jax.moe.program import Program
from moe_jax.moe.routers import ROUTERS
from moe_jax.nn.layers import Init
from moe_jax.parallel import sharding


class MoELayer(nnx.Module):
    """Routed experts, and shared ones if asked for, as a module of flax.nnx.

        layer = MoELayer(64, num_experts=8, top_k=2, d_expert=128, rngs=nnx.Rngs(0))
        out = layer(x)                                        # x and out.y: [B, S, 64]
        loss = loss + 0.01 * load_balancing_loss(out.stats)

    It runs on one device without a mesh. Under `jax.set_mesh(make_mesh((data, fsdp, expert)))` its experts are sharded
    and B is split over all devices; make the layer and call it under the same mesh. The statistics are always those of
    the whole batch. A selection bias (`selection_bias=True`) is an `nnx.Variable` that no optimizer updates; see
    `moe_jax.moe.balance.update_bias`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        activation: str = "swiglu",
        init_std: float = 0.02,
        dtype: str = "float32",
        param_dtype: str = "float32",
        balance_groups: int = 1,
        record: bool = False,
        **settings,
    ):
        """
        activation: as `model.activation`. init_std: standard deviation of all weights.
        dtype: of x, y and the experts' matrix products, "float32" or "bfloat16". The router computes in float32.
        balance_groups: number of groups that `group` of a call may name.
        record: whether the output has the choices of every token.
        settings: fields of `MoEConfig`, such as num_experts, top_k and d_expert.

        Raises ConfigError for a setting, TypeError without nnx.Rngs, ValueError for a mesh of another form.
        """
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"MoELayer: rngs must be nnx.Rngs, such as nnx.Rngs(0), not {type(rngs).__name__}")
        sizes = _mesh_sizes()
        named = {"d_model": d_model, "activation": activation, "init_std": init_std, "param_dtype": param_dtype}
        model = build_model(named | {"compute_dtype": dtype, "moe": settings})
        experts, parts = model.moe.num_experts, sizes.get("expert", 1)
        if low := model.moe.pool_min:
            raise ConfigError("model.moe.pool_min", low, "needs documents, which the layer alone does not know",
                              "nearest valid: 0")  # fmt: skip
        for name in ("label_groups", "routers"):
            value = getattr(model.moe, name)
            require(value == 1, f"model.moe.{name}", value, "needs labels, which the layer alone does not know",
                    "nearest valid: 1")  # fmt: skip
        if experts % parts:
            rule = f"must be a multiple of the {parts} devices of the mesh's axis 'expert'"
            raise ConfigError("model.moe.num_experts", experts, rule, f"nearest valid: {-(-experts // parts) * parts}")
        init = Init(rngs, init_std, dtype=param_dtype)
        program = _program(model, parts, balance_groups, record)
        self.d_model, self.dtype, self.groups = d_model, dtype, balance_groups
        self.moe = MoE(model, Kind("moe", experts), init, init_std, program)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        counted: Bool[Array, "B S"] | None = None,
        group: Int[Array, "B S"] | None = None,
        state: Float[Array, "B S R"] | None = None,
    ) -> MoEOutput:
        """Applies the layer.

        counted: False for padding, which uses no expert and enters no statistic. group: balance group of each token.
        state: `state` of the output of the layer before, for router="mlp"; None in the first layer.
        """
        x = jnp.asarray(x)
        self._check(x)
        counted = jnp.ones(x.shape[:2], bool) if counted is None else jnp.asarray(counted)
        group = jnp.zeros(x.shape[:2], jnp.int32) if group is None else jnp.asarray(group)
        if state is None and ROUTERS[self.moe.cfg.router].has_state:
            state = jnp.zeros((*x.shape[:2], self.moe.cfg.router_width), jnp.float32)
        self._check_tokens(x, counted, group, state)
        if sharding.current_sizes() and not isinstance(x, jax.core.Tracer):
            return _jitted(self, x, counted, group, state)  # JAX cannot run it on a mesh operation by operation
        try:
            return self._apply(x, counted, group, state)
        except NotImplementedError as error:  # under vmap or grad alone
            raise ValueError(f"MoELayer: on a mesh call it inside jax.jit or nnx.jit ({error})") from error

    def _apply(self, x, counted, group, state):
        split, counted, group, state = (_by_sequence(a) for a in (x.astype(self.dtype), counted, group, state))
        out = self.moe(split, TokenInfo(counted, group), state=state)
        if sharding.current_sizes():  # y lies where x does, so that the two can be added
            out = out._replace(y=jax.sharding.reshard(out.y, jax.typeof(x).sharding.spec))
        return out

    def _check(self, x: Array) -> None:
        """Raises ValueError for an input that does not fit the layer or the mesh."""
        sizes = _mesh_sizes()
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            hint = "; x[None] is a batch of one sequence" if x.ndim == 2 else ""
            raise ValueError(f"MoELayer: x must have the shape [B, S, {self.d_model}], not {list(x.shape)}{hint}")
        if not x.size:
            raise ValueError(f"MoELayer: x has no tokens: its shape is {list(x.shape)}")
        devices = math.prod(sizes.values())
        if x.shape[0] % devices:
            valid = -(-x.shape[0] // devices) * devices
            rule = f"the {x.shape[0]} sequences of x must be a multiple of the {devices} devices of the mesh"
            raise ValueError(f"MoELayer: {rule}; nearest valid: {valid}")
        made = dict(jax.typeof(self.moe.w_up[...]).sharding.mesh.shape)
        if made != sizes:
            of = lambda sizes: f"the mesh {sizes}" if sizes else "no mesh"
            rule = "make the layer and call it under the same jax.set_mesh(make_mesh(…))"
            raise ValueError(f"MoELayer: made with {of(made)}, but called with {of(sizes)}; {rule}")

    def _check_tokens(self, x: Array, counted: Array, group: Array, state: Array | None) -> None:
        """Raises ValueError for an operand that does not fit x's tokens. Groups are looked at where they are known."""
        shapes = {"counted": (counted, x.shape[:2]), "group": (group, x.shape[:2])}
        if state is not None:
            shapes["state"] = state, (*x.shape[:2], self.moe.cfg.router_width)
        for name, (a, shape) in shapes.items():
            if a.shape != shape:
                raise ValueError(f"MoELayer: {name} must have the shape {shape} for x's tokens, not {a.shape}")
        if not jnp.issubdtype(group.dtype, jnp.integer):
            raise ValueError(f"MoELayer: group must hold whole numbers, not {group.dtype}")
        if not isinstance(group, jax.core.Tracer) and not (0 <= group.min() and group.max() < self.groups):
            raise ValueError(f"MoELayer: group must be ≥ 0 and < balance_groups={self.groups}")


_jitted = nnx.jit(MoELayer._apply)


def _mesh_sizes() -> dict[str, int]:
    """The sizes of the axes of the mesh in use; {} without one. Raises ValueError for one not made by `make_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if tuple(kinds) != sharding.AXES or any(kind != AxisType.Explicit for kind in kinds.values()):
        shown = ", ".join(f"{name} ({kind.name})" for name, kind in kinds.items())
        rule = f"needs a mesh with the Explicit axes {', '.join(sharding.AXES)}, outside any shard_map"
        raise ValueError(f"MoELayer {rule}; the mesh in use has {shown}; nearest valid: make_mesh((1, 1, {mesh.size}))")
    return dict(mesh.shape)


def _by_sequence(a: Array | None) -> Array | None:
    """The array with its sequences split over the mesh, if there is one."""
    if a is None or not sharding.current_sizes():
        return None if a is None else jnp.asarray(a)
    return jax.sharding.reshard(jnp.asarray(a), PartitionSpec(sharding.AXES, *[None] * (a.ndim - 1)))


def _program(model: ModelConfig, peers: int, balance_groups: int, record: bool) -> Program:
    """The back ends for this machine's devices."""
    device, itemsize = jax.devices()[0], jnp.dtype(model.compute_dtype).itemsize
    where = device.platform, device.device_kind
    check_grouped_matmul(model, *where)
    matmul, _ = choose_backend(model.moe.grouped_matmul, *where, model.compute_dtype)
    exchange, _ = choose_exchange(model.moe, where[0], peers, model.expert_dim, 1, itemsize, where[1])
    return Program(exchange=exchange, grouped_matmul=matmul, balance_groups=balance_groups, record=record)
