"""The router losses of a one-block model in NumPy, float64: what `test_balance_exact.py` compares with.

Written from the papers (load balancing: arXiv:2501.11873), with loops over groups and micro-batches. Gradients are
complex-step derivatives, exact to rounding: no autodiff and no code of the product. Letters: B sequences of S tokens, E
experts.
"""

import numpy as np

EPS, THETA = 1e-6, 10_000.0


def _norm(x, scale):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * scale


def _rope(x, positions):
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] * THETA ** (-np.arange(half) / half)
    x1, x2 = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def _softmax(x):
    x = np.exp(x - x.real.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def router_logits(p: dict, tokens, positions, segments, head_dim: int):
    """[B, S, E] of the first block: embedding, causal attention inside segments, router."""
    b, s = tokens.shape
    x = p["embed"][tokens]
    h = _norm(x, p["layers/attention_norm"][0])
    heads = lambda name: (h @ p[f"layers/attention/{name}"][0]).reshape(b, s, -1, head_dim)
    q, k, v = _rope(heads("w_q"), positions), _rope(heads("w_k"), positions), heads("w_v")
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("bsnh,bznh->bnsz", q, k) / np.sqrt(head_dim)
    seen = np.tril(np.ones((s, s), bool))[None, None] & (segments[:, None, :, None] == segments[:, None, None, :])
    attention = _softmax(np.where(seen, scores, -1e9))
    x = x + np.einsum("bnsz,bznh->bsnh", attention, v).reshape(b, s, -1) @ p["layers/attention/w_o"][0]
    h = _norm(x, p["layers/mlp_norm"][0])
    return h @ p["layers/moe/w_router"][0]


def router_probabilities(*args):
    """[B, S, E]: the softmax of `router_logits`."""
    return _softmax(router_logits(*args))


def choices(probabilities, top_k: int):
    """[B, S, E], 1 where a token uses an expert."""
    out = np.zeros(probabilities.shape)
    np.put_along_axis(out, np.argsort(-probabilities.real, axis=-1, kind="stable")[..., :top_k], 1.0, -1)
    return out


def loss_of_scope(prob, chosen, counted, balance_batch: int):
    """Mean over groups of `balance_batch` consecutive sequences of E · Σ f · P; groups without tokens are left out."""
    top_k, experts = int(chosen.sum(-1).max()), prob.shape[-1]
    values = []
    for start in range(0, len(prob), balance_batch):
        mine = slice(start, start + balance_batch)
        live = counted[mine]
        if live.any():
            f = chosen[mine][live].mean(0) / top_k
            values.append(experts * (f @ prob[mine][live].mean(0)))
    return np.mean(values)


def in_groups(x, over: int):
    """[B, S, over]: probabilities or choices summed over groups of neighbouring experts."""
    return np.stack([part.sum(-1) for part in np.split(x, over, axis=-1)], axis=-1)


def router_z(logits, counted):
    """Mean over counted tokens of logsumexp²."""
    top = logits.real.max(-1)
    return np.mean((np.log(np.exp(logits - top[..., None]).sum(-1)) + top)[counted] ** 2)


def mutual_information(prob, counted, balance_batch: int):
    """−Σ P log(P / (P_G P_E)) over groups of sequences and experts; a group without tokens adds nothing."""
    starts = range(0, len(prob), balance_batch)
    return _minus_information([prob[s : s + balance_batch][counted[s : s + balance_batch]].sum(0) for s in starts])


def label_information(prob, counted, label):
    """The same over labels of tokens and experts."""
    return _minus_information([prob[counted & (label == m)].sum(0) for m in range(label.max() + 1)])


def _minus_information(sums):
    joint, value = np.array(sums) / sum(row.sum() for row in sums), 0.0
    for row in joint:
        for p, column in zip(row, joint.sum(0), strict=True):
            value -= p * np.log(p / (row.sum() * column)) if p.real > 0 else 0.0
    return value


def algorithm_1(prob, chosen, counted, micro_batches: int):
    """The paper's buffer: counts c start at zero and grow; every micro-batch pays E · Σ (c/Σc) · (its own mean P)."""
    experts, c, values = prob.shape[-1], np.zeros(prob.shape[-1]), []
    for g in range(micro_batches):
        mine = slice(g, None, micro_batches)  # sequence i is in micro-batch i mod A
        live = counted[mine]
        c = c + chosen[mine][live].sum(0)
        values.append(experts * ((c / c.sum()) @ prob[mine][live].mean(0)))
    return np.mean(values)


def gradients(loss, params: dict) -> dict:
    """d loss / d every entry, by complex steps: Im loss(θ + ih)/h has no difference to cancel."""
    out = {}
    for name, value in params.items():
        grad = np.zeros(value.shape)
        for i in np.ndindex(value.shape):
            moved = value.astype(complex)
            moved[i] += 1e-30j
            grad[i] = loss({**params, name: moved}).imag / 1e-30
        out[name] = grad
    return out
