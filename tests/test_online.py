"""Weights of sources that change during training: controllers, and whole runs with them."""

import dataclasses
import json
import typing

import numpy as np
import pytest
from test_phases import made_corpus

from moe_jax import config
from moe_jax.config.mixture import READS
from moe_jax.errors import BadNumbers, ConfigError
from moe_jax.mixtures import online
from moe_jax.run.log import Writer, read_metrics


def run_config(corpus, steps=20, later=(), optim=None, **mixture):
    """A run on the three sources of test_phases; later: stage_weights by name."""
    sources = {name: dataclasses.replace(s, stage_weights=later[name] if name in later else ())
               for name, s in corpus._cfg.sources.items()}  # fmt: skip
    data = dataclasses.replace(corpus._cfg, sources=sources)
    train = dataclasses.replace(config.TrainConfig(), steps=steps)
    optim = optim or config.OptimConfig()
    return config.RunConfig(data=data, train=train, optim=optim, mixture=config.MixtureConfig(**mixture))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return made_corpus(tmp_path_factory.mktemp("online"))


def test_stages_begin_where_they_say_and_are_logged(corpus, tmp_path):
    cfg = run_config(corpus, 20, {"a": (0.0, 1.0), "b": (1.0, 5.0)}, controller="stages", stages=(3, 7))
    batches, said, seen = corpus.train_iterator(range(8)), [], []
    with Writer(tmp_path, tensorboard=False) as writer:
        mixer = online.make_mixer(cfg, None, corpus, batches, writer)
        for n in range(1, 13):
            if mixer.is_due:
                said.append(mixer.begin(n - 1, None))
            seen.append(np.bincount(next(batches)["domain_ids"][:, 0], minlength=3))
            if n == 7:  # a run that is killed here decides again
                state, at = json.loads(json.dumps(batches.get_state())), mixer.state()
                batches = corpus.train_iterator(range(8))
                batches.set_state(state)
                mixer = online.make_mixer(cfg, None, corpus, batches, writer, at)
    batches.close()
    assert said[1] == "from step 4 to 7: a 0.0 %, b 50.0 %, c 50.0 %" and len(said) == 3
    rows = read_metrics(tmp_path, "mixture")
    assert [row["step"] for row in rows] == [1, 4, 8]
    assert [row["rows/b"] for row in rows] == [0, sum(s[1] for s in seen[:3]), sum(s[1] for s in seen[:7])]
    for begin, end, weights in ((0, 3, (3, 2, 1)), (3, 7, (0, 1, 1)), (7, 12, (1, 5, 1))):
        wanted = 8 * np.array(weights) / sum(weights)
        assert (np.abs(np.array(seen[begin:end]) - wanted) < 1).all()
    names = [name for name in corpus.trained]
    shares = corpus_with(corpus, cfg).epochs(12, cfg.mixture.stages)
    np.testing.assert_allclose([shares[n][0] for n in names], np.sum(seen, 0) / 96, atol=0.03)


def corpus_with(corpus, cfg):
    """The corpus with the sources of another configuration."""
    made = object.__new__(type(corpus))
    made.__dict__ = corpus.__dict__ | {"_cfg": cfg.data}
    return made


def corpus_of_one(corpus):
    made = corpus_with(corpus, run_config(corpus))
    made._train = {"a": corpus._train["a"]}
    return made


class Agent:
    """A controller of one's own: any object with `next`, here one that prefers what it has seen the most of."""

    observes = "nothing"

    def next(self, step, observation, state):
        turn = state.get("turn", 0)
        return {"a": 1.0, "b": float(turn), "c": observation["c"]}, 2, {"turn": turn + 1}


