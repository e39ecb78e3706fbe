"""The sampler inside the process: the learner's own model, one batched decode loop, no second engine.

Requests are served in waves of at most ``max_rows`` samples. A wave prefills each distinct prompt (context
plus prefix) once, forks the cache to its samples, and decodes all rows together, one token a step. Rows
that finish leave the batch. Every uniform number comes from (seed, index in the response), so that waves,
splits and the company a row keeps cannot change it.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mulligan.errors import UserError
from mulligan.sampling import OnDone
from mulligan.sampling.cache import GrowingCache, can_grow, select_rows
from mulligan.sampling.stops import StopFinder
from mulligan.seeds import uniforms
from mulligan.types import Completion, Request, Tokens

_PREFILL_TOKENS = 16_384  # padded tokens in one prefill; a longer prompt goes alone
_ROOM = 128  # columns of the cache that are allocated ahead at first
_DRAW_NUMBERS = 1 << 24  # entries of one float64 [rows, vocabulary] block while drawing (128 MiB)
_COMPACT_AT = 1 / 16  # of the live rows finished: packing them costs about as much as one step of keeping them


@dataclass(slots=True, eq=False)
class _Order:
    """A request with the run's settings filled in, and its completions so far."""

    request: Request
    prompt: Tokens  # context, then prefix
    limit: int  # own tokens at most, at least 1
    temperature: float
    stop: tuple[str, ...]
    completions: list[Completion | None] = field(default_factory=list)
    taken: int = 0  # samples that are in a wave or done


_Draw = tuple[_Order, int]  # one sample: its order and the attempt


@dataclass(slots=True, eq=False)
class _Rows:
    """The rows still in the batch; every tensor's first dimension is the row."""

    index: Tensor  # int64: the row of the wave's outputs
    seed: Tensor  # int64
    start: Tensor  # int64: index in the response of the first own token
    position: Tensor  # int64: of the token to be fed next
    limit: Tensor  # int64: own tokens at most
    temperature: Tensor  # float32; 0 is greedy
    finished: Tensor  # bool
    mask: Tensor | None  # int64 [rows, columns]: 0 at the padding; None when no row has any

    def keep(self, index: Tensor) -> None:
        """Row j becomes row ``index[j]``."""
        for f in fields(self):
            value = getattr(self, f.name)
            setattr(self, f.name, None if value is None else value.index_select(0, index))
        if self.mask is not None and bool(self.mask.all()):
            self.mask = None  # the padded rows are gone; without a mask attention is faster


@dataclass(slots=True, eq=False)
class _Outputs:
    """What a wave has drawn; rows in the wave's order, columns are steps."""

    tokens: Tensor  # int64 [rows, steps]; whatever stands after a row's length is meaningless
    logprobs: Tensor  # float32 [rows, steps]; as for tokens
    length: Tensor  # int64 [rows]
    stopped: Tensor  # bool [rows]
    exits: Tensor  # int64 [rows, steps]; the loop that each token was read out of, 0 without adaptive exit


@dataclass(slots=True, eq=False)
class _Next:
    """What the next token of each row is drawn from."""

    logits: Tensor  # float32 [rows, vocabulary]
    loop: Tensor  # int64 [rows]: the loop the logits are read out of, 0 without adaptive exit


