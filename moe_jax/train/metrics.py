"""Metrics: sums become named scalars; throughput and MFU. run/log.py writes and shows them.

Names of metrics are written in this file only. `train_metrics` makes one flat row of a step, on the host, from values
that `OneBehind` fetched while the device was computing the next step.

Letters: E experts of a layer, K experts per token.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np


class StepMetrics(NamedTuple):
    """The results of a train step: arrays on the device, numbers after `to_host`."""

    loss: Any
    grad_norm: Any
    terms: dict[str, Any] | None = None  # of the loss by name (`LossParts.scalars`), then those without coefficients
    lr: Any = 0.0
    tokens: Any = 0.0  # targets of this step: Σ weight
    router: Any = None  # dict[str, RouterStats], by block
    clipping: dict[str, Any] | None = None  # of QK-clip, where it is on: max_logit and clipped_heads
    seen: Any = None  # where answers alone are learned: tokens of this step, prompts included
    skipped: Any = None  # 1 if the step was skipped, else 0; in a row of the log the number of skipped steps so far


# --- sums → scalars --------------------------------------------------------------------------------------------------


def router_metrics(stats: Sequence[Any], identity_experts: int = 0, ahead: Sequence[Any] = ()) -> dict[str, float]:
    """Metrics of the router from the `RouterStats` of each layer with experts, from the first to the last (`by_depth`).

    Balance groups are summed. Loads are those of experts that compute something, without the last `identity_experts`
    columns. Scalars, then the same of each layer under `router/layer_03/…`:
        max_load: E · max_e f_e, where f_e is the expert's share of the assignments; 1 is perfect balance, E/K the
            worst. Scalar: the worst layer.
        load_cv: standard deviation over mean of the experts' loads; 0 is perfect balance. Scalar: mean over layers.
        dead_experts: how many experts got no token. Scalar: sum over layers.
        dropped: assignments lost to capacity over assignments, in [0, 1]. Scalar: over all layers.
        experts_per_token: assignments over tokens, from 0 to K. Scalar: mean over layers.
        identity_share: share of identity experts in all assignments; only with identity experts. Scalar: mean.
    For a layer that counted no token all but dead_experts are 0. Without MoE layers the result is empty.

    ahead: those of layers of multi-token prediction, which are in no scalar and come last, under `router/mtp_1/…`.
    """
    layers, sums = [], []
    for one in (*stats, *ahead):
        tokens, load, dropped = (
            np.asarray(x, np.float64).sum(0) for x in (one.tokens, one.tokens_per_expert, one.dropped)
        )
        chosen, load = load.sum(), load[: len(load) - identity_experts]
        made = max(load.sum(), 1e-9)
        share = {"identity_share": 1 - load.sum() / max(chosen, 1e-9)} if identity_experts else {}
        layers.append(
            {
                "max_load": len(load) * load.max() / made,
                "load_cv": load.std() / max(load.mean(), 1e-9),
                "dead_experts": (load == 0).sum(),
                "dropped": dropped / made,
                "experts_per_token": load.sum() / max(tokens, 1e-9),
                **share,
            }
        )
        sums.append((dropped, made))
    if not layers:
        return {}
    every = {name: np.array([layer[name] for layer in layers[: len(stats)]], np.float64) for name in layers[0]}
    dropped, made = np.sum(sums[: len(stats)], axis=0)
    out = {
        "max_load": float(every["max_load"].max()),
        "load_cv": float(every["load_cv"].mean()),
        "dead_experts": float(every["dead_experts"].sum()),
        "dropped": float(dropped / made),
        "experts_per_token": float(every["experts_per_token"].mean()),
    }
    if identity_experts:
        out["identity_share"] = float(every["identity_share"].mean())
    places = [f"layer_{i:02d}" for i in range(len(stats))] + [f"mtp_{k}" for k in range(1, len(ahead) + 1)]
    for place, layer in zip(places, layers, strict=True):
        out |= {f"router/{place}/{name}": float(value) for name, value in layer.items()}
    return out


def train_metrics(
    step: int,
    report: StepMetrics,
    *,
    router: dict[str, float],
    tokens: float,
    tokens_per_second: float,
    step_seconds: float,
    flops_per_token: float,
    peak: float,
) -> dict[str, float]:
    """One flat row of Python numbers, always in the same order; per-layer router values last.

    report: on the host. Its terms are xent, load_balance, router_z, <kind>/<name> of `loss.more`, distill and
        distill_hidden of a teacher, and mtp and mtp/<router loss> of multi-token prediction, which add up to the loss,
        and load_balance_raw, router_z_raw, <kind>_raw/<name>, distill_raw, distill_hidden_raw, mtp_raw/<layer> and
        mtp_raw/<router loss>, which are without coefficients.
    router: its `router_metrics`.
    tokens: counted since the start of training. tokens_per_second, step_seconds: from `Throughput`.
    flops_per_token: forward and backward, by formula. peak: FLOP/s of all devices together. mfu is the FLOP/s of the
        model divided by peak.
    """
    skipped = {} if report.skipped is None else {"skipped": report.skipped}
    named = {"loss": report.loss, **_ordered(report.terms), "grad_norm": report.grad_norm, "lr": report.lr}
    clipping = {name: report.clipping[name] for name in ("max_logit", "clipped_heads")} if report.clipping else {}
    row = {"step": int(step)} | {name: float(value) for name, value in (named | clipping | skipped).items()}
    row |= {
        "tokens": float(tokens),
        "tokens_per_second": float(tokens_per_second),
        "mfu": float(tokens_per_second) * flops_per_token / peak,
        "step_seconds": float(step_seconds),
    }
    return row | router


def _ordered(terms: dict[str, Any]) -> dict[str, Any]:
    """Terms of the loss in the order of the log. A jitted function returns them sorted by name."""
    first = ["xent", "load_balance", "router_z"]  # then other kinds of router losses, then all without coefficients

    def place(name: str) -> tuple[bool, int, str]:
        kind = name.split("/")[0]
        plain = kind.removesuffix("_raw")
        return kind != plain, first.index(plain) if plain in first else len(first), name

    return {name: terms[name] for name in sorted(terms, key=place)}


def eval_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """One flat row from `EvalResult.rows`: `xent`, `perplexity`, `bits_per_byte` over all domains, then by domain.

    The last of `rows` is all domains together. The names of a domain's metrics begin with the domain and a slash.
    """
    names = ("xent", "perplexity", "bits_per_byte")
    prefix = lambda row: f"{row['domain']}/" if row["domain"] else ""
    ordered = [rows[-1], *rows[:-1]]
    return {prefix(row) + name: float(row[name]) for row in ordered for name in names}


# --- time ------------------------------------------------------------------------------------------------------------


class Throughput:
    """Counts the tokens and seconds of the steps since the last reading. The rate is of all tokens, prompts included.

    The first step compiles, so the clock restarts when it ends. A reading before the second step gives the first step
    alone, compilation included.
    """

    def __init__(self, tokens: float = 0.0):
        self.tokens = float(tokens)  # since the start of training, earlier runs of a resumed training included
        self._start, self._steps, self._tokens, self._compiled = time.perf_counter(), 0, 0.0, False
        self._first = (0.0, 0.0)

    def add(self, tokens: float, seen: float | None = None) -> None:
        """Counts one more step. seen: its tokens with those of prompts; None: all tokens are targets."""
        self.tokens += float(tokens)
        tokens = tokens if seen is None else seen
        if not self._compiled:
            self._compiled, self._first = True, (float(tokens), time.perf_counter() - self._start)
            self._start = time.perf_counter()
        else:
            self._steps, self._tokens = self._steps + 1, self._tokens + float(tokens)

    def read(self) -> dict[str, float]:
        """Returns `tokens`, `tokens_per_second` and `step_seconds` for `train_metrics`, and starts a new window."""
        now = time.perf_counter()
        window = (self._tokens, now - self._start, self._steps) if self._steps else (*self._first, 1)
        tokens, seconds, steps = window
        self._start, self._steps, self._tokens = now, 0, 0.0
        rate = tokens / max(seconds, 1e-9)
        return {"tokens": self.tokens, "tokens_per_second": rate, "step_seconds": seconds / steps}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock inside this block: evaluation and saving are not training time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - began


# --- from the device -------------------------------------------------------------------------------------------------


def _to_host(path: tuple, leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if not leaf.is_fully_replicated:
        raise ValueError(f"metric {jax.tree_util.keystr(path)} is spread over processes; replicate it in the step")
    return leaf.addressable_data(0)


def to_host(aux: Any) -> Any:
    """Fetches a pytree of device arrays as numpy. Arrays shared with other processes must be replicated."""
    return jax.device_get(jax.tree_util.tree_map_with_path(_to_host, aux))


class OneBehind:
    """Reads a step's metrics while the next step computes, so that reading never leaves the device idle."""

    def __init__(self):
        self._waiting: tuple[int, Any] | None = None

    def push(self, step: int, aux: Any) -> tuple[int, Any] | None:
        """Takes the results of the step just dispatched. Returns the step before it, on the host (None at first)."""
        before, self._waiting = self.flush(), (step, aux)
        return before

    def flush(self) -> tuple[int, Any] | None:
        """Returns the step that is still waiting, on the host, or None."""
        waiting, self._waiting = self._waiting, None
        return waiting and (waiting[0], to_host(waiting[1]))
