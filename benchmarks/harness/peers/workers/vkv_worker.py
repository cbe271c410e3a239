"""vkv's engine, over contiguous or paged KV, on a dense or a 4-bit checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from protocol import Clock, System, expect, looked_up_bytes, serve


def load(options: dict[str, Any]) -> System:
    from vkv import LLM, SamplingParams

    torch.set_num_threads(options["threads"])
    given = {name: options[name] for name in ("activation_bits",) if name in options}
    llm = LLM(
        options["model"],
        device=options["device"],
        dtype=options["dtype"],
        kv=options["kv"],
        lm_head_bits=options.get("lm_head_bits"),
        max_len=options["max_len"],
        max_seqs=options["max_seqs"],
        prefix_reuse=False,
        max_parked=0,
        **given,  # which another version may not know
    )

    turn, clocks = llm.loop.turn, []

    def timed_turn() -> Any:
        outputs = turn()
        clocks[-1].step(output.request_id for output in outputs for _ in output.token_ids)
        return outputs

    llm.loop.turn = timed_turn  # `generate` is called as users do, and has a clock in its loop

    def generate(
        prompts: Sequence[Sequence[int]], output_lens: Sequence[int], clock: Clock
    ) -> list[list[int]]:
        clocks.append(clock)
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in output_lens]
        outputs = llm.generate([list(p) for p in prompts], params, progress=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        expect(sum(map(len, tokens)), sum(output_lens))
        return tokens

    looked_up = looked_up_bytes(llm.loaded.model)
    return System(generate, llm.weight_bytes, llm.weight_bytes - looked_up)


if __name__ == "__main__":
    serve(load)
