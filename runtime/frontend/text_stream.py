"""A request as its caller sees it: tokens that an engine gives, and the text they come to.

The engine knows tokens alone. Text, stop strings and the texts of log probabilities are made here,
in the caller's process: for `LLM` by whichever thread turned the loop, for `AsyncLLM` on the event
loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ...vmem.errors import VkvError
from ..engine.messages import Finish, Message
from ..request.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestOutput,
)
from ..request.spec import RequestSpec
from ..request.step_output import StepOutput
from .detokenizer import IncrementalDetokenizer, TokenTexts
from .request_times import RequestTimes


@dataclass(frozen=True, kw_only=True)
class StreamDelta:
    """What a streamed output got since the last one; `str(delta)` is its text.

    Attributes:
        text: text that became final, often empty.
        token_ids: tokens since the last delta.
        finish_reason: why it ended; None before the end.
        stop_reason: the stop token or string that ended it.
        index: which of the request's outputs.
        logprobs: for each of the tokens, where asked.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    index: int = 0
    logprobs: tuple[dict[int, Logprob], ...] | None = None

    def __str__(self) -> str:
        return self.text


class SequenceText:
    """One of a request's outputs, as it comes."""

    def __init__(
        self, index: int, spec: RequestSpec, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        params = spec.params
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self._cumulative_logprob = 0.0
        self._logprobs: list[dict[int, Logprob]] = []
        self._asks_logprobs = params.logprobs is not None
        self._num_shown_tokens = self._num_shown_characters = 0  # by `take_delta`
        self._is_end_shown = False
        self._texts = TokenTexts(tokenizer, spec.prompt_token_ids)
        self._shows_stop = params.include_stop_str_in_output
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            spec.prompt_token_ids,
            stop=params.stop_strings,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )

    @property
    def text(self) -> str:
        """Text that is final so far."""
        return self._detokenizer.text

    def accept(self, output: StepOutput) -> bool:
        """Take what an engine gave; True if a stop string ended the text before the engine did."""
        if self.finish_reason is not None:
            return False
        self.token_ids += output.token_ids
        for token_id, table in zip(output.token_ids, output.logprobs, strict=False):
            self._cumulative_logprob += table[token_id].logprob
            self._logprobs.append(self._texts.fill(table))
            self._texts.advance(token_id)
        ends_by_token = output.finish_reason == "stop" and not output.ends_with_text
        hides_last = ends_by_token and not self._shows_stop
        shown = output.token_ids[:-1] if hides_last else output.token_ids
        for token_id in shown:
            self._detokenizer.append(token_id)
        if output.finish_reason is not None:
            self._detokenizer.finish()
        if self._detokenizer.stopped is not None:
            self.finish_reason, self._stop_reason = "stop", self._detokenizer.stopped
            return output.finish_reason is None
        self.finish_reason, self._stop_reason = output.finish_reason, output.stop_reason
        return False

    def take_delta(self) -> StreamDelta | None:
        """What came since the last call; None if that is nothing."""
        tokens, text = self.token_ids, self._detokenizer
        is_over = self.finish_reason is not None
        if len(tokens) == self._num_shown_tokens and self._is_end_shown == is_over:
            return None
        start, before = self._num_shown_tokens, self._num_shown_characters
        self._num_shown_tokens, self._num_shown_characters = len(tokens), text.num_characters
        self._is_end_shown = is_over
        return StreamDelta(
            text=text.text_from(before),
            token_ids=tuple(tokens[start:]),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            index=self.index,
            logprobs=tuple(self._logprobs[start:]) if self._asks_logprobs else None,
        )

    def output(self) -> CompletionOutput:
        """All there is so far."""
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=tuple(self.token_ids),
            cumulative_logprob=self._cumulative_logprob if self._asks_logprobs else None,
            logprobs=tuple(self._logprobs) if self._asks_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )


class RequestText:
    """A request and all of its outputs, as they come.

    One thread at a time may use it; `is_finished` and `num_output_tokens` any thread may read.

    Args:
        spec: what the engine is asked.
        prompt: its text, if it was given as one.
        tokenizer: None for a model without one: there is no text then.

    Attributes:
        error: what ended one of the outputs, or None.
    """

    def __init__(
        self, spec: RequestSpec, prompt: str | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.spec = spec
        self.error: VkvError | None = None
        self._prompt = prompt
        self._asks_prompt_logprobs = spec.params.prompt_logprobs is not None
        self._prompt_texts = TokenTexts(tokenizer)
        self._sequences = [SequenceText(i, spec, tokenizer) for i in range(spec.params.n)]
        self._num_unfinished = len(self._sequences)
        self._prompt_logprobs: list[dict[int, Logprob] | None] = []
        self._num_cached: int | None = None
        self._times = RequestTimes(spec)

    @property
    def is_finished(self) -> bool:
        """True once no more will come."""
        return not self._num_unfinished

    @property
    def is_aborted(self) -> bool:
        """True if somebody ended it before its time."""
        return any(sequence.finish_reason == "abort" for sequence in self._sequences)

    @property
    def num_output_tokens(self) -> int:
        """Of all outputs together, so far."""
        return sum(len(sequence.token_ids) for sequence in self._sequences)

    def accept(self, output: StepOutput) -> Sequence[Message]:
        """Take what an engine gave; returns what the engine is to be told."""
        sequence = self._sequences[output.index]
        if sequence.finish_reason is not None:
            return ()  # computed behind a stop string
        self._times.note(output)
        if output.num_cached_tokens is not None and output.index == 0:
            self._num_cached = output.num_cached_tokens
        self._take_prompt_logprobs(output.prompt_logprobs)
        if output.failure is not None:
            self.error = self.error or output.failure.error()
        ended_by_text = sequence.accept(output)
        if sequence.finish_reason is not None:
            self._times.finished_ts = output.time_s
            self._num_unfinished -= 1  # last: others read it without a lock
        return (Finish(output.request_id, output.index),) if ended_by_text else ()

    def fail(self, error: VkvError) -> None:
        """End all that is unfinished by an error."""
        self.error = self.error or error
        self._end("error")

    def abort(self) -> None:
        """End all that is unfinished, of a request that no engine has."""
        self._end("abort")

    def _end(self, reason: FinishReason) -> None:
        for sequence in self._sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = reason
        self._num_unfinished = 0

    def output(self, request_id: str | None = None) -> RequestOutput:
        """All there is so far, under the engine's name for the request or another."""
        spec = self.spec
        return RequestOutput(
            request_id=spec.request_id if request_id is None else request_id,
            prompt=self._prompt,
            prompt_token_ids=tuple(spec.prompt_token_ids),
            prompt_logprobs=tuple(self._prompt_logprobs) if self._asks_prompt_logprobs else None,
            outputs=tuple(sequence.output() for sequence in self._sequences),
            finished=self.is_finished,
            num_cached_tokens=self._num_cached,
            metrics=self._times.metrics(self.num_output_tokens, finished=self.is_finished),
            error=self.error,
        )

    @property
    def prompt(self) -> str | None:
        """The prompt's text; None where it came as token ids alone."""
        return self._prompt

    @property
    def last_token_s(self) -> float | None:
        """When the last token came, on the monotonic clock; None before the first."""
        return self._times.last_token_ts

    @property
    def num_cached_tokens(self) -> int | None:
        """Prompt tokens that needed no computing; None before it is scheduled."""
        return self._num_cached

    def take_delta(self) -> StreamDelta | None:
        """What the first output got since the last call, be it no more than its end; None if that
        is nothing, or an error."""
        delta = self._sequences[0].take_delta()
        if delta is not None and not delta.token_ids and delta.finish_reason == "error":
            return None
        return delta

    def take_deltas(self) -> list[StreamDelta]:
        """What each output got since the last call, those with nothing left out."""
        deltas = (sequence.take_delta() for sequence in self._sequences)
        return [delta for delta in deltas if delta is not None]

    def _take_prompt_logprobs(self, tables: Sequence[dict[int, Logprob] | None]) -> None:
        tokens = self.spec.prompt_token_ids[len(self._prompt_logprobs) :]
        for token_id, table in zip(tokens, tables, strict=False):
            texts = self._prompt_texts
            self._prompt_logprobs.append(None if table is None else texts.fill(table))
            texts.advance(token_id)
