"""Evaluate a run on its held-out text: per-domain table, router statistics, figures, text samples.

    python eval.py --workdir=runs/quickstart

Writes eval.json, analysis.npz, figures/ and sample.txt into the run directory. Files of these names cover all held-out
text and the newest checkpoint. With --batches or another --step the names contain them: eval.200.8batches.json; those
of the average of the weights (--weights=ema) begin with eval.ema, analysis.ema or sample.ema.
"""

import sys
from pathlib import Path

import jax
from absl import flags

from moe_jax import cli, config, data
from moe_jax.errors import UserError
from moe_jax.evaluate import analysis, figures, generate, held_out
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file, log, weights
from moe_jax.train.state import abstract_weights

WORKDIR = cli.define_path("workdir", None, "run directory of train.py", required=True)
STEP = flags.DEFINE_integer("step", None, "checkpoint to evaluate; default: the newest")
EARLIER = flags.DEFINE_integer("earlier", None, "earlier checkpoint of the run to compare the experts' choices with")
LIMIT = flags.DEFINE_integer("batches", 0, "evaluate this many batches, spread over the held-out text; 0: all", 0)
PROMPT = flags.DEFINE_multi_string("prompt", [], "prompt to continue, may be repeated; default: config.sample.prompt")
WEIGHTS = flags.DEFINE_enum(
    "weights", "trained", ["trained", "ema"], "evaluate the trained weights, or their average (config.optim.ema)"
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of several processes (pods, clusters); see docs/scaling.md")


def main(argv):
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    workdir = Path(WORKDIR.value)
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such directory; name one that train.py wrote")
    cfg = config_file.load_config(workdir)
    cli.check_writable(workdir)
    cli.keep_compiled(data.cache_folder() / "compiled")  # a run directory may not name a folder of code
    if DISTRIBUTED.value:
        cli.join_processes()
    echo = print if jax.process_index() == 0 else lambda *_: None

    # --- the run: its checkpoint is restored onto the mesh of this machine, whatever mesh wrote it --------------------
    cfg, shape = config.for_evaluation(cfg, jax.device_count())
    mesh = sharding.make_mesh(shape)
    terminal = jax.process_index() == 0 and sys.stderr.isatty()
    corpus = data.prepare(cfg.data, workdir=workdir, seed=cfg.seed, progress=terminal)
    held_out.check_held_out(corpus)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
        cli.check_earlier(EARLIER.value, STEP.value, steps)
        number, _ = checkpoints.contents(STEP.value)
        before = checkpoints.data_state(number)
    abstract, average = abstract_weights(cfg.model, mesh), WEIGHTS.value == "ema"
    params, bias, _ = weights.load_weights(workdir, *abstract, step=number, average=average)
    earlier = EARLIER.value and weights.load_weights(workdir, *abstract, step=EARLIER.value, average=average)[:2]
    for line in [*corpus.notes(), *data.record.since(before, checkpoint.gather_json(corpus.record()))]:
        echo(line)
    echo(f"{'average of the weights in the ' if average else ''}checkpoint of step {number}, mesh {dict(mesh.shape)}")
    if cfg.model.num_moe_layers and cfg.model.moe.choice == "expert":
        echo("experts choose tokens, later ones too: these losses are not comparable with those of a causal model")

    # --- numbers ------------------------------------------------------------------------------------------------------
    result = held_out.evaluate(
        cfg, mesh, params, bias, corpus, limit=LIMIT.value,
        record=True, earlier=earlier,
    )  # fmt: skip
    suffix, written, drawn = ".ema" * average + held_out.suffix(result, number, steps[-1]), [], []

    def keep(file, write):
        """Writes a result to its file as soon as it exists. Printing comes last, since it may fail."""
        if jax.process_index() == 0:
            write(workdir / file)
            written.append(file)

    keep(f"eval{suffix}.json", lambda path: log.write_text(path, held_out.to_json(number, result, {})))
    sums = result.places, result.router, result.choices, result.domains
    found = analysis.analyse(*sums, cfg.model.moe.top_k, EARLIER.value, cfg.model.moe.identity_experts)
    for bank, one in found.items():
        keep(f"analysis{bank}{suffix}.npz", one.save)

    # --- samples ------------------------------------------------------------------------------------------------------
    prompts = PROMPT.value or [cfg.sample.prompt]
    texts = [generate.sample_text(cfg, mesh, params, bias, corpus.tokenizer, p) for p in prompts]
    keep(f"sample{suffix}.txt", lambda path: log.write_text(path, "\n\n".join(texts) + "\n"))

    # --- compressors, for comparison ----------------------------------------------------------------------------------
    baselines = held_out.compression_bits_per_byte(corpus.validation_texts())
    keep(f"eval{suffix}.json", lambda path: log.write_text(path, held_out.to_json(number, result, baselines)))

    # --- figures ------------------------------------------------------------------------------------------------------
    if jax.process_index() == 0:
        drawn = [
            (f"{name}{bank}{suffix}", figure)
            for bank, one in found.items()
            for name, figure in figures.all_figures(one)
        ]
        if (workdir / "metrics.jsonl").exists():
            drawn.append(("loss", figures.training(workdir)))
        (workdir / "figures").mkdir(exist_ok=True)
        for name, figure in drawn:
            figure.savefig(workdir / "figures" / f"{name}.png", dpi=160)

    # --- what is printed ----------------------------------------------------------------------------------------------
    echo("\nbits per byte of the held-out text: the model and general-purpose compressors")
    echo(held_out.table(result, baselines))
    for bank, one in found.items():
        echo(f"\nthe router on the same text{', layers with ' + bank[1:] + ' experts' if bank else ''}")
        echo(analysis.layer_table(one))
    for text in texts:
        echo(f"\nsample\n{text}")
    files = ", ".join(dict.fromkeys(written))
    echo(f"\nwritten in {workdir}: {files}, figures/: {', '.join(name for name, _ in drawn) or 'none'}")
    if suffix:
        echo(f"eval.json is reserved for all held-out text at the newest checkpoint, {steps[-1]}, as it was trained")


if __name__ == "__main__":
    cli.run(main)
