"""Builds the tokenizer: byte-level BPE, lower case, digits in pairs, and the chat template.

Every word carries its leading space, also at the start of a message, so that a word is the same
token wherever it stands. Any UTF-8 text can be encoded; case and runs of spaces are not kept.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, USER, ASSISTANT, SYSTEM, END = (
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
)
SPECIAL_TOKENS = [PAD, USER, ASSISTANT, SYSTEM, END]

# Each message renders by itself, so a longer conversation only appends to a shorter one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_WORDS = Regex(r"'(?:s|t|m|d|re|ve|ll)\b| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]")


def _normalizer() -> normalizers.Normalizer:
    """Lower case, one space between words, one before each number and around operators."""
    spaced = [
        (r"(?<=\d)\s*\+\s*(?=\d)", " + "),
        (r"(?<=\d)\s*[*×]\s*(?=\d)", " * "),
        (r"(?<=\d)\s*[-−]\s*(?=\d)", " - "),
        (r"(?<=[\p{L}=#(]|\p{L}:)(?=\d)", " "),
        (r"[’`]", "'"),
        (r"\s+", " "),
    ]
    return normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Strip(left=True, right=True),
            normalizers.Prepend(" "),
            *(normalizers.Replace(Regex(pattern), text) for pattern, text in spaced),
        ]
    )


def build_tokenizer(corpus: Iterable[str], *, vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """Train the BPE merges on `corpus` (plain message texts) and attach the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Every one- and two-digit group, alone and after another group, becomes one token,
    # and so does every single letter.
    numbers = [f"{i:02d}{j:02d}" for i in range(100) for j in range(100)]
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789") * 200
    tokenizer.train_from_iterator([*corpus, *numbers, *letters], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
