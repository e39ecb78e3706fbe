"""The learner: rows in, optimizer steps out. It knows no method, only what a term declares."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mulligan.errors import ContractError, UserError
from mulligan.learner.packing import Batch, Item, layouts, pack
from mulligan.learner.scoring import Scores, check_head, number_of_loops, score
from mulligan.learner.sharing import layer_costs, shares_prefixes
from mulligan.method import Method, Term
from mulligan.models.adapters import adapter_off, has_adapter
from mulligan.models.loading import pad_id
from mulligan.objective import REFERENCE, START, TokenView
from mulligan.seeds import rng_of
from mulligan.types import Metrics, Row, Sample, Stream, Tokens


@dataclass(slots=True, kw_only=True)
class Plan:
    """How the learner turns a batch of rows into optimizer steps."""

    temperature: float = 1.0  # the sampling temperature: ratios are taken at it
    max_new_tokens: int = 128
    updates_per_batch: int = 1
    epochs: int = 1
    tokens_per_micro_batch: int = 16384
    share_prefixes: bool = True  # what rows begin with alike is computed once, where the model allows it
    autocast: torch.dtype | None = None  # of matrix products and attention above float32 weights; None: the weights'
    clip_norm: float = 1.0
    seed: int = 0


class Learner:
    """Owns the policy, its optimizer and the frozen models that terms read, ``reference`` among them.

    Of a policy with an adapter the reference is the policy with the adapter off, unless ``frozen`` has another.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        *,
        rate: Callable[[int], float],
        frozen: Mapping[str, PreTrainedModel] | None = None,
    ) -> None:
        self.model, self.optimizer, self.plan, self.rate = model, optimizer, plan, rate
        self.frozen = dict(frozen or {})
        self.pad = pad_id(tokenizer)
        check_head(model)
        turn_dropout_off(model)
        readers = (model, *self.frozen.values()) if plan.share_prefixes else ()
        # What each model that can read trees costs; the others read every row in full.
        self._costs = {id(reader): layer_costs(reader) for reader in readers if shares_prefixes(reader)}
        self.updates = 0  # optimizer steps so far
        self.guard: Callable[[], None] = lambda: None  # called right before weights change

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def notes(self) -> list[str]:
        """What a run should say about how this learner reads rows: the models that cannot share what rows share."""
        if not self.plan.share_prefixes:
            return []
        readers = {"policy": self.model, **self.frozen}
        return [
            f"{name}: every row is computed in full, shared prefixes too "
            f"(this {reader.config.model_type} on {self.device.type} does not read trees of rows)"
            for name, reader in readers.items()
            if id(reader) not in self._costs
        ]

    # ---- streams -------------------------------------------------------------------------------

    @torch.no_grad()
    def fill_streams(
        self, rows: Sequence[Row], streams: Sequence[Stream], build: Callable[[Row, str], tuple[int, ...]]
    ) -> None:
        """Computes declared streams and stores each as a float32 [T] tensor in ``row.streams``.

        Args:
            build: the context tokens of a row for a context's name.
        """
        for stream in streams:
            if stream.model == "behavior":
                for row in rows:
                    row.streams[stream.name] = behavior_logprobs(row)
                continue
            items = [
                self._item(row, build(row, stream.context), torch.ones(len(row.tokens), dtype=torch.bool))
                for row in rows
            ]
            with self._model_of(stream) as model:
                for indices, batch in self._batches(model, items):
                    values = self._quantity(model, batch, stream)
                    for k, index in enumerate(indices):
                        rows[index].streams[stream.name] = values[batch.row == k].float().cpu()

    def score_samples(
        self, samples: Sequence[Sample], stream: Stream, context: Tokens | None = None
    ) -> list[torch.Tensor]:
        """A stream on samples, for a pass that asks: float32 [T] each.

        Args:
            context: what stands before the responses; None is what the sampler saw, and so are the stream's own
                "learner" and "sampling".

        Raises:
            ContractError: the stream names another context; only a term's rows have those.
        """
        if stream.context not in ("learner", "sampling"):
            raise ContractError(f"stream '{stream.name}': a pass gives its context as tokens: ask.scores(context=...)")
        rows = [
            Row(sample=s, context=s.request.context if context is None else context, group=s.group) for s in samples
        ]
        self.fill_streams(rows, [stream], lambda row, _: row.context)
        return [row.streams[stream.name] for row in rows]

    def _quantity(self, model: PreTrainedModel, batch: Batch, stream: Stream) -> torch.Tensor:
        loops = None if stream.loop is None else (stream.loop,)
        if stream.quantity == "exit_probability":
            exits = self._score(model, batch, exits=True).exits
            assert exits is not None
            return exits[:, (stream.loop or exits.shape[1]) - 1]
        out = self._score(model, batch, loops=loops, entropy=stream.quantity == "entropy")
        if stream.quantity == "entropy":
            assert out.entropy is not None
            return out.entropy
        return out.logprobs[0]

    def _score(self, model: PreTrainedModel, batch: Batch, **asked: Any) -> Scores:
        """:func:`score` in the run's precision: log-probs are float32, and so are all losses.

        Each call has an autocast of its own, because the weights that one casts are kept until it ends, those of a
        call without gradients too, which a call with gradients must not find.
        """
        dtype = self.plan.autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return score(model, batch, **asked)

    @contextmanager
    def _model_of(self, stream: Stream) -> Iterator[PreTrainedModel]:
        if stream.model in ("policy", "start"):
            yield self.model
        elif stream.model in self.frozen:
            yield self.frozen[stream.model]
        elif stream.model == REFERENCE.model and has_adapter(self.model):
            with adapter_off(self.model) as base:
                yield base
        else:
            raise ContractError(f"stream '{stream.name}' needs a frozen {stream.model}, and the learner has none")

    def _item(self, row: Row, context: tuple[int, ...], wanted: torch.Tensor) -> Item:
        temperature = row.sample.request.temperature
        # Greedy samples have no temperature to take ratios at; they are scored at 1.
        return Item(context, row.tokens, wanted, (self.plan.temperature if temperature is None else temperature) or 1.0)

    def _batches(self, model: PreTrainedModel, items: Sequence[Item]) -> Iterator[tuple[list[int], Batch]]:
        """What the model reads, one micro-batch after another, each with the indices of its items."""
        for part, trees in layouts(items, self.plan.tokens_per_micro_batch, self._costs.get(id(model))):
            yield part, pack([items[i] for i in part], self.pad, self.device, trees)

    # ---- updates -------------------------------------------------------------------------------

    def update(self, rows: Sequence[Row], method: Method, step: int) -> Metrics:
        """All optimizer steps of one batch: epochs x updates_per_batch.

        With a single one the start log-probs are the policy's own, detached: the ratio is exactly 1. With
        several, every row is scored before the first.

        Raises:
            UserError: for a loss or gradient that is not finite; the weights are then as they were before
                that optimizer step.
        """
        plan = self.plan
        several = plan.epochs * plan.updates_per_batch > 1
        if several and (any(START in term.reads for term in method.terms) or any(row.as_start for row in rows)):
            self.fill_streams(rows, [START], lambda row, _: row.context)
        records: list[Metrics] = []
        try:
            for epoch in range(plan.epochs):
                order = sorted({row.group for row in rows})  # not in the rows' order, which must not matter
                if several:
                    rng_of(plan.seed, "minibatches", step, epoch).shuffle(order)
                for part in range(plan.updates_per_batch):
                    chosen = set(order[part :: plan.updates_per_batch])
                    mine = [row for row in rows if row.group in chosen]
                    records.append(self._step(mine, method, fresh=not records, step=step))
        finally:
            self.model.eval()
        keys = dict.fromkeys(k for r in records for k in r)
        return {k: sum(r[k] for r in records if k in r) / sum(k in r for r in records) for k in keys}

    def _step(self, rows: Sequence[Row], method: Method, *, fresh: bool, step: int) -> Metrics:
        """One optimizer step. Weights of all tokens are fixed first, over all rows of the step."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        tally = _Tally()
        for index, term in enumerate(method.terms):
            mine = [row for row in rows if row.term == index]
            weights = [term.weight * w for w in term.aggregation(mine, self.plan.max_new_tokens)] if mine else []
            # A row whose advantage is 0 everywhere adds nothing to loss or gradient unless a regulariser or a
            # mean over rows reads it; its tokens are in the denominators already.
            live = [i for i, row in enumerate(mine) if term.regularisers or bool((row.advantages * row.mask).any())]
            tally.rows += len(mine)
            tally.tokens += sum(int(row.mask.sum()) for row in mine)
            items = [self._item(mine[i], mine[i].context, mine[i].mask) for i in live]
            for indices, batch in self._batches(self.model, items):
                chosen = [live[i] for i in indices]
                self._micro_batch(
                    [mine[i] for i in chosen], [weights[i] for i in chosen], batch, term, method.name, fresh, tally
                )
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip_norm or math.inf)
        if not (math.isfinite(tally.loss) and bool(torch.isfinite(norm))):
            self.optimizer.zero_grad(set_to_none=True)
            what = "gradient" if math.isfinite(tally.loss) else "loss"
            raise UserError(
                f"step {step + 1}: {method.name}'s {what} is not finite "
                f"(loss {tally.loss}, gradient norm {float(norm)}); the weights are those of the update before"
            )
        rate = self.rate(self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.guard()
        self.optimizer.step()
        self.updates += 1
        return {**tally.metrics(), "update/gradient_norm": float(norm), "update/learning_rate": rate}

    def _micro_batch(
        self, rows: list[Row], weights: list[float], batch: Batch, term: Term, owner: str, fresh: bool, tally: _Tally
    ) -> None:
        loops = term.readout.loops
        loops = tuple(range(1, number_of_loops(self.model) + 1)) if loops == "all" else loops
        scores = self._score(self.model, batch, loops=loops, entropy=term.entropy, exits=term.readout.exits)
        last = scores.logprobs[-1]
        own = [row.mask for row in rows]

        def flat(values: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([v[m] for v, m in zip(values, own, strict=True)]).to(self.device)

        if fresh and (START in term.reads or any(row.as_start for row in rows)):
            _keep_start(rows, last)
        streams = {stream.name: flat([require(row, stream, owner) for row in rows]) for stream in term.reads}
        token_weights = torch.tensor(weights, dtype=last.dtype, device=self.device)[batch.row]
        shared = {
            "advantages": flat([row.advantages for row in rows]),
            "row": batch.row,
            "rows": rows,
            "streams": streams,
            "policy_entropy": scores.entropy,
            "exit_probabilities": scores.exits,
            "loop_logprobs": scores.logprobs.detach(),
            "owner": owner,
        }
        # The surrogate is differentiated by the last loop's log-probs alone; the readout then spreads that
        # derivative over the loops. For the last loop by itself this is the plain chain rule.
        leaf = last.detach().requires_grad_()
        view = TokenView(policy_logprobs=leaf, **shared)
        surrogate = (token_weights * checked(term.surrogate(view), leaf, owner)).sum()
        (slope,) = torch.autograd.grad(surrogate, leaf)
        loss = torch.zeros((), device=self.device)
        for loop, weight in enumerate(term.readout.weights(view)):
            loss = loss + (slope * weight * scores.logprobs[loop]).sum()
        penalty = torch.zeros((), device=self.device)
        for regulariser in term.regularisers:
            seen = TokenView(policy_logprobs=last, **shared)
            penalty = penalty + (token_weights * checked(regulariser(seen), leaf, owner)).sum()
        (loss + penalty).backward()
        tally.add(
            surrogate,
            penalty,
            leaf.detach(),
            flat([row.streams[START.name] for row in rows]) if any(START.name in r.streams for r in rows) else None,
            flat([behavior_logprobs(r) for r in rows]),
            fresh,
        )

    # ---- state ---------------------------------------------------------------------------------

    def snapshot(self) -> Callable[[], None]:
        """Copies weights (those that are trained) and optimizer; the function returned puts them back."""
        fixed = {name for name, p in self.model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        weights = {k: v.detach().clone() for k, v in self.model.state_dict().items() if k not in fixed}
        optimizer, updates = copy.deepcopy(self.optimizer.state_dict()), self.updates

        def restore() -> None:
            self.model.load_state_dict(weights, strict=not fixed)
            self.optimizer.load_state_dict(optimizer)
            self.updates = updates

        return restore


def turn_dropout_off(model: torch.nn.Module) -> None:
    """Sets every dropout to 0: the learner's log-probs have to be those of the policy that sampled."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():  # attention takes its own as a number
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)


