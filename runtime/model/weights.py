"""A model's weights, away from the device for a while."""

import torch


class OffloadedWeights:
    """Moves the parameters and buffers of `model` to host memory, and back by `restore`.

    The tensors stay the same objects, so that all who hold them see the weights again, at other
    addresses. Host memory is pinned if the device is a GPU, which makes the way back fast.

    Raises torch's own errors if host memory is short, with the model as it was.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        # Tied weights are one tensor; by identity, for tensors compare by value.
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._tensors = list(tensors.values())
        self._devices = [tensor.device for tensor in self._tensors]
        self._on_host = [_to_host(tensor.data) for tensor in self._tensors]
        self.num_bytes = sum(tensor.nbytes for tensor in self._on_host)
        for tensor in self._tensors:
            tensor.data = tensor.data.new_empty(0)

    def restore(self) -> None:
        """Put the weights back on their devices."""
        for tensor, host, device in zip(self._tensors, self._on_host, self._devices, strict=True):
            tensor.data = host.to(device)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor)
