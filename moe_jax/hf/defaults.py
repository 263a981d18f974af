"""Defaults of the keys that a config.json lacks: those of transformers' config classes.

The classes have different defaults, and files of the hub rely on them. `tests/test_hf_defaults.py` compares every key
with the installed transformers.
"""

from typing import Any

_SHARED: dict[str, Any] = {
    "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False, "initializer_range": 0.02,
}  # fmt: skip
_LLAMA: dict[str, Any] = _SHARED | {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
}  # fmt: skip
_QWEN: dict[str, Any] = _SHARED | {
    "vocab_size": 151_936, "num_attention_heads": 32, "max_position_embeddings": 32_768, "use_sliding_window": False,
    "sliding_window": 4096,
}  # fmt: skip
_MISTRAL: dict[str, Any] = _SHARED | {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}  # fmt: skip
_OLMO2: dict[str, Any] = _SHARED | {
    "vocab_size": 50_304, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
# By model type. None: null in transformers, a number derived from other keys or the absence of a setting.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL | {
        "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "num_experts_per_tok": 2, "num_local_experts": 8,
        "sliding_window": None,
    },
    "qwen2": _QWEN | {
        "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "head_dim": None, "max_window_layers": 28, "layer_types": None,
    },
    "qwen2_moe": _QWEN | {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": None, "moe_intermediate_size": 1408, "num_experts_per_tok": 4,
        "num_experts": 60, "norm_topk_prob": False, "mlp_only_layers": None, "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 5632, "qkv_bias": True, "max_window_layers": 28, "layer_types": None,
    },
    "qwen3": _QWEN | {
        "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "head_dim": 128, "max_window_layers": 28, "layer_types": None,
    },
    "qwen3_moe": _QWEN | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
        "head_dim": None, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
        "norm_topk_prob": False, "mlp_only_layers": None, "decoder_sparse_step": 1,
    },
    "olmoe": _SHARED | {
        "vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False,
    },
    "deepseek_v3": _SHARED | {
        "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True, "max_position_embeddings": 4096,
        "num_nextn_predict_layers": 1,
    },
    "olmo2": _OLMO2,
    "flex_olmo": _OLMO2 | {
        "vocab_size": 100_352, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 500_000.0,
        "num_experts_per_tok": 5, "num_experts": 7, "norm_topk_prob": False,
    },
    "olmo3": _OLMO2 | {"rope_theta": 500_000.0, "sliding_window": 4096, "layer_types": None},
    "smollm3": _SHARED | {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": None, "max_position_embeddings": 32_768,
        "rope_theta": 2_000_000.0, "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None,
        "no_rope_layers": None, "no_rope_layer_interval": 4, "layer_types": None,
    },
    "glm4_moe": _SHARED | {
        "vocab_size": 151_552, "hidden_size": 4096, "intermediate_size": 10_944, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "attention_bias": False, "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "use_qk_norm": False,
        "num_nextn_predict_layers": 1,
    },
    "granitemoe": _LLAMA | {
        "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "deepseek_v2": _LLAMA | {
        "vocab_size": 102_400, "first_k_dense_replace": 0, "kv_lora_rank": 512, "q_lora_rank": 1536, "n_group": None,
        "n_routed_experts": 64, "n_shared_experts": 2, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "routed_scaling_factor": 1.0, "topk_group": None, "topk_method": "greedy", "v_head_dim": 128,
        "num_experts_per_tok": None, "moe_intermediate_size": 1407,
    },
}  # fmt: skip
# Keys that may be null, for a number derived from other keys. For all other keys transformers refuses null, or fails.
_HEADS, _KV_HEADS = {"head_dim"}, {"num_key_value_heads"}
NULL: dict[str, set[str]] = {
    "llama": _HEADS | _KV_HEADS,
    "mistral": _HEADS,
    "mixtral": _HEADS,
    "qwen2": _KV_HEADS,
    "qwen2_moe": set(),
    "qwen3": _KV_HEADS,
    "qwen3_moe": set(),
    "olmoe": _KV_HEADS,
    "deepseek_v3": _KV_HEADS | {"q_lora_rank"},
    "olmo2": _KV_HEADS,
    "flex_olmo": _KV_HEADS,
    "olmo3": _KV_HEADS,
    "smollm3": _KV_HEADS,
    "glm4_moe": set(),
    "granitemoe": _KV_HEADS,
    "deepseek_v2": _KV_HEADS | {"q_lora_rank"},
}
