"""Tokenizers of the kinds that models have, small enough to be made in a test."""

import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_TEXT = [
    'The {"name": "value", "age": 12, "tags": ["a", "b"], "nested": {"x": null, "y": true}} of it',
    'Grüße an alle, ein naïves Café; 日本語も少し。 0123456789 {"key": [1, 2, 3], "other": false}',
    "def function(argument): return argument + 1  # and so on and so forth, yes or no or maybe",
]


def byte_level(vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """As of Llama 3 and Qwen: byte-pair encoding over bytes; `<end>` and `<turn>` end an output."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<end>", "<turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama 2 and Gemma: pieces with `▁` for a space, one before a text, and tokens of bytes
    for characters that no piece has."""
    specials = ["<unk>", "<s>", "</s>"]
    spelt = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [
        "▁",
        "▁the",
        "▁a",
        '":',
        '▁"',
        "na",
        "me",
        "name",
        "12",
        '{"',
        '"}',
        "▁{",
        "日本",
        "é",
    ]
    letters = [chr(code) for code in range(0x21, 0x7F)]
    tokens = [*specials, *spelt, *pieces, *letters]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [("n", "a"), ("m", "e"), ("na", "me"), ("1", "2"), ('"', ":"), ("{", '"'), ('"', "}")]
    merges += [("▁", '"'), ("▁", "a"), ("▁", "{")]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(parts)  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


def word_piece() -> PreTrainedTokenizerFast:
    """As of BERT: what a token's text is depends on the one before it."""
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, "<end>": 3}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_level_of_size(vocab_size: int) -> PreTrainedTokenizerFast:
    """As `byte_level`, with random words up to a size that no text was read for."""
    rng = random.Random(0)
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: i for i, token in enumerate(["<pad>", "<end>", "<turn>", *sorted(letters)])}
    common = "etaoinshrdlucmfwypvbgkETAOINSHR0123456789"
    while len(vocab) < vocab_size:
        word = "".join(rng.choices(common, k=rng.randint(2, 7)))
        start, end = rng.choice(["Ġ", ""]), rng.choice([*[""] * 9, '"', '":', '",', "}"])
        vocab.setdefault(start + word + end, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<pad>", "<end>", "<turn>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
