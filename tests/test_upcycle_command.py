"""python -m moe_jax.upcycle, and the same as a call: what it writes and says, and user mistakes as one line."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax import config, upcycle
from moe_jax.hf import export_run
from moe_jax.run import config_file, weights
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.log import read_metrics
from moe_jax.train.state import TrainState, abstract_weights
from moe_jax.upcycle import Depth, Drop, Grow, Noise, Prune, Quantize, VirtualGroups, Width
from moe_jax.upcycle.convert import _new_config
from tests import programs, two_processes
from tests.test_cli import REPO, Server, check
from tests.upcycle_source import SOFTMAX_TOPK, SOURCE, STD, TOKENS, chain_of, dense, dense_logits, mesh_of

PROGRAM = str(REPO / "moe_jax" / "upcycle" / "__main__.py")
TOKENIZER = config.TokenizerConfig(kind="huggingface", path="{}/tokenizer.json")
RUN = config.RunConfig(model=SOURCE, data=config.DataConfig(tokenizer=TOKENIZER))
ORIGIN = [{"event": "import", "from": "somewhere"}]


def write_runs(root: Path) -> None:
    """A dense run of weights with its tokenizer, one of another model, one of training, and one that is MoE."""
    tokenizer = dataclasses.replace(TOKENIZER, path=str(root / "dense" / "tokenizer.json"))
    run = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, tokenizer=tokenizer))
    weights.save_weights(root / "dense", run, dense()[1], {}, ORIGIN, {"tokenizer.json": b"{}"})
    small = dataclasses.replace(SOURCE, d_ff=16)
    config_file.save_config(root / "other", dataclasses.replace(run, model=small))
    trained = dataclasses.replace(run, init_from="runs/gone")
    config_file.save_config(root / "trained", trained)
    with Checkpoints(root / "trained", keep=2) as checkpoints:
        for n in (10, 20):
            state = TrainState(jax.numpy.int32(n), jax.tree.map(lambda w, n=n: w * n, dense()[1]), {}, ())
            checkpoints.save(n, state, {"batches": None, "tokens": 1.0}, wait=True)
    moe = VirtualGroups(4, 2, 2).config(SOURCE)
    config_file.save_config(root / "moe", dataclasses.replace(run, model=moe))
    config_file.save_config(root / "latent", dataclasses.replace(run, model=latent()))
    (root / "file").write_text("", encoding="utf-8")


def latent() -> config.ModelConfig:
    mla = config.MLAConfig(kv_rank=4, rope_dim=4)
    return dataclasses.replace(SOURCE, qk_norm=False, num_kv_heads=2, mla=mla)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("upcycle")
    write_runs(made)
    return made


@pytest.fixture(scope="module")
def server(root):
    changes = {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}  # and the XLA_FLAGS of conftest.py
    (root / "out").mkdir()
    made = Server(root / "out", os.environ | changes | programs.environment())
    yield made
    made.process.stdin.close()
    made.process.stdout.close()
    made.process.wait(10)


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    # the numbers of experts
    "--granularity=3": ["--granularity=3: must divide the dense d_ff=32", "nearest valid: 2"],
    "--granularity=0": ["--granularity=0: must be ≥ 1", "nearest valid: 1"],
    "--expansion=0": ["--expansion=0: must be ≥ 1", "nearest valid: 1"],
    "--granularity=4 --top_k=6": ["--top_k=6: must be a multiple of granularity=4", "nearest valid: 8"],
    "--granularity=4 --top_k=2": ["--top_k=2: must be a multiple of granularity=4", "nearest valid: 4"],
    "--expansion=2 --granularity=2 --top_k=6": ["--top_k=6: must be ≤ expansion × granularity = 4", "valid: 4"],
    "--granularity=4 --num_shared_experts=3": ["--num_shared_experts=3", "multiple of granularity=4", "valid: 4"],
    "--method=cluster --num_experts=5": ["--num_experts=5: must divide the dense d_ff=32", "nearest valid: 4"],
    "--method=cluster --num_experts=4 --top_k=9": ["--top_k=9: must be ≤ num_experts=4", "nearest valid: 4"],
    "--choice=shards": ["--choice=shards: needs granularity > 1", "nearest valid: 'copies'"],
    "--granularity=4 --combine=share": ["--combine=share: needs choice='shards'", "nearest valid: 'score'"],
    "--granularity=4 --choice=shards --combine=share --renormalize": ["--renormalize=True: has no effect with combine"],
    "--method=cluster --choice=shards": ["--choice=shards: has no effect without --method=virtual_groups"],
    # layers
    "--dense_layers=2": ["--dense_layers=2: must be in [0, 1]", "of the 2 layers that stay dense", "nearest valid: 1"],
    "--dense_layers=-1": ["--dense_layers=-1: must be in [0, 1]", "nearest valid: 0"],
    "--layers=2*moe": ["--layers=2*moe: is the order that dense_layers=0 says", "nearest valid: dense_layers=0"],
    "--layers=2*moe:3": ["--layers=2*moe:3: has no block with 8 experts", "nearest valid: moe without a number"],
    "--layers=2*dense": ["--layers=2*dense: has no block with 8 experts"],
    "--layers=dense(moe": ["--layers=dense(moe: at character 6, '(': opens a unit that is not closed"],
    "--layers=moe": ["--layers=moe: has 1 blocks, but the model has 2 layers", "name each layer of the model"],
    "--layers=(late,dense)": ["--layers=(late,dense): at character 6, ','", "nearest valid: '(late dense)'"],
    "--layers=moe:4*dense": ["--layers=moe:4*dense: at character 6, '*'"],
    "--layers=moe:2dense --dense_layers=1": ["--dense_layers=1: has no effect with layers"],
    "--method=none --layers=moe": ["--layers=moe: has no effect without --method=virtual_groups, cluster"],
    "--depth=-1": ["--depth=-1: must be in [1, 9999]", "nearest valid: 1"],
    "--width=40": ["--width=40: must be a multiple of d_model=16", "nearest valid: 32"],
    "--heads=3": ["--heads=3: must be a multiple of num_heads=2", "nearest valid: 4"],
    "--d_ff=20": ["--d_ff=20: must be ≥ the model's d_ff=32", "nearest valid: 32"],
    # other values
    "--drop=1.5": ["--drop=1.5: must be in [0, 1]", "nearest valid: 1.0"],
    "--noise=-1": ["--noise=-1.0: must be ≥ 0", "nearest valid: 0.0"],
    "--router_std=-1": ["--router_std=-1.0: must be ≥ 0", "nearest valid: 0.0"],
    "--routed_scaling=0": ["--routed_scaling=0.0: must be > 0", "nearest valid: 1.0"],
    "--score=sigmoid": ["--score_order=topk_score", "needs score='softmax'", "nearest valid: 'score_topk'"],
    "--scale=exat": ["--scale=exat", "exact", "paper", "none"],
    "--top_k=two": ["--top_k=two"],
    # options
    "--granularty=8": ["unknown flag --granularty; nearest valid: --granularity"],
    "stray": ["unexpected argument 'stray'"],
    "--method=cluster --scale=paper": ["--scale=paper: has no effect without --method=virtual_groups"],
    "--method=none --dense_layers=1": ["--dense_layers=1: has no effect without --method=virtual_groups, cluster"],
    "--num_experts=8": ["--num_experts=8: has no effect without --method=cluster"],
    "--noshared_indices": ["--shared_indices=False: has no effect without --drop"],
    "--depth_new=identity": ["--depth_new=identity: has no effect without --depth"],
    "--d_expert=8": ["--d_expert=8: has no effect without --method=beside or importance"],
    "--method=merge --num_experts=8": ["--num_experts=8: has no effect without --method=cluster, beside or importance"],
    "--aki": ["--aki=True: has no effect without --width, --d_ff or --heads"],
    "--scores=x": ["--scores=x: has no effect without --prune or --method=importance"],
    "--method=importance --scores=x --score_sequences=2": ["--score_sequences=2: has no effect", "without --scores"],
    "--weights=1": ["--weights=1: has no effect without several run directories that are averaged"],
    # models with experts, scores, shares
    "--prune=4": ["--from=@/dense: it has no experts, which this transform changes", "a model with experts"],
    "--from=@/moe --prune=1": ["--prune=1: must be in [2, 8]", "nearest valid: 2"],
    "--method=virtual_groups --prune=4": ["--scores=: are not known: the model that is read has no experts", "name a"],
    "--method=virtual_groups --prune=4 --scores=@/file": ["@/file: is not a valid evaluation file"],
    "--from=@/moe --grow=16": ["--from=@/moe: the model has moe.score_order='topk_score': a bias closes only"],
    "--method=beside --d_expert=5": ["--d_expert=5: must divide the dense d_ff=32", "nearest valid: 4"],
    "--method=importance --shared=40": ["--shared=40: must be in [0, 32]", "nearest valid: 32"],
    "--method=importance --scores=@/file": ["@/file: is not a NumPy file with one array of numbers"],
    "--mask=2": ["--mask=2.0: must be in [0, 1]", "nearest valid: 1.0"],
    "--from=@/trained@10,@/trained --weights=1": ["--weights=1: must be 2 numbers", "nearest valid: 1,1"],
    "--from=@/trained@10,@/trained --weights=0,0": ["--weights=0,0: must be ≥ 0, and not all 0", "nearest valid: 1,1"],
    "--from=@/trained@10,@/trained --weights=a,b": ["--weights=a,b: must be numbers"],
    "--from=@/trained@10,@/trained --method=merge --top_k=3": ["--top_k=3: must be in [1, 2]", "nearest valid: 2"],
    # sources
    "--from=@/moe": ["--from=@/moe: the model is a Mixture of Experts already, in 2 of its 2 layers"],
    "--from=@/nowhere": ["--from=@/nowhere: no such run directory"],
    "--from=@/file": ["--from=@/file: no such run directory"],
    "--from=@/dense,@/other": ["another model", "config.model.d_ff: 16", "32 now"],
    "--from=@/trained@15": ["has no step 15; it has 10, 20"],
    "--from=@/other": ["has no complete checkpoint"],
    "--from=@/latent --width=32": ["--width=32: is not available for a model with latent attention"],
    "--from=": ["--from=: must name a run directory"],
    "--workdir=@/dense": ["@/dense is not empty"],
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistake(server, root, options):
    at = lambda text: text.replace("@/", f"{root}/")
    given = [at(option) for option in options.split()]
    defaults = [f for f in (f"--from={root}/dense", f"--workdir={root}/new") if options.count(f.split("=")[0]) == 0]
    before = sorted(root.iterdir())
    status, _, stderr, compiled = server(PROGRAM, *defaults, *given)
    check(status, "", stderr, [at(part) for part in MISTAKES[options]])
    assert compiled == "" and sorted(root.iterdir()) == before


@pytest.mark.parametrize("flag", ["from", "workdir"])
def test_needed(server, root, flag):
    given = [option for option in (f"--from={root}/dense", f"--workdir={root}/new") if flag not in option.split("=")[0]]
    status, stdout, stderr, _ = server(PROGRAM, *given)
    check(status, stdout, stderr, [f"--{flag} is needed, for example --{flag}=runs/a"])


ORDER = {
    "--method=none --depth=6 --width=32 --aki": [Width(32, aki=True), Depth(6)],  # AKI reads the next layer, not a copy
    "--prune=2 --depth=6": [Prune(2), Depth(6)],  # counts are those of the model that is read
    "--method=virtual_groups --prune=4 --depth=6 --noise=0.1": [Depth(6), VirtualGroups(), Noise(0.1), Prune(4)],
    "--expert_inputs=int8": [VirtualGroups(), Quantize(None, "int8")],
    "--grow=9 --expert_weights=float": [Grow(9), Quantize("float", None)],
}


@pytest.mark.parametrize("options", ORDER)
def test_order(options):
    assert chain_of(options) == ORDER[options]


def test_settings_that_fewer_experts_do_not_allow(tmp_path):
    """They are left out one by one, with a line each; the others stay."""
    moe = dataclasses.replace(VirtualGroups(4, 2, 2).config(SOURCE).moe, score="sigmoid", score_order="score_topk",
                              selection_bias=True)  # fmt: skip
    source, after = (dataclasses.replace(SOURCE, num_dense_layers=0, moe=dataclasses.replace(moe, num_experts=e))
                     for e in (8, 2))  # fmt: skip
    more = {"over": config.RouterLossConfig(over=4), "all": config.RouterLossConfig()}
    explored = dataclasses.replace(RUN, model=source, loss=config.LossConfig(more=more),
                                   explore=config.ExploreConfig(top_k=4, noise=0.5))  # fmt: skip
    cfg, lines = _new_config(explored, after, tmp_path, tmp_path / "new")
    assert cfg.explore == config.ExploreConfig() and list(cfg.loss.more) == ["all"]
    assert sorted(line.split(" is left out: ")[0] for line in lines) == ["explore", "loss.more.over"]
    biased = config.LossConfig(load_balance_coef=0.0, bias_update="quantile")
    cfg, lines = _new_config(dataclasses.replace(RUN, model=source, loss=biased), after, tmp_path, tmp_path / "new")
    assert cfg.loss.bias_update == "sign" and lines[0].startswith("loss.bias_update is left out: model.moe.top_k=2")
    tables = dataclasses.replace(after, layers="2*table", moe=dataclasses.replace(after.moe, selection_bias=False))
    cfg, lines = _new_config(RUN, tables, tmp_path, tmp_path / "new")
    assert not cfg.loss.load_balance_coef and lines


# --- what is made ----------------------------------------------------------------------------------------------------


def load(folder, model=None):
    cfg = config_file.load_config(folder)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        return cfg, *weights.load_weights(folder, *abstract_weights(model or cfg.model, mesh_of(1, 1, 1)))


def test_command(server, root):
    """The dense function in a run directory of weights, with tokenizer and origin, ready for `init_from`."""
    folder = root / "made"
    options = ["--expansion=4", "--granularity=2", "--top_k=4", "--selection_bias", "--seed=3"]
    status, stdout, stderr, _ = server(PROGRAM, f"--from={root}/dense", f"--workdir={folder}", *options)
    assert status == 0, stderr
    assert "2 MoE of 2 layers with 8 experts of width 16, 4 a token" in stdout
    assert "κ = 2: w_up × 1.414, w_down × 1.414" in stdout
    assert "function: the same as that of the dense model\nrelative error of the logits on random tokens: " in stdout
    cfg, params, bias, origin = load(folder)
    got = upcycle.logits(cfg.model, params, TOKENS, mesh_of(1, 1, 1))
    assert np.abs(got - dense_logits()).max() < 1e-5 * np.abs(dense_logits()).max()
    assert cfg.init_from == "" and cfg.data.tokenizer.path == str(folder / "tokenizer.json")
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    assert not np.asarray(bias["layers"]["moe"]["router_bias"]).any()
    assert origin[0] == ORIGIN[0]
    assert (origin[1]["event"], origin[1]["from"], origin[1]["seed"]) == ("upcycle", [f"{root}/dense"], 3)
    chain = [VirtualGroups(4, 2, 4, moe={"selection_bias": True})]
    assert origin[1]["chain"] == json.loads(json.dumps(upcycle.describe(chain)))
    again = dataclasses.replace(cfg, init_from=str(folder), optim=dataclasses.replace(cfg.optim, lr=1.0))
    assert weights.check_same_model(again) == []


def test_everything_at_once(server, root):
    """All transforms in their order, from the mean of two steps of a run; the reasons why it is another function."""
    options = f"--from={root}/trained@10,{root}/trained --depth=3 --depth_order=stack --d_ff=40 --granularity=4 "
    options += "--top_k=4 --dense_layers=1 --num_shared_experts=4 --noise=0.1 --drop=0.5 --noshared_indices "
    options += "--scale=none --nocheck"
    status, stdout, stderr, _ = server(PROGRAM, f"--workdir={root}/all", *options.split())
    assert status == 0, stderr
    said = "function: changed: 1 more layers; scale='none'; noise on the experts (0.1); "
    assert said + "50% of the experts' hidden units are new" in stdout
    cfg, params, _, origin = load(root / "all")
    assert [t["transform"] for t in origin[-1]["chain"]] == ["Width", "Depth", "VirtualGroups", "Noise", "Drop"]
    assert (cfg.model.num_layers, cfg.model.num_dense_layers, cfg.model.d_ff) == (3, 1, 40)
    np.testing.assert_allclose(params["embed"], 15 * dense()[1]["embed"], rtol=1e-6)
    steps = [event["steps"] for o in origin[0]["origins"] for event in o]
    assert origin[0]["event"] == "average" and steps == [10, 20]
    sources = f"--from={root}/trained@10,{root}/trained"
    status, stdout, stderr, _ = server(PROGRAM, sources, f"--workdir={root}/mean", "--method=none", "--nocheck")
    assert status == 0 and "function: the same as that of the average of 2 models\n" in stdout, stderr


@pytest.mark.slow
def test_merged_pruned_and_grown(server, root):
    """Three commands: steps of a dense run as experts, their bank pruned by counts, and grown. Each keeps its origin,
    and the biases that are saved close the new experts."""
    options = ["--method=merge", "--top_k=1", "--nocheck"]
    runs = f"--from={root}/trained@10,{root}/trained,{root}/trained"
    status, _, stderr, _ = server(PROGRAM, runs, f"--workdir={root}/merged", *options)
    assert status == 0, stderr
    cfg, merged, _, origin = load(root / "merged")
    assert (cfg.model.moe.num_experts, origin[0]["event"]) == (3, "merge")
    np.testing.assert_array_equal(merged["layers"]["moe"]["w_up"][:, 1], 20 * dense()[1]["dense_layers"]["mlp"]["w_up"])
    counts = {"step": 0, "tokens_per_expert": [[[5, 1, 3]], [[0, 2, 9]]]}
    (root / "merged" / "eval.json").write_text(json.dumps(counts), encoding="utf-8")
    pruned = [f"--from={root}/merged", f"--workdir={root}/pruned", "--prune=2"]
    status, stdout, stderr, _ = server(PROGRAM, *pruned)
    assert status == 0, stderr
    assert "function: changed: 33% of the experts are gone, for the tokens that used them" in stdout
    cfg, params, _, origin = load(root / "pruned")
    assert (
        origin[-1]["chain"] == [{"transform": "Prune", "num_experts": 2}] and origin[-1]["scores"] == f"{root}/merged@0"
    )
    bank = np.asarray(merged["layers"]["moe"]["w_up"])
    np.testing.assert_array_equal(params["layers"]["moe"]["w_up"], np.stack([bank[0][[0, 2]], bank[1][[1, 2]]]))
    renormalised = dataclasses.replace(cfg.model.moe, score_order="score_topk", renormalize=True)
    run = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=renormalised))
    weights.save_weights(root / "open", run, params, {}, ORIGIN)
    status, stdout, stderr, _ = server(PROGRAM, f"--from={root}/open", f"--workdir={root}/grown", "--grow=4")
    assert status == 0 and "function: the same as before\nrelative error" in stdout, stderr
    _, _, bias, _ = load(root / "grown")
    np.testing.assert_array_equal(bias["layers"]["moe"]["router_bias"], [[0, 0, -1, -1]] * 2)


@pytest.mark.slow
def test_experts_of_units_by_scores_of_training_text(server, root):
    """The command computes them on the run's own text, as `unit_scores` does on the same rows; or takes a file."""
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text("one two three four five\n" * 400, encoding="utf-8")
    source = config.SourceConfig(kind="files", path=f"{root}/text/a.txt")
    data = config.DataConfig(sources={"a": source}, seq_len=16, batch_size=2, cache_dir=str(root / "cache"))
    cfg, params = dense(vocab_size=257)
    run = dataclasses.replace(RUN, model=cfg, data=data)
    weights.save_weights(root / "units", run, params, {}, ORIGIN)
    options = ["--method=importance", "--shared=8", "--layers=2*table", "--score_sequences=3"]
    status, stdout, stderr, _ = server(PROGRAM, f"--from={root}/units", f"--workdir={root}/units_moe", *options)
    assert status == 0, stderr
    assert "changed: 4 experts with 14 of the 32 hidden units of a layer" in stdout
    rows = upcycle.scores.training_rows(run, root / "units", 3)
    found = upcycle.unit_scores(cfg, params, rows)
    assert rows["tokens"].shape == (3, 16) and np.std(found["dense_layers"]) > 0
    np.save(root / "scores.npy", found["dense_layers"])
    made, tables = load(root / "units_moe")[1:3]
    assert tables["layers"]["moe"]["table"].shape == (2, 257, 1)
    again = [f"--workdir={root}/units_again", *options[:-1], f"--scores={root}/scores.npy"]
    assert server(PROGRAM, f"--from={root}/units", *again)[0] == 0
    jax.tree.map(np.testing.assert_array_equal, made, load(root / "units_again")[1])


