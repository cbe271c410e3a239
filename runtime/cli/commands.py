"""What each command of `vkv` can be told, and what it starts.

Fields of `EngineConfig` and `SamplingParams` are picked by name: types, defaults and, where nothing
else is said here, help are theirs.
"""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Flag, Options, TypedOptions, function, option

if TYPE_CHECKING:
    from ...quant import FormatName
    from ...quant.quantise.model import Method
    from ..engine.config import EngineConfig
    from ..frontend.llm import LLM
    from ..request.sampling_params import SamplingParams

Command = Callable[..., None]

_ENGINE = ("lm_head_bits", "activation_bits", "max_len")
_SAMPLING = {  # without a default: what is not typed is the model's to say, and greedy else
    "temperature": Flag(default=None, help="0 is greedy. Default: the model's own, or 0."),
    "top_p": Flag(default=None),
    "top_k": Flag(default=None),
    "min_p": Flag(default=None),
    "repetition_penalty": Flag(default=None),
    "seed": Flag(default=None),
}
SPECULATION = {
    "speculative": Flag(
        default=None,
        kind=str,
        help="Guess tokens ahead: ngram, from the text so far; surrogate or surrogate:0.5, by half "
        "of the model's layers; or a folder, by the smaller model there. The answers are the same, "
        "sooner where guesses are right.",
    ),
    "speculative_tokens": Flag(help="The most tokens of a request that are guessed at once."),
}
_ENGINE_SAID = {  # better than the library says it
    "kv_memory": Flag(help="The most memory KV may take, such as 64MiB. Taken only as it is used."),
    "swap_memory": Flag(
        default=None, kind=str, help="Host memory for KV that leaves --kv-memory, such as 8GiB."
    ),
    "kv_dir": Flag(default=None, kind=str, help="A folder that KV is saved to, and comes from."),
    "attention": Flag(help="An attention backend (see `vkv info`), or auto."),
    "kv": Flag(help="virtual: contiguous slots; paged: the baseline."),
    "generation_config": Flag(help="auto: sample as the model's authors say; vllm: do not."),
    **SPECULATION,
}
_DEVICE = "auto, cpu or cuda."
_DTYPE = "auto (the checkpoint's), float32, bfloat16 or float16."


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, and where."""

    model: str | None = option(
        None,
        names=("--model", "-m"),
        help="A model folder, GGUF file or hub id, or with --zoo a name in that. Default: the "
        "built-in tiny model.",
    )
    zoo: str | None = option(None, help="A zoo of blocks that has the model (see `vkv blocks`).")
    device: str = option("auto", help=_DEVICE)
    dtype: str = option("auto", help=_DTYPE)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What is a chat's own."""

    system: str | None = option(None, help="A system message to begin with.")
    session: Path | None = option(
        None, help="A file to keep the conversation in, and to go on from; made if absent."
    )


@dataclass(frozen=True, kw_only=True)
class Generate:
    """What is `vkv generate`'s own."""

    prompts: list[str] | None = option(
        None, is_argument=True, help="Prompts. Without any, each line of standard input."
    )
    as_chat: bool = option(
        False, names=("--chat",), help="Each prompt is a user's message, not raw text."
    )
    as_json: bool = option(False, names=("--json",), help="One JSON object a prompt.")


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """What `vkv quantize` does.

    Attributes:
        calibration: a text file, UTF-8; None rounds every weight by itself.
        sequence_tokens: length of a calibration sequence, at most what the model was made for.
        num_sequences: calibration sequences at most, and as many to measure perplexity on.
    """

    model: str = option(is_argument=True, help="A dense model: a folder or a hub id.")
    out: Path = option(is_argument=True, help="The folder to write; it must not exist yet.")
    format: "FormatName" = option(
        "gptq", kind=str, help="gptq, awq (with zero points) or compressed-tensors."
    )
    group: int = option(128, help="Weights that share a scale: 32, 64, 128, or -1 for whole rows.")
    method: "Method" = option(
        "rtn", kind=str, help="rtn rounds to nearest; gptq makes up for errors on the text."
    )
    calibration: Path | None = option(
        None, help="A text like those the model will meet; its last tenth measures."
    )
    clip: bool = option(True, help="Search each group's range for the best place to clip it.")
    sequence_tokens: int = option(2048, help="Of a calibration sequence.")
    num_sequences: int = option(128, help="Calibration sequences, at most.")
    device: str = option("auto", help=_DEVICE)
    dtype: str = option("auto", help=_DTYPE)


@dataclass(frozen=True, kw_only=True)
class Info:
    """What `vkv info` is about."""

    model: str | None = option(
        None,
        is_argument=True,
        help="A checkpoint folder, GGUF file or hub id: what is chosen for it.",
    )


def chat_command() -> Command:
    """`vkv chat`."""
    from ..engine.config import EngineConfig
    from ..request.sampling_params import SamplingParams

    sampling = TypedOptions(
        SamplingParams,
        max_tokens=Flag(default=512, kind=int, help="The longest answer, in tokens."),
        **_SAMPLING,
    )
    engine = Options(EngineConfig, *_ENGINE, **_ENGINE_SAID)
    return function(_chat, Options(Model), Options(Chat), sampling, engine)


def generate_command() -> Command:
    """`vkv generate`."""
    from ..engine.config import EngineConfig
    from ..request.sampling_params import SamplingParams

    sampling = TypedOptions(
        SamplingParams,
        "n",
        max_tokens=Flag(default=64, kind=int, help="Tokens to generate for each prompt."),
        **_SAMPLING,
        stop=Flag(default=None, kind=list[str], help="A string that ends a text."),
    )
    engine = Options(EngineConfig, *_ENGINE, "max_seqs", **_ENGINE_SAID)
    return function(_generate, Options(Generate), Options(Model), sampling, engine)


def quantize_command() -> Command:
    """`vkv quantize`."""
    return function(_quantize, Options(Quantize))


def info_command() -> Command:
    """`vkv info`."""
    return function(_info, Options(Info))


def _chat(place: Model, own: Chat, typed: dict[str, Any], config: "EngineConfig") -> None:
    from ..frontend.llm import LLM
    from .chat import run_chat

    tolerate_bytes()
    alone = vars(replace(config, max_seqs=1))
    with LLM(place.zoo, model=place.model, device=place.device, dtype=place.dtype, **alone) as llm:
        run_chat(llm, _params(llm, typed), system=own.system, path=own.session)


def _generate(own: Generate, place: Model, typed: dict[str, Any], config: "EngineConfig") -> None:
    from ..frontend.llm import LLM
    from .generate import read_prompts, run_generate

    tolerate_bytes()
    texts = read_prompts(own.prompts)
    with LLM(
        place.zoo, model=place.model, device=place.device, dtype=place.dtype, **vars(config)
    ) as llm:
        params = _params(llm, typed)
        run_generate(llm, texts, params, as_chat=own.as_chat, as_json=own.as_json)


def _params(llm: "LLM", typed: dict[str, Any]) -> "SamplingParams":
    """What was typed, over what the model's generation config says, over greedy."""
    from ..request.sampling_params import SamplingParams

    return SamplingParams(**{"temperature": 0.0, **llm.loaded.sampling_defaults, **typed})


def _quantize(options: Quantize) -> None:
    from .quantize import run_quantize

    run_quantize(options)


def _info(about: Info) -> None:
    from .info import show_info

    show_info(about.model)


def tolerate_bytes() -> None:
    """Have the standard streams take any byte, so that what is wrong can be said.

    What is not in the terminal's encoding is read as lone surrogates, which a prompt may not have;
    what the encoding lacks is written as question marks.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
