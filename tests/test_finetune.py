"""configs/finetune.py: which fields of a file are learned, how long, what is refused, and a run of it."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from configs import finetune
from moe_jax import config, model, optim
from moe_jax.data.files import FilesSource
from moe_jax.errors import ConfigError, FileError
from moe_jax.evaluate.held_out import TOTAL
from moe_jax.parallel import sharding
from moe_jax.run import config_file, weights
from moe_jax.run.log import read_eval, read_metrics

REPO = Path(__file__).parents[1]

TINY = config.ModelConfig(vocab_size=257, d_model=16, num_layers=2, num_dense_layers=2, d_ff=32, num_heads=2,
                          num_kv_heads=2, head_dim=8, compute_dtype="float32")  # fmt: skip
MOE = config.MoEConfig(num_experts=4, top_k=2, d_expert=16)
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


@pytest.fixture
def run(tmp_path):
    config_file.save_config(tmp_path / "run", config.RunConfig(model=TINY, data=config.DataConfig(seq_len=32)))
    return tmp_path / "run"


def write(path, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def source(run, path):
    made = config.build(finetune.get_config(f"{run},{path}"))
    assert made.init_from == str(run) and made.data.seq_len == 32
    return made.data.sources["answers"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "a", "answer": "b"}, "Question: {question}\nAnswer:"),
        ({"id": 7, "prompt": "a", "completion": "b"}, "{prompt}"),
        (ALPACA, "{instruction}\n{input}\nAnswer:"),
        ({"instruction": "a", "output": "b"}, "{instruction}\nAnswer:"),
        ({"prompt": "a", "prompt_id": "0", **CHAT}, ""),
    ],
)
def test_kinds(run, tmp_path, row, prompt):
    made = source(run, write(tmp_path / "answers.jsonl.gz", [row]))
    assert made.prompt == prompt and bool(prompt) != (made.messages_field == "messages")


def test_every_kind_learns_the_last_of_its_fields():
    for fields, kind in finetune.KINDS.items():
        made = config.source(kind="files", path="a.jsonl", **kind)
        named = [made.messages_field] if made.messages_field else [f for f in fields if f"{{{f}}}" in made.prompt]
        assert [*named, *([] if made.messages_field else [fields[-1]])] == list(fields)
        assert made.messages_field or f"{{{fields[-1]}}}" in made.completion


@pytest.mark.parametrize("at", [0, 1, 899])
def test_one_row_without_a_field_does_not_hide_it(run, tmp_path, at):
    """The kind has the field all the same, and the row is refused with its place."""
    rows = [ALPACA] * 900
    rows[at] = {"instruction": "Say hello.", "output": "Hello."}
    made = source(run, write(tmp_path / "answers.jsonl", rows))
    assert "{input}" in made.prompt
    with pytest.raises(ConfigError, match=rf"names 'input', which is missing or null: .*answers.jsonl:{at + 1} has"):
        FilesSource("answers", made).documents("train")


def test_files_of_a_glob_have_one_kind(run, tmp_path):
    """A file of other fields is refused when it is read, wherever it is among the files."""
    write(tmp_path / "1.jsonl", [{"instruction": "a", "output": "b"}])
    write(tmp_path / "2.jsonl", [ALPACA])
    made = source(run, tmp_path / "?.jsonl")
    assert "{input}" in made.prompt
    with pytest.raises(ConfigError, match=r"1\.jsonl"):
        FilesSource("answers", made).documents("train")


def test_a_header_has_the_fields(run, tmp_path):
    (tmp_path / "a.csv").write_text("instruction,input,output\nAdd.,,3\n", encoding="utf-8")
    assert "{input}" in source(run, tmp_path / "a.csv").prompt


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.csv"])
def test_fields_that_are_not_read_are_named(run, tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".csv":
        path.write_text("question,context,answer,id\nWho?,A long text.,He.,7\n", encoding="utf-8")
    else:
        write(path, [{"question": "Who?", "answer": "He."}, {"context": "A", "question": "?", "answer": "I.", "id": 7}])
    notes = FilesSource("answers", source(run, path)).documents("train").notes
    assert notes == ("data.sources.answers: fields that are not read: context, id",)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [{"query": "a", "response": "b"}],
            "has query, response: configs/finetune.py knows rows with: messages; ",
        ),
        ([{"prompt": "a", "completion": "b", **CHAT}], "in more than one way: messages; prompt, completion"),
        ([{"question": "a", "answer": None}], "has question: configs/finetune.py knows"),
        ([], "has no row: configs/finetune.py knows"),
    ],
)
def test_rows_that_are_refused(run, tmp_path, rows, says):
    with pytest.raises(FileError, match=says) as error:
        source(run, write(tmp_path / "answers.jsonl", rows))
    assert "\n" not in str(error.value)


def test_files_that_are_refused(run, tmp_path):
    write(tmp_path / "answers.jsonl", [ALPACA])
    (tmp_path / "broken.jsonl").write_text("{\n", encoding="utf-8")
    (tmp_path / "text.txt").write_text("a\n", encoding="utf-8")
    (tmp_path / "zip.jsonl.gz").write_text("no gzip", encoding="utf-8")
    for argument, says in {
        f"{run}": "needs a file of answers after the run directory and a comma",
        f"{run},{tmp_path}/answer.jsonl": "matches no file; nearest valid: .*answers.jsonl",
        f"{run},{tmp_path}/text.txt": "is not a file whose rows have fields; nearest valid",
        f"{run},{tmp_path}/broken.jsonl": "cannot be read: .*broken.jsonl:1: is not JSON",
        f"{run},{tmp_path}/zip.jsonl.gz": "cannot be read: ",
    }.items():
        with pytest.raises(ConfigError, match=says) as error:
            finetune.get_config(argument)
        assert "\n" not in str(error.value)


def test_any_size_makes_a_valid_config(run, tmp_path, monkeypatch):
    """Warm-up, evaluation and the best checkpoint fit the number of steps, small or large."""
    path, size = write(tmp_path / "answers.jsonl", [ALPACA]), 1
    monkeypatch.setattr(finetune.balance_scope, "text_bytes", lambda file: size)
    steps = []
    for power in range(3, 34, 2):
        size = 2**power
        made = finetune.get_config(f"{run},{path}")
        made.train.keep_best = 1
        cfg = config.build(made)
        steps.append(cfg.train.steps)
        assert 8 <= cfg.train.steps / cfg.train.eval_every < 20 and cfg.optim.warmup_steps <= 10
        assert cfg.train.checkpoint_every <= max(200, cfg.train.eval_every)
    assert steps[0] == 10 and steps == sorted(steps)
    assert steps[-1] == round(2 * 2**33 / 3.5 / (16 * 32))


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({}, []),
        ({"num_dense_layers": 0, "moe": MOE}, ["router"]),
        ({"num_dense_layers": 0, "moe": replace(MOE, router="mlp", choice="expert")}, ["router"]),
        ({"layers": "2*table", "num_dense_layers": 0, "moe": replace(MOE, combine="one")}, []),
    ],
    ids=["dense", "linear", "experts choose", "tables choose"],
)
def test_group_of_the_routers(tmp_path, fields, groups):
    """A model has the group if it has routers with weights: a group that matches nothing would be refused."""
    path = write(tmp_path / "answers.jsonl", [ALPACA])
    cfg = config.default_config()
    cfg.model.update(config.to_dict(replace(TINY, **fields)))
    cfg.data.seq_len, cfg.sample.tokens, cfg.loss.load_balance_coef, cfg.loss.router_z_coef = 32, 0, 0.0, 0.0
    config_file.save_config(tmp_path / "run", config.build(cfg))
    cfg = config.build(finetune.get_config(f"{tmp_path / 'run'},{path}"))
    assert list(cfg.optim.groups) == groups
    optim.check_groups(cfg)


@pytest.mark.slow
def test_a_run(tmp_path):
    """A small dense model, upcycled to copies and trained on answers: the loss of held-out answers falls."""
    dense, copies, tuned = (tmp_path / name for name in ("dense", "copies", "tuned"))
    base = config.RunConfig(model=TINY, data=config.DataConfig(seq_len=64))
    with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.devices()[:1])):
        weights.save_weights(dense, base, model.init(TINY, jax.random.key(0))[0], {}, [])
    rows = [{"question": f"{a} and {b}?", "answer": f"It is {a}."} for a in range(20) for b in range(20)]
    path = write(tmp_path / "answers.jsonl", rows)
    command("-m", "moe_jax.upcycle", f"--from={dense}", f"--workdir={copies}", "--expansion=4", "--top_k=2")
    out = command("train.py", f"--config=configs/finetune.py:{copies},{path}", f"--workdir={tuned}",
                  "--config.optim.lr=1e-2", "--config.train.tensorboard=false", "--config.train.keep_best=1",
                  f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.num_workers=0")  # fmt: skip
    assert "group router: " in out
    losses = [row["xent"] for row in read_metrics(tuned, "eval")]
    (end,) = [row["xent"] for row in read_eval(tuned)["domains"] if row["domain"] == TOTAL]
    assert len(losses) >= 10 and losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1
    assert end == pytest.approx(losses[-1], rel=1e-3)
    assert list((tuned / "checkpoints").iterdir())


def command(*arguments):
    made = subprocess.run([sys.executable, *arguments], cwd=REPO, capture_output=True, encoding="utf-8")
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-3000:]
    return made.stdout
