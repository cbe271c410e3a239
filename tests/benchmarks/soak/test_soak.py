"""`vkv soak`: the same plan for the same seed; what is planted is found; two minutes of it all."""

import os
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import pytest
from typer.testing import CliRunner
from vkv import LLM, SamplingParams
from vkv.bench.soak import crew, left_over, run, site
from vkv.bench.soak.asks import Ask, Mix, draw
from vkv.bench.soak.models import BASE, Models, save_models
from vkv.bench.soak.options import PARTS, SoakOptions
from vkv.bench.soak.phases import Phase, phases
from vkv.bench.soak.reference import Answers
from vkv.bench.soak.right import CUT, Right, Turn, differs
from vkv.bench.soak.tally import Tally
from vkv.runtime.cli import main as cli
from vkv.runtime.cluster.stats import Done
from vkv.runtime.engine.messages import Abort, Add
from vkv.runtime.request.spec import RequestSpec
from vkv.vmem.errors import EngineDied, InvalidConfig

_MIX = Mix(name="mixed", kinds={"greedy": 1, "cancel": 1, "conversation": 1}, voices=(BASE,))


def _soak(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["soak", *words])


# -- the plan ------------------------------------------------------------------------------------


def test_the_same_seed_asks_the_same() -> None:
    first = [draw(3, _MIX, number) for number in range(50)]
    assert first == [draw(3, _MIX, number) for number in range(50)]
    assert first != [draw(4, _MIX, number) for number in range(50)]
    assert {ask.kind for ask in first} == set(_MIX.kinds)


def test_options_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="minutes is 0"):
        SoakOptions(minutes=0)
    with pytest.raises(InvalidConfig, match=r"'kill'.*kills"):
        SoakOptions(without=("kill",))
    with pytest.raises(InvalidConfig, match="no cluster"):
        SoakOptions(without=("mixed", "apart"))
    models = Models(tmp_path, tmp_path, tmp_path, tmp_path, {"a": tmp_path})
    everything, *_ = phases(SoakOptions(), models, tmp_path)
    (little,) = phases(SoakOptions(without=(*PARTS[1:],)), models, tmp_path)
    assert len(little.mix.kinds) < len(everything.mix.kinds)
    assert "speculative" not in little.options
    assert not little.options["lending"]


def test_what_is_wrong_with_an_output_is_said() -> None:
    right = Right((1, 2, 3), "abc", "length", None)
    assert differs(right, right) is None
    assert differs(Right((1, 2), "ab", CUT, None), right) is None
    for found, words, count in (
        (Right((1, 9, 8), "axy", "length", None), "token 1 is 9 in place of 2, and 2 of 3", 2),
        (Right((1, 9), "ax", CUT, None), "token 1 is 9", 1),
        (Right((1, 2, 3, 4), "abcd", "length", None), "1 tokens come after", 1),
        (Right((1, 2), "ab", "abort", None), "2 tokens, abort", 0),
        (Right((1, 2, 3), "abd", "length", None), "'abd' in place of", 0),
    ):
        said = differs(found, right)
        assert said is not None
        assert words in said[0]
        assert said[1] == count


# -- what is planted -----------------------------------------------------------------------------


