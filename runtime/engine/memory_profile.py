"""What a GPU has left for keys and values: measured by running a step, not guessed."""

import torch

from ...attention_backends import LayerAttention
from ..execution.sampler import sample
from ..model.forward import Forward
from ..model.loading import LoadedModel
from ..model.recurrent_state import StepState
from ..request.sampling_params import SamplingParams
from ..request.sampling_state import SamplingState

_HEADROOM = 0.04  # of the device: recorded steps, kernels' workspaces, fragmentation, neighbours
_LEAST_HEADROOM = 512 << 20


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
