"""A model of moe_jax as lm-eval takes it, so that its tasks run on a run directory. Needs the extra `lm-eval`.

    import moe_jax, lm_eval
    from moe_jax.evaluate.harness import RunModel

    lm_eval.simple_evaluate(model=RunModel(moe_jax.load("runs/a")), tasks=["hellaswag"])

Prompts, tokens of a context and a continuation, and metrics are lm-eval's.
"""

import dataclasses
from typing import Any

import numpy as np

from moe_jax.data import tokenizers
from moe_jax.evaluate import generate, loglikelihood
from moe_jax.evaluate.loglikelihood import Request
from moe_jax.evaluate.opened import OpenedRun

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError(
        f"moe_jax.evaluate.harness needs lm-eval ({error}): pip install -e '.[lm-eval]' in the repository"
    ) from None

MAX_GEN_TOKS = 256  # tokens to generate if a task does not say; lm-eval's own default
PROMPTS = 16  # of one batch of generation


class RunModel(TemplateLM):
    """The adapter. Sequences have at most `data.seq_len` tokens.

    Every process of a run makes one, and computes all requests with the others. Raises ConfigError for a model whose
    scores would depend on the batch, ValueError for a run without a tokenizer.
    """

    def __init__(self, run: OpenedRun, progress: bool = True):
        super().__init__()
        if run.tokenizer is None:
            raise ValueError("the run has no tokenizer: put the tokenizer.json of its weights into its directory")
        self._run, self._progress = run, progress
        sample = dataclasses.replace(run.cfg.sample, label=run.label)
        self._cfg = dataclasses.replace(run.cfg, model=run.model, sample=sample)
        loglikelihood.check(self._cfg)

    @property
    def max_length(self) -> int:
        return self._cfg.data.seq_len

    @property
    def eot_token_id(self) -> int:
        return self._run.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        return tokenizers.first_token(self._run.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return f"moe_jax-{self._run.tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. `begin_of_text` comes first if the tokenizer has one, unless add_special_tokens is False."""
        begin = self._run.tokenizer.begin_of_text
        front = [] if begin is None or add_special_tokens is False else [begin]
        return [*front, *self._run.tokenizer.encode([string])[0].tolist()]

    def _score(self, requests: list[Request], quiet: bool) -> list[loglikelihood.Score]:
        run = self._run
        return loglikelihood.score(
            self._cfg,
            run.mesh,
            run.params,
            run.router_bias,
            requests,
            progress=self._progress and not quiet,
            switches=run.switches,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        ids = lambda tokens: np.asarray(tokens, np.int32)
        scores = self._score([Request(ids(before), ids(after)) for _, before, after in requests], disable_tqdm)
        made = [(score.logprob, score.greedy) for score in scores]
        for (pair, _, _), one in zip(requests, made, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, one)
        return made

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, of which every token is scored once."""
        texts = [request.args[0] for request in requests]
        asked = [loglikelihood.encode_text(self._run.tokenizer, text) for text in texts]
        some = [request for request in asked if len(request.continuation)]
        scores = iter(self._score(some, disable_tqdm))
        made = [next(scores).logprob if len(request.continuation) else 0.0 for request in asked]
        for text, one in zip(texts, made, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), one)
        return made

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The texts that follow contexts, up to a word of `until`, the end of text, or `max_gen_toks` tokens.

        A context is cut on its left so that these tokens fit. Of the sampling settings, do_sample, temperature and
        top_p are used; others raise ValueError.
        """
        settings = [_Generation.of(request.args[1]) for request in requests]
        made = [""] * len(requests)
        groups: dict[_Generation, list[int]] = {}
        for i, its in enumerate(settings):
            groups.setdefault(its, []).append(i)
        for its, numbers in groups.items():
            room = self.max_length - its.tokens
            if room < 1:
                raise ValueError(f"max_gen_toks={its.tokens}: must be < data.seq_len={self.max_length}")
            prompts = {i: (self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[-room:] for i in numbers}
            numbers.sort(key=lambda i: -len(prompts[i]))
            for at in range(0, len(numbers), PROMPTS):
                some = numbers[at : at + PROMPTS]
                for i, text in zip(some, self._continue([prompts[i] for i in some], its), strict=True):
                    made[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return made

    def _continue(self, prompts: list[list[int]], its: "_Generation") -> list[str]:
        run, tokenizer = self._run, self._run.tokenizer
        every = generate.generate(
            self._cfg.model, run.mesh, run.params, run.router_bias, prompts, its.tokens,
            temperature=its.temperature, top_p=its.top_p, seed=self._cfg.seed, vocab=tokenizer.vocab_size,
            switches=run.switches, label=self._cfg.sample.label,
        )  # fmt: skip
        texts = []
        for prompt, ids in zip(prompts, every, strict=True):
            new = ids[len(prompt) :]
            text = tokenizer.decode(new[: new.index(self.eot_token_id)] if self.eot_token_id in new else new)
            for word in its.until:
                text = text.split(word)[0]
            texts.append(text)
        return texts


@dataclasses.dataclass(frozen=True)
class _Generation:
    """The settings of one generation."""

    tokens: int
    until: tuple[str, ...]
    temperature: float
    top_p: float

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> "_Generation":
        """The settings in a task's generation_kwargs. Without do_sample the most probable tokens are taken."""
        given = dict(kwargs)
        until, samples = given.pop("until", ()) or (), given.pop("do_sample", False)
        temperature, top_p = float(given.pop("temperature", 1.0)), float(given.pop("top_p", 1.0))
        tokens = int(given.pop("max_gen_toks", MAX_GEN_TOKS))
        if given:
            raise ValueError(f"generation_kwargs: {', '.join(given)} not available; nearest valid: temperature, top_p")
        words = (until,) if isinstance(until, str) else tuple(until)
        return cls(tokens, tuple(word for word in words if word), temperature if samples else 0.0, top_p)
