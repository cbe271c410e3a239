"""`vkv info`: what this machine offers."""

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..attention_backends import describe_backends
from ..quant import Int4Weight
from ..quant.kernels import MANY_ROWS, choose_kernel, kernel_class, kernel_names
from ..vmem import VmemDriver, open_driver
from ..vmem.errors import VkvError
from .bench.record import hardware, versions
from .config import available_memory


def show_info() -> None:
    """Print versions, drivers with their limits, and attention backends, and int4 kernels."""
    console = Console()
    console.print(_machine())
    console.print(_drivers())
    console.print(_backends())
    console.print(_int4_kernels())


def _machine() -> Table:
    cpu = torch.device("cpu")
    table = Table(title="This machine", show_header=False)
    found = hardware(cpu)
    table.add_row("processor", f"{found['processor']}, {found['cores']} cores")
    table.add_row("vector instructions", str(found["cpu_capability"]))
    available = available_memory(cpu) / 2**30
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
            rows: dict[str, list[int]] = {}
            for num_rows in range(1, MANY_ROWS + 1):
                name = choose_kernel(weight, device, dtype, num_rows).name
                rows.setdefault(name, []).append(num_rows)
            for name, taken in rows.items():
                last = f"to {taken[-1]}" if taken[-1] < MANY_ROWS else "and more"
                kind = str(dtype).removeprefix("torch.")
                chosen.setdefault(name, []).append(f"{device.type} {kind}, {taken[0]} {last} rows")
    return chosen
