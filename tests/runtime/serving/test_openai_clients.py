"""OpenAI's own client, unchanged, against the server."""

import asyncio

import openai
import pytest
from served import Served
from vkv import LLM, SamplingParams

QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def answer() -> str:
    """What the library answers."""
    with LLM(device="cpu") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=32)
        (output,) = llm.chat(QUESTION, params)
    return output.outputs[0].text


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


def test_chat(client: openai.OpenAI, answer: str) -> None:
    whole = client.chat.completions.create(
        model="tiny-chat", messages=QUESTION, temperature=0, max_completion_tokens=32
    )
    assert whole.choices[0].message.content == answer
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_chat_stream(client: openai.OpenAI, answer: str) -> None:
    stream = client.chat.completions.create(
        model="tiny-chat",
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert [bool(c.usage) for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len({c.id for c in chunks}) == 1


def test_chat_stream_without_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny-chat", messages=QUESTION, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    def entries(stream: bool) -> list[object]:
        given = client.chat.completions.create(
            model="tiny-chat",
            messages=QUESTION,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
            stream=stream,
        )
        if not stream:
            return given.choices[0].logprobs.content
        return [e for c in given for e in (c.choices[0].logprobs or _NONE).content]

    whole, streamed = entries(False), entries(True)
    assert [e.token for e in whole] == [e.token for e in streamed]
    for entry in whole:
        assert len(entry.top_logprobs) == 3
        assert bytes(entry.bytes).decode() == entry.token
        best = max(top.logprob for top in entry.top_logprobs)
        assert entry.logprob == pytest.approx(best, abs=1e-5)  # it is greedy


class _NONE:
    content: tuple[()] = ()


def test_several_outputs(client: openai.OpenAI) -> None:
    asked = {"model": "tiny-chat", "messages": QUESTION, "n": 3, "seed": 5, "temperature": 1.5}
    whole = client.chat.completions.create(**asked)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in whole.choices]


def test_completions(client: openai.OpenAI) -> None:
    asked = {"model": "tiny-chat", "temperature": 0, "max_tokens": 6}
    prompts = ["3 + 4 =", "hello"]
    whole = client.completions.create(**asked, prompt=prompts)
    texts = ["", ""]
    for chunk in client.completions.create(**asked, prompt=prompts, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    with LLM(device="cpu") as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=6))
    assert texts == [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_echo_with_logprobs(client: openai.OpenAI, served: Served, max_tokens: int) -> None:
    """What lm-eval scores texts by: a prompt in tokens, echoed with its log probabilities."""
    text = "3 + 4 = 7. hello"
    tokens = served.client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    asked = {"model": "tiny-chat", "prompt": [tokens], "max_tokens": max_tokens, "temperature": 0}
    choice = client.completions.create(**asked, logprobs=1, echo=True).choices[0]
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset)
    assert len(told.tokens) == len(tokens) + max_tokens
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    assert choice.text.lstrip().startswith(text)  # its tokenizer puts a space in front
    with LLM(device="cpu") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        (output,) = llm.generate([tokens], params)
    expected = [t[i].logprob for t, i in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]
    assert told.token_logprobs[1 : len(tokens)] == pytest.approx(expected, abs=1e-4)


def test_refusals_name_the_field(client: openai.OpenAI) -> None:
    for more, words in {
        "suffix": ({"suffix": "x"}, "fill no gap"),
        "best_of": ({"best_of": 2}, "use n"),
        "temperature": ({"temperature": -1}, "temperature = -1"),
        "top_p": ({"top_p": 0}, "top_p"),
        "logit_bias": ({"logit_bias": {"x": 1}}, "no token id"),
        "n": ({"n": 1000}, "16 outputs"),
        "unknown": ({"extra_body": {"temprature": 1}}, "did you mean 'temperature'"),
    }.values():
        with pytest.raises(openai.BadRequestError, match=words):
            client.completions.create(model="tiny-chat", prompt="hello", **more)


def test_async_client(served: Served, answer: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            wholes = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="tiny-chat", messages=QUESTION, temperature=0
                    )
                    for _ in range(12)
                )
            )
        return [whole.choices[0].message.content for whole in wholes]

    assert asyncio.run(ask()) == [answer] * 12
