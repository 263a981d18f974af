"""eval.py --tasks and --text on a run directory, as a user runs them, and lm-eval's own runner on the same model."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import config, model
from moe_jax.data import tokenizers
from moe_jax.evaluate import loglikelihood
from moe_jax.parallel import sharding
from moe_jax.run import log, weights
from tests import programs
from tests.command_server import Server

REPO = Path(__file__).parents[1]
WORDS = "the cat sat on a mat and ate two fish; then it slept, and so did I.".split()
pytestmark = pytest.mark.slow


def questions() -> list[dict]:
    """24 questions with three or four answers of several lengths, one of them with a long context."""
    rng = np.random.default_rng(1)
    some = lambda low, high: " ".join(rng.choice(WORDS, rng.integers(low, high)))
    rows = [{"question": some(2, 9), "choices": [some(1, 5) for _ in range(3 + i % 2)]} for i in range(24)]
    rows[5]["question"] = some(60, 61)
    return [row | {"gold": int(rng.integers(len(row["choices"])))} for row in rows]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run directory `run` of random weights with experts, in float32, a task, and a text."""
    made = tmp_path_factory.mktemp("benchmarks")
    moe = config.MoEConfig(num_experts=4, top_k=2, d_expert=32)
    shape = config.ModelConfig(
        d_model=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        vocab_size=264,
        moe=moe,
        compute_dtype="float32",
        init_std=0.3,
    )
    cfg = config.RunConfig(model=shape, data=config.DataConfig(batch_size=8, seq_len=96))
    with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.devices()[:1])):
        params, bias = model.init(cfg.model, jax.random.key(3))
    weights.save_weights(made / "run", cfg, params, bias, [{"event": "test"}])
    tokenizers.save(tokenizers.BytesTokenizer(), cfg.data.tokenizer, made / "run")
    with open(made / "mine.jsonl", "w", encoding="utf-8") as file:
        for i, q in enumerate(questions()):
            for choice in q["choices"]:
                row = {
                    "doc_id": i,
                    "context": f"Q: {q['question']}\nA:",
                    "continuation": f" {choice}",
                    "label": q["gold"],
                }
                file.write(json.dumps(row) + "\n")
    (made / "text.txt").write_text(" ".join(WORDS * 9) + " é", encoding="utf-8")
    return made


def environment(root, devices=2) -> dict[str, str]:
    env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "MOE_JAX_CACHE": str(root / "cache")}
    env |= {"PATH": "/usr/bin:/bin", "HOME": str(root), "MPLBACKEND": "agg"}
    env |= programs.environment()
    return env | {"XLA_FLAGS": os.environ["XLA_FLAGS"], "PYTHONPATH": str(REPO)}  # which compile fast


def evaluate(root, *arguments, devices=2, status=0):
    """Runs eval.py. Returns what it prints."""
    command = [sys.executable, REPO / "eval.py", f"--workdir={root}/run", *arguments]
    env = environment(root, devices)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env, timeout=600)
    assert done.returncode == status, done.stderr
    return done.stdout if not status else done.stderr


@pytest.fixture(scope="module")
def refused(root):
    """Runs eval.py in a fork of a process that has its imports. Returns stderr; nothing may be compiled."""
    folder = root / "forks"
    folder.mkdir()
    server = Server(folder, environment(root))

    def run(*arguments: str) -> str:
        status, _, stderr, compiled = server("eval.py", *arguments)
        assert (status, compiled) == (2, ""), stderr
        return stderr

    yield run
    server.process.stdin.close()
    server.process.stdout.close()
    server.process.wait(10)


def opened(root):
    return moe_jax.load(root / "run", mesh=sharding.make_mesh((1, 1, 1), jax.devices()[:1]))


