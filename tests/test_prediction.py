"""Multi-token prediction: loss, statistics and gradients against a loop over documents in float64, on a mesh and in
micro-batches; a run that goes on; what is refused; files of Hugging Face."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariance import B, S, assert_same, batch_rows, run_config

from moe_jax import config, model
from moe_jax import hf as hf_import
from moe_jax.config import RouterLossConfig, RunConfig
from moe_jax.config.layers import MTP_BLOCK
from moe_jax.errors import ConfigError, FormatError
from moe_jax.hf import safetensors as files
from moe_jax.model import flops_per_token
from moe_jax.moe.program import Program
from moe_jax.nn.layers import weight
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint
from moe_jax.run import weights as run_weights
from moe_jax.train import losses, prediction, step
from moe_jax.train.gradients import forward, make_gradients
from moe_jax.train.state import Batch, abstract_state, abstract_weights, init_state, put_batch
from moe_jax.tree import flatten, nest

BIAS = np.array([-0.3, 0.1, 0.0, 0.2], np.float32)
COEF, DIVISOR = 0.7, 1.5


def setting(micro=1, remat="none", compute="dense", layers=2, dense=0, **loss) -> RunConfig:
    """One block, of experts or dense, and layers of multi-token prediction. The balance loss is of the whole batch."""
    cfg = run_config(micro, remat, compute, "global", exchange="all_to_all" if compute == "grouped" else "auto")
    moe = dataclasses.replace(cfg.model.moe, num_shared_experts=0)
    shape = {"num_layers": 1, "num_dense_layers": dense, "qk_norm": False, "moe": moe}
    shape |= {"mtp_layers": layers, "logits_divisor": DIVISOR}
    loss = ({"mtp_coef": COEF} if layers else {}) | loss
    return dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, **shape), loss=dataclasses.replace(cfg.loss, **loss)
    )


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


@functools.cache
def weights(layers=2, dense=0) -> tuple[dict, dict]:
    """Parameters and selection biases on the host. No scale of a norm is 1, and no bias 0."""
    rng, shapes = (
        np.random.default_rng(5),
        abstract_weights(setting(layers=layers, dense=dense).model, mesh_of(1, 1, 1)),
    )
    drawn = lambda path, x: (0.3 * rng.normal(size=x.shape) + path.endswith("norm")).astype(np.float32)
    params = {path: drawn(path, x) for path, x in sorted(flatten(shapes[0]).items(), key=lambda item: "mtp" in item[0])}
    return nest(params), jax.tree.map(lambda x: np.broadcast_to(BIAS, x.shape), shapes[1])


def rows() -> dict[str, np.ndarray]:
    """Two documents in most rows, one of a single token, one in a whole row, and padding."""
    made = batch_rows(0.25)
    segments = made["segment_ids"]
    segments[-1], segments[-2, 0], segments[-2, 1:] = 1, 1, 2
    first = np.concatenate([np.ones((B, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    index = np.arange(S)
    made["positions"] = (index - np.maximum.accumulate(np.where(first, index, 0), axis=1)).astype(np.int32)
    return made


def gradients(cfg: RunConfig, shape=(1, 1, 1), at=0, state=None) -> dict:
    """Loss, parts, sums and gradients of the batch."""
    mesh = mesh_of(*shape)
    like = abstract_state(cfg, mesh)
    put = lambda x, like: jax.device_put(x, like.sharding)
    state = state or weights(cfg.model.mtp_layers, cfg.model.num_dense_layers)
    params, bias = jax.tree.map(put, state, (like.params, like.router_bias))
    made = make_gradients(cfg, mesh)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda params, bias, batch: made(params, bias, batch, at))
        return jax.device_get(run(params, bias, put_batch(rows(), mesh, cfg))._asdict())


# --- the oracle: each document alone, depth by depth, in float64 -----------------------------------------------------


def documents() -> dict[str, np.ndarray]:
    """What depth k = 0, 1, 2 reads and predicts, [k, document, place], written place by place.

    A document begins at place 0. there: whether it has a token k places after this one.
    """
    made, size = rows(), 2 * B
    found = {name: np.zeros((3, size, S), made[name].dtype) for name in ("tokens", "targets", "weights")}
    found["there"], document = np.zeros((3, size, S), bool), 0
    for row, segments in enumerate(made["segment_ids"]):
        for number in sorted(set(segments) - {0}):
            places = [place for place in range(S) if segments[place] == number]
            for k in range(3):
                for i in range(len(places) - k):
                    for name in ("tokens", "targets", "weights"):
                        found[name][k, document, i] = made[name][row, places[i + k]]
                    found["there"][k, document, i] = True
            document += 1
    return found


def norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def turned(x):
    """RoPE of [documents, places, heads, 4]: number 0 is paired with 2, and 1 with 3."""
    angle = jnp.arange(S)[:, None, None] * jnp.array([1.0, 10_000.0**-0.5])
    x1, x2 = x[..., :2], x[..., 2:]
    return jnp.concatenate([x1 * jnp.cos(angle) - x2 * jnp.sin(angle), x2 * jnp.cos(angle) + x1 * jnp.sin(angle)], -1)


def glu(w, x, e=...):
    return (jax.nn.silu(x @ w["w_gate"][e]) * (x @ w["w_up"][e])) @ w["w_down"][e]


def block(w, bias, x):
    """One block. Also returns router logits, and the experts of each token as zeros and ones."""
    a, h = w["attention"], norm(x, w["attention_norm"])
    q, k, v = ((h @ a[f"w_{name}"]).reshape(*x.shape[:2], -1, 4) for name in "qkv")
    q, k, v = turned(q), jnp.repeat(turned(k), 2, axis=2), jnp.repeat(v, 2, axis=2)  # of keys there are two heads
    logits = jnp.where(np.tri(S, dtype=bool), jnp.einsum("binh,bjnh->bnij", q, k) / 2, -jnp.inf)
    x = x + jnp.einsum("bnij,bjnh->binh", jax.nn.softmax(logits), v).reshape(*x.shape[:2], -1) @ a["w_o"]
    h = norm(x, w["mlp_norm"])
    if "moe" not in w:
        return x + glu(w["mlp"], h), ()
    router = h @ w["moe"]["w_router"]
    scores = jax.nn.softmax(router)
    chosen = jnp.argsort(-(scores + bias), axis=-1)[..., :2]
    hot = jax.nn.one_hot(chosen, 4, dtype=x.dtype).sum(-2)
    return x + sum((hot * scores)[..., e, None] * glu(w["moe"], h, e) for e in range(4)), (router, hot)


@functools.cache
def wanted(dense=0) -> dict:
    """Loss, terms without coefficients, and gradients, of the whole batch."""
    made, cfg = documents(), setting(dense=dense).loss

    def total(params, biases):
        first, mtp = params["dense_layers" if dense else "layers"], params["mtp"]
        bias = 0.0 if dense else BIAS
        # Depth 0 is the decoder.
        with_decoder = lambda a, b: jnp.concatenate([a, b])
        blocks = jax.tree.map(with_decoder, first, mtp["block"])
        norms = with_decoder(params["final_norm"][None], mtp["final_norm"])
        unused = lambda x: with_decoder(jnp.zeros_like(x[:1]), x)
        joins = [unused(mtp[name]) for name in ("embed_norm", "hidden_norm", "w_join")]

        def depth(h, one):
            w, scale, (embed_norm, hidden_norm, w_join), k, batch = one
            embedded = params["embed"][batch["tokens"]]
            joined = norm(embedded, embed_norm) @ w_join[:16] + norm(h, hidden_norm) @ w_join[16:]
            x, routed = block(w, bias, jnp.where(k == 0, embedded, joined))
            h = norm(x, scale)
            log_p = jax.nn.log_softmax(h / DIVISOR @ params["head"].T)
            nll = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
            return h, (jnp.sum(batch["weights"] * nll) / batch["weights"].sum(), routed)

        ones = jnp.ones((*made["tokens"].shape[1:], 16))
        means, routed = jax.lax.scan(depth, ones, (blocks, norms, joins, np.arange(3), made))[1]
        raw = {"mtp_raw/1": means[1], "mtp_raw/2": means[2], "load_balance_raw": 0.0, "router_z_raw": 0.0}
        raw |= {} if dense else {"mtp_raw/load_balance": 0.0, "mtp_raw/router_z": 0.0}
        for k in [] if dense else range(3):
            router, hot = (y[k][made["there"][k]] for y in routed)
            name, share = ("mtp_raw/{}", 0.5) if k else ("{}_raw", 1.0)
            raw[name.format("router_z")] += share * jnp.mean(jax.nn.logsumexp(router, -1) ** 2)
            balance = 4 * jnp.sum(hot.mean(0) / 2 * jax.nn.softmax(router).mean(0))
            raw[name.format("load_balance")] += share * balance
        of_routers = lambda name: sum(
            coef * raw.get(name.format(kind), 0.0)
            for kind, coef in (("load_balance", cfg.load_balance_coef), ("router_z", cfg.router_z_coef))
        )
        ahead = (means[1] + means[2]) / 2 + of_routers("mtp_raw/{}")
        return means[0] + of_routers("{}_raw") + COEF * ahead, raw

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), weights(2, dense))
        (loss, raw), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(*state)
        return jax.device_get({"loss": loss, "raw": raw, "grads": grads})


FAST = [((2, 2, 2), 2, "full", "dense", 0)]
SLOW = [
    ((1, 1, 1), 1, "none", "dense", 0), ((1, 2, 4), 4, "selective", "grouped", 0), ((8, 1, 1), 2, "full", "dense", 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "micro", "remat", "compute", "dense"), [*FAST, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)]
)
def test_loss_and_gradients(mesh, micro, remat, compute, dense):
    """Two depths; the balance loss of the whole batch takes two passes, and a dense model one."""
    found, want = gradients(setting(micro, remat, compute, dense=dense), mesh), wanted(dense)
    there = documents()
    np.testing.assert_allclose(found["sums"].mtp.tokens, there["there"][1:].sum((1, 2)))
    np.testing.assert_allclose(found["sums"].mtp.weights, there["weights"][1:].sum((1, 2)), rtol=1e-6)
    assert_same({name: found["parts"].raw[name] for name in want["raw"]}, want["raw"])
    assert_same(found["loss"], want["loss"])
    np.testing.assert_allclose(found["parts"].total(), found["loss"], rtol=1e-6)
    assert_same(found["grads"], want["grads"])
    if not dense:
        stats = found["sums"].router[MTP_BLOCK]
        np.testing.assert_array_equal(stats.tokens[:, 0], there["there"][1:].sum((1, 2)))
        np.testing.assert_allclose(stats.tokens_per_expert.sum((1, 2)), 2 * stats.tokens[:, 0])


@pytest.mark.slow
def test_a_loss_of_each_sequence_takes_one_pass(monkeypatch):
    """… over micro-batches, on a mesh. The decoder and each layer have their own number of sequences with a token."""
    made = rows()
    for row, tokens in enumerate((0, 1, 2)):
        made["segment_ids"][row] = np.arange(S) < tokens
        made["weights"][row, tokens:] = 0.0
    monkeypatch.setattr(sys.modules[__name__], "rows", lambda: made)
    more = {"pairs": RouterLossConfig("load_balance", 0.3, 1, over=2)}
    of = lambda micro: setting(micro, balance_batch=1, router_loss_layers="sum", more=more)
    assert losses.balances_sequences(of(4).loss) and not losses.needs_whole_batch(of(4).loss)
    counted = put_batch(made, mesh_of(1, 1, 1), of(1))
    with jax.set_mesh(mesh_of(1, 1, 1)):
        np.testing.assert_array_equal(prediction.sequences(counted, 2), [B - 1, B - 2, B - 3])
    assert_same(gradients(of(4), (2, 2, 2)), gradients(of(1)))


# --- a run, and what is refused ---------------------------------------------------------------------------------------


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, flatten(got), flatten(want))


@pytest.mark.slow
def test_the_head_alone_is_trained_and_a_run_goes_on(tmp_path):
    """Two steps of Muon and an average, with one checkpoint between them; of the selection biases the head's move."""
    cfg, mesh = setting(1, layers=1, mtp_stop=1, mtp_late_coef=0.2), mesh_of(2, 2, 2)
    groups = {"decoder": config.GroupConfig("^(?!mtp/)", freeze=True)}
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, groups=groups, ema=0.9))
    with jax.set_mesh(mesh):
        state, batch = init_state(cfg, mesh), put_batch(rows(), mesh, cfg)
        before, train_step = jax.device_get(state), step.make_train_step(cfg, mesh)
        state, first = train_step(state, batch)
        with checkpoint.Checkpoints(tmp_path, keep=1) as saved:
            saved.save(1, state, {}, wait=True)
            again, _ = saved.restore(abstract_state(cfg, mesh))
        after, second = train_step(state, batch)
        again, _ = train_step(again, batch)
    assert_equal(again, after)
    moved = {path: not np.array_equal(x, flatten(after)[path]) for path, x in flatten(before).items()}
    for path, other in moved.items():
        if path.startswith(("params/", "router_bias/")):
            assert other == ("/mtp/" in path), path
    terms = [jax.device_get(report.terms) for report in (first, second)]
    assert terms[1]["mtp_raw/1"] < terms[0]["mtp_raw/1"] and terms[1]["xent"] == terms[0]["xent"]
    for one, coef in zip(terms, (COEF, 0.2), strict=True):
        np.testing.assert_allclose(one["mtp"], coef * one["mtp_raw/1"], rtol=1e-6)


