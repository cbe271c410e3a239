"""What an engine's outputs come to, without an engine."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from vkv import SamplingParams
from vkv.runtime.frontend.text_stream import RequestText
from vkv.runtime.request.outputs import Logprob
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.request.step_output import StepOutput


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, whose decoder strips a text's first space."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<0x3F>"))
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _tables(tokens: bytes) -> list[dict[int, Logprob]]:
    """Log probabilities of each token, and of a space in its place."""
    return [{token: Logprob(-1.0, 1), 32: Logprob(-2.0, 2)} for token in tokens]


def _texts(tables: object) -> list[list[str | None]]:
    assert isinstance(tables, tuple)
    return [[entry.decoded_token for entry in table.values()] for table in tables]


def test_tokens_of_prompt_and_output_are_named_where_they_stand(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """A character of several tokens is the last one's, and a space is a space."""
    prompt, output = "a世".encode(), "界b".encode()
    spec = RequestSpec(
        request_id="x",
        prompt_token_ids=list(prompt),
        params=SamplingParams(logprobs=1, prompt_logprobs=1),
    )
    request = RequestText(spec, None, byte_tokenizer)
    for i, token in enumerate(output):
        request.accept(
            StepOutput(
                request_id="x",
                token_ids=(token,),
                logprobs=tuple(_tables(output[i : i + 1])),
                prompt_logprobs=() if i else (None, *_tables(prompt[1:])),
            )
        )
    out = request.output()
    assert out.outputs[0].text == "界b"
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    half = "\ufffd"  # also of a space within a character: with it the bytes are no text
    assert _texts(out.prompt_logprobs[1:]) == [[half, " "], [half, half], ["世", half]]
    assert _texts(out.outputs[0].logprobs) == [[half, " "], [half, half], ["界", half], ["b", " "]]


def test_an_end_that_comes_without_a_token_is_told(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """With the text that was kept back until then, since it could have become a stop string."""
    spec = RequestSpec(
        request_id="x", prompt_token_ids=[97], params=SamplingParams(max_tokens=2, stop="bcd")
    )
    request = RequestText(spec, None, byte_tokenizer)
    request.accept(StepOutput(request_id="x", token_ids=(98, 99)))
    delta = request.take_delta()
    assert delta is not None
    assert delta.token_ids == (98, 99)
    assert delta.text == ""
    request.accept(StepOutput(request_id="x", finish_reason="length"))
    delta = request.take_delta()
    assert delta is not None
    assert (delta.token_ids, delta.text, delta.finish_reason) == ((), "bc", "length")
    assert request.take_delta() is None
