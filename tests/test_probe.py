"""Observations of controllers against gradients of each loss alone, and whole runs with controllers that are killed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_phases import made_corpus
from test_survival_runs import finish, rows, start, start_several

from moe_jax import config, model
from moe_jax.errors import ConfigError
from moe_jax.mixtures.probe import Probe, cross_entropy_alone
from moe_jax.moe.program import Program
from moe_jax.parallel import sharding
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.train import knobs
from moe_jax.train.gradients import forward
from moe_jax.train.state import init_state
from moe_jax.tree import flatten


def run_config(corpus):
    """A toy whose training loss has more than its cross-entropy."""
    c = config.default_config()
    c.model.update(vocab_size=257, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, remat="full")
    c.model.update(compute_dtype="float32")
    c.model.moe.update(num_experts=4, top_k=2, d_expert=16)
    c.optim.update(name="adamw")
    c.loss.update(load_balance_coef=1.0)
    c.explore.update(noise=1.0)
    c.train.update(micro_batches=2)
    cfg = config.build(c)
    mixture = config.MixtureConfig("dga", probe_batches=2)
    return dataclasses.replace(cfg, data=dataclasses.replace(corpus._cfg, batch_size=16), mixture=mixture)


def drawn(probe, name, split):
    """The rows that a probe reads, on one device."""
    probe._mesh, mesh = MESH, probe._mesh
    taken = list(probe._batches(5, name, split))
    probe._mesh = mesh
    return taken


def test_a_probe_draws_no_random_numbers(corpus):
    cfg = run_config(corpus)
    pools = {"pool_min": 2, "pool_max": 3, "pool_from": "all", "pool_prefix": 4}
    for fields in ({"compute": "capacity", "overflow": "random"}, pools):
        moe = dataclasses.replace(cfg.model.moe, **fields)
        noisy = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))
        assert knobs.draws_noise(noisy) and not knobs.draws_noise(cross_entropy_alone(noisy))
    moe = dataclasses.replace(cfg.model.moe, **pools | {"pool_from": "prefix", "pool_size": 2})
    with pytest.raises(ConfigError, match=r"pool_from='prefix': is not available with mixture\.controller='dga'"):
        dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))


MESH = sharding.make_mesh((1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return made_corpus(tmp_path_factory.mktemp("probe"))


@pytest.mark.slow
def test_products_are_those_of_the_gradients_of_each_loss_alone(corpus):
    """On (2, 2, 2), in two micro-batches, with remat: against the mean negative log-likelihood on one device."""
    cfg, mesh = run_config(corpus), sharding.make_mesh((2, 2, 2))
    graph = model.abstract(cfg.model, Program.choose(cfg.model, MESH, 16 * cfg.data.seq_len, cfg.data.seq_len))
    probe, state = Probe(cfg, mesh, corpus), init_state(cfg, mesh)
    assert probe.targets == ("a", "b", "c")

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            out, matrix = forward(graph, params, {}, batch)
            logs = jax.nn.log_softmax(jnp.einsum("bsd,vd->bsv", out.hidden, matrix[...]))
            nll = -jnp.sum(logs * jax.nn.one_hot(batch.targets, logs.shape[-1]), -1)
            return jnp.sum(nll * batch.weights) / jnp.sum(batch.weights)

        return jax.grad(loss)(params)

    params = jax.device_get(state.params)
    with jax.set_mesh(MESH):
        params = jax.device_put(params)
        of = lambda name, split: [jax.device_get(gradient(params, batch)) for batch in drawn(probe, name, split)]
        target = [g for name in "abc" for g in of(name, "validation")]
        sources = {name: of(name, "train") for name in "abc"}
    mean = lambda grads: jax.tree.map(lambda *g: np.mean(g, 0, np.float64), *grads)
    target, sources = flatten(mean(target)), {name: flatten(mean(grads)) for name, grads in sources.items()}

    plain = probe.make_alignment()
    found = plain(5, state)
    want = {name: sum(np.vdot(g, target[path]) for path, g in grads.items()) for name, grads in sources.items()}
    for name in "abc":
        np.testing.assert_allclose(found[name], want[name], rtol=2e-4)
    assert plain(5, state) == found != plain(6, state)  # the rows depend on the step

    by_moment = probe.make_alignment(by_second_moment=True)
    for name, value in by_moment(5, state).items():  # no moments yet: as if all were 1
        np.testing.assert_allclose(value, found[name], rtol=1e-5)
    rng = np.random.default_rng(0)
    moments = {path: rng.uniform(0.5, 2.0, g.shape).astype(np.float32) for path, g in target.items()}
    moments["embed"][:9] = 0.0

    def moved(path, x):
        name = "/".join(str(getattr(k, "key", getattr(k, "name", ""))) for k in path)
        if name.endswith("count"):
            return jnp.full_like(x, 3)
        where = [p for p in moments if name.endswith(f"nu/{p}")]
        return jax.device_put(moments[where[0]], x.sharding) if where else x

    opt_state = jax.tree_util.tree_map_with_path(moved, state.opt_state)
    assert len(optax.tree_utils.tree_get_all_with_path(opt_state, "nu")) == 3
    value = by_moment(5, state._replace(opt_state=opt_state))
    root = {path: np.sqrt(v / (1 - cfg.optim.beta2**3)) + 1e-8 for path, v in moments.items()}
    for name, grads in sources.items():
        parts = (np.where(moments[p] > 0, g * target[p] / root[p], 0).sum() for p, g in grads.items())
        np.testing.assert_allclose(value[name], sum(parts), rtol=2e-4)


@pytest.mark.slow
def test_losses_are_of_the_same_rows_at_all_steps(corpus):
    cfg = dataclasses.replace(run_config(corpus), mixture=config.MixtureConfig("aioli", target="b"))
    probe, state = Probe(cfg, MESH, corpus), init_state(cfg, MESH)
    observe = probe.make_losses()
    found = observe(3, state)
    assert found == observe(9, state) and list(found) == ["b"]
    assert abs(found["b"] - np.log(257)) < 0.1
    mute = object.__new__(type(corpus))
    mute.__dict__ = corpus.__dict__ | {"_validation": {}}
    with pytest.raises(ConfigError, match=r"mixture\.target='b': has no row of held-out text"):
        Probe(cfg, MESH, mute)
    longest = int(np.diff(corpus.stores["b", "validation"].offsets).max())
    pools = {"pool_min": 2, "pool_from": "prefix", "pool_size": 2, "pool_prefix": longest + 1}
    data = dataclasses.replace(cfg.data, seq_len=longest + 2)
    model_ = dataclasses.replace(cfg.model, moe=dataclasses.replace(cfg.model.moe, **pools))
    with pytest.raises(ConfigError, match=r"pool_prefix=\d+: leaves nothing to score"):
        Probe(dataclasses.replace(cfg, model=model_, data=data), MESH, corpus)


# --- whole runs ------------------------------------------------------------------------------------------------------

CONFIG = """
import runpy

