"""The test double: a sampler whose responses are written down beforehand. No model, no randomness."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from mulligan.errors import UserError
from mulligan.sampling import OnDone
from mulligan.types import Completion, Request

LOGPROB = -0.5  # the behaviour log-prob of every scripted token

# One response's own text (after the prefix); alone, it finishes with "stop".
Line = str | tuple[str, str]
Script = Callable[[Request, int], Line] | Mapping[str, Sequence[Line]]


class ScriptedSampler:
    """Answers from a script, so that a test can put any verdict anywhere.

    A line is the text, or the pair of text and finish ("stop" or "length"). With "stop" an EOS token is
    appended. The text is tokenised as it is, without special tokens; limits, stop strings and seeds are
    ignored.

    Args:
        tokenizer: for the tokens and ``eos_token_id``.
        script: called with (request, attempt) for each sample; or lines by problem uid, used up one by one
            in the order of asking.

    Attributes:
        requests: every request that was asked, in order.

    Raises:
        UserError: from :meth:`run`, when the script has no line for a sample.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: Script):
        self.tokenizer = tokenizer
        self.requests: list[Request] = []
        self._write = script if callable(script) else _reader(script)

    def run(self, requests: Sequence[Request], on_done: OnDone) -> None:
        """See :class:`mulligan.sampling.Sampler`; requests are done one after the other."""
        queue = deque(requests)
        while queue:
            request = queue.popleft()
            self.requests.append(request)
            done = tuple(self._completion(self._write(request, attempt)) for attempt in range(request.n))
            queue.extend(on_done(request, done))

    def _completion(self, line: Line) -> Completion:
        text, finish = (line, "stop") if isinstance(line, str) else line
        if finish not in ("stop", "length"):
            raise UserError(f"the script's finish is '{finish}', but must be 'stop' or 'length'")
        tokens = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        eos = self.tokenizer.eos_token_id
        if finish == "stop" and isinstance(eos, int):
            tokens += (eos,)
        return Completion(tokens=tokens, behavior_logprobs=(LOGPROB,) * len(tokens), finish=finish)


def _reader(script: Mapping[str, Sequence[Line]]) -> Callable[[Request, int], Line]:
    left = {uid: deque(lines) for uid, lines in script.items()}

    def write(request: Request, attempt: int) -> Line:
        uid = request.problem.uid
        if not left.get(uid):
            raise UserError(f"the script has {len(script.get(uid, ()))} lines for {uid}, but one more was asked for")
        return left[uid].popleft()

    return write
