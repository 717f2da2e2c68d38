"""Laws checked: the environment is what the other tests think it is: vLLM runs the packaged model in this process and caches prefixes."""

from __future__ import annotations

from tests.engines_real.conftest import running


def test_vllm_runs_in_this_process_and_finds_a_prefix_again(model_folder):
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompt = TokensPrompt(prompt_token_ids=list(range(1000, 1600)))
    params = SamplingParams(temperature=0, max_tokens=4)
    with running(model_folder) as llm:
        first, second = (llm.generate(prompt, params, use_tqdm=False)[0] for _ in range(2))
    assert second.num_cached_tokens > first.num_cached_tokens == 0
    assert list(second.outputs[0].token_ids) == list(first.outputs[0].token_ids)