from moe_jax import config as config_lib


def get_config():
    config = runpy.run_path("configs/debug.py")["get_config"]()
    of = lambda name: config_lib.source(kind="files", path=f"@/{name}*.txt", validation_fraction=0.3)
    config.data.sources = {name: of(name) for name in ("red", "green")}
    config.mixture.update(controller="dga", every=4, rate=3.0, target="red")
    config.train.update(steps=12, checkpoint_every=2)
    config.sample.tokens = 0
    return config
"""
# train.py that dies as $KILL says: before a batch, after a decision that no checkpoint has, or where it goes on with
# batches. Batch 5 is poisoned.
KILLED = """
import os, runpy, signal
import numpy as np
from moe_jax.data.phases import MixedIterator
from moe_jax.mixtures.online import Mixer
from moe_jax.run.checkpoint import Checkpoints
deliver, begin, save = MixedIterator.__next__, Mixer.begin, Checkpoints.save
restore = MixedIterator.set_state
what, at = os.environ["KILL"].split()
die = lambda this, n: (this, n) == (what, int(at)) and os.kill(os.getpid(), signal.SIGKILL)
def next_batch(self):
    number = self._count
    die("batch", number)
    rows = dict(deliver(self))
    return rows | {"weights": np.full_like(rows["weights"], np.nan)} if number == 5 else rows
