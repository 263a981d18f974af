"""Train a Mixture-of-Experts language model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart --config.train.steps=200

Running the same command again resumes. The run directory holds config.json, metrics.jsonl, TensorBoard events, the
tokenizer, checkpoints/, and at the end eval.json and sample.txt.
"""

import sys
from pathlib import Path

import jax
from absl import flags

from moe_jax import (
    checkpoint,
    cli,
    compile_only,
    config,
    data,
    evaluate,
    generate,
    losses,
    metrics,
    model,
    optim,
    sharding,
    step,
    weights,
)

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "run directory; made if missing, resumed if not")
COMPILE_ONLY = flags.DEFINE_string(
    "compile_only", None, "compile for TPUs that are not here, e.g. v5p:4x4x4, and report"
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of several processes (pods, clusters); see docs/scaling.md")


def main(argv):
    if argv[1:]:
        raise cli.UserError(f"unexpected argument {argv[1]!r}; options start with --")
    if WORKDIR.value is None and not COMPILE_ONLY.value:
        raise cli.UserError("--workdir is needed, for example --workdir=runs/a")
    if CONFIG.value is None:
        raise cli.UserError("--config is needed, for example --config=configs/quickstart.py")

    # --- configuration: every rule is checked before anything is compiled ---------------------------------------------
    cfg = config.build(CONFIG.value)
    if COMPILE_ONLY.value:
        return compile_only.main(cfg, COMPILE_ONLY.value)
    workdir = Path(WORKDIR.value)
    if (workdir / "config.json").exists():
        checkpoint.check_resumable(checkpoint.save_config(workdir, cfg))
    data.check_sources(cfg.data)
    cli.keep_compiled(data.cache_folder(cfg.data) / "compiled")
    if DISTRIBUTED.value:
        cli.join_processes()
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    cli.check_writable(workdir)
    with checkpoint.Checkpoints(workdir) as existing:
        differs = weights.check_same_model(cfg) if cfg.init_from and existing.latest() is None else []
    say = print if jax.process_index() == 0 else lambda *_: None

    # --- data ---------------------------------------------------------------------------------------------------------
    terminal = jax.process_index() == 0 and sys.stderr.isatty()
    corpus = data.prepare(cfg.data, workdir=workdir, seed=cfg.seed, progress=terminal)
    config.check_vocabulary(cfg, corpus.tokenizer.vocab_size)
    evaluate.check_held_out(corpus)
    batches = corpus.train_iterator(step.process_rows(mesh, cfg.data.batch_size))
    changed = checkpoint.check_resumable(checkpoint.save_config(workdir, cfg))  # late: a mistake above leaves no trace
    for line in changed:
        say(f"changed since the run began: {line}")
    say(corpus.table())

    # --- model --------------------------------------------------------------------------------------------------------
    counts = model.count_parameters(cfg.model)
    flops = model.flops_per_token(cfg.model, cfg.data.seq_len)
    peak, peak_source = metrics.peak_flops(device)
    say(f"devices: {mesh.size} × {device.device_kind}, mesh {dict(mesh.shape)}")
    say(f"peak: {peak / 1e12:.2f} TFLOP/s each ({peak_source})")
    say(f"parameters: {counts.total:,} total, {counts.active:,} active; {flops / 1e6:.2f} MFLOP a token")
    say(step.describe_backends(cfg, mesh))
    if cfg.model.num_moe_layers:
        say(losses.describe(cfg.loss, cfg.train.micro_batches))
    say(optim.describe(cfg.optim, model.abstract(cfg.model), dict(mesh.shape), cfg.model.head_dim))

    # --- state: the order is important --------------------------------------------------------------------------------
    # 1. the newest complete checkpoint of this run directory; 2. the weights of config.init_from, the optimizer fresh;
    # 3. fresh.
    checkpoints = checkpoint.Checkpoints(workdir, keep=cfg.train.keep_checkpoints)
    start, tokens, origin = 0, 0.0, []
    if checkpoints.latest() is not None:
        state, saved = checkpoints.restore(step.abstract_state(cfg, mesh))
        batches.set_state(saved["batches"])
        start, tokens, origin = int(state.step), saved["tokens"], saved.get("origin", [])
        config.check_steps(cfg, start)
        say(f"resumed after step {start}")
    elif cfg.init_from:
        params, bias, origin = weights.load_weights(cfg.init_from, *step.abstract_weights(cfg.model, mesh), cast=True)
        state = step.init_state(cfg, mesh, (params, bias))
        say(f"starting from the weights of {cfg.init_from}, with a fresh optimizer state")
        for line in differs:
            say(line)
    else:
        state = step.init_state(cfg, mesh)

    # --- loop: metrics are read one step behind, so that reading never leaves the device idle -------------------------
    steps, every = cfg.train.steps, cfg.train
    train_step = step.make_train_step(cfg, mesh)
    pending, clock = metrics.OneBehind(), metrics.Throughput(tokens)
    writer = metrics.Writer(
        workdir,
        resume_step=start,
        tensorboard=every.tensorboard,
        wandb_project=every.wandb_project,
        config=config.to_dict(cfg),
    )
    progress = metrics.Progress(steps, initial=start)

    def record(done):
        if done is None:
            return
        n, aux = done
        clock.add(aux["tokens"])
        log = n % every.log_every == 0 or n == steps
        if log:
            aux = metrics.train_metrics(n, aux, top_k=cfg.model.moe.top_k, **clock.read(),
                                        flops_per_token=flops, peak=peak * mesh.size)  # fmt: skip
            writer.write(n, aux)
        progress.update(n, aux, log=log)

    with checkpoints, writer, progress:
        for n in range(start + 1, steps + 1):
            state, aux = train_step(state, step.put_batch(next(batches), mesh, cfg))
            record(pending.push(n, aux))
            last = n == steps
            if last or n % every.checkpoint_every == 0:
                record(pending.flush())
                with clock.paused():
                    checkpoints.save(
                        n, state, {"batches": batches.get_state(), "tokens": clock.tokens, "origin": origin}
                    )
            if every.eval_every and n % every.eval_every == 0 and not last:
                record(pending.flush())
                with clock.paused():
                    result = evaluate.evaluate(
                        cfg, mesh, state.params, state.router_bias, corpus, limit=every.eval_batches
                    )
                    writer.write(n, metrics.eval_metrics(result.rows()), kind="eval")
        batches.close()
        progress.close()

        # --- the end: held-out text, and a sample ---------------------------------------------------------------------
        result = evaluate.evaluate(cfg, mesh, state.params, state.router_bias, corpus, limit=every.eval_batches)
        baselines = evaluate.compression_bits_per_byte(corpus.validation_texts())
        writer.write(steps, metrics.eval_metrics(result.rows()), kind="eval")
    say("\nheld-out text, bits per byte beside general-purpose compressors of the same text")
    say(evaluate.table(result, baselines))
    text = generate.sample_text(cfg, mesh, state.params, state.router_bias, corpus.tokenizer)
    say(f"\nsample\n{text}")
    if jax.process_index() == 0:
        (workdir / "eval.json").write_text(evaluate.to_json(steps, result, baselines))
        (workdir / "sample.txt").write_text(text + "\n")
    say(f"\nrun directory: {workdir}; next: python eval.py --workdir={workdir}")


if __name__ == "__main__":
    cli.run(main)