def test_flops():
    """A layer has the FLOPs of a block, of its own matrix, and of the head once more."""
    flops = lambda layers, frozen=frozenset(): flops_per_token(setting(layers=layers, dense=1).model, S, frozen)
    d, block, attention = 16, 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24, 3 * S * 4 * 8
    assert flops(2) - flops(0) == 2 * (6 * (block + 2 * d * d + 48 * d) + attention)
    decoder = frozenset(path for path in flatten(weights(1, 1)[0]) if not model.is_prediction(path))
    alone = 2 * (block + 48 * d) + attention / 3 + 6 * (block + 2 * d * d) + 4 * 48 * d + attention
    np.testing.assert_allclose(flops(1, decoder), alone, rtol=1e-12)


def test_refusals():
    cfg = setting()
    change = lambda group, **fields: dataclasses.replace(
        cfg, **{group: dataclasses.replace(getattr(cfg, group), **fields)}
    )
    lora = dataclasses.replace(cfg.model.lora, rank=2)
    state = dataclasses.replace(cfg.model.moe, router="mlp")
    refused = {
        r"mtp_layers=2: is not available with lora\.rank > 0": lambda: change("model", lora=lora),
        r"mtp_layers=2: .* a last block of kind 'table'": lambda: change("model", layers="moe table", num_layers=2),
        r"mtp_layers=2: is not available with moe\.router='mlp'": lambda: change("model", moe=state),
        r"model\.mtp_layers=8: must be < data\.seq_len=8.*nearest valid: 7": lambda: change("model", mtp_layers=8),
        r"loss\.mtp_coef=0\.7: has no effect with model\.mtp_layers=0": lambda: change("model", mtp_layers=0),
        r"loss\.mtp_late_coef=0\.1: has no effect with mtp_stop=0": lambda: change("loss", mtp_late_coef=0.1),
    }
    for message, make in refused.items():
        with pytest.raises(ConfigError, match=message):
            make()
    assert cfg.without_mtp == setting(layers=0)