def decide(self, steps, state):
    line = begin(self, steps, state)
    die("decision", steps)
    return line
def set_state(self, state):
    die("state", state["batches"])
    restore(self, state)
def save_whole(self, step, state, data_state, wait=False):
    save(self, step, state, data_state, wait=True)  # so that a killed run has the checkpoint
MixedIterator.__next__, Mixer.begin, Checkpoints.save = next_batch, decide, save_whole
MixedIterator.set_state = set_state
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with text of two alphabets, a configuration, and the run "straight"."""
    made, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    for name, letters in (("red", "abcdef"), ("green", "uvwxyz")):
        for i in range(40):
            text = " ".join("".join(rng.choice(list(letters), 5)) for _ in range(60))
            (made / f"{name}{i}.txt").write_text(text, encoding="utf-8")
    (made / "config.py").write_text(CONFIG.replace("@", str(made)), encoding="utf-8")
    run(made, "straight", "never -1")
    return made


def run(root, name, kill, *flags, status=0):
    return finish(root, name, start(root, name, *flags, program=("-c", KILLED), KILL=kill), status=status)


@pytest.mark.slow
def test_killed_in_a_phase_and_between_decision_and_checkpoint(root):
    """Decisions, batches and weights are those of a run that nothing happened to. A skipped step ends no phase."""
    for kill, at in (("batch 7", 6), ("decision 8", 8)):  # inside a phase, and at its border
        run(root, "killed", kill, status=-9)
        with Checkpoints(root / "killed") as saved:
            assert saved.latest() == at
    assert "resumed after step 8" in run(root, "killed", "never -1")
    assert_alike(root, "killed", "straight")
    run(root, "killed", "state 12")  # at its end it reads no batch
    decided = rows(root, "straight", "mixture")
    assert [row["step"] for row in decided] == [1, 5, 9] and decided[0]["rows/red"] == 0
    assert "observed/red" not in decided[0] and decided[0]["weight/red"] == 0.5
    assert decided[-1]["observed/red"] > decided[-1]["observed/green"]
    assert decided[-1]["weight/red"] > decided[1]["weight/red"] > 0.5
    assert decided[-1]["rows/red"] + decided[-1]["rows/green"] == 64


def assert_alike(root, one, other):
    for kind in ("train", "mixture", "skipped"):
        assert json.dumps(rows(root, one, kind)) == json.dumps(rows(root, other, kind)) != "[]"
    assert (root / one / "eval.json").read_bytes() == (root / other / "eval.json").read_bytes()


@pytest.mark.slow
def test_killed_in_a_sweep(root):
    of = {"controller": "aioli", "every": 8, "sweep_rounds": 1, "sweep_steps": 3}
    flags = [f"--config.mixture.{name}={value}" for name, value in of.items()]
    run(root, "sweeps", "never -1", *flags)
    run(root, "swept", "batch 5", *flags, status=-9)
    assert "resumed after step 4" in run(root, "swept", "never -1", *flags)  # inside the second turn
    assert_alike(root, "swept", "sweeps")
    assert [row["step"] for row in rows(root, "sweeps", "mixture")] == [1, 4, 7, 9, 12]


@pytest.mark.slow
def test_two_processes_decide_alike(root):
    finish(root, "two", *start_several(root, "two", 2))
    want, got = (rows(root, name, "mixture") for name in ("straight", "two"))
    assert [row["step"] for row in got] == [1, 5, 9]
    for one, other in zip(want[:2], got[:2], strict=True):  # the straight run skips step 6
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(other.values())[2:], list(one.values())[2:], rtol=1e-3)
