"""Equal functions, written differently in two config.json, are one model: deduced from fields, whatever is declared."""

import pytest

from moe_jax.hf.architectures import differences, read_config

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
    "tie_word_embeddings": False,
}  # fmt: skip
ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 20, "q_lora_rank": None, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
    "v_head_dim": 14, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.0, "n_group": 1, "topk_group": 1,
}  # fmt: skip
V3, V2 = LATENT | {"norm_topk_prob": True}, LATENT | {"topk_method": "greedy"}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
GRANITE = MIXTRAL | {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
GLM = {key: value for key, value in V3.items() if "_rank" not in key and "qk_" not in key} | {"v_head_dim": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
scaled = lambda **more: {"rope_scaling": more}
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
ALL_FULL = ["full_attention"] * 4
# What one config.json has beyond SIZES, and what another one has.
SAME = {
    "a scaling by 1, linear": ("Llama", {}, "Llama", scaled(rope_type="linear", factor=1.0)),
    "a scaling by 1, dynamic": ("Llama", {}, "Llama", scaled(type="dynamic", factor=1.0)),
    "a scaling by 1, YaRN": ("Llama", {}, "Llama", scaled(**YARN | {"factor": 1.0})),
    "YaRN's own factor": ("Llama", scaled(**YARN), "Llama", scaled(**YARN, attention_factor=1.1386294361119891)),
    "a head size": ("Llama", {}, "Llama", {"head_dim": 8}),
    "as many keys as queries": ("Llama", {"num_key_value_heads": None}, "Llama", {"num_key_value_heads": 4}),
    "no window": ("Llama", {}, "Mistral", {"sliding_window": None}),
    "a window as long as the context": ("Llama", {}, "Mistral", {"sliding_window": 64}),
    "no layer with a window": ("Qwen3", {}, "Qwen3", SLIDING | {"max_window_layers": 4}),
    "a window that is off": ("Qwen3", {}, "Qwen3", SLIDING | {"use_sliding_window": False}),
    "windows by a list": ("Qwen3", SLIDING | {"max_window_layers": 2}, "Qwen3",
                          SLIDING | {"layer_types": ALL_FULL[:2] + ["sliding_attention"] * 2}),
    "OLMo 3's list": ("Olmo3", {"sliding_window": 8}, "Olmo3",
                      {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ALL_FULL[:1]}),
    "OLMo 3's own length": ("Olmo3", scaled(**YARN | {"original_max_position_embeddings": 64}) | {"sliding_window": 8},
                            "Olmo3", scaled(rope_type="yarn", factor=4.0)
                            | {"sliding_window": 8, "original_max_position_embeddings": 16}),
    "an OLMo 2": ("Olmo2", {"rms_norm_eps": 1e-6}, "Olmo3", {"layer_types": ALL_FULL}),
    "a Llama with RoPE everywhere": ("Llama", {}, "SmolLM3", {"no_rope_layers": [1] * 4}),
    "SmolLM3's list": ("SmolLM3", {}, "SmolLM3", {"no_rope_layers": [1, 1, 1, 0]}),
    "dense layers by a list": ("Qwen3Moe", ROUTED | {"decoder_sparse_step": 2}, "Qwen3Moe",
                               ROUTED | {"mlp_only_layers": [0, 2]}),
    "no layer with experts": ("Qwen3", {"head_dim": 8}, "Qwen3Moe", ROUTED | {"mlp_only_layers": [0, 1, 2, 3]}),
    "all experts chosen": ("Qwen3Moe", ROUTED | {"num_experts_per_tok": 8}, "Qwen3Moe",
                           ROUTED | {"num_experts_per_tok": 8, "norm_topk_prob": False}),
    "all groups kept": ("DeepseekV3", V3, "DeepseekV3", V3 | {"n_group": 4, "topk_group": 4}),
    "groups of one expert": ("DeepseekV3", V3, "DeepseekV3", V3 | {"n_group": 8, "topk_group": 3}),
    "groups that greedy ignores": ("DeepseekV2", V2, "DeepseekV2", V2 | {"n_group": 4, "topk_group": 2}),
    "the best of as many groups as experts": ("DeepseekV2", V2, "DeepseekV2", V2 | LIMITED),
    "groups that are null": ("DeepseekV2", V2, "DeepseekV2", V2 | {"n_group": None, "topk_group": None}),
    "multipliers of 1": ("Mixtral", MIXTRAL, "GraniteMoe", GRANITE | {"attention_multiplier": 8**-0.5}),
    "a whole rotation": ("Glm4Moe", GLM | {"partial_rotary_factor": 0.5}, "Glm4Moe", GLM),
    "biases that are off": ("Glm4Moe", GLM, "Glm4Moe", GLM | {"attention_bias": False}),
}  # fmt: skip
# The same with one number changed, where the function is another one: what differs.
OTHER = {
    "a scaling by 2": ("Llama", {}, "Llama", scaled(rope_type="linear", factor=2.0), "rope_scaling"),
    "YaRN by its attention factor": (
        "Llama",
        {},
        "Llama",
        scaled(**YARN | {"factor": 1.0}, attention_factor=2.0),
        "rope_scaling",
    ),
    "a window": ("Llama", {}, "Mistral", {"sliding_window": 63}, "window"),
    "NoPE": ("Llama", {}, "SmolLM3", {}, "attention_layers"),
    "fewer groups than experts": ("DeepseekV2", V2, "DeepseekV2", V2 | LIMITED | {"topk_group": 1}, "num_groups"),
    "the best two": ("DeepseekV3", V3, "DeepseekV3", V3 | {"n_group": 4, "topk_group": 2}, "num_groups"),
    "half a rotation": ("Glm4Moe", GLM | {"partial_rotary_factor": 1.0}, "Glm4Moe", GLM, "rope_dim"),
    "a multiplier": ("Mixtral", MIXTRAL, "GraniteMoe", GRANITE | {"attention_multiplier": 0.3}, "attention_multiplier"),
}


def read(kind, more):
    return read_config({"architectures": [f"{kind}ForCausalLM"]} | SIZES | more, "here")[1]


@pytest.mark.parametrize("what", SAME)
def test_one_model(what):
    one, first, other, second = SAME[what]
    a, b = read(one, first), read(other, second)
    assert differences(a, b) == [] and a.stacks == b.stacks


@pytest.mark.parametrize("what", OTHER)
def test_two_models(what):
    one, first, other, second, field = OTHER[what]
    assert field in " ".join(differences(read(one, first), read(other, second)))