def behavior_logprobs(row: Row) -> torch.Tensor:
    """The sampler's log-probs as [T]; 0 on a re-entered prefix, which nobody drew."""
    return torch.tensor((0.0,) * row.sample.branch + row.sample.behavior_logprobs)


def _keep_start(rows: Sequence[Row], policy: torch.Tensor) -> None:
    """Before the first update the policy *is* the start: its log-probs [N], detached, become the rows' start streams
    where those were not computed already (0 where nothing is trained)."""
    if any(START.name in row.streams for row in rows):
        return
    pieces = policy.detach().cpu().split([int(row.mask.sum()) for row in rows])
    for row, piece in zip(rows, pieces, strict=True):
        values = torch.zeros(len(row.tokens), dtype=piece.dtype)
        values[row.mask] = piece
        row.streams[START.name] = values


def require(row: Row, stream: Stream, owner: str) -> torch.Tensor:
    """A row's stream, or an error that names method and field."""
    values = row.streams.get(START.name if stream.name in row.as_start else stream.name)
    if values is None:
        raise ContractError(f"{owner}: '{stream.name}' is missing in the row of sample {row.sample.uid}")
    if values.shape != (len(row.tokens),):
        raise ContractError(f"{owner}: '{stream.name}' has shape {tuple(values.shape)}, not ({len(row.tokens)},)")
    if not bool(torch.isfinite(values).all()):
        raise ContractError(f"{owner}: '{stream.name}' is not finite in the row of sample {row.sample.uid}")
    return values


