"""What the benches over whole models can be told; `vkv bench NAME --help` shows it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...runtime.cli.options import option
from ...vmem.errors import InvalidConfig
from ..options import (
    device_option,
    dtype_name_option,
    dtype_option,
    interpreters,
    label_option,
    max_seqs_option,
    model_option,
    peers_option,
    seed_option,
    shape_option,
    threads_option,
    whole_numbers,
    words,
)
from .cells import ON_A_CPU, Cell, cells_named

if TYPE_CHECKING:
    import torch

_FORMATS = "gptq, awq or compressed-tensors"


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What `vkv bench memory` runs."""

    shape: str = shape_option("llama-tiny")
    dtype: "torch.dtype" = dtype_option("float32")
    device: "torch.device" = device_option()
    num_requests: int = option(64, least=1, help="Requests of the workload.")
    prompt_lens: tuple[int, int] = option(
        (16, 2000), help="Shortest and longest prompt, in tokens."
    )
    output_lens: tuple[int, int] = option((16, 256), help="Shortest and longest output, in tokens.")
    max_seqs: int = max_seqs_option(16)
    look_ahead_tokens: int = option(
        16, least=0, help="Tokens mapped ahead of each decoding request."
    )
    quant: str | None = option(
        None,
        help=f"{_FORMATS}: also show how many tokens of KV fit into what 4-bit weights in that "
        "format free.",
    )
    kinds: tuple[str, ...] = option(
        "virtual,paged,static,dynamic",
        parse=words,
        help="Which caches to compare, separated by commas.",
    )
    idle_s: float = option(1.0, least=0.01, help="Rest after which memory goes back, in seconds.")
    seed: int = seed_option()


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions:
    """What `vkv bench throughput` runs.

    Attributes:
        peers: interpreters by name.
    """

    shape: str = shape_option("llama-455m")
    model: str | None = model_option()
    dtype: str = dtype_name_option("bfloat16")
    quant: str | None = option(
        None,
        help=f"{_FORMATS}: also run the same weights rounded to 4 bits, in a checkpoint of that "
        "format.",
    )
    device: "torch.device" = device_option()
    threads: int = threads_option("Threads of every system. Default: the usable cores.")
    systems: tuple[str, ...] = option(
        "vkv,vkv-paged,transformers,transformers-static,transformers-continuous",
        parse=words,
        help="Which systems to compare, separated by commas.",
    )
    peers: Mapping[str, str] = peers_option()
    cells: tuple[Cell, ...] = option(
        ON_A_CPU, parse=cells_named, help="What to time, separated by commas."
    )
    repeats: int = option(3, least=1, help="Repeats, each in fresh processes.")
    batch: int = option(8, least=1, help="Padded batch of transformers in `ragged`.")
    eager_peers: bool = option(
        False, help="Run vLLM without torch.compile, which takes minutes to start."
    )
    label: str = label_option()
    seed: int = seed_option()


