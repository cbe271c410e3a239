"""Linear layers as a CPU's kernels like them: weights laid out once, at load.

PyTorch's own linear rearranges a weight at every call, or does without. A weight that is laid out
ahead is read at memory speed: by vkv's kernel, by oneDNN's where the processor has a matrix unit or
vkv has none, and in 4 bits by the kernels of `quant`. Of vkv's kernels a row's result depends on no
other row (`repeatable`).

Linears over the same input (queries, keys and values; gate and up) become one product: the model's
first call computes it, the others find their part. A gated feed-forward layer is one product with
its gate built in, and `fusing` takes norms and rotary embeddings. The model's code stays as it is:
only modules are exchanged, and all of it is undone without loss if the model does not take it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from ...quant import Int4Linear, concatenate, empty_apart, split, trim_heap
from ...quant.weight_memory import drop_file_pages
from ...vmem import linux
from . import kernels as native_kernels
from .experts import Multiplied, PackedExperts, RowWeight, pack_experts, pack_row_weights
from .fusing import (
    FusedNorm,
    Undo,
    exchange,
    fuse_expert_gates,
    fuse_norms,
    fuse_rotary,
    gate_of,
    gates_alike,
    refuse_loading,
)
from .kernels import Gate, PanelLinear
from .shared_inputs import Linear, Place, group_by_input, plain_linears, single_homes

_DTYPES = (torch.float32, torch.bfloat16)
# Of the largest value. Two orders of the same sums differ by less; a mix-up by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class _Product(Protocol):
    """A weight, laid out: what it computes, and how to have it back."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor: ...

    def dense(self) -> torch.Tensor: ...


