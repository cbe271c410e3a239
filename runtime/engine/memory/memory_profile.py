"""What a step takes, and what a GPU has left for keys and values: measured by running one."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ....attention_backends import LayerAttention
from ...execution.sampler import sample
from ...model.forward import Forward
from ...model.loading import LoadedModel
from ...model.probing import probe_outputs
from ...model.recurrent_state import StepState
from ...request.sampling_params import SamplingParams
from ...request.sampling_state import SamplingState

_HEADROOM = 0.04  # of the device: recorded steps, kernels' workspaces, fragmentation, neighbours
_LEAST_HEADROOM = 512 << 20
_SAMPLED_ROWS = 64  # that are sampled at a time, each in up to as many copies as follow
_SAMPLED_BYTES = 32  # of a token of the vocabulary


def step_bytes(loaded: LoadedModel, *, max_batch_tokens: int, max_seqs: int) -> int:
    """The most bytes that tensors of a step may take, beside weights, keys and values.

    A few tokens go through the model while tensors are counted; a step's take as much a token. A
    recorded decode keeps its own.
    """
    meter = _Meter()
    with torch.inference_mode(), meter:
        num_tokens = len(probe_outputs(loaded.model)[-1])
    token_bytes = -(-meter.peak_bytes // num_tokens)
    sampled = min(_SAMPLED_ROWS, max_seqs) * loaded.vocab_size * _SAMPLED_BYTES
    return (max_batch_tokens + max_seqs) * token_bytes + sampled


class _Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that were made meanwhile, at most so many at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._bytes = 0
        self._owners: dict[int, int] = {}  # tensors in each stretch of memory, by its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, is_new=not func.is_view)
        return result

    def _count(self, tensor: torch.Tensor, *, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        if address not in self._owners:
            if not is_new:
                return  # a view of what was there before, such as a weight
            self._owners[address] = 0
            self._bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._bytes)
        self._owners[address] += 1
        weakref.finalize(tensor, self._let_go, address, num_bytes)

    def _let_go(self, address: int, num_bytes: int) -> None:
        self._owners[address] -= 1
        if not self._owners[address]:
            del self._owners[address]
            self._bytes -= num_bytes


def memory_for_kv(
    loaded: LoadedModel, *, max_batch_tokens: int, max_seqs: int, num_slots: int
) -> int:
    """Bytes that keys and values may take on the GPU, beside the largest step there can be.

    The step is run once; what it took stays with PyTorch's allocator, for the steps to come, and
    so is not free any more when the device is asked. Nothing is taken for keys and values.
    """
    state_bytes = profile_step(loaded, max_batch_tokens, max_seqs)
    free, total = torch.cuda.mem_get_info(loaded.device)
    headroom = max(int(_HEADROOM * total), _LEAST_HEADROOM)
    return max(0, free - headroom - state_bytes * num_slots)


@torch.inference_mode()
def profile_step(loaded: LoadedModel, num_tokens: int, num_seqs: int) -> int:
    """Run `num_tokens` tokens through the model and sample `num_seqs`; keys and values are lost.

    A hybrid's decodes run too: the states of all of them are copied out of their places meanwhile.
    A step that scores a prompt (`prompt_logprobs`) has logits of each of its tokens, not of
    `num_seqs` alone: half a GiB for 2,048 tokens of 128k in bfloat16. Few ask for it, and every
    GPU would keep that much free, so it comes out of the headroom.

    Returns the bytes of state that a request has beside its keys and values.
    """
    forward, device = Forward(loaded.model), loaded.device
    num_seqs = min(num_seqs, num_tokens)
    positions = torch.arange(num_tokens, device=device)[None] % loaded.max_positions
    last = torch.arange(num_tokens - num_seqs, num_tokens, device=device)
    state = StepState(loaded.model.config) if loaded.keeps_state else None
    logits = forward(torch.zeros_like(positions), positions, _NoAttention(), state=state, keep=last)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    sample(logits, [SamplingState(params, index=index) for index in range(num_seqs)])
    if state is None:
        return 0
    state_bytes = sum(tensor.nbytes for tensor in state.states().values())
    ones = positions[0, :num_seqs, None]  # [num_seqs, 1]
    fresh = StepState(loaded.model.config)
    forward(torch.zeros_like(ones), ones, _NoAttention(), state=fresh)
    return state_bytes


class _NoAttention:
    """Answers with zeros of the right shape: attention itself keeps little beside its result."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        wanted: LayerAttention,
    ) -> torch.Tensor:
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
