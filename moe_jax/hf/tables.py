"""Tables that map tensors of Hugging Face and GGUF files to parameters of moe_jax, and back.

A linear map is `[out, in]` in the files and `[in, out]` here. Layers, and in most files experts, are separate tensors
there and leading axes here. A rule is (tensor, parameters here, layout). The layout lists, for each parameter, the rows
of the tensor that belong to it, in order, so one rule serves both directions. A tensor or parameter without a rule is
an error.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.errors import FormatError

Rule = tuple[str, str, str]  # tensor's name below its layer, our parameters below the stack (by commas), layout

TABLES: tuple[Rule, ...] = (
    ("model.embed_tokens.weight", "embed", "same"),
    ("model.norm.weight", "final_norm", "same"),
)
HEAD: tuple[Rule, ...] = (("lm_head.weight", "head", "same"),)
NORMS: tuple[Rule, ...] = (
    ("input_layernorm.weight", "attention_norm", "same"),
    ("post_attention_layernorm.weight", "mlp_norm", "same"),
)
POST_NORMS: tuple[Rule, ...] = (  # with norm="post": of what a branch adds
    ("post_attention_layernorm.weight", "attention_norm", "same"),
    ("post_feedforward_layernorm.weight", "mlp_norm", "same"),
)
ATTENTION: tuple[Rule, ...] = (
    ("self_attn.q_proj.weight", "attention/w_q", "linear"),
    ("self_attn.k_proj.weight", "attention/w_k", "linear"),
    ("self_attn.v_proj.weight", "attention/w_v", "linear"),
    ("self_attn.o_proj.weight", "attention/w_o", "linear"),
)
QKV_BIAS: tuple[Rule, ...] = (
    ("self_attn.q_proj.bias", "attention/b_q", "same"),
    ("self_attn.k_proj.bias", "attention/b_k", "same"),
    ("self_attn.v_proj.bias", "attention/b_v", "same"),
)
QK_NORM: tuple[Rule, ...] = (
    ("self_attn.q_norm.weight", "attention/q_norm", "same"),
    ("self_attn.k_norm.weight", "attention/k_norm", "same"),
)
MLA: tuple[Rule, ...] = (
    ("self_attn.kv_a_proj_with_mqa.weight", "attention/w_kv_down,attention/w_k_rope", "latent_and_rope"),
    ("self_attn.kv_a_layernorm.weight", "attention/kv_norm", "same"),
    ("self_attn.kv_b_proj.weight", "attention/w_k_up,attention/w_v_up", "heads_of_k_and_v"),
    ("self_attn.o_proj.weight", "attention/w_o", "linear"),
)
MLA_Q: tuple[Rule, ...] = (("self_attn.q_proj.weight", "attention/w_q", "heads_with_rope"),)
MLA_Q_LATENT: tuple[Rule, ...] = (
    ("self_attn.q_a_proj.weight", "attention/w_q_down", "linear"),
    ("self_attn.q_a_layernorm.weight", "attention/q_norm", "same"),
    ("self_attn.q_b_proj.weight", "attention/w_q_up", "heads_with_rope"),
)
GLU = ("gate_proj", "up_proj", "down_proj")


def _glu(theirs: str, ours: str, names: tuple[str, str, str] = GLU) -> tuple[Rule, ...]:
    return tuple(
        (f"{theirs}.{name}.weight", f"{ours}/w_{kind}", "linear")
        for name, kind in zip(names, ("gate", "up", "down"), strict=True)
    )


DENSE = _glu("mlp", "mlp")
MOE = (("mlp.gate.weight", "moe/w_router", "linear"), *_glu("mlp.experts.{expert}", "moe"))
MIXTRAL = (
    ("block_sparse_moe.gate.weight", "moe/w_router", "linear"),
    *_glu("block_sparse_moe.experts.{expert}", "moe", ("w1", "w3", "w2")),
)
GRANITE: tuple[Rule, ...] = (  # the experts of a layer are one tensor, gate and up too
    ("block_sparse_moe.router.layer.weight", "moe/w_router", "linear"),
    ("block_sparse_moe.input_linear.weight", "moe/w_gate,moe/w_up", "halves"),
    ("block_sparse_moe.output_linear.weight", "moe/w_down", "linear"),
)
ROUTED = {"MixtralForCausalLM": MIXTRAL, "GraniteMoeForCausalLM": GRANITE}  # others: MOE
SHARED = _glu("mlp.shared_experts", "moe/shared")
GATED = (
    *_glu("mlp.shared_expert", "moe/shared"),
    ("mlp.shared_expert_gate.weight", "moe/w_shared_gate", "linear"),
)
BIAS: tuple[Rule, ...] = (("mlp.gate.e_score_correction_bias", "moe/router_bias", "same"),)
# Of a layer of multi-token prediction, beside those of its block. Their tensors are those of one more layer.
PREDICTS = ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM")  # architectures that have such layers
PREDICTION: tuple[Rule, ...] = (
    ("enorm.weight", "embed_norm", "same"),
    ("hnorm.weight", "hidden_norm", "same"),
    ("eh_proj.weight", "w_join", "linear"),
    ("shared_head.norm.weight", "final_norm", "same"),
)

GGUF_TABLES: tuple[Rule, ...] = (("token_embd.weight", "embed", "same"), ("output_norm.weight", "final_norm", "same"))
GGUF_HEAD: tuple[Rule, ...] = (("output.weight", "head", "same"),)
GGUF_LAYER: tuple[Rule, ...] = (
    ("attn_norm.weight", "attention_norm", "same"),
    ("ffn_norm.weight", "mlp_norm", "same"),
    ("attn_v.weight", "attention/w_v", "linear"),
    ("attn_output.weight", "attention/w_o", "linear"),
)
GGUF_QK_NORM: tuple[Rule, ...] = (
    ("attn_q_norm.weight", "attention/q_norm", "same"),
    ("attn_k_norm.weight", "attention/k_norm", "same"),
)
GGUF_DENSE: tuple[Rule, ...] = (
    ("ffn_gate.weight", "mlp/w_gate", "linear"),
    ("ffn_up.weight", "mlp/w_up", "linear"),
    ("ffn_down.weight", "mlp/w_down", "linear"),
)
GGUF_MOE: tuple[Rule, ...] = (  # the experts of a layer are one tensor
    ("ffn_gate_inp.weight", "moe/w_router", "linear"),
    ("ffn_gate_exps.weight", "moe/w_gate", "linear"),
    ("ffn_up_exps.weight", "moe/w_up", "linear"),
    ("ffn_down_exps.weight", "moe/w_down", "linear"),
)
GGUF = "gguf:"  # before the architecture, in the name of a table


def rules(name: str, cfg: ModelConfig) -> tuple[tuple[Rule, ...], tuple[Rule, ...], str]:
    """The rules outside the layers, those of a layer, and the prefix of its names, for an architecture.

    name: of the architecture; with `GGUF` before it the rules are those of GGUF.
    """
    if name.startswith(GGUF):
        # llama.cpp stores queries and keys of Llama and Mixtral with RoPE's pairs side by side, of others as they are.
        layout = "pairs" if name in (f"{GGUF}LlamaForCausalLM", f"{GGUF}MixtralForCausalLM") else "linear"
        layer = GGUF_LAYER + tuple((f"attn_{x}.weight", f"attention/w_{x}", layout) for x in "qk")
        layer += (GGUF_QK_NORM if cfg.qk_norm else ()) + (GGUF_MOE if cfg.num_moe_layers else GGUF_DENSE)
        return (*GGUF_TABLES, *(() if cfg.tie_embeddings else GGUF_HEAD)), layer, "blk.{layer}."
    attention = ATTENTION + (QKV_BIAS if cfg.qkv_bias else ()) + (QK_NORM if cfg.qk_norm else ())
    if cfg.mla.kv_rank:
        attention = MLA + (MLA_Q_LATENT if cfg.mla.q_rank else MLA_Q)
    norms = POST_NORMS if cfg.norm == "post" else NORMS
    layer = norms + attention + (DENSE if cfg.num_moe_layers < cfg.num_layers else ())
    if cfg.num_moe_layers:
        layer += ROUTED.get(name, MOE)
        shared = GATED if cfg.moe.shared_gate == "sigmoid" else SHARED
        layer += (shared if cfg.moe.num_shared_experts else ()) + (BIAS if cfg.moe.selection_bias else ())
    return (*TABLES, *(() if cfg.tie_embeddings else HEAD)), layer, "model.layers.{layer}."


# --- layouts: (cfg, rows of the tensor) → rows of each parameter -----------------------------------------------------


def _apart(size: int) -> np.ndarray:
    """The order that moves RoPE's pairs from (0, 1), (2, 3), … to all first halves, then all second halves."""
    return np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])


