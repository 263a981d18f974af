"""Fine-tunes a run on answers: a file of questions and answers, or of chats.

    python train.py --config=configs/finetune.py:runs/base,answers.jsonl --workdir=runs/tuned

Hardware: any that the model fits on; a laptop CPU for small ones
Time: depends on the model
Parameters: the run's
Expect: the held-out loss of the answers falls, and is lowest after about two passes over them

The part after the colon is a run directory (trained, imported or upcycled), a comma, and a .jsonl, .csv or .parquet
file or a glob of such files. The fields of their rows decide what is learned: `KINDS` below has the usual ones, the
start of the run prints fields that are not read, and docs/finetuning.md says how to name others. Prompts are read, and
only answers are learned. A twentieth of the prompts is held out. Model, tokenizer and sequence length are those of the
run. Training makes about `EPOCHS` passes: the estimate takes every byte of the files for text, JSON and fields that are
not read included, so it makes more where they are many. With adapters instead of all weights, or with the routers as
they are:

    --config.model.lora.rank=16 --config.optim.lr=1e-3
    --config.optim.groups.router.freeze=True
"""

import glob
import itertools
from collections.abc import Collection, Iterable
from pathlib import Path

from configs import balance_scope, continued
from moe_jax import config as config_lib
from moe_jax.data import readers
from moe_jax.errors import ConfigError, FileError, nearest

EPOCHS, BATCH = 2, 16
LOOKED_AT = 1000  # rows of each file
KINDS = {  # fields of a row: fields of the config of a source
    ("messages",): {"messages_field": "messages"},
    ("question", "answer"): {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"},
    ("prompt", "completion"): {"prompt": "{prompt}", "completion": "{completion}"},
    ("instruction", "input", "output"): {"prompt": "{instruction}\n{input}\nAnswer:", "completion": " {output}"},
    ("instruction", "output"): {"prompt": "{instruction}\nAnswer:", "completion": " {output}"},
}


def find(path: str) -> list[Path]:
    """The files of a path or glob. Raises ConfigError if there is none with rows."""
    pattern = str(Path(path).expanduser())
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    files = [Path(name) for name in names]
    for file in files:
        if readers.extension(file) not in readers.EXTENSIONS[1:]:
            hint = nearest(readers.extension(file), readers.EXTENSIONS[1:])
            raise ConfigError("data.sources.answers.path", path, "is not a file whose rows have fields", hint)
    if not files:
        there = [entry.as_posix() for entry in Path(pattern).parent.glob("*") if entry.is_file()]
        raise ConfigError("data.sources.answers.path", path, "matches no file", nearest(pattern, there))
    return files


def fields_of(files: Iterable[Path]) -> list[str]:
    """The fields of the files' rows: of a header, or of the first `LOOKED_AT` rows of a file without one.

    One row without a field does not hide it: the row is refused, with its place, when the text is prepared.
    """
    found: dict[str, None] = {}
    for file in files:
        try:
            names, rows = readers.open_rows(file, ())
            looked_at = [] if names is not None else itertools.islice(rows, LOOKED_AT)
            found |= dict.fromkeys(names or ())
            for _, row in looked_at:
                found |= dict.fromkeys(name for name, value in row.items() if value is not None)
        except (OSError, EOFError, ValueError) as error:
            raise ConfigError("data.sources.answers.path", str(file), f"cannot be read: {error}") from None
    return list(found)


def kind_of(fields: Collection[str], path: str) -> dict[str, str]:
    """The kind with the most fields among those of the rows. Raises FileError if there is none, or more than one."""
    kinds = [wanted for wanted in KINDS if set(wanted) <= set(fields)]
    kinds = [wanted for wanted in kinds if not any(set(wanted) < set(other) for other in kinds)]
    if len(kinds) == 1:
        return KINDS[kinds[0]]
    what = "; ".join(", ".join(wanted) for wanted in kinds or KINDS)
    rule = "can be learned in more than one way" if kinds else "configs/finetune.py knows rows with"
    raise FileError(f"{path} has {', '.join(fields) or 'no row'}: {rule}: {what} (docs/finetuning.md: Answers only)")


def get_config(where: str = "runs/base,answers.jsonl"):
    run, comma, path = where.partition(",")
    if not comma:
        raise ConfigError("data.sources", where, "needs a file of answers after the run directory and a comma",
                          f"for example configs/finetune.py:{where},answers.jsonl")  # fmt: skip
    config = continued.get_config(run)
    files = find(path)
    kind = kind_of(fields_of(files), path)
    config.data.sources = {"answers": config_lib.source(kind="files", path=path, **kind)}
    config.data.batch_size = BATCH
    tokens = sum(balance_scope.text_bytes(file) for file in files) / balance_scope.BYTES_PER_TOKEN
    config.train.steps = max(10, round(EPOCHS * tokens / (BATCH * config.data.seq_len)))
    config.train.eval_every = config.train.steps // 10
    # A multiple, as `train.keep_best` needs.
    config.train.checkpoint_every = config.train.eval_every * max(1, 200 // config.train.eval_every)
    config.optim.lr = 1e-4
    config.optim.warmup_steps = min(10, config.train.steps // 10)
    return config
