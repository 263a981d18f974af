"""Makes a Mixture of Experts from a dense model, or from another Mixture of Experts.

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/moe --expansion=8 --granularity=8 --top_k=8 \\
        --choice=shards
    python -m moe_jax.upcycle --from=runs/moe --workdir=runs/small --prune=32

The new run directory holds weights and their origin. Train them with `--config.init_from=runs/moe`. By default the new
model computes the dense model's function. docs/upcycling.md tells how each option changes that.
"""

import jax
from absl import flags

from moe_jax import cli
from moe_jax.errors import ConfigError, UserError
from moe_jax.upcycle.bank import Grow, Merge, Prune
from moe_jax.upcycle.chain import Transform
from moe_jax.upcycle.cluster import Cluster
from moe_jax.upcycle.convert import convert
from moe_jax.upcycle.dense import Beside, Importance
from moe_jax.upcycle.diversify import Drop, Mask, Noise
from moe_jax.upcycle.experts import SCALES, VirtualGroups
from moe_jax.upcycle.growth import Depth, Width
from moe_jax.upcycle.quantize import Quantize

FROM = cli.define_paths("from", None, "run directories, RUN or RUN@STEP; several are averaged", required=True)
WORKDIR = cli.define_path("workdir", None, "run directory to make", required=True)
METHODS = ("virtual_groups", "cluster", "beside", "importance", "merge", "none")
METHOD = flags.DEFINE_enum(
    "method", None, METHODS,
    "experts from copies, from clusters of hidden units (EMoE), beside the dense layers, from their most important "
    "units (MoEBERT), one from each of several models, or no new ones; default: none with --prune or --grow, else "
    "virtual_groups",
)  # fmt: skip
WEIGHTS = flags.DEFINE_list("weights", None, "of the run directories in their average, divided by their sum")
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
CHOICE = flags.DEFINE_enum("choice", "copies", ["copies", "shards"],
                           "a token takes the top_k best of all experts, or top_k/G of each shard")  # fmt: skip
COMBINE = flags.DEFINE_enum("combine", "score", ["score", "share"],
                            "combine weights: scores, or with --choice=shards shares of each shard's")  # fmt: skip
ROUTER_STD = flags.DEFINE_float("router_std", 0.02, "standard deviation of the new router")
SHARED = flags.DEFINE_integer("num_shared_experts", 0, "experts that every token uses, a multiple of G")
SELECTION_BIAS = flags.DEFINE_bool("selection_bias", False, "add a bias for loss-free balancing, zero at first")
# other methods, and several
NUM_EXPERTS = flags.DEFINE_integer(
    "num_experts", None, "experts of each layer; default: 64 clusters, 8 beside a dense layer, 4 of important units"
)
D_EXPERT = flags.DEFINE_integer("d_expert", 0, "hidden width of an expert; default: as wide as there is room for")
INIT = flags.DEFINE_enum("init", "zero", ["zero", "copy"], "experts beside a dense layer: they add 0, or are copies")
UNITS = flags.DEFINE_integer("shared", 0, "most important hidden units, which every expert gets")
TOP_K = flags.DEFINE_integer(
    "top_k", None,
    "experts of a token; default: 2·G, a quarter of the clusters, 2 beside a dense layer, 1 of important units, all "
    "that merged models use together",
)  # fmt: skip
DENSE_LAYERS = flags.DEFINE_integer("dense_layers", 0, "number of layers at the start that stay dense")
LAYERS = flags.DEFINE_string("layers", "", "which layers get experts, such as '6*(dense moe)'; see docs/layers.md")
# models that have experts
PRUNE = flags.DEFINE_integer("prune", 0, "number of experts to keep, those that are used most; 0: all")
GROW = flags.DEFINE_integer("grow", 0, "number of experts to grow to by mixtures of the old ones; 0: unchanged")
SCORES = flags.DEFINE_string(
    "scores", "",
    "for --prune a run directory with eval.json, or such a file; default: --from. For --method=importance a NumPy file "
    "of an array [layers, hidden units]; default: computed on training text",
)  # fmt: skip
SEQUENCES = flags.DEFINE_integer("score_sequences", 64, "sequences of training text for that computation", 1)
# after the experts are made
MASK = flags.DEFINE_float("mask", 0.0, "share of each expert's weights that is set to 0 (EvoMoE)")
NOISE = flags.DEFINE_float("noise", 0.0, "standard deviation of noise on the experts, relative to that of each matrix")
DROP = flags.DEFINE_float("drop", 0.0, "Drop-Upcycling: share of each expert's hidden units that is drawn again")
SHARED_INDICES = flags.DEFINE_bool("shared_indices", True, "draw the same units in gate, up and down")
EXPERT_WEIGHTS = flags.DEFINE_enum(
    "expert_weights", None, ["float", "ternary"], "any values, or three a matrix; default: as they are"
)
EXPERT_INPUTS = flags.DEFINE_enum(
    "expert_inputs", None, ["float", "int8"], "any values, or 255 for each row; default: as they are"
)
# before
DEPTH = flags.DEFINE_integer("depth", 0, "number of layers to grow or shrink to; 0: unchanged")
DEPTH_ORDER = flags.DEFINE_enum("depth_order", "interpolate", ["interpolate", "stack"], "where the copies go")
DEPTH_NEW = flags.DEFINE_enum("depth_new", "copy", ["copy", "identity"], "new layers: copies, or the identity at first")
WIDTH = flags.DEFINE_integer("width", 0, "d_model to grow to, a multiple of the old one; 0: unchanged")
D_FF = flags.DEFINE_integer("d_ff", 0, "hidden width to grow to; 0: unchanged")
HEADS = flags.DEFINE_integer("heads", 0, "heads to grow to, a multiple of the old number; 0: unchanged")
AKI = flags.DEFINE_bool("aki", False, "new units come from the next layer; they are no copies, which keep the function")


