"""Fields of what moves in the router during training: noise, and the ramps of its sizes. Evaluation has none of it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_jax.config.fields import FIXED, Checked, number, require
from moe_jax.errors import ConfigError


@dataclass(frozen=True)
class RampConfig(Checked, resume=FIXED):
    """A number that goes from `start` in the first step to `end`, in `steps` steps, and stays there."""

    start: float = number(0.0, 0.0)  # value in the first step
    end: float = number(0.0, 0.0)  # value from step number `steps` on, counted from 0
    steps: int = number(0, 0)  # length of the ramp; 0: `end` from the first step on
    form: Literal["linear", "exponential"] = "linear"  # along a line, or by one factor in every step

    @property
    def moves(self) -> bool:
        """Whether the number changes during a run."""
        return self.steps > 0 and self.start != self.end

    def check(self):
        low = min(self.start, self.end)
        require(self.form == "linear" or low > 0, "form", self.form, "needs start > 0 and end > 0",
                "nearest valid: 'linear'")  # fmt: skip
        constant = self.start == self.end
        rule = f"has no effect with start = end = {self.end:g}"
        require(not (constant and self.steps), "steps", self.steps, rule, "nearest valid: 0")
        require(not constant or self.form == "linear", "form", self.form, rule, "nearest valid: 'linear'")
        rule = "has no effect with steps=0"
        require(self.steps > 0 or self.start == self.end, "start", self.start, rule, f"nearest valid: {self.end}")


@dataclass(frozen=True)
class ExploreConfig(Checked, resume=FIXED):
    """Settings of the router for training only (docs/routing.md). Noise is drawn for each token, step and layer."""

    # Share of noise that is mixed into router logits, with their own mean and deviation: Ling's warm-up of routing from
    # 1 to 0.
    random: RampConfig = field(default_factory=lambda: RampConfig(0.0, 0.0))
    noise: float = number(0.0, 0.0)  # factor of Gumbel noise that is added to logits for the selection; EvoMoE: 1
    # A token's first expert always computes; its other experts compute only if their score is above this number. 0: all
    # compute.
    threshold: float = number(0.0, 0.0, 1.0)
    # Divisor of the logits whose scores the threshold sees.
    temperature: RampConfig = field(default_factory=lambda: RampConfig(1.0, 1.0))
    top_k: int = number(0, 0)  # experts that a token chooses in training; 0: model.moe.top_k

    def check(self):
        for name, high in (("random", 1.0), ("temperature", float("inf"))):
            low, one = (0.0, getattr(self, name)) if name == "random" else (1e-3, getattr(self, name))
            for end in ("start", "end"):
                value = getattr(one, end)
                rule = f"must be in [{low:g}, {high:g}]" if high < 2 else f"must be ≥ {low:g}"
                hint = f"nearest valid: {min(max(value, low), high):g}"
                require(low <= value <= high, f"{name}.{end}", value, rule, hint)
        constant = self.temperature == RampConfig(1.0, 1.0)
        require(self.threshold > 0 or constant, "temperature", self.temperature, "needs threshold > 0",
                "nearest valid: start=1.0, end=1.0, steps=0")  # fmt: skip

    @property
    def moves(self) -> bool:
        """Whether routing in training differs from that of the model."""
        return bool(self.noise or self.threshold) or max(self.random.start, self.random.end) > 0


def check_routing(cfg: Any) -> None:
    """Raises ConfigError for settings of `explore`, and of expert choice, that the rest of a run's config rules out."""
    moe, loss, explore, experts = cfg.model.moe, cfg.loss, cfg.explore, cfg.model.routed_counts
    for f in dataclasses.fields(explore):
        value, default = getattr(explore, f.name), getattr(ExploreConfig(), f.name)
        shown = value if isinstance(value, int | float) else "a ramp"
        require(experts or value == default, f"explore.{f.name}", shown, "needs layers whose router chooses experts",
                "nearest valid: the default")  # fmt: skip
    if explore.top_k:
        _check_top_k(cfg)
    several = max(explore.top_k, moe.top_k if not explore.top_k else 0) > 1
    require(several or not explore.threshold, "explore.threshold", explore.threshold,
            "has no effect on tokens that choose one expert", "nearest valid: 0.0")  # fmt: skip
    whole = not explore.threshold or moe.shard_groups == 1
    require(whole, "explore.threshold", explore.threshold, "is not available with model.moe.shard_groups > 1: a token "
            "would have fewer experts of some groups", "nearest valid: 0.0")  # fmt: skip
    if cfg.model.table_paths and not experts:
        rule = "reaches no router: tables choose"
        for name, coef in loss.load_balance_coefs.items():
            require(coef == 0, name, coef, rule, "nearest valid: 0.0")
        z = loss.router_z_coef if moe.combine == "one" else 0.0
        require(
            z == 0, "loss.router_z_coef", z, "reaches no router: tables choose, with weights of 1", "nearest valid: 0.0"
        )
    seen = loss.bias_update != "quantile" or explore == ExploreConfig()
    rule = "must be 'sign' or another with explore, whose noise its histograms do not see"
    require(seen, "loss.bias_update", loss.bias_update, rule, "nearest valid: 'sign'")
    if moe.choice == "token" or not experts:
        return
    rule = "is not available with model.moe.choice='expert', which makes loads equal"
    for name, coef in loss.load_balance_coefs.items():
        require(coef == 0, name, coef, rule, "nearest valid: 0.0")
    for name in ("top_k", "threshold"):
        value = getattr(explore, name)
        require(value == 0, f"explore.{name}", value, "is for the choices of tokens, not of experts",
                "nearest valid: 0")  # fmt: skip
    rule = "must be 0 with model.moe.choice='expert', which depends on later tokens"
    require(cfg.sample.tokens == 0, "sample.tokens", cfg.sample.tokens, rule, "nearest valid: 0")


def _check_top_k(cfg: Any) -> None:
    moe, k = cfg.model.moe, cfg.explore.top_k
    most = min(cfg.model.routed_counts) + moe.identity_experts
    require(
        k <= most, "explore.top_k", k, f"must be ≤ {most}, the choices that each router has", f"nearest valid: {most}"
    )
    require(not cfg.model.table_paths, "explore.top_k", k, "is not available with table blocks, whose tables name "
            f"top_k={moe.top_k} experts", "nearest valid: 0")  # fmt: skip
    try:
        _ = cfg.trained
    except ConfigError as error:
        raise ConfigError("explore.top_k", k, f"as {error.name} {error.rule}", "nearest valid: 0") from None
