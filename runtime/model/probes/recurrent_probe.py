"""What must hold of a model with state before requests may share a batch: found out at load.

Some models take up their state for a single token only, and silently start afresh with a longer
chunk. No table of names tells which; a few tokens do.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ....vmem.errors import UnsupportedModel
from ..forward import Forward
from ..recurrent_state import RecurrentState, StepState
from .attention_probe import AttentionProbe, refusing

_TOLERANCE = 2e-2  # of what comes out: above rounding in bfloat16
_SHARE = 0.15  # of the difference that state makes
_SEQUENCES = ([1, 2, 3, 4], [4, 1, 2, 3])


def probe_state(model: PreTrainedModel) -> tuple[AttentionProbe, list[int]]:
    """What the attention layers of a hybrid ask for, and which layers they should be.

    Raises UnsupportedModel if a chunk or a decode does not go on from the state before it.
    """
    states = RecurrentState(model.config, len(_SEQUENCES))
    first, second = _SEQUENCES
    probe, whole = _run(model, [first], 0, states.fresh())
    others = _run(model, [second], 0, states.fresh())[1]

    _run(model, [first[:2]], 0, begun := states.fresh())
    places = torch.arange(len(_SEQUENCES), device=model.device)
    states.scatter(places[:1], begun)
    chunk = _run(model, [first[2:]], 2, states.gather(places[:1]))[1]
    alone = _run(model, [first[2:]], 2, states.fresh())[1]
    _check_goes_on(model, "a chunk of a prompt", chunk, [part[2:] for part in whole], alone)

    for place, sequence in zip(places.split(1), _SEQUENCES, strict=True):
        _run(model, [sequence[:3]], 0, begun := states.fresh())
        states.scatter(place, begun)
    last = [sequence[3:] for sequence in _SEQUENCES]
    decoded = _run(model, last, 3, states.gather(places))[1]
    alone = _run(model, last, 3, states.fresh())[1]
    expected = [torch.stack([a[3], b[3]]) for a, b in zip(whole, others, strict=True)]
    _check_goes_on(model, "a decode", decoded, expected, alone)
    return probe, states.fresh().attention_layers


def _check_goes_on(
    model: PreTrainedModel,
    what: str,
    got: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    afresh: Sequence[torch.Tensor],
) -> None:
    """Compare what came of some tokens with what came of them in one run from the start.

    Each part is [num_tokens, elements]. Where state makes a difference, to `afresh`, that must be
    there: a model may take up one half of its state, and forget the other.
    """
    tells = False
    for part, whole, fresh in zip(got, expected, afresh, strict=True):
        off, apart = (part - whole).norm(dim=-1), (whole - fresh).norm(dim=-1)
        told = apart > _TOLERANCE * whole.norm(dim=-1)
        tells = tells or bool(told.any())
        if (off > _SHARE * apart)[told].any():
            raise UnsupportedModel(
                f"{type(model).__name__} does not go on from its recurrent state in {what}; use a "
                "newer version of transformers, or vkv.VirtualCache"
            )
    if not tells:
        raise UnsupportedModel(
            f"{type(model).__name__} has recurrent state, and {what} does not show whether it goes "
            "on from it; use vkv.VirtualCache"
        )


def _run(
    model: PreTrainedModel, tokens: Sequence[list[int]], start: int, state: StepState
) -> tuple[AttentionProbe, list[torch.Tensor]]:
    """Run `tokens`, which stand at `start` and behind.

    Returns what attention was asked, and what came: the logits and each layer's inputs to
    attention, float32 [B * num_tokens, elements].
    """
    ids = torch.tensor(tokens, device=model.device)
    positions = torch.arange(start, start + ids.shape[1], device=model.device).expand_as(ids)
    probe = AttentionProbe()
    with refusing(model):
        probe.logits.append(Forward(model)(ids, positions, probe, state=state))
    return probe, [part.float() for part in (*probe.logits, *probe.inputs.values())]