def test_command(root):
    """Results lie in eval.json, tasks beside texts; a limit is in the name of its file and in its content."""
    said = evaluate(root, f"--tasks={root}/mine.jsonl")
    evaluate(root, f"--text={root}/text.txt", devices=1)
    body = log.read_eval(root / "run")
    (name, made), ((_, text),) = next(iter(body["tasks"].items())), body["texts"].items()
    assert name == "mine" and made["documents"] == 24 and made["cut_requests"] in (3, 4) and body["step"] == 0
    assert "mine: " in said and "contexts are cut on the left" in said and "eval.json" in said
    assert (made["length"], made["limit"], made["overrides"]) == (96, None, {})
    run = opened(root)
    asked = loglikelihood.encode_text(run.tokenizer, (root / "text.txt").read_text(encoding="utf-8"))
    (alone,) = loglikelihood.score(run.cfg, run.mesh, run.params, run.router_bias, [asked])
    assert text["bits_per_byte"] == pytest.approx(-alone.logprob / math.log(2) / text["bytes"], rel=1e-5)
    text_of = root / "run" / "eval.0.changed.json"  # of held-out text, with other values: not written here
    text_of.write_text(json.dumps({"step": 0, "overrides": {"data.seq_len": 32}}), encoding="utf-8")
    evaluate(root, f"--tasks={root}/mine.jsonl", "--documents=6", "--config.data.seq_len=64")
    assert json.loads(text_of.read_text(encoding="utf-8"))["overrides"] == {"data.seq_len": 32}
    few = json.loads((root / "run" / "eval.0.6documents.changed.json").read_text(encoding="utf-8"))["tasks"]["mine"]
    assert (few["documents"], few["of_documents"], few["limit"], few["length"]) == (6, 24, 6, 64)
    assert few["overrides"] == {"data.seq_len": 64} and log.read_eval(root / "run") == body
    error = evaluate(root, f"--tasks={root}/mine.jsonl", "--documents=6", "--config.data.seq_len=48", status=2)
    what = "has results of overrides {'data.seq_len': 64}, not of {'data.seq_len': 48}"
    assert error.endswith(f"eval.0.6documents.changed.json: {what}; rename it first\n")
    text_of.unlink()
    (root / "other").mkdir()
    row = {"doc_id": 0, "context": "a", "continuation": " b", "label": 0}
    (root / "other" / "mine.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    error = evaluate(root, f"--tasks={root}/other/mine.jsonl", status=2)
    assert f"eval.json has the results of another mine, {root}/mine.jsonl; rename the file" in error


def test_mistakes(root, refused):
    """One line each, before anything is compiled."""
    for arguments, says in [
        (["--tasks=no.jsonl"], "--tasks=no.jsonl: no such file"),
        ([f"--tasks={root}/mine.jsonl", "--batches=3"], "--batches=3: has no effect with --tasks or --text"),
        (["--documents=3"], "--documents=3: needs --tasks"),
        (["--tasks="], "--tasks=: names nothing"),
        ([f"--tasks={root}/mine.jsonl,{root}/../{root.name}/mine.jsonl"], "two of them have the same name"),
        ([f"--tasks={root}/mine.jsonl", "--figures=svg"], "--figures=svg: has no effect with --tasks or --text"),
        ([f"--tasks={root}/mine.jsonl", "--config.model.attention=splash"], "needs a TPU, this is cpu; use 'auto'"),
        ([f"--text={root}/mine.jsonl", "--config.model.d_model=3"], "config.model.d_model='3': describes the weights"),
        ([f"--text={root}/mine.jsonl", "--config.model.moe.compute=capacity"], "depend on the other sequences"),
    ]:
        error = refused(f"--workdir={root}/run", *arguments)
        assert error.startswith("error: ") and says in error and error.count("\n") == 1, error
    settings = root / "run" / tokenizers.SETTINGS
    kept = settings.read_bytes()
    broken = json.loads((root / "run" / "config.json").read_text(encoding="utf-8"))
    try:
        settings.unlink()
        broken["data"]["tokenizer"] |= {"kind": "huggingface", "path": "gone.json"}
        text = (root / "run" / "config.json").read_text(encoding="utf-8")
        (root / "run" / "config.json").write_text(json.dumps(broken), encoding="utf-8")
        assert "has no tokenizer; put the tokenizer.json" in refused(
            f"--workdir={root}/run", f"--tasks={root}/mine.jsonl"
        )
    finally:
        settings.write_bytes(kept)
        (root / "run" / "config.json").write_text(text, encoding="utf-8")


def test_a_damaged_run(root, refused, tmp_path):
    """One line that names the damage, and no evaluation file."""
    cut = lambda path: path.write_bytes(path.read_bytes()[:-9])
    for i, (damage, says) in enumerate([
        (lambda run: cut(run / "config.json"), "config.json"),
        (lambda run: cut(next((run / "checkpoints" / "0" / "state").rglob("manifest.ocdbt"))), "0 is damaged: state/"),
        (lambda run: shutil.rmtree(run / "checkpoints" / "0"), "has no complete checkpoint"),
        (lambda run: cut(run / tokenizers.SETTINGS), "is not a tokenizer's settings"),
    ]):  # fmt: skip
        copy = tmp_path / str(i)
        shutil.copytree(root / "run", copy / "run", ignore=shutil.ignore_patterns("eval*"))
        damage(copy / "run")
        error = refused(f"--workdir={copy}/run", f"--tasks={root}/mine.jsonl")
        line = error.splitlines()[-1]
        assert line.startswith("error: ") and says in line and "Traceback" not in error, error
        assert not list((copy / "run").glob("eval*"))


TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {validation: "@/mine_lm.jsonl"}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_bytes
---
task: mine_text
dataset_path: json
dataset_kwargs: {data_files: {validation: "@/mine_lm.jsonl"}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: question
metric_list:
  - metric: bits_per_byte
---
task: mine_answers
dataset_path: json
dataset_kwargs: {data_files: {validation: "@/mine_lm.jsonl"}}
output_type: generate_until
validation_split: validation
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: question
generation_kwargs: {until: ["e"], max_gen_toks: 5, do_sample: false}
metric_list:
  - metric: exact_match
"""


def test_lm_eval_runs_its_tasks(root, monkeypatch):
    """lm-eval's accuracy and log-likelihoods are those of eval.py's requests; its generation is cut where it says."""
    monkeypatch.setenv("HF_HOME", str(root / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from moe_jax.evaluate import benchmarks, generate, tasks
    from moe_jax.evaluate.harness import RunModel

    (root / "mine_lm.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions()), encoding="utf-8")
    (root / "yaml").mkdir()
    for i, text in enumerate(TASK.replace("@", str(root)).split("---\n")):
        (root / "yaml" / f"{i}.yaml").write_text(text, encoding="utf-8")
    run = opened(root)
    adapter = RunModel(run, progress=False)
    found = lm_eval.simple_evaluate(
        model=adapter, tasks=["mine", "mine_text", "mine_answers"], bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_path=str(root / "yaml")),
    )  # fmt: skip
    task, _ = tasks.read(str(root / "mine.jsonl"))
    ours = benchmarks.of_task(task, run.tokenizer, benchmarks.scorer(run.cfg, run.mesh, run.params, run.router_bias))
    assert found["results"]["mine"]["acc,none"] == pytest.approx(ours["acc"])
    scores = [s for sample in found["samples"]["mine"] for s in sample["filtered_resps"]]
    asked = loglikelihood.encode(run.tokenizer, [pair for document in task.documents for pair in document.pairs])
    mine = loglikelihood.score(run.cfg, run.mesh, run.params, run.router_bias, asked)
    np.testing.assert_allclose([float(s[0]) for s in scores], [s.logprob for s in mine], atol=1e-4)
    bits, size = 0.0, 0
    for question in questions():
        request = loglikelihood.encode_text(run.tokenizer, question["question"])
        bits -= loglikelihood.score(run.cfg, run.mesh, run.params, run.router_bias, [request])[0].logprob / math.log(2)
        size += len(question["question"].encode())
    assert found["results"]["mine_text"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-5)
    text = found["samples"]["mine_answers"][0]["filtered_resps"][0]
    prompt = run.tokenizer.encode([f"Q: {questions()[0]['question']}\nA:"])[0].tolist()
    (ids,) = generate.generate(run.model, run.mesh, run.params, run.router_bias, [prompt], 5, vocab=257)
    assert text == run.tokenizer.decode(ids[len(prompt) :]).split("e")[0]


def test_lm_eval_is_named_if_it_is_missing(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("lm_eval") or n.endswith("evaluate.harness")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"needs lm-eval .*pip install -e '.\[lm-eval\]'"):
        importlib.import_module("moe_jax.evaluate.harness")
