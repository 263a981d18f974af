"""Readers of models by layer, for any order of blocks: Hugging Face, upcycling, analysis, counts, the mesh's rules."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_stacks import MODELS, stacks_config

from moe_jax import config, model, upcycle
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import ConfigError, FormatError
from moe_jax.evaluate import analysis, figures, spectra
from moe_jax.hf.architectures import read_config, write_config
from moe_jax.moe.stats import ChoiceSums, RouterStats
from moe_jax.tree import flatten
from moe_jax.upcycle import Cluster, Drop, Noise, VirtualGroups
from tests.upcycle_source import SOURCE, STD, apply, mesh_of

# --- Hugging Face ----------------------------------------------------------------------------------------------------

QWEN = ModelConfig(num_layers=2, num_dense_layers=1, max_seq_len=64, qk_norm=True, head_dim=24)
ORDER = {  # of layers: what config.json says of them, and what it is read as
    "3*(dense moe)": ([0, 2, 4], "3*(dense moe)"),
    "dense moe dense moe dense moe": ([0, 2, 4], "3*(dense moe)"),
    "2*moe dense 3*moe": ([2], "2*moe dense 3*moe"),
    "moe 5*dense": ([1, 2, 3, 4, 5], "moe 5*dense"),
}


@pytest.mark.parametrize("layers", ORDER)
def test_any_layers_may_be_dense(layers):
    """Qwen3-MoE's keys say which; no other architecture does."""
    dense, read = ORDER[layers]
    model = dataclasses.replace(QWEN, num_layers=6, num_dense_layers=0, layers=layers)
    found, hf = write_config(model, 64)
    assert found == "Qwen3MoeForCausalLM" and hf["mlp_only_layers"] == dense
    assert read_config(json.loads(json.dumps(hf)), "")[1].layers == read
    hf |= {"mlp_only_layers": [d for d in dense if d % 2], "decoder_sparse_step": 2}
    back = read_config(json.loads(json.dumps(hf)), "")[1]
    assert [not p.kind.experts for p in back.places] == [i in hf["mlp_only_layers"] or i % 2 == 0 for i in range(6)]


def test_keys_of_dense_layers_that_are_no_layers_are_refused():
    hf = write_config(QWEN, 64)[1]
    for key, value in (("mlp_only_layers", [1.5]), ("mlp_only_layers", 1), ("decoder_sparse_step", 0),
                       ("decoder_sparse_step", 1.5)):  # fmt: skip
        with pytest.raises(FormatError, match=key):
            read_config(hf | {key: value}, "")
    with pytest.raises(FormatError, match="num_layers"):
        read_config(hf | {"num_hidden_layers": 4.0, "decoder_sparse_step": 2}, "")
    with pytest.raises(FormatError, match="num_hidden_layers=20000 is too large; the largest is 10,000"):
        read_config(hf | {"num_hidden_layers": 20_000, "decoder_sparse_step": 2}, "")


# --- upcycling -------------------------------------------------------------------------------------------------------


def deep():
    """A chain's source has two layers: it is made four layers deep first, as copies that are not the identity."""
    return upcycle.Depth(4)


UPCYCLED = {
    "every second": "2*(dense moe)",
    "some": "moe dense 2*moe",
    "pyramid": "dense 2*moe moe:16",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "pyramid" else pytest.mark.slow) for n in UPCYCLED])
def test_upcycled_anywhere_it_is_the_dense_function(name):
    chain = [deep(), VirtualGroups(4, 2, 2, router_std=STD, layers=UPCYCLED[name])]
    grown, params = apply(chain[:1])
    cfg, made = apply(chain)
    assert cfg.layers == UPCYCLED[name] and cfg.num_layers == 4
    assert upcycle.logits_error((grown, params), (cfg, made), mesh_of(1, 1, 1)) < 1e-5
    assert not chain[1].changes(grown)
    # Each block has the parameters of its layer.
    for depth, place in enumerate(cfg.places):
        own = made
        for part in place.path.split("/"):
            own = own[part]
        np.testing.assert_array_equal(
            own["attention"]["w_q"][place.index], params["dense_layers"]["attention"]["w_q"][depth]
        )
        if place.kind.experts:
            assert own["moe"]["w_up"].shape[1] == place.kind.experts


@pytest.mark.slow
def test_clusters_noise_and_new_units_anywhere():
    chain = [deep(), Cluster(4, 4, layers="2*(dense moe)")]
    (grown, params), (cfg, made) = apply(chain[:1]), apply(chain)
    assert upcycle.logits_error((grown, params), (cfg, made), mesh_of(1, 1, 1)) < 1e-5
    _, changed = apply([*chain, Noise(0.1), Drop(0.5)])
    old, new = (tree["layers"]["block_1"]["moe"]["w_up"] for tree in (made, changed))
    moved = np.abs(np.asarray(new) - np.asarray(old)).reshape(2, 4, -1).max(-1)
    assert moved.min() > 0 and len(np.unique(moved)) == 8  # each expert of each layer its own way
    np.testing.assert_array_equal(changed["layers"]["block_0"]["mlp"]["w_up"], made["layers"]["block_0"]["mlp"]["w_up"])


