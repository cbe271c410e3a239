"""vkv's engine, over contiguous or paged KV, on a dense or a 4-bit checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from protocol import System, expect, serve


def load(options: dict[str, Any]) -> System:
    from vkv import LLM, SamplingParams

    torch.set_num_threads(options["threads"])
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
    )

    def generate(prompts: Sequence[Sequence[int]], output_lens: Sequence[int]) -> None:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in output_lens]
        outputs = llm.generate([list(p) for p in prompts], params, progress=False)
        expect(sum(len(o.outputs[0].token_ids) for o in outputs), sum(output_lens))

    return System(generate, llm.weight_bytes)


if __name__ == "__main__":
    serve(load)
