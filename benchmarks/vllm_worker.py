"""vLLM in a process of its own, because it pins another torch: JSON lines in, one JSON line back for each.

    PYTHON benchmarks/vllm_worker.py          (started by benchmarks/peer_vllm.py, PYTHON being one that has vLLM)

``{"do": "load", "model": DIR, "dtype": "float32", "places": 256, "length": 640, "threads": 1}`` answers
``{"engine": 0, "name": "vLLM 0.32.0"}``. Then ``{"do": "sample", "engine": 0, "prompts": [[5, 6], ...], "samples": 8,
"new": 64, "temperature": 1.0}`` answers ``{"seconds": 1.5, "lengths": [64, ...]}``: a length for each sample, its EOS
included. What goes wrong answers ``{"error": "..."}``. The end of the input ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

MEMORY = 2**30  # bytes of keys and values in each engine
BLOCK = 32  # tokens; of a prompt, whole blocks alone are shared, and the default is 128


def load(order: dict[str, Any]) -> Any:
    """An engine for the model of a directory, with as many samples at once as there are places."""
    import torch
    from vllm import LLM

    torch.set_num_threads(order["threads"])
    return LLM(
        model=order["model"],
        dtype=order["dtype"],
        max_model_len=order["length"],
        max_num_seqs=order["places"],
        block_size=BLOCK,
        kv_cache_memory_bytes=MEMORY,
        enable_prefix_caching=True,
        enforce_eager=False,
        disable_log_stats=True,
    )


def sample(engine: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Samples of all prompts; the seconds that it took and the length of each."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=order["temperature"], max_tokens=order["new"], detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in order["prompts"] for _ in range(order["samples"])]
    # A training run has other weights in every step, so nothing of the order before may be used again.
    engine.reset_prefix_cache()
    begun = time.perf_counter()
    done = engine.generate(prompts, wanted, use_tqdm=False)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "lengths": [len(each.outputs[0].token_ids) for each in done]}


def main() -> None:
    # What the libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engines: list[Any] = []
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["do"] == "load":
                engines.append(load(order))
                answer = {"engine": len(engines) - 1, "name": f"vLLM {sys.modules['vllm'].__version__}"}
            else:
                answer = sample(engines[order["engine"]], order)
        except Exception as error:  # whatever this release lacks on this machine is for the asker to say
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
