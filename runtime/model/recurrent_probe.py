"""What must hold of a model with state before requests may share a batch: found out at load.

Some models take up their state for a single token only, and silently start afresh with a longer
chunk. No table of names tells which; a few tokens do.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ...vmem.errors import UnsupportedModel
from .attention_probe import AttentionProbe, refusing
from .forward import Forward
from .recurrent_state import RecurrentState, StepState

_SEQUENCES = ([1, 2, 3, 4], [4, 1, 2, 3])


def probe_state(model: PreTrainedModel) -> tuple[AttentionProbe, list[int]]:
    """What the attention layers of a hybrid ask for, and which layers they should be.

    Raises UnsupportedModel if a chunk or a decode does not go on from the state before it.
    """
    states = RecurrentState(model.config, len(_SEQUENCES))
    first, second = _SEQUENCES
    probe = AttentionProbe()
    whole = _run(model, [first], 0, states.fresh(), probe)
    others = torch.cat([whole, _run(model, [second], 0, states.fresh())])  # [2, vocab]

    _run(model, [first[:2]], 0, begun := states.fresh())
    states.scatter([0], begun)
    chunk = _run(model, [first[2:]], 2, states.gather([0]))
    alone = _run(model, [first[2:]], 2, states.fresh())
    _check_goes_on(model, "a chunk of a prompt", chunk, whole, alone)

    for place, sequence in enumerate(_SEQUENCES):
        _run(model, [sequence[:3]], 0, begun := states.fresh())
        states.scatter([place], begun)
    last = [sequence[3:] for sequence in _SEQUENCES]
    decoded = _run(model, last, 3, states.gather([0, 1]))
    alone = _run(model, last, 3, states.fresh())
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
    probe: AttentionProbe | None = None,
) -> torch.Tensor:
    """Logits after the last of `tokens`, which stand at `start` and behind: float32 [B, vocab]."""
    ids = torch.tensor(tokens, device=model.device)
    positions = torch.arange(start, start + ids.shape[1], device=model.device).expand_as(ids)
    with refusing(model):
        logits = Forward(model)(ids, positions, probe or AttentionProbe(), state=state)
    if probe is not None:
        probe.logits.append(logits)
    return logits.unflatten(0, ids.shape)[:, -1].float()