REFUSED = {
    "2*(late dense)": "upcycle.layers='2*(late dense)': a late block has its feed-forward layer beside the experts",
    "table 3*moe": "upcycle.layers='table 3*moe': the table of a table block would not choose what the copies need",
    "2*(dense moe) moe": "upcycle.layers='2*(dense moe) moe': has 5 blocks, but the model has 4 layers",
    "dense 3*moe": "upcycle.layers='dense 3*moe': is the order that dense_layers=1 says",
    "2*(dense mo)": "upcycle.layers='2*(dense mo)': at character 10, 'mo'",
    "moe:12 2*dense moe": "moe:12 needs a multiple of granularity × num_groups = 8, so that no copy is in two",
    "moe:7 2*dense moe": "upcycle.layers='moe:7 2*dense moe': moe:7 needs a multiple of granularity=2",
}


@pytest.mark.parametrize("layers", REFUSED)
def test_layers_that_upcycling_refuses(layers):
    with pytest.raises(ConfigError) as raised:
        groups = {"num_groups": 4, "top_groups": 1} if "moe:12" in layers else {}
        upcycle.final_config([deep(), VirtualGroups(4, 2, 2, layers=layers, moe=groups)], SOURCE)
    assert REFUSED[layers] in str(raised.value)
    if "moe:" not in layers:
        with pytest.raises(ConfigError):
            upcycle.final_config([deep(), Cluster(4, 2, layers=layers)], SOURCE)


def test_clusters_of_two_numbers_are_refused():
    with pytest.raises(ConfigError, match=r"upcycle.layers='moe dense 2\*moe:8': a layer's hidden units are cut into"):
        upcycle.final_config([deep(), Cluster(4, 2, layers="moe dense 2*moe:8")], SOURCE)


# --- analysis --------------------------------------------------------------------------------------------------------


def sums_of(cfg: ModelConfig, domains: int = 2):
    """Random sums by block."""
    rng = np.random.default_rng(0)
    stats, choices = {}, {}
    for stack in cfg.stacks:
        for path, kind in zip(stack.paths, stack.unit, strict=True):
            if kind.experts:
                load = rng.integers(1, 9, (stack.repeat, domains, kind.experts)).astype(np.float32)
                tokens = load.sum(-1) / cfg.moe.top_k
                pairs = rng.integers(1, 9, (stack.repeat, kind.experts, kind.experts)).astype(np.float32)
                stats[path] = RouterStats(tokens, load, load, tokens, 0 * tokens)
                choices[path] = ChoiceSums(0.5 * tokens, pairs, None)
    return stats, choices


def test_layers_with_the_same_number_of_experts_are_analysed_together(tmp_path):
    """`mixed`: of its MoE layers, from the first to the last, numbers 0 and 2 have four experts, 1 and 3 have eight."""
    cfg = stacks_config("mixed").model
    stats, choices = sums_of(cfg)
    found = analysis.analyse(cfg.places, stats, choices, ("a", "b"), cfg.moe.top_k)
    assert {bank: one.layers.tolist() for bank, one in found.items()} == {"_4": [0, 2], "_8": [1, 3]}
    loads = [stats[p.path].tokens_per_expert[p.index] for p in cfg.places if p.kind.experts]
    for bank, one in found.items():
        assert one.selection_frequency.shape == (len(one.layers), 2, int(bank[1:]))
        for row, number in enumerate(one.layers):
            share = loads[number] / loads[number].sum(-1, keepdims=True) * cfg.moe.top_k
            np.testing.assert_allclose(one.selection_frequency[row], share, rtol=1e-6)
        one.save(tmp_path / f"analysis{bank}.npz")
        np.testing.assert_array_equal(analysis.load(tmp_path / f"analysis{bank}.npz").layers, one.layers)
        assert [line.split()[0] for line in analysis.layer_table(one).splitlines()[1:]] == list(map(str, one.layers))
        assert f"of layer {one.layers[1]} (" in figures.compare({"a run": one}, 1).get_suptitle()
        titles = [axis.get_title(loc="left") for axis in figures.expert_domain(one).axes]
        assert [t for t in titles if t] == [f"layer {n}" for n in one.layers]
    one = stacks_config("interleaved").model
    found = analysis.analyse(one.places, *sums_of(one), ("a", "b"), one.moe.top_k)
    assert list(found) == [""] and found[""].layers is None


