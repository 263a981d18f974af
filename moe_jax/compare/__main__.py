"""Compares runs in tables and figures.

    python -m moe_jax.compare runs/a runs/b         two runs or more
    python -m moe_jax.compare runs/sweep            all runs inside a folder

Prints which settings differ, the losses at equal steps, tokens and time, benchmarks, balance and specialisation, and
writes them with figures to --out: comparison.md, comparison.json, loss.png and others. Losses at equal places are those
of the evaluations during training (config.train.eval_every).
"""

import json
import os
from pathlib import Path

from absl import flags

from moe_jax import cli
from moe_jax.compare import curves, runs, tables
from moe_jax.errors import UserError
from moe_jax.evaluate import drawing
from moe_jax.run import log

OUT = cli.define_path("out", None, "folder for tables and figures; default: comparison, beside the runs")
FIGURES = flags.DEFINE_list("figures", ["png"], drawing.HELP)


def main(argv):
    if not argv[1:]:
        raise UserError("no runs are named; for example python -m moe_jax.compare runs/a runs/b, or a folder of runs")
    formats = drawing.check_formats(FIGURES.value)
    paths = [str(cli.expanded(path)) for path in argv[1:]]
    folders = runs.find(paths)
    found = runs.read(folders)
    above = os.path.commonpath([os.path.dirname(os.path.realpath(folder)) for folder in folders])
    above = os.curdir if above == os.path.dirname(above) else os.path.relpath(above)  # nothing is written into /
    out = cli.check_writable(OUT.value or Path(above) / "comparison", "--out")

    made, remarks = tables.all_tables(found), list(tables.notes(found))
    if without := runs.left_out(paths):
        remarks.append(f"left out, with neither metrics.jsonl nor eval.json: {', '.join(map(str, without))}")
    drawn = []
    for name, figure in curves.all_figures(found):
        drawing.save(figure, out / name, formats)
        drawn.append(name)
    shown = [f"![{name}]({name}.{kind})" for kind in formats[:1] for name in drawn]  # a folder may have older figures
    text = [*(table.markdown() for table in made), "\n".join(f"- {line}" for line in remarks), *shown]
    log.write_text(out / "comparison.md", "\n\n".join(filter(None, text)) + "\n")
    log.write_text(out / "comparison.json", json.dumps(tables.as_json(found), indent=1, allow_nan=False) + "\n")

    for table in made:
        print(f"{table.text()}\n")
    for line in remarks:
        print(line)
    files = f"figures ({', '.join(formats)}): {', '.join(drawn) or 'none'}"
    print(f"written in {out}: comparison.md, comparison.json, {files}")


if __name__ == "__main__":
    cli.run(main)