def _of_heads(rows: int, size: int, of_head: np.ndarray) -> np.ndarray:
    return (np.arange(0, rows, size)[:, None] + of_head[None, :]).reshape(-1)


def _halves(rows: int) -> list[np.ndarray]:
    return [np.arange(rows // 2), np.arange(rows // 2, rows)]


def _heads_with_rope(cfg: ModelConfig, rows: int) -> list[np.ndarray]:
    plain = cfg.head_dim - cfg.mla.rope_dim
    return [_of_heads(rows, cfg.head_dim, np.concatenate([np.arange(plain), plain + _apart(cfg.mla.rope_dim)]))]


def _heads_of_k_and_v(cfg: ModelConfig, rows: int) -> list[np.ndarray]:
    plain, v = cfg.head_dim - cfg.mla.rope_dim, cfg.mla.v_dim
    return [_of_heads(rows, plain + v, part) for part in (np.arange(plain), plain + np.arange(v))]


LAYOUTS: dict[str, Callable[[ModelConfig, int], list[np.ndarray | None]]] = {
    "same": lambda cfg, rows: [None],  # not a linear map: nothing is transposed
    "linear": lambda cfg, rows: [None],
    "halves": lambda cfg, rows: _halves(rows),
    "pairs": lambda cfg, rows: [_of_heads(rows, cfg.head_dim, _apart(cfg.head_dim))],
    "heads_with_rope": _heads_with_rope,
    "latent_and_rope": lambda cfg, rows: [np.arange(cfg.mla.kv_rank), cfg.mla.kv_rank + _apart(cfg.mla.rope_dim)],
    "heads_of_k_and_v": _heads_of_k_and_v,
}


# --- every tensor ----------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """The part of a parameter that rows of a tensor belong to."""

    path: str  # path of the parameter: `layers/moe/w_gate`
    index: tuple[int, ...]  # index into its leading axes: layer, expert
    rows: np.ndarray | None  # rows of the tensor; None: all


class Tensor(NamedTuple):
    """A tensor of a file, and the parameters that its rows belong to."""

    name: str
    shape: tuple[int, ...]
    transposed: bool
    targets: tuple[Target, ...]

    def split(self, x: np.ndarray) -> Iterator[tuple[Target, np.ndarray]]:
        """Yields each target and its part of the tensor's numbers."""
        for target in self.targets:
            part = x if target.rows is None else np.take(x, target.rows, axis=-2)
            yield target, np.swapaxes(part, -1, -2) if self.transposed else part

    def join(self, parts: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
        """The tensor's numbers from the parts of its targets: the inverse of `split`."""
        out = np.empty(self.shape, dtype)
        for target, part in zip(self.targets, parts, strict=True):
            part = np.swapaxes(part, -1, -2) if self.transposed else part
            out[... if target.rows is None else (..., target.rows, slice(None))] = part.astype(dtype)
        return out


def tensors(name: str, cfg: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[Tensor]:
    """All tensors of an architecture, in its order. shapes: those of every parameter and router bias, by path.

    Raises FormatError for a parameter without a rule, for a rule without a parameter, and for one written twice.
    """
    outside, layer_rules, prefix = rules(name, cfg)
    found = [_tensor(cfg, rule, rule[0], "", (), shapes) for rule in outside]
    used = set()
    for k in range(cfg.mtp_layers):
        layer = prefix.format(layer=cfg.num_layers + k)
        found += [_tensor(cfg, rule, layer + rule[0], "mtp/", (k,), shapes) for rule in PREDICTION]
    for i, place in enumerate((*cfg.places, *cfg.mtp_places)):
        block = f"{place.path}/"
        for rule in layer_rules:
            if f"{block}{rule[1].split(',')[0]}" not in shapes:
                continue  # the other kind of layer
            used.add(rule)
            experts = range(place.kind.experts) if "{expert}" in rule[0] else (None,)
            for e in experts:
                index = (place.index,) if e is None else (place.index, e)
                full = (prefix + rule[0]).format(layer=i, expert=e)
                found.append(_tensor(cfg, rule, full, block, index, shapes))
    if unused := [rule for rule in layer_rules if rule not in used]:
        raise FormatError(f"the rule for {unused[0][0]} matches no parameter of this model; see moe_jax/hf/tables.py")
    _check_total(found, shapes)
    return found


def copies(cfg: ModelConfig) -> dict[str, str]:
    """The tensors of layers of multi-token prediction that are copies of others, and those: embedding and head."""
    head = TABLES[0][0] if cfg.tie_embeddings else HEAD[0][0]
    layers = [f"model.layers.{cfg.num_layers + k}" for k in range(cfg.mtp_layers)]
    return {f"{at}.embed_tokens.weight": TABLES[0][0] for at in layers} | {
        f"{at}.shared_head.head.weight": head for at in layers
    }


def _tensor(cfg, rule: Rule, name: str, block: str, index: tuple[int, ...], shapes) -> Tensor:
    paths = [block + path for path in rule[1].split(",")]
    if missing := next((path for path in paths if path not in shapes), None):
        raise FormatError(f"the rule for {name} is for {missing}, which is not in this model; see moe_jax/hf/tables.py")
    tails = [shapes[path][len(index) :] for path in paths]
    transposed = rule[2] != "same"
    # What precedes the two axes of a matrix is the experts, where a tensor has those of a layer together.
    shape = (*tails[0][:-2], sum(tail[-1] for tail in tails), tails[0][-2]) if transposed else tails[0]
    rows = LAYOUTS[rule[2]](cfg, shape[-2] if transposed else shape[0])
    targets = tuple(Target(path, index, r) for path, r in zip(paths, rows, strict=True))
    return Tensor(name, shape, transposed, targets)


def _check_total(found: list[Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    places = [(target.path, target.index) for tensor in found for target in tensor.targets]
    if len(places) != len(set(places)) or len(found) != len({tensor.name for tensor in found}):
        raise FormatError("two rules of moe_jax/hf/tables.py are for the same tensor or parameter")
    for path, shape in shapes.items():
        indices = [index for p, index in places if p == path]
        depth = len(indices[0]) if indices else 0
        if len(indices) != int(np.prod(shape[:depth])) or not indices:
            raise FormatError(f"no rule covers all of the parameter {path}; see moe_jax/hf/tables.py")
