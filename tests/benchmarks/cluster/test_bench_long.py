"""`vkv bench long`: each part with tiny settings, and what is made of what it found."""

from typing import Any

import pytest
import torch
from vkv.bench.cluster.long import context, decode
from vkv.bench.cluster.long.decode import FILE, HOME, HOST, LENDERS, Cell, Decoded
from vkv.bench.cluster.long.options import LongOptions
from vkv.bench.models.checkpoints import Checkpoints, save_checkpoints
from vkv.vmem.errors import InvalidConfig


def _options(**changes: Any) -> LongOptions:
    tiny: dict[str, Any] = {
        "shape": "llama-tiny",
        "pool_tokens": 2048,
        "counts": (1, 2),
        "creditors": (1, 2),
        "segments": (2, 1),
        "batches": (1, 2),
        "links": ("unix", "tcp"),
        "elsewhere_tokens": 1024,
        "at_home_tokens": 32,
        "num_steps": 4,
        "output_tokens": 4,
    }
    return LongOptions(**(tiny | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("model")
    most = context.most_positions(_options())
    return save_checkpoints(
        "llama-tiny", None, torch.float32, None, folder, max_position_embeddings=most
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parts": ("contexts",)}, "'contexts'; use some of context"),
        ({"links": ("carrier",)}, "use some of unix, tcp"),
        ({"segments": (3, 1)}, "use equal ones of a multiple of 512"),
        ({"creditors": (1, 2), "segments": (1,)}, "1 segments do not go evenly to 2"),
        ({"batches": (0,)}, "1 or more"),
        ({"links": ()}, "need one each"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        _options(**changes)


# -- the longest context -------------------------------------------------------------------------


def test_two_instances_run_what_one_cannot(saved: Checkpoints) -> None:
    pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")
    options, found = _options(), {}
    for _ in context.measure(options, saved, found):
        pass
    assert [one.same_tokens for one in found.values()] == [True, True]
    assert [one.logprob_difference for one in found.values()] == [0.0, 0.0]
    assert found[1].num_tokens == 2049  # the last one is never computed
    assert found[1].lent_tokens == 0
    assert found[2].num_tokens > 2049 + 256
    assert found[2].lent_tokens >= found[2].num_tokens - 1024 - 512
    table = context.table(found, options)
    assert [row[2] for row in table.rows] == ["1.00", f"{found[2].num_tokens / 2049:.2f}"]


# -- decodes -------------------------------------------------------------------------------------


def test_queries_and_results_travel_and_never_a_key(saved: Checkpoints) -> None:
    options, found = _options(), {}
    for _ in decode.measure(options, saved, found):
        pass
    assert list(found) == decode.cells(options)
    for cell, one in found.items():
        assert len(one.step_s) == options.num_steps
        assert one.segments == cell.segments * cell.batch
        assert one.elsewhere_tokens == (0 if cell.where == HOME else 1024 * cell.batch)
        if cell.where != LENDERS:
            assert one.link_bytes == one.moved_bytes == 0
            continue
        # A query of 4 layers of 4 heads of 16 floats to each segment.
        assert one.sent_bytes == one.segments * 4 * 4 * 16 * 4
        assert one.sent_bytes < one.received_bytes < 2 * one.sent_bytes
        assert one.moved_bytes == one.elsewhere_tokens * saved.kv_bytes_per_token
    assert {cell.where for cell in found} == {HOME, LENDERS, HOST, FILE}
    assert len(decode.table(found, saved).rows) == len(found)
    assert decode.fitted(found) is not None


def test_costs_of_a_link_are_found_again() -> None:
    found = {Cell(HOME, batch=batch): Decoded(step_s=[0.010]) for batch in (1, 4)}
    for batch in (1, 4):
        for creditors in (1, 2, 3):
            num_bytes = 6 * batch * 1000.0
            step_s = 0.010 + 2e-4 + 3e-4 * creditors + 5e-8 * num_bytes
            found[Cell(LENDERS, "unix", creditors, 6, batch)] = Decoded(
                step_s=[step_s] * 3,
                segments=6 * batch,
                sent_bytes=num_bytes / 2,
                received_bytes=num_bytes / 2,
                moved_bytes=1 << 20,
                moved_s=1e-3,
            )
    fit = decode.link_cost(found, "unix")
    assert fit is not None
    cost, error = fit
    assert (cost.step_s, cost.holder_s, cost.byte_s) == pytest.approx((2e-4, 3e-4, 5e-8))
    assert cost.query_bytes == pytest.approx(1000.0)
    assert cost.move_bytes_per_s == pytest.approx((1 << 20) / 1e-3)
    assert error < 1e-9
    assert decode.link_cost(found, "tcp") is None
    assert cost.asking_s(0, 5) == 0
    assert cost.asking_s(2, 6) == pytest.approx(2e-4 + 6e-4 + 6000 * 5e-8)
