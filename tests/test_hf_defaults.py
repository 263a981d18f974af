"""Keys that a config.json lacks are what transformers' classes take for them."""

import functools
import json

import pytest

hf_models = pytest.importorskip("tests.hf_models" if __package__ else "hf_models")

from hf_models import transformers  # noqa: E402

from moe_jax.config import ModelConfig  # noqa: E402
from moe_jax.errors import FormatError  # noqa: E402
from moe_jax.hf.architectures import ARCHITECTURES, KEPT, MUST, read_config  # noqa: E402

# No value is a class's default, and any of them may become it: heads that divide, experts enough for eight a token.
SIZES = {
    "vocab_size": 99, "hidden_size": 256, "num_hidden_layers": 40, "num_attention_heads": 64, "intermediate_size": 40,
    "num_key_value_heads": 2, "max_position_embeddings": 200_000, "rms_norm_eps": 1e-4, "tie_word_embeddings": True,
    "initializer_range": 0.03, "head_dim": 6,
}  # fmt: skip
ROUTED = {"num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
ROPE = {"rope_type": "llama3", "rope_theta": 99.0, "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0,
        "original_max_position_embeddings": 16}  # fmt: skip
LATENT = {
    "num_attention_heads": 128, "num_key_value_heads": 128, "first_k_dense_replace": 2, "kv_lora_rank": 20,
    "q_lora_rank": 18, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10, "v_head_dim": 14, "n_routed_experts": 512,
    "n_group": 16, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.0, "norm_topk_prob": False,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 50}
SAID = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 50},
    "Qwen2ForCausalLM": WINDOW | {"max_window_layers": 3, "layer_types": ["sliding_attention"] * 40},
    "Qwen2MoeForCausalLM": ROUTED
    | WINDOW
    | {
        "num_experts": 16,
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 4224,
        "qkv_bias": False,
        "max_window_layers": 3,
        "layer_types": ["sliding_attention"] * 40,
    },
    "Qwen3ForCausalLM": WINDOW | {"max_window_layers": 3, "layer_types": ["sliding_attention"] * 40},
    "MixtralForCausalLM": ROUTED | {"num_local_experts": 6, "sliding_window": 50},
    "OlmoeForCausalLM": ROUTED | {"num_experts": 16},
    "Qwen3MoeForCausalLM": ROUTED | WINDOW | {"num_experts": 16, "mlp_only_layers": [0]},
    "DeepseekV3ForCausalLM": ROUTED | LATENT,
    "Olmo2ForCausalLM": {},
    "FlexOlmoForCausalLM": ROUTED | {"num_experts": 16},
    "GraniteMoeForCausalLM": ROUTED
    | {
        "num_local_experts": 6,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.3,
        "logits_scaling": 2.5,
    },
    "Olmo3ForCausalLM": {"sliding_window": 50, "layer_types": ["sliding_attention", "full_attention"] * 20},
    "SmolLM3ForCausalLM": WINDOW
    | {
        "layer_types": ["sliding_attention", "full_attention"] * 20,
        "no_rope_layers": [0, 1, 1, 1] * 10,
        "no_rope_layer_interval": 3,
    },
    "Glm4MoeForCausalLM": ROUTED
    | {key: LATENT[key] for key in LATENT if "_rank" not in key and "head" not in key}
    | {
        "num_attention_heads": 64,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "partial_rotary_factor": 0.65,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "DeepseekV2ForCausalLM": ROUTED
    | LATENT
    | {
        "norm_topk_prob": False,
        "topk_method": "group_limited_greedy",
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
NO_MODEL = {  # keys without which the defaults of a class are no model
    "Glm4MoeForCausalLM": {"head_dim": 128},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
}
DEFAULT_ROPE = {"rope_theta": 99.0, "rope_parameters": {"rope_type": "default"}}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 99.0}
ROPES = (DEFAULT_ROPE, {"rope_scaling": ROPE}, {"rope_parameters": ROPE})
OLMO3_ROPES = (
    {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}},
    {"rope_scaling": ROPE, "rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}},
    {"rope_parameters": {"full_attention": ROPE, "sliding_attention": PLAIN_ROPE}},
)


def of_transformers(architecture: str, hf: dict) -> dict[str, object] | None:
    """Our fields as transformers' class understands `hf`; None if it refuses, or could not compute with it."""
    kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    try:
        cfg = kind(**json.loads(json.dumps(hf)))
    except Exception:  # of a value that its validation refuses: one of many kinds
        return None
    fields = dict((ours, keys.split("|")[0]) for keys, ours in ARCHITECTURES[architecture].fields)
    want = {ours: getattr(cfg, theirs, None) for ours, theirs in fields.items()}
    heads = cfg.hidden_size // cfg.num_attention_heads
    want["head_dim"] = getattr(cfg, "head_dim", heads)  # as its attention has it
    if want["head_dim"] is None and architecture in ("MixtralForCausalLM", "MistralForCausalLM"):
        want["head_dim"] = heads
    if "mla.kv_rank" in want:
        want |= {"head_dim": cfg.qk_head_dim, "mla.q_rank": cfg.q_lora_rank or 0}
    rope = cfg.rope_parameters
    if architecture == "Olmo3ForCausalLM":
        rope, window = (rope[f"{kind}_attention"] for kind in ("full", "sliding"))
        if rope["rope_theta"] != window["rope_theta"]:
            return None  # refused here
        want["rope_scaling.layers"] = "all" if rope["rope_type"] == "default" else "full"
    if "rope_dim" in want or architecture == "Glm4MoeForCausalLM":
        turned = int(want["head_dim"] * rope.get("partial_rotary_factor", 1.0)) if want["head_dim"] else 0
        want["rope_dim"] = turned % (want["head_dim"] or 1)
    want["rope_theta"] = rope["rope_theta"]
    want["rope_scaling.factor"] = rope["factor"] if rope["rope_type"] == "llama3" else 1.0
    if rope["rope_type"] == "llama3":
        want["rope_scaling.original_length"] = rope["original_max_position_embeddings"]
        want |= {f"rope_scaling.{name}": rope[name] for name in ("low_freq_factor", "high_freq_factor")}
    layers, window = cfg.num_hidden_layers, getattr(cfg, "sliding_window", None)
    types = getattr(cfg, "layer_types", None) or ["full" if window is None else "sliding_attention"] * layers
    sliding = "sliding_attention" in types
    if window is not None and window >= cfg.max_position_embeddings:
        types = ["full"] * layers
    rotated = getattr(cfg, "no_rope_layers", [1] * layers)
    want["attends"] = tuple((kind == "sliding_attention", bool(rotated[i])) for i, kind in enumerate(types))
    want["window"] = window if "sliding_attention" in types else 0
    if architecture == "SmolLM3ForCausalLM" and sliding and not cfg.use_sliding_window:
        return None  # its mask and its attention disagree
    if architecture == "GraniteMoeForCausalLM":
        want["attention_multiplier"] = cfg.attention_multiplier
    if architecture == "DeepseekV2ForCausalLM" and cfg.topk_method != "greedy":
        limited = cfg.topk_method == "group_limited_greedy"
        want |= {"moe.num_groups": cfg.n_group if limited else None, "moe.top_groups": cfg.topk_group}
    if (want.get("moe.top_groups") or 1) > (want.get("moe.num_groups") or 1):
        return None  # its forward pass raises
    if "Qwen2Moe" in architecture:
        if cfg.shared_expert_intermediate_size % cfg.moe_intermediate_size:
            return None  # refused here
        want["moe.num_shared_experts"] = cfg.shared_expert_intermediate_size / cfg.moe_intermediate_size
        if cfg.sliding_window is None or (sliding and not cfg.use_sliding_window):
            return None  # its forward pass raises, or has a window of nothing
    if sliding and architecture[:5] in ("Qwen2", "Qwen3", "Olmo3", "SmolL") and cfg.sliding_window is None:
        return None  # its forward pass raises
    return None if None in want.values() else want


def field(model: ModelConfig, name: str):
    return functools.reduce(getattr, name.split("."), model)


@pytest.mark.parametrize("architecture", SAID)
def test_a_key_that_is_missing_or_null_is_what_transformers_takes(architecture):
    """Every key, taken away and set to null, one at a time: the same model, or refused where it cannot be one there."""
    base = {"architectures": [architecture]} | SIZES | SAID[architecture]
    changes = [lambda hf, key=key: hf.pop(key) for key in base if key != "architectures"]
    changes += [lambda hf, key=key: hf.update({key: None}) for key in base if key != "architectures"]
    refused = 0
    ropes = OLMO3_ROPES if architecture == "Olmo3ForCausalLM" else ROPES
    for rope in ropes:
        extra = [lambda hf, key=key: hf.pop(key) for key in rope]
        extra += [lambda hf, key=key: hf["rope_scaling"].pop(key) for key in rope.get("rope_scaling", ())]
        extra += [lambda hf: hf.update(use_sliding_window=False), lambda hf: hf.pop("layer_types", None),
                  lambda hf: hf.update(max_window_layers=99, layer_types=None)]  # fmt: skip
        for change in (changes if rope is ropes[0] else []) + extra:
            hf = json.loads(json.dumps(base | rope))
            change(hf)
            want = of_transformers(architecture, hf)
            try:
                model = read_config(hf, "here")[1]
            except FormatError:
                assert want is None, (hf, want)
                refused += 1
                continue
            assert want is not None, hf
            assert {name: field(model, name) for name in want} == want, hf
    assert refused < 50


@pytest.mark.parametrize("architecture", SAID)
def test_every_key_of_transformers_is_known(architecture):
    """No field that its class writes is printed as unknown; one that must have one value has it there by default."""
    kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    made = kind(**NO_MODEL.get(architecture, {}))
    hf = {"architectures": [architecture]} | made.to_dict() | {"architectures": [architecture]}
    _, _, lines = read_config(hf, "here")
    common = {"output_hidden_states", "return_dict", "is_encoder_decoder", "output_attentions", "problem_type",
              "chunk_size_feed_forward", "id2label", "label2id"}  # fmt: skip
    assert not [line for line in lines if line.split("=")[0] not in common]
    assert all(hf[key] == value for key, value in MUST.items() if key in hf) and KEPT


def test_a_released_olmo_3():
    """Its older keys: a scaling of the layers without a window, which are every fourth."""
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32,
               "beta_slow": 1, "attention_factor": 1.2079441541679836}  # fmt: skip
    hf = {"architectures": ["Olmo3ForCausalLM"]} | SIZES | {
        "num_hidden_layers": 64, "max_position_embeddings": 65_536, "rope_theta": 500_000, "rope_scaling": scaling,
        "sliding_window": 4096,
    }  # fmt: skip
    _, model, lines = read_config(hf, "here")
    assert not lines and model.attention_layers == "3*window full" and model.window == 4096
    assert (model.rope_scaling.type, model.rope_scaling.layers) == ("yarn", "full")
    assert read_config(hf | {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16}, "")[1] == model


def test_what_is_missing_is_said():
    hf = {"architectures": ["MistralForCausalLM"]} | SIZES | {"rope_theta": 5.0, "sliding_window": None}
    assert read_config(hf, "here")[2] == []
    del hf["sliding_window"], hf["head_dim"], hf["vocab_size"]
    (line,) = read_config(hf, "here")[2]
    assert line == (
        "config.json has no vocab_size, sliding_window; defaults of transformers' mistral: "
        "vocab_size=32000, sliding_window=4096"
    )
