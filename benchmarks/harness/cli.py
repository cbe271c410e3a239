"""The `vkv bench` commands over whole models: options in, tables and the record's place out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import kernel_cli as kernel_cli  # registers its commands, too
from .options import (
    OUT,
    Device,
    Dtype,
    Label,
    MaxSeqs,
    Model,
    Out,
    Peers,
    Quant,
    Seed,
    Shape,
    bench,
    command_line,
    interpreters,
    items,
    numbers,
    show,
)


@bench.command()
def memory(
    shape: Shape = "llama-tiny",
    dtype: Dtype = "float32",
    device: Device = "auto",
    num_requests: Annotated[int, typer.Option(help="Requests of the workload.")] = 64,
    prompt_lens: Annotated[
        tuple[int, int], typer.Option(help="Shortest and longest prompt, in tokens.")
    ] = (16, 2000),
    output_lens: Annotated[
        tuple[int, int], typer.Option(help="Shortest and longest output, in tokens.")
    ] = (16, 256),
    max_seqs: MaxSeqs = 16,
    look_ahead_tokens: Annotated[
        int, typer.Option(help="Tokens mapped ahead of each decoding request.")
    ] = 16,
    quant: Annotated[
        str | None,
        typer.Option(
            help="gptq, awq or compressed-tensors: also show how many tokens of KV fit into what "
            "4-bit weights in that format free."
        ),
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="Which caches to compare, separated by commas.")
    ] = "virtual,paged,static,dynamic",
    idle_s: Annotated[
        float, typer.Option(min=0.01, help="Rest after which memory goes back, in seconds.")
    ] = 1.0,
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """Memory held against tokens held, over ragged requests, and after them.

    vkv's contiguous and paged caches, beside the static and dynamic caches of transformers as a
    padded batch fills them. Also reports the time that mapping took of the engine's steps.
    """
    from ..runtime.engine.config import resolve_device
    from ..runtime.model.loading import parse_dtype
    from .models.memory import KINDS, MemoryOptions, run

    chosen = tuple(items(kinds))
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: use some of {', '.join(KINDS)}")
    import torch

    options = MemoryOptions(
        shape=shape,
        dtype=parse_dtype(dtype) or torch.float32,
        device=resolve_device(device),
        num_requests=num_requests,
        prompt_lens=prompt_lens,
        output_lens=output_lens,
        max_seqs=max_seqs,
        look_ahead_tokens=look_ahead_tokens,
        quant=quant,
        kinds=chosen,
        idle_s=idle_s,
        seed=seed,
    )
    path, tables = run(options, out, command_line())
    show(path, tables)


@bench.command()
def throughput(
    shape: Shape = "llama-455m",
    model: Model = None,
    dtype: Dtype = "bfloat16",
    quant: Quant = None,
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Threads of every system. Default: the usable cores.")
    ] = None,
    systems: Annotated[
        str, typer.Option(help="Which systems to compare, separated by commas.")
    ] = "vkv,vkv-paged,transformers,transformers-static,transformers-continuous",
    peer: Peers = None,
    cells: Annotated[
        str, typer.Option(help="What to time, separated by commas.")
    ] = "prefill-1,prefill-8,decode-1,decode-8,decode-32,ragged",
    repeats: Annotated[int, typer.Option(help="Repeats, each in fresh processes.", min=1)] = 3,
    batch: Annotated[int, typer.Option(help="Padded batch of transformers in `ragged`.")] = 8,
    eager_peers: Annotated[
        bool, typer.Option(help="Run vLLM without torch.compile, which takes minutes to start.")
    ] = False,
    label: Label = "",
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """Tokens a second, offline, against transformers, vLLM and llama.cpp.

    Each system runs in a process of its own on the same model, prompts, output lengths and
    threads, taking turns cell by cell; medians and ratios of interleaved repeats. --quant adds
    vkv-int4, whose output layer stays dense, vkv-int4-head, where it is in 4 bits too, and to
    llama.cpp its own Q4_0. Ctrl-C ends it and writes what has been measured.
    """
    from ..runtime.engine.config import resolve_device
    from ..runtime.model.loading import parse_dtype
    from .models.throughput import CELLS, ThroughputOptions, run

    named = [name.strip() for name in cells.split(",")]
    if unknown := [name for name in named if name not in CELLS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: use some of {', '.join(CELLS)}")
    parse_dtype(dtype)
    given: dict[str, Any] = {} if threads is None else {"threads": threads}
    options = ThroughputOptions(
        shape=shape,
        model=model,
        dtype=dtype,
        quant=quant,
        device=resolve_device(device),
        systems=tuple(name.strip() for name in systems.split(",") if name.strip()),
        peers=interpreters(peer),
        cells=tuple(CELLS[name] for name in named),
        repeats=repeats,
        batch=batch,
        eager_peers=eager_peers,
        label=label,
        seed=seed,
        **given,
    )
    path, tables = run(options, out, command_line())
    show(path, tables)


@bench.command()
def cache(
    shape: Shape = "llama-455m",
    dtype: Dtype = "bfloat16",
    threads: Annotated[
        int | None, typer.Option(help="Threads of every process. Default: the usable cores.")
    ] = None,
    problems: Annotated[
        str, typer.Option(help="Batch x tokens of context, with commas.")
    ] = "1x1024,1x4096,1x16384,8x1024",
    kinds: Annotated[
        str, typer.Option(help="Which caches to compare, separated by commas.")
    ] = "virtual,dynamic,static",
    steps: Annotated[int, typer.Option(help="Tokens to decode and time.", min=1)] = 24,
    max_prefill: Annotated[
        int, typer.Option(help="Prompts up to so many tokens go through the model, too.")
    ] = 1024,
    repeats: Annotated[int, typer.Option(help="Repeats, each in fresh processes.", min=1)] = 3,
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """VirtualCache against transformers' DynamicCache and StaticCache, under model.generate.

    On the CPU: time of a decoded token and of a prompt, and peak memory beyond the model's. The
    context is filled with random keys and values; the caches take turns in fresh processes.
    """
    from ..runtime.model.loading import parse_dtype
    from .models.cache import CacheOptions, run

    parse_dtype(dtype)
    pairs = [numbers("problems", item.replace("x", ","), int) for item in items(problems)]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise typer.BadParameter(f"--problems {problems!r}: write BATCHxCONTEXT, such as 1x4096")
    given: dict[str, Any] = {} if threads is None else {"threads": threads}
    options = CacheOptions(
        shape=shape,
        dtype=dtype,
        problems=tuple((batch, context) for batch, context in pairs),
        kinds=tuple(items(kinds)),
        steps=steps,
        max_prefill=max_prefill,
        repeats=repeats,
        seed=seed,
        **given,
    )
    path, tables = run(options, out, command_line())
    show(path, tables)


@bench.command()
def serve(
    shape: Shape = "llama-tiny",
    dtype: Dtype = "float32",
    device: Device = "auto",
    workload: Annotated[
        str,
        typer.Option(help="fastgen (its four quadrants), sharegpt, burstgpt, arxiv; with commas."),
    ] = "fastgen",
    num_requests: Annotated[int, typer.Option(help="Requests of each workload.")] = 32,
    scale: Annotated[float, typer.Option(help="Multiplies all lengths.")] = 1.0,
    clients: Annotated[
        str, typer.Option(help="Clients that wait for their answers; several with commas.")
    ] = "8",
    rate: Annotated[
        str, typer.Option(help="Requests a second, in place of clients; several with commas.")
    ] = "",
    cv: Annotated[
        float, typer.Option(help="Variation of the times between arrivals: 1 Poisson, else Gamma.")
    ] = 1.0,
    policies: Annotated[
        str, typer.Option(help="Schedulers to compare, separated by commas.")
    ] = "splitfuse,prefill_first",
    max_seqs: MaxSeqs = 32,
    max_batch_tokens: Annotated[
        str, typer.Option(help="Tokens of a step; several with commas. Default: the device's own.")
    ] = "",
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="Goodput: longest time to the first token.")
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="Goodput: longest mean time of a token after it.")
    ] = None,
    sla_prompt_rate: Annotated[
        float, typer.Option(help="FastGen: prompt tokens a second until the first token.")
    ] = 512.0,
    sla_rates: Annotated[
        str, typer.Option(help="FastGen: output tokens a second to keep up, with commas.")
    ] = "2,4,6",
    label: Label = "",
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """TTFT, TPOT and ITL while requests arrive; SplitFuse against prefill-first.

    Runs the engine in this process. Lengths are those of published traces, regenerated from
    their quantiles; the fields of the record are those of `vllm bench serve`.
    """
    import torch

    from ..runtime.engine.config import resolve_device
    from ..runtime.model.loading import parse_dtype
    from .load.serve import ServeOptions, run
    from .load.serve_metrics import Targets

    options = ServeOptions(
        shape=shape,
        dtype=parse_dtype(dtype) or torch.float32,
        device=resolve_device(device),
        workloads=tuple(items(workload)),
        num_requests=num_requests,
        clients=tuple(numbers("clients", clients, int)),
        rates=tuple(numbers("rate", rate, float)),
        cv=cv,
        scale=scale,
        policies=tuple(items(policies)),
        max_seqs=max_seqs,
        budgets=tuple(numbers("max-batch-tokens", max_batch_tokens, int)),
        targets=Targets(
            slo_ttft_ms=slo_ttft_ms,
            slo_tpot_ms=slo_tpot_ms,
            prompt_rate=sla_prompt_rate,
            rates=tuple(numbers("sla-rates", sla_rates, float)),
        ),
        label=label,
        seed=seed,
    )
    path, tables = run(options, out, command_line())
    show(path, tables)


@bench.command()
def report(
    folder: Annotated[Path, typer.Option(help="Where the records are and the page goes.")] = OUT,
) -> None:
    """All records on one page, REPORT.md: the newest of each kind and machine."""
    from .report import report as write_report

    typer.echo(write_report(folder))


@bench.command()
def profile(
    shape: Shape = "llama-455m",
    model: Model = None,
    dtype: Dtype = "bfloat16",
    quant: Annotated[
        str | None,
        typer.Option(help="gptq, awq or compressed-tensors: the weights rounded to 4 bits."),
    ] = None,
    batches: Annotated[
        str, typer.Option(help="Requests that decode together, with commas.")
    ] = "1,8,32",
    context: Annotated[int, typer.Option(help="Tokens of each before it decodes.", min=1)] = 128,
    steps: Annotated[
        int, typer.Option(help="Decodes timed call by call, and as many undisturbed.", min=1)
    ] = 24,
    label: Label = "",
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """Where a decode step's time goes on a CPU, kernel by kernel.

    Beside what reading all weights once, and multiplying by them, would take at the machine's
    limits. Only of models whose decodes are recorded; `vkv info MODEL` says whether they are.
    """
    from ..runtime.model.loading import parse_dtype
    from .models.profile import ProfileOptions, run

    parse_dtype(dtype)
    options = ProfileOptions(
        shape=shape,
        model=model,
        dtype=dtype,
        quant=quant,
        batches=tuple(numbers("batches", batches, int)),
        context=context,
        steps=steps,
        label=label,
        seed=seed,
    )
    path, tables = run(options, out, command_line())
    show(path, tables)
