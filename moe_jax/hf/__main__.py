"""Imports a model into a run directory, or exports a run.

    python -m moe_jax.hf import --from=DIR --workdir=runs/a       config.json and safetensors, or a .gguf file
    python -m moe_jax.hf import --from=DIR --workdir=runs/a --mtp             with its layers of multi-token prediction
    python -m moe_jax.hf export --workdir=runs/a --to=DIR         for transformers' from_pretrained; adapters are merged
    python -m moe_jax.hf export --workdir=runs/a --to=model.gguf --dtype=q8_0 --experts_dtype=q4_0            as GGUF
    python -m moe_jax.hf export --workdir=runs/a --to=DIR --adapter           the adapters of a run alone, for PEFT
    python -m moe_jax.hf import --from=DIR --base=runs/b --workdir=runs/a     adapters that PEFT wrote

After an import run `python eval.py --workdir=runs/a`, or train from it with --config.init_from=runs/a
(docs/checkpoints.md). Adapters that were imported are trained on with the fields that import prints.
"""

from pathlib import Path

from absl import flags

from moe_jax import cli
from moe_jax.errors import UserError
from moe_jax.hf import peft
from moe_jax.hf.convert import export_run, import_model
from moe_jax.hf.gguf_export import TYPES, export_gguf
from moe_jax.hf.peft import export_adapter
from moe_jax.hf.peft_import import import_adapter

WORKDIR = cli.define_path("workdir", None, "run directory; import makes it", required=True)
FROM = cli.define_path("from", None, "import: a directory of config.json and safetensors, or a .gguf file")
TO = cli.define_path("to", None, "export: the directory, or the .gguf file, to make")
SEQ_LEN = flags.DEFINE_integer("seq_len", 0, "import: data.seq_len of the run; 0: the model's length, at most 2048", 0)
BASE = cli.define_path("base", None, "import: the run directory of the base of adapters")
MTP = flags.DEFINE_bool("mtp", False, "import: keep layers of multi-token prediction, a head for training")
ADAPTER = flags.DEFINE_bool("adapter", False, "export: write the adapters of a run as PEFT does, without their base")
STEP = flags.DEFINE_integer("step", None, "export: the checkpoint; default: the newest")
FLOATS = ["float32", "bfloat16", "float16"]
DTYPE = flags.DEFINE_enum("dtype", "", ["", *TYPES], "export: dtype of the files; default: that of the parameters. "
                          "q8_0 to q4_0: of GGUF, in blocks of 32 numbers")  # fmt: skip
EXPERTS_DTYPE = flags.DEFINE_enum(
    "experts_dtype", "", ["", *TYPES], "export to GGUF: dtype of routed experts, if other"
)

WEIGHTS = flags.DEFINE_enum("weights", "trained", ["trained", "ema"],
                            "export: the trained weights, or their average (config.optim.ema)")  # fmt: skip


def main(argv):
    command = argv[1] if len(argv) == 2 else " ".join(argv[1:])
    if command == "import":
        if not FROM.value or TO.value:
            raise UserError("import needs --from=DIR and --workdir=RUN, and no --to")
        _refuse_given("import", "export", "adapter", "step", "dtype", "experts_dtype", "weights")
        adapter = (Path(FROM.value) / peft.CONFIG).is_file()
        if adapter != bool(BASE.value):
            rule = f"--from={FROM.value} has {'an' if adapter else 'no'} {peft.CONFIG}"
            raise UserError(f"{rule}, so import {'needs --base=RUN, its base' if adapter else 'takes no --base'}")
        if adapter and MTP.value:
            raise UserError("an import of adapters takes no --mtp, which keeps layers of a model")
        if adapter:
            import_adapter(FROM.value, BASE.value, WORKDIR.value)
        else:
            import_model(FROM.value, WORKDIR.value, seq_len=SEQ_LEN.value, mtp=MTP.value)
        print(f"next: python eval.py --workdir={WORKDIR.value}")
    elif command == "export":
        if not TO.value or FROM.value:
            raise UserError("export needs --workdir=RUN and --to=DIR, and no --from")
        _refuse_given("export", "import", "base", "seq_len", "mtp")
        average, to_gguf = WEIGHTS.value == "ema", Path(TO.value).suffix == ".gguf"
        if EXPERTS_DTYPE.value and not to_gguf:
            raise UserError(f"--experts_dtype={EXPERTS_DTYPE.value}: needs --to=FILE.gguf")
        if DTYPE.value not in ("", *FLOATS) and not to_gguf:
            raise UserError(f"--dtype={DTYPE.value}: needs --to=FILE.gguf; nearest valid: float16")
        if to_gguf and ADAPTER.value:
            raise UserError(f"--to={TO.value}: adapters are written as a folder, or merged without --adapter")
        if to_gguf:
            export_gguf(WORKDIR.value, TO.value, at=STEP.value, dtype=DTYPE.value, experts_dtype=EXPERTS_DTYPE.value,
                        average=average)  # fmt: skip
            return
        if ADAPTER.value:
            if DTYPE.value not in ("", "float32"):
                raise UserError(f"--dtype={DTYPE.value}: adapters are written in float32")
            export_adapter(WORKDIR.value, TO.value, at=STEP.value, average=average)
            return
        export_run(WORKDIR.value, TO.value, at=STEP.value, dtype=DTYPE.value, average=average)
    else:
        raise UserError(f"unknown command {command!r}; nearest valid: import or export")


def _refuse_given(command: str, other: str, *names: str) -> None:
    """Raises UserError for an option of the other command."""
    for name in names:
        if (flag := flags.FLAGS[name]).present:
            raise UserError(f"{command} takes no --{name}={flag.value}, which is an option of {other}")


if __name__ == "__main__":
    cli.run(main)
