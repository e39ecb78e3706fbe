"""Questions with final answers, in English, from any source: the splits, and how answers are judged."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mulligan.errors import UserError, nearest
from mulligan.seeds import rng_of
from mulligan.tasks.base import TaskSettings
from mulligan.tasks.english import English, EnglishSettings
from mulligan.tasks.rewards import Rewards
from mulligan.tasks.rows import Row, read_rows
from mulligan.thoughts import after_thinking
from mulligan.types import Grade, Problem, Tokens, Verdict
from mulligan.verify.answer import equal, final_answer
from mulligan.verify.judgement import Judgement

SPLITS = ("train", "dev", "test")


class QuestionSettings(EnglishSettings):
    """What all sources of questions share.

    Columns are found by themselves when their names are usual ones (prompt, question, problem or messages; answer,
    final_answer or solution). ``answer_column=""`` says that there are no answers, which needs ``rewards``.
    ``seed`` changes the order of the training rows, never which split a row is in.
    """

    prompt_column: str | None = None
    answer_column: str | None = None
    longest_question: int | None = Field(default=None, ge=1, description="in characters; longer ones are left out")
    verifier: Literal["math", "exact"] = Field(default="math", description="equivalence, or strict comparison")
    percent: bool = Field(default=False, description="the answers are percentages, so that 10% is 10")
    rewards: list[str] = Field(default=[], description="reward functions, './file.py:function', called as TRL does")
    reward_weights: list[float] | None = Field(default=None, description="one a function; 1 each")
    answer_weight: float = Field(default=1.0, description="of the verifier's 0 or 1 beside the functions' rewards")
    pass_at: float = Field(default=1.0, description="without answers: the reward from which a response passes")

    @model_validator(mode="after")
    def _weights(self) -> QuestionSettings:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"reward_weights has {len(self.reward_weights)} weights for {len(self.rewards)} rewards")
        if not self.rewards and self.answer_weight != 1:
            raise ValueError("answer_weight weighs the answer against 'rewards', and there are none")
        return self


class Questions(English):
    """Questions in English; the reward is the verifier's word on the final answer, the user's own functions, or both.

    Splits never overlap. A split that the source lacks is taken out of its training rows by a hash of the question, a
    tenth for dev and a tenth for test. A training row whose question stands in dev or test, and a dev row whose
    question stands in test, is left out.

    Attributes:
        training_rows: how many training rows with an answer were read.
        overlap: how many rows were left out because a later split holds their question.
        unanswered: how many rows were left out because their answer is null or blank.
        too_long: how many rows were left out because of ``longest_question``.
        rewards: the user's reward functions, None without any.
    """

    Settings: ClassVar[type[TaskSettings]] = QuestionSettings

    def __init__(self, settings: TaskSettings | None = None) -> None:
        super().__init__(settings)
        s = self.settings
        self.rewards = Rewards.load(s.rewards, s.reward_weights) if s.rewards else None
        self.unanswered = self.too_long = 0
        splits = self._load()
        self._splits: dict[str, list[Row]] = {split: splits.get(split, []) for split in SPLITS}
        self.answered = any(row.answer for rows in self._splits.values() for row in rows)
        self.training_rows = len(self._splits["train"])
        self.dropped: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self.leave_out("dev", self.keys("test"))
        self.leave_out("train", self.keys("dev") | self.keys("test"))
        if self.rewards is not None:
            self.rewards.check(next((rows[0] for rows in self._splits.values() if rows), None))

    @property
    def overlap(self) -> int:
        return sum(self.dropped.values())

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the rows come from, for messages."""

    @abstractmethod
    def _load(self) -> dict[str, list[Row]]:
        """The rows by split, not yet rid of overlaps."""

    def left_out(self) -> dict[str, int]:
        return {"overlap": self.overlap, "unanswered": self.unanswered, "too_long": self.too_long}

    def notes(self) -> list[str]:
        out = []
        if self.dropped["train"]:
            out.append(
                f"{self.dropped['train']:,} of {self.training_rows:,} training problems stand in dev or test and are "
                "left out"
            )
        if self.dropped["dev"]:
            out.append(f"{self.dropped['dev']:,} dev problems stand in test and are left out")
        if self.unanswered:
            out.append(f"{self.unanswered:,} rows have no answer and are left out")
        if self.too_long:
            longest = self.settings.longest_question
            out.append(f"{self.too_long:,} questions have over {longest:,} characters and are left out")
        return [f"{self.source}: {line}" for line in out]

    def problem(self, split: str, index: int) -> Problem:
        """Row ``index`` of dev or test, in the source's order. Training never ends: every epoch of ``size`` problems
        is another permutation of the rows, a pure function of (seed, epoch)."""
        rows = self._rows(split)
        if not rows:
            raise UserError(f"task '{self.name}': split '{split}' has no rows in {self.source}")
        if index < 0 or (split != "train" and index >= len(rows)):
            raise UserError(
                f"task '{self.name}': split '{split}' has {len(rows)} problems, there is no problem {index}"
            )
        at = index
        if split == "train":
            epoch, place = divmod(index, len(rows))
            at = _permutation(self.settings.seed, self.name, epoch, len(rows))[place]
        row = rows[at]
        return Problem(
            task=self.name,
            split=split,
            index=index,
            prompt=self.asked(row.question),
            answer=row.answer,
            data={"question": row.question, "reference": row.reference, "prompt": row.prompt, "columns": row.columns},
        )

    def size(self, split: str) -> int:
        return len(self._rows(split))

    def solution(self, problem: Problem) -> str:
        """The source's own solution where it has one and its final answer is found right; the boxed answer is added
        where it lacks one. Otherwise the boxed answer alone."""
        if not self.answered:
            return problem.data["reference"] or "Done."
        box = f"\\boxed{{{problem.answer}}}"
        reference = problem.data["reference"]
        for text in (reference, f"{reference}\n\n{box}") if reference else ():
            found = final_answer(text)[0]
            if found is not None and equal(problem.answer, found):
                return text
        return box

    # --- judging ----------------------------------------------------------------------------------------

    def extract(self, response: str) -> str | None:
        """The last box; None when there is none, or when the boxes hold different answers."""
        return final_answer(response)[0] if self.answered else None

    def equivalent(self, problem: Problem, left: str, right: str) -> bool:
        return self._judge([(left, right)])[0].verdict == "correct"

    def correct(self, problem: Problem, answer: str) -> bool:
        return self.answered and self._judge([(problem.answer, answer)])[0].verdict == "correct"

    def verify(self, problem: Problem, response: str) -> Grade:
        return self.grade(problem, [response])[0]

    def grade(self, problem: Problem, responses: Sequence[str], tokens: Sequence[Tokens] = ()) -> list[Grade]:
        """All responses side by side: one call of the verifier's pool and one of each reward function."""
        # Rewards see a response as it is, as TRL's do; an answer stands behind the thinking.
        answers = [final_answer(after_thinking(r)) if self.answered else (None, "") for r in responses]
        given = [answer for answer, _ in answers if answer is not None]
        judged = iter(self._judge([(problem.answer, answer) for answer in given]))
        words = [Judgement("wrong", why) if answer is None else next(judged) for answer, why in answers]
        own = [None] * len(responses) if self.rewards is None else self.rewards(problem, responses, tokens)
        return [
            self._grade(response, answer, word, extra)
            for response, (answer, _), word, extra in zip(responses, answers, words, own, strict=True)
        ]

    def _grade(self, response: str, answer: str | None, word: Judgement, extra: float | None) -> Grade:
        """One response's grade from the verifier's word and the reward functions' sum (None: none of them applied)."""
        right = word.verdict == "correct"
        reason = "right" if right else word.reason
        reward = extra
        if self.answered and (self.rewards is None or self.settings.answer_weight):
            reward = self.settings.answer_weight * right + (extra or 0.0)
        if not self.answered:
            right = reward is not None and reward >= self.settings.pass_at
            reason = "" if reward is None else f"reward {reward:g}, passes at {self.settings.pass_at:g}"
        verdict = Verdict.PASS if right else Verdict.FAIL
        if self.answered and word.verdict == "unscorable":
            verdict = Verdict.UNSCORABLE
        elif reward is None:
            verdict, reason = Verdict.UNSCORABLE, "no reward function applies"
        return Grade(
            verdict=verdict,
            reward=0.0 if verdict is Verdict.UNSCORABLE or reward is None else reward,
            answer=answer,
            reason=reason,
            steps=len(self.split_steps(response)),
            mentions_hint=self.mentions_hint(response),
        )

    def _judge(self, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
        """The verifier's word on (gold, answer) pairs."""
        if self.settings.verifier == "exact" or not pairs:
            right, wrong = Judgement("correct", "right"), Judgement("wrong", "wrong answer")
            return [right if equal(*pair) else wrong for pair in pairs]
        from mulligan.verify.pool import shared_pool

        return shared_pool().grade_many(pairs, percent=self.settings.percent)

    # --- rows -------------------------------------------------------------------------------------------

    def _rows(self, split: str) -> list[Row]:
        if split not in SPLITS:
            raise UserError(f"task '{self.name}' has no split '{split}'{nearest(split, SPLITS)}")
        return self._splits[split]

    def _read(self, what: str, records: Iterable[tuple[str, dict[str, Any]]]) -> list[Row]:
        """Rows of one file or one split of a data set.

        Raises:
            UserError: there are none, or none with an answer.
        """
        s = self.settings
        rows, unanswered = read_rows(records, s.prompt_column, s.answer_column, needed=not s.rewards)
        if not rows:
            raise UserError(f"{what}: none of its {unanswered} rows has an answer" if unanswered else f"{what}: empty")
        self.unanswered += unanswered
        kept = [row for row in rows if s.longest_question is None or len(row.question) <= s.longest_question]
        self.too_long += len(rows) - len(kept)
        return kept

    def keys(self, split: str) -> set[str]:
        """The normalised questions of a split."""
        return {row.key for row in self._rows(split)}

    def leave_out(self, split: str, keys: Set[str]) -> None:
        """Drops the rows of a split whose normalised question is among ``keys``, and counts them."""
        kept = [row for row in self._splits[split] if row.key not in keys]
        self.dropped[split] += len(self._splits[split]) - len(kept)
        self._splits[split] = kept


def divided(splits: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """The splits with those that are missing taken out of train: each a tenth, by the question's hash."""
    owners = {tenth: split for tenth, split in ((0, "dev"), (1, "test")) if split not in splits}
    out: dict[str, list[Row]] = {split: [] if split == "train" else list(splits.get(split, ())) for split in SPLITS}
    for row in splits.get("train", ()):
        digest = hashlib.blake2b(row.key.encode("utf-8", "replace"), digest_size=8).digest()
        out[owners.get(int.from_bytes(digest, "big") % 10, "train")].append(row)
    return out


@lru_cache(maxsize=8)
def _permutation(seed: int, task: str, epoch: int, size: int) -> tuple[int, ...]:
    order = list(range(size))
    rng_of(seed, "order", task, "train", epoch).shuffle(order)
    return tuple(order)
