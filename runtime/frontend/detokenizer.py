"""From tokens to text, one token at a time, with nothing shown that must be taken back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..request.outputs import Logprob

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    AnyTokenizer = PreTrainedTokenizerBase | Tokenizer

_REPLACEMENT = "\ufffd"  # what decoders put where bytes make no character, or not yet

_NUM_CONTEXT_TOKENS = 6
"""Prompt tokens to decode before the output: enough for any decoder's memory of what is left."""

_MOST_CONTEXT_TOKENS = 64
"""Tokens before a single one to look at, at most: with special tokens shown, few have no text."""

_MAX_SILENT_TOKENS = 16
"""Tokens without text after which they are skipped specials rather than half of something."""

_MOST_BYTES = 4
"""Of a character; a token has one at least, or no text."""


class IncrementalDetokenizer:
    """The text of one sequence as its tokens arrive.

    `append` and `finish` return only text that is final: no half of a character, and nothing
    that may turn out to be the beginning of a stop string. What they returned, joined, is `text`,
    and it equals `decode(prompt + output)` without `decode(prompt)`, up to the stop string.
    (A character that the prompt's tokens begin and the output's complete counts as output.)

    A token that ends the sequence and shall not be seen is simply not appended.
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer | None,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """Begin after `prompt_token_ids`; without a tokenizer there is no text.

        A stop string that is complete before token number `min_tokens` does not stop.
        """
        assert tokenizer is not None or not stop, "stop strings need a tokenizer"
        self._window = None
        if tokenizer is not None:
            self._window = _DecodeWindow(tokenizer, prompt_token_ids, skip_special_tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._text = ""  # all that is decoded, of which the first `_num_shown` characters are out
        self._num_shown = 0
        self._stopped: str | None = None

    @property
    def text(self) -> str:
        """All that was returned so far."""
        return self._text[: self._num_shown]

    def text_from(self, start: int) -> str:
        """What was returned behind the first `start` characters."""
        return self._text[start : self._num_shown]

    @property
    def num_characters(self) -> int:
        """Of all that was returned so far."""
        return self._num_shown

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stopped

    def append(self, token_id: int) -> str:
        """Take the next token; return the text that became safe to show, often empty."""
        self._num_tokens += 1
        if self._window is None or self._stopped is not None:
            return ""
        self._accept(self._window.append(token_id))
        return self._show(len(self._text) - self._num_held())

    def finish(self) -> str:
        """Return what was held back; what is appended after this has no text."""
        if self._window is not None and self._stopped is None:
            self._accept(self._window.flush())
        self._window = None
        return self._show(len(self._text))

    def _accept(self, new_text: str) -> None:
        """Add decoded text; if a stop string is complete in it, cut there and stop.

        The stop string that is complete first wins, then the longest: what one would find going
        character by character, so that it does not matter how the text is cut into tokens.
        """
        num_searched = len(self._text)
        self._text += new_text
        if not new_text or self._num_tokens < self._min_tokens:
            return
        found: list[tuple[int, int, str]] = []
        for string in self._stop:
            start = self._text.find(string, max(0, num_searched - len(string) + 1))
            if start >= 0:
                found.append((start + len(string), start, string))
        if found:
            end, start, self._stopped = min(found)
            self._text = self._text[: end if self._include_stop else start]

    def _num_held(self) -> int:
        """Length of the text's longest ending that may yet grow into a stop string."""
        if self._stopped is not None or self._include_stop:
            return 0  # nothing more comes, or it would be shown all the same
        return max((_overlap(self._text, string) for string in self._stop), default=0)

    def _show(self, num_shown: int) -> str:
        new_text = self._text[self._num_shown : num_shown]
        self._num_shown = num_shown
        return new_text


