"""Between text and tokens: what a task says, as a model's tokenizer reads it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from mulligan.errors import UserError
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

    def behind(self, token: str) -> Tokens:
        """One token of the user's choice as the whole context.

        Raises:
            UserError: the tokenizer knows no such token.
        """
        if token not in self.tokenizer.get_vocab():
            raise UserError(f"tokenizer {self.tokenizer.name_or_path} has no token '{token}' to stand for BOS")
        return (self.tokenizer.get_vocab()[token],)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a response, special tokens left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def step_ends(self, tokens: Tokens) -> list[int]:
        """For each step of a response the index just behind its last token."""
        return self.steps(tokens)[1]

    def steps(self, tokens: Tokens) -> tuple[list[str], list[int]]:
        """The steps of a response, and for each the index just behind its last token. Boundaries are token indices;
        the text is never tokenised again. A token that straddles two steps belongs to the first."""
        text = self.decode(tokens)
        steps = self.task.split_steps(text)
        ends: list[int] = []
        for end in accumulate(map(len, steps)):
            # By text and not by length: half a character decodes to one character too, a wrong one.
            low, high = ends[-1] if ends else 0, len(tokens)
            while low < high:
                middle = (low + high) // 2
                if self.decode(tokens[:middle]).startswith(text[:end]):
                    high = middle
                else:
                    low = middle + 1
            ends.append(low)
        if ends:
            ends[-1] = len(tokens)  # EOS belongs to the last step
        return steps, ends
