"""Numbers from the host to the device, without waiting for the device."""

from collections.abc import Sequence

import numpy as np
import torch


def is_ready(device: torch.device) -> bool:
    """True if work is done when its call returns: then to look at a result is to wait for none."""
    return device.type == "cpu"


def pins(device: torch.device) -> bool:
    """Whether host memory must be pinned for a copy to `device` without waiting."""
    return device.type == "cuda"


def upload(
    values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`values` on `device`. A copy from memory that is not pinned would wait for all kernels."""
    pinned = torch.tensor(values, dtype=dtype, pin_memory=pins(device))
    return pinned.to(device, non_blocking=True)


def select_rows(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The named rows, ascending; without a copy if they are all."""
    if len(rows) == len(tensor):
        return tensor
    return tensor[upload(rows, torch.long, tensor.device)]


def upload_array(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same for an array of numpy's."""
    tensor = torch.from_numpy(values)
    if pins(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
