"""Chooses what to train on: mixtures of sources, scaling laws, and what a tokenizer was trained on.

    python -m moe_jax.mixtures sample --prior=law:0.3,code:0.5,prose:0.2 --count=64 --out=mix.jsonl
    python -m experiments.mixtures --mixtures=mix.jsonl --data=FOLDER --out=runs/mix            trains one run each
    python -m moe_jax.mixtures fit --runs=runs/mix --target=law --out=runs/mix/fit
    python -m moe_jax.mixtures propose --fit=runs/mix/fit/fit.json                              the best mixture
    python -m moe_jax.mixtures propose --fit=FIT --around --count=32 --out=next.jsonl           a round around it
    python -m moe_jax.mixtures propose --fit=FIT --acquire --costs=0.06,1                       the run to do next
    python -m moe_jax.mixtures law --form=chinchilla --data=points.csv --out=law
    python -m moe_jax.mixtures infer --merges=tokenizer.json --text=en:en.txt,de:de/*.txt
    python -m moe_jax.mixtures cluster --data='text/*.jsonl' --count=20 --out=data/clusters

docs/mixtures.md explains the commands, their files and the systems of the literature that they come from.
"""

import glob
import json
import math
from pathlib import Path

from absl import flags

from moe_jax import cli
from moe_jax.errors import UserError, nearest
from moe_jax.evaluate import drawing
from moe_jax.mixtures import design
from moe_jax.run.log import write_text

# Which flags a command has. FIGURES and --seed belong to all that draw, or that are random.
COMMANDS = {
    "sample": ("prior", "count", "epochs", "tokens", "seed", "out"),
    "fit": ("runs", "surrogate", "target", "seed", "out", "figures"),
    "propose": ("fit", "around", "acquire", "count", "costs", "prior", "epochs", "tokens", "seed", "out"),
    "law": ("form", "data", "bootstrap", "tolerance", "seed", "out", "figures"),
    "infer": ("merges", "text", "first", "bytes", "out"),
    "cluster": ("data", "count", "fine", "embeddings", "seed", "out"),
}
AGAINST = {"chinchilla": "params", "upcycling": "tokens", "inference": "params", "cmr": "ratio", "mnmt": "params",
           "efficient-lm": "compute"}  # column against which a law is drawn  # fmt: skip

OUT = cli.define_path("out", None, "sample, propose: file of mixtures to write; infer: JSON file; others: folder")
SEED = flags.DEFINE_integer("seed", 0, "seed of all that is random", 0, 2**32 - 1)
COUNT = flags.DEFINE_integer("count", None, "sample: mixtures, default 64; propose --around: mixtures, default 32; "
                             "cluster: clusters, default 20", 1, 100_000)  # fmt: skip
FIGURES = flags.DEFINE_list("figures", ["png"], drawing.HELP)
PRIOR = flags.DEFINE_string("prior", None, "tokens of each source, or shares: a:3e9,b:1e9, or a JSON object in "
                            "a .json file; propose: by default the mean of the runs, without bounds")  # fmt: skip
EPOCHS = flags.DEFINE_float("epochs", 15.0, "how often a source may be read at most")
TOKENS = flags.DEFINE_float("tokens", None, "tokens of a training, for --epochs; default: as many as the prior has")
RUNS = cli.define_paths("runs", None, "fit: folders of run directories, or results.json of experiments.mixtures")
SURROGATE = flags.DEFINE_string("surrogate", "ridge", "fit: what predicts a mixture's loss: ridge, lightgbm or gp")
TARGET = flags.DEFINE_list("target", None, "fit: domains whose mean held-out loss counts; default: all")
FIT = cli.define_path("fit", None, "propose: fit.json")
AROUND = flags.DEFINE_bool("around", False, "propose: a round of mixtures around the best")
ACQUIRE = flags.DEFINE_bool("acquire", False, "propose: the mixture and cost that tell most of the best for their cost")
COSTS = flags.DEFINE_list("costs", None, "propose --acquire: relative cost of each level of the runs, the least first; "
                          "default: their FLOPs")  # fmt: skip
