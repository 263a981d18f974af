"""A model's architecture of Hugging Face is found, found for an equal function, or refused. No torch needed."""

import dataclasses
import json
import math

import pytest
from test_configs import load
from test_hf_files import CONFIG, MOONLIGHT, shapes_of

from moe_jax import config
from moe_jax.config import MLAConfig, ModelConfig, MoEConfig, RopeScalingConfig
from moe_jax.errors import FormatError
from moe_jax.hf import tables
from moe_jax.hf.architectures import ARCHITECTURES, differences, read_config, write_config

DENSE = ModelConfig(num_layers=2, num_dense_layers=2, max_seq_len=64)
MOE = ModelConfig(num_layers=2, max_seq_len=64)
SIGMOID = MoEConfig(score="sigmoid", selection_bias=True, num_shared_experts=1)
OLMO = {"qk_norm": True, "qk_norm_over": "projection", "norm": "post"}
SAID = {
    "LlamaForCausalLM": dataclasses.replace(DENSE, rope_scaling=RopeScalingConfig(factor=8.0)),
    "Qwen2ForCausalLM": dataclasses.replace(DENSE, qkv_bias=True),
    "Qwen2MoeForCausalLM": dataclasses.replace(
        MOE,
        qkv_bias=True,
        num_layers=4,
        layers="2*(dense moe)",
        moe=MoEConfig(num_shared_experts=4, shared_gate="sigmoid"),
    ),
    "Qwen3ForCausalLM": dataclasses.replace(DENSE, qk_norm=True, head_dim=24),
    "MixtralForCausalLM": dataclasses.replace(MOE, moe=MoEConfig(renormalize=True)),
    "OlmoeForCausalLM": dataclasses.replace(MOE, qk_norm=True, qk_norm_over="projection"),
    "Qwen3MoeForCausalLM": dataclasses.replace(MOE, qk_norm=True, num_dense_layers=1, head_dim=24),
    "DeepseekV3ForCausalLM": dataclasses.replace(MOE, num_dense_layers=1, mla=MLAConfig(8, 0, 8, 16), moe=SIGMOID),
    "Olmo2ForCausalLM": dataclasses.replace(DENSE, **OLMO),
    "FlexOlmoForCausalLM": dataclasses.replace(MOE, **OLMO),
    "MistralForCausalLM": dataclasses.replace(DENSE, window=8),
    "Olmo3ForCausalLM": dataclasses.replace(
        DENSE,
        **OLMO,
        num_layers=5,
        num_dense_layers=5,
        window=8,
        attention_layers="3*window full",
        rope_scaling=RopeScalingConfig("yarn", 4.0, original_length=16, attention_factor=1.2, layers="full"),
    ),
    "SmolLM3ForCausalLM": dataclasses.replace(DENSE, attention_layers="full full:nope"),
    "Glm4MoeForCausalLM": dataclasses.replace(
        MOE,
        num_dense_layers=1,
        rope_dim=12,
        qkv_bias=True,
        moe=dataclasses.replace(SIGMOID, num_groups=4, top_groups=2),
    ),
    "GraniteMoeForCausalLM": dataclasses.replace(
        MOE,
        embedding_multiplier=12.0,
        attention_multiplier=1 / 64,
        residual_multiplier=0.22,
        logits_divisor=6.0,
        moe=MoEConfig(score_order="topk_score"),
    ),
    "DeepseekV2ForCausalLM": dataclasses.replace(
        MOE,
        num_dense_layers=1,
        mla=MLAConfig(8, 0, 8, 16),
        moe=MoEConfig(
            top_k=3, num_shared_experts=2, num_groups=4, top_groups=2, group_score="best", routed_scaling=16.0
        ),
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_a_model_finds_its_architecture(name):
    found, hf = write_config(SAID[name], 64)
    assert found == name and read_config(json.loads(json.dumps(hf)), "")[1] == SAID[name]


# The same function in other fields: what a model has no use for, and routing that weighs the same experts alike.
OF_CHOSEN = MoEConfig(score_order="topk_score")
of = lambda model=MOE, **fields: dataclasses.replace(model, **fields)
ONE_HEAD = {"qk_norm": True, "qk_norm_over": "projection", "num_heads": 1, "num_kv_heads": 1, "head_dim": 128}
EQUAL = {
    "upcycled": (of(moe=OF_CHOSEN), "Mixtral"),
    "upcycled, norms": (of(moe=OF_CHOSEN, qk_norm=True), "Qwen3Moe"),
    "all groups": (of(moe=MoEConfig(num_groups=4, top_groups=4, renormalize=True)), "Mixtral"),
    "all experts": (of(moe=MoEConfig(top_k=8)), "Mixtral"),
    "one expert of weight 1": (of(moe=MoEConfig(top_k=1, combine="one")), "Mixtral"),
    "one head": (of(num_dense_layers=1, **ONE_HEAD), "Qwen3Moe"),
    "dense": (of(DENSE, moe=MoEConfig(combine="one"), mla=MLAConfig(0, 0, 8, 16)), "Llama"),
    "sigmoid, all groups": (
        of(SAID["DeepseekV3ForCausalLM"], moe=of(SIGMOID, num_groups=2, top_groups=2)),
        "DeepseekV3",
    ),
}


@pytest.mark.parametrize("what", EQUAL)
def test_an_equal_function_finds_its_architecture(what):
    model, want = EQUAL[what]
    found, hf = write_config(model, 64)
    back = read_config(json.loads(json.dumps(hf)), "")[1]
    assert found == f"{want}ForCausalLM" and config.plain(back) == config.plain(model)


def test_a_model_of_no_architecture_is_refused():
    for change, message in (
        ({"moe": MoEConfig(score="sigmoid")}, "differs in"),
        ({"moe": MoEConfig(latent=16)}, r"moe\.latent \(16 here"),
        ({"moe": MoEConfig(num_shared_experts=1, shared_gate="softmax")}, r"moe\.shared_gate \(softmax here"),
        ({"qkv_bias": True, "moe": MoEConfig(renormalize=True)}, r"qkv_bias \(True here"),
        ({"num_dense_layers": 1}, "num_dense_layers"),
        ({"moe": MoEConfig(num_shared_experts=1, renormalize=True)}, "num_shared_experts"),
        ({"moe": MoEConfig(score_order="topk_score", routed_scaling=2.0)}, "routed_scaling"),
        ({"moe": MoEConfig(score_order="topk_score", num_groups=4, top_groups=2)}, "score_order"),
        ({"moe": MoEConfig(renormalize=True, top_k=4, shard_groups=2)}, r"moe\.shard_groups \(2 here"),
        ({"layers": "moe moe:4", "qk_norm": True}, r"layers \(moe:8 moe here"),
        ({"layers": "(late dense)", "qk_norm": True}, r"layers \(\(late dense\) here"),
    ):
        with pytest.raises(FormatError, match=message):
            write_config(dataclasses.replace(MOE, **change), 64)


def test_sliding_windows():
    """A window is read for all layers or some, for none where it is as long as the context, off, or of no layer."""
    window = lambda hf: (read_config(hf, "")[1].window, read_config(hf, "")[1].attention_layers)
    mistral = CONFIG | {"architectures": ["MistralForCausalLM"], "sliding_window": 12, "num_key_value_heads": 2}
    assert window(mistral) == (12, "") and window(mistral | {"sliding_window": 16}) == (0, "")
    _, model, lines = read_config(mistral | {"use_sliding_window": False}, "")  # Qwen's key: a Mistral has none
    assert model.window == 12 and "use_sliding_window=False in config.json is unknown" in lines[0]
    qwen = mistral | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "head_dim": 4}
    assert window(qwen | {"max_window_layers": 1}) == (12, "full window")
    assert window(qwen | {"max_window_layers": 2}) == window(qwen | {"use_sliding_window": False}) == (0, "")


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        (dict(window=64), "Llama"),
        (dict(window=63), "Mistral"),
        (dict(window=64, max_seq_len=0), "Llama"),
        (dict(window=64, attention_layers="window full:nope"), "SmolLM3"),
        # Its context is what a reader takes from the file: that before the scaling, times the factor.
        (dict(window=80, rope_scaling=RopeScalingConfig("dynamic", 2.0, original_length=40)), "Llama"),
        (dict(window=64, rope_scaling=RopeScalingConfig("dynamic", 2.0, original_length=40)), "Mistral"),
    ],
)
def test_a_window_as_long_as_the_context_is_not_written(fields, want):
    name, hf = write_config(of(DENSE, **fields), 64)
    assert name == f"{want}ForCausalLM" and bool(hf.get("sliding_window")) == (want == "Mistral")