def test_any_object_with_next_is_a_controller(corpus, tmp_path):
    batches = corpus.train_iterator(range(8))
    with Writer(tmp_path, tensorboard=False) as writer:
        mixer = online.Mixer(Agent(), batches, corpus.trained, writer, lambda step, state: {"c": step + state})
        for n in range(4):
            if mixer.is_due:
                mixer.begin(n, 0.5)
            next(batches)
        assert mixer.state() == {"controller": {"turn": 2}, "unseen": 0} and batches.phase.weights == (1.0, 1.0, 2.5)
        mixer._sources = ("a", "b")
        with pytest.raises(ValueError, match=r"weights to \['a', 'b'\], not to \['a', 'b', 'c'\]"):
            mixer.begin(4, 0.5)
        one = corpus_of_one(corpus).train_iterator(range(8))
        with pytest.raises(ValueError, match="needs batches of two or more sources"):
            online.Mixer(Agent(), one, ("a",), writer)
    batches.close()
    assert [row["observed/c"] for row in read_metrics(tmp_path, "mixture")] == [0.5, 2.5]


class Fixed(Agent):
    """Gives what it was made with."""

    def __init__(self, *answer):
        self.answer = answer

    def next(self, step, observation, state):
        return *self.answer, {"step": step}


def test_what_is_not_finite_holds_the_phase_and_ends_the_run_the_third_time(corpus, tmp_path):
    batches, nan, said, state = corpus.train_iterator(range(8)), float("nan"), [], None
    seen = {0: nan, 2: 1.0, 5: nan, 8: nan, 11: 2.0, 14: nan, 17: nan, 20: nan}
    agent = Fixed({"a": 1, "b": np.float32(1), "c": 0}, np.int64(3))
    with Writer(tmp_path, tensorboard=False) as writer:
        with pytest.raises(BadNumbers, match=r"step 20: what .* is not finite, 3 times in a row: {'x': nan}"):
            for n in range(30):
                mixer = online.Mixer(agent, batches, corpus.trained, writer, lambda n, _: {"x": seen[n]}, state, 2)
                if mixer.is_due:
                    said.append(mixer.begin(n, None))
                state = json.loads(json.dumps(mixer.state()))  # every step resumes
                next(batches)
    batches.close()
    assert state == {"controller": {"step": 11}, "unseen": 2}
    assert said[0].startswith("from step 1 to 2: a 50.0 %, b 33.3 %, c 16.7 %, as before: what is observed is not fin")
    assert said[2] == said[1].replace("3 to 5", "6 to 8") + ", as before: what is observed is not finite"
    assert said[4] == "from step 12 to 14: a 50.0 %, b 50.0 %, c 0.0 %"
    assert [row["observed/x"] for row in read_metrics(tmp_path, "mixture")][:3] == [None, 1.0, None]


@pytest.mark.parametrize("answer, error", [
    (({"a": 1, "b": 1, "c": 1}, 0), "a whole number ≥ 1, or None: 0"),
    (({"a": 1, "b": 1, "c": 1}, 2.5), "a whole number ≥ 1, or None: 2.5"),
    (({"a": 1, "b": 1, "c": -1}, 3), "weights must be 3 finite numbers"),
    (({"a": 1, "b": 1, "c": float("nan")}, 3), "not JSON compliant"),
    (({"a": 1, "b": 1}, 3), "must give weights to"),
    ((3,), "not enough values to unpack"),
])  # fmt: skip
def test_a_wrong_answer_ends_all_processes(corpus, tmp_path, monkeypatch, answer, error):
    batches, told = corpus.train_iterator(range(8)), []
    gather = lambda value: told.append(value) or [json.loads(json.dumps(told[0]))]
    monkeypatch.setattr(online, "gather_json", gather)
    with Writer(tmp_path, tensorboard=False) as writer:
        mixer = online.Mixer(Fixed(*answer), batches, corpus.trained, writer)
        with pytest.raises(ValueError, match=error):
            mixer.begin(0, None)
        monkeypatch.setattr(online.jax, "process_index", lambda: 1)
        with pytest.raises((ValueError, RuntimeError), match=error):
            mixer.begin(0, None)
    assert len(told) == 2 and told[1] is None


