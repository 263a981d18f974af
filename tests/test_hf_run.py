"""An imported model in train.py and eval.py: evaluated where it lies, trained on, exported again."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import two_processes
from test_hf_files import CONFIG, write
from test_train import REPO, finish, rows, run, write_text

from moe_jax.data.tokenizers import train_bpe
from moe_jax.hf import import_model
from moe_jax.hf import safetensors as files
from moe_jax.hf.convert import whole_mesh
from moe_jax.run import weights
from moe_jax.train.state import abstract_weights

# What docs/checkpoints.md shows: the configuration of a run, to start another from it.
FROM_RUN = """
import ml_collections
from moe_jax import config
from moe_jax.run import config_file


def get_config(run):
    made = ml_collections.ConfigDict(config.to_dict(config_file.load_config(run)))
    made.init_from = run
    return made
"""


@pytest.mark.slow
def test_evaluate_train_and_export(tmp_path):
    write_text(tmp_path)
    write(tmp_path / "in")
    train_bpe([p.read_text(encoding="utf-8") for p in (tmp_path / "prose").iterdir()], 290).save(tmp_path / "in")
    run_module("import", f"--from={tmp_path / 'in'}", f"--workdir={tmp_path / 'run'}")

    cfg = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    source = cfg["data"]["sources"].pop("stdlib")
    for name in ("prose", "numbers"):
        cfg["data"]["sources"][name] = source | {
            "kind": "files", "path": f"{tmp_path}/{name}/*.txt", "validation_fraction": 0.2, "domain_field": "",
        }  # fmt: skip
    cfg["train"] |= {"steps": 4, "log_every": 1}
    cfg["optim"] |= {"lr": 0.003}
    (tmp_path / "run" / "config.json").write_text(json.dumps(cfg), encoding="utf-8")
    done = run(tmp_path, "eval.py")
    assert "checkpoint of step 0" in done.stdout and "router" not in done.stdout and "bits/byte" in done.stdout
    first = json.loads((tmp_path / "run" / "eval.json").read_text(encoding="utf-8"))
    assert first["step"] == 0 and not first["tokens_per_expert"]

    (tmp_path / "from_run.py").write_text(FROM_RUN, encoding="utf-8")
    flags = [f"--config={tmp_path / 'from_run.py'}:{tmp_path / 'run'}"]
    done = run(tmp_path, "train.py", *flags, workdir="more")
    assert f"starting from the weights of {tmp_path / 'run'}, with a fresh optimizer state" in done.stdout
    losses = [row["loss"] for row in rows(tmp_path, "train", "more")]
    assert len(losses) == 4 and losses[-1] < losses[0] and "max_load" not in rows(tmp_path, "train", "more")[0]
    done = run(tmp_path, "train.py", *flags, workdir="more")  # its own checkpoint comes first
    assert "resumed after step 4" in done.stdout and "starting from" not in done.stdout

    out = run_module("export", f"--workdir={tmp_path / 'more'}", f"--to={tmp_path / 'out'}")
    # Its documents ended with the tokenizer's token in training, whatever the import said.
    line, summary, *_ = out.splitlines()
    assert line == f"eos_token_id={CONFIG['eos_token_id']} of the imported model becomes 0, which training used"
    assert summary.startswith("LlamaForCausalLM: 21 tensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["eos_token_id"] == 0
    before, after = (files.open_model(tmp_path / name) for name in ("in", "out"))
    assert set(before) == set(after) and (tmp_path / "out" / "tokenizer.json").exists()
    assert "eos_token" in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert any((before[name].read() != after[name].read()).any() for name in before)


@pytest.mark.slow
def test_two_processes_import_what_one_does(tmp_path):
    """Each process puts the parts of its own devices; process 0 makes the directory."""
    write(tmp_path / "in")
    two_processes.run(f"""
from moe_jax.hf import import_model
import_model({str(tmp_path / "in")!r}, {str(tmp_path / "two")!r})
""")
    cfg = import_model(tmp_path / "in", tmp_path / "one", echo=lambda line: None)
    abstract = abstract_weights(cfg.model, whole_mesh())
    one, two = (weights.load_weights(tmp_path / name, *abstract) for name in ("one", "two"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one[:2], two[:2])
    assert one[2] == two[2] and sorted(p.name for p in tmp_path.iterdir()) == ["in", "one", "two"]


def run_module(*flags: str) -> str:
    process = subprocess.Popen([sys.executable, "-m", "moe_jax.hf", *flags], cwd=REPO,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")  # fmt: skip
    return finish(process).stdout
