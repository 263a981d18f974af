"""A run before it begins: its memory against shapes, shardings and the table of `nn/remat.py`."""

import dataclasses
import itertools

import jax
import pytest

from moe_jax import config, model
from moe_jax.aot import compile_only, dry_run
from moe_jax.parallel import sharding
from moe_jax.train.state import abstract_state, parts_of


def small(**changes) -> config.RunConfig:
    cfg = config.default_config()
    cfg.model.update(vocab_size=512, d_model=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16)
    cfg.model.moe.update(num_experts=8, top_k=2, d_expert=24)
    cfg.data.update(batch_size=16, seq_len=64)
    for name, value in changes.items():
        group, _, last = name.rpartition("__")
        (cfg.model if not group else cfg[group])[last] = value
    return config.build(cfg)


def test_the_state_of_a_device_is_that_of_its_shards():
    """The report for (2, 2, 2), beside the shards of a state that lies on eight devices."""
    cfg = small(optim__name="muon", optim__ema=0.9)
    state = abstract_state(cfg, sharding.make_mesh((2, 2, 2)))
    parts, size = parts_of(state.opt_state), compile_only.bytes_of_device
    found = dry_run.memory(cfg, (2, 2, 2))
    assert found.parameters == size((state.params, state.router_bias)) and found.gradients == size(state.params)
    assert (found.moments, found.average) == (size(parts.optimizer), size(parts.ema))
    two = dataclasses.replace(cfg.data, sources=dict.fromkeys("ab", cfg.data.sources["stdlib"]))
    observed = dry_run.memory(dataclasses.replace(cfg, data=two, mixture=config.MixtureConfig("dga")), (8, 1, 1))
    assert found.activations == observed.activations  # all axes split the batch
    assert observed.gradients == 2 * 4 * sum(x.size for x in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_activations_of_a_layer_are_those_of_the_table():
    """Two layers more, for each token: with remat="full" a layer keeps its input, with "selective" what the table of
    nn/remat.py says. Numbers are bfloat16, the router's logits float32, places of rows int32."""

    def of_a_layer(remat: str) -> float:
        more, fewer = (dry_run.activations(small(remat=remat, num_layers=n)) for n in (4, 2))
        return (more - fewer) / 2 / 64

    assert of_a_layer("full") == 2 * 32
    n_h, m_h, d, e, k, f = 64, 32, 32, 8, 2, 24
    table = 2 * (d + n_h + 2 * m_h + n_h + d + 2 * k * f) + 4 * e + 4 * 2 * k + 4 * 4  # the last: logsumexps
    assert of_a_layer("selective") == table


@pytest.mark.slow
def test_layers_of_multi_token_prediction():
    """One keeps what its block reads, the gradient of what its head reads, and a
    gradient of the output matrix."""
    kept = lambda n: dry_run.memory(small(mtp_layers=n, remat="full"), (1, 1, 1)).activations
    assert kept(1) - kept(0) >= 16 * 64 * 2 * 2 * 32 + 4 * 512 * 32


@pytest.mark.slow
def test_attention_probabilities_are_counted_where_they_are_kept():
    """Counts S × S numbers of at least 2 bytes for 4 layers and 4 heads with "xla" alone, without rematerialisation."""
    cases = itertools.product(("xla", "chunked", "cudnn"), ("none", "selective"))
    kept = {(name, remat): dry_run.activations(small(remat=remat, attention=name)) for name, remat in cases}
    assert kept["xla", "none"] - kept["chunked", "none"] >= 4 * 4 * 64 * 64 * 2
    assert kept["cudnn", "none"] - kept["chunked", "none"] == 4 * 4 * 64 * 4 * (8 + 16 - 1)  # of places in its lists
    assert kept["chunked", "selective"] - kept["xla", "selective"] == 4 * 4 * 64 * 4  # logsumexps


@pytest.mark.slow
def test_the_report(tmp_path, capsys):
    """The report for a mesh that is not here; the data comes last."""
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 400, encoding="utf-8")
    source = config.SourceConfig(kind="files", path=str(tmp_path / "a.txt"), validation_fraction=0.2)
    cfg = small(train__steps=30, train__checkpoint_every=10)
    data = dataclasses.replace(cfg.data, sources={"text": source}, cache_dir=str(tmp_path), batch_size=64)
    mesh = config.MeshConfig(data=2, fsdp=8, expert=4)
    dry_run.main(dataclasses.replace(cfg, data=data, mesh=mesh))
    out = capsys.readouterr().out
    counts = model.count_parameters(cfg.model)
    for words in (
        "devices: 64, mesh {'data': 2, 'fsdp': 8, 'expert': 4}; 1 sequences of 64 tokens",
        f"parameters: {counts.total:,} total",
        "steps: 30 of 4,096 tokens, 122,880 in all",
        "checkpoints: 3",
        "epochs",
    ):
        assert words in out
    assert jax.device_count() == 8
