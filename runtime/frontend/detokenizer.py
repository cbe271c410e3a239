"""From tokens to text, one token at a time, with nothing shown that must be taken back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..request.outputs import Logprob

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    AnyTokenizer = PreTrainedTokenizerBase | Tokenizer

_REPLACEMENT = "\ufffd"  # what decoders put where bytes make no character, or not yet

_NUM_CONTEXT_TOKENS = 6
"""Prompt tokens to decode before the output: enough for any decoder's memory of what is left."""

_MAX_SILENT_TOKENS = 16
"""Tokens without text after which they are skipped specials rather than half of something."""


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
        self._token_ids, self._seen = self._context(prompt_token_ids)
        self._num_seen = len(self._token_ids)  # the tokens whose text is `_seen`
        # Where the window begins after its next move, always between characters. The prompt may
        # end within one, so the first move stays behind the prompt's tail.
        self._next_begin = 0

    def append(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        text = self._decode(self._token_ids)
        if text.endswith(_REPLACEMENT):
            return ""  # perhaps half of a character
        new_text = self._unseen(text)
        if new_text:
            self._move()
        elif len(self._token_ids) - self._num_seen > _MAX_SILENT_TOKENS:
            del self._token_ids[self._num_seen :]
        return new_text

    def flush(self) -> str:
        """What is decoded but not returned: a character that was never completed."""
        return self._unseen(self._decode(self._token_ids))

    def _move(self) -> None:
        """Begin the window where the last text began: its end is where the next one will."""
        del self._token_ids[: self._next_begin]
        self._num_seen = self._next_begin = len(self._token_ids)
        self._seen = self._decode(self._token_ids)

    def _unseen(self, text: str) -> str:
        """`text` without what was seen of it."""
        if text.startswith(self._seen):
            return text[len(self._seen) :]
        # Later bytes changed it: they completed a character of the prompt, or spoiled one that
        # is out. What is out stays out.
        return text[len(self._seen.rstrip(_REPLACEMENT)) :]

    def _context(self, prompt_token_ids: Sequence[int]) -> tuple[list[int], str]:
        """The prompt's shortest tail (by doubling) that has text and begins on a character."""
        num_tokens = _NUM_CONTEXT_TOKENS
        while True:
            tail = list(prompt_token_ids[-num_tokens:])
            text = self._decode(tail)
            whole = len(tail) == len(prompt_token_ids)
            if whole or (text and not text.startswith(_REPLACEMENT)):
                return tail, text
            num_tokens *= 2

    def _decode(self, token_ids: list[int]) -> str:
        text = self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        assert isinstance(text, str), "one sequence was decoded, not a batch"
        return text


def decode_logprobs(tokenizer: AnyTokenizer, logprobs: Mapping[int, Logprob]) -> dict[int, Logprob]:
    """The same entries, each with its token's own text, special tokens included."""
    decoder = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return {
        token_id: replace(
            entry, decoded_token=decoder.decode([token_id], skip_special_tokens=False)
        )
        for token_id, entry in logprobs.items()
    }


def _overlap(text: str, string: str) -> int:
    """Length of the longest proper beginning of `string` that `text` ends with."""
    lengths: Iterable[int] = range(min(len(string) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
