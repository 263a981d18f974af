"""Imports and exports Hugging Face models, configurations and weights, from one table per architecture.

python -m moe_jax.hf import --from DIR --workdir runs/a          python -m moe_jax.hf export --workdir runs/a --to DIR
"""

from moe_jax.hf.convert import export_run, import_model, read_model
from moe_jax.hf.gguf_export import export_gguf

__all__ = ["export_gguf", "export_run", "import_model", "read_model"]
