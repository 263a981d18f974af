"""Rounds the weights of a Mixture of Experts to few bits.

    python -m moe_jax.quant --from=runs/moe --workdir=runs/moe3 --bits=3
    python -m moe_jax.quant --from=runs/moe --workdir=runs/moe4 --method=rtn --bits=4 --group=64
    python eval.py --workdir=runs/moe3

The new run directory holds the rounded weights in their dtype, and quant.json, which has the bits of every matrix and
the bytes that it takes when packed. docs/quantisation.md explains the options.
"""

import jax
from absl import flags

from moe_jax import cli
from moe_jax.errors import ConfigError, UserError
from moe_jax.quant import convert
from moe_jax.quant.allocate import SCOPES
from moe_jax.quant.convert import Settings

FROM = cli.define_path("from", None, "run directory, RUN or RUN@STEP", required=True)
WORKDIR = cli.define_path("workdir", None, "run directory to make", required=True)
METHOD = flags.DEFINE_enum("method", Settings.method, ["rtn", "gptq"], "round to nearest, or GPTQ")
BITS = flags.DEFINE_float("bits", Settings.bits, "mean bits of the weights of routed experts, without scales")
CHOICES = flags.DEFINE_list(
    "choices", [], "bits that --allocate may give; default: whole numbers at most 1.5 from --bits"
)
ALLOCATE = flags.DEFINE_enum("allocate", Settings.allocate, convert.ALLOCATE, "which experts get more bits than others")
SCOPE = flags.DEFINE_enum(
    "scope", Settings.scope, SCOPES, "whether --allocate gives every layer the same mean, or the model as a whole"
)
GROUP = flags.DEFINE_integer("group", Settings.group, "inputs of a matrix that share a scale")
SYMMETRIC = flags.DEFINE_bool("symmetric", Settings.symmetric, "grids around 0, without a stored zero")
ATTENTION_BITS = flags.DEFINE_integer("attention_bits", Settings.attention_bits, "bits of attention; 16: as it is")
DENSE_BITS = flags.DEFINE_integer(
    "dense_bits", Settings.dense_bits, "bits of dense layers, shared experts and latent projections; 16: as they are"
)
CALIBRATE = flags.DEFINE_string(
    "calibrate",
    Settings.calibrate,
    "sources of the run, NAME,NAME, or a path or glob of text files; default: all sources",
)
ROWS = flags.DEFINE_integer("rows", Settings.rows, "rows of calibration text, each as long as a sequence in training")
SEED = flags.DEFINE_integer("seed", Settings.seed, "seed that decides which rows")
GATED = flags.DEFINE_bool("gated", Settings.gated, "weight the rows of an expert by its combine weight (MoEQuant)")
SMOOTH = flags.DEFINE_bool(
    "smooth", Settings.smooth, "move factors from what experts and routers read into their matrices first (EAQuant)"
)
BALANCE = flags.DEFINE_bool(
    "balance", Settings.balance, "calibrate experts on at most twice, and at least a tenth of, an equal share of tokens"
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of several processes (pods, clusters); see docs/scaling.md")

FIELDS = (
    METHOD, BITS, ALLOCATE, SCOPE, GROUP, SYMMETRIC, ATTENTION_BITS, DENSE_BITS, CALIBRATE, ROWS, SEED, GATED, SMOOTH,
    BALANCE,
)  # fmt: skip


def settings() -> Settings:
    """The settings that the command line asks for. Raises UserError."""
    try:
        choices = tuple(int(n) for n in CHOICES.value)
    except ValueError:
        raise UserError(f"--choices={','.join(CHOICES.value)}: must be whole numbers, such as 1,2,3") from None
    return Settings(choices=choices, **{flag.name: flag.value for flag in FIELDS})


def main(argv):
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    if DISTRIBUTED.value:
        cli.join_processes()
    first = jax.process_index() == 0
    echo = print if first else lambda *_: None
    try:
        convert.quantise(FROM.value, WORKDIR.value, settings(), progress=first, echo=echo)
    except ConfigError as e:
        if not e.name.startswith("quant."):
            raise
        value = ",".join(map(str, e.value)) if isinstance(e.value, tuple) else e.value
        raise UserError(f"--{e.name.removeprefix('quant.')}={value}: {e.rule}; {e.hint}") from None


if __name__ == "__main__":
    cli.run(main)