@pytest.mark.parametrize("name", SAID)
def test_tables_are_total(name, monkeypatch):
    model = SAID[name]
    shapes = shapes_of(model)
    assert len(tables.tensors(name, model, shapes)) >= len(shapes)
    with pytest.raises(FormatError, match="no rule covers all of the parameter layers/new"):
        tables.tensors(name, model, shapes | {"layers/new": (2, 3)})
    stack = "dense_layers" if model.num_dense_layers == 2 else "layers"
    with pytest.raises(FormatError, match=r"attention/w_o, which is not in this model|matches no parameter"):
        tables.tensors(name, model, {path: s for path, s in shapes.items() if not path.endswith("attention/w_o")})
    with pytest.raises(FormatError, match=f"no rule covers all of the parameter {stack}/attention_norm"):
        tables.tensors(name, model, shapes | {f"{stack}/attention_norm": (7, 8)})


def test_configs_are_the_releases():
    """configs/ of published models: the same function of the same weights, found again from the model alone."""
    name, model, lines = read_config(MOONLIGHT, "")
    assert name == "DeepseekV3ForCausalLM" and not lines
    assert differences(load("moonlight_16b_a3b")[1].model, model) == []
    assert write_config(model, 8192)[0] == name
    found = tables.tensors(name, model, shapes_of(model))
    assert sum(math.prod(t.shape) for t in found) == 15_289_019_904 + 2 * 163_840 * 2048 + 26 * 64  # and the biases
    assert len(found) == len({t.name for t in found}) == 3 + 27 * 7 + 3 + 26 * (2 + 3 + 64 * 3)
    assert write_config(load("olmoe_1b_7b")[1].model, 4096)[0] == "OlmoeForCausalLM"


def test_every_architecture_is_tested():
    assert set(SAID) == set(ARCHITECTURES)
