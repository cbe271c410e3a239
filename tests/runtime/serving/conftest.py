"""One server for all tests that leave it as it is."""

from collections.abc import Iterator

import pytest
from served import Served


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The built-in model, served."""
    log = tmp_path_factory.mktemp("served") / "log"
    with Served("--max-num-seqs", "8", "--trust-request-chat-template", log=log) as server:
        yield server
        assert "Traceback" not in server.log(), server.log()
