"""`VirtualCache`: the cache of `transformers`' own `generate`, in virtual memory.

`transformers` grows its `DynamicCache` by concatenation, which copies every key and value at every
token, and its `StaticCache` is allocated in full. Here a layer reserves addresses for `max_len`
tokens, maps pages as tokens come, and hands out ordinary tensors over what it holds.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from ...vmem.errors import InvalidConfig, InvalidOperation, RequestTooLong, UsageError
from . import attention  # noqa: F401  # makes its name known to `transformers`
from .lanes import Arena, LaneTensor

# Memory is mapped by calls to the system, which a traced graph cannot hold: a compiled model
# breaks its graph around them and goes on, as `torch.compile` does by default.
_untraced = torch.compiler.disable(reason="vkv.VirtualCache maps memory; leave fullgraph=False")


@dataclass(frozen=True, kw_only=True)
class VirtualCacheStats:
    """What a `VirtualCache` holds; layers that are `transformers`' own are not counted.

    Attributes:
        virtual_bytes: address space reserved.
        physical_bytes: memory behind it.
        tokens: tokens of each sequence of the batch.
    """

    virtual_bytes: int
    physical_bytes: int
    tokens: int


class VirtualCache(DynamicCache):
    """Keys and values for `model.generate(past_key_values=…)`, grown in place page by page.

    Nothing is reserved before the first token and nothing is copied when a sequence grows. Memory
    is at most 65/64 of what the tokens take, and two pages for every head of each sequence (on a
    GPU: two for all of them). A layer with a sliding window gives back the pages behind it with
    the next token. Growing attention layers are virtual; a layer of any other kind (recurrent or
    convolution state alone, an indexer) is the one that `DynamicCache` would use.

    Memory is returned when the cache and every tensor taken from it are gone. A tensor taken from
    it is good until the cache is next written to, cropped or reordered: `clone` it to keep it, or
    to save it, since its storage spans the addresses of `max_len` tokens. A reorder of beams works
    in place; where the batch changes its size, one layer exists twice for a moment.
    `copy.deepcopy` gives a cache apart, with memory of its own. In a model that `torch.compile`
    compiled, graphs break where memory is mapped (`fullgraph=False`, the default). For inference:
    a backward pass through it raises InvalidOperation.

    Args:
        config: of the model, `model.config`.
        max_len: the most tokens of a sequence, prompt and output; None for what the model was
            made for (`max_position_embeddings`). Costs addresses, not memory.
        page_bytes: size of a physical page; None for 16 KiB on a CPU, and a GPU's own size.

    Raises InvalidConfig for a `max_len` that is no positive integer, or missing where the config
    names none. Going beyond `max_len` raises RequestTooLong from the model's forward, and memory
    running short OutOfPages.

        cache = vkv.VirtualCache(model.config, max_len=4096)
        model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        config: PretrainedConfig,
        max_len: int | None = None,
        *,
        page_bytes: int | None = None,
    ) -> None:
        super().__init__(config=config)
        if max_len is None:
            max_len = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not isinstance(max_len, int) or isinstance(max_len, bool) or max_len < 1:
            raise InvalidConfig(
                f"max_len is {max_len!r}; pass VirtualCache(config, max_len=…), the most tokens "
                "that a sequence may have"
            )
        self._arena = Arena(page_bytes)
        self.layers = [_virtual(layer, self._arena, max_len) for layer in self.layers]

    @property
    def is_compileable(self) -> bool:
        """False: a compiled graph would take tensors of `max_len`, most of which nothing backs."""
        return False

    def stats(self) -> VirtualCacheStats:
        """A snapshot of what the cache holds."""
        virtual = [layer for layer in self.layers if isinstance(layer, VirtualLayer)]
        return VirtualCacheStats(
            virtual_bytes=self._arena.virtual_bytes,
            physical_bytes=self._arena.physical_bytes,
            tokens=max((layer.get_seq_length() for layer in virtual), default=0),
        )