class _Here:
    """A reference in this process."""

    def __init__(self, models: Models, log: Path) -> None:
        self._answers = _Here.made or Answers(models)

    made: Answers | None = None

    def answers(self, asks: Sequence[Ask]) -> list[list[Turn]]:
        return self._answers.to([replace(ask, cancel_after=None) for ask in asks])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class _Quiet:
    """One engine to which nothing is done."""

    def __init__(self, home: Path, tally: Tally) -> None:
        self._home, self._tally = home, tally

    def faults(self) -> Any:
        return nullcontext()

    def note(self) -> None: ...

    def check_idle(self) -> None:
        site.look_at({os.getpid(): site.FRONT}, self._home, self._tally, most_open=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"), seed=0)


@pytest.fixture(scope="module")
def engine(models: Models) -> Iterator[LLM]:
    options = {"device": "cpu", "dtype": "float32", "repeatable": True, "max_seqs": 6}
    with LLM(models.zoo, model=BASE, adapters=models.adapters, **options) as engine:
        yield engine


@pytest.fixture(scope="module")
def answers(models: Models) -> Iterator[Answers]:
    answers = Answers(models)
    yield answers
    answers.close()


@pytest.fixture
def quiet(
    monkeypatch: pytest.MonkeyPatch, models: Models, engine: LLM, answers: Answers
) -> list[str]:
    """A soak of one engine, for some seconds; what is typed for it."""

    @contextmanager
    def open_site(
        phase: Phase, options: SoakOptions, chance: random.Random, tally: Tally
    ) -> Iterator[Any]:
        yield _Quiet(phase.models.base.parent, tally), engine

    monkeypatch.setattr(run, "open_site", open_site)
    monkeypatch.setattr(run, "_ROUND_S", 1.0)
    monkeypatch.setattr(run, "_LEAST_S", 0.0)
    monkeypatch.setattr(run, "Reference", _Here)
    monkeypatch.setattr(run, "save_models", lambda home, seed: models)
    monkeypatch.setattr(_Here, "made", answers)
    return ["--minutes", "0.02", "--clients", "3", "--without", "apart,lending,sessions"]


def test_nothing_wrong_is_exit_status_0(quiet: list[str]) -> None:
    done = _soak(*quiet)
    assert done.exit_code == 0, done.output
    assert "Nothing was wrong" in done.output


def test_a_wrong_token_is_named(
    quiet: list[str], answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = answers.to

    def wrong(asks: Sequence[Ask]) -> list[list[Turn]]:
        found = to(asks)
        for turns in found:
            right, *others = turns[0]
            changed = (right.token_ids[0] ^ 1, *right.token_ids[1:])
            turns[0] = (replace(right, token_ids=changed), *others)
        return found

    monkeypatch.setattr(answers, "to", wrong)
    done = _soak(*quiet)
    assert done.exit_code == 1, done.output
    said = " ".join(done.output.split())
    assert re.search(r"request \d+ \(\w+, \S+\).*: token 0 is \d+ in place of \d+", said), said
    assert re.search("wrong tokens │ [1-9]", said)


def test_a_lost_request_is_named(
    quiet: list[str], engine: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = engine.generate, []

    def dying(*given: Any, **how: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise EngineDied("it was planted")
        return generate(*given, **how)

    monkeypatch.setattr(engine, "generate", dying)
    done = _soak(*quiet)
    assert done.exit_code == 1, done.output
    assert "ended with EngineDied: it was planted" in " ".join(done.output.split())
    assert "lost requests │ 1" in " ".join(done.output.split())


def test_a_leak_is_named(quiet: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def more(pid: int) -> tuple[int, int]:
        opened.append(pid)
        return 10 * len(opened), 5

    monkeypatch.setattr(left_over, "num_open", more)
    done = _soak(*quiet[2:], "--minutes", "0.5")
    assert done.exit_code == 1, done.output
    assert "the soak itself has 20 descriptors, and had 10" in " ".join(done.output.split())


def test_files_of_keys_and_values_are_counted_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    me, tally = os.getpid(), Tally()
    with (tmp_path / "one").open("w"):
        (tmp_path / "one").unlink()  # which an engine may have mapped still
        assert left_over.num_files(me, tmp_path) == 1
        site.look_at({me: "it"}, tmp_path, tally, most_open=0)
    site.look_at({me: "it"}, tmp_path, tally, most_open=0)
    before, after = tally.processes[f"it, {me}"]
    assert before.num_descriptors == after.num_descriptors
    assert tally.is_right
    monkeypatch.setattr(left_over, "num_files", lambda pid, home: 129)
    site.look_at({me: "it"}, tmp_path, tally, most_open=200)
    assert tally.leaks == ["it has 129 files of keys and values open"]


def test_an_interruption_waits_for_those_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over, done, late = threading.Event(), list[str](), list[threading.Thread]()

    def work() -> None:
        is_over.wait()
        time.sleep(0.2)
        done.append("all of it")

    join = crew._join

    def interrupted(*given: Any) -> None:
        monkeypatch.setattr(crew, "_join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(crew, "_join", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        crew.at_work([threading.Thread(target=work)], is_over, 10.0, late.append),
    ):
        pass
    assert done
    stuck = threading.Thread(target=time.sleep, args=(1.0,))
    with crew.at_work([stuck], is_over, 0.0, late.append):
        pass
    assert late == [stuck]
    stuck.join()


def test_pages_that_stay_are_named(
    engine: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loop = engine.loop
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    loop.post(Add(RequestSpec(request_id="stays", prompt_token_ids=[1, 2, 3], params=params)))
    loop.turn()
    stats = SimpleNamespace(
        num_migrations=0, num_stayed=0, num_recomputed=0, done=Done(), instances=(), requests={}
    )
    router: Any = SimpleNamespace(
        ask=lambda question: [loop.memory_map()] if question == "memory_map" else loop.trim(),
        members_now=list,
        stats_now=lambda: stats,
    )
    cluster: Any = SimpleNamespace(router=router, stats=lambda: stats)
    faults: Any = SimpleNamespace(num_killed=0)
    monkeypatch.setattr(site, "_IDLE_S", 0.1)
    before, after = Tally(), Tally()
    site.ClusterSite("mixed", cluster, faults, before, tmp_path).check_idle()
    assert before.leaks[0].startswith("mixed: held while nothing runs")
    assert before.held_pages[0] > 0
    loop.post(Abort("stays"))
    loop.carry_out()
    site.ClusterSite("mixed", cluster, faults, after, tmp_path).check_idle()
    assert after.is_right, after
    assert after.held_pages == [0]


# -- all of it -----------------------------------------------------------------------------------


def test_two_minutes_of_everything(tmp_path: Path) -> None:
    """`vkv soak --minutes 10` is its nightly form."""
    pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")
    done = _soak("--minutes", "2", "--seed", "1", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    (record,) = tmp_path.glob("soak_*.md")
    assert "| wrong tokens | 0 |" in record.read_text()