class EmbeddedSampler:
    """Samples from a causal LM of transformers (or the looped one) in the same process.

    It uses the model object itself: no weights are copied, and a learner's update is seen at once. Row
    results do not depend on the other rows of a wave beyond floating-point rounding of the logits.

    Args:
        model: any causal LM whose forward takes ``past_key_values``. It is put in eval mode while a wave
            is decoded, and back afterwards.
        tokenizer: for ``eos_token_id`` and, with stop strings, ``decode``.
        temperature: for requests that name none; 0 is greedy (the first maximum).
        max_new_tokens: own tokens at most, for requests that name no number; a prefix does not count.
        stop: stop strings for requests that name none. They are looked for in the decoded own tokens
            (special tokens included) and stay in the response.
        max_rows: samples decoded at once; a request with more is split over waves.
        num_loops: of a looped model: how many loops to run; None: the model's own number.
        exit_threshold: of a looped model: each token is drawn from the first loop whose cumulative exit
            probability is at least this; 1 is always the last loop; None: the threshold of the model's config.
            ``behavior_logprobs`` are those of the loop that was read out.
        context_length: context, prefix and own tokens together at most. None: the config's
            ``max_position_embeddings``, or no limit if it has none.

    Attributes:
        stats: totals since construction: ``waves``; ``samples``; ``prefill_tokens`` (distinct prompts,
            without padding); ``decode_tokens`` (own tokens returned); ``decode_rows`` (rows times steps
            computed, so at least ``decode_tokens - samples``); ``exit_loops`` (sum over the own tokens of the
            loop that each was read out of; 0 where nothing exits early); ``seconds`` (without ``on_done``).

    Raises:
        UserError: a setting that is out of range, or a model that has no key-value cache, or no loops for
            ``num_loops`` and ``exit_threshold``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        max_rows: int = 256,
        num_loops: int | None = None,
        exit_threshold: float | None = None,
        context_length: int | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.stop = tuple(stop)
        self.max_rows = max_rows
        config = model.config.get_text_config(decoder=True)
        self.context_length = context_length or getattr(config, "max_position_embeddings", None)
        _check_settings("the sampler", temperature, max_new_tokens, self.stop)
        if max_rows < 1:
            raise UserError(f"the sampler: max_rows is {max_rows}, but must be at least 1")
        self._grows = can_grow(model.config)
        accepted = _accepted(model)
        if "past_key_values" not in accepted:
            raise UserError(f"{type(model).__name__} takes no past_key_values, so the embedded sampler cannot use it")
        self._takes_positions = "position_ids" in accepted
        self._extra: dict[str, Any] = {}
        for name, value in (("num_loops", num_loops), ("exit_threshold", exit_threshold)):
            if value is not None and name not in accepted:
                raise UserError(f"the sampler: {name} is {value}, but {type(model).__name__} has no loops")
            if value is not None:
                self._extra[name] = value
        if exit_threshold is not None and not 0 <= exit_threshold <= 1:
            raise UserError(f"the sampler: exit_threshold is {exit_threshold}, but must be a number from 0 to 1")
        if "logits_to_keep" in accepted:
            self._extra["logits_to_keep"] = 1
        self._eos = torch.tensor(_eos_ids(model, tokenizer), dtype=torch.long, device=model.device)
        self._finders: dict[tuple[str, ...], StopFinder] = {}
        counters = ("waves", "samples", "prefill_tokens", "decode_tokens", "decode_rows", "exit_loops", "seconds")
        self.stats: dict[str, float] = dict.fromkeys(counters, 0)

    def run(self, requests: Sequence[Request], on_done: OnDone) -> None:
        """Samples all requests, and what ``on_done`` returns, in the order of asking.

        ``on_done`` is called at the end of the wave that completes a request, outside of ``no_grad`` and
        with the model in the mode it came in.

        Raises:
            UserError: a request that cannot be served: no room for a token, an empty context, a wrong
                number of seeds, a setting out of range. For ``requests`` before anything is sampled.
                Also logits that are not finite.
        """
        queue = deque([self._order(request) for request in requests])
        while queue:
            draws = self._take(queue)
            started = time.perf_counter()
            with _evaluating(self.model), torch.no_grad():
                self._sample(draws)
            self.stats["seconds"] += time.perf_counter() - started
            for order in dict.fromkeys(order for order, _ in draws):
                done = [c for c in order.completions if c is not None]
                if len(done) == order.request.n:
                    queue.extend([self._order(request) for request in on_done(order.request, tuple(done))])

    def _order(self, request: Request) -> _Order:
        who = f"a request for {request.problem.uid}"
        temperature = self.temperature if request.temperature is None else request.temperature
        limit = self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        stop = request.stop or self.stop
        _check_settings(who, temperature, limit, stop)
        if request.n < 1 or len(request.seeds) != request.n:
            raise UserError(f"{who}: n is {request.n} with {len(request.seeds)} seeds, but each sample needs one")
        prompt = request.context + request.prefix
        if not prompt:
            raise UserError(f"{who}: the context is empty, but needs at least one token (such as BOS)")
        if self.context_length is not None:
            if len(prompt) >= self.context_length:
                raise UserError(
                    f"{who}: the context of {len(request.context)} tokens and the prefix of {len(request.prefix)} "
                    f"leave no room for a new token, because the context length is {self.context_length}"
                )
            limit = min(limit, self.context_length - len(prompt))
        return _Order(request, prompt, limit, temperature, stop, [None] * request.n)

    def _take(self, queue: deque[_Order]) -> list[_Draw]:
        """The next wave's samples; an order leaves the queue when its last sample is taken."""
        draws: list[_Draw] = []
        while queue and len(draws) < self.max_rows:
            order = queue[0]
            end = min(order.request.n, order.taken + self.max_rows - len(draws))
            draws += [(order, attempt) for attempt in range(order.taken, end)]
            order.taken = end
            if end == order.request.n:
                queue.popleft()
        return draws

    def _sample(self, draws: list[_Draw]) -> None:
        """One wave: fills in the completions of these samples."""
        # Sorted, so that prompts of one length are prefilled together, and the rows of one prompt are adjacent.
        prompts = sorted(dict.fromkeys(order.prompt for order, _ in draws), key=len)
        place = {prompt: i for i, prompt in enumerate(prompts)}
        draws = sorted(draws, key=lambda draw: place[draw[0].prompt])
        source = self._tensor([place[order.prompt] for order, _ in draws])
        first, cache = self._prefill(prompts, source, room=max(order.limit for order, _ in draws))
        outputs = self._decode(draws, first, cache)
        columns = (outputs.tokens, outputs.logprobs, outputs.length, outputs.stopped)
        rows = zip(draws, *(column.tolist() for column in columns), strict=True)
        for (order, attempt), tokens, logprobs, length, stopped in rows:
            if not math.isfinite(sum(logprobs[:length])):
                raise UserError(f"the model's logits for {order.request.problem.uid} are not finite numbers")
            order.completions[attempt] = Completion(
                tokens=tuple(tokens[:length]),
                behavior_logprobs=tuple(logprobs[:length]),
                finish="stop" if stopped else "length",
            )
            self.stats["decode_tokens"] += length
        own = torch.arange(outputs.exits.shape[1], device=outputs.exits.device) < outputs.length[:, None]
        self.stats["exit_loops"] += int(outputs.exits[own].sum())
        self.stats["waves"] += 1
        self.stats["samples"] += len(draws)

    def _prefill(self, prompts: list[Tokens], source: Tensor, room: int) -> tuple[_Next, Cache]:
        """Runs each prompt once and forks the results.

        Args:
            prompts: distinct, by rising length.
            source: int64 [rows], rising: the prompt of each row.
            room: how many tokens will follow at most.

        Returns:
            What the rows draw their first tokens from, and their cache, padded on the left.
        """
        parts: list[tuple[Any, Tensor]] = []  # caches, each with the rows to take
        found: list[_Next] = []
        for start, end in _groups([len(prompt) for prompt in prompts], split=self._grows):
            cache = GrowingCache(room=0) if self._grows else DynamicCache(config=self.model.config)
            width = len(prompts[end - 1])
            pads = [width - len(prompt) for prompt in prompts[start:end]]
            # Any id serves as padding: the mask hides it.
            ids = self._tensor([[0] * pad + list(p) for pad, p in zip(pads, prompts[start:end], strict=True)])
            column = torch.arange(width, device=ids.device) - self._tensor(pads)[:, None]
            mask = (column >= 0).long() if pads[0] else None
            rows = source[(source >= start) & (source < end)] - start
            after = self._forward(ids, column.clamp(min=0), mask, cache)
            found.append(_Next(after.logits.index_select(0, rows), after.loop.index_select(0, rows)))
            parts.append((cache, rows))
            self.stats["prefill_tokens"] += sum(map(len, prompts[start:end]))
        first = _Next(torch.cat([f.logits for f in found]), torch.cat([f.loop for f in found]))
        if self._grows:
            return first, GrowingCache.join(parts, room=min(room, _ROOM))
        ((cache, rows),) = parts
        select_rows(cache, rows)
        return first, cache

    def _decode(self, draws: list[_Draw], after: _Next, cache: Cache) -> _Outputs:
        """Draws tokens until every row has finished; ``after`` is what the prompts gave."""
        rows = self._rows(draws)
        steps = max(order.limit for order, _ in draws)
        shape = (len(draws), steps)
        outputs = _Outputs(
            tokens=rows.seed.new_zeros(shape),
            logprobs=after.logits.new_zeros(shape),
            length=torch.zeros_like(rows.seed),
            stopped=torch.zeros_like(rows.finished),
            exits=rows.seed.new_zeros(shape),
        )
        width = max(len(order.prompt) for order, _ in draws)
        finders = [self._finder(order.stop) for order, _ in draws] if any(order.stop for order, _ in draws) else None
        gone = 0
        for step in range(steps):
            token, logprob = draw(after.logits, rows.temperature, uniforms(rows.seed, rows.start + step))
            outputs.tokens[rows.index, step] = token
            outputs.logprobs[rows.index, step] = logprob
            outputs.exits[rows.index, step] = after.loop
            ended = torch.isin(token, self._eos)
            if finders:
                ended |= self._at_stop(finders, outputs.tokens, rows, step)
            over = (ended | (rows.limit == step + 1)) & ~rows.finished
            rows.finished |= over
            before, gone = gone, int(rows.finished.count_nonzero())
            if gone > before:
                outputs.length[rows.index[over]] = step + 1
                outputs.stopped[rows.index[over]] = ended[over]
            if gone == len(token):
                break
            if gone >= max(1.0, _COMPACT_AT * len(token)):
                index = _fill_holes(rows.finished, len(token) - gone)
                rows.keep(index)
                select_rows(cache, index)
                token, gone = token[index], 0
            mask = None if rows.mask is None else rows.mask[:, : width + step + 1]
            after = self._forward(token[:, None], rows.position[:, None], mask, cache)
            self.stats["decode_rows"] += len(token)
            rows.position += 1
            if self.context_length is not None:
                # Rows that finished here but are not packed away yet must not run past a position table.
                rows.position.clamp_(max=self.context_length - 1)
        return outputs

    def _rows(self, draws: list[_Draw]) -> _Rows:
        lengths = self._tensor([len(order.prompt) for order, _ in draws])
        width, shortest = int(lengths.max()), int(lengths.min())
        limit = self._tensor([order.limit for order, _ in draws])
        columns = torch.arange(width + int(limit.max()), device=lengths.device)
        return _Rows(
            index=torch.arange(len(draws), device=lengths.device),
            seed=self._tensor([order.request.seeds[attempt] for order, attempt in draws]),
            start=self._tensor([len(order.request.prefix) for order, _ in draws]),
            position=lengths.clone(),
            limit=limit,
            temperature=torch.tensor([order.temperature for order, _ in draws], device=lengths.device),
            finished=torch.zeros_like(limit, dtype=torch.bool),
            mask=None if width == shortest else (columns >= (width - lengths)[:, None]).long(),
        )

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> _Next:
        """What the model makes of the tokens ``ids`` [rows, new] that come after the cache."""
        extra = self._extra | {"position_ids": positions} if self._takes_positions else self._extra
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
        loops = getattr(output, "exit_loops", None)
        return _Next(output.logits[:, -1].float(), ids.new_zeros(len(ids)) if loops is None else loops[:, -1])

    def _finder(self, stop: tuple[str, ...]) -> StopFinder | None:
        if stop and stop not in self._finders:
            self._finders[stop] = StopFinder(self.tokenizer, stop)
        return self._finders.get(stop)

    def _at_stop(self, finders: list[StopFinder | None], tokens: Tensor, rows: _Rows, step: int) -> Tensor:
        """bool [live rows]: whether the token of this step completes one of the row's stop strings."""
        found = torch.zeros_like(rows.finished)
        index = rows.index.tolist()
        for row, token in enumerate(tokens[rows.index, step].tolist()):
            finder = finders[index[row]]
            if finder is not None and finder.may_end(token):
                recent = tokens[index[row], max(0, step + 1 - finder.window) : step + 1]
                found[row] = finder.ends(recent.tolist())
        return found

    def _tensor(self, numbers: Sequence) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.model.device)


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row: the inverse of the cumulative softmax at a given uniform number.

    Args:
        logits: float32 [rows, vocabulary].
        temperature: float32 [rows]; 0 is greedy: the first maximum, with its log-prob at temperature 1.
        uniform: float64 [rows] in (0, 1).

    Returns:
        int64 [rows] tokens, never one of probability 0, and their float32 [rows] log-probs in nats, at the
        temperature.
    """
    greedy = temperature == 0
    logprobs = torch.log_softmax(logits / temperature.masked_fill(greedy, 1.0)[:, None], -1)
    if bool(greedy.all()):
        token = logits.argmax(-1)
    else:
        size = max(1, _DRAW_NUMBERS // logits.shape[1])
        blocks = zip(logprobs.split(size), uniform.split(size), strict=True)
        token = torch.cat([_inverse_cdf(*block) for block in blocks])
        if bool(greedy.any()):
            token = torch.where(greedy, logits.argmax(-1), token)
    return token, logprobs.gather(1, token[:, None]).squeeze(1)


def _inverse_cdf(logprobs: Tensor, uniform: Tensor) -> Tensor:
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    # Above 0 and at most the total, so the first entry to reach it exists and is above the one before.
    threshold = uniform[:, None] * cdf[:, -1:]
    # The clamp is for NaN alone: such a row is reported at the end of the wave and must not crash before.
    return torch.searchsorted(cdf, threshold).squeeze(1).clamp_(max=logprobs.shape[1] - 1)


def _fill_holes(finished: Tensor, live: int) -> Tensor:
    """int64 [live]: the unfinished rows, in place where they can be; rows from the end fill the holes."""
    index = torch.arange(live, device=finished.device)
    index[finished[:live]] = (~finished[live:]).nonzero().squeeze(1) + live
    return index


def _groups(lengths: list[int], split: bool) -> Iterator[tuple[int, int]]:
    """Ranges of rising lengths to prefill together: within the budget, and no prompt padded to over twice itself."""
    start = 0
    for i, length in enumerate(lengths):
        if split and i > start and ((i - start + 1) * length > _PREFILL_TOKENS or length > 2 * lengths[start]):
            yield start, i
            start = i
    yield start, len(lengths)


def _accepted(model: PreTrainedModel) -> set[str]:
    """The keywords of the model's forward; an adapter's wrapper takes what the model inside it takes."""
    unwrap = getattr(model, "get_base_model", None)
    inside: Any = unwrap() if callable(unwrap) else model
    return set(inspect.signature(inside.forward).parameters)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[Any] = [tokenizer.eos_token_id]
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids += configured if isinstance(configured, list | tuple) else [configured]
    return sorted({i for i in ids if i is not None})


def _check_settings(who: str, temperature: float, max_new_tokens: int, stop: tuple[str, ...]) -> None:
    if not 0 <= temperature < math.inf:
        raise UserError(f"{who}: temperature is {temperature}, but must be a number of at least 0")
    if max_new_tokens < 1:
        raise UserError(f"{who}: max_new_tokens is {max_new_tokens}, but must be at least 1")
    if "" in stop:
        raise UserError(f"{who}: an empty stop string would end every response at once")


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is as it was, also one that was frozen in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
