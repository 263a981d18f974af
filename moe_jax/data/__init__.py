"""Text in, batches out: sources (TFDS, local files), tokenizers, packed rows, one Grain pipeline."""

from moe_jax.data import record
from moe_jax.data.corpus import TokenStore
from moe_jax.data.packing import WholeRows
from moe_jax.data.pipeline import Corpus, Rows, TrainIterator, prepare
from moe_jax.data.rows import PackedRows
from moe_jax.data.sources import cache_folder, check_sources
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.data.tokenizers import load as load_tokenizer

__all__ = [
    "Corpus",
    "PackedRows",
    "Rows",
    "TokenStore",
    "Tokenizer",
    "TrainIterator",
    "WholeRows",
    "cache_folder",
    "check_sources",
    "load_tokenizer",
    "prepare",
    "record",
]
