"""What this machine is: processor, memory, and versions of what figures depend on."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("vkv", "torch", "transformers", "numpy", "cuda-python", "flashinfer-python")


def hardware(device: torch.device) -> dict[str, Any]:
    """What programs run on: processor or GPU, cores in use, memory.

    `cpu_model` is left out where the system does not number its processors.
    """
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.release(),
        "load_before": os.getloadavg()[0],
    }
    if model := _cpu_model():
        found["cpu_model"] = model
    if str(device).startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; absent packages are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    return _cpuinfo().get("model name") or platform.machine()


def _cpu_model() -> str | None:
    """Family and model, such as "family 25 model 1", which differ where marketing names do not."""
    found = _cpuinfo()
    if "cpu family" not in found or "model" not in found:
        return None
    return f"family {found['cpu family']} model {found['model']}"


def _cpuinfo() -> dict[str, str]:
    """What Linux knows of the first processor."""
    first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}
