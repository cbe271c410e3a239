"""`vkv generate`: prompts in, texts out."""

import json
import sys
from collections.abc import Sequence

from ...vmem.errors import InvalidPrompt
from ..frontend.llm import LLM
from ..request.outputs import RequestOutput
from ..request.sampling_params import SamplingParams


def read_prompts(given: Sequence[str] | None) -> list[str]:
    """The prompts of the command line, or the lines of standard input."""
    if given:
        return list(given)
    if sys.stdin.isatty():
        raise InvalidPrompt("no prompts: give some as arguments, or pipe them in, one a line")
    prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise InvalidPrompt("standard input has no prompts; give it at least one line")
    return prompts


def run_generate(
    llm: LLM, prompts: Sequence[str], params: SamplingParams, *, as_chat: bool, as_json: bool
) -> None:
    """Generate for all prompts together and print what comes, in their order.

    Raises what the first prompt that went wrong went wrong by, when all outputs are printed.
    """
    if as_chat:
        outputs = llm.chat([[{"role": "user", "content": p}] for p in prompts], params)
    else:
        outputs = llm.generate(list(prompts), params)
    for prompt, output in zip(prompts, outputs, strict=True):
        for text in _lines(prompt, output, as_chat=as_chat, as_json=as_json):
            sys.stdout.write(text + "\n")
    for output in outputs:
        if output.error is not None:
            raise output.error


def _lines(prompt: str, output: RequestOutput, *, as_chat: bool, as_json: bool) -> list[str]:
    if not as_json:
        return [
            completion.text if as_chat else prompt + completion.text
            for completion in output.outputs
        ]
    record = {
        "prompt": prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "error": None if output.error is None else str(output.error),
        "outputs": [
            {
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            for completion in output.outputs
        ],
    }
    return [json.dumps(record, ensure_ascii=False)]
