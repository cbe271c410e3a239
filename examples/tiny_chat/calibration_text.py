"""Writes training conversations as text, for `vkv quantize --calibration`.

python -m vkv.tiny_chat.calibration_text text.txt
"""

import random
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from . import model_path, phrasings
from .dialogues import Mix, training_conversation

_MIX = Mix(odd_values=0.3, polite=0.3, unknown_answer=phrasings.UNKNOWN_ANSWER)


def conversation_text(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, num_words: int
) -> str:
    """A conversation of the kind training drew, through the chat template."""
    messages = []
    for exchange in training_conversation(rng, _MIX, num_words):
        messages.append({"role": "user", "content": exchange.user})
        messages.append({"role": "assistant", "content": exchange.assistant})
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def main(
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    num_conversations: Annotated[int, typer.Option(help="How many.")] = 64,
    num_words: Annotated[int, typer.Option(help="Of a conversation, about.")] = 600,
    seed: Annotated[int, typer.Option(help="Of the conversations.")] = 5,
) -> None:
    """Write conversations that training could have drawn, and the evaluation never does."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    rng = random.Random(f"calibration-{seed}")
    texts = (conversation_text(tokenizer, rng, num_words) for _ in range(num_conversations))
    out.write_text("".join(texts), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