FORM = flags.DEFINE_string("form", "chinchilla", f"law: {', '.join(AGAINST)}; docs/mixtures.md has their columns")
DATA = cli.define_path("data", None, "law: CSV file of points; cluster: path or glob of documents")
BOOTSTRAP = flags.DEFINE_integer("bootstrap", 200, "law: refits for the intervals; 0: no intervals", 0, 100_000)
TOLERANCE = flags.DEFINE_float("tolerance", 0.05, "law --form=cmr: rise of the general loss that is allowed, in nats")
MERGES = cli.define_path("merges", None, "infer: tokenizer.json of a BPE tokenizer")
TEXT = flags.DEFINE_list("text", None, "infer: NAME:PATH for each domain; a path or glob of files")
FIRST = flags.DEFINE_integer("first", 3000, "infer: merges that are used, from the first on", 2, 10**6)
BYTES = flags.DEFINE_integer("bytes", 10_000_000, "infer: bytes of each domain's text that are counted, at most", 1)
FINE = flags.DEFINE_integer("fine", None, "cluster: small clusters before merging; default: 10 a cluster", 2, 10**6)
EMBEDDINGS = cli.define_path("embeddings", None, "cluster: NumPy file [documents, numbers]; default: TF-IDF")


def needed(flag: flags.FlagHolder, example: str):
    """The value of a flag that its command needs. Raises UserError without one."""
    if not flag.value:
        raise UserError(f"--{flag.name} is needed, for example --{flag.name}={example}")
    return flag.value


def prior_text() -> str:
    """The value of --prior, with the home folder in the path of a file."""
    text = PRIOR.value or ""
    return str(cli.expanded(text)) if text.endswith(".json") else text


def given_prior() -> design.Prior:
    example = "law:0.3,code:0.7"
    needed(PRIOR, example)
    return design.make_prior(design.numbers(prior_text(), "--prior", example), EPOCHS.value, TOKENS.value)


def files_of(pattern: str) -> list[str]:
    """A path or glob with the files that it stands for."""
    return [pattern, *glob.glob(pattern, recursive=True)]


def check_file(example: str, *inputs: str | None) -> None:
    """Raises UserError unless --out, if it is named, can become a file that is none of the inputs."""
    if not OUT.value:
        return
    path = Path(OUT.value)
    cli.check_writable(path.parent, "--out")
    if path.is_dir():
        raise UserError(f"--out={path}: is a folder; name a file, for example {path / example}")
    if any(one and Path(one).resolve() == path.resolve() for one in inputs):
        raise UserError(f"--out={path}: is an input, which it would overwrite; name another file")


def write_lines(mixtures: list[design.Mixture]) -> None:
    """Writes mixtures into --out, or prints them."""
    if not OUT.value:
        print(design.lines(mixtures), end="")
        return
    path = Path(OUT.value)
    write_text(path, design.lines(mixtures))
    print(
        f"written in {path}: {len(mixtures)} mixture{'s' * (len(mixtures) > 1)} of {len(mixtures[0].weights)} sources"
    )


def show(weights: dict[str, float]) -> str:
    """Shares as one line, the largest first."""
    largest = sorted(weights.items(), key=lambda pair: -pair[1])
    return "  ".join(f"{name} {share:.3f}" for name, share in largest)


# --- commands --------------------------------------------------------------------------------------------------------


def run_sample() -> None:
    check_file("mix.jsonl", prior_text())
    write_lines(design.sample(given_prior(), COUNT.value or 64, SEED.value))


def run_fit() -> None:
    from moe_jax.mixtures import measured, surrogates  # what only one command needs is imported there

    needed(RUNS, "runs/mix")
    formats = drawing.check_formats(FIGURES.value)
    made = measured.make_fit(
        measured.read_runs([Path(p) for p in RUNS.value]), SURROGATE.value, TARGET.value, SEED.value
    )
    out = cli.check_writable(OUT.value or Path(RUNS.value[0]).parent / "fit", "--out")
    measured.check_earlier(out / "fit.json", made.target)
    at_last = [i for i, run in enumerate(made.runs) if run.cost == made.levels[-1]]
    losses = made.losses
    report: dict = {}
    print(f"{len(made.runs)} runs, {len(made.sources)} sources; target: {', '.join(made.target)}")
    if len(made.levels) == 1:
        from moe_jax.mixtures import drawings

        predicted = surrogates.left_out(made.surrogate, made.weights, losses, made.seed)
        rank = surrogates.spearman(predicted, losses)
        error = float(((predicted - losses) ** 2).mean() ** 0.5)
        report = {"left_out": {"spearman": measured.finite_or_none(rank), "rmse": error}}
        print(f"predicted from the other runs: rank correlation {rank:.3f}, root mean square error {error:.4f} nats")
        title = f"{made.surrogate}: rank correlation {rank:.3f}, runs left out"
        drawing.save(
            drawings.predictions(losses, predicted, [run.name for run in made.runs], title), out / "fit", formats
        )
    else:
        print(f"runs of {len(made.levels)} costs, {len(at_last)} of them at the largest; propose --acquire uses them")
    best = min(at_last, key=lambda i: losses[i])
    print(f"best run: {made.runs[best].name}, {losses[best]:.4f}: {show(made.runs[best].weights)}")
    write_text(out / "fit.json", measured.to_json(made, report))
    print(f"written in {out}: fit.json{', fit.' + ', fit.'.join(formats) if report else ''}")
    print(f"next: python -m moe_jax.mixtures propose --fit={out / 'fit.json'}")


