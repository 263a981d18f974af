"""Kernels, each behind one interface, and a reference implementation beside every fast one."""

from moe_jax.kernels.grouped_matmul import choose_backend, grouped_matmul, grouped_matmuls

__all__ = ["choose_backend", "grouped_matmul", "grouped_matmuls"]
