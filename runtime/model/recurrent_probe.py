"""What must hold of a model with state before requests may share a batch: found out at load.

Some models take up their state for a single token only, and silently start afresh with a longer
chunk. No table of names tells which; a few tokens do.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from ...vmem.errors import UnsupportedModel
from .attention_hook import AttentionProbe
from .recurrent_state import StateRows, StepState

_SEQUENCES = ([1, 2, 3, 4], [4, 1, 2, 3])

Running = Callable[[PreTrainedModel, AttentionProbe], AbstractContextManager[None]]


def probe_state(model: PreTrainedModel, running: Running) -> tuple[AttentionProbe, list[int]]:
    """What the attention layers of a hybrid ask for, and which layers they should be.

    Args:
        running: the context in which to run the model, under a probe in place of attention.

    Raises UnsupportedModel if a chunk or a decode does not go on from the state before it.
    """
    states = StateRows(model.config, len(_SEQUENCES))
    first, second = _SEQUENCES
    probe = AttentionProbe()
    with running(model, probe):
        whole = _last_logits(model, [first], 0, states.fresh())
    others = torch.cat([whole, _run(model, [second], 0, states.fresh(), running)])  # [2, vocab]

    _run(model, [first[:2]], 0, begun := states.fresh(), running)
    states.scatter([0], begun)
    chunk = _run(model, [first[2:]], 2, states.gather([0]), running)
    alone = _run(model, [first[2:]], 2, states.fresh(), running)
    _check_goes_on(model, "a chunk of a prompt", chunk, whole, alone)

    for row, sequence in enumerate(_SEQUENCES):
        _run(model, [sequence[:3]], 0, begun := states.fresh(), running)
        states.scatter([row], begun)
    last = [sequence[3:] for sequence in _SEQUENCES]
    decoded = _run(model, last, 3, states.gather([0, 1]), running)
    alone = _run(model, last, 3, states.fresh(), running)
    _check_goes_on(model, "a decode", decoded, others, alone)
    return probe, states.fresh().attention_layers


def _check_goes_on(
    model: PreTrainedModel,
    what: str,
    got: torch.Tensor,
    expected: torch.Tensor,
    afresh: torch.Tensor,
) -> None:
    """Compare logits, each [B, vocab]: nearer to `expected` than to those of a fresh start?"""
    off, apart = (got - expected).norm(dim=-1), (got - afresh).norm(dim=-1)
    if (off > apart).any():
        raise UnsupportedModel(
            f"{type(model).__name__} does not go on from its recurrent state in {what}; use a "
            "newer version of transformers, or vkv.VirtualCache"
        )


def _run(
    model: PreTrainedModel,
    tokens: Sequence[list[int]],
    start: int,
    state: StepState,
    running: Running,
) -> torch.Tensor:
    with running(model, AttentionProbe()):
        return _last_logits(model, tokens, start, state)


def _last_logits(
    model: PreTrainedModel, tokens: Sequence[list[int]], start: int, state: StepState
) -> torch.Tensor:
    """Logits after the last of `tokens`, which stand at `start` and behind: float32 [B, vocab]."""
    ids = torch.tensor(tokens, device=model.device)
    positions = torch.arange(start, start + ids.shape[1], device=model.device).expand_as(ids)
    output = model(input_ids=ids, position_ids=positions, past_key_values=state, use_cache=True)
    return output.logits[:, -1].float()
