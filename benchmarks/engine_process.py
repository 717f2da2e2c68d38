"""A vLLM engine that answers prompts, one at a time: what `engines.py` starts as processes of their own. Needs vLLM.

Argument: JSON with "engine" (arguments of `vllm.LLM`) and "connector" (those of `KVTransferConfig`, or null). Says "{}" on standard
output once it is up; then, for each line `{"prompt": [token, ...], "new_tokens": n, "limits": {...}}` on standard input (the last for the
connector, or null), one line with the seconds to the first and the last token, and the prompt's tokens that came from a cache. Ends with
standard input. All else goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def answer(engine: Any, number: int, prompt: list[int], new_tokens: int, limits: dict[str, int] | None) -> dict[str, float]:
    """Greedy tokens after `prompt`, from when the engine was given it; `limits`: how much of it its connector may store and load."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, extra_args={"kv_transfer_params": limits})
    start, first_s, cached = time.perf_counter(), None, 0
    engine.add_request(str(number), TokensPrompt(prompt_token_ids=prompt), sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if first_s is None and output.outputs[0].token_ids:
                first_s = time.perf_counter() - start
            cached = output.num_cached_tokens or cached
    if first_s is None:
        raise RuntimeError(f"vLLM ended request {number} without a token")
    return {"first_s": first_s, "total_s": time.perf_counter() - start, "cached_tokens": cached}


def main() -> None:
    """See the file's head."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine prints too
    settings = json.loads(sys.argv[1])
    from vllm import LLM
    from vllm.config import KVTransferConfig

    connector = settings["connector"] and KVTransferConfig(**settings["connector"])
    llm = LLM(**settings["engine"], kv_transfer_config=connector)
    print("{}", file=said, flush=True)
    for number, line in enumerate(sys.stdin):
        print(json.dumps(answer(llm.llm_engine, number, **json.loads(line))), file=said, flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
