"""vLLM as a side of a comparison: a worker of another Python, which waits while others have their turn.

How it is run: the engine within the worker itself; compiled; as many threads as ours; no statistics, no detokenizing,
and no log-probs of the drawn tokens, which ours returns; prefixes shared in blocks of 32 tokens and forgotten between
two turns. Both precisions are rows of their own.

Tried by hand with 0.32.0 and one thread, tokens a second of processor time on a busy machine, so only their order
counts:

- blocks of 32 tokens against the default of 128: 13,500 to 10,800 (16-token prompts), 5,300 to 3,800 (512-token
  prompts); 64 are as good as 32.
- compiled against eager: 12,300 to 10,700 in float32, 17,000 to 13,500 in bfloat16.
- no difference: ``max_num_batched_tokens`` of 8,192 and 16,384, one request with 8 samples in place of 8 requests,
  prefix caching switched off (16-token prompts), tcmalloc preloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "vllm_worker.py"
LENGTH = 640  # tokens of a prompt and its response at most
# What vLLM reads: nothing goes over the network or to a log, and threads stay where the caller put them.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class Worker:
    """A process that samples with vLLM.

    Args:
        command: starts it, such as ``["/path/to/python", str(WORKER)]``.
        threads: that it may compute with.
    """

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self.threads = threads
        self.name = "vLLM"
        self._engines: dict[tuple[str, ...], int] = {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, **SETTINGS, "OMP_NUM_THREADS": str(threads)},
            )
        except OSError as error:
            self._errors.close()
            raise SystemExit(f"--vllm: {command[0]} cannot be started: {error.strerror}") from None

    def load(self, model: Path, dtype: str, places: int) -> int:
        """The engine for a model; the one there is, where the same weights were loaded before."""
        weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
        key = (weights, dtype, str(places))
        if key not in self._engines:
            order = {"model": str(model), "dtype": dtype, "places": places, "length": LENGTH, "threads": self.threads}
            answer = self._ask(do="load", **order)
            self._engines[key], self.name = answer["engine"], answer["name"]
        return self._engines[key]

    def sample(self, engine: int, prompts: Sequence[Sequence[int]], samples: int, new: int) -> tuple[float, list[int]]:
        """Seconds, and each response's tokens up to its EOS, that one included."""
        prompts = [list(prompt) for prompt in prompts]
        answer = self._ask(do="sample", engine=engine, prompts=prompts, samples=samples, new=new, temperature=1.0)
        return answer["seconds"], answer["lengths"]

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._errors.close()

    def _ask(self, **order: Any) -> dict[str, Any]:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None and pipe_out is not None
        try:
            print(json.dumps(order), file=pipe_in, flush=True)
            line = pipe_out.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["it said nothing"]
            raise SystemExit(f"the vLLM worker ended with exit code {self._process.wait()}: {last[0][:200]}")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"the vLLM worker cannot {order['do']}: {' '.join(answer['error'].split())[:300]}")
        return answer
