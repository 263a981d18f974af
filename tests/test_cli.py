"""User mistakes at train.py and eval.py: exit status 2, one line on stderr that says what to change, nothing compiled.

The cases run in children forked from a process that has already imported everything (`Server`): the real program from
its first line on, with its real exit status and stderr, without the seconds of importing. In test_cli_process.py some
run as users run them.
"""

import dataclasses
import os
import time
from pathlib import Path

import jax
import pytest
import tokenizers
from command_server import Server

from moe_jax import cli, config
from moe_jax.errors import UserError
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file
from moe_jax.train.state import init_state

REPO = Path(__file__).parents[1]
LIMIT = 10.0  # seconds

GOOD = """
from moe_jax import config as config_lib


def get_config():
    config = config_lib.default_config()
    config.data.sources = {"text": config_lib.source(kind="files", path="@/text/*.txt", validation_fraction=0.3)}
    config.data.seq_len = 16
    config.data.batch_size = 8
    config.model.moe.num_experts = 4
    @EDIT
    return config
"""


def write_files(root: Path) -> None:
    """Everything the cases name: texts, config files good and bad, run directories."""
    for name in ("text", "configs", "empty", "out"):
        (root / name).mkdir()
    for i in range(20):
        text = f"{i}: the quick brown fox jumps over the lazy dog\n" * 3
        (root / "text" / f"{i}.txt").write_text(text, encoding="utf-8")
    (root / "rows.jsonl").write_text('{"txt": "a b c", "n": 1}\n' * 9, encoding="utf-8")
    (root / "notes.md").write_text("# no text we read\n", encoding="utf-8")
    (root / "broken.jsonl").write_text("{nonsense\n", encoding="utf-8")
    (root / "a_file").write_text("x", encoding="utf-8")
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "home").mkdir()
    (root / "home" / "file").write_text("x", encoding="utf-8")
    edits = {
        "good": "",
        "unknown_field": "config.optim.lrr = 1e-3",
        "unknown_group": "config.zzzzzz.lr = 1e-3",
        "wrong_type": 'config.optim.lr = "fast"',
        "bool_for_int": "config.data.sources.text = config_lib.source(kind='files', path='x', weight=True)",
        "plain_dict": "config.data.sources = {'text': {'kind': 'files', 'pth': 'x'}}",
        "not_a_group": "config.data.sources = {'text': 'x.txt'}",
        "bad_source": "config.data.sources = {'text': config_lib.source(kind='files')}",
        "no_sources": "config.data.sources = {}",
        "bug": "config.optim.lr = 1 / 0",
        "no_such_loss": "config.loss.more = {'a': config_lib.router_loss(kind='mutual', coef=0.1)}",
        "no_such_group": "config.optim.groups = {'a': config_lib.parameter_group(match='/w_ruoter$', freeze=True)}",
        "no_platform": "import jax; jax.config.update('jax_platforms', 'cup')",  # as JAX_PLATFORMS=cup
        "no_plugin": "import jax; jax.config.update('jax_platforms', 'rocm')",
    }
    for name, edit in edits.items():
        text = GOOD.replace("@EDIT", edit).replace("@", str(root))
        (root / "configs" / f"{name}.py").write_text(text, encoding="utf-8")
    (root / "configs" / "syntax.py").write_text("def get_config():\n    return (1,\n", encoding="utf-8")
    (root / "configs" / "no_function.py").write_text("config = 1\n", encoding="utf-8")
    (root / "configs" / "returns_none.py").write_text("def get_config():\n    pass\n", encoding="utf-8")
    (root / "configs" / "missing_import.py").write_text("import no_such_package\n", encoding="utf-8")

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(599)} | {"</s>": 599}, "w0"))
    made.save(str(root / "tokenizer.json"))
    (root / "bad_tokenizer.json").write_text("{}", encoding="utf-8")


def write_runs(root: Path) -> None:
    """Run directories for eval.py, and one of another configuration for train.py."""
    text = config.SourceConfig(kind="files", path=f"{root}/text/*.txt", validation_fraction=0.3)
    cfg = config.RunConfig(data=config.DataConfig(batch_size=8, seq_len=16, sources={"text": text}))
    config_file.save_config(root / "run", cfg)
    for name, body in {"broken_run": '{"seed": ', "odd_run": "[]", "old_run": '{"sed": 1}'}.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(body, encoding="utf-8")


