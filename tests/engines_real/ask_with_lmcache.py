"""Ask a vLLM engine that uses an LMCache server: MODEL_FOLDER PORT PROMPT; prints the answer's tokens and the cached ones as JSON.

A program of its own, with engine processes of its own: in one process with the engine core, LMCache's connector loads numba before vLLM
looks through all modules for kernels, and vLLM 0.32 stumbles over an object of llvmlite's there.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    folder, port, prompt = sys.argv[1:]
    connector = KVTransferConfig(
        kv_connector="LMCacheMPConnector",
        kv_connector_module_path="lmcache.integration.vllm.lmcache_mp_connector",
        kv_role="kv_both",
        kv_connector_extra_config={"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": int(port)},
    )
    llm = LLM(folder, dtype="bfloat16", max_model_len=4096, max_num_seqs=4, enforce_eager=True, kv_transfer_config=connector)
    output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0]
    print(json.dumps({"tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens}))


if __name__ == "__main__":
    main()
