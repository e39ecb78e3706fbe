"""Between text and tokens: what a task says, as a model's tokenizer reads it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from mulligan.errors import UserError
from mulligan.models.chat import Chat, control_tokens, plain
from mulligan.models.loading import bos_context
from mulligan.tasks.base import Task
from mulligan.thoughts import END_OF_THINKING, THINK
from mulligan.types import Problem, Tokens

_KEPT = 1024  # prompts


class Texts:
    """A task's texts in one tokenizer's tokens.

    Args:
        chat: writes each prompt as a user's turn (``mulligan.models.chat.open_chat``); None: plain text behind BOS.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, chat: Chat | None = None) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.chat = chat
        self._bos: Tokens = () if tokenizer.bos_token_id is None else (bos_context(tokenizer),)
        self._controls = control_tokens(tokenizer)
        # Where the marks of thinking are special tokens they must outlive decoding: the answer stands behind them.
        vocabulary = tokenizer.get_vocab()
        marks = {vocabulary[mark] for mark in (THINK, END_OF_THINKING) if mark in vocabulary}
        self._hidden = self._controls - marks if marks & self._controls else None
        # Every row of a group asks for its prompt, which takes longer than all else that is done for a row.
        self._kept = lru_cache(_KEPT)(self._encode)

    def context(self, text: str) -> Tokens:
        """A prompt's tokens: one user's turn, or plain text behind BOS where the tokenizer has one.

        Special tokens that are spelled out in the text stay text.
        """
        return self._kept(text)

    def _encode(self, text: str) -> Tokens:
        if self.chat is not None:
            return self.chat.context(text)
        return (*self._bos, *plain(self.tokenizer, text, self._controls))

    def of(self, problem: Problem) -> Texts:
        """These texts in the words of the problem's own task, which knows the steps of a response to it."""
        task = self.task.of(problem)
        if task is self.task:
            return self
        own = copy(self)
        own.task = task
        return own

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
        """The text of a response, special tokens left out; thinking stays."""
        if self._hidden is not None:
            shown = [t for t in tokens if t not in self._hidden]
            return str(self.tokenizer.decode(shown, skip_special_tokens=False))
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def to_grade(self, response: str) -> str:
        """A response as a task is to read it: where the chat template has opened the thinking already, with that mark,
        so that thoughts without an end are not taken for an answer (``mulligan.thoughts.after_thinking``)."""
        return THINK + response if self.chat is not None and self.chat.opens_thinking else response

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
