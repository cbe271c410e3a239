"""The `vkv` command."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ...bench.cli import bench
from ...vmem.errors import VkvError

app = typer.Typer(
    name="vkv",
    help="A virtual-memory KV-cache runtime for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A model folder or hub id. Default: the built-in tiny model."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
LmHeadBits = Annotated[
    int | None,
    typer.Option(help="4 or 8: round the output layer to so many bits at load. Default: as it is."),
]
KVMemory = Annotated[
    str, typer.Option(help="The most memory KV may take, such as 64MiB. Taken only as it is used.")
]
MaxSeqs = Annotated[int, typer.Option(help="Requests that run at once.")]
MaxLen = Annotated[
    int | None, typer.Option(help="Tokens of a request, prompt and output. Default: the model's.")
]
Attention = Annotated[str, typer.Option(help="An attention backend (see `vkv info`), or auto.")]
KV = Annotated[str, typer.Option(help="virtual: contiguous slots; paged: the baseline.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")]
TopK = Annotated[int, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


@app.command()
def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    lm_head_bits: LmHeadBits = None,
    kv_memory: KVMemory = "auto",
    max_len: MaxLen = None,
    attention: Attention = "auto",
    kv: KV = "virtual",
) -> None:
    """Chat with a model. Reads from a pipe too: a line is a turn."""
    from ..frontend.llm import LLM
    from ..request.sampling_params import SamplingParams
    from .chat import run_chat

    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens
    )
    options: dict[str, Any] = {"kv_memory": kv_memory, "attention": attention, "kv": kv}
    options |= {"max_seqs": 1, "max_len": max_len, "lm_head_bits": lm_head_bits}
    with LLM(model, device=device, dtype=dtype, **options) as llm:
        run_chat(llm, params, system=system)


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts. Without any, each line of standard input.")
    ] = None,
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 64,
    n: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends a text.")] = None,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a user's message, not raw text.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    lm_head_bits: LmHeadBits = None,
    kv_memory: KVMemory = "auto",
    max_seqs: MaxSeqs = 32,
    max_len: MaxLen = None,
    attention: Attention = "auto",
    kv: KV = "virtual",
) -> None:
    """Complete prompts, many at once. Reads from a pipe: a line is a prompt."""
    from ..frontend.llm import LLM
    from ..request.sampling_params import SamplingParams
    from .generate import read_prompts, run_generate

    texts = read_prompts(prompts)
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_tokens=max_tokens,
        n=n,
        stop=stop,
    )
    options: dict[str, Any] = {"kv_memory": kv_memory, "attention": attention, "kv": kv}
    options |= {"max_seqs": max_seqs, "max_len": max_len, "lm_head_bits": lm_head_bits}
    with LLM(model, device=device, dtype=dtype, **options) as llm:
        run_generate(llm, texts, params, as_chat=as_chat, as_json=as_json)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A dense model: a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    format: Annotated[
        str, typer.Option(help="gptq, awq (with zero points) or compressed-tensors.")
    ] = "gptq",
    group: Annotated[
        int, typer.Option(help="Weights that share a scale: 32, 64, 128, or -1 for whole rows.")
    ] = 128,
    method: Annotated[
        str, typer.Option(help="rtn rounds to nearest; gptq makes up for errors on the text.")
    ] = "rtn",
    calibration: Annotated[
        Path | None,
        typer.Option(help="A text like those the model will meet; its last tenth measures."),
    ] = None,
    clip: Annotated[
        bool, typer.Option(help="Search each group's range for the best place to clip it.")
    ] = True,
    sequence_tokens: Annotated[int, typer.Option(help="Of a calibration sequence.")] = 2048,
    num_sequences: Annotated[int, typer.Option(help="Calibration sequences, at most.")] = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Make a 4-bit checkpoint that transformers, vLLM and vkv load."""
    from .quantize import QuantizeOptions, run_quantize

    options: dict[str, Any] = {"format": format, "group": group, "method": method, "clip": clip}
    options |= {"sequence_tokens": sequence_tokens, "num_sequences": num_sequences}
    chosen = QuantizeOptions(calibration=calibration, **options)
    run_quantize(model, out, chosen, device=device, dtype=dtype)


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint folder or hub id: what is chosen for it.")
    ] = None,
) -> None:
    """What this machine offers: drivers, attention backends, limits; or what a model gets."""
    from .info import show_info

    show_info(model)


def main() -> None:
    """Run the command; a user's mistake is a message, not a traceback."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would litter a log
    try:
        app()
    except VkvError as error:
        typer.echo(f"vkv: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)  # whoever read our output has gone, as `head` does


if __name__ == "__main__":
    main()
