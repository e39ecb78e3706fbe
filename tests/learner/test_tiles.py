"""The tiled head against the full softmax: every gradient, shaped logits, low precision, and how much it holds."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mulligan.learner import scoring, tiles
from mulligan.learner.packing import Item, pack
from mulligan.learner.scoring import is_plain, score
from mulligan.learner.tiles import tiled_logprobs
from tests.helpers import LOOPS, VOCABULARY, flat, tiny, tokens

WORDS, WIDTH, N = 53, 7, 29


def plain(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits


def capped(logits: torch.Tensor) -> torch.Tensor:
    return 3.0 * torch.tanh(0.25 * plain(logits) / 3.0)


class Case:
    """A head with hidden states and targets, made from nothing."""

    def __init__(self, *, bias: bool = False, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(3)
        self.head = torch.nn.Linear(WIDTH, WORDS, bias=bias, dtype=dtype)
        with torch.no_grad():
            self.head.weight.mul_(6.0)
        self.hidden = torch.randn(N, WIDTH, dtype=dtype, requires_grad=True)
        self.targets = torch.randint(WORDS, (N,))
        self.targets[:2] = torch.tensor([0, WORDS - 1])
        self.temperature = torch.linspace(0.7, 1.5, N)
        self.by = torch.linspace(-1.0, 1.0, N, dtype=torch.float64)  # what logprobs and entropies are weighted by

    def tiled(self, shape=plain, numbers: int = 40, entropy: bool = True):
        return tiled_logprobs(
            self.head, self.hidden, self.targets, self.temperature, shape=shape, numbers=numbers, entropy=entropy
        )

    def full(self, shape=plain):
        """The same by autograd through all logits."""
        table = torch.log_softmax(shape(self.head(self.hidden)) / self.temperature[:, None], -1)
        return table.gather(1, self.targets[:, None])[:, 0], -(table.exp() * table).sum(-1)

    def gradients(self, logprobs: torch.Tensor, entropies: torch.Tensor | None) -> list[torch.Tensor]:
        loss = (self.by * logprobs).sum() + (0.0 if entropies is None else (self.by**2 * entropies).sum())
        wanted = [self.hidden, *(p for p in self.head.parameters() if p.requires_grad)]
        return list(torch.autograd.grad(loss, wanted, retain_graph=True))


def near(found, right, tolerance: float) -> bool:
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, right, strict=True)]
    return all(float((a - b).norm() / b.norm()) < tolerance for a, b in pairs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [plain, capped])
@pytest.mark.parametrize("numbers", [1, 40, 10_000])  # one number a tile, some words of some tokens, everything
def test_values_and_gradients_are_those_of_the_full_softmax(bias, shape, numbers, monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 8)
    case = Case(bias=bias)
    found, right = case.tiled(shape, numbers), case.full(shape)
    assert near(found, right, 1e-13)
    assert near(case.gradients(*found), case.gradients(*right), 1e-12)
    alone, none = case.tiled(shape, numbers, entropy=False)
    assert none is None and torch.equal(alone, found[0])
    assert near(case.gradients(alone, None), case.gradients(right[0], None), 1e-12)


def test_the_gradient_of_the_entropy_alone():
    case = Case()
    _, entropies = case.tiled()
    assert entropies is not None
    (found,) = torch.autograd.grad(entropies.sum(), case.hidden)
    (right,) = torch.autograd.grad(case.full()[1].sum(), case.hidden)
    assert near([found], [right], 1e-12)


def test_very_large_logits_stay_finite():
    case = Case(dtype=torch.float32)
    with torch.no_grad():
        case.head.weight.mul_(1e4)
    found, right = case.tiled(), case.full()
    assert near([found[0]], [right[0]], 1e-5)
    assert all(bool(torch.isfinite(g).all()) for g in case.gradients(*found))


@pytest.mark.parametrize("frozen", ["head", "trunk"])
def test_what_is_frozen_gets_no_gradient(frozen):
    case = Case()
    right = case.gradients(*case.full())
    if frozen == "head":
        case.head.requires_grad_(False)
        assert near(case.gradients(*case.tiled()), right[:1], 1e-12)
    else:
        case.hidden = case.hidden.detach()
        (found,) = torch.autograd.grad((case.by * case.tiled()[0]).sum(), [case.head.weight])
        case.hidden.requires_grad_()
        assert near([found], [case.gradients(case.full()[0], None)[1]], 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_as_near_as_that_of_the_full_softmax(autocast):
    exact = Case(dtype=torch.float32)
    true = exact.gradients(*exact.full())
    case = exact if autocast else Case(dtype=torch.bfloat16)
    with torch.no_grad():
        case.hidden.copy_(exact.hidden)
        case.head.weight.copy_(exact.head.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found, right = case.tiled(), case.full()
    assert found[0].dtype == torch.float32
    assert near(found, right, 1e-5)  # the same products, only in tiles
    gradients, others = case.gradients(*found), case.gradients(*right)
    assert [g.dtype for g in gradients] == [case.hidden.dtype, case.head.weight.dtype]
    for mine, its, best in zip(gradients, others, true, strict=True):
        error, allowed = float((mine - best).norm()), float((its - best).norm())
        # It was low precision that was used, under autocast in the backward pass too.
        assert 1e-3 * float(best.norm()) < error < 1.1 * allowed


def test_gradients_in_low_precision_add_up_in_float32():
    """Of 4,000 equal words every weight is 1, so that d logprob / d hidden = 1 - 4000 * (1 / 4000) * 1 = 0.

    A sum in bf16 stops growing where a term is 2^-9 of it: at 2^9 / 4000 = 0.13.
    """
    head = torch.nn.Linear(1, 4000, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(head.weight)
    hidden = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.long)
    logprobs, _ = tiled_logprobs(head, hidden, zero, torch.ones(1), shape=plain, numbers=1, entropy=False)
    (found,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert abs(float(found)) < 0.005


class Largest(TorchDispatchMode):
    """Notes the most numbers in a tensor that is made inside, and the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2][-2:]
        if func._overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.operations += 2 * matrices[0].shape[0] * matrices[0].shape[1] * matrices[1].shape[1]
        return out


