"""Tiny models of transformers with random weights, one of each architecture and of what it may vary. Needs torch."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZE = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, max_position_embeddings=64, rope_theta=1000.0,
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=3, moe_intermediate_size=24)
MLA = dict(
    num_key_value_heads=4, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14, n_routed_experts=8,
    n_shared_experts=2, first_k_dense_replace=1, routed_scaling_factor=2.446, norm_topk_prob=True,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=1000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
# Our name for it: (transformers' name, what its config has beyond or instead of SIZE).
YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=8)
SHORT = dict(max_position_embeddings=32)
MODELS = {
    "llama": ("Llama", dict(head_dim=12)),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, num_attention_heads=2, num_key_value_heads=1)),
    "llama3": ("Llama", dict(rope_theta=None, rope_parameters=LLAMA3)),
    "linear": ("Llama", dict(rope_theta=None, rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=2.5))),
    "dynamic": (
        "Llama",
        dict(
            rope_theta=None,
            max_position_embeddings=8,
            rope_parameters=dict(rope_type="dynamic", rope_theta=1000.0, factor=4.0),
        ),
    ),
    "yarn": ("Qwen3", SHORT | dict(head_dim=10, rope_theta=None, rope_parameters=YARN)),
    "longrope": (
        "Llama",
        SHORT
        | dict(
            rope_theta=None,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=1000.0,
                original_max_position_embeddings=8,
                short_factor=[1.0, 1.1, 1.2, 1.3],
                long_factor=[1.5, 2.0, 3.0, 4.0],
            ),
        ),
    ),
    "mistral": ("Mistral", dict(sliding_window=5, head_dim=8)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen2_moe": (
        "Qwen2Moe",
        EXPERTS
        | dict(
            num_experts=8,
            shared_expert_intermediate_size=48,
            norm_topk_prob=False,
            num_hidden_layers=5,
            decoder_sparse_step=2,
            mlp_only_layers=[1],
        ),
    ),
    "qwen3": ("Qwen3", dict(head_dim=10, tie_word_embeddings=True)),
    "mixtral": ("Mixtral", dict(num_local_experts=6, num_experts_per_tok=2)),
    "olmoe": ("Olmoe", dict(num_experts=8, num_experts_per_tok=3, norm_topk_prob=False)),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | dict(num_experts=8, norm_topk_prob=True, head_dim=10, mlp_only_layers=[0])),
    "qwen3_moe, every second": (
        "Qwen3Moe",
        EXPERTS
        | dict(
            num_experts=8,
            head_dim=10,
            num_hidden_layers=5,
            decoder_sparse_step=2,
            mlp_only_layers=[1],
            use_sliding_window=True,
            sliding_window=7,
        ),
    ),
    "moonlight": ("DeepseekV3", EXPERTS | MLA | dict(n_group=1, topk_group=1, q_lora_rank=None)),
    "deepseek_v3": (
        "DeepseekV3",
        EXPERTS
        | MLA
        | SHORT
        | dict(
            n_group=4,
            topk_group=2,
            q_lora_rank=18,
            rope_theta=None,
            rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
        ),
    ),
    "olmo2": ("Olmo2", dict()),
    "olmo3": (
        "Olmo3",
        SHORT
        | dict(
            num_hidden_layers=5,
            sliding_window=6,
            rope_theta=None,
            pad_token_id=1,
            rope_parameters=dict(
                full_attention=YARN | dict(attention_factor=1.2),
                sliding_attention=dict(rope_type="default", rope_theta=1000.0),
            ),
        ),
    ),
    "smollm3": (
        "SmolLM3",
        dict(num_hidden_layers=4, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=6, pad_token_id=1),
    ),
    "glm4_moe": (
        "Glm4Moe",
        EXPERTS
        | dict(
            n_routed_experts=8,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
            use_qk_norm=True,
            attention_bias=True,
        ),
    ),
    "flex_olmo": ("FlexOlmo", dict(num_experts=8, num_experts_per_tok=3, pad_token_id=1)),
    "granite": (
        "GraniteMoe",
        dict(
            num_local_experts=6,
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.3,
            logits_scaling=2.5,
            num_experts_per_tok=3,
        ),
    ),
    "deepseek_v2": (
        "DeepseekV2",
        EXPERTS
        | MLA
        | SHORT
        | dict(
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            q_lora_rank=18,
            norm_topk_prob=False,
            rope_theta=None,
            rope_parameters=YARN | dict(mscale=0.8, mscale_all_dim=0.707),
        ),
    ),
    "deepseek_v2, greedy": (
        "DeepseekV2",
        EXPERTS | MLA | dict(q_lora_rank=None, norm_topk_prob=False, num_attention_heads=4),
    ),
}
# A model's seed is its place here, so that a new one at the end changes no other.
SEEDS = (
    "deepseek_v3", "llama", "llama3", "mistral", "mixtral", "moonlight", "olmoe", "qwen3", "qwen3_moe",
    "qwen3_moe, every second", "smollm2", "qwen2", "qwen2_moe",
    "olmo2", "flex_olmo", "granite", "deepseek_v2", "deepseek_v2, greedy", "olmo3", "smollm3", "glm4_moe", "linear",
    "dynamic", "yarn", "longrope",
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 96, (8, 12)).astype(np.int32)


@functools.cache
def build(name: str):
    """The model, in float32, whose every weight is drawn so that it matters."""
    kind, more = MODELS[name]
    fields = {k: v for k, v in (SIZE | more).items() if v is not None or k in ("sliding_window", "q_lora_rank")}
    torch.manual_seed(SEEDS.index(name))
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**fields)).eval()
    model.generation_config = transformers.GenerationConfig()
    with torch.no_grad():
        for tensor_name, x in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in tensor_name:
                x.copy_(1 + 0.3 * torch.randn_like(x))
            elif "e_score_correction_bias" in tensor_name:
                x.copy_(0.1 * torch.randn_like(x))
            elif "inv_freq" not in tensor_name:
                x.copy_(torch.randn_like(x) * (1.0 if "embed" in tensor_name else 1.5 / x.shape[-1] ** 0.5))
    return model


@functools.cache
def saved(name: str) -> Path:
    """Its files, as transformers writes them; in two or more shards."""
    folder = Path(tempfile.mkdtemp(prefix=f"hf-{name.partition(',')[0]}-"))
    build(name).save_pretrained(folder, max_shard_size="60KB")
    return folder


def reset(model) -> None:
    """Makes it forget the longest sequence so far, which frequencies of a scaling may depend on."""
    for module in model.modules():
        if hasattr(module, "rotary_emb"):
            module.rotary_emb = type(module.rotary_emb)(config=model.config)


def forward(model, tokens) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits `[B, S, V]`, and the experts each MoE layer chose, sorted, `[B·S, K]`."""
    reset(model)
    chosen = []
    take = lambda module, args, out: chosen.append(np.sort(out[2].numpy(), axis=-1))
    routers = [m for m in model.modules() if type(m).__name__.endswith("Router")]
    hooks = [m.register_forward_hook(take) for m in routers]
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()
    for hook in hooks:
        hook.remove()
    return logits, chosen
