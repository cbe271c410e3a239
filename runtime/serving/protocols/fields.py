"""Fields that the protocols share: what chooses tokens, under vLLM's names."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...frontend.prompts import Standing
from ...request.sampling_params import SamplingParams
from ..http.errors import ApiError

HARMLESS = "Taken, and of no effect here."


class Strict(BaseModel):
    """Fields of a request; what is not among them is refused by name."""

    model_config = ConfigDict(extra="forbid")

    not_here: ClassVar[dict[str, str]] = {}
    """Fields that others have, and what to do without them."""

    @model_validator(mode="before")
    @classmethod
    def _leave_nulls_out(cls, given: Any) -> Any:
        """A field that is null asks for nothing: clients write those that were not given so."""
        if not isinstance(given, dict):
            return given
        return {k: v for k, v in given.items() if v is not None or k in cls.model_fields}


class StreamOptions(Strict):
    """`stream_options` of OpenAI's API, and vLLM's addition."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: bool | None = Field(None, description=HARMLESS)


class Asked(Strict):
    """What each protocol may be asked of an answer."""

    model: str | None = Field(
        None, description="One of /v1/models, adapters included; or the first."
    )
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = Field(
        None, min_length=1, max_length=1024, description="Prefixes are shared within it alone."
    )
    priority: int | None = Field(
        None, description="The lower, the earlier; 0 alone unless the server goes by priorities."
    )
    request_id: str | None = Field(None, min_length=1, max_length=128)
    stream: bool | None = False
    user: str | None = Field(None, description=HARMLESS)


class Sampling(Asked):
    """How tokens are chosen: OpenAI's fields and vLLM's."""

    not_here: ClassVar[dict[str, str]] = {
        "best_of": "use n, and choose among the answers by their log probabilities",
        "use_beam_search": "there is no beam search; use n with a temperature",
        "length_penalty": "there is no beam search; leave it out",
        "logits_processors": "use logit_bias, allowed_token_ids or bad_words",
        "guided_json": "use structured_outputs: {'json': …}, or response_format",
        "guided_regex": "use structured_outputs: {'regex': …}",
        "guided_choice": "use structured_outputs: {'choice': […]}",
        "guided_grammar": "use structured_outputs: {'grammar': …}",
        "mm_processor_kwargs": "models take text alone here; leave it out",
        "prompt_embeds": "prompts are texts or token ids",
        "kv_transfer_params": "keys and values stay in this process; leave it out",
        "vllm_xargs": "nothing would read them; leave it out",
        "repetition_detection": "use repetition_penalty, frequency_penalty or stop",
        "logprob_token_ids": "use logprobs with a number of tokens",
    }

    n: int | None = 1
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    session_id: str | None = Field(None, description=HARMLESS)

    def standing(self, tenant: str) -> Standing:
        """Where the request stands among others. Raises InvalidSamplingParams."""
        return Standing(priority=self.priority or 0, tenant=tenant)

    def sampling_values(self) -> dict[str, Any]:
        """What was given of `SamplingParams`, under its names. Raises ApiError."""
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError(
                400,
                f"prompt_logprobs is {self.prompt_logprobs} in a stream, whose chunks have none; "
                "leave one of them out",
                "invalid_value",
                "prompt_logprobs",
            )
        values = {
            name: value
            for name in SAMPLING_NAMES
            if (value := getattr(self, name)) is not None and name in self.model_fields_set
        }
        if self.logit_bias is not None:
            values["logit_bias"] = _biases(self.logit_bias)
        return values


SAMPLING_NAMES = tuple(
    name for name in SamplingParams.__dataclass_fields__ if name in Sampling.model_fields
)


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError as error:
        raise ApiError(
            400,
            f"logit_bias has a key that is no token id: {error}",
            "invalid_value",
            "logit_bias",
        ) from error