# --- what controllers make of observations ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dga", "tikmix"])
def test_alignment_that_stays_is_an_exponential(corpus, name):
    """p_t ∝ p_0 · exp(t · rate · a / ‖a‖), and the average of these."""
    made = lambda **fields: run_config(corpus, optim=config.OptimConfig(name="adamw"), controller=name, **fields)
    seen, start = {"c": -2.0, "a": 1.0, "b": 0.5}, np.array([3.0, 2.0, 1.0]) / 6
    a = np.array([1.0, 0.5, -2.0]) / np.linalg.norm([1.0, 0.5, -2.0])
    for beta, floor in ((0.0, 0.0), (0.7, 0.0), (0.0, 0.3)):
        controller = online.Alignment(made(rate=0.4, ema=beta, floor=floor, every=7))
        weights, steps, state = controller.next(0, {}, {})
        assert [weights[n] for n in "abc"] == start.tolist() and steps == 7
        average = shares = start
        for t in range(1, 5):
            weights, steps, state = controller.next(7 * t, seen, json.loads(json.dumps(state)))
            raised = shares * np.exp(0.4 * a)
            shares = (1 - floor) * raised / raised.sum() + floor / 3
            average = beta * average + (1 - beta) * shares
            np.testing.assert_allclose([weights[n] for n in "abc"], average, rtol=1e-12)
            if not floor:
                exact = start * np.exp(t * 0.4 * a)
                np.testing.assert_allclose(shares, exact / exact.sum(), rtol=1e-12)
        assert steps == 7 and (floor == 0 or min(weights.values()) >= 0.1)


