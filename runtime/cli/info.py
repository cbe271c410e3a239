"""`vkv info`: what this machine offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...attention_backends import AttentionNeeds, describe_backends, explain_choice
from ...quant import Int4Linear, Int4Weight
from ...quant.kernels.table import MANY_ROWS, Int4Kernel, choose_kernel, kernel_class, kernel_names
from ...vmem import VmemDriver, linux, open_driver
from ...vmem.errors import VkvError
from ..cpu_kernels.packing import int4_products
from .machine import hardware, versions

if TYPE_CHECKING:  # `transformers` comes with them, which a machine's table does without
    from ..frontend.llm import LLM
    from ..model.loading import LoadedModel

# What models ask for beside a plain head size, and which ones.
_KINDS = (
    ("bfloat16", {}),
    ("float32", {"dtype": torch.float32}),
    ("bfloat16, soft cap (Gemma 2)", {"softcap": True, "window": True}),
    ("bfloat16, sinks (GPT-OSS)", {"sinks": True, "window": True}),
    ("bfloat16, heads of 192 and 128 (DeepSeek)", {"head_dims": frozenset({(192, 128)})}),
    ("bfloat16, paged baseline", {"paged": True}),
)


def show_info(model: str | None = None) -> None:
    """Print versions, drivers with their limits, attention backends, what is chosen when, and int4
    kernels.

    With a `model` (as of `LLM`), what is chosen for it instead, and why.
    """
    console = Console()
    if model is not None:
        from ..frontend.llm import LLM

        with LLM(model) as llm:
            console.print(_model(llm))
        return
    console.print(_machine())
    console.print(_drivers())
    console.print(_backends())
    console.print(_choices())
    console.print(_int4_kernels())


def _machine() -> Table:
    cpu = torch.device("cpu")
    table = Table(title="This machine", show_header=False)
    found = hardware(cpu)
    table.add_row("processor", f"{found['processor']}, {found['cores']} cores")
    table.add_row("vector instructions", str(found["cpu_capability"]))
    available = linux.available_bytes() / 2**30
    table.add_row("memory", f"{found['memory_gib']} GiB, {available:.1f} GiB available")
    for name, version in versions().items():
        table.add_row(name, version)
    return table


def _drivers() -> Table:
    table = Table(title="Virtual-memory drivers")
    for column in ("device", "page size", "mappings", "notes"):
        table.add_column(column)
    for device in ("cpu", "cuda"):
        try:
            with open_driver(device) as driver:
                table.add_row(device, *_describe(driver))
        except VkvError as error:
            table.add_row(device, "-", "-", f"not available: {error}")
    return table


def _describe(driver: VmemDriver) -> tuple[str, str, str]:
    sizes = f"{driver.page_bytes >> 10} KiB, multiples of {driver.granularity >> 10} KiB"
    # Reserving takes nothing: it shows how far one stretch can reach here.
    reach = 1 << 50
    while reach > driver.page_bytes:
        try:
            driver.free(driver.reserve(reach))
            break
        except VkvError:
            reach >>= 1
    notes = [f"reserves up to {reach >> 40} TiB at once"]
    driver.create(1)
    huge = getattr(driver, "huge_pages", None)
    if huge is not None:
        notes.append("huge pages" if huge else "no huge pages: the kernel refuses to collapse")
    return sizes, f"up to {driver.max_mappings:,}", "; ".join(notes)


def _backends() -> Table:
    table = Table(title="Attention backends")
    for column in ("name", "device", "features", "over-read", "here"):
        table.add_column(column)
    for backend in describe_backends():
        tile = backend["over_read_tokens"]
        table.add_row(
            backend["name"],
            "/".join(backend["devices"]),
            ", ".join(backend["features"]) or "-",
            f"up to {tile - 1} tokens" if tile > 1 else "none",
            "yes" if backend["available"] else f"no: {backend['reason']}",
        )
    return table


def _int4_kernels() -> Table:
    table = Table(title="Kernels for 4-bit weights, in order of preference")
    for column in ("name", "chosen for (groups of 128)", "here"):
        table.add_column(column)
    chosen = _int4_choices()
    for name in kernel_names():
        why = kernel_class(name).unavailable_reason()
        table.add_row(
            name, "; ".join(chosen.get(name, [])) or "-", escape(f"no: {why}") if why else "yes"
        )
    return table


def _int4_choices() -> dict[str, list[str]]:
    """For each kernel, the devices, types and numbers of rows that it is chosen for."""
    codes, scales = torch.zeros(64, 256, dtype=torch.uint8), torch.zeros(64, 2)
    weight = Int4Weight.from_codes(codes, scales, None)
    chosen: dict[str, list[str]] = {}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in map(torch.device, devices):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            choose = partial(choose_kernel, weight, device, dtype)
            for name, rows in _by_rows(choose):
                kind = str(dtype).removeprefix("torch.")
                chosen.setdefault(name, []).append(f"{device} {kind}, {rows}")
    return chosen


def _by_rows(choose: Callable[[int], Int4Kernel]) -> Iterator[tuple[str, str]]:
    """The kernels that `choose` gives from one row to many, each with the rows it takes."""
    for name, group in groupby(range(1, MANY_ROWS + 1), lambda rows: choose(rows).name):
        taken = list(group)
        if taken[-1] == MANY_ROWS:
            yield name, f"{_rows(taken[0])} and more"
        else:
            yield name, _rows(taken[0]) if len(taken) == 1 else f"{taken[0]} to {_rows(taken[-1])}"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _choices() -> Table:
    table = Table(title="What attention='auto' takes")
    for column in ("device", "for a model in", "backend", "decode steps", "passed over"):
        table.add_column(column)
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    plain = {"dtype": torch.bfloat16, "head_dims": frozenset({(128, 128)})}
    for device in devices:
        for kind, changes in _KINDS:
            choice = explain_choice(AttentionNeeds(device=device, **{**plain, **changes}))
            table.add_row(
                device,
                kind,
                choice.name or "none",
                "recorded" if choice.graphs else "kernel by kernel",
                _passed_over(choice.passed_over),
            )
    return table


def _passed_over(reasons: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons) or "-"


def _model(llm: LLM) -> Table:
    from ..engine.build import why_not_recorded

    loaded = llm.loaded
    choice = explain_choice(loaded.needs(paged=False))
    obstacle = why_not_recorded(loaded, llm.config, llm.engine.runner.backend)
    stats = llm.stats()
    table = Table(title=loaded.name, show_header=False)
    table.add_row("weights", f"{loaded.weight_bytes / 2**20:,.1f} MiB, {loaded.dtype}")
    table.add_row("device", str(llm.device))
    for row in _int4_rows(loaded):
        table.add_row(*row)
    table.add_row("layers that attend", f"{len(loaded.attention_layers)}")
    table.add_row("attention backend", llm.attention_backend)
    table.add_row("passed over", _passed_over(choice.passed_over))
    table.add_row("decode steps", f"kernel by kernel: {obstacle}" if obstacle else "recorded")
    table.add_row("longest sequence", f"{llm.max_len:,} tokens")
    table.add_row(
        "page", f"{stats.page_bytes >> 10} KiB; slots grow by {stats.growth_tokens} tokens"
    )
    limit = stats.pages_limit * stats.page_bytes
    table.add_row("memory for keys and values", f"up to {limit / 2**30:,.2f} GiB, none taken yet")
    return table


def _int4_rows(loaded: LoadedModel) -> Iterator[tuple[str, str]]:
    """What computes the products of a model with 4-bit or 8-bit weights; no rows for any other."""
    head = loaded.model.get_output_embeddings()
    in_head = [] if head is None else [linear for _, linear in int4_products(head)]
    inner = [(name, one) for name, one in int4_products(loaded.model) if one not in in_head]
    by_kernels: dict[tuple[int, str], list[str]] = {}
    for name, linear in inner:
        by_kernels.setdefault((linear.bits, _kernels(linear, loaded)), []).append(name)
    for (bits, kernels), names in by_kernels.items():
        which = f": {len(names)} of {len(inner)}, such as {names[0]}"
        yield f"{bits}-bit products", kernels + (which if len(by_kernels) > 1 else "")
    if in_head:
        yield "output layer", f"{in_head[0].bits} bits: {_kernels(in_head[0], loaded)}"
    elif inner:
        yield "output layer", "dense"


def _kernels(linear: Int4Linear, loaded: LoadedModel) -> str:
    choose = partial(linear.kernel_for, loaded.device, loaded.dtype)
    return ", ".join(f"{name} ({rows})" for name, rows in _by_rows(choose))
