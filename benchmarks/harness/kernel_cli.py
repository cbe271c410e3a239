"""The `vkv bench` commands over kernels, driver calls and slots alone, without a model."""

from typing import Annotated

import typer

from .options import (
    OUT,
    Device,
    Dtype,
    Label,
    Out,
    Peers,
    Seed,
    bench,
    command_line,
    interpreters,
    items,
    numbers,
    show,
)


@bench.command()
def attention(
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    batches: Annotated[str, typer.Option(help="Sequences of a decode, with commas.")] = "1,8,32",
    contexts: Annotated[
        str, typer.Option(help="Tokens of each sequence, with commas.")
    ] = "1024,8192,32768",
    chunk: Annotated[
        int, typer.Option(help="Queries of a prompt chunk; 0 for none, with --heads.", min=0)
    ] = 512,
    heads: Annotated[
        str,
        typer.Option(
            help="Query heads:KV heads x size, such as 32:8x128. Default: 16:4x64, and one decode "
            "each with 32:8x128, 32:4x128 and 8:8x64."
        ),
    ] = "",
    contiguous: Annotated[
        str, typer.Option(help="Backends over slots; the first is run in every layout.")
    ] = "auto,sdpa",
    layers_per_range: Annotated[
        str,
        typer.Option(
            help="Layouts of slots, with commas: how many layers share a range, such as "
            "1,2,4,all; -split for keys and values in ranges of their own; head-major for the "
            "tokens of each head, not the heads of each token, side by side."
        ),
    ] = "1,1-split,all",
    paged: Annotated[str, typer.Option(help="Backends over the paged cache.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Passes of each contestant.", min=1)] = 7,
    max_memory: Annotated[
        str, typer.Option(help="Keys and values of one cache; larger problems are named, not run.")
    ] = "128MiB",
    peer: Peers = None,
    label: Label = "",
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """Contiguous against paged attention, the kernels alone, on mapped virtual memory.

    Decodes and prompt chunks over slots in several layouts and over shuffled blocks that hold the
    same numbers, in turns, beside the machine's memory bandwidth and matrix rate; on a CPU, vLLM's
    paged kernel too, where `--peer` names an interpreter that has it.
    """
    import torch

    from ..runtime.engine.config import parse_bytes, resolve_device
    from ..runtime.model.loading import parse_dtype
    from .kernels.attention import AttentionOptions, run
    from .kernels.attention_layouts import slot_layouts
    from .kernels.attention_shapes import default_shapes, shapes_of_heads

    sizes = numbers("batches", batches, int), numbers("contexts", contexts, int)
    if not heads and not chunk:
        raise typer.BadParameter("--chunk 0 leaves prompts out, which takes --heads")
    shapes = shapes_of_heads(heads, *sizes, chunk) if heads else default_shapes(*sizes, chunk)
    options = AttentionOptions(
        shapes=tuple(shapes),
        dtype=parse_dtype(dtype) or torch.bfloat16,
        device=resolve_device(device),
        contiguous=tuple(items(contiguous)),
        layouts=slot_layouts(items(layers_per_range)),
        paged=tuple(items(paged)),
        repeats=repeats,
        max_bytes=parse_bytes(max_memory),
        peers=interpreters(peer),
        label=label,
        seed=seed,
    )
    path, tables = run(options, out, command_line())
    show(path, tables)


@bench.command()
def linear(
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    layers: Annotated[
        str,
        typer.Option(
            help="Whose layers: llama-455m, llama3-8b, llama2-70b/8, 8192x8192; with commas."
        ),
    ] = "llama-455m,llama3-8b,llama2-70b/8",
    rows: Annotated[str, typer.Option(help="Rows of a product, with commas.")] = (
        "1,2,4,8,16,32,64,128,256"
    ),
    kernels: Annotated[
        str,
        typer.Option(help="Int4 kernels, with commas: auto, their names, or all for every one."),
    ] = "auto",
    group: Annotated[int, typer.Option(help="Columns that share a scale.", min=8)] = 128,
    repeats: Annotated[int, typer.Option(help="Passes of each contestant.", min=1)] = 7,
    max_memory: Annotated[
        str, typer.Option(help="Dense weights of all copies of a layer.")
    ] = "256MiB",
    label: Label = "",
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """4-bit against dense linear layers, by number of rows, the products alone.

    All products of a layer of real shapes, by vkv's int4 kernels and by the dense library, in
    turns, beside the machine's memory bandwidth and matrix rate.
    """
    import torch

    from ..runtime.engine.config import parse_bytes, resolve_device
    from ..runtime.model.loading import parse_dtype
    from .kernels.linear import LAYERS, LinearOptions, all_kernels, run

    chosen = tuple(items(layers))
    if unknown := [name for name in chosen if name not in LAYERS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: use some of {', '.join(LAYERS)}")
    place, kind = resolve_device(device), parse_dtype(dtype) or torch.bfloat16
    options = LinearOptions(
        layers=chosen,
        rows=tuple(numbers("rows", rows, int)),
        kernels=all_kernels(place, kind) if kernels == "all" else tuple(items(kernels)),
        group_size=group,
        dtype=kind,
        device=place,
        repeats=repeats,
        max_bytes=parse_bytes(max_memory),
        label=label,
        seed=seed,
    )
    path, tables = run(options, out, command_line())
    show(path, tables)


@bench.command()
def vmm(
    device: Device = "auto",
    pages: Annotated[
        str, typer.Option(help="Page sizes, such as 64KiB,2MiB; none for the device's own.")
    ] = "",
    runs: Annotated[str, typer.Option(help="Lengths of runs, in pages.")] = "1,2,8,32,128,512",
    repeats: Annotated[int, typer.Option(help="Lives of each run.")] = 7,
    max_memory: Annotated[str, typer.Option(help="The most memory to take at once.")] = "512MiB",
    out: Out = OUT,
) -> None:
    """Every driver call by page size and run length: create, map, access, unmap, release."""
    from ..runtime.engine.config import parse_bytes, resolve_device
    from .kernels.vmm import VmmOptions, run

    options = VmmOptions(
        device=resolve_device(device),
        page_bytes=tuple(parse_bytes(size) for size in items(pages)),
        runs=tuple(numbers("runs", runs, int)),
        repeats=repeats,
        max_bytes=parse_bytes(max_memory),
    )
    path, tables = run(options, out, command_line())
    show(path, tables)


@bench.command()
def stall(
    layers: Annotated[
        int | None, typer.Option(help="Layers of a step. Default: 32 on a GPU, 8 on a CPU.", min=1)
    ] = None,
    heads: Annotated[
        str,
        typer.Option(
            help="Query heads:KV heads x size. Default: 32:8x128 on a GPU, 16:4x64 on a CPU."
        ),
    ] = "",
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    batch: Annotated[int, typer.Option(help="Sequences that decode.", min=1)] = 4,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens that they start with, about. Default: 32768 on a GPU, 4096 on a CPU.",
            min=1,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Decode steps of a run.", min=1)] = 500,
    look_ahead_tokens: Annotated[
        int, typer.Option(help="Tokens mapped ahead of each sequence.", min=1)
    ] = 16,
    page: Annotated[
        str, typer.Option(help="Page size, such as 64KiB; none for the engine's choice.")
    ] = "",
    repeats: Annotated[
        int, typer.Option(help="Runs with look-ahead, and as many without.", min=1)
    ] = 3,
    label: Label = "",
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """Whether mapping memory is hidden behind the computation, step by step.

    Decodes over slots that grow as in the engine, all layers' attention and no more, with mapping
    in the background and, in turns with it, without: how long each step waited for memory.
    """
    import torch

    from ..runtime.engine.config import parse_bytes, resolve_device
    from ..runtime.model.loading import parse_dtype
    from .kernels.attention_shapes import shapes_of_heads
    from .models.stall import DEFAULTS, StallOptions, run

    place = resolve_device(device)
    usual = DEFAULTS[place.type]
    (shape,) = shapes_of_heads(heads or usual.heads, (batch,), (context or usual.context,), 0)
    options = StallOptions(
        shape=shape,
        layers=layers or usual.layers,
        steps=steps,
        look_ahead_tokens=look_ahead_tokens,
        page_bytes=parse_bytes(page) if page else None,
        dtype=parse_dtype(dtype) or torch.bfloat16,
        device=place,
        repeats=repeats,
        label=label,
        seed=seed,
    )
    path, tables = run(options, out, command_line())
    show(path, tables)
