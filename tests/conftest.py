"""Every test runs on 8 virtual CPU devices with strict shapes. Tests compile far more than they compute."""

import gc
import os

import jax

from moe_jax import startup

flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # the XLA of jax 0.12 has no such flag
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)

gc.set_threshold(50_000, 20, 50)  # tracing makes many objects, most of which stay
jax.config.update("jax_platforms", "cpu")
startup.keep_freed_memory()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