def test_matrices_are_in_the_order_of_layers():
    cfg = stacks_config("mixed").model
    counter = iter(range(10_000))
    params = jax.tree.map(lambda x: np.full(x.shape, float(next(counter))), model.abstract(cfg).shapes)
    found = spectra.matrices(params, cfg.places)
    at = lambda place: [params["layers"][place.path.split("/")[1]] if "/" in place.path else params[place.path]][0]
    want = [at(place)["attention"]["w_q"].flat[0] for place in cfg.places]
    np.testing.assert_array_equal(found["attention q"][:, 0, 0], want)
    assert found["expert up, 4 experts"].shape[:2] == (2, 4) and found["expert up, 8 experts"].shape[:2] == (2, 8)
    sizes = sum(x.size for x in found.values())
    assert sizes == sum(x.size for path, x in flatten(params).items() if spectra.kind_of(path))


# --- counts and the mesh ---------------------------------------------------------------------------------------------


def counted_by_hand(cfg: ModelConfig, experts_of) -> int:
    d, h, moe = cfg.d_model, cfg.head_dim, cfg.moe
    block = 2 * d * cfg.num_heads * h + 2 * d * cfg.num_kv_heads * h + (2 * h if cfg.qk_norm else 0) + 2 * d
    total = 0
    for place in cfg.places:
        total += block + (3 * d * cfg.d_ff if place.kind.name != "moe" else 0)
        if place.kind.experts:
            total += d * place.kind.experts + 3 * d * moe.d_expert * (experts_of(place) + moe.num_shared_experts)
    return total + d + cfg.vocab_size * d * (1 if cfg.tie_embeddings else 2)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_counted(name):
    cfg = stacks_config(name).model
    counts = model.count_parameters(cfg)
    assert counts.total == counted_by_hand(cfg, lambda place: place.kind.experts)
    assert counts.active == counted_by_hand(cfg, lambda place: cfg.moe.top_k)
    norms = sum(x.size for path, x in flatten(model.abstract(cfg).shapes).items() if path.endswith("norm"))
    matmul = counts.active_no_embedding + cfg.vocab_size * cfg.d_model - norms
    attention = 3 * cfg.num_layers * 8 * cfg.num_heads * 2 * cfg.head_dim
    assert model.flops_per_token(cfg, 8) == pytest.approx(6 * matmul + attention)


def test_the_mesh_divides_every_number_of_experts():
    cfg = dataclasses.replace(stacks_config("mixed"), mesh=config.MeshConfig(1, 1, 8))
    with pytest.raises(ConfigError, match=r"mesh.expert=8: must divide the layers' experts \(4, 8\); nearest valid: 4"):
        config.check_devices(cfg, 8, "cpu")
    assert config.for_evaluation(cfg, 8)[1] == (2, 1, 4)
    with pytest.raises(ConfigError, match=r"loss.bias_target=.* needs layers with one number of experts, not \(4, 8\)"):
        dataclasses.replace(cfg, loss=dataclasses.replace(cfg.loss, bias_target=(1.0,) * 4))


def test_the_same_function_in_other_words():
    """The number that a block takes from moe.num_experts may be another one's."""
    a = ModelConfig(num_layers=3, layers="moe:4 dense moe", moe=MoEConfig(num_experts=8))
    b = ModelConfig(num_layers=3, layers="moe dense moe:8", moe=MoEConfig(num_experts=4))
    c = ModelConfig(num_layers=3, layers="moe dense moe:16", moe=MoEConfig(num_experts=4))
    assert config.plain(a) == config.plain(b) != config.plain(c)
    # In one block all experts are chosen, in another they are not: there the sum of the weights counts.
    some = MoEConfig(num_experts=2, top_k=2)
    d, e = (
        ModelConfig(num_layers=4, layers="2*(moe moe:8)", moe=dataclasses.replace(some, renormalize=r)) for r in (0, 1)
    )
    f = ModelConfig(num_layers=4, layers="2*(moe:2 moe)", moe=dataclasses.replace(some, num_experts=8))
    assert config.plain(d) == config.plain(f) != config.plain(e)
    # A sum of all weights is 1, but not of those that a least ratio leaves.
    for ratio, same in ((0.0, True), (0.5, False)):
        g, h = (ModelConfig(moe=dataclasses.replace(some, renormalize=r, min_ratio=ratio)) for r in (False, True))
        assert (config.plain(g) == config.plain(h)) == same
    label = MoEConfig(num_experts=2, top_k=1, combine="one", table="label")
    i, j = (ModelConfig(num_layers=n, layers=f"{n}*table", moe=label) for n in (2, 3))
    assert config.plain(i) != config.plain(j) and config.plain(i).labels == 2


def test_a_run_keeps_one_spelling():
    """… so that it is resumed with any of them."""
    spellings = ("2*(dense moe)", "2*( dense  moe:8 )")
    models = {config.build_model({"layers": text, "num_layers": 4}) for text in spellings}
    assert [made.layers for made in models] == ["2*(dense moe)"]
