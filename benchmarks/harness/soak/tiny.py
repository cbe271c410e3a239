"""Models as tiny as possible in which a wrong key or value still shows, and their tokenizer.

As `transformers` initialises them, small models attend almost evenly and score all tokens almost
alike: rows of a KV cache could be exchanged without changing a single token. Here every weight is
drawn so that attention is peaked and its output outweighs the rest.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 96
NUM_LETTERS = VOCAB_SIZE - 1  # the last token of the vocabulary ends a text
_LETTERS = [chr(32 + i) for i in range(NUM_LETTERS)]  # the printable part of ASCII


@torch.no_grad()
def sharpen(model: PreTrainedModel, *, seed: int = 0, gain: float = 1.5) -> None:
    """Redraw the weights: matrices at `gain` times unit scale, and unequal norms and biases.

    Queries and keys then have a spread of `gain`, so that of hundreds of keys a few win.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(noise * 0.1)


def letter_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A token for each printable character, and the last of the vocabulary as end of text."""
    vocab = {letter: i for i, letter in enumerate(_LETTERS)} | {"<eos>": VOCAB_SIZE - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template=template
    )
