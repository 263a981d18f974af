"""Text and images as tokens in one small model: a plain mixture, and with labels the base of others.

    python train.py --config=configs/modalities.py:data/domains,data/images --workdir=runs/modalities

Hardware: one H200 (not measured yet)
Time: not measured yet
Parameters: 117,581,312 total, 29,500,928 active (21,112,320 without embedding and head)
Expect: not measured yet

The part after the colon is the folder of text of configs/balance_scope.py and the folder that
`python -m experiments.image_tokens` makes, whose tokenizer is for both. After a further comma, `labels` gives tokens of
images the label 1 and those of text the label 0, for models that need them (docs/labels.md). Images are read at most
4.5 times, and have at most half of the tokens. `python -m experiments.modalities` compares models on this data.
"""

import json
import math
from pathlib import Path

from configs import balance_scope
from moe_jax import config as config_lib
from moe_jax.errors import ConfigError

STEPS, BATCH, SEQ_LEN = 600, 256, 512
MAX_EPOCHS = 4.5  # of the images
MAX_SHARE = 0.5  # of the tokens that are of images
DOMAIN = "images"


def get_config(data: str = "data/domains,data/images"):
    text, *rest = data.split(",")
    if not rest or rest[1:] not in ([], ["labels"]):
        hint = "for example data/domains,data/images or data/domains,data/images,labels"
        raise ConfigError("data.sources", data, "must be a folder of text and a folder of images", hint)
    images = Path(rest[0]).expanduser()
    try:
        tokens = json.loads((images / "sources.json").read_text(encoding="utf-8"))["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        rule, hint = "is not a folder of image tokens", f"`python -m experiments.image_tokens {images}` makes it"
        raise ConfigError("data.sources", str(images), rule, hint) from None

    config = balance_scope.get_config(text)
    total = STEPS * BATCH * SEQ_LEN
    share = min(MAX_SHARE, MAX_EPOCHS * tokens / total)
    sources = balance_scope.sources(Path(text).expanduser(), (1 - share) * total)
    if DOMAIN in sources:
        raise ConfigError("data.sources", text, f"has a domain of text named {DOMAIN!r}", "rename it")
    weights = math.fsum(source.weight for source in sources.values())
    # Held-out images are a source that is never trained on, since all drawings of a character lie on one side.
    of = lambda file: {"kind": "files", "path": str(images / file), "domain": DOMAIN}
    sources["images"] = config_lib.source(
        **of("train.parquet"), weight=weights * share / (1 - share), validation_fraction=0.0
    )
    sources["images_held_out"] = config_lib.source(**of("held_out.parquet"), weight=0.0, validation_fraction=0.9)
    config.data.sources = sources
    config.data.tokenizer = config_lib.default_config().data.tokenizer
    config.data.tokenizer.kind = "huggingface"
    config.data.tokenizer.path = str(images / "tokenizer.json")
    if rest[1:]:
        config.data.labels = {DOMAIN: 1}

    config.train.steps = STEPS
    config.train.checkpoint_every = STEPS // 2
    config.train.eval_every = 50
    return config