def environment(root: Path) -> dict[str, str]:
    """Of a program under test: a CPU, and a cache of its own."""
    changes = {"JAX_PLATFORMS": "cpu", "MOE_JAX_CACHE": str(root / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    changes["HOME"] = str(root / "home")
    changes["PYTHONPATH"] = str(REPO)  # which `python -m benchmarks.…` has by itself
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | changes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("cli")
    write_files(made)
    write_runs(made)
    return made


@pytest.fixture(scope="module")
def server(root):
    made = Server(root / "out", environment(root))
    yield made
    made.process.stdin.close()
    made.process.stdout.close()
    made.process.wait(10)


def check(status: int, stdout: str, stderr: str, says: list[str]) -> None:
    assert status == 2, stderr
    assert stdout == ""
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert len(stderr) < 600
    for part in says:
        assert part in stderr, f"{part!r} is not in {stderr!r}"


# --- one override of a good configuration: what it says -------------------------------------------------------------

OVERRIDES = {
    # names
    "optim.lrr=1": ["config.optim.lrr: is not a field; nearest valid name: lr"],
    "optm.lr=1": ["config.optm: is not a field; nearest valid name: optim"],
    "seq_len=64": ["config.seq_len: is not a field; nearest valid name: config.data.seq_len"],
    "optim.lr.x=1": ["config.optim.lr.x: is not a field", "type float"],
    "data.sources.txt.weight=1": ["config.data.sources.txt: is not a field; nearest valid name: text"],
    "optim..lr=1": ["config.optim..lr", "is not a field"],
    # types
    "optim.lr=abc": ["config.optim.lr='abc': must be of type float"],
    "optim.lr=": ["config.optim.lr='': must be of type float"],
    "data.batch_size=2.5": ["config.data.batch_size='2.5': must be of type int"],
    "train.tensorboard=maybe": ["config.train.tensorboard='maybe': must be of type bool"],
    "optim=3": ["config.optim='3': is a group of fields; set one of them; nearest valid: --config.optim.beta1="],
    # ranges
    "optim.lr=-1": ["config.optim.lr=-1.0: must be ≥ 0", "nearest valid: 0"],
    "optim.lr=nan": ["config.optim.lr=nan: must be finite and ≥ 0", "nearest valid: 0"],
    "optim.clip_norm=inf": ["config.optim.clip_norm=inf: must be finite and ≥ 0", "nearest valid: 0"],
    "optim.beta2=1.5": ["config.optim.beta2=1.5: must be in [0.0, 1.0]", "nearest valid: 1.0"],
    "data.batch_size=0": ["config.data.batch_size=0: must be ≥ 1", "nearest valid: 1"],
    "train.steps=0": ["config.train.steps=0: must be ≥ 1"],
    "seed=-1": ["config.seed=-1: must be in [0, 2147483647]", "nearest valid: 0"],
    # choices
    "optim.name=moun": ["config.optim.name='moun': must be one of muon, adamw", "nearest valid: 'muon'"],
    "model.moe.score=softmx": ["config.model.moe.score='softmx': must be one of", "nearest valid: 'softmax'"],
    "model.compute_dtype=float16": ["config.model.compute_dtype='float16'", "nearest valid: "],
    "loss.balance_batch=globl": ["config.loss.balance_batch='globl'", "integer or one of global", "'global'"],
    # one field against another
    "model.moe.top_k=5": ["config.model.moe.top_k=5: must be ≤ num_experts=4", "nearest valid: 4"],
    "model.moe.num_groups=3": ["config.model.moe.num_groups=3: must divide num_experts=4", "nearest valid: "],
    "model.moe.top_groups=2": ["config.model.moe.top_groups=2: must be ≤ num_groups=1", "nearest valid: 1"],
    "model.num_kv_heads=3": ["config.model.num_kv_heads=3: must divide num_heads=4", "nearest valid: "],
    "model.head_dim=15": ["config.model.head_dim=15: must be even", "nearest valid: 16"],
    "model.num_dense_layers=5": ["config.model.num_dense_layers=5: must be ≤ num_layers=4", "nearest valid: 4"],
    "model.mla.q_rank=4": ["config.model.mla.q_rank=4: needs kv_rank > 0", "nearest valid: 0"],
    "model.max_seq_len=8": ["must be ≤ model.max_seq_len=8", "nearest valid: 8"],
    "init_from={d}/nothing": ["config.init_from='", "/nothing': is not a run directory"],
    "model.vocab_size=256": ["config.model.vocab_size=256: must hold the tokenizer's 257 tokens", "257"],
    "train.micro_batches=3": ["config.train.micro_batches=3: must divide data.batch_size=8", "nearest valid: "],
    "loss.balance_batch=3": ["config.loss.balance_batch=3: must divide data.batch_size=8", "nearest valid: "],
    "loss.accumulation=runing": ["config.loss.accumulation='runing'", "exact, running", "'running'"],
    "loss.load_balance_stop=-1": ["config.loss.load_balance_stop=-1: must be ≥ 0", "nearest valid: 0"],
    "loss.bias_target=(1.0,2.0)": ["config.loss.bias_target=(1.0, 2.0): needs model.moe.selection_bias=True", "()"],
    "loss.bias_target=x": ["config.loss.bias_target"],
    "loss.balance_batch=0": ["config.loss.balance_batch=0: must be ≥ 1 or 'global'", "nearest valid: 1"],
    "optim.warmup_steps=1000": ["config.optim.warmup_steps=1000: must be < train.steps=1000", "nearest valid: 999"],
    "model.moe.score_order=topk_score model.moe.score=sigmoid": ["score_order='topk_score': needs", "softmax"],
    "data.sources.text.weight=0": ["config.data.sources={'text': 0.0}: weights must not all be 0"],
    # routing
    "model.moe.router=linaer": ["config.model.moe.router='linaer': must be one of", "nearest valid: 'linear'"],
    "explore.random.start=1.0": ["config.explore.random.start=1.0: has no effect with steps=0", "nearest valid: 0.0"],
    "explore.random.start=nan": ["config.explore.random.start=nan: must be finite and ≥ 0", "nearest valid: 0"],
    "explore.random.start=1 explore.random.steps=5 explore.random.form=exponential": [
        "config.explore.random.form='exponential': needs start > 0 and end > 0", "'linear'"],
    "explore.top_k=5": ["config.explore.top_k=5: must be ≤ 4, the choices that each router has", "nearest valid: 4"],
    "explore.noise=1.0 model.num_dense_layers=4": ["config.explore.noise=1.0: needs layers whose router chooses"],
    "model.moe.choice=expert": ["config.loss.load_balance_coef=0.01: is not available with", "nearest valid: 0.0"],
    "model.moe.choice=expert loss.load_balance_coef=0": ["config.sample.tokens=120: must be 0 with", "valid: 0"],
    "model.moe.identity_experts=1 model.moe.num_groups=2": ["identity_experts=1: is not available with num_groups"],
    "model.layers=4*table model.moe.selection_bias=true": ["config.model.moe.selection_bias=True: has no effect"],
    # the machine
    "mesh.data=3": ["config.mesh=(3, 1, 1): must multiply to the 1 devices present", "-1"],
    "mesh.fsdp=2": ["config.mesh.data=-1: the other axes' 2 must divide the 1 devices present", "nearest valid"],
    "mesh.fsdp=-1": ["config.mesh.data=-1: only one of data, fsdp, expert=(-1, -1, 1) may be −1"],
    "mesh.expert=0": ["config.mesh.expert=0: must be ≥ 1, or −1", "nearest valid: 1"],
    "model.attention=cudnn": ["config.model.attention='cudnn': needs a GPU, this is cpu", "use 'auto'"],
    "model.attention=splash": ["config.model.attention='splash': needs a TPU, this is cpu", "use 'auto'"],
    "model.moe.grouped_matmul=hopper": ["config.model.moe.grouped_matmul='hopper': needs a Hopper GPU", "cpu"],
    # the data
    "data.sources.text.path={d}/nothing/*.txt": ["config.data.sources.text.path='", "matches no file; nearest valid"],
    "data.sources.text.path={d}/text": ["config.data.sources.text.path='", "is a folder; nearest valid", "*.txt"],
    "data.sources.text.path={d}/notes.md": ["config.data.sources.text.path='", "not one of .txt .jsonl .csv .parquet"],
    "data.sources.text.path={d}/rows.jsonl": ["text.text_field='text': is not a field of rows.jsonl", "'txt'"],
    "data.sources.text.path={d}/broken.jsonl": ["config.data.sources.text.path='", "cannot be read"],
    "data.sources.text.domain_field=lang": ["config.data.sources.text.domain_field='lang'", "set domain instead"],
    "data.sources.text.kind=tfds data.sources.text.name=mnistt": ["text.name='mnistt'", "TFDS", "'mnist'"],
    "data.sources.text.kind=tfds": ["config.data.sources.text.name='': is needed for kind='tfds'", "'stdlib_text'"],
    "data.sources.text.validation_fraction=0": ["config.data.sources=['text']", "have no held-out text"],
    "data.tokenizer.kind=huggingface": ["config.data.tokenizer.path='': is needed for kind='huggingface'"],
    "data.tokenizer.kind=huggingface data.tokenizer.path={d}/tokenizr.json": [
        "config.data.tokenizer.path='", "is not a file; nearest valid: '", "/tokenizer.json'",
    ],
    "data.tokenizer.kind=huggingface data.tokenizer.path={d}/bad_tokenizer.json": [
        "config.data.tokenizer.path='", "is not a tokenizer.json",
    ],
    "data.tokenizer.kind=huggingface data.tokenizer.path={d}/tokenizer.json": [
        "config.model.vocab_size=512: must hold the 600 tokens of the text; nearest valid: 600",
    ],
    "data.cache_dir={d}/a_file": ["config.data.cache_dir='", "(is a file)", "set $MOE_JAX_CACHE or"],
    "train.wandb_project=x": ["config.train.wandb_project='x': needs Weights & Biases, which is not", "pip install"],
    "loss.more.micro.coef=0.1": ["a config file makes a new entry", "config.router_loss("],
    "optim.groups.a.lr=0.1": ["a config file makes a new entry", "config.parameter_group("],
    "data.sources.other.path=x": ["other: is not a field; nearest valid name: text; a ", "config.source(kind='files'"],
    "data.seq_len=1000000": ["config.data.seq_len=1000000: must be ≤ ", "data.sources.text", "nearest valid: "],
}  # fmt: skip


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_override(server, root, overrides):
    changes = [f"--config.{text}" for text in overrides.replace("{d}", str(root)).split()]
    began = time.perf_counter()
    workdir = root / "runs" / str(server.count)
    *result, compiled = server("train.py", f"--config={root}/configs/good.py", f"--workdir={workdir}", *changes)
    check(*result, OVERRIDES[overrides])
    assert result[-1].startswith("error: config.")
    assert time.perf_counter() - began < LIMIT and compiled == ""
    left = {p.name for p in workdir.iterdir()} if workdir.exists() else set()
    assert left <= {"lock"}  # the directory is still free for the mended command


def test_compilations_are_seen(server, root):
    script = root / "compiles.py"
    script.write_text("import jax\njax.jit(lambda x: x + 1)(1.0)\n", encoding="utf-8")
    status, _, stderr, compiled = server(str(script))
    assert (status, stderr) == (0, "") and compiled


# --- everything else: arguments, what it says -----------------------------------------------------------------------

TRAIN = "train.py --config={d}/configs/good.py --workdir={d}/runs/x "
OTHER = {
    # config files
    "train.py --workdir={d}/runs/x --config=configs/finetune.py:{d}/a": [
        "error: --config=configs/finetune.py: config.data.sources=", "needs a file of answers after the run directory"],
    "train.py --config={d}/configs/godo.py --workdir={d}/runs/x": ["godo.py: no such file; nearest", "/good.py"],
    "train.py --config=nowhere/debgu.py --workdir={d}/runs/x": ["nowhere/debgu.py: no such", "configs/debug.py"],
    "train.py --config={d}/configs --workdir={d}/runs/x": ["/configs: is a folder, not a file; nearest", "/configs/"],
    "train.py --config= --workdir={d}/runs/x": ["--config=: is a folder, not a file; nearest valid: configs/"],
    "train.py --config={d}/configs/syntax.py --workdir={d}/runs/x": ["/syntax.py: line 2, `return (1,`: "],
    "train.py --config={d}/configs/no_function.py --workdir={d}/runs/x": ["/no_function.py: defines no function get"],
    "train.py --config={d}/configs/returns_none.py --workdir={d}/runs/x": ["must return a ConfigDict, not NoneType"],
    "train.py --config={d}/configs/missing_import.py --workdir={d}/runs/x": ["line 1", "no_such_package"],
    "train.py --config={d}/configs/bug.py --workdir={d}/runs/x": ["line 11, `config.optim.lr = 1 / 0`: ZeroDivision"],
    "train.py --config={d}/configs/unknown_field.py --workdir={d}/runs/x": [
        "/unknown_field.py: line 11, `config.optim.lrr = 1e-3`: is not a field; nearest valid name: lr",
    ],
    "train.py --config={d}/configs/unknown_group.py --workdir={d}/runs/x": ["`config.zzzzzz.lr = 1e-3`: is not a "],
    "train.py --config={d}/configs/wrong_type.py --workdir={d}/runs/x": ['`config.optim.lr = "fast"`: ', "float"],
    "train.py --config={d}/configs/bool_for_int.py --workdir={d}/runs/x": ["config.weight=True: must be of type float"],
    "train.py --config={d}/configs/plain_dict.py --workdir={d}/runs/x": [
        "config.data.sources.text.pth='x': is not a field; nearest valid name: path",
    ],
    "train.py --config={d}/configs/not_a_group.py --workdir={d}/runs/x": ["sources.text='x.txt': must be a group"],
    "train.py --config={d}/configs/bad_source.py --workdir={d}/runs/x": ["config.path='': is needed for kind='files'"],
    "train.py --config={d}/configs/no_sources.py --workdir={d}/runs/x": ["config.data.sources={}: must name at least"],
    "train.py --config={d}/configs/no_such_loss.py --workdir={d}/runs/x": [
        "config.loss.more.a.kind='mutual': must be one of load_balance", "nearest valid: 'mutual_information'",
    ],
    "train.py --config={d}/configs/no_such_group.py --workdir={d}/runs/x": [
        "config.optim.groups.a.match='/w_ruoter$': matches no parameter of ", "valid: 'layers/moe/w_router'",
    ],
    # flags
    TRAIN + "--weights=ema": ["--weights=ema needs --config.init_from"],
    TRAIN + "--weights=emma": ["--weights=emma", "ema"],
    "train.py": ["--workdir is needed"],
    "train.py --config={d}/configs/good.py": ["--workdir is needed"],
    "train.py --workdir={d}/runs/x": ["--config is needed, for example --config=configs/quickstart.py"],
    "train.py --workdir={d}/runs/x --config.optim.lr=1": ["--config.optim.lr needs a config file before it"],
    "train.py --config.optim.lr=1 --config={d}/configs/good.py --workdir={d}/runs/x": ["--config.optim.lr=1"],
    TRAIN + "--wrkdir=x": ["unknown flag --wrkdir; nearest valid: --workdir"],
    TRAIN + "--config.optim.lr": ["config.optim.lr='': must be of type float"],
    TRAIN + "--config.optim.lr --config.seed=1": ["config.optim.lr='--config.seed=1': must be of type float"],
    TRAIN + "--noconfig.optim.lr": ["config.optim.lr='': must be of type float"],
    TRAIN + "--flagfile={d}/no_flags": ["error: Unable to open flagfile: ", "/no_flags"],
    TRAIN + "--distributed=maybe": ["--distributed=maybe"],
    TRAIN + "config.optim.lr=1": ["unexpected argument 'config.optim.lr=1'; options start with --"],
    # the run directory
    "train.py --config={d}/configs/good.py --workdir={d}/run": [
        "belongs to another configuration (config.model.moe.num_experts: 8 in the run, 4 now)", "another --workdir",
    ],
    "train.py --config={d}/configs/good.py --workdir={d}/dangling": ["is a link to ", "/nowhere, which does not exist"],
    "train.py --config={d}/configs/good.py --workdir=~nobody_here/a": ["~nobody_here/a: no home folder is known for"],
    "train.py --config={d}/configs/good.py --workdir={d}/a_file": ["/a_file: is a file", "directory"],
    "train.py --config={d}/configs/good.py --workdir={d}/a_file/run": ["/a_file/run: cannot be made"],
    "train.py --config={d}/configs/good.py --workdir={d}/" + 300 * "n": ["/nnnnnn", "File name too long"],
    "train.py --config={d}/configs/no_platform.py --workdir={d}/runs/x": ["JAX_PLATFORMS='cup': JAX finds no", "'cpu'"],
    "train.py --config={d}/configs/no_plugin.py --workdir={d}/runs/x": ["JAX_PLATFORMS='rocm': JAX finds no", "'cpu'"],
    "train.py --config={d}/configs/good.py --workdir=/proc/run": ["--workdir=/proc/run: cannot be made"],
    "train.py --config={d}/configs/good.py --workdir={d}/broken_run": ["/config.json is not valid JSON"],
    # eval.py
    "eval.py": ["--workdir is needed"],
    "eval.py --workdir={d}/empty": ["/empty is not a run directory"],
    "eval.py --workdir={d}/nowhere": ["/nowhere: no such directory"],
    "eval.py --workdir=~/nowhere": ["--workdir={d}/home/nowhere: no such directory"],
    "train.py --config=~/no.py --workdir={d}/runs/x": ["--config={d}/home/no.py: no such file"],
    "train.py --config={d}/configs/good.py --workdir=~/file/run": ["--workdir={d}/home/file/run: cannot be made"],
    "moe_jax/hf/__main__.py export --workdir=~/no --to=~/x": ["{d}/home/no/config.json does not exist"],
    "moe_jax/hf/__main__.py import --from=~/no.gguf --workdir=~/x": ["{d}/home/no.gguf"],
    "moe_jax/hf/__main__.py import --from=~/x --workdir=~/y --adapter": ["import takes no --adapter=True", "of export"],
    "moe_jax/hf/__main__.py import --from=~/x --workdir=~/y --weights=ema": ["import takes no --weights=ema"],
    "moe_jax/hf/__main__.py export --to=~/x --workdir=~/y --base=~/z": ["export takes no --base=", "of import"],
    "moe_jax/hf/__main__.py export --to=~/x --workdir=~/y --dtype=q8_0": ["--dtype=q8_0: needs --to=FILE.gguf"],
    "moe_jax/hf/__main__.py export --to=~/x --workdir=~/y --experts_dtype=q4_0": ["--experts_dtype=q4_0: needs --to="],
    "moe_jax/hf/__main__.py export --to=~/x.gguf --workdir=~/y --adapter": ["adapters are written as a folder"],
    "moe_jax/hf/__main__.py imprt --workdir=~/x": ["nearest valid: import or export"],
    "moe_jax/upcycle/__main__.py --from=~/a,~/b --workdir=~/x": ["--from={d}/home/a: no such run directory"],
    "moe_jax/mixtures/__main__.py": ["no command is named; there are sample, fit"],
    "moe_jax/mixtures/__main__.py sample --prior=a:1,b:much": ["--prior: 'b' has 'much', which must be"],
    "moe_jax/mixtures/__main__.py sample --prior=a:1,b:1 --fit=x": ["sample takes no --fit, which is"],
    "moe_jax/mixtures/__main__.py law --form=chinchila --data=x": ["--form=chinchila: is not one; nearest"],
    "moe_jax/mixtures/__main__.py law --data={d}/rows.jsonl": ["has no column 'params'"],
    "moe_jax/mixtures/__main__.py cluster --data={d}/no.txt --out={d}/out": ["--data={d}/no.txt: matches no file"],
    "eval.py --workdir={d}/a_file": ["/a_file: no such directory"],
    "eval.py --workdir={d}/broken_run": ["/config.json is not valid JSON"],
    "eval.py --workdir={d}/odd_run": ["must be a group of RunConfig fields"],
    "eval.py --workdir={d}/old_run": ["config.sed=1: is not a field; nearest valid name: seed"],
    "eval.py --workdir={d}/run": ["/checkpoints has no complete checkpoint"],
    "eval.py --workdir={d}/run --step=first": ["--step=first"],
    "eval.py --workdir={d}/run --batches=-1": ["--batches=-1"],
    "eval.py --workdir={d}/run --config=x": ["unknown flag --config"],
    "eval.py --workdir={d}/run --tasks={d}/no.jsonl": ["/no.jsonl: no such file"],
    "eval.py --workdir={d}/run --text={d}/no.txt": ["/no.txt: no such file"],
    "eval.py --workdir={d}/run --tasks=a --prompt=b": ["--prompt=b: has no effect with --tasks or --text"],
    "eval.py --workdir={d}/run --documents=3": ["--documents=3: needs --tasks"],
    "eval.py --workdir={d}/run --experts=off:99/1": ["--experts=off:99/1: layer 99: the model has", "nearest valid: "],
    "eval.py --workdir={d}/run --experts=": ["--experts=: names nothing"],
    "eval.py --workdir={d}/run --contrast=code": ["--contrast=code: takes two domains"],
    "eval.py --workdir={d}/run --tasks=a --contrast=b,c": ["--contrast=b,c: has no effect with --tasks or --text"],
    "eval.py --workdir={d}/run --keep_experts=50,x": ["--keep_experts=50,x: 'x' must be a number > 0 and ≤ 100"],
    "eval.py --workdir={d}/run --keep_experts=50 --experts=off:0/1": ["has no effect with --keep_experts"],
    "eval.py --workdir={d}/run --keep_experts=50,5": ["--keep_experts=5: keeps 0 of 8 experts of layer 0, but a token"],
    "eval.py --workdir={d}/run --keep_by=code": ["--keep_by=code: needs --keep_experts"],
    "eval.py --workdir={d}/run --keep_experts=50 --keep_by=verse": ["--keep_by=verse: must be a domain"],
    "eval.py --workdir={d}/run --config.model.d_modl=3": ["config.model.d_modl: is not a field", "name: d_model"],
    "eval.py --workdir={d}/run --config.model.d_model=3": ["config.model.d_model='3': describes the weights"],
    "eval.py --workdir={d}/run --config.data.seq_len": ["--config.data.seq_len: needs a value"],
    "eval.py {d}/run": ["--workdir is needed"],
}  # fmt: skip


@pytest.mark.parametrize("command", OTHER)
def test_command(server, root, command):
    began = time.perf_counter()
    *result, compiled = server(*command.replace("{d}", str(root)).split())
    check(*result, [part.replace("{d}", str(root)) for part in OTHER[command]])
    assert time.perf_counter() - began < LIMIT and compiled == ""
    assert not (root / "a_file").is_dir() and not (root / "runs" / "x" / "config.json").exists()


PROGRAMS = [p for p in sorted((REPO / "benchmarks").glob("*.py")) if "__main__" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", [REPO / "train.py", REPO / "eval.py", *PROGRAMS], ids=lambda path: path.stem)
def test_help(server, path):
    """Every program can be started and tells what it does: two that share code define no flag twice."""
    _, stdout, stderr, compiled = server(str(path), "--help")
    purpose = path.read_text(encoding="utf-8").split('"""')[1].split("\n\n")[0].split()
    assert stderr == compiled == "" and " ".join(purpose) in " ".join(stdout.split())
    assert path.name != "train.py" or ("--config:" in stdout and "docs/config.md" in stdout)


def test_what_stdout_cannot_encode_is_replaced(server, root):
    script = root / "prints.py"
    lines = ["import sys; from moe_jax import cli", 'sys.stdout.reconfigure(encoding="ascii", errors="strict")']
    script.write_text("\n".join([*lines, 'cli.run(lambda argv: print("a → ü \\ud800 b"))']), encoding="utf-8")
    assert server(str(script))[:3] == (0, "a ? ? ? b\n", "")


def test_first_step_without_rounds(server):
    """argparse's error, after its line of usage: no table without rows."""
    status, stdout, stderr, compiled = server("benchmarks/first_step.py", "--config=configs/debug.py", "--rounds=0")
    assert (status, stdout, compiled) == (2, "", "")
    assert stderr.endswith("error: --rounds=0: must be ≥ 1; nearest valid: 1\n")


# --- a run with a checkpoint -----------------------------------------------------------------------------------------


def test_step_that_does_not_exist(server, root):
    """A checkpoint of step 3, written here: eval.py names the steps there are."""
    cfg = config_file.load_config(root / "run")
    small = {"vocab_size": 257, "d_model": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8}
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **small))
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    with checkpoint.Checkpoints(root / "run", keep=1) as checkpoints:
        checkpoints.save(3, init_state(cfg, mesh), {"batches": {"batches": 3}, "tokens": 0.0})
    *result, compiled = server("eval.py", f"--workdir={root}/run", "--step=4")
    check(*result, ["/checkpoints has no step 4; it has 3"])
    assert compiled == ""
    *result, compiled = server("eval.py", f"--workdir={root}/run", "--earlier=3")
    check(*result, ["--earlier=3: is not a checkpoint before the one evaluated; the run keeps no earlier one"])
    assert compiled == ""
    with pytest.raises(UserError, match="nearest valid: 20;"):
        cli.check_earlier(25, 30, [10, 20, 30, 40])
    cli.check_earlier(20, 30, [10, 20, 30, 40])