@pytest.mark.slow
def test_call(root, tmp_path):
    """No flags needed. Softmax over all experts: how far off, by the router's scale."""
    lines = []
    report = upcycle.convert([str(root / "dense")], tmp_path / "a", [VirtualGroups(4, 2, 4, **SOFTMAX_TOPK)],
                             echo=lines.append)  # fmt: skip
    assert "a different sum" in report.changes and report.error > 1e-3
    errors = list(report.deviation.values())
    assert list(report.deviation) == [0.0, 0.0002, 0.002, 0.02] and errors == sorted(errors)
    assert errors[0] < 1e-5 and errors[-1] == report.error
    assert any("router_std=0.002:" in line for line in lines)
    quiet = upcycle.convert([str(root / "dense")], tmp_path / "b", [Depth(3), Drop(0.0)][:1], check=False,
                            echo=lambda _: None)  # fmt: skip
    assert quiet.error is None and load(tmp_path / "b")[0].model.num_layers == 3


def test_a_failure_leaves_nothing(root, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        upcycle.convert([str(root / "dense")], tmp_path / "a", [VirtualGroups(2)], check=False, echo=lambda _: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_training_goes_on_from_the_dense_loss(server, root):
    """The first step's loss on one batch, of the dense model and of the one made of it: equal to rounding."""
    (root / "domains" / "sums").mkdir(parents=True)
    for i in range(40):
        (root / "domains" / "sums" / f"{i}.txt").write_text(f"{i} times {i} is {i * i}\n" * 20, encoding="utf-8")
    cfg, params = dense(vocab_size=257)
    run = dataclasses.replace(RUN, model=cfg, data=config.DataConfig(seq_len=32))
    weights.save_weights(root / "bytes", run, params, {}, ORIGIN)
    options = ["--expansion=4", "--granularity=4", "--top_k=4", "--router_std=0.5"]
    assert server(PROGRAM, f"--from={root}/bytes", f"--workdir={root}/bytes_moe", *options)[0] == 0
    losses = {}
    for name in ("bytes", "bytes_moe"):
        fields = {"train.steps": 2, "train.log_every": 1, "data.batch_size": 8, "optim.warmup_steps": 1,
                  "data.cache_dir": root / "cache", "train.tensorboard": "false", "sample.tokens": 0}  # fmt: skip
        given = [f"--config=configs/continued.py:{root}/{name},{root}/domains", f"--workdir={root}/{name}_trained"]
        given += [f"--config.{field}={value}" for field, value in fields.items()]
        status, stdout, stderr, _ = server(str(REPO / "train.py"), *given)
        assert status == 0, stderr
        assert f"starting from the weights of {root}/{name}, with a fresh optimizer state" in stdout
        losses[name] = read_metrics(root / f"{name}_trained")[0]["xent"]
    assert losses["bytes_moe"] == pytest.approx(losses["bytes"], rel=1e-6)


@pytest.mark.slow
def test_transformers_computes_the_dense_function(root):
    """Upcycled with Mixtral's routing, exported, loaded by transformers: the dense model's logits."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cfg, params = dense(qk_norm=False)
    weights.save_weights(root / "plain", dataclasses.replace(RUN, model=cfg), params, {}, ORIGIN)
    chain = [VirtualGroups(4, 2, 4, score_order="score_topk", renormalize=True, router_std=STD)]
    upcycle.convert([str(root / "plain")], root / "mixtral", chain, check=False, echo=lambda _: None)
    export_run(root / "mixtral", root / "hf", echo=lambda _: None)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(root / "hf")
    assert type(loaded).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        theirs = loaded(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    ours = np.asarray(upcycle.logits(cfg, params, TOKENS, mesh_of(1, 1, 1)))
    assert np.abs(theirs - ours).max() < 1e-5 * np.abs(ours).max()


@pytest.mark.slow
def test_two_processes(root):
    """The command's work in two processes of four devices: the weights that one process makes."""
    alone, both = root / "alone", root / "both"
    chain = [VirtualGroups(4, 4, 8), Drop(0.5)]
    upcycle.convert([str(root / "dense")], alone, chain, echo=lambda _: None)
    two_processes.run(f"""
import time
from moe_jax import upcycle
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.upcycle import Drop, VirtualGroups
check = Checkpoints._check_written
if jax.process_index() == 1:  # the other process would have renamed the folder before this one looks at it
    Checkpoints._check_written = lambda *args: (time.sleep(1), check(*args))
report = upcycle.convert([{str(root / "dense")!r}], {str(both)!r}, [VirtualGroups(4, 4, 8), Drop(0.5)])
exact = upcycle.convert([{str(root / "dense")!r}], {str(root / "both_exact")!r}, [VirtualGroups(4, 4, 8)])
assert exact.changes == "" and exact.error < 1e-5, exact
for process in jax.tree.leaves(report.error):
    assert process > 0.01
""")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), load(alone)[1], load(both)[1])