def checked(loss: torch.Tensor, like: torch.Tensor, owner: str) -> torch.Tensor:
    """A loss per token, or an error that names the method."""
    if loss.shape != like.shape:
        raise ContractError(
            f"{owner}: a loss has shape {tuple(loss.shape)}, not {tuple(like.shape)}: one number a token"
        )
    return loss


@dataclass(slots=True)
class _Tally:
    """Sums over the micro-batches of one optimizer step."""

    loss: float = 0.0
    penalty: float = 0.0
    rows: int = 0
    tokens: int = 0
    scored: int = 0
    ratio_off: float = 0.0
    gaps: list[torch.Tensor] = field(default_factory=list)

    def add(
        self,
        loss: torch.Tensor,
        penalty: torch.Tensor,
        policy: torch.Tensor,
        start: torch.Tensor | None,
        behavior: torch.Tensor,
        fresh: bool,
    ) -> None:
        self.loss += float(loss.detach()) + float(penalty.detach())
        self.penalty += float(penalty.detach())
        self.scored += len(policy)
        if start is not None:
            self.ratio_off += float(((policy - start).exp() - 1).abs().sum())
        if fresh:  # only before the first update are sampler and learner meant to agree
            self.gaps.append((policy - behavior).abs())

    def metrics(self) -> Metrics:
        out = {"update/loss": self.loss, "update/rows": float(self.rows), "update/tokens": float(self.tokens)}
        out["update/live_tokens"] = float(self.scored)
        if self.penalty:
            out["update/penalty"] = self.penalty
        if self.scored:
            out["update/ratio_off"] = self.ratio_off / self.scored
        if self.gaps:
            gaps = torch.cat(self.gaps)
            out["mismatch/mean"], out["mismatch/max"] = float(gaps.mean()), float(gaps.max())
        return out


def frozen_models(methods: Sequence[Method]) -> dict[str, str | None]:
    """The frozen models that any term reads: name -> what to load, None for the reference (the policy as it began)."""
    read = {s.model for m in methods for t in m.terms for s in (*t.reads, *t.credit.reads)}
    named = {name: path for m in methods for name, path in m.models.items()}
    return ({REFERENCE.model: None} if REFERENCE.model in read else {}) | named
