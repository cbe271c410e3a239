"""What a source meets when its tokens cannot be sent: the move ends, and the engine goes on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vkv.allocator.transfer import TransferKey
from vkv.runtime.link.carrier import SocketCarrier
from vkv.vmem.errors import DriverError, InvalidOperation


def _refuse(*args: object) -> Any:
    raise DriverError("injected")


@pytest.mark.parametrize("by_pages", [False, True])
def test_a_refused_call_ends_the_move_alone(tmp_path: Path, by_pages: bool) -> None:
    carrier = SocketCarrier(str(tmp_path / "kv"))
    incoming: Any = SimpleNamespace(
        by_pages=by_pages, num_held=0, spans=_refuse, record_fence=_refuse
    )
    outgoing: Any = SimpleNamespace(
        key=TransferKey("a/0", 1), num_tokens=9, spans=_refuse, lend=_refuse
    )
    address = carrier.offer(incoming)
    with pytest.raises(InvalidOperation, match="injected"):
        carrier.carry(outgoing, address, 0, 9)
    carrier.close()
    with pytest.raises(InvalidOperation, match="begin another move"):
        carrier.carry(outgoing, address, 0, 9)