def _uses(*names: str) -> tuple:
    """Whether one of these methods is asked for, and their names, for `NEEDS`."""
    words = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return lambda: method() in names, f"--method={words}"


# Options that have an effect only with another one: (options, whether it is there, its name).
NEEDS = (
    ((EXPANSION, GRANULARITY, SCALE, CHOICE, COMBINE, SHARED), *_uses("virtual_groups")),
    ((SCORE, ORDER, RENORMALIZE, ROUTED_SCALING, SELECTION_BIAS), *_uses("virtual_groups", "beside")),
    ((ROUTER_STD,), *_uses("virtual_groups", "beside", "importance", "merge")),
    ((NUM_EXPERTS,), *_uses("cluster", "beside", "importance")),
    ((D_EXPERT,), *_uses("beside", "importance")),
    ((INIT,), *_uses("beside")),
    ((UNITS,), *_uses("importance")),
    ((TOP_K, DENSE_LAYERS, LAYERS), *_uses(*METHODS[:-1])),
    ((SCORES,), lambda: PRUNE.value or method() == "importance", "--prune or --method=importance"),
    ((SEQUENCES,), lambda: method() == "importance" and not SCORES.value, "--method=importance, without --scores"),
    ((WEIGHTS,), lambda: len(FROM.value) > 1 and method() != "merge", "several run directories that are averaged"),
    ((SHARED_INDICES,), lambda: DROP.value, "--drop"),
    ((DEPTH_ORDER, DEPTH_NEW), lambda: DEPTH.value, "--depth"),
    ((AKI,), lambda: WIDTH.value or D_FF.value or HEADS.value, "--width, --d_ff or --heads"),
)


def method() -> str:
    """The method that the command line asks for."""
    return METHOD.value or ("none" if PRUNE.value or GROW.value else "virtual_groups")


