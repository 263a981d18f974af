"""Continues training from the weights of a run directory (imported, upcycled or trained), with a fresh optimizer.

    python train.py --config=configs/continued.py:runs/moe --workdir=runs/moe_trained

Hardware: any that the model fits on; a laptop CPU for small ones
Time: depends on the model
Parameters: the run's
Expect: at the first step the loss that the run ended with, and then a lower one

The part after the colon is the run directory, and after a comma may come a folder of text as for
configs/balance_scope.py. Without one, the text is the standard library of the Python that runs this. Model, tokenizer
and sequence length are those of the run. The learning rate rises again before it falls, which arXiv:2410.07524 (§3.1)
found better than continuing at the lowest rate. The group of parameters `router` has the routers of the model:

    --config.optim.groups.router.lr=0.1          a lower learning rate of theirs
    --config.optim.groups.router.start=100       as they are for the first 100 updates
"""

import re
from pathlib import Path

from configs import balance_scope
from moe_jax import config as config_lib
from moe_jax import model
from moe_jax.data import tokenizers
from moe_jax.run import config_file
from moe_jax.tree import flatten

STEPS, BATCH, LONGEST = 300, 16, 512
ROUTER = "/moe/(w_router$|router/)"


def get_config(where: str = "runs/moe"):
    run, _, folder = where.partition(",")
    loaded = config_file.load_config(run)
    earlier = config_lib.to_dict(loaded) | {"model": config_lib.to_dict(loaded.model.base)}  # adapters are merged
    config = config_lib.default_config()
    config.init_from = run
    config.model.update(earlier["model"])

    made = loaded.model
    experts_choose = bool(made.routed_counts) and made.moe.choice == "expert"
    tables_choose = bool(made.table_paths) and not made.routed_counts
    # What the model rules out is refused.
    config.loss.load_balance_coef = 0.0 if experts_choose or tables_choose else 0.01
    if tables_choose and made.moe.combine == "one":
        config.loss.router_z_coef = 0.0
    if experts_choose:
        config.sample.tokens = 0
    config.loss.balance_batch = "global"

    config.optim.name = "adamw"
    config.optim.lr = 1e-4
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 10
    config.optim.final_lr_fraction = 0.1
    paths = flatten(model.abstract(config_lib.build_model(config.model.to_dict())).shapes)
    if any(re.search(ROUTER, path) for path in paths):  # a group that matches nothing is refused
        config.optim.groups = {"router": config_lib.parameter_group(match=ROUTER)}

    if loaded.model.labels:  # of domains of that name; other text has the label 0
        config.data.labels = earlier["data"]["labels"]
        config.sample.label = earlier["sample"]["label"]
        if config.sample.label == -1:  # without one no text is written
            config.sample.tokens = 0
    config.data.batch_size = BATCH
    config.data.seq_len = min(earlier["data"]["seq_len"], LONGEST)
    config.data.tokenizer.update(earlier["data"]["tokenizer"])
    own = tokenizers.own_file(loaded.data.tokenizer, run)
    if own and not Path(config.data.tokenizer.path).expanduser().is_file():  # the run moved, or its source was deleted
        config.data.tokenizer.path = str(own)
    if folder:
        tokens = STEPS * BATCH * config.data.seq_len
        config.data.sources = balance_scope.sources(Path(folder).expanduser(), tokens)

    config.train.steps = STEPS
    return config