class _OneDnnLinear:
    """A linear whose weight lies as oneDNN's kernel for few rows wants it.

    That is as good for many: measured to 512. oneDNN keeps a kernel for every number of rows, with
    memory of its own, so rows are made up to one of few numbers.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self._bias = bias

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        missing = few_row_counts(len(rows)) - len(rows)
        if missing:
            rows = functional.pad(rows, (0, 0, 0, missing))
        out = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return out[: len(rows) - missing].view(*inputs.shape[:-1], -1)

    def dense(self) -> torch.Tensor:
        return self._weight.to_dense()


def few_row_counts(rows: int) -> int:
    """The next number of four significant bits: to 512 there are 56, at most 1/8 more."""
    unit = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // unit) * unit


class PackedLinear(nn.Module):
    """One linear, or a part of several that share their input: [..., in] to [..., out]."""

    def __init__(self, product: "PackedProduct", part: int) -> None:
        super().__init__()
        self.in_features = product.in_features
        self.out_features = product.out_features[part]
        self.product = product
        self.part = part
        self.register_load_state_dict_pre_hook(refuse_loading)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.product.compute(inputs, self.part)

    def extra_repr(self) -> str:
        count = len(self.product.out_features)
        shared = f", part {self.part + 1} of {count}" if count > 1 else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{shared}"


class PackedGatedLayer(nn.Module):
    """A gated feed-forward layer: down_proj(gate(x) * up(x)), gate and up in one product."""

    def __init__(self, product: "PackedProduct", down_proj: nn.Module) -> None:
        super().__init__()
        self.product = product
        self.down_proj = down_proj
        self.register_load_state_dict_pre_hook(refuse_loading)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.product.gated(hidden_states))


class PackedProduct:
    """The packed weights of one or more linears over the same input.

    Args:
        linears: in the order of the model's calls; all dense, or all in 4 bits.
        gate: of two linears, gate and up, whose gated product alone is wanted.
        repeatable: by vkv's kernel, even where oneDNN's is faster.

    Attributes:
        tied: the weight of a single linear that is a parameter elsewhere too; None for others.
    """

    def __init__(
        self, linears: Iterable[Linear], gate: Gate | None = None, *, repeatable: bool = False
    ) -> None:
        linears = list(linears)
        self.in_features = linears[0].in_features
        self.out_features = tuple(linear.out_features for linear in linears)
        self.has_bias = tuple(linear.bias is not None for linear in linears)
        self.bias = _joined_bias(linears)
        self.gate = gate
        # An input and its product, in one place: another thread's never come between them.
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        self._gates_itself = False
        self._repeatable = repeatable
        self.tied: torch.Tensor | None = None
        self._product: _Product | Int4Linear
        int4 = [linear for linear in linears if isinstance(linear, Int4Linear)]
        if len(int4) == 1:
            self._product = int4[0]  # and what it has been laid out for
        elif int4:
            weight = concatenate([linear.weight_int4 for linear in int4])
            self._product = Int4Linear(weight, self.bias, kernel_name=int4[0].pinned)
        else:
            dense = [linear.weight for linear in linears if isinstance(linear, nn.Linear)]
            self._product = self._lay_out(dense)

    def _lay_out(self, weights: list[torch.Tensor]) -> _Product:
        self._weight_bytes = sum(weight.nbytes for weight in weights)
        panel = _panel(weights[0].dtype, self._repeatable)
        if panel is not None and self.in_features and self.in_features % 2 == 0:
            self._gates_itself = self.gate is not None and self.out_features[0] % 32 == 0
            gate = self.gate if self._gates_itself else None
            return PanelLinear(weights, self.bias, gate, panel=panel)
        return _OneDnnLinear(weights[0] if len(weights) == 1 else _joined(weights), self.bias)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight and the bias."""
        if isinstance(self._product, Int4Linear):
            return self._product.num_bytes
        return self._weight_bytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def int4(self) -> Int4Linear | None:
        """The one 4-bit layer that computes all parts, if they are in 4 bits."""
        return self._product if isinstance(self._product, Int4Linear) else None

    def compute(self, inputs: torch.Tensor, part: int) -> torch.Tensor:
        """One linear's part of the product; all parts are kept until the last is fetched."""
        last = self._last
        if last is None or last[0] is not inputs:
            whole = self._product(inputs)
            if len(self.out_features) == 1:
                return whole
            last = self._last = inputs, whole.split(self.out_features, dim=-1)
        if part == len(self.out_features) - 1:
            self._last = None
        return last[1][part]

    def gated(self, inputs: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """gate(first part) * second part, of [..., in] inputs.

        An `addend`, float32 [rows, both parts], is added to both ahead of the gate.
        """
        if isinstance(self._product, PanelLinear) and self._gates_itself:
            return self._product(inputs, addend)
        whole = self._product(inputs)
        if addend is not None:
            whole += addend.view(whole.shape)
        assert self.gate is not None
        return native_kernels.gated(whole, self.gate)

    def lay_out_again(self) -> None:
        """Take the numbers that are now in a weight which the model has elsewhere too."""
        if self.tied is not None:
            if isinstance(self._product, PanelLinear):
                self._product.lay_out_again(self.tied)
            else:
                self._product = self._lay_out([self.tied])

    def settle(self, dtype: torch.dtype) -> None:
        """Keep nothing of the weight but what products of `dtype` read: no more `unpack`."""
        if isinstance(self._product, Int4Linear):
            self._product.settle(dtype)

    def unpack(self) -> list[Linear]:
        """The linears again, bit for bit."""
        biases: list[torch.Tensor | None] = [None] * len(self.out_features)
        if self.bias is not None:
            parts = zip(self.bias.split(self.out_features), self.has_bias, strict=True)
            biases = [bias.clone() if has_bias else None for bias, has_bias in parts]
        if isinstance(self._product, Int4Linear) and len(self.out_features) == 1:
            return [self._product]
        if isinstance(self._product, Int4Linear):
            int4 = split(self._product.weight_int4, self.out_features)
            name = self._product.pinned
            return [
                Int4Linear(weight, bias, kernel_name=name)
                for weight, bias in zip(int4, biases, strict=True)
            ]
        weights = self._product.dense().split(self.out_features)
        linears: list[Linear] = []
        for weight, bias in zip(weights, biases, strict=True):
            linear = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter(bias, requires_grad=False)
            linears.append(linear)
        return linears


def _panel(dtype: torch.dtype, repeatable: bool) -> int | None:
    """The panels of vkv's kernel, if weights of `dtype` are better laid out for it here."""
    if native_kernels.has_matrix_unit(dtype) and one_dnn_packs(dtype) and not repeatable:
        return None
    return native_kernels.best_panel(dtype)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether there are kernels for packed weights of `dtype` on this processor."""
    return native_kernels.best_panel(dtype) is not None or one_dnn_packs(dtype)


def one_dnn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has them."""
    if not torch.backends.mkldnn.is_available() or dtype not in _DTYPES:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(
    model: nn.Module,
    run: Callable[[], Sequence[torch.Tensor]],
    *,
    repeatable: bool = False,
    files: Iterable[str | Path] = (),
) -> int:
    """Lay out the linears that `run()` calls, dense or in 4 bits, and fuse what is around them.

    `run` runs a few tokens through the model and returns tensors [num_tokens, …] of what came out.
    It is called once to see what is multiplied by which parameter, and which linears share an
    input, and once more to see that the model takes the packed ones and computes the same. If it
    does not (it reads a weight itself, say), all is put back, bit for bit, and nothing is packed.
    With `repeatable`, weights are laid out for vkv's kernels wherever it has some.
    `files` are those that weights were mapped from, which nobody has written to since: pages of
    what is laid out go.

    Returns the bytes of packed weights, an earlier call's included.
    """
    expected: list[torch.Tensor] = []
    with Multiplied() as multiplied:
        groups = group_by_input(plain_linears(model, _has_kernel), lambda: expected.extend(run()))
    homes, dtype = single_homes(model), expected[0].dtype  # of the logits it may be another
    shared = _parameters_of_several(model)
    mapped = linux.mapped_files(files)
    undo: list[Undo] = []
    gates = _Gates(dtype)
    gated: list[tuple[nn.Module, PackedProduct]] = []
    products: list[PackedProduct] = []
    try:
        for group in groups:  # one at a time: never two copies of the whole model
            parent = group[0].parent
            is_gated = [place.name for place in group] == ["gate_proj", "up_proj"]
            gate = gates.of(parent) if is_gated and id(parent) in homes else None
            linears = [place.linear for place in group]
            product = PackedProduct(linears, gate, repeatable=repeatable)
            product.tied = _tied(linears, shared)
            undo.append(_exchange_linears(group, product, mapped))
            products.append(product)
            trim_heap()
            if gate is not None:
                gated.append((parent, product))
        for layer, product in gated:  # whose own linears are packed by now
            fused = PackedGatedLayer(product, layer.down_proj)  # type: ignore[arg-type]
            undo.append(exchange(*homes[id(layer)], fused))
        if _panel(dtype, repeatable) is not None:
            for back in pack_experts(model, dtype):
                undo.append(back)
            undo += pack_row_weights(model, multiplied)
        undo += fuse_norms(model) + fuse_rotary(model) + fuse_expert_gates(model, dtype)
        if _same(run(), expected, _TOLERANCE[dtype]):
            for product in products:
                product.settle(dtype)
            return packed_bytes(model)
    except (RuntimeError, AttributeError, TypeError, ValueError, OSError):
        pass  # it does not take them, and goes on as it was
    for back in reversed(undo):
        back()
    return packed_bytes(model)


class _Gates:
    """The gates of layers, looked at once for all that are alike: it reads their weights twice."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._found: dict[tuple[object, ...], Gate | None] = {}

    def of(self, layer: nn.Module) -> Gate | None:
        kind = gates_alike(layer)
        if kind is None:
            return gate_of(layer, self._dtype)
        if kind not in self._found:
            self._found[kind] = gate_of(layer, self._dtype)
        return self._found[kind]


def is_packed(module: nn.Module) -> bool:
    """Whether a module computes with weights that were laid out, and not with parameters."""
    return isinstance(module, PackedLinear | PackedGatedLayer | PackedExperts)


def _parameters_of_several(model: nn.Module) -> set[int]:
    """By `id`, the parameters that several modules have, as a tied output layer does."""
    found = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {one for one, count in found.items() if count > 1}


def _tied(linears: Sequence[Linear], shared: Collection[int]) -> torch.Tensor | None:
    """The weight of a dense linear by itself, if it is among those that are shared."""
    if len(linears) > 1 or not isinstance(linears[0], nn.Linear):
        return None
    return linears[0].weight if id(linears[0].weight) in shared else None


def lay_out_again(model: nn.Module) -> None:
    """Take the numbers that are now in parameters which stay, beside what was laid out of them."""
    for weight in model.parameters():
        if isinstance(weight, RowWeight):
            weight.lay_out()
    for module in model.modules():
        if isinstance(module, FusedNorm):
            module.lay_out()
        elif isinstance(module, PackedLinear):
            module.product.lay_out_again()


def has_foreign_weights(model: nn.Module) -> bool:
    """Whether somebody gave parameters or modules to packed ones, which would read none of them."""
    children = {PackedLinear: set(), PackedGatedLayer: {"down_proj"}, PackedExperts: set()}
    return any(
        is_packed(module)
        and (
            any(True for _ in module.parameters(recurse=False))
            or {name for name, _ in module.named_children()} - children[type(module)]
        )
        for module in model.modules()
    )


def packed_bytes(model: nn.Module) -> int:
    """Bytes of packed weights, which are no parameters any more."""
    products = {
        module.product
        for module in model.modules()
        if isinstance(module, PackedLinear | PackedGatedLayer)
    }
    parts = [
        *products,
        *(module for module in model.modules() if isinstance(module, PackedExperts)),
        *(weight for weight in model.parameters() if isinstance(weight, RowWeight)),
    ]
    return sum(part.num_bytes for part in parts)


def int4_products(model: nn.Module) -> Iterator[tuple[str, Int4Linear]]:
    """The products by 4-bit weights, packed or not, each with the first module that it serves."""
    seen: set[Int4Linear] = set()
    for name, module in model.named_modules():
        packed = isinstance(module, PackedLinear | PackedGatedLayer)
        linear = module.product.int4 if packed else module
        if isinstance(linear, Int4Linear) and linear not in seen:
            seen.add(linear)
            yield name, linear


def _exchange_linears(
    group: list[Place], product: PackedProduct, files: list[tuple[int, int]]
) -> Undo:
    """Put the product's parts in the linears' places, and let the linears go."""
    for part, place in enumerate(group):
        setattr(place.parent, place.name, PackedLinear(product, part))
        if isinstance(place.linear, nn.Linear):
            drop_file_pages(place.linear.weight, files)
        del place.linear

    def undo() -> None:
        for place, linear in zip(group, product.unpack(), strict=True):
            setattr(place.parent, place.name, linear)

    return undo


def _same(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float
) -> bool:
    """Whether most tokens' results are alike.

    Not all: a rounding error may send a token to another expert.
    """
    for new, old in zip(found, expected, strict=True):
        off = (new.float() - old.float()).abs().amax(dim=-1)
        if (off > tolerance * old.float().abs().max()).float().mean() > 0.5:
            return False
    return True


def _has_kernel(linear: nn.Linear) -> bool:
    """Whether the weight can be laid out: vkv's own kernel wants an even number of inputs."""
    return linear.in_features % 2 == 0 or one_dnn_packs(linear.weight.dtype)


def _joined(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weights below one another, apart: the heap would keep a hole for each that is let go."""
    shape = sum(len(weight) for weight in weights), weights[0].shape[1]
    apart = empty_apart(shape, weights[0].dtype)
    return torch.cat([weight.detach() for weight in weights], out=apart)


def _joined_bias(linears: Sequence[Linear]) -> torch.Tensor | None:
    biases = [linear.bias for linear in linears]
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    parts = zip(biases, linears, strict=True)
    return torch.cat(
        [some.new_zeros(linear.out_features) if bias is None else bias for bias, linear in parts]
    ).detach()