@dataclass(frozen=True, kw_only=True)
class FirstTokenOptions:
    """What `vkv bench first-token` runs.

    Attributes:
        peers: interpreters by name, and llama.cpp's server.
    """

    shape: str = shape_option("llama-455m")
    model: str | None = model_option()
    dtype: str = dtype_name_option("bfloat16")
    quant: str | None = option(None, help=f"{_FORMATS}: also start from 4-bit weights.")
    threads: int = threads_option("Threads of every process. Default: the usable cores.")
    systems: tuple[str, ...] = option(
        "vkv,transformers", parse=words, help="Which systems to start, separated by commas."
    )
    peers: Mapping[str, str] = option(
        (),
        names=("--peer",),
        kind=list[str],
        parse=interpreters,
        help="NAME=PYTHON, as of throughput, or llama-server=PROGRAM. Repeatable.",
    )
    prompt_len: int = option(8, least=1, help="Tokens of the prompt.")
    repeats: int = option(7, least=1, help="Starts of each.")
    label: str = label_option()


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What `vkv bench cache` runs.

    Attributes:
        problems: batch and tokens of context of each.
    """

    shape: str = shape_option("llama-455m")
    dtype: str = dtype_name_option("bfloat16")
    threads: int = threads_option("Threads of every process. Default: the usable cores.")
    problems: tuple[tuple[int, int], ...] = option(
        "1x1024,1x4096,1x16384,8x1024",
        parse=lambda listed: tuple(_problem(text) for text in words(listed)),
        help="Batch x tokens of context, with commas.",
    )
    kinds: tuple[str, ...] = option(
        "virtual,virtual-vkv,dynamic,static",
        parse=words,
        help="Which caches to compare, separated by commas; virtual-vkv is with our attention.",
    )
    steps: int = option(24, least=1, help="Tokens to decode and time.")
    max_prefill: int = option(
        1024, least=0, help="Prompts up to so many tokens go through the model, too."
    )
    repeats: int = option(3, least=1, help="Repeats, each in fresh processes.")
    seed: int = seed_option()


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """What `vkv bench session` runs.

    Attributes:
        scratch: a folder for the model and the session; None for the system's.
    """

    shape: str = shape_option("llama-455m")
    dtype: str = dtype_name_option("bfloat16")
    threads: int = threads_option("Threads of every process. Default: the usable cores.")
    tokens: int = option(16_384, least=1, help="Tokens of the session.")
    more_tokens: int = option(16, least=1, help="Tokens of the prompt behind them.")
    processes: int = option(8, least=2, help="Processes that have it open together.")
    repeats: int = option(3, least=1, help="Repeats, each in fresh processes.")
    scratch: str | None = option(
        None, help="A folder on the disk that the session is to be on. Default: the system's."
    )
    label: str = label_option()
    seed: int = seed_option()


@dataclass(frozen=True, kw_only=True)
class SpeculateOptions:
    """What `vkv bench speculate` runs."""

    shape: str = option("llama-455m", help="A Llama's shape, or llama-tiny.")
    drafter: str = option("ngram", help="Who guesses: ngram, draft or surrogate.")
    draft_shape: str = option("llama-28m", help="The shape of the draft model.")
    acceptance: float = option(
        0.8, least=0, help="The part of the draft model's guesses that is right."
    )
    layers: float = option(0.5, least=0, help="The part of its layers that a surrogate runs.")
    random: bool = option(
        False, help="Models whose weights are random say what they do: no guess is right."
    )
    dtype: str = dtype_name_option("bfloat16")
    threads: int = threads_option("Threads. Default: the usable cores.")
    texts: tuple[str, ...] = option(
        "quotations,edits,loop,novel,misleading", parse=words, help="Which texts, with commas."
    )
    document: int = option(2000, least=80, help="Tokens of the document that is quoted or edited.")
    tokens: int = option(400, least=10, help="Tokens of each output.")
    streams: tuple[int, ...] = option(
        "1,4", parse=whole_numbers, help="Outputs at once, with commas."
    )
    speculative_tokens: int = option(8, least=1, help="The most tokens guessed at once.")
    max_seqs: int = max_seqs_option(32)
    repeats: int = option(5, least=1, help="Repeats, both ways in turns.")
    label: str = label_option()
    seed: int = seed_option()

    def __post_init__(self) -> None:
        from .scripts import SCRIPTS

        for text in self.texts:
            if text not in SCRIPTS:
                raise InvalidConfig(f"texts has {text!r}; use some of {', '.join(SCRIPTS)}")
        if self.drafter not in ("ngram", "draft", "surrogate"):
            raise InvalidConfig(f"drafter is {self.drafter!r}; use ngram, draft or surrogate")
        if self.acceptance > 1:
            raise InvalidConfig(f"acceptance is {self.acceptance}; use 0 to 1")


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """What `vkv bench profile` runs."""

    shape: str = shape_option("llama-455m")
    model: str | None = model_option()
    dtype: str = dtype_name_option("bfloat16")
    quant: str | None = option(None, help=f"{_FORMATS}: the weights rounded to 4 bits.")
    batches: tuple[int, ...] = option(
        "1,8,32", parse=whole_numbers, help="Requests that decode together, with commas."
    )
    context: int = option(128, least=1, help="Tokens of each before it decodes.")
    steps: int = option(24, least=1, help="Decodes timed call by call, and as many undisturbed.")
    label: str = label_option()
    seed: int = seed_option()


@dataclass(frozen=True, kw_only=True)
class AdaptersOptions:
    """What `vkv bench adapters` runs."""

    shape: str = shape_option("llama-455m")
    model: str | None = model_option()
    dtype: str = dtype_name_option("bfloat16")
    quant: str | None = option(None, help=f"{_FORMATS}: the weights rounded to 4 bits.")
    adapters: int = option(8, least=1, help="How many.")
    ranks: tuple[int, ...] = option(
        "16", parse=whole_numbers, help="Their ranks in turn, with commas."
    )
    targets: str = option("all", help="Linears that they act on: all, or attention.")
    requests: int = option(32, least=1, help="Requests that run together.")
    prompt_len: int = option(64, least=1, help="Tokens of each prompt.")
    output_len: int = option(64, least=1, help="Tokens that each generates.")
    prefill: int = option(256, least=1, help="Tokens of prompts in one step, over all adapters.")
    repeats: int = option(5, least=1, help="Turns of all ways.")
    label: str = label_option()
    seed: int = seed_option()


def _problem(text: str) -> tuple[int, int]:
    batch, _, context = text.partition("x")
    if not (batch.isdecimal() and context.isdecimal() and int(batch) and int(context)):
        raise ValueError(f"{text!r}: write BATCHxCONTEXT, such as 1x4096")
    return int(batch), int(context)
