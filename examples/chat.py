"""A chat in a few lines: a conversation is a list of messages, an answer is a stream.

    python examples/chat.py [MODEL]

MODEL is a checkpoint folder or hub id; without it the built-in tiny model answers. `vkv chat` is
this with commands, options and care for long conversations.
"""

import sys

import vkv


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None
    messages: list[dict[str, str]] = []
    with vkv.LLM(model, max_seqs=1) as llm:
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            answer = ""
            for delta in llm.stream(messages, vkv.SamplingParams(temperature=0, max_tokens=256)):
                print(delta, end="", flush=True)
                answer += delta.text
            print()
            messages.append({"role": "assistant", "content": answer})
        stats = llm.stats()
        print(
            f"[{stats.tokens_held} tokens in {stats.pages_held} pages; "
            f"{stats.prefix_hit_tokens} tokens came from earlier turns]",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
