"""Imports and exports Hugging Face models, configurations and weights, from one table per architecture.

python -m moe_jax.hf import --from DIR --workdir runs/a          python -m moe_jax.hf export --workdir runs/a --to DIR
"""

from moe_jax.hf.convert import export_run, import_model, read_model

__all__ = ["export_run", "import_model", "read_model"]
