"""Settings of a program before the first use of a device: a CPU keeps the memory it has freed."""

import ctypes
import importlib.util
import os
import sys

import jax

# Of glibc's <malloc.h>, with its own environment variables, which win.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next request, if JAX computes on the CPU. Returns whether it does.

    A step allocates all its buffers and frees them at its end. By default glibc gives large ones back to the system,
    and the next step touches fresh pages: for configs/quickstart.py 42,000 page faults a step. Of glibc's arenas only
    the first, that of the main thread, can hold blocks above 64 MB. So JAX computes in the thread that calls it. One
    arena for all threads would do too, but the compiler's threads and the tokenizer's would wait for each other. The
    process then keeps the most memory that it ever used. What the user has set in glibc's variables stays.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(map(os.environ.get, _VARIABLES))
    if sys.platform != "linux" or tuned or not _only_cpu():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    never, largest = -1, 2**31 - 1  # a number of bytes would be an int, and 2 GB of freed memory are soon exceeded
    # Versions before 2.35 refuse the first of these. Then nothing is changed.
    if not all(mallopt(*one) for one in ((_MMAP_THRESHOLD, largest), (_TRIM_THRESHOLD, never))):
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True


def _only_cpu() -> bool:
    """Whether JAX can choose no other platform. It starts no device: threads that have begun keep their arenas."""
    if chosen := jax.config.jax_platforms:
        return chosen == "cpu"
    return not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
