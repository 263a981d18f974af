"""Distillation: the sums against float64, the loss of a batch on meshes and in micro-batches, a teacher that is the
student, the last step with a teacher, and whole runs that stop, resume and refuse."""

import dataclasses
import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_lora_run
import two_processes
from jax.sharding import NamedSharding, PartitionSpec
from test_invariance import assert_same, batch_rows, run_config
from test_train import rows, start, write_text

from moe_jax import model
from moe_jax.config import DistillConfig, ModelConfig, RunConfig
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.moe.program import Program
from moe_jax.nn.layers import weight
from moe_jax.parallel import sharding
from moe_jax.run import config_file, teacher, weights
from moe_jax.train import cross_entropy, step
from moe_jax.train.distillation import Lesson, summed_losses
from moe_jax.train.gradients import forward, make_gradients
from moe_jax.train.state import abstract_weights, init_state, process_rows, put_batch
from tests.programs import run

STOP = 5
DISTILL = DistillConfig("runs/teacher", 0.7, 2.0, hidden_coef=0.3, stop_step=STOP)
PADDING = 0.25


# --- the sums --------------------------------------------------------------------------------------------------------


def log_softmax(x):
    return x - np.log(np.sum(np.exp(x - x.max(-1, keepdims=True)), -1, keepdims=True)) - x.max(-1, keepdims=True)


