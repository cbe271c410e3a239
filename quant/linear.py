"""A linear layer with a 4-bit weight, or an 8-bit one of two such halves."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..vmem.errors import QuantError
from .kernels.table import MANY_ROWS, Int4Kernel, choose_kernel, kernel
from .weight import Int4Weight
from .weight_memory import trim_heap


class Int4Linear(nn.Module):
    """[..., in_features] to [..., out_features]; which kernel computes it depends on the batch.

    The weight is laid out for a kernel when a batch first asks for it, and kept in that form alone
    if it can be had back from there. `settle` lays it out ahead and lets go of what no kernel
    reads. A kernel may be pinned by name, for tests and measurements.

    Raises QuantError if a pinned kernel is unknown or cannot run here.
    """

    def __init__(
        self,
        weight: Int4Weight,
        bias: torch.Tensor | None = None,
        *,
        kernel_name: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.bits = weight.bits
        self.bias: torch.Tensor | None
        self.permutation: torch.Tensor | None
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("permutation", weight.permutation, persistent=False)
        self._pinned: Int4Kernel | None = None
        self._weight: Int4Weight | None = weight.halves()
        self._outline = self._weight.to("meta")
        self._device = weight.packed.device
        self._settled = False
        self._layouts: dict[str, Any] = {}  # by `layout_name`
        self._choices: dict[tuple[torch.dtype, int], Int4Kernel] = {}
        if kernel_name is not None:
            self.pin(kernel_name)

    @property
    def outline(self) -> Int4Weight:
        """The weight without its numbers, on "meta", but with the order of its columns."""
        return replace(self._outline, permutation=self.permutation, bits=self.bits)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._device

    @property
    def pinned(self) -> str | None:
        """The name of the kernel that computes every batch, if one was pinned."""
        return None if self._pinned is None else self._pinned.name

    def pin(self, kernel_name: str) -> None:
        """Have that kernel compute every batch. Raises QuantError if it cannot run here."""
        assert not self._settled, "laid out for other kernels"
        chosen = kernel(kernel_name)
        if self._layouts.keys() - {chosen.layout_name}:  # or both would be there until `settle`
            self._weight = self._canonical()
            self._layouts.clear()
            trim_heap()
        self._pinned = chosen

    @property
    def weight_int4(self) -> Int4Weight:
        """The weight in its canonical form. Raises QuantError once `settle` has let go of it."""
        return replace(self._canonical(), permutation=self.permutation, bits=self.bits)

    @property
    def is_settled(self) -> bool:
        """Whether only layouts are kept, and the canonical weight is gone."""
        return self._settled

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is kept: layouts, the canonical weight, bias and permutation."""
        layouts = {id(layout): layout for layout in self._layouts.values()}
        total = sum(kernel(name).num_bytes(self._layouts[name]) for name in self._layouts)
        if self._weight is not None and id(self._weight) not in layouts:
            total += self._weight.num_bytes
        return total + sum(buffer.nbytes for buffer in self.buffers())

    def weight_tensors(self) -> Iterator[torch.Tensor]:
        """The very tensors of its layouts and of the canonical weight, which no buffer holds; one
        may come twice."""
        for part in (self._weight, *self._layouts.values()):
            yield from _tensors_of(part)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        if self.permutation is not None:
            rows = rows[:, self.permutation]
        if self.bits == 8:
            rows = torch.cat((rows, rows), dim=1)  # [M, 2 K]: for the high halves, for the low ones
        chosen = self.kernel_for(inputs.device, inputs.dtype, rows.shape[0])
        product = chosen.multiply(self._layout(chosen), rows)
        if self.bias is not None:
            product += self.bias
        return product.view(*inputs.shape[:-1], self.out_features)

    def kernel_for(self, device: torch.device, dtype: torch.dtype, num_rows: int) -> Int4Kernel:
        """The kernel that multiplies [num_rows, in_features] of `dtype`."""
        if self._pinned is not None:
            return self._pinned
        key = (dtype, min(num_rows, MANY_ROWS))
        if key not in self._choices:
            self._choices[key] = choose_kernel(self._outline, device, *key)
        return self._choices[key]

    def accepts(self, device: torch.device, dtype: torch.dtype, num_rows: int) -> bool:
        """Whether the kernel that it would choose, or a pinned one, takes such a batch."""
        return self.kernel_for(device, dtype, num_rows).accepts(
            self._outline, device, dtype, num_rows
        )

    def settle(self, dtype: torch.dtype) -> None:
        """Lay the weight out for every batch of `dtype`, and keep nothing else.

        Afterwards inputs are of this dtype, on this device. A second time nothing happens.
        """
        if self._settled:
            return
        chosen = {self.kernel_for(self._device, dtype, rows) for rows in range(1, MANY_ROWS + 1)}
        self._layouts = {one.layout_name: self._layout(one) for one in chosen}
        self._weight, self._settled = None, True
        trim_heap()

    def _layout(self, chosen: Int4Kernel) -> Any:
        if chosen.layout_name not in self._layouts:
            self._layouts[chosen.layout_name] = chosen.prepare(self._canonical())
            if chosen.restores(self._outline):
                self._weight = None
            trim_heap()
        return self._layouts[chosen.layout_name]

    def _canonical(self) -> Int4Weight:
        """What kernels lay out: as it is kept, or had back from a layout."""
        weight = self._weight  # once: another thread may let go of it meanwhile
        if weight is not None:
            return weight
        if self._settled:
            raise QuantError(
                f"the weight is laid out for {', '.join(self._layouts)} and no longer kept in its "
                "canonical form; take it before `settle`"
            )
        name = next(name for name in self._layouts if kernel(name).restores(self._outline))
        return kernel(name).restore(self._layouts[name], self._outline)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "Int4Linear":
        """Follow the module to another device. Codes and scales keep their types."""
        moved = fn(torch.empty(0, device=self._device)).device
        if moved != self._device and not self._settled:
            self._weight = self._canonical().to(moved)
            self._device = moved
            self._layouts.clear()
            self._choices.clear()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, group_size={self._outline.group_size}"
        )


def _tensors_of(part: Any) -> Iterator[torch.Tensor]:
    """Those of a layout, which is a tensor, a weight, or gives its parts when it is iterated."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, Int4Weight):
        yield from _tensors_of((part.packed, part.scales, part.zeros))
    elif part is not None:
        for one in part:
            yield from _tensors_of(one)
