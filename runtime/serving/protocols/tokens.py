"""`/tokenize` and `/detokenize`, as vLLM's."""

from typing import Any

from fastapi import APIRouter, Response
from pydantic import Field

from ...frontend.chat_template import ChatOptions
from ...frontend.tokenizer import encode
from ..http.errors import ApiError
from ..http.streams import json_response
from ..server import Server, check_own_template
from .fields import Strict
from .shapes.base import described
from .shapes.others import Text, Tokens


class TokenizeRequest(Strict):
    """A text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(Strict):
    """Tokens."""

    model: str | None = None
    tokens: list[int]


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["vLLM"])

    @routes.post("/tokenize", response_model=None, responses=described(Tokens, 404, body=True))
    async def tokenize(asked: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation as the model reads it."""
        tokenizer = _tokenizer(server, asked.model)
        tokens = await server.prepare(
            lambda: _tokens(server, asked), len(asked.prompt or "") or 1 << 20
        )
        told: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": server.face.admission.max_len,
            "tokens": tokens,
            "token_strs": None,
        }
        if asked.return_token_strs:
            told["token_strs"] = tokenizer.convert_ids_to_tokens(tokens)
        return json_response(told)

    @routes.post("/detokenize", response_model=None, responses=described(Text, 404, body=True))
    async def detokenize(asked: DetokenizeRequest) -> Response:
        """The text of token ids."""
        tokenizer = _tokenizer(server, asked.model)
        vocab_size = server.face.admission.vocab_size
        for token in asked.tokens:
            if not 0 <= token < vocab_size:
                raise ApiError(
                    400,
                    f"token id {token} is not in [0, {vocab_size})",
                    "invalid_value",
                    "tokens",
                )
        text = await server.prepare(lambda: tokenizer.decode(asked.tokens), len(asked.tokens))
        return json_response({"prompt": text})

    return routes


def _tokenizer(server: Server, model: str | None) -> Any:
    """The tokenizer of a model, or of the one that an adapter is of. Raises ApiError."""
    name = server.model_name(model)
    tokenizer = server.requests.front_end.tokenizer_of(server.maker(model).model)
    if tokenizer is None:
        raise ApiError(400, f"{name} has no tokenizer; send prompts as token ids")
    return tokenizer


def _tokens(server: Server, asked: TokenizeRequest) -> list[int]:
    front_end = server.requests.front_end
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "give either a prompt or messages", "invalid_value", "prompt")
    if asked.prompt is not None:
        return encode(
            _tokenizer(server, asked.model),
            asked.prompt,
            what="the prompt",
            add_special_tokens=asked.add_special_tokens is not False,
        )
    if asked.add_special_tokens:
        raise ApiError(
            400,
            "add_special_tokens is true, but a template writes a conversation's special tokens; "
            "leave it out",
            "invalid_value",
            "add_special_tokens",
        )
    check_own_template(server, asked.chat_template)
    options = ChatOptions()
    for name in ("tools", "chat_template", "chat_template_kwargs", "add_generation_prompt"):
        if (value := getattr(asked, name)) is not None:
            options[name] = value
    if asked.continue_final_message:
        options["continue_final_message"] = True
    model = server.maker(asked.model).model
    return front_end.render_chat(asked.messages or [], options, model)