@pytest.mark.parametrize("ema", [0.0, 0.3])
def test_aioli_finds_a_planted_matrix(corpus, ema):
    """In a world whose losses fall by A · shares a turn, where A is more in one round and less in the other."""
    rng = np.random.default_rng(0)
    planted, more = rng.uniform(0.1, 1.0, (2, 3)), rng.uniform(0.0, 0.05, (2, 3))  # targets, sources
    cfg = run_config(corpus, controller="aioli", every=40, sweep_rounds=2, sweep_steps=4, rate=2.0, floor=0.0, ema=ema)
    controller, state, losses, step, turns = online.Aioli(cfg), {}, np.array([9.0, 8.0]), 0, []
    shares, average = np.array([3.0, 2.0, 1.0]) / 6, None
    for _ in range(14):  # two periods: six turns and a rest
        seen = dict(zip(("x", "y"), losses.tolist(), strict=True))
        weights, steps, state = controller.next(step, seen, json.loads(json.dumps(state)))
        found = np.array([weights[n] for n in "abc"])
        if steps == 4:
            assert sorted(found) == pytest.approx([0.1875, 0.1875, 0.625])
            turns.append("abc"[int(np.argmax(found))])
            losses = losses - (planted + (more if (len(turns) - 1) // 3 % 2 else -more)) @ found
        else:
            a = planted / planted.sum()
            average = a if average is None or not ema else ema * average + (1 - ema) * a
            np.testing.assert_allclose(state["average"], average, rtol=1e-6)
            raised = (np.ones(3) if ema else shares) * np.exp(2.0 * average.sum(0))
            shares = raised / raised.sum()
            np.testing.assert_allclose(found, shares, rtol=1e-6)
            assert steps == 40 - 24
        step += steps
    assert step == 80 and [sorted(turns[i : i + 3]) for i in range(0, 12, 3)] == [["a", "b", "c"]] * 4
    assert len({tuple(turns[i : i + 3]) for i in range(0, 12, 3)}) > 1


def test_a_turn_whose_loss_was_not_finite_does_not_count(corpus):
    controller = online.Aioli(run_config(corpus, controller="aioli", every=40, sweep_rounds=1))
    first, _, state = controller.next(0, {"x": 9.0}, {})
    again, steps, held = controller.next(8, {"x": 5.0}, state)  # after two phases of 4 steps
    assert (again, steps, held["turn"], held["falls"]) == (first, 4, 0, [[0.0, 0.0, 0.0]])
    then, _, state = controller.next(12, {"x": 4.0}, held)
    assert then != first and state["turn"] == 1 and sorted(state["falls"][0]) == [0.0, 0.0, 1.0]


def test_solve_takes_its_least_entry_off():
    falls = np.array([[1.0, -0.5], [0.0, 2.0]])
    np.testing.assert_allclose(online.solve(falls, np.eye(2)), np.array([[1.5, 0.0], [0.5, 2.5]]) / 4.5)
    np.testing.assert_array_equal(online.solve(np.zeros((2, 2)), np.eye(2)), np.zeros((2, 2)))


def test_the_tables_name_the_same_controllers():
    choices = typing.get_args(typing.get_type_hints(config.MixtureConfig)["controller"])
    assert set(choices) == set(READS) == {"none", *online.CONTROLLERS}
    for name, made in online.CONTROLLERS.items():
        cfg = object.__new__(config.MixtureConfig)
        object.__setattr__(cfg, "controller", name)
        assert (cfg.observes, cfg.takes_gradients) == (made.observes != "nothing", made.observes == "alignment")
    fields = {f.name for f in dataclasses.fields(config.MixtureConfig)} - {"controller"}
    assert fields == {name for names in READS.values() for name in names}


def test_a_run_may_end_before_its_last_stages(corpus):
    cfg = run_config(corpus, 5, {"a": (0.0, 9.0)}, controller="stages", stages=(4, 20))
    assert cfg.mixture.notes(5) == ["mixture.stages: 1 of 3 stages never begin in 5 steps"]
    assert cfg.mixture.notes(21) == []
    shares = corpus_with(corpus, cfg).epochs(5, cfg.mixture.stages)
    assert shares["a"][0] == pytest.approx(0.5 * 4 / 5) and sum(s for s, _ in shares.values()) == pytest.approx(1)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later, mixture, error", [
    ({}, {"stages": (3,)}, r"mixture\.stages=\(3,\): has no effect with controller='none'"),
    ({}, {"controller": "stages"}, r"mixture\.stages=\(\): must be one or more rising steps"),
    ({}, {"controller": "stages", "stages": (3, 3)}, r"mixture\.stages=\(3, 3\): must be one or more rising"),
    ({"a": (1.0,)}, {}, r"data\.sources\.a\.stage_weights=\(1\.0,\): has no effect without mixture\.stages"),
    ({"a": (1.0,)}, {"controller": "stages", "stages": (3, 4)}, r"a\.stage_weights=\(1\.0,\): must have .* 2 stages"),
    ({"a": (-1.0,)}, {}, r"stage_weights=\(-1\.0,\): must be finite numbers ≥ 0"),
    ({}, {"controller": "dga", "sweep_steps": 2}, r"mixture\.sweep_steps=2: has no effect with controller='dga'"),
    ({}, {"controller": "dga", "ema": 1.0}, r"mixture\.ema=1\.0: must be < 1"),
    ({}, {"controller": "dga", "target": "d"}, r"mixture\.target='d': is not one of data\.sources; nearest valid: '"),
    ({}, {"controller": "tikmix"}, r"mixture\.controller='tikmix': needs AdamW's second .*nearest valid: 'dga'"),
    ({}, {"controller": "aioli", "every": 48}, r"mixture\.every=48: must be more than the 48 steps .* 3 sources; .*49"),
    ({}, {"controller": "aioli", "sweep_share": 0.33}, r"mixture\.sweep_share=0\.33: must be more than an equal share"),
    (dict.fromkeys("abc", (0.0,)), {"controller": "stages", "stages": (3,)}, r"weights must not all be 0 in stage 2"),
])  # fmt: skip
def test_what_a_configuration_refuses(corpus, later, mixture, error):
    with pytest.raises(ConfigError, match=error):
        try:
            run_config(corpus, 20, later, **mixture)
        except ConfigError as e:
            raise (e if e.name.startswith(("mixture", "data")) else e.inside("mixture")) from None


def test_one_source_has_no_mixture(corpus):
    sources = corpus._cfg.sources
    mute = {name: dataclasses.replace(source, validation_fraction=0.0) for name, source in sources.items()}
    with pytest.raises(ConfigError, match=r"mixture\.target='': has no held-out text to observe; set a validation_f"):
        config.RunConfig(data=dataclasses.replace(corpus._cfg, sources=mute), mixture=config.MixtureConfig("dga"))
    one = dataclasses.replace(corpus._cfg, sources={"a": sources["a"]})
    with pytest.raises(ConfigError, match=r"mixture\.controller='stages': needs two or more data\.sources"):
        config.RunConfig(data=one, mixture=config.MixtureConfig(controller="stages", stages=(3,)))
