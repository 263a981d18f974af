"""Trains, upcycles and explains Mixture-of-Experts language models in JAX.

The names below are imported when they are first used, so that `import moe_jax` takes no time.
"""

import importlib

_HOME = {
    "load": "evaluate.opened",
    "OpenedRun": "evaluate.opened",
    "MoELayer": "moe.alone",
    "load_balancing_loss": "moe.router_losses",
    "router_z": "moe.router_losses",
    "stats_of": "moe.stats",
    "muon": "optim.muon",
    "Matrices": "optim.spread",
    "make_mesh": "parallel.sharding",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
