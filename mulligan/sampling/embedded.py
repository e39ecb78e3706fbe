"""The sampler inside the process: the learner's own model, one batched decode loop, no second engine.

The batch has ``max_rows`` places. A refill prefills each distinct prompt (context plus prefix) of the samples that it
takes in once and forks the cache to them; then all rows are decoded together, one token a step. Rows end at the same
column of the cache, whenever they joined, and are padded on the left. Rows that finish leave the batch, and waiting
samples take their places. Every uniform number comes from (seed, index in the response), so that refills, splits and
the company a row keeps cannot change it.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mulligan.errors import UserError
from mulligan.models.forks import Forks, hidden
from mulligan.native.build import KEY
from mulligan.sampling import OnDone
from mulligan.sampling.batch import Draw, Next, Order, Queue, Rows
from mulligan.sampling.cache import GrowingCache, can_grow, select_rows
from mulligan.sampling.decoder import Decoder
from mulligan.sampling.forking import forks_prompts
from mulligan.sampling.prefill import Block, continued, groups, stems
from mulligan.sampling.prompts import Prompts
from mulligan.sampling.stops import StopFinder
from mulligan.seeds import uniforms
from mulligan.types import Completion, Request, Tokens

_ROOM = 128  # columns of the cache that are allocated ahead at first, at most
_REFILL_AT = 1.0  # steps of the batch that may be lost on free places before waiting samples are taken in
_DRAW_NUMBERS = 1 << 24  # entries of one float64 [rows, vocabulary] block while drawing (128 MiB)
_STRETCH = 64  # tokens whose probabilities are summed at once while drawing from a large vocabulary
_WHOLE = 1024  # the largest that is none
_COMPACT_AT = 1 / 16  # of the live rows finished: packing them costs about as much as one step of keeping them


@dataclass(slots=True, eq=False)
class _Batch:
    """What is being decoded in one call of :meth:`EmbeddedSampler.run`."""

    queue: Queue
    rows: Rows | None = None
    after: Next | None = None  # of the rows
    cache: Any = None
    prompts: Prompts = field(default_factory=Prompts)
    forks: Forks | None = None  # where the rows go on from prompts that are kept apart
    lost: int = 0  # row-steps in which a place was free for a sample that waited, since the last refill


class EmbeddedSampler:
    """Samples from a causal LM of transformers (or the looped one) in the same process.

    It uses the model object itself: no weights are copied, and a learner's update is seen at once. Row
    results do not depend on the other rows of a batch beyond floating-point rounding of the logits.

    Args:
        model: any causal LM whose forward takes ``past_key_values``. It is put in eval mode while it
            decodes, and back whenever ``on_done`` is called.
        tokenizer: for ``eos_token_id`` and, with stop strings, ``decode``.
        temperature: for requests that name none; 0 is greedy (the first maximum).
        max_new_tokens: own tokens at most, for requests that name no number; a prefix does not count.
        stop: stop strings for requests that name none. They are looked for in the decoded own tokens
            (special tokens included) and stay in the response.
        max_rows: samples decoded at once; a request with more has the rest join later.
        num_loops: of a looped model: how many loops to run; None: the model's own number.
        exit_threshold: of a looped model: each token is drawn from the first loop whose cumulative exit
            probability is at least this; 1 is always the last loop; None: the threshold of the model's config.
            ``behavior_logprobs`` are those of the loop that was read out.
        context_length: context, prefix and own tokens together at most. None: the config's
            ``max_position_embeddings``, or no limit if it has none.
        kernels: decode with compiled kernels (:mod:`mulligan.sampling.decoder`) in place of the model's own code.

    Attributes:
        stats: totals since construction: ``refills``; ``samples``; ``prefill_tokens`` (distinct prompts,
            without padding); ``decode_tokens`` (own tokens returned); ``decode_rows`` (rows times steps
            computed, so at least ``decode_tokens - samples``); ``exit_loops`` (sum over the own tokens of the
            loop that each was read out of; 0 where nothing exits early); ``seconds`` (without ``on_done``).

    Raises:
        UserError: a setting that is out of range, or a model that has no key-value cache, or no loops for
            ``num_loops`` and ``exit_threshold``, or is none for ``kernels``.
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
        kernels: bool = False,
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
        with _evaluating(model):
            self._forks = self._grows and forks_prompts(model)
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
        with _evaluating(model):
            self._decoder = Decoder(model, **self._extra) if kernels else None
        if kernels and not self._forks:
            raise UserError(f"{KEY}: {model.config.model_type} does not decode rows that share their prompts")
        if "logits_to_keep" in accepted:
            self._extra["logits_to_keep"] = 1
        self._eos = torch.tensor(_eos_ids(model, tokenizer), dtype=torch.long, device=model.device)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])  # pyright: ignore[reportIndexIssue]
        self._finders: dict[tuple[str, ...], StopFinder] = {}
        counters = ("refills", "samples", "prefill_tokens", "decode_tokens", "decode_rows", "exit_loops", "seconds")
        self.stats: dict[str, float] = dict.fromkeys(counters, 0)

    def run(self, requests: Sequence[Request], on_done: OnDone) -> None:
        """Samples all requests, and what ``on_done`` returns, in the order of asking.

        ``on_done`` is called as soon as a request's last sample is done, outside of ``no_grad`` and with the
        model in the mode it came in.

        Raises:
            UserError: a request that cannot be served: no room for a token, an empty context, a wrong
                number of seeds, a setting out of range. For ``requests`` before anything is sampled.
                Also logits that are not finite.
        """
        batch = _Batch(Queue())
        if self._decoder is not None:
            self._decoder.update()
        for order in [self._order(request) for request in requests]:
            batch.queue.add(order)
        while batch.queue.waiting or batch.rows is not None:
            started = time.perf_counter()
            with _evaluating(self.model), torch.no_grad():
                done = self._advance(batch)
            self.stats["seconds"] += time.perf_counter() - started
            for order in done:
                completions = tuple(c for c in order.completions if c is not None)
                for request in on_done(order.request, completions):
                    batch.queue.add(self._order(request))

    def _order(self, request: Request) -> Order:
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
        if stop and stop not in self._finders:
            self._finders[stop] = StopFinder(self.tokenizer, stop, self._vocabulary, self.model.device)
        finder = self._finders.get(stop)
        return Order(request, prompt, limit, temperature, finder, [None] * request.n, missing=request.n)

    def _advance(self, batch: _Batch) -> list[Order]:
        """Decodes until at least one order is complete."""
        done: list[Order] = []
        while not done and (batch.queue.waiting or batch.rows is not None):
            if self._refill_pays(batch):
                self._refill(batch)
            assert batch.rows is not None and batch.after is not None
            rows, after = batch.rows, batch.after
            cache: Any = batch.cache
            token, logprob = draw(after.logits, rows.temperature, uniforms(rows.seed, rows.start + rows.count))
            rows.write(token, logprob, after.loop)
            ended = torch.isin(token, self._eos)
            if rows.finders:
                ended |= rows.at_stop(token)
            over = (ended | (rows.count == rows.limit)) & ~rows.finished
            rows.finished |= over
            before, rows.gone = rows.gone, int(rows.finished.count_nonzero())
            if rows.gone > before:
                done = self._complete(rows, over.nonzero().squeeze(1), ended)
            if not rows.live:
                batch.rows = batch.after = batch.cache = batch.forks = None
                continue
            if rows.gone >= max(1.0, _COMPACT_AT * len(rows)):
                token = token[self._compact(batch)]
            if self._decoder is None:
                mask = self._mask(batch)
                batch.after = self._forward(token[:, None], rows.position[:, None], mask, cache)
            else:
                assert batch.forks is not None
                batch.after = self._decoder.step(token, rows.position, batch.forks, rows.pad, cache)
            self.stats["decode_rows"] += len(rows)
            rows.position = rows.position + 1
            if self.context_length is not None:
                # Rows that finished here but are not packed away yet must not run past a position table.
                rows.position.clamp_(max=self.context_length - 1)
        return done

    def _refill_pays(self, batch: _Batch) -> bool:
        """Whether waiting samples should join now.

        A refill costs about as much as a step of the batch, whatever it brings in. So it is due when the places that
        stood free since the last one add up to a step: full batches wait a little, nearly empty ones never.
        """
        rows = batch.rows
        if rows is None:
            return True
        if not batch.queue.waiting or not self._grows:
            return False
        batch.lost += min(batch.queue.waiting, self.max_rows - rows.live)
        return batch.lost >= _REFILL_AT * rows.live

    def _refill(self, batch: _Batch) -> None:
        """Fills the free places with waiting samples."""
        rows, batch.lost = batch.rows, 0
        if rows is not None and rows.gone:
            assert batch.after is not None
            batch.after = batch.after.rows(self._compact(batch))
        draws = batch.queue.take(self.max_rows - (0 if rows is None else len(rows)))
        # Sorted, so that prompts of one length are prefilled together, and the rows of one prompt are adjacent.
        wanted = sorted(dict.fromkeys(order.prompt for order, _ in draws), key=len)
        known = {prompt: i for i, prompt in enumerate(wanted)}
        draws = sorted(draws, key=lambda each: known[each[0].prompt])
        new, after = self._join(batch, draws, wanted)
        if rows is None or batch.after is None:
            batch.rows, batch.after = new, after
        else:
            rows.add(new, batch.cache.get_seq_length())
            batch.after = Next.join([batch.after, after])
        self._fork(batch)
        self.stats["refills"] += 1
        self.stats["samples"] += len(draws)

    def _join(self, batch: _Batch, draws: list[Draw], wanted: list[Tokens]) -> tuple[Rows, Next]:
        """Makes rows of samples whose distinct prompts are ``wanted``, by rising length, and room for them."""
        device = self.model.device
        if not self._grows:
            place = {prompt: i for i, prompt in enumerate(wanted)}
            source = self._tensor([place[order.prompt] for order, _ in draws])
            batch.cache, after = self._prefill(wanted)
            select_rows(batch.cache, source)
            return Rows.new(draws, batch.cache.get_seq_length(), None, device), after.rows(source)
        prompts, begun = batch.prompts, batch.queue.begun()
        begun = set() if begun is None else {begun}
        there = prompts.places()
        self._compute(prompts, [prompt for prompt in wanted if prompt not in there])
        self._forget(batch, begun.union(wanted))
        there = prompts.places()
        source = self._tensor([there[order.prompt] for order, _ in draws])
        assert prompts.after is not None
        after = prompts.after.rows(source)
        if batch.cache is None:
            # Rows whose columns lie close together are read faster.
            batch.cache = GrowingCache(min(_ROOM, max(order.limit for order, _ in draws)))
        if self._forks:
            batch.cache.fork(prompts.cache, len(draws))
        else:
            batch.cache.admit([(prompts.cache, source)])
            prompts.keep(begun)
        return Rows.new(draws, batch.cache.get_seq_length(), source if self._forks else None, device), after

    def _forget(self, batch: _Batch, needed: set[Tokens]) -> None:
        """Drops the prompts that neither a row nor ``needed`` names."""
        rows, prompts = batch.rows, batch.prompts
        live = set() if rows is None or not self._forks else {order.prompt for order, _ in rows.draws}
        moved = prompts.keep(live | needed)
        if rows is not None and self._forks:
            rows.prompt = moved.to(rows.prompt.device)[rows.prompt]

    def _fork(self, batch: _Batch) -> None:
        """Notes which row goes on from which prompt, after rows or prompts have changed."""
        if self._forks:
            assert batch.rows is not None
            cache = batch.prompts.cache
            batch.forks = Forks.of(batch.rows.prompt, batch.prompts.pads(self.model.device), cache.get_seq_length())

    def _mask(self, batch: _Batch) -> Tensor | None:
        """What the next token of each row sees of the cache."""
        assert batch.rows is not None
        rows, width = batch.rows, batch.cache.get_seq_length() + 1
        if batch.forks is None:
            return rows.mask(width)
        own = hidden(rows.pad, width)[:, None] if rows.padded else None
        return replace(batch.forks, own_bias=own).mask()

    def _compact(self, batch: _Batch) -> Tensor:
        """Packs the finished rows away; int64 [live], the rows that stay."""
        assert batch.rows is not None
        index = _fill_holes(batch.rows.finished, batch.rows.live)
        batch.rows.keep(index)
        select_rows(batch.cache, index)
        if self._grows:
            batch.cache.drop(batch.rows.drop())
        self._fork(batch)
        return index

    def _compute(self, prompts: Prompts, missing: list[Tokens]) -> None:
        """Computes prompts, going on from those that are there."""
        fresh = [part.prompt for part in continued(missing, prompts.tokens) if not part.common]
        for wanted in (stems(fresh), missing):
            there = set(prompts.tokens)  # a stem may be a prompt
            for group in groups(continued([prompt for prompt in wanted if prompt not in there], prompts.tokens)):
                block = Block.of(group, prompts.tokens, prompts.cache, self.model.device)
                after = self._forward(block.ids, block.positions, block.mask, block.cache)
                self.stats["prefill_tokens"] += sum(len(part.rest) for part in group)
                prompts.add([part.prompt for part in group], block.result(), after)

    def _prefill(self, prompts: list[Tokens]) -> tuple[DynamicCache, Next]:
        """The cache of transformers for some prompts, by rising length, and what comes after them."""
        cache, width = DynamicCache(config=self.model.config), len(prompts[-1])
        # Any id serves as padding: the mask hides it.
        ids = self._tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        column = torch.arange(width, device=ids.device) - self._tensor([width - len(p) for p in prompts])[:, None]
        self.stats["prefill_tokens"] += sum(map(len, prompts))
        mask = (column >= 0).long() if len(prompts[0]) < width else None
        return cache, self._forward(ids, column.clamp(min=0), mask, cache)

    def _complete(self, rows: Rows, index: Tensor, ended: Tensor) -> list[Order]:
        """Fills in the completions of the rows ``index``; the orders that have all of theirs now."""
        lengths = rows.count[index]
        longest = int(lengths.max())
        columns = (index, lengths, ended[index], rows.tokens[index, :longest], rows.logprobs[index, :longest])
        done: list[Order] = []
        for row, length, stopped, tokens, logprobs in zip(*(column.tolist() for column in columns), strict=True):
            order, attempt = rows.draws[row]
            if not math.isfinite(sum(logprobs[:length])):
                raise UserError(f"the model's logits for {order.request.problem.uid} are not finite numbers")
            order.completions[attempt] = Completion(
                tokens=tuple(tokens[:length]),
                behavior_logprobs=tuple(logprobs[:length]),
                finish="stop" if stopped else "length",
            )
            order.missing -= 1
            if not order.missing:
                done.append(order)
        self.stats["decode_tokens"] += int(lengths.sum())
        self.stats["exit_loops"] += int(rows.loops[index].sum())
        return done

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Next:
        """What the model makes of the tokens ``ids`` [rows, new] that come after the cache."""
        extra = self._extra | {"position_ids": positions} if self._takes_positions else self._extra
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
        loops = getattr(output, "exit_loops", None)
        return Next(output.logits[:, -1].float(), ids.new_zeros(len(ids)) if loops is None else loops[:, -1])

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
    """The first token whose cumulative probability reaches ``uniform`` of the total.

    Of a large vocabulary in two stages, stretches of it first: a running sum in float64 over all of it takes five times
    as long.
    """
    rows, size = logprobs.shape
    if size <= _WHOLE:
        cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
        # Above 0 and at most the total, so the first entry to reach it exists and is above the one before.
        token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:])
        # The clamp is for NaN alone: such a row is reported when it ends and must not crash before.
        return token.squeeze(1).clamp_(max=size - 1)
    stretches = -(-size // _STRETCH)
    probs = logprobs.new_zeros(rows, stretches, _STRETCH)
    torch.exp(logprobs, out=probs.view(rows, -1)[:, :size])
    cdf = probs.sum(-1).cumsum(-1, dtype=torch.float64)
    threshold = uniform[:, None] * cdf[:, -1:]
    stretch = torch.searchsorted(cdf, threshold).clamp_(max=stretches - 1)
    before = torch.where(stretch > 0, cdf.gather(1, (stretch - 1).clamp(min=0)), 0.0)
    inside = probs.gather(1, stretch[..., None].expand(-1, -1, _STRETCH)).squeeze(1).cumsum(-1, dtype=torch.float64)
    # By rounding a stretch may be a little less than its part of the sum; then it is its last token that is likely.
    token = torch.searchsorted(inside, torch.minimum(threshold - before, inside[:, -1:]))
    return (stretch * _STRETCH + token).squeeze(1).clamp_(max=size - 1)


def _fill_holes(finished: Tensor, live: int) -> Tensor:
    """int64 [live]: the unfinished rows, in place where they can be; rows from the end fill the holes."""
    index = torch.arange(live, device=finished.device)
    index[finished[:live]] = (~finished[live:]).nonzero().squeeze(1) + live
    return index


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