class VirtualLayer(DynamicLayer):
    """Keys and values of one attention layer. `transformers` knows it as a growing layer.

    Attributes:
        keys, values: what is held now, [batch, heads, tokens, dim]; None before the first token.
        record_past: whether tokens behind a window are kept until the next `crop`.
    """

    record_past = False

    def __init__(self, arena: Arena, max_len: int) -> None:
        super().__init__()
        self.max_len = max_len
        self._arena = arena
        self._tensors: tuple[LaneTensor, LaneTensor] | None = None  # of keys and of values
        self._needs_gradient = False  # of some token held

    def __deepcopy__(self, memo: dict[int, Any]) -> "VirtualLayer":
        clone = copy.copy(self)
        clone._arena = copy.deepcopy(self._arena, memo)
        clone._tensors = copy.deepcopy(self._tensors, memo)
        clone._show()
        return clone

    @_untraced
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve addresses for states like these, [batch, heads, any length, dim]."""
        self._initialize(key_states, value_states)

    @_untraced
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states, [batch, heads, new tokens, dim]; returns what the new tokens may see.

        Raises RequestTooLong, InvalidOperation (for another batch size) or a Shortage, each with
        no token of this layer changed.
        """
        length = self.get_seq_length()
        if length + key_states.shape[-2] > self.max_len:
            raise RequestTooLong(
                f"{length + key_states.shape[-2]} tokens exceed the {self.max_len} of this cache; "
                "give VirtualCache a larger max_len, which costs addresses, not memory"
            )
        keys, values = self._tensors or self._initialize(key_states, value_states)
        first = self._first_visible(length)
        if not self.record_past:
            keys.start = values.start = max(keys.start, first)
        keys.make_room(key_states)
        values.make_room(value_states)
        keys.append(key_states)
        values.append(value_states)
        self._show()
        self._needs_gradient |= key_states.requires_grad or value_states.requires_grad
        visible = keys.states(first), values.states(first)
        if self._needs_gradient and torch.is_grad_enabled():
            return _NoGradient.apply(_anchor(), *visible)  # type: ignore[return-value]
        return visible

    @_untraced
    def get_seq_length(self) -> int:
        """Tokens of each sequence so far, those behind a window included."""
        return self._tensors[0].end if self._tensors else 0

    def get_max_length(self) -> int:
        """The most tokens that the layer can hold."""
        return self.max_len

    @_untraced
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens `query_length` new ones may see, themselves included, and the first."""
        length = self.get_seq_length()
        first = self._first_visible(length)
        return length - first + query_length, first

    @_untraced
    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens away; 0 only gives back what none may see.

        Raises UsageError for a positive number; InvalidOperation, with nothing changed, if
        tokens that would then be within the window are gone.
        """
        if tokens_to_remove > 0:
            raise UsageError(
                f"crop({tokens_to_remove}): use crop(-n) to take the last n tokens away"
            )
        if self._tensors is None:
            return
        length = max(self.get_seq_length() + tokens_to_remove, 0)
        first = self._first_visible(length)
        if first < self._tensors[0].start:
            raise InvalidOperation(
                f"cannot crop to {length} tokens: those before {self._tensors[0].start} are gone; "
                "call activate_past_recording() before the forward that may have to be undone"
            )
        for tensor in self._tensors:
            tensor.cut(first, length)
        self._show()

    @_untraced
    def reset(self) -> None:
        """Forget all tokens, and give addresses and memory back."""
        self._tensors = self.keys = self.values = None
        self.is_initialized = self._needs_gradient = False

    @_untraced
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence `i` of the batch be what sequence `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    @_untraced
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch `repeats` times."""
        if self._tensors is not None:
            batch = torch.arange(self._tensors[0].shape[0])
            self.batch_select_indices(batch.repeat_interleave(repeats))

    @_untraced
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices` of the batch: int64 [new_batch], or a mask [batch].

        Raises a Shortage, with nothing changed, if memory is short for a batch of another size.
        """
        if self._tensors is None:
            return
        keys, values = self._tensors
        batch = torch.arange(keys.shape[0], device=self.device)
        chosen = batch[torch.as_tensor(indices, device=self.device)]
        self._tensors = keys.select(chosen), values.select(chosen)
        self._show()

    def _initialize(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[LaneTensor, LaneTensor]:
        self.dtype, self.device = keys.dtype, keys.device
        self._tensors = self._empty_tensor(keys), self._empty_tensor(values)
        self.is_initialized = True
        self._show()
        return self._tensors

    def _empty_tensor(self, states: torch.Tensor) -> LaneTensor:
        batch, heads, _, dim = states.shape
        return LaneTensor(
            self._arena, (batch, heads, dim), self.max_len, states.dtype, states.device
        )

    def _first_visible(self, length: int) -> int:
        """The first token that one behind `length` tokens may see."""
        return 0

    def _show(self) -> None:
        """Let `keys` and `values` be what is held now."""
        if self._tensors is not None:
            first = None if self.record_past else self._first_visible(self.get_seq_length())
            self.keys, self.values = (tensor.states(first) for tensor in self._tensors)


class _NoGradient(torch.autograd.Function):
    """Hands tensors on, for a forward; a backward through them is an error.

    Memory that is written to in place holds no graph, and leaving the gradient out would give
    wrong ones for the weights before it.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[Any, ...]:
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise InvalidOperation(
            "no gradient flows through a VirtualCache, which is for inference; for a backward pass "
            "run the model with use_cache=False, or with transformers' DynamicCache"
        )


