"""Memory that a CPU keeps: when glibc is told to, and that freed blocks are then used again."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe_jax import startup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc")
PATH = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
SIDE = 5120  # of a float32 matrix of 100 MB: more than an arena other than the first can hold in one block
# No block on its own; nothing given back, as of any other number 2 GB of freed memory would be.
KEPT = [(-3, 2**31 - 1), (-1, -1)]


@pytest.mark.parametrize(
    ("platforms", "plugin", "variables", "told"),
    [
        ("cpu", True, {}, True),
        (None, False, {}, True),
        (None, True, {}, False),  # a GPU may be there, and is not looked for
        ("cuda,cpu", False, {}, False),
        ("cpu", False, {"MALLOC_ARENA_MAX": "4"}, False),
        ("cpu", False, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000"}, False),
    ],
)
def test_only_a_cpu_keeps_memory_and_what_the_user_set_stays(monkeypatch, platforms, plugin, variables, told):
    calls = []
    library = type("Library", (), {"mallopt": staticmethod(lambda *call: calls.append(call) or 1)})
    monkeypatch.setattr(startup.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: plugin or None)
    monkeypatch.setattr(type(jax.config), "jax_platforms", platforms, raising=False)
    updates = []
    monkeypatch.setattr(type(jax.config), "update", lambda _, *change: updates.append(change))
    for name in (*startup._VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert startup.keep_freed_memory() == told and calls == (KEPT if told else [])
    assert updates == ([("jax_cpu_enable_async_dispatch", False)] if told else [])


def test_an_old_library_stays_as_it_is(monkeypatch):
    """Stops at the first refusal."""
    calls = []
    library = type("Library", (), {"mallopt": staticmethod(lambda *call: calls.append(call) or 0)})
    monkeypatch.setattr(startup.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(type(jax.config), "jax_platforms", "cpu", raising=False)
    for name in (*startup._VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert not startup.keep_freed_memory() and calls == KEPT[:1]


def touch() -> list[int]:
    """Returns the page faults of eight runs of a program with a large temporary matrix."""
    x, faults = jnp.ones(SIDE), []
    run = jax.jit(lambda x: jnp.outer(x, x) @ x).lower(x).compile()
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        jax.block_until_ready(run(x))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults


def test_freed_memory_is_used_again():
    """Counts in a new process: the device of this one may have begun before. A few runs may still take fresh pages."""
    code = "import test_startup as t; assert t.startup.keep_freed_memory(); print(*t.touch())"
    env = os.environ | {"PYTHONPATH": PATH, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    out = subprocess.check_output([sys.executable, "-c", code], env=env, encoding="utf-8")
    faults = sorted(map(int, out.split()))
    assert faults[3] < 0.1 * 4 * SIDE**2 // resource.getpagesize(), faults