class _DecodeWindow:
    """Decodes the last few tokens again with each new one, and returns the difference.

    A token's text depends on its neighbours: a character may span tokens, and a word's leading
    space shows only after another word. Hence tokens are decoded behind those before them, and
    only the growth counts. The window moves on whenever its text ends on a whole character, so
    a step costs a handful of tokens however long the text.

    This is what `tokenizers.decoders.DecodeStream` does too. It is done here because that can
    neither flush what it holds, nor go on after bytes that make no character, nor serve
    tokenizers written in Python; a step takes a few microseconds.
    """

    def __init__(
        self, tokenizer: AnyTokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        # The Rust tokenizer inside, if there is one: the wrapper takes ten times as long.
        self._decoder = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._skip_special_tokens = skip_special_tokens
        self._token_ids, self._seen = _context(self._decode, prompt_token_ids)
        self._num_seen = len(self._token_ids)  # the tokens whose text is `_seen`
        # Where the window begins after its next move, always between characters. The prompt may
        # end within one, so the first move stays behind the prompt's tail.
        self._next_begin = 0

    def append(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        text = self._decode(self._token_ids)
        is_silent = len(self._token_ids) - self._num_seen > _MAX_SILENT_TOKENS
        if text.endswith(_REPLACEMENT):  # perhaps half of a character
            return self._give_up(text) if is_silent else ""
        new_text = self._unseen(text)
        if new_text:
            self._move()
        elif is_silent:
            del self._token_ids[self._num_seen :]
        return new_text

    def flush(self) -> str:
        """What is decoded but not returned: a character that was never completed."""
        return self._unseen(self._decode(self._token_ids))

    def _give_up(self, text: str) -> str:
        """What is final of bytes that make no characters: all but the last, which may begin one.

        Else the window would grow as long as such bytes come, and all of it be decoded for each.
        """
        for num_left in range(_MOST_BYTES - 1, 2 * _MOST_BYTES):
            left = self._token_ids[-num_left:]
            final = self._decode(self._token_ids[:-num_left])
            if text.startswith(final):  # no character goes through the cut
                new_text = self._unseen(final)
                # So many bytes behind any cut, what is a character does not depend on the cut.
                self._token_ids = self._token_ids[:-num_left][-2 * _MOST_BYTES :]
                self._num_seen, self._next_begin = len(self._token_ids), 0
                self._seen = self._decode(self._token_ids)
                self._token_ids += left
                return new_text
        return ""

    def _move(self) -> None:
        """Begin the window where the last text began: its end is where the next one will."""
        del self._token_ids[: self._next_begin]
        self._num_seen = self._next_begin = len(self._token_ids)
        self._seen = self._decode(self._token_ids)

    def _unseen(self, text: str) -> str:
        return _growth(self._seen, text)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return _text(self._decoder, token_ids, self._skip_special_tokens)


class TokenTexts:
    """The texts of single tokens where they stand, special tokens included.

    A token's text depends on those before it: the first word of a text often loses its leading
    space, and a character may span tokens. Hence each is what the decoded text grows by, behind the
    last few tokens. A character is the text of its last token; those before show a replacement.

    Args:
        tokenizer: None for no texts.
        before: the tokens before the first position.
    """

    def __init__(self, tokenizer: AnyTokenizer | None, before: Sequence[int] = ()) -> None:
        self._decoder = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._before = deque(before[-_MOST_CONTEXT_TOKENS:], maxlen=_MOST_CONTEXT_TOKENS)

    def fill(self, table: dict[int, Logprob]) -> dict[int, Logprob]:
        """The entries of this position, each with its token's text."""
        if self._decoder is None:
            return table
        context, seen = _context(self._decode, tuple(self._before))
        num_whole = len(context)
        while num_whole and seen.endswith(_REPLACEMENT):  # perhaps half of a character
            num_whole -= 1
            seen = self._decode(context[:num_whole])
        texts: dict[int, Logprob] = {}
        for token_id, entry in table.items():
            text = _growth(seen, self._decode([*context, token_id]))
            if text.startswith(_REPLACEMENT):  # for the tokens before, too, of the same character
                text = text.lstrip(_REPLACEMENT) or _REPLACEMENT
            texts[token_id] = replace(entry, decoded_token=text)
        return texts

    def advance(self, token_id: int) -> None:
        """Go on to the next position; this one's token is `token_id`."""
        self._before.append(token_id)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return _text(self._decoder, token_ids, skip_special_tokens=False)


def _text(decoder: Any, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
    text = decoder.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str), "one sequence was decoded, not a batch"
    return text


def _context(
    decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]
) -> tuple[list[int], str]:
    """The shortest tail (by doubling) that has text and begins on a character, and its text."""
    num_tokens = _NUM_CONTEXT_TOKENS
    while True:
        tail = list(token_ids[-num_tokens:])
        text = decode(tail)
        whole = len(tail) == len(token_ids)
        if whole or (text and not text.startswith(_REPLACEMENT)):
            return tail, text
        num_tokens *= 2


def _growth(seen: str, text: str) -> str:
    """`text` without what was seen of it."""
    if text.startswith(seen):
        return text[len(seen) :]
    # Later bytes changed it: they completed a character of the context, or spoiled one that is
    # out. What is out stays out.
    return text[len(seen.rstrip(_REPLACEMENT)) :]


def _overlap(text: str, string: str) -> int:
    """Length of the longest proper beginning of `string` that `text` ends with."""
    lengths: Iterable[int] = range(min(len(string) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