def _anchor() -> torch.Tensor:
    """Something to differentiate by, without which a graph would leave its node out."""
    return torch.empty(0, requires_grad=True)


class VirtualSlidingWindowLayer(VirtualLayer):
    """A layer whose tokens see the last `sliding_window` only, themselves included.

    Tokens stay where they are; the pages behind the window go back to the system.
    """

    is_sliding = True

    def __init__(self, arena: Arena, max_len: int, sliding_window: int) -> None:
        super().__init__(arena, max_len)
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window)  # what `iter(cache)` gives

    def activate_past_recording(self) -> None:
        """Keep tokens behind the window until the next `crop`, so that it can bring them back."""
        self.record_past = True

    def get_max_length(self) -> int:
        """The window: as for `transformers`' own sliding layers."""
        return self.sliding_window

    def _first_visible(self, length: int) -> int:
        return max(length - self.sliding_window + 1, 0)


class VirtualHybridLayer(LinearAttentionAndFullAttentionLayer, VirtualLayer):
    """Attention and a recurrence side by side in one layer, as Falcon H1 has them.

    Keys and values are virtual; convolution and recurrent state is kept by `transformers`, which
    looks for its own class of layer when it decides how long a mask must be.
    """

    is_compileable = False

    def __init__(self, arena: Arena, max_len: int, number_of_states: int) -> None:
        VirtualLayer.__init__(self, arena, max_len)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def __deepcopy__(self, memo: dict[int, Any]) -> "VirtualHybridLayer":
        clone = VirtualLayer.__deepcopy__(self, memo)
        assert isinstance(clone, VirtualHybridLayer)
        for name in LinearAttentionLayer(number_of_states=self.number_of_states).__dict__:
            setattr(clone, name, copy.deepcopy(getattr(self, name), memo))
        return clone

    def lazy_initialization(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *states: torch.Tensor, **named: Any
    ) -> None:
        """Of keys and values, which come by place, or of a state, which comes by name."""
        if states:
            VirtualLayer.lazy_initialization(self, *states)
        else:
            LinearAttentionLayer.lazy_initialization(self, **named)

    def get_max_length(self) -> int:
        """The most tokens that the layer can hold."""
        return self.max_len

    def crop(self, tokens_to_remove: int) -> None:
        """As `VirtualLayer.crop`, where `transformers` can undo the state; it raises elsewhere."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        VirtualLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens, and give addresses and memory back."""
        LinearAttentionLayer.reset(self)
        VirtualLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence `i` of the batch be what sequence `beam_idx[i]` was."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        VirtualLayer.reorder_cache(self, beam_idx)


class VirtualSlidingHybridLayer(VirtualHybridLayer, VirtualSlidingWindowLayer):
    """Attention over a window and a recurrence side by side in one layer, as Zaya has them."""

    def __init__(
        self, arena: Arena, max_len: int, number_of_states: int, sliding_window: int
    ) -> None:
        VirtualSlidingWindowLayer.__init__(self, arena, max_len, sliding_window)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def get_max_length(self) -> int:
        """The window: as for `transformers`' own sliding layers."""
        return self.sliding_window


def _virtual(layer: Any, arena: Arena, max_len: int) -> Any:
    """The virtual layer in place of a growing one; `layer` itself if it is of another kind."""
    if type(layer) is DynamicLayer:
        return VirtualLayer(arena, max_len)
    if type(layer) is DynamicSlidingWindowLayer:
        return VirtualSlidingWindowLayer(arena, max_len, layer.sliding_window)
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return VirtualHybridLayer(arena, max_len, layer.number_of_states)
    if type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
        states, window = layer.number_of_states, layer.sliding_window
        return VirtualSlidingHybridLayer(arena, max_len, states, window)
    return layer
