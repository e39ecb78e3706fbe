"""Stop strings: found in the decoded text, though only few rows are ever decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

# Tokens decoded before those that can hold the stop string: some decoders drop a space at the very start.
_SLACK = 4

_UNKNOWN, _NEVER, _MAYBE = range(3)


class StopFinder:
    """Says whether the last token of a response completes a stop string.

    Special tokens count as text here, so their names can be stop strings.

    Args:
        tokenizer: decodes ids.
        stops: the strings, none of them empty.
        size: of the vocabulary.
        device: of the tokens that are asked about.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], size: int, device: torch.device | str = "cpu"
    ):
        self._tokenizer = tokenizer
        self._stops = stops
        self._last_characters = {stop[-1] for stop in stops}
        # A token holds at least one byte, so a stop string spans at most as many tokens as it has bytes.
        self.window = max(len(stop.encode()) for stop in stops) + _SLACK
        self._ends = torch.full((size,), _UNKNOWN, dtype=torch.int8, device=device)  # by token

    def may_end(self, tokens: torch.Tensor) -> torch.Tensor:
        """bool [n]: whether each token (int64 [n]), wherever it stands, could complete a stop string.

        Each id is decoded once, however many rows there are.
        """
        new = tokens[self._ends[tokens] == _UNKNOWN]
        for token in new.unique().tolist():
            # Twice, because some decoders drop a leading space: the second copy is whole.
            text = self._decode([token, token])
            partial = not text or "\ufffd" in text  # a part of a character tells nothing
            self._ends[token] = _MAYBE if partial or any(c in text for c in self._last_characters) else _NEVER
        return self._ends[tokens] == _MAYBE

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the response's last tokens (``window`` of them suffice) contain a stop string."""
        text = self._decode(list(tokens[-self.window :]))
        return any(stop in text for stop in self._stops)

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
