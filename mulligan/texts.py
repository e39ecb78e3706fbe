"""Between text and tokens: what a task says, as a model's tokenizer reads it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from mulligan.models.loading import bos_context
from mulligan.tasks.base import Task
from mulligan.types import Problem, Tokens


class Texts:
    """A task's texts in one tokenizer's tokens."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self._bos: Tokens = () if tokenizer.bos_token_id is None else (bos_context(tokenizer),)

    def context(self, text: str) -> Tokens:
        """A prompt's tokens, behind BOS where the tokenizer has one."""
        return (*self._bos, *self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, problem: Problem) -> Tokens:
        """The plain prompt."""
        return self.context(self.task.prompt(problem))

    def hint(self, problem: Problem, wrong_answers: Sequence[str], *, concise: bool = False) -> Tokens:
        """The prompt with a hint of wrong answers."""
        return self.context(self.task.hint(problem, wrong_answers, concise=concise))

    def diagnosis(self, problem: Problem, steps: Sequence[str]) -> Tokens:
        """The prompt that asks for the first wrong step."""
        return self.context(self.task.diagnosis(problem, steps))

    def nothing(self) -> Tokens:
        """The context of P(y): the tokenizer's BOS alone; an error where it has none."""
        return (bos_context(self.tokenizer),)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a response, special tokens left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def step_ends(self, tokens: Tokens) -> list[int]:
        """For each step of a response the index just behind its last token. Boundaries are token indices;
        the text is never tokenised again. A token that straddles two steps belongs to the first."""
        text = self.decode(tokens)
        ends, at = [], 0
        for end in accumulate(len(step) for step in self.task.split_steps(text)):
            # By text and not by length: half a character decodes to one character too, a wrong one.
            while not self.decode(tokens[:at]).startswith(text[:end]):
                at += 1
            ends.append(at)
        if ends:
            ends[-1] = len(tokens)  # EOS belongs to the last step
        return ends
