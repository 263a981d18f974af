"""Makes a Mixture of Experts from a dense model.

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/moe --expansion=8 --granularity=8 --top_k=8

The new run directory holds weights and their origin. Train them with `--config.init_from=runs/moe`. By default the new
model computes the dense model's function. docs/upcycling.md tells how each option changes that.
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
SEED = flags.DEFINE_integer("seed", 0, "seed of routers, noise and hidden units that are drawn again", 0)
CHECK = flags.DEFINE_bool("check", True, "run the model before and after, and print the relative error of the logits")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of several processes (pods, clusters); see docs/scaling.md")

# virtual_groups
EXPANSION = flags.DEFINE_integer("expansion", 8, "copies of each dense layer")
GRANULARITY = flags.DEFINE_integer("granularity", 1, "G: experts into which a copy is cut")
SCALE = flags.DEFINE_enum("scale", "exact", list(SCALES), "how experts are scaled, since a token uses few")
SCORE = flags.DEFINE_enum("score", "softmax", ["softmax", "sigmoid"], "function that makes the router's scores")
ORDER = flags.DEFINE_enum(
    "score_order", "topk_score", ["topk_score", "score_topk"], "softmax over the chosen, or all experts"
)
RENORMALIZE = flags.DEFINE_bool("renormalize", False, "combine weights of a token sum to 1")
ROUTED_SCALING = flags.DEFINE_float("routed_scaling", 1.0, "factor of the combine weights")
ROUTER_STD = flags.DEFINE_float("router_std", 0.02, "standard deviation of the new router")
SHARED = flags.DEFINE_integer("num_shared_experts", 0, "experts that every token uses, a multiple of G")
SELECTION_BIAS = flags.DEFINE_bool("selection_bias", False, "add a bias for loss-free balancing, zero at first")
# cluster, and both
NUM_EXPERTS = flags.DEFINE_integer("num_experts", 64, "clusters of each dense layer")
TOP_K = flags.DEFINE_integer("top_k", None, "experts of a token; default: 2·G, or a quarter of the clusters")
DENSE_LAYERS = flags.DEFINE_integer("dense_layers", 0, "number of layers at the start that stay dense")
LAYERS = flags.DEFINE_string("layers", "", "which layers get experts, such as '6*(dense moe)'; see docs/layers.md")
# after the experts are made
NOISE = flags.DEFINE_float("noise", 0.0, "standard deviation of noise on the experts, relative to that of each matrix")
DROP = flags.DEFINE_float("drop", 0.0, "Drop-Upcycling: share of each expert's hidden units that is drawn again")
SHARED_INDICES = flags.DEFINE_bool("shared_indices", True, "draw the same units in gate, up and down")
# before
DEPTH = flags.DEFINE_integer("depth", 0, "number of layers to grow to; 0: unchanged")
DEPTH_ORDER = flags.DEFINE_enum("depth_order", "interpolate", ["interpolate", "stack"], "where the copies go")
DEPTH_NEW = flags.DEFINE_enum("depth_new", "copy", ["copy", "identity"], "new layers: copies, or the identity at first")
WIDTH = flags.DEFINE_integer("width", 0, "d_model to grow to, a multiple of the old one; 0: unchanged")
D_FF = flags.DEFINE_integer("d_ff", 0, "hidden width to grow to; 0: unchanged")
HEADS = flags.DEFINE_integer("heads", 0, "heads to grow to, a multiple of the old number; 0: unchanged")

# Options that have an effect only with another one: (options, whether it is there, its name).
NEEDS = (
    ((EXPANSION, GRANULARITY, SCALE, SCORE, ORDER, RENORMALIZE, ROUTED_SCALING, ROUTER_STD, SHARED, SELECTION_BIAS),
     lambda: METHOD.value == "virtual_groups", "--method=virtual_groups"),
    ((NUM_EXPERTS,), lambda: METHOD.value == "cluster", "--method=cluster"),
    ((TOP_K, DENSE_LAYERS, LAYERS, NOISE, DROP), lambda: METHOD.value != "none", "--method=virtual_groups or cluster"),
    ((SHARED_INDICES,), lambda: DROP.value, "--drop"),
    ((DEPTH_ORDER, DEPTH_NEW), lambda: DEPTH.value, "--depth"),
)  # fmt: skip


def chain_of_flags() -> list[Transform]:
    """The transforms that the command line asks for, in the order in which they apply."""
    chain: list[Transform] = []
    if DEPTH.value:
        chain.append(Depth(num_layers=DEPTH.value, order=DEPTH_ORDER.value, new=DEPTH_NEW.value))
    if WIDTH.value or D_FF.value or HEADS.value:
        chain.append(Width(d_model=WIDTH.value, d_ff=D_FF.value, num_heads=HEADS.value))
    if METHOD.value == "virtual_groups":
        chosen = 2 * GRANULARITY.value if TOP_K.value is None else TOP_K.value
        groups = VirtualGroups(
            expansion=EXPANSION.value,
            granularity=GRANULARITY.value,
            top_k=chosen,
            scale=SCALE.value,
            score=SCORE.value,
            score_order=ORDER.value,
            renormalize=RENORMALIZE.value,
            routed_scaling=ROUTED_SCALING.value,
            router_std=ROUTER_STD.value,
            dense_layers=DENSE_LAYERS.value,
            layers=LAYERS.value,
            num_shared_experts=SHARED.value,
            moe={"selection_bias": True} if SELECTION_BIAS.value else {},
        )
        chain.append(groups)
    if METHOD.value == "cluster":
        chosen = max(1, NUM_EXPERTS.value // 4) if TOP_K.value is None else TOP_K.value
        which = {"dense_layers": DENSE_LAYERS.value, "layers": LAYERS.value}
        chain.append(Cluster(num_experts=NUM_EXPERTS.value, top_k=chosen, **which))
    if NOISE.value:
        chain.append(Noise(std=NOISE.value))
    if DROP.value:
        chain.append(Drop(ratio=DROP.value, shared_indices=SHARED_INDICES.value))
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
    echo = print if jax.process_index() == 0 else lambda *_: None
    try:
        convert(FROM.value, WORKDIR.value, chain_of_flags(), seed=SEED.value, check=CHECK.value, echo=echo)
    except ConfigError as e:
        name = e.name.removeprefix("upcycle.")
        if name == e.name:
            raise
        value = ",".join(FROM.value) if name == "from" else e.value
        raise UserError(f"--{name}={value}: {e.rule}; {e.hint}") from None


if __name__ == "__main__":
    cli.run(main)
