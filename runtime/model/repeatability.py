"""Whether a model's result for a token depends on that token's own request alone, to the bit.

vkv's CPU kernels sum in an order that a row alone determines. Of PyTorch's operations those do that
work on elements, or sum within a row. Its matrix products do not: they choose their order by the
number of rows. So a few tokens are run through the model, and every operation is looked at.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from .probing import probe_outputs

# Beside those on elements, and views: within a row, or without a sum.
_WITHIN_ROWS = frozenset(
    f"aten.{name}"
    for name in (
        *("arange", "empty", "full", "new_empty", "new_full", "new_ones", "new_zeros", "ones"),
        *("empty_like", "full_like", "ones_like", "zeros_like", "zeros", "scalar_tensor"),
        *("cat", "stack", "repeat", "repeat_interleave", "one_hot", "copy_", "clone", "contiguous"),
        *("_to_copy", "to", "type_as", "fill_", "lift_fresh", "reshape", "_reshape_copy"),
        *("embedding", "index", "index_select", "gather", "scatter", "scatter_", "index_add_"),
        *("nonzero", "bincount", "sort", "topk", "max", "min", "amax", "argmax", "any", "all"),
        *("sum", "mean", "var_mean", "linalg_vector_norm", "norm", "polar"),
        *("softmax", "_softmax", "log_softmax", "layer_norm", "native_layer_norm", "rms_norm"),
        *("dropout", "_fused_rms_norm", "floor_divide", "item", "_local_scalar_dense"),
        *("__and__", "__or__", "__xor__", "__lshift__", "__rshift__"),
    )
)


def why_not_repeatable(model: PreTrainedModel) -> str | None:
    """What makes a token's result depend on others of its step, in words; None if nothing does."""
    watch = _Watch(model)
    with torch.inference_mode(), watch:
        probe_outputs(model)
    return watch.obstacle


class _Watch(TorchDispatchMode):
    """Notes the first operation whose sums may depend on the number of rows, and where it was."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.obstacle: str | None = None
        self._names = {id(module): name for name, module in model.named_modules()}
        self._inside: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Watch":
        def enter(module: nn.Module, _: Any) -> None:
            self._inside.append(self._names.get(id(module), type(module).__name__))

        def leave(*_: Any) -> None:
            self._inside.pop()

        self._hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func).rpartition(".")[0]
        harmless = torch.Tag.pointwise in func.tags or func.is_view or name in _WITHIN_ROWS
        if not harmless and self.obstacle is None:
            where = next((name for name in reversed(self._inside) if name), "the model itself")
            self.obstacle = f"{where} computes {name}, whose sums may depend on the number of rows"
        return func(*args, **(kwargs or {}))