def chain_of_flags() -> list[Transform]:
    """The transforms that the command line asks for, in the order in which they apply."""
    chain: list[Transform] = []
    if method() == "merge":
        fields = {"router_std": ROUTER_STD.value, "dense_layers": DENSE_LAYERS.value, "layers": LAYERS.value}
        chain.append(Merge(sources=len(FROM.value), top_k=_given(TOP_K, 0), **fields))
    pruned = [Prune(num_experts=PRUNE.value)] if PRUNE.value else []
    if method() == "none":  # counts are those of the model that is read
        chain += pruned
    if WIDTH.value or D_FF.value or HEADS.value:
        wide = {"d_model": WIDTH.value, "d_ff": D_FF.value, "num_heads": HEADS.value}
        chain.append(Width(**wide, aki=AKI.value))  # before the copies of layers: AKI reads the next one
    if DEPTH.value:
        chain.append(Depth(num_layers=DEPTH.value, order=DEPTH_ORDER.value, new=DEPTH_NEW.value))
    if method() in MAKERS:
        chain.append(MAKERS[method()]())
    if NOISE.value:
        chain.append(Noise(std=NOISE.value))
    if DROP.value:
        chain.append(Drop(ratio=DROP.value, shared_indices=SHARED_INDICES.value))
    if MASK.value:
        chain.append(Mask(share=MASK.value))
    if method() != "none":
        chain += pruned
    if GROW.value:
        chain.append(Grow(num_experts=GROW.value))
    if EXPERT_WEIGHTS.value or EXPERT_INPUTS.value:
        chain.append(Quantize(EXPERT_WEIGHTS.value, EXPERT_INPUTS.value))
    return chain


def _given(flag: flags.FlagHolder, default: int) -> int:
    return default if flag.value is None else flag.value


def _layers() -> dict:
    return {"dense_layers": DENSE_LAYERS.value, "layers": LAYERS.value}


def _routing() -> dict:
    names = (SCORE, ORDER, RENORMALIZE, ROUTED_SCALING)
    return {flag.name: flag.value for flag in names}


def _virtual_groups() -> VirtualGroups:
    return VirtualGroups(
        expansion=EXPANSION.value,
        granularity=GRANULARITY.value,
        top_k=_given(TOP_K, 2 * GRANULARITY.value),
        scale=SCALE.value,
        choice=CHOICE.value,
        combine=COMBINE.value,
        router_std=ROUTER_STD.value,
        num_shared_experts=SHARED.value,
        moe={"selection_bias": True} if SELECTION_BIAS.value else {},
        **_routing(),
        **_layers(),
    )


def _cluster() -> Cluster:
    clusters = _given(NUM_EXPERTS, 64)
    return Cluster(num_experts=clusters, top_k=_given(TOP_K, max(1, clusters // 4)), **_layers())


def _beside() -> Beside:
    experts = _given(NUM_EXPERTS, 8)
    return Beside(
        num_experts=experts,
        d_expert=D_EXPERT.value,
        top_k=_given(TOP_K, min(2, experts)),
        init=INIT.value,
        router_std=ROUTER_STD.value,
        moe=_routing() | ({"selection_bias": True} if SELECTION_BIAS.value else {}),
        **_layers(),
    )


def _importance() -> Importance:
    return Importance(
        num_experts=_given(NUM_EXPERTS, 4),
        shared=UNITS.value,
        d_expert=D_EXPERT.value,
        top_k=_given(TOP_K, 1),
        router_std=ROUTER_STD.value,
        **_layers(),
    )


MAKERS = {
    "virtual_groups": _virtual_groups, "cluster": _cluster, "beside": _beside, "importance": _importance,
}  # fmt: skip


def check_options() -> None:
    """Raises UserError for an option that has no effect with the others."""
    for options, fits, need in NEEDS:
        for option in options:
            if option.present and not fits():
                value = ",".join(option.value) if isinstance(option.value, list) else option.value
                raise UserError(f"--{option.name}={value}: has no effect without {need}")


def main(argv):
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    check_options()
    if DISTRIBUTED.value:
        cli.join_processes()
    echo = print if jax.process_index() == 0 else lambda *_: None
    try:
        shares = None if WEIGHTS.value is None else [float(w) for w in WEIGHTS.value]
    except ValueError:
        raise UserError(f"--weights={','.join(WEIGHTS.value)}: must be numbers, one for each --from") from None
    options = {"seed": SEED.value, "check": CHECK.value, "echo": echo, "shares": shares, "scores": SCORES.value}
    try:
        convert(FROM.value, WORKDIR.value, chain_of_flags(), score_sequences=SEQUENCES.value, **options)
    except ConfigError as e:
        name = e.name.removeprefix("upcycle.")
        if name == e.name:
            raise
        value = ",".join(FROM.value) if name == "from" else ",".join(WEIGHTS.value) if name == "weights" else e.value
        raise UserError(f"--{name}={value}: {e.rule}; {e.hint}") from None


if __name__ == "__main__":
    cli.run(main)
