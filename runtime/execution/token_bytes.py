"""What each token of a tokenizer is in bytes, and how a text is cut into tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ...vmem.errors import InvalidSamplingParams

SPECIAL = b"\xff"
"""Begins what is no text: no grammar's text has this byte, so such a token is never text in it."""

_NUM_SAMPLES = 512  # tokens of which the tokenizer's own decoder is asked


def token_bytes(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_token_ids: Sequence[int]
) -> list[bytes]:
    """The bytes of each of `vocab_size` tokens, which may be more than the tokenizer's, or fewer.

    Special tokens, those that end an output and ids without a token begin with `SPECIAL`.

    Raises InvalidSamplingParams if the tokenizer's decoder makes of a token what depends on those
    around it, as WordPiece's does: then no grammar can be followed.
    """
    backend = backend_of(tokenizer)
    texts = {i: text for text, i in backend.get_vocab(with_added_tokens=True).items()}
    added = backend.get_added_tokens_decoder()
    spell = _speller(_decoders(backend))
    table: list[bytes] = []
    for i in range(vocab_size):
        if i in added:
            content = added[i].content.encode()
            table.append(SPECIAL + content if added[i].special else content)
        else:
            spelt = spell(texts[i]) if i in texts else None
            table.append(spelt or SPECIAL + b"<%d>" % i)
    for i in end_token_ids:
        if not table[i].startswith(SPECIAL):
            table[i] = SPECIAL + table[i]
    _check(backend, table)
    return table


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer of the `tokenizers` library within. Raises InvalidSamplingParams."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InvalidSamplingParams(
            f"structured_outputs need a tokenizer of the tokenizers library (tokenizer.json), and "
            f"the model's is a {type(tokenizer).__name__}; convert it, or leave them out"
        )
    return backend


class TextCutter:
    """Cuts text into tokens as the model was taught, if that spells the text; or longest first.

    A normaliser may change a text, and a tokenizer put a space before it: such tokens would not be
    what a grammar asks for.

    Attributes:
        longest_first: cuts a text by the longest tokens; set once there is something that can.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, table: Sequence[bytes]) -> None:
        self._backend = _without_prefix(backend_of(tokenizer))
        self._table = table
        self.longest_first: Callable[[str], list[int]] | None = None

    def __call__(self, text: bytes | str) -> list[int]:
        """Token ids that spell a text, up to where the vocabulary lacks what it takes."""
        data = text if isinstance(text, bytes) else text.encode()
        text = data.decode()
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if self.longest_first is not None and self._num_spelt(ids, data) < len(ids):
            ids = self.longest_first(text)
            ids = ids[: self._num_spelt(ids, data)]
        return ids

    def _num_spelt(self, ids: Sequence[int], data: bytes) -> int:
        """How many of the first tokens spell what a text begins with."""
        start = 0
        for n, i in enumerate(ids):
            if i >= len(self._table) or not data.startswith(self._table[i], start):
                return n
            start += len(self._table[i])
        return len(ids)


def _without_prefix(backend: Tokenizer) -> Tokenizer:
    """A copy that puts no space before a text."""
    parts = json.loads(backend.to_str())
    normalizer = parts.get("normalizer") or {}
    kept = [p for p in normalizer.get("normalizers", [normalizer]) if p.get("type") != "Prepend"]
    kept = [part for part in kept if part]
    parts["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    pre_tokenizer = parts.get("pre_tokenizer") or {}
    for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
    copy = Tokenizer.from_str(json.dumps(parts))
    copy.no_truncation()
    copy.no_padding()
    return copy


def _decoders(backend: Tokenizer) -> list[dict[str, Any]]:
    """The parts of a tokenizer's decoder, in order."""
    decoder = json.loads(backend.to_str())["decoder"]
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _speller(decoders: Sequence[dict[str, Any]]) -> Callable[[str], bytes | None]:
    """From a token as the vocabulary has it to its bytes, or None if it has none."""
    kinds = {decoder["type"] for decoder in decoders}
    unknown = kinds - {"ByteLevel", "ByteFallback", "Replace", "Metaspace", "Fuse", "Strip"}
    if not kinds or unknown:
        named = ", ".join(sorted(unknown)) or "none"
        raise InvalidSamplingParams(
            f"structured_outputs do not know what single tokens mean to this model's tokenizer "
            f"(its decoder is {named}); leave them out"
        )
    if "ByteLevel" in kinds:
        letters = _byte_letters()
        return lambda text: _from_letters(text, letters)
    replaced = [
        (decoder["pattern"].get("String"), decoder["content"])
        for decoder in decoders
        if decoder["type"] == "Replace"
    ]
    replaced += [(d["replacement"], " ") for d in decoders if d["type"] == "Metaspace"]

    def spell(text: str) -> bytes:
        if "ByteFallback" in kinds and len(text) == 6 and text.startswith("<0x"):
            return bytes.fromhex(text[3:5])
        for old, new in replaced:
            if old:
                text = text.replace(old, new)
        return text.encode()

    return spell


def _byte_letters() -> dict[str, int]:
    """The byte that each letter stands for in a vocabulary of bytes, as GPT-2's tokenizer has it:
    visible Latin-1 characters for themselves, further ones for the rest in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(256 + n): byte for n, byte in enumerate(rest)}


def _from_letters(text: str, letters: dict[str, int]) -> bytes | None:
    if not all(letter in letters for letter in text):
        return None
    return bytes(letters[letter] for letter in text)


def _check(backend: Tokenizer, table: Sequence[bytes]) -> None:
    """Ask the tokenizer's own decoder what some of the tokens are, behind a token of text."""
    whole = [i for i, data in enumerate(table) if not data.startswith(SPECIAL) and _is_text(data)]
    if not whole:
        raise InvalidSamplingParams(
            "structured_outputs need tokens that are text, and this model's tokenizer has none; "
            "leave them out"
        )
    anchor = next((i for i in whole if table[i].isalnum()), whole[0])
    seen = backend.decode([anchor, anchor], skip_special_tokens=False)
    for i in whole[:: max(1, len(whole) // _NUM_SAMPLES)]:
        text = backend.decode([anchor, anchor, i], skip_special_tokens=False)
        if text != seen + table[i].decode():
            raise InvalidSamplingParams(
                f"structured_outputs do not know what token {i} of this model's tokenizer means: "
                f"{table[i]!r} by its name, {text[len(seen) :]!r} when decoded; leave them out"
            )


def _is_text(data: bytes) -> bool:
    try:
        return "\ufffd" not in data.decode()
    except UnicodeDecodeError:
        return False