# --- files of Hugging Face -------------------------------------------------------------------------------------------


def with_prediction(name: str, folder) -> tuple:
    """A tiny model of transformers and its MtpModel of two layers. Writes their files, as releases have them."""
    hf = pytest.importorskip("hf_models")
    main, torch = hf.build.__wrapped__(name), hf.torch
    main.config.num_mtp_layers = 2
    ahead = hf.transformers.modeling_layers.MtpModel(main, 2).eval()
    with torch.no_grad():
        for path, x in [*ahead.layers.named_parameters(), *ahead.layers.named_buffers()]:
            drawn = torch.randn_like(x)
            x.copy_(
                1 + 0.3 * drawn if "norm" in path else 0.1 * drawn if "bias" in path else drawn / x.shape[-1] ** 0.5
            )
    main.save_pretrained(folder)
    numbers = {key: entry.read() for key, entry in files.open_model(folder).items()}
    for k, layer in enumerate(ahead.layers):
        at = f"model.layers.{main.config.num_hidden_layers + k}."
        numbers[f"{at}embed_tokens.weight"] = numbers["model.embed_tokens.weight"]
        numbers[f"{at}shared_head.head.weight"] = numbers["lm_head.weight"]
        for key, x in layer.state_dict().items():
            key, x = key.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm"), x.numpy().copy()
            if key == "mlp.experts.gate_up_proj":
                for e, (gate, up) in enumerate(np.split(both, 2) for both in x):
                    numbers |= {
                        f"{at}mlp.experts.{e}.gate_proj.weight": gate,
                        f"{at}mlp.experts.{e}.up_proj.weight": up,
                    }
            elif key == "mlp.experts.down_proj":
                numbers |= {f"{at}mlp.experts.{e}.down_proj.weight": x[e] for e in range(len(x))}
            else:
                numbers[at + key] = x
    specs = [files.Spec(key, x.dtype, x.shape) for key, x in numbers.items()]
    files.write_model(folder, specs, map(np.ascontiguousarray, numbers.values()), max_file=10**9)
    return main, ahead, numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moonlight", "glm4_moe"])
