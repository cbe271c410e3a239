"""Sequences stay where they are if the other engine's model is not the same one."""

from collections.abc import Iterator
from contextlib import contextmanager

import migrating
import torch
import zoo
from vkv import LLM
from vkv.runtime.engine.migration.local import Migrations
from vkv.runtime.engine.migration.messages import Begin, Prepare
from vkv.runtime.link.messages import decode_to_engine, encode


@contextmanager
def _two(change: float, *, known: bool = True) -> Iterator[migrating.Rig]:
    """Engines of models that look alike; the second one's numbers are others by `change`."""
    models = [zoo.tiny_model("llama"), zoo.tiny_model("llama")]
    with torch.no_grad():
        next(models[1].parameters()).add_(change)
    options = zoo.with_defaults({"max_seqs": 16})
    with (
        LLM(models[0], device="cpu", **options) as a,
        LLM(models[1], device="cpu", **options) as b,
    ):
        for llm in (a, b) if known else ():
            assert llm.engine.fingerprint is not None
            assert llm.engine.fingerprint.known == ""
            assert llm.engine.fingerprint.value() == llm.engine.fingerprint.known
        loops = {"a": a.loop, "b": b.loop}
        clock = migrating.Clock()
        yield migrating.Rig(Migrations(loops, clock=clock, repeat_s=4), loops, clock)


def _move_one(rig: migrating.Rig) -> migrating.Streams:
    (spec,) = migrating.specs(migrating.prompts()[:1], max_tokens=30, kinds=[{"temperature": 0}])
    rig.add([spec])
    for _ in range(4):
        rig.turn()
    rig.migrations.migrate(("0", 0), "b")
    rig.finish()
    return rig.streams


def test_another_model_with_the_same_shapes_is_refused_with_the_reason() -> None:
    (spec,) = migrating.specs(migrating.prompts()[:1], max_tokens=30, kinds=[{"temperature": 0}])
    with _two(0.01) as rig:
        handshakes = []
        migrate = rig.migrations.arbiter.migrate
        rig.migrations.arbiter.migrate = lambda key, target: (  # type: ignore[method-assign]
            migrate(key, target),
            handshakes.append(rig.migrations.arbiter.handshake(key)),
        )[0]
        streams = _move_one(rig)
        counts = rig.migrations.arbiter.counts
        assert (counts.moved, counts.stayed) == (0, 1)
        assert "put the same files" in handshakes[0].why
    migrating.assert_equal(streams, migrating.undisturbed(zoo.tiny_model("llama"), [spec]))


def test_the_same_model_twice_is_one_and_what_nobody_knows_is_not_compared() -> None:
    for change, known in ((0.0, True), (0.0, False)):
        with _two(change, known=known) as rig:
            _move_one(rig)
            assert rig.migrations.arbiter.counts.moved == 1


def test_the_model_travels_as_plain_data() -> None:
    (spec,) = migrating.specs(migrating.prompts()[:1])
    with _two(0.0) as rig:
        rig.add([spec])
        rig.turn()
        rig.migrations.migrate(("0", 0), "b")
        seen = []
        channel = rig.migrations._channel
        send = channel.send
        channel.send = lambda receiver, message: (  # type: ignore[method-assign]
            seen.append(message),
            send(receiver, message),
        )[1]
        rig.finish()
        (prepare, *_) = [message for message in seen if isinstance(message, Prepare)]
        assert any(isinstance(message, Begin) for message in seen)
        fingerprint = rig.loops["a"].engine.fingerprint
        assert fingerprint is not None
        assert prepare.model == fingerprint.known != ""
        decoded = decode_to_engine(encode(prepare))
        assert isinstance(decoded, Prepare)
        assert decoded.model == prepare.model
