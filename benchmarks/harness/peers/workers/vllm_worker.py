"""vLLM, in an environment of its own."""

import os
from collections.abc import Sequence
from typing import Any

from protocol import Clock, System, expect, serve


def load(options: dict[str, Any]) -> System:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    if options["device"] == "cpu":
        cores = sorted(os.sched_getaffinity(0))[: options["threads"]]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    from vllm import LLM, SamplingParams

    llm = LLM(
        options["model"],
        dtype=options["dtype"],
        max_model_len=options["max_len"],
        max_num_seqs=options["max_seqs"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enforce_eager=options["eager"],
        disable_log_stats=True,
    )

    core, clocks = llm.llm_engine.engine_core, []
    get_output = core.get_output

    def timed_output() -> Any:
        found = get_output()
        clocks[-1].step(one.request_id for one in found.outputs if one.new_token_ids)
        return found

    # `generate` is called as users do, and hears of whole outputs alone: its core says each token.
    core.get_output = timed_output

    def generate(
        prompts: Sequence[Sequence[int]], output_lens: Sequence[int], clock: Clock
    ) -> list[list[int]]:
        clocks.append(clock)
        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in output_lens
        ]
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = llm.generate(given, params, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        expect(sum(map(len, tokens)), sum(output_lens))
        return tokens

    return System(generate)


if __name__ == "__main__":
    serve(load)