def run_propose() -> None:
    from moe_jax.mixtures import measured, propose

    check_file("mix.jsonl", needed(FIT, "runs/mix/fit/fit.json"), prior_text())
    made = measured.read_fit(Path(FIT.value))
    if AROUND.value and ACQUIRE.value:
        raise UserError("--around and --acquire are two kinds of proposals; name one")
    for flag, other in ((COUNT, AROUND), (COSTS, ACQUIRE)):
        if flag.value is not None and not other.value:
            raise UserError(f"--{flag.name} has no effect on propose without --{other.name}")
    if flags.FLAGS["seed"].present:
        made = made._replace(seed=SEED.value)
    prior = propose.prior_of(made)
    if PRIOR.value:
        prior = given_prior()
        if other := sorted(set(prior.names) ^ set(made.sources)):
            raise UserError(f"--prior: source {other[0]!r} is not in both the prior and the fit; "
                            f"{nearest(other[0], set(prior.names) & set(made.sources))}")  # fmt: skip
        order = [prior.names.index(name) for name in made.sources]
        prior = design.Prior(made.sources, prior.shares[order], prior.most[order])
    elif flags.FLAGS["epochs"].present or TOKENS.value is not None:
        raise UserError("--epochs and --tokens need --prior, which says how much there is of each source")
    if ACQUIRE.value:
        costs = None
        if COSTS.value is not None:
            costs = [design.as_number(text) for text in COSTS.value]
            if not costs or any(cost is None or cost <= 0 for cost in costs) or costs != sorted(costs):
                raise UserError(
                    f"--costs={','.join(COSTS.value)}: must be numbers > 0, the least first, such as 0.06,1"
                )
        found = propose.acquire(made, prior, costs)
        print(f"next run: cost {found.level + 1} of {len(made.levels)} ({made.levels[found.level]:.3g} FLOPs); "
              f"expected information on the best loss: {found.gain / math.log(2):.3g} bits; predicted loss at the "
              f"largest cost: {found.predicted:.4f}")  # fmt: skip
        write_lines(design.named(made.sources, found.weights[None], measured.first_free(made.runs, "next"), "next"))
        return
    found = propose.around(made, prior, COUNT.value or 32) if AROUND.value else propose.best(made, prior)
    print(f"predicted loss: {found.predicted.min():.4f}; the best of the measured mixtures: {found.known:.4f}")
    print(show(dict(zip(made.sources, found.weights[0], strict=True))))
    word = "mix" if AROUND.value else "best"
    write_lines(design.named(made.sources, found.weights, measured.first_free(made.runs, word), word))


def run_law() -> None:
    if FORM.value not in AGAINST:
        raise UserError(f"--form={FORM.value}: is not one; {nearest(FORM.value, AGAINST)}")
    from moe_jax.mixtures import drawings, forms, laws

    path = Path(needed(DATA, "points.csv"))
    formats = drawing.check_formats(FIGURES.value)
    if not 0 < TOLERANCE.value < float("inf"):
        raise UserError(f"--tolerance={TOLERANCE.value:g}: must be > 0, nearest valid: 0.05")
    if flags.FLAGS["tolerance"].present and FORM.value != "cmr":
        raise UserError(f"--tolerance has no effect on --form={FORM.value}; it is for --form=cmr")
    found = forms.FORMS[FORM.value](path, forms.Asked(BOOTSTRAP.value, SEED.value, TOLERANCE.value))
    out = cli.check_writable(OUT.value or path.parent / f"law_{FORM.value}", "--out")
    write_text(out / "law.json", laws.as_json(found))
    cmr = FORM.value == "cmr"
    figure = drawings.critical(found, TOLERANCE.value) if cmr else drawings.law(found, AGAINST[FORM.value], FORM.value)
    drawing.save(figure, out / "law", formats)
    for one in found:
        print(f"{laws.table(one)}\n")
    if cmr and found[-1].problem.names != forms.CRITICAL:
        print("no law of critical ratios: it needs four numbers of tokens with a critical ratio between 0 and 1\n")
    print(f"written in {out}: law.json, {', '.join(f'law.{kind}' for kind in formats)}")