def by_hand(hidden, output, targets, weights, taught, of_teacher, temperature, symmetric, slopes):
    """Both sums, and the gradients of Σ slope · sum by hidden and output, in float64."""
    h, w, taught, of_teacher = (np.asarray(x, np.float64) for x in (hidden, output, taught, of_teacher))
    logits = h @ w.T
    log_p, log_q = log_softmax(logits / temperature), log_softmax(taught @ of_teacher.T / temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    forward_kl, d = (q * (log_q - log_p)).sum(-1), (p - q) / temperature
    if symmetric:
        backward_kl = (p * (log_p - log_q)).sum(-1)
        d = (d + p * (log_p - log_q - backward_kl[..., None]) / temperature) / 2
        forward_kl = (forward_kl + backward_kl) / 2
    nll = -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    d = slopes[0] * (np.exp(log_softmax(logits)) - np.eye(len(w))[targets]) + slopes[1] * d
    d = d * weights[..., None]
    return [(weights * nll).sum(), (weights * forward_kl).sum()], (d @ w, np.einsum("bsv,bsd->vd", d, h))


@pytest.mark.parametrize(("temperature", "symmetric", "mesh"), [(1.0, False, ()), (2.5, True, (2, 2, 2))])
def test_sums(monkeypatch, temperature, symmetric, mesh):
    """Two factors that only the caller knows; a teacher of another width; never the logits of all tokens."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 4)
    rng, slopes = np.random.default_rng(3), (1.7, 0.4)
    hidden, output = rng.normal(size=(8, 7, 3)).astype(np.float32), rng.normal(size=(13, 3)).astype(np.float32)
    taught, of_teacher = rng.normal(size=(8, 7, 5)).astype(np.float32), rng.normal(size=(13, 5)).astype(np.float32)
    targets, c = rng.integers(0, 13, (8, 7)), rng.random((8, 7)).astype(np.float32)

    def f(hidden, output, targets, c, taught, of_teacher):
        sums = summed_losses(hidden, output, targets, c, Lesson(taught, of_teacher, None), temperature, symmetric)
        return slopes[0] * sums[0] + slopes[1] * sums[1], sums

    run = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)
    arguments = (hidden, output, targets, c, taught, of_teacher)
    want, want_grads = by_hand(*arguments, temperature, symmetric, slopes)
    if mesh:
        on = sharding.make_mesh(mesh)
        spec = lambda x: NamedSharding(on, PartitionSpec()) if len(x) == 13 else sharding.batch_sharding(on)
        with jax.set_mesh(on):
            (_, sums), grads = jax.jit(run)(*(jax.device_put(x, spec(x)) for x in arguments))
    else:
        text = str(jax.make_jaxpr(run)(*map(jnp.asarray, arguments)))
        assert max(np.prod([int(n) for n in rows.split(",")]) for rows in re.findall(r"\[([\d,]+),13\]", text)) == 2
        (_, sums), grads = jax.jit(run)(*arguments)
    np.testing.assert_allclose(sums, want, rtol=1e-5)
    for got, exact in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=2e-6 * np.abs(exact).max())


# --- the loss of a batch ---------------------------------------------------------------------------------------------


def student(micro=1, remat="none", layers=1, distill=DISTILL) -> RunConfig:
    """A model of the invariance matrix. Its load-balancing loss is not linear, so micro-batches take two passes."""
    cfg = run_config(micro, remat, "dense" if micro == 1 else "grouped", "global")
    shape = {"num_layers": layers, "num_dense_layers": layers // 2}
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **shape), distill=distill)


def dense_teacher(cfg: RunConfig) -> ModelConfig:
    """A dense model of the same width and number of blocks."""
    return dataclasses.replace(
        cfg.model, num_dense_layers=cfg.model.num_layers, num_heads=2, num_kv_heads=2, head_dim=8, remat="none"
    )


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


@functools.cache
def weights_of(cfg: ModelConfig, seed: int):
    """Weights on the host."""
    with jax.set_mesh(mesh_of(1, 1, 1)):
        return jax.device_get(model.init(cfg, jax.random.key(seed)))


@functools.cache
def gradients_on(teacher: ModelConfig, shape=(1, 1, 1), micro=1, remat="none", layers=1):
    """(weights of the teacher, step) → everything about the gradients of one batch of a `student`. One program."""
    cfg, mesh = student(micro, remat, layers), mesh_of(*shape)
    run = jax.jit(make_gradients(cfg, mesh, teacher=teacher))

    def put(weights, m: ModelConfig):
        return jax.device_put(weights, jax.tree.map(lambda x: x.sharding, abstract_weights(m, mesh)))

    def of(weights, number):
        with jax.set_mesh(mesh):
            own = put(weights_of(dataclasses.replace(cfg.model, remat="none"), 0), cfg.model)
            batch = put_batch(batch_rows(PADDING), mesh, cfg)
            return jax.device_get(run(*own, batch, jnp.int32(number), put(weights, teacher)))

    return of


def on_one_device(seed: int, number: int = 0):
    """The gradients of the student on one device, with a teacher of its own kind."""
    m = student().model
    return gradients_on(m)(weights_of(m, seed), number)


@pytest.mark.slow  # the fast part has the sums of both losses on a mesh
def test_on_a_mesh():
    """A device, one batch, dense experts, against a mesh, two micro-batches, recomputation: with gradients."""
    got = gradients_on(student().model, (2, 2, 2), 2, "full")(weights_of(student().model, 1), 0)
    assert_same(got._asdict(), on_one_device(1)._asdict())


def test_terms_add_up():
    want = on_one_device(1)
    parts, raw = want.parts.scalars(), want.parts.raw
    np.testing.assert_allclose(parts["distill"], 0.7 * 2.0**2 * raw["distill_raw"], rtol=1e-6)
    np.testing.assert_allclose(parts["distill_hidden"], 0.3 * raw["distill_hidden_raw"], rtol=1e-6)
    np.testing.assert_allclose(want.loss, sum(parts.values()), rtol=1e-6)


def test_a_teacher_that_is_the_student():
    """It is at no distance and gives no gradient: the step is the one after the last step with a teacher."""
    equal, off = on_one_device(0, STOP - 1), on_one_device(0, STOP)
    raw = equal.parts.raw
    assert abs(raw["distill_raw"]) < 1e-7 and raw["distill_hidden_raw"] < 1e-12
    assert_same(equal.grads, off.grads)
    last, after = on_one_device(1, STOP - 1), on_one_device(1, STOP)
    assert last.parts.teacher["distill"] > 0.01 and last.parts.teacher["distill_hidden"] > 0.01
    assert after.parts.teacher == {"distill": 0, "distill_hidden": 0}
    jax.tree.map(np.testing.assert_array_equal, after.grads, off.grads)  # the teachers differ
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), last.grads, after.grads)
    assert min(jax.tree.leaves(moved)) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "micro"), [((1, 2, 4), 4), ((8, 1, 1), 1)])
def test_a_teacher_of_another_kind(shape, micro):
    """Three blocks, of which two have experts, and a dense teacher with other heads."""
    taught = dense_teacher(student(layers=3))
    want = gradients_on(taught, layers=3)(weights_of(taught, 1), 0)
    got = gradients_on(taught, shape, micro, "selective", 3)(weights_of(taught, 1), 0)
    assert_same(got._asdict(), want._asdict())


@pytest.mark.slow
def test_the_terms_of_a_batch():
    """The raw terms by NumPy from both models' hidden states, and the program without a teacher."""
    cfg, mesh = student(layers=3), mesh_of(1, 1, 1)
    taught, outs, weights = dense_teacher(cfg), [], batch_rows(PADDING)["weights"].astype(np.float64)
    with jax.set_mesh(mesh):
        batch = put_batch(batch_rows(PADDING), mesh, cfg)
        for m, seed in ((cfg.model, 0), (taught, 1)):
            graph = model.abstract(m, Program(residual=True))

            @jax.jit
            def run(params, bias, graph=graph):
                out, matrix = forward(graph, params, bias, batch)
                return out.hidden, weight(matrix, jnp.float32), out.residual

            outs.append(jax.device_get(run(*weights_of(m, seed))))
        plain = dataclasses.replace(cfg, distill=DistillConfig())
        without = jax.device_get(jax.jit(make_gradients(plain, mesh))(*weights_of(cfg.model, 0), batch, jnp.int32(0)))
    (h, w, own), (h_t, w_t, theirs) = outs
    log_p, log_q = (log_softmax(np.float64(a) @ np.float64(b).T / 2.0) for a, b in ((h, w), (h_t, w_t)))
    run = gradients_on(taught, layers=3)
    raw, off = run(weights_of(taught, 1), 0).parts.raw, run(weights_of(taught, 1), STOP)
    divergence = (weights * (np.exp(log_q) * (log_q - log_p)).sum(-1)).sum() / weights.sum()
    np.testing.assert_allclose(raw["distill_raw"], divergence, rtol=1e-5)
    x = np.concatenate([own["dense_layers"], own["layers"]]).astype(np.float64)
    distance = (weights * np.square(x - theirs["dense_layers"]).mean(-1).sum(0)).sum() / weights.sum()
    np.testing.assert_allclose(raw["distill_hidden_raw"], distance, rtol=1e-5)
    assert_same({"grads": off.grads, "loss": off.loss}, {"grads": without.grads, "loss": without.loss})


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run directory of a small dense teacher, without its weights."""
    cfg = student(distill=DistillConfig())
    made = tmp_path_factory.mktemp("runs") / "teacher"
    config_file.save_config(made, dataclasses.replace(cfg, model=dense_teacher(cfg)))
    return made


@pytest.fixture(scope="module")
def with_weights(folder):
    """The same with weights."""
    cfg = config_file.load_config(folder)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        weights.save_weights(folder.with_name("trained"), cfg, *weights_of(cfg.model, 1), [], {})
    return folder.with_name("trained")


def with_teacher(folder, **changes) -> RunConfig:
    own = {name: changes.pop(name) for name in ("vocab_size", "d_model") if name in changes}
    cfg = student(distill=DistillConfig(str(folder), **changes))
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **own))


@pytest.mark.slow
def test_a_teacher_is_found(with_weights):
    folder = with_weights
    cfg = with_teacher(folder, hidden_coef=1.0)
    found = teacher.find(cfg)
    assert (found.step, found.model.num_moe_layers, found.record) == (0, 0, None)
    (params, _), record = teacher.load(found, mesh_of(1, 1, 1))
    assert record["step"] == 0 and record["from"] == str(folder)
    np.testing.assert_array_equal(params["embed"], weights_of(found.model, 1)[0]["embed"])
    assert "squared distance" in teacher.describe(cfg, found)
    # Resumed, with the same weights and with others.
    saved = {"teacher": record | {"from": "elsewhere"}}
    assert teacher.load(teacher.find(cfg, 3, saved), mesh_of(1, 1, 1))[1]["from"] == str(folder)
    other = {"teacher": record | {"fingerprint": "0123456789abcdef"}}
    with pytest.raises(CheckpointError, match="is not the teacher that this run began with"):
        teacher.load(teacher.find(cfg, 3, other), mesh_of(1, 1, 1))
    with pytest.raises(ConfigError, match=r"distill\.teacher=.*has taken 3 steps without a teacher; nearest valid: ''"):
        teacher.find(cfg, 3, {})
    with pytest.raises(ConfigError, match=r"distill\.teacher='': the run began with elsewhere"):
        teacher.find(dataclasses.replace(cfg, distill=DistillConfig()), 3, saved)
    assert teacher.find(with_teacher(folder, stop_step=3), 3, saved) is None
    assert teacher.find(cfg, cfg.train.steps, saved) is None  # nothing is left to learn
    named = with_teacher(f"{folder}@0")
    assert teacher.find(named).step == teacher.find(named, 3, saved).step == 0
    with pytest.raises(ConfigError, match=r"@7': the run began with step 0; nearest valid: '.*@0'"):
        teacher.find(with_teacher(f"{folder}@7"), 3, saved)
    with pytest.raises(CheckpointError, match="step 7"):
        teacher.find(with_teacher(f"{folder}@7"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 64}, r"model\.vocab_size=64: differs from .*; nearest valid: 48"),
        ({"d_model": 32, "hidden_coef": 1.0}, r"distill\.hidden_coef=1\.0: compares .*model\.d_model=16, not 32"),
        ({"folder": "teachr"}, r"distill\.teacher=.*is not a run directory; nearest valid: '.*/teacher'"),
    ],
)
def test_teachers_that_do_not_fit(folder, changes, words):
    where = folder.parent / changes.pop("folder", "teacher")
    with pytest.raises(ConfigError, match=words):
        teacher.find(with_teacher(where, **changes))


def test_a_teacher_whose_pools_know_later_tokens_is_refused(folder):
    cfg = config_file.load_config(folder)
    pools = {"pool_min": 2, "pool_from": "document", "pool_size": 3, "selection_bias": False}
    moe = dataclasses.replace(cfg.model.moe, **pools)
    leaky = folder.parent / "leaky"
    leaks = dataclasses.replace(cfg.model, num_dense_layers=0, moe=moe)
    config_file.save_config(leaky, dataclasses.replace(cfg, model=leaks))
    with pytest.raises(ConfigError, match=r"distill\.teacher='.*leaky': has model\.moe\.pool_from='document'"):
        teacher.find(with_teacher(leaky))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"coef": 0.5}, "coef"),
        ({"stop_step": 3}, "stop_step"),
        ({"teacher": "runs/a", "coef": 0.0}, "coef"),
        ({"teacher": "runs/a", "coef": 0.0, "hidden_coef": 1.0, "temperature": 2.0}, "temperature"),
    ],
)
def test_fields_without_effect(fields, name):
    with pytest.raises(ConfigError) as e:
        DistillConfig(**fields)
    assert e.value.name == name


@pytest.mark.slow
def test_runs(tmp_path):
    """A run whose teacher stops, resumed bit for bit, though the teacher was trained on; with others it is refused."""
    write_text(tmp_path)
    common = [f"--config={tmp_path}/config.py", "--config.optim.warmup_steps=0", "--config.train.log_every=1",
              "--config.train.checkpoint_every=2", "--config.train.keep_checkpoints=9"]  # fmt: skip
    run(tmp_path, "train.py", *common, "--config.train.steps=2", workdir="teacher")
    taught = [*common, "--config.train.steps=6", "--config.seed=1", f"--config.distill.teacher={tmp_path / 'teacher'}",
              "--config.distill.stop_step=5", "--config.distill.hidden_coef=0.1"]  # fmt: skip
    done = run(tmp_path, "train.py", *taught, workdir="run")
    assert "teacher: " in done.stdout and "step 5 was the last with a teacher" in done.stdout
    lines = rows(tmp_path, "train")
    assert ["distill" in line for line in lines] == [True] * 5 + [False]
    assert lines[0]["distill"] > 0 and lines[0]["distill_hidden"] > 0
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    run(tmp_path, "train.py", *common, "--config.train.steps=4", workdir="teacher")
    done = run(tmp_path, "train.py", *taught, "--resume_step=2", workdir="again")
    assert "resumed after step 2" in done.stdout and "/teacher, step 2," in done.stdout
    straight, resumed = (test_lora_run.state_of(tmp_path / name, 6) for name in ("run", "again"))
    for path, x in resumed.items():
        np.testing.assert_array_equal(x, straight[path], err_msg=path)
    done = run(tmp_path, "train.py", *taught, "--dry_run", workdir="dry")
    assert "teacher: " in done.stdout and ", teacher " in done.stdout
    shutil.rmtree(tmp_path / "teacher" / "checkpoints" / "2")
    (tmp_path / "teacher" / "checkpoints" / "4").rename(tmp_path / "teacher" / "checkpoints" / "2")
    process = start(tmp_path, "train.py", *taught, "--resume_step=4", workdir="again")
    _, err = process.communicate(timeout=300)
    assert process.returncode and "Traceback" not in err
    # After its last step nobody asks for the teacher.
    shutil.rmtree(tmp_path / "teacher")
    assert "resumed after step 6" in run(tmp_path, "train.py", *taught, workdir="run").stdout


@pytest.mark.slow
def test_two_processes(with_weights):
    """A teacher that is loaded by two processes, each its part: the loss of one process."""
    folder = with_weights
    numbers = one_step(str(folder))
    two_processes.run(f"""
import sys
sys.path.insert(0, "tests")
import numpy as np
import test_distillation
np.testing.assert_allclose(test_distillation.one_step({str(folder)!r}), {numbers}, rtol=1e-5)
""")


def one_step(folder: str) -> list[float]:
    """Loss, term and gradient norm of a step on (2, 2, 2)."""
    cfg, mesh = with_teacher(folder, hidden_coef=1.0), mesh_of(2, 2, 2)
    found = teacher.find(cfg)
    lesson, _ = teacher.load(found, mesh)
    rows = {name: x[process_rows(mesh, 32)] for name, x in batch_rows(PADDING).items()}
    run = step.make_train_step(cfg, mesh, None, found.model)
    _, report = run(init_state(cfg, mesh), put_batch(rows, mesh, cfg), None, lesson)
    return [float(x) for x in (report.loss, report.terms["distill"], report.grad_norm)]
