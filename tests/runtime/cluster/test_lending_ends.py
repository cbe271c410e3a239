"""What an engine keeps of those that it borrows from, and that come and go."""

from collections.abc import Iterator
from pathlib import Path

import borrowing
import msgspec
import pytest
from vkv import LLM
from vkv.runtime.cluster.instances.lending import Lending
from vkv.runtime.engine.memory.lending import CreditLine, LendingOrder
from vkv.runtime.engine.memory.segments import segment_server, take_back
from vkv.runtime.link.addresses import Place
from vkv.runtime.model.segments import HolderLost


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[LLM, Lending, Lending]]:
    """An engine, its lending, and that of another one."""
    tmp_path.chmod(0o700)
    model = borrowing.model()
    llms = [borrowing.make(model, kv_memory=borrowing.POOL) for _ in range(2)]
    lendings = []
    for number, llm in enumerate(llms):
        server = segment_server(llm.loaded, llm.engine)
        assert server is not None
        lendings.append(Lending(llm.loop, server, str(tmp_path / f"{number}.lend"), Place()))
    yield llms[0], lendings[0], lendings[1]
    for lending, llm in zip(lendings, llms, strict=True):
        lending.close()
        llm.close()


def _obey(lending: Lending, *lines: CreditLine) -> None:
    lending.obey(msgspec.json.encode(LendingOrder(longest=3000, lines=lines)).decode())


def test_nothing_stays_of_who_was_lost_and_called_in_vain(
    ends: tuple[LLM, Lending, Lending],
) -> None:
    llm, ours, theirs = ends
    line = CreditLine("instance 1", theirs.address.told(), 512)
    segmented = llm.engine.runner.segmented
    assert segmented is not None
    _obey(ours, line)
    assert "instance 1" in segmented.holders
    theirs.close()
    take_back(llm.engine.scheduler, HolderLost("instance 1", "it is silent"))
    _obey(ours, msgspec.structs.replace(line, num_tokens=0))
    _obey(ours, line)  # it is called again, and is not there
    report = ours.report()
    assert report is not None
    assert report.unreachable == ("instance 1",)
    _obey(ours)
    assert not segmented.holders
