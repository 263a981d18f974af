"""Make a Mixture of Experts of a dense model.

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/moe --expansion=8 --granularity=8 --top_k=8

The new run directory holds weights and how they came to be. Train them with `--config.init_from=runs/moe`. By default
the model made computes the dense model's function; what each option does to that: docs/upcycling.md.
"""

import jax
from absl import flags

from moe_jax import cli
from moe_jax.errors import ConfigError, UserError
from moe_jax.upcycle.chain import Transform
from moe_jax.upcycle.cluster import Cluster
from moe_jax.upcycle.convert import convert
from moe_jax.upcycle.experts import SCALES, Drop, Noise, VirtualGroups
from moe_jax.upcycle.growth import Depth, Width

FROM = cli.define_paths("from", None, "run directories, RUN or RUN@STEP; several are averaged", required=True)
WORKDIR = cli.define_path("workdir", None, "run directory to make", required=True)
METHOD = flags.DEFINE_enum("method", "virtual_groups", ["virtual_groups", "cluster", "none"],
                           "experts from copies, from clusters of hidden units (EMoE), or no experts")  # fmt: skip
SEED = flags.DEFINE_integer("seed", 0, "of routers, noise and what is drawn anew", 0)
CHECK = flags.DEFINE_bool("check", True, "run the model before and after, and say how far the logits are apart")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of several processes (pods, clusters); see docs/scaling.md")

# virtual_groups
EXPANSION = flags.DEFINE_integer("expansion", 8, "E: copies of each dense layer")
GRANULARITY = flags.DEFINE_integer("granularity", 1, "G: experts that a copy is cut into")
SCALE = flags.DEFINE_enum("scale", "exact", list(SCALES), "what makes up for the smaller sum of experts")
SCORE = flags.DEFINE_enum("score", "softmax", ["softmax", "sigmoid"], "of the router")
ORDER = flags.DEFINE_enum("score_order", "topk_score", ["topk_score", "score_topk"], "softmax over the chosen, or all")
RENORMALIZE = flags.DEFINE_bool("renormalize", False, "combine weights of a token sum to 1")
ROUTED_SCALING = flags.DEFINE_float("routed_scaling", 1.0, "factor of the combine weights")
ROUTER_STD = flags.DEFINE_float("router_std", 0.02, "standard deviation of the new router")
SHARED = flags.DEFINE_integer("num_shared_experts", 0, "experts that are always on, a multiple of G")
SELECTION_BIAS = flags.DEFINE_bool("selection_bias", False, "with a bias for loss-free balancing, zero at first")
# cluster, and both
NUM_EXPERTS = flags.DEFINE_integer("num_experts", 64, "clusters of each dense layer")
TOP_K = flags.DEFINE_integer("top_k", None, "T: experts a token; default: 2·G, or a quarter of the clusters")
DENSE_LAYERS = flags.DEFINE_integer("dense_layers", 0, "the first so many layers stay dense; no other pattern exists")
# after the experts are made
NOISE = flags.DEFINE_float("noise", 0.0, "on the experts, relative to each matrix")
DROP = flags.DEFINE_float("drop", 0.0, "Drop-Upcycling: share of each expert's hidden units that is drawn anew")
SHARED_INDICES = flags.DEFINE_bool("shared_indices", True, "the same units in gate, up and down")
# before
DEPTH = flags.DEFINE_integer("depth", 0, "number of layers to grow to; 0: as it is")
DEPTH_ORDER = flags.DEFINE_enum("depth_order", "interpolate", ["interpolate", "stack"], "where the copies go")
DEPTH_NEW = flags.DEFINE_enum("depth_new", "copy", ["copy", "identity"], "identity: they add nothing yet")
WIDTH = flags.DEFINE_integer("width", 0, "d_model to grow to, a multiple; 0: as it is")
D_FF = flags.DEFINE_integer("d_ff", 0, "hidden width to grow to; 0: as it is")
HEADS = flags.DEFINE_integer("heads", 0, "heads to grow to, a multiple; 0: as it is")

# What only makes sense with something else: (these options, need, in words).
NEEDS = (
    ((EXPANSION, GRANULARITY, SCALE, SCORE, ORDER, RENORMALIZE, ROUTED_SCALING, ROUTER_STD, SHARED, SELECTION_BIAS),
     lambda: METHOD.value == "virtual_groups", "--method=virtual_groups"),
    ((NUM_EXPERTS,), lambda: METHOD.value == "cluster", "--method=cluster"),
    ((TOP_K, DENSE_LAYERS, NOISE, DROP), lambda: METHOD.value != "none", "--method=virtual_groups or cluster"),
    ((SHARED_INDICES,), lambda: DROP.value, "--drop"),
    ((DEPTH_ORDER, DEPTH_NEW), lambda: DEPTH.value, "--depth"),
)  # fmt: skip


def chain_of_flags() -> list[Transform]:
    chain: list[Transform] = []
    if DEPTH.value:
        chain.append(Depth(DEPTH.value, DEPTH_ORDER.value, DEPTH_NEW.value))
    if WIDTH.value or D_FF.value or HEADS.value:
        chain.append(Width(WIDTH.value, D_FF.value, HEADS.value))
    if METHOD.value == "virtual_groups":
        chosen = 2 * GRANULARITY.value if TOP_K.value is None else TOP_K.value
        chain.append(VirtualGroups(
            EXPANSION.value, GRANULARITY.value, chosen, SCALE.value, SCORE.value, ORDER.value, RENORMALIZE.value,
            ROUTED_SCALING.value, ROUTER_STD.value, DENSE_LAYERS.value, SHARED.value,
            {"selection_bias": True} if SELECTION_BIAS.value else {},
        ))  # fmt: skip
    if METHOD.value == "cluster":
        chosen = max(1, NUM_EXPERTS.value // 4) if TOP_K.value is None else TOP_K.value
        chain.append(Cluster(NUM_EXPERTS.value, chosen, DENSE_LAYERS.value))
    if NOISE.value:
        chain.append(Noise(NOISE.value))
    if DROP.value:
        chain.append(Drop(DROP.value, SHARED_INDICES.value))
    return chain


def main(argv):
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    for options, fits, need in NEEDS:
        for option in options:
            if option.present and not fits():
                raise UserError(f"--{option.name}={option.value}: has no effect without {need}")
    if DISTRIBUTED.value:
        cli.join_processes()
    say = print if jax.process_index() == 0 else lambda *_: None
    try:
        convert(FROM.value, WORKDIR.value, chain_of_flags(), seed=SEED.value, check=CHECK.value, say=say)
    except ConfigError as e:
        name = e.name.removeprefix("upcycle.")
        if name == e.name:
            raise
        value = ",".join(FROM.value) if name == "from" else e.value
        raise UserError(f"--{name}={value}: {e.rule}; {e.hint}") from None


if __name__ == "__main__":
    cli.run(main)