def test_files_and_logits_are_those_of_transformers(name, tmp_path):
    """Logits at both depths, bit-identical files, and no embedding or head that differs from the model's."""
    main, ahead, numbers = with_prediction(name, tmp_path / "in")
    import hf_models as hf

    said, tokens, torch = [], hf.TOKENS, hf.torch
    mesh = mesh_of(1, 1, 1)
    cfg = hf_import.import_model(tmp_path / "in", tmp_path / "run", mtp=True, mesh=mesh, echo=said.append)
    assert cfg.model.mtp_layers == 2 and not any("not used" in line for line in said)
    computed = dataclasses.replace(cfg.model, compute_dtype="float32")
    params, bias, _ = run_weights.load_weights(tmp_path / "run", *abstract_weights(computed, mesh))
    graph = model.abstract(computed, Program(mtp=True))
    ones = np.ones_like(tokens)
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = jax.tree.map(jnp.asarray, Batch(tokens, tokens, ones.astype(np.float32), ones, place, 0 * ones))

    @jax.jit
    def logits(params, bias, batch):
        out, head = forward(graph, params, bias, batch)
        return out.ahead @ weight(head, "float32").T

    with jax.set_mesh(mesh):
        got = np.asarray(logits(params, bias, jax.device_put(batch, sharding.batch_sharding(mesh))))
    with torch.no_grad():
        ids = torch.tensor(tokens, dtype=torch.long)
        h = main(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]  # what transformers drafts with
        for k in (1, 2):
            at = torch.arange(k, ids.shape[1])[None].expand(len(ids), -1)
            h = ahead.forward_layer(k - 1, h[:, :-1], at, None, input_ids=ids[:, k:])
            want = main.lm_head(h).numpy()
            assert np.abs(got[k - 1, :, :-k] - want).max() < 1e-5 * np.abs(want).max() and want.std() > 0.1
    assert hf_import.export_run(tmp_path / "run", tmp_path / "out", mesh=mesh, echo=said.append)
    written = {key: entry.read() for key, entry in files.open_model(tmp_path / "out").items()}
    assert written.keys() == numbers.keys() and all((written[key] == numbers[key]).all() for key in numbers)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["num_nextn_predict_layers"] == 2
    (other,) = [key for key in numbers if key.endswith("4.shared_head.head.weight")]
    changed = {key: x + (key == other) for key, x in numbers.items()}
    specs = [files.Spec(key, x.dtype, x.shape) for key, x in changed.items()]
    files.write_model(tmp_path / "in", specs, changed.values(), max_file=10**9)
    with pytest.raises(FormatError, match=rf"{other} differs from lm_head.weight"):
        hf_import.import_model(tmp_path / "in", tmp_path / "no", mtp=True, mesh=mesh, echo=said.append)
