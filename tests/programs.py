"""Programs that tests start as users do share what they compile, as those of one user would."""

import os


def environment() -> dict[str, str]:
    """The variables that make JAX keep compiled programs where the next program of this worker finds them.

    Workers have a folder each: JAX does not write a file at once, and another worker could read half of it.
    """
    folder = f"{os.environ['MOE_JAX_TESTS_COMPILED']}/programs_{os.environ.get('PYTEST_XDIST_WORKER', '')}"
    return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
