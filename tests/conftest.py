"""Every test runs on 8 virtual CPU devices with strict shapes. Tests compile far more than they compute."""

import gc
import os
import tempfile

import jax

from moe_jax import startup

flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
flags.append("--xla_cpu_parallel_codegen_split_count=1")  # both cores have a test of their own
if jax.__version_info__ < (0, 11):  # the XLA of jax 0.12 has no such flag
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)

gc.set_threshold(50_000, 20, 50)  # tracing makes many objects, most of which stay
jax.config.update("jax_platforms", "cpu")
startup.keep_freed_memory()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A program is compiled once for all tests and workers. The first process makes the folder, before it starts workers.
COMPILED = "MOE_JAX_TESTS_COMPILED"
if not os.environ.get(COMPILED):
    folder = tempfile.TemporaryDirectory(prefix="moe_jax_tests_", ignore_cleanup_errors=True)
    os.environ[COMPILED] = folder.name
jax.config.update("jax_compilation_cache_dir", os.environ[COMPILED])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_compilation_cache_include_metadata_in_key", True)  # tests read the names of operations
jax.config.update("jax_traceback_in_locations_limit", 0)  # whoever calls a program, it is the same one

# Files with tests that take longest, fast ones and slow ones: the end of a run waits for no test that began late.
LONGEST = (
    "test_notebooks.py", "test_lora_run.py", "test_upcycling_experiment.py", "test_survival_runs.py",
    "test_systems_files.py", "test_systems.py", "test_systems_mixed.py", "test_train.py", "test_compile_only.py",
    "test_muon_mesh.py", "test_invariance.py", "test_golden.py", "test_resume.py", "test_stacks.py", "test_hf_gguf.py",
    "test_hf_gguf_export.py", "test_distillation.py", "test_labels.py", "test_labels_texts.py", "test_pools.py",
    "test_lora.py", "test_prediction.py", "test_windows.py", "test_routers_models.py", "test_routers.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Puts the files of the longest tests first, and leaves the order within a file."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_collection_finish():
    """Frees what collecting left behind. What stays is never looked at again: the tests, and all that they import."""
    gc.collect()
    gc.freeze()
