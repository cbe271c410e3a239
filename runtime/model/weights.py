"""A model's weights: away from the device for a while, or changed under an open LLM."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch

from ...attention_backends import LayerAttention
from ...quant import int4_linears
from ...vmem.errors import InvalidOperation, VkvError
from ..cpu_kernels.packing import has_foreign_weights, is_packed, lay_out_again
from .attention_hook import ATTENTION_NAME
from .fingerprint import adapters_of
from .loading import LoadedModel
from .probing import probe_attention

_version = attrgetter("_version")


class OffloadedWeights:
    """Moves the parameters and buffers of `model`, and weights that kernels have laid out for
    themselves, to host memory, and back by `restore`.

    The tensors stay the same objects, so that all who hold them see the weights again, at other
    addresses. Host memory is pinned if the device is a GPU, which makes the way back fast.

    Raises torch's own errors if host memory is short, with the model as it was.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        # Tied weights are one tensor; by identity, for tensors compare by value.
        laid_out = (t for _, linear in int4_linears(model) for t in linear.weight_tensors())
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers(), *laid_out)}
        self._tensors = list(tensors.values())
        self._devices = [tensor.device for tensor in self._tensors]
        self._on_host = [_to_host(tensor.data) for tensor in self._tensors]
        self.num_bytes = sum(tensor.nbytes for tensor in self._on_host)
        for tensor in self._tensors:
            tensor.data = tensor.data.new_empty(0)

    def restore(self) -> None:
        """Put the weights back on their devices; the memory on the host goes back to the system."""
        for tensor, device in zip(self._tensors, self._devices, strict=True):
            tensor.data = self._on_host.pop(0).to(device)
        if any(tensor.is_cuda for tensor in self._tensors):
            torch._C._host_emptyCache()  # or PyTorch keeps it pinned


class ModelWatch:
    """Notices that somebody changed a model which an engine computes with.

    Seen are: hooks, adapters switched, modules and parameters exchanged, weights assigned
    (`p.data = …`) and written to in place (`load_state_dict`, an optimizer's step, `p.mul_`), for
    which PyTorch counts versions. What it does not count, writing into `p.data`, is not seen.

    Tensors are kept until the change is seen, for a recorded step holds their addresses.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._dtype = loaded.model.dtype
        self._config = loaded.model.config.get_text_config()
        self._looks: Sequence[tuple[str, Callable[[], Any]]] = ()
        self._seen: list[Any] = []
        self._kept: Sequence[torch.Tensor] = ()
        self._turn = 0
        self._refusal: VkvError | None = None
        self.renew()

    @property
    def has_hooks(self) -> bool:
        """True if somebody asked to be called when a module runs."""
        return self._loaded.has_forward_hooks

    def renew(self) -> None:
        """Take the model as it is now for the model unchanged."""
        modules = list(self._model.modules())
        parameters = [m._parameters for m in modules if m._parameters or is_packed(m)]
        children = [m._modules for m in modules if m._modules]
        hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        tuners = [m for m in modules if hasattr(m, "disable_adapters")]
        # Of the buffers those that checkpoints hold: models themselves exchange others.
        held = self._model.state_dict(keep_vars=True).values()
        tensors = list({id(value): value for value in held if _has_address(value)}.values())
        counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self._kept = [tensor.detach() for tensor in tensors]
        self._looks = (
            ("a hook was added or removed", lambda: list(map(len, hooks))),
            ("weights were written to", lambda: list(map(_version, counted))),
            ("weights were assigned", lambda: list(map(torch.Tensor.data_ptr, tensors))),
            ("parameters were exchanged", lambda: _identities(parameters)),
            ("modules were exchanged", lambda: _identities(children)),
            ("adapters were switched", lambda: list(map(adapters_of, tuners))),
        )
        self._seen = [look() for _, look in self._looks]

    def release(self) -> None:
        """Hold on to no weight, and see nothing, until `renew`."""
        self._looks, self._seen, self._kept = (), [], ()

    def change(self, *, thoroughly: bool) -> str | None:
        """What changed since `renew`, in words; None if nothing did.

        All of it is looked at `thoroughly`, else a part in turns, which is a few microseconds for
        a small model.

        Raises InvalidOperation if the model's attention was switched, or it was put to training.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._config._attn_implementation != ATTENTION_NAME:
            raise InvalidOperation(
                f"the attention of {type(self._model).__name__} was switched to "
                f"{self._config._attn_implementation!r} while vkv.LLM has the model; close it "
                f"first, or call model.set_attn_implementation({ATTENTION_NAME!r}) to go on"
            )
        if self._model.training:
            raise InvalidOperation(
                f"{type(self._model).__name__} was put to training while vkv.LLM has it, with "
                "dropout on; call model.eval() to go on"
            )
        looks = range(len(self._looks))
        if not thoroughly and self._looks:
            self._turn = (self._turn + 1) % len(self._looks)
            looks = (self._turn,)
        for index in looks:
            words, look = self._looks[index]
            if look() != self._seen[index]:
                return words
        return None

    def learn(self) -> tuple[LayerAttention, ...]:
        """What each layer that attends asks for now; and take the model as it is (`renew`).

        Raises InvalidOperation if slots and kernels that were made for it do not fit any more, and
        UnsupportedModel if it cannot run; `change` raises the same from then on.
        """
        try:
            attention = self._learn()
        except VkvError as error:
            self._refusal = error
            raise
        self._refusal = None
        self.renew()
        return attention

    def _learn(self) -> tuple[LayerAttention, ...]:
        loaded = self._loaded
        if has_foreign_weights(self._model):
            raise InvalidOperation(
                f"{type(self._model).__name__} got weights in place of some that were laid out for "
                "the CPU's kernels, which nothing would read; close this LLM, and make one with "
                "pack_weights=False, or change the model first"
            )
        if self._model.dtype != self._dtype:
            raise self._unfit()
        lay_out_again(self._model)
        probed = probe_attention(self._model)
        embedding: Any = self._model.get_input_embeddings()
        now = probed.layers, probed.geometry, list(map(_kind, probed.attention))
        then = loaded.attention_layers, loaded.geometry, list(map(_kind, loaded.attention))
        same = now == then and embedding.weight.shape[0] == loaded.vocab_size
        tensors = (*self._model.parameters(), *self._model.buffers())
        here = all(tensor.device == loaded.device for tensor in tensors)
        if not same or not here:
            raise self._unfit()
        return probed.attention

    def _unfit(self) -> InvalidOperation:
        return InvalidOperation(
            f"{type(self._model).__name__} has another vocabulary, other layers, another dtype or "
            "another device than when vkv.LLM took it; close this LLM and make another"
        )


def _has_address(value: Any) -> bool:
    """Whether it is a tensor that lies somewhere."""
    try:
        return isinstance(value, torch.Tensor) and value.data_ptr() != 0
    except RuntimeError:  # a tensor of a kind of its own
        return False


def _identities(holders: Sequence[Mapping[str, Any]]) -> list[int]:
    """Of everything that modules hold under some name."""
    return list(map(id, chain.from_iterable(map(dict.values, holders))))  # type: ignore[arg-type]


def _kind(layer: LayerAttention) -> tuple[int | None, float | None, bool]:
    """What kernels were chosen by; scale and sinks may be learned, and change."""
    return layer.window, layer.softcap, layer.sinks is None


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor)
