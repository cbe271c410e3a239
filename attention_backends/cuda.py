"""What the CUDA backends ask of the machine before they promise anything."""

from importlib.util import find_spec

import torch

AMPERE = (8, 0)
HOPPER = (9, 0)


def missing_gpu(minimum: tuple[int, int] = AMPERE) -> str | None:
    """Why no GPU of at least this compute capability can be used, or None."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU and a CUDA build of PyTorch"
    if torch.cuda.get_device_capability() < minimum:
        return f"needs an NVIDIA GPU of compute capability {minimum[0]}.{minimum[1]} or later"
    return None


def missing_package(module: str, remedy: str) -> str | None:
    """Why a package cannot be imported, with its remedy, or None. Imports nothing."""
    return None if find_spec(module) else f"needs the package {module}: {remedy}"
