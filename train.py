"""Train a Mixture-of-Experts language model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart --config.train.steps=200

The same command resumes a run. The run directory holds config.json, metrics.jsonl, TensorBoard events, the tokenizer,
checkpoints/, and at the end eval.json and sample.txt. docs/survival.md says what a run survives. --dry_run says what
a run will take, and begins none.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from absl import flags

from moe_jax import chips, cli, config, data, ending, model, optim
from moe_jax.aot import compile_only, dry_run
from moe_jax.errors import Stopped, UserError
from moe_jax.evaluate import generate, held_out
from moe_jax.evaluate.during_training import HeldOut
from moe_jax.mixtures import online
from moe_jax.moe import balance, router_losses
from moe_jax.nn import lora
from moe_jax.parallel import sharding
from moe_jax.run import base, changes, checkpoint, config_file, log, replay, survive, teacher, weights
from moe_jax.run.recorder import Recorder
from moe_jax.train import guard, knobs, losses, metrics, prediction, step
from moe_jax.train.state import abstract_weights, choose_program, init_state, process_rows, put_batch
from moe_jax.tree import flatten

CONFIG = cli.define_config()
WORKDIR = cli.define_path("workdir", None, "run directory; made if missing, resumed if not")
COMPILE_ONLY = flags.DEFINE_string(
    "compile_only", None, "compile for chips that are not here, e.g. v5p:4x4x4 or h100:8, and report"
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print parameters, memory, schedule and epochs of the run, and end")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of several processes (pods, clusters); see docs/scaling.md")
RESUME_STEP = flags.DEFINE_integer("resume_step", None, "go on from this checkpoint; later ones are set aside", 1)
ACCEPT = flags.DEFINE_bool("accept_changed_data", False, "go on though the text is not what it was at the checkpoint")
WEIGHTS = flags.DEFINE_enum(
    "weights", "trained", ["trained", "ema"], "which weights of config.init_from: the trained ones, or their average"
)
REPLAY = cli.define_path("replay", None, "take the step of a dump again, and nothing else; see docs/survival.md")


def main(argv):
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    if WORKDIR.value is None and not COMPILE_ONLY.value and not DRY_RUN.value:
        raise UserError("--workdir is needed, for example --workdir=runs/a")
    if CONFIG.value is None:
        raise UserError("--config is needed, for example --config=configs/quickstart.py")

    with survive.Preemption(DISTRIBUTED.value) as preemption:
        train(preemption)


def train(preemption: survive.Preemption):
    # --- configuration: every rule is checked before anything is compiled ---------------------------------------------
    cfg = config.build(CONFIG.value)
    router_losses.check(cfg)
    optim.check_groups(cfg)
    config.check_trained(cfg)
    if WEIGHTS.value == "ema" and not cfg.init_from:
        raise UserError("--weights=ema needs --config.init_from, whose weights it chooses")
    if COMPILE_ONLY.value and DRY_RUN.value:
        raise UserError("--dry_run and --compile_only: name one of them; the first compiles nothing")
    if COMPILE_ONLY.value:
        return compile_only.main(cfg, COMPILE_ONLY.value)
    if DRY_RUN.value:
        return dry_run.main(cfg)
    workdir = Path(WORKDIR.value)
    # This refuses a config that differs, in a field that must not change, from that of the run in this directory.
    cfg, changed = config_file.resume(workdir, cfg)
    begun = (workdir / "config.json").exists()  # if not, no earlier run here restricts this command
    own = workdir if begun else None
    data.check_sources(cfg.data, own)
    log.check_wandb(cfg.train.wandb_project)
    cli.keep_compiled(data.cache_folder(cfg.data) / "compiled")
    if DISTRIBUTED.value:
        cli.join_processes()
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    say = print if jax.process_index() == 0 else lambda *_: None
    if REPLAY.value:
        say(replay.replay(cfg, mesh, Path(REPLAY.value)))
        return
    lock = survive.RunLock(cli.check_writable(workdir))
    with checkpoint.Checkpoints(workdir) as existing:
        differs = weights.check_same_model(cfg) if cfg.init_from and existing.latest() is None else []
        before = existing.data_state(RESUME_STEP.value)
        done = RESUME_STEP.value if RESUME_STEP.value is not None else existing.latest() or 0
    config.check_steps(cfg, done)
    taught = teacher.find(cfg, done, before, mesh.shape["expert"])
    program, of_teacher = choose_program(cfg, mesh), taught.model if taught else None
    train_step = step.make_train_step(cfg, mesh, program, of_teacher)
    if done < cfg.train.steps:
        compiled = ending.leave_without(step.compile_ahead(train_step, cfg, mesh, of_teacher))  # beside the text

    # --- data ---------------------------------------------------------------------------------------------------------
    terminal = jax.process_index() == 0 and sys.stderr.isatty()
    corpus = data.prepare(cfg.data, workdir=own, seed=cfg.seed, progress=terminal, init_from=cfg.init_from)
    config.check_vocabulary(cfg, corpus.vocab_size)
    held_out.check_held_out(corpus, cfg.model.moe.pool_prefix)
    if not cfg.init_from:  # weights for a label may come from a run whose text had it
        corpus.check_labels()
    if cfg.mixture.observes:
        corpus.targets(cfg.mixture)
    unknown = teacher.check_tokenizer(taught, corpus.tokenizer) if taught else []
    read, other_data = data.record.resume(before, checkpoint.gather_json(corpus.record()), ACCEPT.value)
    batches = corpus.train_iterator(process_rows(mesh, cfg.data.batch_size))
    for line in changed:
        say(line)
    say(corpus.table(cfg.train.steps, cfg.mixture.stages))
    for line in [*corpus.notes(), *cfg.mixture.notes(cfg.train.steps), *unknown, *other_data]:
        say(line)

    # --- model --------------------------------------------------------------------------------------------------------
    counts, graph = model.count_parameters(cfg.model), model.abstract(cfg.model)
    frozen = optim.frozen_paths(cfg.optim, flatten(graph.shapes))
    flops = model.flops_per_token(cfg.trained, cfg.data.seq_len, frozen)
    peak, peak_source = chips.peak_flops(device)
    say(f"devices: {mesh.size} × {device.device_kind}, mesh {dict(mesh.shape)}")
    say(f"peak: {peak / 1e12:.2f} TFLOP/s each ({peak_source})")
    say(f"parameters: {counts.total:,} total, {counts.active:,} active; {flops / 1e6:.2f} MFLOP a token")
    say(program.why)
    if cfg.model.num_moe_layers:
        say(losses.describe(cfg.loss, cfg.train.micro_batches))
        if cfg.model.moe.selection_bias:
            fixed, moving = optim.split_biases(frozen, graph.shapes, abstract_weights(cfg.model, mesh)[1])
            say(balance.describe(cfg.loss, cfg.trained, fixed, bool(moving)))
    if cfg.model.mtp_layers:
        say(prediction.describe(cfg.loss, cfg.model.mtp_layers, cfg.train.steps))
    if line := knobs.describe(cfg):
        say(line)
    if taught:
        say(teacher.describe(cfg, taught))
    if cfg.model.lora.rank:
        say(lora.describe(cfg.model, flatten(graph.shapes)))
    say(optim.describe(cfg.optim, graph, dict(mesh.shape), cfg.model.head_dim))

    # --- state: the order is important --------------------------------------------------------------------------------
    # 1. the newest complete checkpoint of this run directory; 2. the weights of config.init_from, the optimizer fresh;
    # 3. fresh.
    steps = cfg.train.steps
    checkpoints = checkpoint.Checkpoints(
        workdir,
        keep=cfg.train.keep_checkpoints,
        keep_every=cfg.train.keep_every,
        keep_best=cfg.train.keep_best,
    )
    if RESUME_STEP.value is not None:
        for later in checkpoints.rewind(RESUME_STEP.value):
            say(f"checkpoint {later} is set aside in {workdir}/checkpoints.dropped")
    start, tokens, origin, reference, mixed = 0, 0.0, [], None, None
    watch = guard.Watch(cfg.train, taught=cfg.distill.stop_step)
    if checkpoints.latest() is not None:
        state, saved, reference = weights.restore(workdir, checkpoints, cfg, mesh)
        if int(state.step) < steps:  # a run at its end reads no batch, also one that an earlier version took there
            batches.set_state(saved["batches"])
        start, tokens, origin = int(state.step), saved["tokens"], saved.get("origin", [])
        mixed = saved.get("mixture")
        watch = guard.Watch(cfg.train, saved.get("watch"), cfg.distill.stop_step)
        config_file.begin(workdir, cfg, start + 1)
        say(f"resumed after step {start}")
        for line in changes.since(saved.get("revision", 0), cfg):
            say(f"changed since the run began: {line}")
        if line := optim.describe_stretch(cfg.optim, saved.get("steps", steps), steps, start - watch.skipped):
            say(line)
    elif cfg.init_from:
        average = WEIGHTS.value == "ema"
        params, bias, origin, reference = weights.load_start(workdir, cfg, mesh, average)
        state = init_state(cfg, mesh, (params, bias))
        say(weights.describe_start(cfg, average))
        for line in differs:
            say(line)
    else:
        state = init_state(cfg, mesh)

    lesson, record = teacher.load(taught, mesh) if taught else (None, (before or {}).get("teacher"))

    # --- loop --------------------------------------------------------------------------------------------------------
    scores = checkpoints.scores
    scores.update(held_out.scores(workdir, start))
    clock = metrics.Throughput(tokens)
    writer = log.Writer(
        workdir,
        resume_step=start,
        tensorboard=cfg.train.tensorboard,
        wandb_project=cfg.train.wandb_project,
        config=config.to_dict(cfg),
    )
    progress = log.Progress(steps, initial=start)
    recorder = Recorder(cfg, writer, progress, watch, clock, flops_per_token=flops, peak=peak * mesh.size)
    evaluation = HeldOut(cfg, mesh, corpus, program, writer, clock, preemption, scores)

    mixer = online.make_mixer(cfg, mesh, corpus, batches, writer, mixed, program)

    def save(n: int, wait: bool):
        nonlocal begun
        if not begun:
            corpus.keep_tokenizer(workdir)
            begun = True
        config_file.begin(workdir, cfg, start + 1)
        saved = {"batches": batches.get_state(), "tokens": clock.tokens, "origin": origin, "read": read}
        saved |= {"revision": changes.REVISION, "steps": steps, "watch": watch.state()}
        saved |= {"base": reference} if reference else {}
        saved |= {"teacher": record} if record else {}
        saved |= {"mixture": mixer.state()} if mixer else {}
        with clock.paused():
            checkpoints.save(n, base.kept(cfg, state), saved, wait=wait)

    with checkpoints, writer, progress:
        if start < steps:
            compiled.result()
        preemption.begin()
        if evaluation.is_due(start) and evaluation.evaluate(start, state) is None:
            survive.stop(start)  # stops before the next step, so that the resumed run repeats this evaluation
        for n in range(start + 1, steps + 1):
            if mixer and mixer.is_due:
                recorder.flush()
                with clock.paused():
                    progress.write(mixer.begin(n - 1, state))
            rows, limits = next(batches), watch.limits(n)
            if lesson and not cfg.distill.is_on(n):
                lesson = None  # the next step is compiled without it
                progress.write(f"step {n - 1} was the last with a teacher")
            state, report = train_step(state, put_batch(rows, mesh, cfg), limits, lesson)
            recorder.push(n, report)
            if watch.limit_reached:
                replay.give_up(workdir, cfg, state, rows, watch.last, limits, record)
            if evaluation.is_due(n):
                recorder.flush()
                evaluation.evaluate(n, state)
            preempted = preemption.reached(n)
            if preempted or n == steps or n % cfg.train.checkpoint_every == 0:
                recorder.flush()
                save(n, wait=preempted)
            if preempted:
                survive.stop(n)
        batches.close()
        progress.close()
        checkpoints.wait()
        preemption.end()

        # --- the end: held-out text, and a sample ---------------------------------------------------------------------
        # Compressors have a core of their own while the model is evaluated.
        baselines = ThreadPoolExecutor(1).submit(held_out.compression_bits_per_byte, corpus.validation_texts())
        ending.leave_without(baselines)
        result = evaluation.evaluate(steps, state)
        if result is None:
            raise Stopped

    def write(file: str, text: str, how=log.write_eval):
        """Writes a result as soon as there is one. All are written before any is printed, because printing may fail."""
        if jax.process_index() == 0:
            how(workdir / file, text)

    name = f"eval{held_out.suffix_at_the_end(workdir, result, steps) if start == steps else ''}.json"
    write(name, held_out.to_json(steps, result, {}))
    prompt = cfg.sample.prompt or corpus.beginning()
    text = generate.sample_text(cfg, mesh, state.params, state.router_bias, corpus.tokenizer, prompt)
    write("sample.txt", text + "\n", log.write_text)
    baselines = baselines.result()
    write(name, held_out.to_json(steps, result, baselines))
    lock.close()
    say("\nheld-out text, bits per byte beside general-purpose compressors of the same text")
    say(held_out.table(result, baselines))
    if evaluation.of_average:
        say("\nthe average of the weights (optim.ema) on the same text")
        say(held_out.table(evaluation.of_average, baselines))
    say(f"\nsample\n{text}")
    if name != "eval.json":
        say(f"\neval.json stays, which is of this step and of more text; this evaluation is in {name}")
    say(f"\nrun directory: {workdir}; next: python eval.py --workdir={workdir}")
    guard.check_end(watch, steps)


if __name__ == "__main__":
    cli.run(main)
