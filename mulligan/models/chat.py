"""Chat templates: a text as a user's turn, and the token that ends the answer to it.

Templates are published with tokenizers. What stands here is what reinforcement learning needs beside rendering: the
same prompt on every day, text that cannot forge a control token, and a response that ends where a turn does.
"""

from __future__ import annotations

import re
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from mulligan.config import ModelSection
from mulligan.errors import UserError
from mulligan.models.loading import LoadedModel
from mulligan.thoughts import END_OF_THINKING, THINK
from mulligan.types import Tokens

# Some templates write today's date. A run's prompts must be the same tomorrow, so that today is always this day.
TODAY = date(2025, 1, 1)
_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# Words that stand for the turns while a template is taken apart; a template may trim what it is given, so no spaces.
_USER, _ASSISTANT, _NEXT = "Zq7user", "Zq7assistant", "Zq7next"


class Chat:
    """A tokenizer's chat template with a run's settings.

    Args:
        thinking: passed to the template as ``enable_thinking``; None passes nothing.
        system: a system prompt; None is none, which some templates replace by one of their own.

    Attributes:
        end_of_turn: the token id with which the template ends an assistant's turn.
        opens_thinking: the generation prompt ends inside ``<think>``, so that every response begins there.

    Raises:
        UserError: no template, or one that cannot be rendered, takes no system prompt, does not read
            ``enable_thinking`` though it was set, or ends a turn with no token of its own.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool | None = None, system: str | None = None
    ) -> None:
        self.tokenizer, self.thinking, self.system = tokenizer, thinking, system
        self._who = f"the chat template of {tokenizer.name_or_path or type(tokenizer).__name__}"
        if not tokenizer.chat_template:
            raise UserError(f"model.chat='on': {tokenizer.name_or_path or 'the tokenizer'} has no chat template")
        self._template = _DATE.sub(lambda found: repr(TODAY.strftime(found[2])), self._chosen_template())
        if thinking is not None and self._render(_USER) == self._render(_USER, thinking=not thinking):
            raise UserError(f"model.thinking: {self._who} does not read enable_thinking; leave the setting out")
        before, found, self._after = self._render(_USER).partition(_USER)
        if not found:
            raise UserError(f"{self._who} does not write what the user says")
        if system is not None and system.strip() not in before:
            raise UserError(f"model.system: {self._who} does not write a system prompt")
        self._before = before
        self.opens_thinking = self._after.rfind(THINK) > self._after.rfind(END_OF_THINKING)
        self._frame = (*self._encode(self._before), *self._encode(self._after))
        # Special tokens, and whatever else was added to the vocabulary and is written by the template itself.
        self._controls = control_tokens(tokenizer) | (_added_tokens(tokenizer) & set(self._frame))
        self.end_of_turn = self._end_of_turn()

    def context(self, text: str) -> Tokens:
        """The tokens of one user's turn and of the prompt to answer it; BOS stands where the template puts it.

        They are those of the rendered conversation as a whole. Where the text would bring a control token with it
        (a question that holds "<|im_end|>"), its characters are encoded as text.
        """
        rendered = self._render(text)
        tokens = self._encode(rendered)
        if [t for t in tokens if t in self._controls] == [t for t in self._frame if t in self._controls]:
            return tokens
        if rendered.startswith(self._before) and rendered.endswith(self._after):
            text = rendered[len(self._before) : len(rendered) - len(self._after)]  # as the template has trimmed it
        return (*self._encode(self._before), *plain(self.tokenizer, text, self._controls), *self._encode(self._after))

    def _chosen_template(self) -> str:
        try:
            return self.tokenizer.get_chat_template()
        except ValueError as error:  # several by name, and none of them the default
            raise UserError(f"{self._who}: {' '.join(str(error).split())}") from error

    def _encode(self, text: str) -> Tokens:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _render(self, text: str, *, thinking: bool | None = None) -> str:
        return self._conversation([{"role": "user", "content": text}], answer=True, thinking=thinking)

    def _conversation(self, turns: list[dict[str, str]], *, answer: bool, thinking: bool | None = None) -> str:
        thinking = self.thinking if thinking is None else thinking
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        given: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [*system, *turns],
                    tokenize=False,
                    add_generation_prompt=answer,
                    chat_template=self._template,
                    **given,
                )
            )
        except Exception as error:  # a template raises what it likes; many refuse a system prompt so
            what = "model.system: " if system and turns else ""
            said = " ".join((str(error).strip() or type(error).__name__).split())
            raise UserError(f"{what}{self._who} cannot be rendered ({said})") from error

    def _end_of_turn(self) -> int:
        """What the template writes between an answer and the next question begins with the end of a turn."""
        turns = [("user", _USER), ("assistant", _ASSISTANT), ("user", _NEXT)]
        whole = self._conversation([{"role": r, "content": c} for r, c in turns], answer=False)
        tail = whole.rpartition(_ASSISTANT)[2].partition(_NEXT)[0]
        known = control_tokens(self.tokenizer) | _added_tokens(self.tokenizer)
        first = next((t for t in self._encode(tail) if t in known), None)
        if first is None or not tail.lstrip().startswith(_written(self.tokenizer, first)):
            raise UserError(
                f"{self._who} ends a turn with {tail[:20]!r}, which is no token of its own, so no response could end; "
                "set model.chat='off'"
            )
        return first


def open_chat(loaded: LoadedModel, settings: ModelSection) -> Chat | None:
    """The chat of a run's model, for ``Texts(task, loaded.tokenizer, chat)``; None where prompts are plain text.

    A template's end of turn becomes one of the ids in ``loaded.model.generation_config.eos_token_id`` (base models have
    others there), which the sampler reads when it is made, so call this first; exported models keep it.

    Args:
        settings: ``ModelSection()`` for a model without a run, ``ModelSection.model_validate(run["model"])`` of a run.

    Raises:
        UserError: as :class:`Chat`, and for settings of a chat that is off.
    """
    if settings.chat == "off" or (settings.chat == "auto" and not loaded.tokenizer.chat_template):
        for key in ("thinking", "system"):
            if getattr(settings, key) is not None:
                why = "model.chat is 'off'" if settings.chat == "off" else f"{loaded.name} has no chat template"
                raise UserError(f"model.{key}: {why}, so nothing would read it")
        return None
    chat = Chat(loaded.tokenizer, thinking=settings.thinking, system=settings.system)
    config: Any = loaded.model.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = [i for i in (*known, loaded.tokenizer.eos_token_id) if i is not None]
    if chat.end_of_turn not in ids:
        config.eos_token_id = list(dict.fromkeys([*ids, chat.end_of_turn]))
    return chat


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of the tokens that are marked as special, but for the unknown token, which any text may bring.

    Where that is the EOS as well (GPT-2's family, which knows every byte) it is one of them.

    What else was added to a vocabulary are words (Gemma has its line breaks there) or marks that are meant to be
    read, such as ``<think>``.
    """
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names: Any = tokenizer
    unknown = {names.unk_token_id} - {names.eos_token_id, names.bos_token_id}
    return frozenset((marked | set(tokenizer.all_special_ids)) - unknown)


def plain(tokenizer: PreTrainedTokenizerBase, text: str, controls: frozenset[int]) -> Tokens:
    """A text's tokens, none of them a control token, whatever stands in the text.

    Args:
        controls: of :func:`control_tokens`.

    Raises:
        UserError: the tokenizer makes a control token of a part that cannot be cut in two.
    """
    tokens = tuple(tokenizer.encode(text, add_special_tokens=False))
    if controls.isdisjoint(tokens):
        return tokens
    # Each occurrence of a control token's text is cut behind its first character, so that no piece holds all of it.
    names = sorted((_written(tokenizer, token) for token in controls), key=len, reverse=True)
    pattern, cuts, at = re.compile("|".join(map(re.escape, names))), [0], 0
    while found := pattern.search(text, at):
        at = found.start() + 1
        cuts.append(at)
    pieces = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    tokens = tuple(t for piece in pieces for t in tokenizer.encode(piece, add_special_tokens=False))
    if left := controls.intersection(tokens):
        name = _written(tokenizer, min(left))
        raise UserError(f"a text of the task holds {name!r}, which this tokenizer can only read as a control token")
    return tokens


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}


def _written(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))