def run_infer() -> None:
    from moe_jax.mixtures import clusters, merges

    path = Path(needed(MERGES, "tokenizer.json"))
    named: dict[str, str] = {}
    for part in needed(TEXT, "en:en.txt,de:de.txt"):
        name, _, where = (text.strip() for text in part.partition(":"))
        if not name or not where or name in named:
            raise UserError(f"--text={part}: must be NAME:PATH, each name once")
        named[name] = str(cli.expanded(where))
    if len(named) < 2:
        raise UserError("--text: names one domain; a mixture has two or more")
    files = [file for where in named.values() for file in files_of(where)]
    check_file("shares.json", str(path), *files)
    pairs, split = merges.read_tokenizer(path)
    counted = {name: merges.count_words(clusters.texts(where, "--text"), split, BYTES.value)
               for name, where in named.items()}  # fmt: skip
    for name, (words, size) in counted.items():
        if not words:
            raise UserError(f"--text={name}:{named[name]}: holds no text")
        print(f"{name}: {size:,} bytes, {len(words):,} different words")
    words, sizes = zip(*counted.values(), strict=True)
    found = merges.infer(merges.replay(list(words), list(sizes), pairs[: FIRST.value]), list(named))
    print(f"{found.merges:,} merges used, {found.missing:,} left out, whose pairs no text has; slack {found.slack:.4g}")
    for name, share in sorted(found.shares.items(), key=lambda pair: -pair[1]):
        print(f"  {name:<20} {share:.3f} of the bytes")
    if found.missing > found.merges:
        print("warning: most of the merges are in none of the texts, which are not like the tokenizer's own")
    if found.loose:
        print(f"warning: the merges allow other shares as well, with more of {', '.join(found.loose)}")
    if OUT.value:
        write_text(OUT.value, json.dumps(found._asdict(), indent=1) + "\n")
        print(f"written in {OUT.value}")


def run_cluster() -> None:
    from moe_jax.mixtures import clusters

    path, count = needed(DATA, "text/*.jsonl"), COUNT.value or 20
    inputs = [*files_of(path), *([EMBEDDINGS.value] if EMBEDDINGS.value else [])]
    clusters.check_output(Path(needed(OUT, "data/clusters")), inputs)
    out = cli.check_writable(OUT.value, "--out")
    found = list(clusters.texts(path, "--data"))
    embeddings = clusters.read_embeddings(Path(EMBEDDINGS.value), len(found)) if EMBEDDINGS.value else None
    fine = FINE.value or max(count, min(10 * count, len(found) // 5))
    made = clusters.cluster(found, count, fine, SEED.value, embeddings)
    sizes = clusters.write(out, found, made)
    total = sum(sizes.values())
    for name, size in sizes.items():
        print(f"{name}  {size / total:6.1%}  {', '.join(made.words[int(name.removeprefix('cluster'))])}")
    print(f"written in {out}: {len(sizes)} files and prior.json, from {len(found):,} documents")
    print(f"next: python -m moe_jax.mixtures sample --prior={out / 'prior.json'} --out=mix.jsonl")


RUN = {"sample": run_sample, "fit": run_fit, "propose": run_propose, "law": run_law, "infer": run_infer,
       "cluster": run_cluster}  # fmt: skip


def main(argv):
    command = " ".join(argv[1:])
    if command not in COMMANDS:
        what = f"unknown command {command!r}; {nearest(command, COMMANDS)}" if command else "no command is named"
        raise UserError(f"{what}; there are {', '.join(COMMANDS)}")
    for name in sorted({name for names in COMMANDS.values() for name in names}):
        if flags.FLAGS[name].present and name not in COMMANDS[command]:
            others = [other for other, names in COMMANDS.items() if name in names]
            raise UserError(f"{command} takes no --{name}, which is an option of {', '.join(others)}")
    RUN[command]()


if __name__ == "__main__":
    cli.run(main)
