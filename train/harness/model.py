"""The model of a run as an lm-eval model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer
from tqdm import tqdm

from mc_core.errors import UserError
from mc_jax import LanguageModel
from train.data.separator import choose_separator, prefix_token
from train.data.tokenizer import make_encoder
from train.evaluation.generate import GenerationOptions, Speed, complete_tokens
from train.harness.scoring import batch_rows, power_of_two, score, truncate_middle

MAX_NEW_TOKENS = 256  # of a task that sets no limit
TRUNCATION = ("top_k", "top_p", "min_p")
SUPPORTED = {"do_sample", "until", "max_gen_toks", "temperature", "seed", *TRUNCATION}


class HarnessModel(TemplateLM):
    """A language model for lm-eval: log-likelihoods with shared contexts, and generation.

    The prefix token, which precedes texts without a context, is the token between documents in
    training: the tokenizer's end-of-text token, or a newline.

    Args:
        model: the language model.
        tokenizer: tokenizer of the model; None = bytes.
        separator: `data.separator` of the run.
        batch_size: sequences per batch; None = by length, see `batch_rows`.
        max_length: maximum number of tokens of a context with its continuation. Longer contexts
            are truncated in the middle; texts for a rolling log-likelihood are split into windows
            of this length. None = no limit.
        info: further entries of lm-eval's configuration in the results.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None,
        *,
        separator: str | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        info: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.model = model
        self.max_length = max_length
        self._words = tokenizer
        self._encode = make_encoder(tokenizer, "the text of a task")
        self._batch_size = batch_size
        self._info = info or {}
        between = choose_separator(separator, tokenizer)
        self._prefix = prefix_token(between, tokenizer)
        self._end_of_text = between.name

    @property
    def eot_token_id(self) -> int:
        """Id of the token between documents.

        Raises:
            UserError: the tokenizer has none.
        """
        if self._prefix is None:
            raise UserError(
                "the tokenizer has no token for the separator of the run, which precedes texts "
                "without a context"
            )
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for caches of requests."""
        return "bytes" if self._words is None else utils.hash_string(self._words.to_str())

    def get_model_info(self) -> dict[str, Any]:
        """Return entries of the configuration in lm-eval's results."""
        return self._info

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text; special tokens are never added."""
        return self._encode(string.encode()).tolist()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return log-likelihoods; the cache of lm-eval receives those of whole requests."""
        pairs = [(self._truncate(context, len(new)), new) for _, context, new in requests]
        scored = self._score(pairs, "log-likelihoods", disable_tqdm)
        for (key, *_), result in zip(requests, scored, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return scored

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihoods of whole texts, in windows of at most `max_length` tokens."""
        pairs, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)
            windows = utils.get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length or max(1, len(ids)), 1
            )
            for window in windows:
                pairs.append(utils.make_disjoint_window(window))
                owners.append(number)
        scored = self._score(pairs, "rolling log-likelihoods", disable_tqdm)
        totals = np.bincount(owners, [total for total, _ in scored], len(requests))
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a stop string, in batches of requests with the same options."""
        found: dict[int, str] = {}
        groups: dict[GenerationOptions, list[tuple[list[int], int]]] = {}
        for number, (context, given) in enumerate(request.args for request in requests):
            options = self._options(given)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            ids = self._truncate(ids, options.max_tokens)
            groups.setdefault(options, []).append((ids, number))
        with self._bar("generation", len(requests), disable_tqdm) as bar:
            for options, group in groups.items():
                group.sort(key=lambda item: -len(item[0]))
                while group:
                    capacity = power_of_two(len(group[0][0]) + options.max_tokens)
                    rows = batch_rows(capacity, self._batch_size)
                    batch, group = group[:rows], group[rows:]
                    for number, text in self._generate(batch, rows, options):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return [found[number] for number in range(len(requests))]

    def _generate(
        self, batch: list[tuple[list[int], int]], rows: int, options: GenerationOptions
    ) -> list[tuple[int, str]]:
        """Return the number and the text of each request of a batch, filled up to `rows`."""
        numbers = [number for _, number in batch]
        completions = complete_tokens(
            self.model,
            self._words,
            [np.asarray(ids) for ids, _ in batch],
            options,
            Speed(),
            names=[f"request {number}" for number in numbers],
            rows=numbers,
            fill=rows,
        )
        return [(n, text.text) for n, text in zip(numbers, completions, strict=True)]

    def _options(self, given: dict[str, Any]) -> GenerationOptions:
        """Return the options of a task's `generation_kwargs`."""
        unknown = given.keys() - SUPPORTED
        if unknown:
            raise UserError(f"generation_kwargs: {', '.join(sorted(unknown))}: not supported")
        stops = given.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        sampled = bool(given.get("do_sample")) and given.get("temperature", 1.0) > 0
        chosen = {name: given.get(name) if sampled else None for name in TRUNCATION}
        return GenerationOptions(
            max_tokens=given.get("max_gen_toks", MAX_NEW_TOKENS),
            temperature=given.get("temperature", 1.0) if sampled else 0.0,
            seed=given.get("seed", 0),
            stops=tuple(dict.fromkeys(stop for stop in (*stops, self._end_of_text) if stop)),
            top_k=chosen["top_k"],
            top_p=chosen["top_p"],
            min_p=chosen["min_p"],
        )

    def _truncate(self, ids: list[int], new_tokens: int) -> list[int]:
        """Truncate a context in the middle, so that it fits with its continuation."""
        limit = None if self.max_length is None else max(1, self.max_length - new_tokens)
        return list(truncate_middle(ids, limit))

    def _score(self, pairs: list[Any], name: str, disable_tqdm: bool) -> list[tuple[float, bool]]:
        with self._bar(name, len(pairs), disable_tqdm) as bar:
            try:
                scored = score(self.model, pairs, self._batch_size, bar.update)
            except ValueError as error:
                raise UserError(str(error)) from error
        return [(one.log_probability, one.greedy) for one in scored]

    @staticmethod
    def _bar(name: str, total: int, disable: bool) -> tqdm:
        return tqdm(total=total, desc=name, disable=disable)
