"""A run opened from Python: what its model computes on texts. `moe_jax.load` opens it.

Texts are given one or many: a text gives one result, a list of texts a list of results. In place of a text, its token
ids are taken as they are. Letters: S tokens of a text, V rows of the output matrix, D model width, L layers with
experts, K slots of a token.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import config, hf, model
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.config.labels import check_label
from moe_jax.data import Tokenizer, tokenizers
from moe_jax.data.documents import as_text
from moe_jax.data.vocabularies import END_OF_TEXT
from moe_jax.errors import CheckpointError, ConfigError, UserError, nearest
from moe_jax.evaluate import loglikelihood, passes, switches
from moe_jax.evaluate.generate import continue_texts
from moe_jax.evaluate.switches import Switches
from moe_jax.parallel import sharding
from moe_jax.run import config_file, weights
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.train.state import abstract_weights

Text = str | Sequence[int]


class TextRouting(NamedTuple):
    """The routing of one text."""

    tokens: list[str]  # the part of the text that each token stands for
    ids: np.ndarray  # [S]
    layers: np.ndarray  # [L] number of each layer with experts among all layers, from 0
    experts: np.ndarray  # [L, S, K] expert ids, identity experts from E on; −1 in a slot that is not used
    weights: np.ndarray  # [L, S, K] combine weights; 0 in a slot that is not used


class OpenedRun:
    """A model with its weights on the devices of this process, and its tokenizer. `load` makes it.

    cfg: the run's configuration. model: that of the model as it is computed here. params, router_bias: nested dicts of
    arrays. tokenizer: None if the run has none, and then only token ids are taken. step: the checkpoint; None for a
    Hugging Face model. origin: the events that made the weights, in order. switches: experts that are off or on
    (`switched`); None for those of the run as it is. label: that of all texts (`labelled`); −1: none.
    """

    def __init__(
        self, cfg: RunConfig, computed: ModelConfig, mesh: Mesh, params: dict, router_bias: dict,
        tokenizer: Tokenizer | None, step: int | None, origin: list[dict],
    ):  # fmt: skip
        self.cfg, self.model, self.mesh, self.params, self.router_bias = cfg, computed, mesh, params, router_bias
        self.tokenizer, self.step, self.origin = tokenizer, step, origin
        self.switches: Switches | None = None
        self.label = cfg.sample.label

    def __repr__(self) -> str:
        counts = model.count_parameters(self.model)
        return f"OpenedRun({counts.total:,} parameters, {counts.active:,} active, step {self.step})"

    def switched(self, experts: str) -> "OpenedRun":
        """The same run with some experts switched off or on in all that it computes: "off:3/17 on:5/2".

        An expert that is off is used by no token, one that is on by every token, with the weight that its router gives
        it. Layers are numbered as in `routing(…).experts`: those with experts, from 0. `off:3/0-7` are eight experts,
        `off:*/17` one of every layer. What this run itself has switched is switched back, so an empty line switches all
        back. The weights are shared, not copied.
        Raises ValueError for experts that do not exist, or if too few of a layer are left for a token.
        """
        made = copy.copy(self)
        made.switches = switches.parse(experts, self.model) if experts else None
        return made

    def labelled(self, label: int | str) -> "OpenedRun":
        """The same run whose texts have this label, for a model that depends on it: a number, or a domain that
        `data.labels` names; other domains have the label 0. A run opens with its `sample.label`. The weights are
        shared, not copied.

        Raises UserError for a name without a label, ConfigError for a number that the model has not.
        """
        names = self.cfg.data.labels
        if isinstance(label, str) and label not in names:
            rule = f"is not a name in data.labels={names}"
            raise UserError(f"labelled({label!r}): {rule}; {nearest(label, names)}; labelled(0) for other domains")
        made = copy.copy(self)
        made.label = names[label] if isinstance(label, str) else label
        check_label(self.model, made.label, names)
        return made

    # --- texts and tokens ---------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, behind the token that begins a document."""
        return [self._first, *self._its_tokenizer().encode([as_text(text)])[0].tolist()]

    @property
    def _first(self) -> int:
        return tokenizers.first_token(self._its_tokenizer())

    def _its_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("the run has no tokenizer: give token ids, or put its tokenizer.json into the directory")
        return self.tokenizer

    def ids(self, text: Text) -> list[int]:
        """The token ids of a text, checked. Raises ValueError."""
        ids = self.encode(text) if isinstance(text, str) else [int(i) for i in text]
        if not ids:
            raise ValueError("a text of no tokens")
        wrong = [i for i in ids if not 0 <= i < self.model.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]}: must be ≥ 0 and < model.vocab_size={self.model.vocab_size}")
        if 0 < self.model.max_seq_len < len(ids):
            raise ValueError(f"a text has {len(ids):,} tokens, but model.max_seq_len={self.model.max_seq_len}; cut it")
        return ids

    def _pieces(self, text: Text, ids: list[int]) -> list[str]:
        """The part of the text of each token."""
        if self.tokenizer is None:
            return [str(i) for i in ids]
        begin, end = self.tokenizer.words
        first = begin or end or END_OF_TEXT
        if isinstance(text, str):
            found = self.tokenizer.encode_spans(as_text(text))
            if found.ids.tolist() == ids[1:]:
                return [first, *(as_text(text)[start:stop] for start, stop in found.spans)]
        return [first if i == self._first else self.tokenizer.decode([i]) for i in ids]

    # --- what the model computes --------------------------------------------------------------------------------------

    def logits(self, texts: Text | Sequence[Text]) -> Any:
        """Logits `[S, V]` of the token after each token of a text, in float32."""
        return self._each(texts, self._run("logits"))

    def hidden(self, texts: Text | Sequence[Text], layer: int = -1) -> Any:
        """The residual stream `[S, D]` of a text after `layer` layers, in float32.

        layer: 0 gives the embeddings; −1 what the output matrix reads, which is after the last norm. What a late block
        holds back is added after the last block of its unit.
        """
        last = self.model.num_layers
        if not -1 <= layer <= last:
            near = min(max(layer, -1), last)
            raise ValueError(f"layer={layer}: must be from 0 to {last}, or −1; nearest valid: {near}")
        return self._each(texts, self._run("hidden", layer))

    def routing(self, texts: Text | Sequence[Text]) -> Any:
        """The experts of each token of a text in each layer, and their weights: a `TextRouting`."""
        if not self.model.num_moe_layers:
            raise ValueError("the model has no experts: model.num_moe_layers is 0")
        layers = np.array([i for i, place in enumerate(self.model.places) if place.kind.experts])

        def made(texts, all_ids):
            found = self._run("routing")(texts, all_ids)
            return [
                TextRouting(self._pieces(text, ids), np.array(ids), layers, experts, shares)
                for text, ids, (experts, shares) in zip(texts, all_ids, found, strict=True)
            ]

        return self._each(texts, made)

    def score(self, context: Text | Sequence[Text], continuation: Text | Sequence[Text]) -> Any:
        """The log-likelihood of a continuation after a context: a `loglikelihood.Score`; of two lists a list.

        Two texts are encoded as one, as lm-eval does (`loglikelihood.encode`); ids of both are taken as they are.
        An empty context is the token that begins a document. Raises ValueError, and ConfigError for a model whose
        choices of experts depend on later tokens.
        """
        (contexts, one), (ends, one_end) = _listed(context), _listed(continuation)
        if one != one_end or len(contexts) != len(ends):
            raise ValueError("score takes one context and one continuation, or a list of each, equally long")
        if not contexts:
            return []
        requests = self._requests(contexts, ends)
        for request, end in zip(requests, ends, strict=True):
            if not (len(end) and len(request.continuation)):
                raise ValueError(f"score: the continuation {end!r} has no tokens")
        longest = max(len(self.ids([*request.context, *request.continuation])) for request in requests)
        longest = 1 << max(longest - 1, 1).bit_length()  # texts of similar lengths share a program
        longest = min(longest, self.model.max_seq_len or longest)
        cfg, _ = config.for_evaluation(dataclasses.replace(self.cfg, model=self.model), 1)
        data = dataclasses.replace(cfg.data, seq_len=longest, batch_size=max(1, passes.TOKENS // longest))
        cfg = dataclasses.replace(cfg, data=data, sample=dataclasses.replace(cfg.sample, label=self.label))
        scores = loglikelihood.score(cfg, self.mesh, self.params, self.router_bias, requests, switches=self.switches)
        return scores[0] if one else scores

    def _requests(self, contexts: list[Text], ends: list[Text]) -> list[loglikelihood.Request]:
        texts = {isinstance(text, str) for text in (*contexts, *ends)}
        if len(texts) > 1:
            raise ValueError("score takes texts, or token ids of both context and continuation")
        if texts == {True}:
            pairs = [(as_text(a), as_text(b)) for a, b in zip(contexts, ends, strict=True)]
            return loglikelihood.encode(self._its_tokenizer(), pairs)
        ids = lambda given: np.asarray(given, np.int32)
        return [loglikelihood.Request(ids(self.ids(a)), ids(b)) for a, b in zip(contexts, ends, strict=True)]

    def generate(
        self, prompts: Text | Sequence[Text], tokens: int | None = None, *, temperature: float | None = None,
        top_p: float | None = None, seed: int = 0,
    ) -> Any:  # fmt: skip
        """The text of a prompt and of at most `tokens` tokens after it, up to the end-of-text token.

        What is None is as in the run's `sample` settings. temperature: 0 takes the most probable token. top_p: share of
        the probability that tokens are drawn from. Raises ConfigError for a model that cannot write text.
        """
        sample, tokenizer = self.cfg.sample, self._its_tokenizer()
        settings = {
            "tokens": sample.tokens if tokens is None else tokens,
            "temperature": sample.temperature if temperature is None else temperature,
            "top_p": sample.top_p if top_p is None else top_p,
            "label": self.label,
        }
        sampled = dataclasses.replace(sample, **settings)  # which checks the values
        write = lambda _, all_ids: continue_texts(
            self.model, self.mesh, self.params, self.router_bias, tokenizer, all_ids, sampled, seed, self.switches
        )
        return self._each(prompts, write)

    # --- passes over batches of texts ---------------------------------------------------------------------------------

    def _each(self, texts: Any, run: Callable[[list, list], list]) -> Any:
        """The results of run(texts, their ids): one for one text, a list for a list."""
        listed, one = _listed(texts)
        check_label(self.model, self.label, self.cfg.data.labels)
        made = run(listed, [self.ids(text) for text in listed]) if listed else []
        return made[0] if one else made

    def _run(self, what: str, layer: int = -1) -> Callable[[Any, list[list[int]]], list]:
        """A function of texts and their ids that computes an entry of `passes.READ` for each."""
        own = self.model, self.mesh, self.params, self.router_bias
        return lambda _, all_ids: passes.run(*own, all_ids, what, layer, self.switches, self.label)


def _listed(texts: Any) -> tuple[list[Text], bool]:
    """A list of texts, and whether one text, or its token ids, was given in place of a list."""
    if isinstance(texts, str):
        return [texts], True
    listed = texts.tolist() if isinstance(texts, np.ndarray | jax.Array) else list(texts)
    one = bool(listed) and all(isinstance(i, int | np.integer) for i in listed)
    return [listed] if one else listed, one


# --- opening ---------------------------------------------------------------------------------------------------------


def load(
    path: str | Path, *, step: int | None = None, average: bool = False, compute_dtype: str = "",
    mesh: Mesh | None = None, echo: Callable[[str], Any] = print,
) -> OpenedRun:  # fmt: skip
    """Opens a run directory, a directory of a Hugging Face model, or a GGUF file.

    step: a checkpoint of the run; by default the newest. average: the average of the weights (`optim.ema`) in place of
    the trained ones. compute_dtype: "float32" or "bfloat16"; by default that of the run. mesh: of `make_mesh`; by
    default all devices. echo: takes lines about what differs from the run.

    Back ends are those of this machine, and no token is dropped, whatever the run was trained with. Every process of
    several calls this, and each method, alike. Raises CheckpointError or ConfigError of one line.
    """
    source = Path(path).expanduser()
    if _is_run(source):
        return _load_run(source, step, average, compute_dtype, mesh, echo)
    if not (source.suffix == ".gguf" or (source / "config.json").is_file()):
        raise CheckpointError(f"{source}: {_why_nothing(source)}")
    if step is not None or average:
        raise CheckpointError(f"{source}: is a Hugging Face model, which has neither steps nor an average of weights")
    read = hf.read_model(source, lambda model: _mesh(model, mesh), echo=echo)
    computed = _computed(read.cfg, compute_dtype, echo)
    with tempfile.TemporaryDirectory() as folder:  # a tokenizer is read from files
        for name, data in read.files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(data)
        tokenizer, _ = tokenizers.of_run(folder)
    made = _mesh(read.cfg.model, mesh)
    return OpenedRun(read.cfg, computed, made, read.params, read.router_bias, tokenizer, None, [read.origin])


def _load_run(source, step, average, compute_dtype, mesh, echo) -> OpenedRun:
    cfg = config_file.load_config(source).without_mtp
    computed, mesh = _computed(cfg, compute_dtype, echo), _mesh(cfg.model, mesh)
    with Checkpoints(source) as checkpoints:
        step = checkpoints.latest() if step is None else step
    params, bias, origin = weights.load_weights(source, *abstract_weights(computed, mesh), step=step, average=average)
    tokenizer, _ = tokenizers.of_run(source)
    return OpenedRun(cfg, computed, mesh, params, bias, tokenizer, step, origin)


def _is_run(source: Path) -> bool:
    if (source / "checkpoints").is_dir():
        return True
    try:
        text = (source / "config.json").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return '"optim"' in text and '"train"' in text  # a run before its first checkpoint


def _why_nothing(source: Path) -> str:
    """The reason why there is nothing to open, and the nearest run."""
    near = source if source.is_dir() else source.parent
    runs = [str(p.parent) for p in sorted(near.glob("*/config.json"))] if near.is_dir() else []
    why = "is neither a run directory nor a model of Hugging Face" if source.exists() else "no such directory"
    return f"{why}; {nearest(str(source), runs)}" if runs else why


def _mesh(cfg: ModelConfig, mesh: Mesh | None) -> Mesh:
    """The mesh on which a model is computed."""
    if mesh is None:
        return sharding.make_mesh(config.evaluation_mesh(cfg, jax.device_count()))
    if tuple(mesh.axis_names) != sharding.AXES:
        raise ValueError(f"mesh: has the axes {mesh.axis_names}; make it with moe_jax.make_mesh((data, fsdp, expert))")
    parts = mesh.shape["expert"]
    if any(experts % parts for experts in cfg.expert_counts):
        rule = f"must divide the numbers of experts {cfg.expert_counts}"
        raise ConfigError("mesh.expert", parts, rule, "nearest valid: 1")
    return mesh


def _computed(cfg: RunConfig, compute_dtype: str, echo: Callable[[str], Any]) -> ModelConfig:
    """The model as it is computed here: on any machine, and without dropping tokens."""
    moe = dataclasses.replace(cfg.model.moe, exchange="auto", grouped_matmul="auto", exchange_chunks=1)
    if moe.compute == "capacity" and cfg.model.num_moe_layers:
        moe = dataclasses.replace(moe, compute="grouped", overflow="first")
        echo("model.moe.compute='capacity' of the run: here no token is dropped, so that texts do not depend on others")
    dtype = compute_dtype or cfg.model.compute_dtype
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError("model.compute_dtype", dtype, "must be one of float32, bfloat16", "nearest valid: 'float32'")
    return dataclasses.replace(cfg.model, moe=moe, attention="auto", remat="none", compute_dtype=dtype)
