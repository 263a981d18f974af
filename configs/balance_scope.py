"""A small MoE on a corpus of several domains, for comparing scopes of the load-balancing loss (arXiv:2501.11873).

    python train.py --config=configs/balance_scope.py:data/domains --workdir=runs/balance_scope

Hardware: one H200 (tried; it used all of its memory)
Time: 3:50 beside three runs on the other GPUs of the host, 3:05 of it training (630k tokens/s, 12 % MFU); 752k tokens/s
    in a later run beside one
Parameters: 117,581,312 total, 29,500,928 active (21,112,320 without embedding and head)
Expect: held-out perplexity 12.94 with seed 0, 12.89 and 13.06 with two others; docs/results.md has the comparison

The part after the colon is a folder with an entry for each domain: a file `<domain>.parquet` (or .txt, .jsonl, .csv),
or a subfolder of such files. `python -m experiments.multi_domain_text` makes one. Training takes 118M tokens.
`python -m experiments.balance_scope` trains this config with each scope and compares them. After a comma, `labels`
gives every domain a label and rewards mutual information of labels and experts, beside the other losses, and `routers`
also gives every label a router (docs/labels.md).
"""

import gzip
import math
from pathlib import Path

import pyarrow.parquet

from moe_jax import config as config_lib
from moe_jax.errors import ConfigError

STEPS, BATCH, SEQ_LEN = 900, 256, 512
EXTENSIONS = (".txt", ".jsonl", ".csv", ".parquet", ".gz")
BYTES_PER_TOKEN = 3.5  # an estimate, which only decides how often a small domain is repeated
MAX_EPOCHS = 7.0
HELD_OUT = 500_000  # bytes of each domain that are held out,
MAX_HELD_OUT = 0.25  # but at most this share of its documents


def text_bytes(path: Path) -> int:
    """Counts the bytes of a file's text, uncompressed."""
    if path.suffix == ".parquet":
        meta = pyarrow.parquet.read_metadata(path)
        return sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            return file.seek(0, 2)
    return path.stat().st_size


def find_domains(folder: Path) -> dict[str, tuple[str, int]]:
    """Finds the domains of a folder: {domain: (path or glob, bytes of text)}, sorted by name."""
    found = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        files = [entry] if entry.is_file() else sorted(entry.iterdir())
        size = sum(text_bytes(f) for f in files if f.suffix in EXTENSIONS)
        if size:
            name = entry.name.split(".")[0]
            if name in found:
                raise ConfigError("data.sources", str(folder), f"has domain {name!r} twice")
            found[name] = (str(entry) if entry.is_file() else f"{entry}/*", size)
    if not found:
        rule = f"holds no file of {' '.join(EXTENSIONS)}" if folder.is_dir() else "is not a folder"
        hint = "name one after the config file's colon; `python -m experiments.multi_domain_text FOLDER` makes it"
        raise ConfigError("data.sources", str(folder), rule, hint)
    return found


def mixture(sizes: dict[str, int], tokens: float) -> dict[str, float]:
    """Shares of training, proportional to √bytes. No domain is repeated more than `MAX_EPOCHS` times in `tokens`.

    They are written in a run's config, so totals are exactly rounded: `sum` of floats is another in Python 3.12.
    """
    largest = {name: MAX_EPOCHS * size / BYTES_PER_TOKEN / tokens for name, size in sizes.items()}
    if math.fsum(largest.values()) <= 1.0:  # too little text: all domains are repeated equally often
        return largest
    capped: dict[str, float] = {}
    while True:
        free = {name: math.sqrt(size) for name, size in sizes.items() if name not in capped}
        scale = (1.0 - math.fsum(capped.values())) / math.fsum(free.values())
        over = {name: largest[name] for name, root in free.items() if scale * root > largest[name]}
        if not over:
            return {name: capped.get(name, scale * free.get(name, 0.0)) for name in sizes}
        capped |= over


def sources(folder: Path, tokens: float) -> dict:
    """Makes a source for each domain of the folder, with weights for a training on `tokens` tokens."""
    domains = find_domains(folder)
    fractions = {name: min(MAX_HELD_OUT, HELD_OUT / size) for name, (_, size) in domains.items()}
    weights = mixture({name: round(size * (1 - fractions[name])) for name, (_, size) in domains.items()}, tokens)
    return {
        name: config_lib.source(
            kind="files", path=path, domain=name, weight=weights[name], validation_fraction=fractions[name]
        )
        for name, (path, _) in domains.items()
    }


def get_config(data: str = "data/domains"):
    folder, _, more = data.rpartition(",")
    if more not in ("labels", "routers"):
        folder, more = data, ""  # its name may have a comma
        if "," in data and not Path(data).expanduser().is_dir():
            rule, hint = "is no folder, and ends neither in ,labels nor in ,routers", "for example data/domains,labels"
            raise ConfigError("data.sources", data, rule, hint)
    config = config_lib.default_config()

    model = config.model
    model.vocab_size = 16_384
    model.d_model = 512
    model.num_layers = 8
    model.num_heads = 8
    model.num_kv_heads = 8
    model.head_dim = 64
    model.qk_norm = True
    model.tie_embeddings = True
    model.segment_mask = False  # allows flash attention; documents of a row are of one domain and attend to each other
    model.moe.num_experts = 32
    model.moe.top_k = 4
    model.moe.d_expert = 256

    # The paper's coefficient, added up over layers as Megatron does.
    config.loss.load_balance_coef = 0.008
    config.loss.router_loss_layers = "sum"
    config.loss.balance_batch = "global"
    config.loss.router_z_coef = 0.0001

    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.clip_norm = 1.0

    config.data.batch_size = BATCH
    config.data.seq_len = SEQ_LEN
    config.data.tokenizer.kind = "bpe"
    config.data.tokenizer.vocab_size = 16_384
    config.data.tokenizer.train_bytes = 40_000_000
    config.data.sources = sources(Path(folder).expanduser(), STEPS * BATCH * SEQ_LEN)
    if more:
        config.data.labels = {name: label for label, name in enumerate(config.data.sources)}
        config.loss.more = {"domains": config_lib.router_loss(kind="label_information", coef=0.008)}
    if more == "routers":
        model.moe.routers = len(config.data.sources)

    config.train.steps = STEPS
    config.train.checkpoint_every = STEPS // 2
    config.train.tensorboard = False
    return config
