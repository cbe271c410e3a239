"""`vkv bench schedule`: a record of what the scheduler costs, and lines that stay as long."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner
from vkv.bench.load import schedule
from vkv.bench.load.options import ScheduleOptions
from vkv.runtime.cli import main as cli
from vkv.vmem.errors import InvalidConfig


@pytest.mark.parametrize(
    ("policy", "name"),
    [("fcfs", "schedule"), ("priority", "schedule-priority"), ("fair", "schedule-fair")],
)
def test_it_records_every_line(tmp_path: Path, policy: str, name: str) -> None:
    arguments = ["bench", "schedule", "--queued", "3,40", "--num-finished", "20", "--repeats", "2"]
    arguments += ["--scheduling-policy", policy]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob(f"{name}_*.json")
    record = json.loads(path.read_text())
    assert set(record["results"]["microseconds"]) == {"3", "40"}
    for costs in record["results"]["microseconds"].values():
        assert all(len(costs[name]) == 2 and min(costs[name]) > 0 for name in costs)
    assert [row[0] for row in record["tables"][0]["rows"]] == ["3", "40"]


def test_requests_run_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    step = schedule._step

    def watched(scheduler: schedule.Scheduler) -> list[schedule.Request]:
        lengths.append(len(scheduler.requests))
        ended = step(scheduler)
        assert all(len(r.output_token_ids) == schedule._OUTPUT_TOKENS for r in ended)
        return ended

    monkeypatch.setattr(schedule, "_step", watched)
    costs = schedule.Costs()
    schedule._measure(40, ScheduleOptions(queued=(40,), num_finished=30, max_seqs=4), costs)
    assert min(lengths) == max(lengths) == 40
    assert len(costs.add) == len(costs.schedule) == len(costs.abort) == 1


def test_a_line_of_nobody_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="queued"):
        ScheduleOptions(queued=(0,))
    with pytest.raises(InvalidConfig, match="use one of fcfs, priority, fair"):
        ScheduleOptions(scheduling_policy="lottery")
