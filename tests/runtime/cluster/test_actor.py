"""What an instance that cannot begin leaves on its node."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vkv.runtime.cluster.instances import actor
from vkv.vmem.errors import InvalidOperation


@pytest.mark.parametrize("error", [OSError("no port is left"), InvalidOperation("no")])
def test_who_cannot_listen_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object) -> Any:
        assert list(tmp_path.iterdir())
        raise error

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(actor, "_where", lambda: ("there", "127.0.0.1"))
    monkeypatch.setattr(actor, "load", lambda *_, **__: None)
    loop = SimpleNamespace(engine=SimpleNamespace(fingerprint=None))
    monkeypatch.setattr(actor, "build_loop", lambda *_: loop)
    monkeypatch.setattr(actor, "_listen", refuse)
    order = actor.InstanceOrder(
        model=None, device="cpu", dtype="float32", options={}, path="", front_node="here"
    )
    if isinstance(error, InvalidOperation):
        assert actor.InstanceActor(order).ready().failure is not None
    else:
        with pytest.raises(OSError, match="no port is left"):
            actor.InstanceActor(order)
    assert list(tmp_path.iterdir()) == []
