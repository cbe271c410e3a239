"""What a hybrid remembers of a sequence, as bytes that a process can send to another."""

import msgspec
import torch

from ...model.recurrent_state import SlotState


class _Entry(msgspec.Struct, frozen=True):
    """One tensor: of which kind, layer and number, and what is in it."""

    key: tuple[str, int, int]
    dtype: str
    shape: tuple[int, ...]
    data: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[_Entry])


def pack_state(state: SlotState | None) -> bytes | None:
    """The bytes of a state in host memory; None of none."""
    if state is None:
        return None
    return _encoder.encode(
        [
            _Entry(
                key,
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape),
                tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
            )
            for key, tensor in state.items()
        ]
    )


def unpack_state(data: bytes | None) -> SlotState | None:
    """The state again. Raises `msgspec.MsgspecError` for other bytes."""
    if data is None:
        return None
    return {
        entry.key: torch.frombuffer(bytearray(entry.data), dtype=getattr(torch, entry.dtype)).view(
            entry.shape
        )
        for entry in _decoder.decode(data)
    }
