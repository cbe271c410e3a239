"""`transformers`' own generate over virtual memory: one argument more, the same tokens.

    python examples/hf_generate.py [MODEL]

MODEL is a checkpoint folder or hub id; without it the built-in tiny model answers. Every line on
standard input is a turn of one conversation, and its keys and values stay in the cache, unless the
template writes earlier turns out in another way than they were said.
"""

import sys

import torch
import vkv
from transformers import AutoModelForCausalLM, AutoTokenizer
from vkv.tiny_chat import model_path


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else str(model_path())
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    cache = vkv.VirtualCache(model.config)
    messages: list[dict[str, str]] = []
    held = torch.empty(0, dtype=torch.long)  # the tokens that the cache has
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        if not torch.equal(prompt["input_ids"][0, : len(held)], held):
            cache.reset()  # `generate` would take what it has for the prompt's beginning
        with torch.inference_mode():
            output = model.generate(
                **prompt, past_key_values=cache, max_new_tokens=128, do_sample=False
            )
        held = output[0, : cache.get_seq_length()]
        answer = tokenizer.decode(
            output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
        )
        print(answer)
        messages.append({"role": "assistant", "content": answer})
    stats = cache.stats()
    print(
        f"[{stats.tokens} tokens in {stats.physical_bytes:,} bytes; addresses for "
        f"{stats.virtual_bytes:,}]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