def test_logits_are_never_there_together_and_computed_twice():
    """4 products: logits, logits again, and one for the gradient of each side."""
    case = Case()
    with Largest() as seen:
        case.gradients(*case.tiled(numbers=4 * N))
    # The largest tensor is the head's gradient, 371 numbers; a tile has 116; all logits would be 1,537.
    assert seen.numbers == WORDS * WIDTH
    assert seen.operations == 4 * 2 * N * WIDTH * WORDS


@pytest.mark.parametrize("entropy", [False, True])
def test_loops_together_are_the_loops_one_by_one(entropy, monkeypatch):
    model = tiny("looped")
    model.config.final_logit_softcapping = 5.0
    items = [Item((1,), tokens(9, k), torch.ones(9, dtype=torch.bool), 0.8) for k in range(3)]
    batch = pack(items, 0, model.device)
    every = tuple(range(1, LOOPS + 1))
    by = torch.linspace(-1, 1, LOOPS * 27, dtype=torch.float64).view(LOOPS, 27)

    def run(chunk: int, together: bool):
        monkeypatch.setattr(scoring, "CHUNK", chunk)
        model.zero_grad()
        if together:
            out = score(model, batch, loops=every, entropy=entropy)
            logprobs, entropies = out.logprobs, out.entropy
        else:
            parts = [score(model, batch, loops=(k,), entropy=entropy) for k in every]
            logprobs, entropies = torch.cat([p.logprobs for p in parts]), parts[-1].entropy
        ((by * logprobs).sum() + (0.0 if entropies is None else entropies.sum())).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return logprobs.detach(), flat(gradient)

    right, gradient = run(1 << 23, together=False)
    for chunk in (1 << 23, 4 * 50 * VOCABULARY, 8 * 11):  # kept, few tiles, many
        found, again = run(chunk, together=True)
        assert near([found], [right], 1e-13)
        assert near([again], [gradient], 1e-12)


def test_a_head_that_does_more_is_not_taken_for_its_weight():
    head = torch.nn.Linear(2, 3)
    assert is_plain(head)
    hook = head.register_forward_hook(lambda *_: None)
    assert not is_plain(head)
    hook.remove()
    assert is_plain(head)
    head.forward = torch.nn.functional.relu
    assert not is_plain(head)

    class Adapted(torch.nn.Linear):
        pass

    assert not is_plain(Adapted(2, 3))
