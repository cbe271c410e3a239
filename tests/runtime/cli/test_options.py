"""Options of commands from dataclasses: what is declared once is what a user is offered."""

import importlib
import subprocess
import sys
from dataclasses import dataclass, is_dataclass
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result
from vkv.bench.cli import bench
from vkv.runtime.cli.lazy import LazyCommand
from vkv.runtime.cli.options import Flag, Options, computed, field_docs, function, group, option
from vkv.runtime.engine.config import EngineConfig
from vkv.runtime.request.sampling_params import SamplingParams


def _pair(text: str) -> tuple[int, int]:
    left, separator, right = text.partition("x")
    if not separator:
        raise ValueError("write AxB")
    return int(left), int(right)


@dataclass(frozen=True, kw_only=True)
class Inner:
    weight: float = option(1.5, help="Of it.")


@dataclass(frozen=True, kw_only=True)
class Known:
    """Something.

    Attributes:
        hidden: no option.
    """

    place: str = option(is_argument=True, help="Where.")
    size: tuple[int, int] = option("2x3", parse=_pair, names=("--area",), help="How large.")
    count: int = option(4, least=1, help="How many.")
    threads: int = computed(lambda: 7, kind=int, help="As many as there are.")
    name: str | None = option(None, help="What of.")
    inner: Inner = group(Inner)
    hidden: int = 5


def invoke(*words: str, parts: tuple[Options, ...] = ()) -> tuple[Result, list[Any]]:
    seen: list[Any] = []
    app = typer.Typer()
    app.command()(function(lambda *found: seen.extend(found), *(parts or [Options(Known)])))
    return CliRunner().invoke(app, list(words)), seen


def test_what_is_not_typed_is_the_dataclass_s_own() -> None:
    result, seen = invoke("here")
    assert result.exit_code == 0, result.output
    assert seen == [Known(place="here")]
    assert seen[0].size == (2, 3)
    assert seen[0].threads == 7


def test_what_is_typed_is_parsed() -> None:
    words = "here --area 5x6 --count 9 --threads 2 --name it --weight 2.5"
    _, seen = invoke(*words.split())
    inner = Inner(weight=2.5)
    assert seen == [Known(place="here", size=(5, 6), count=9, threads=2, name="it", inner=inner)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("here --area 56", "--area '56': write AxB"),
        ("here --count 0", "--count"),
        ("here --hidden 3", "No such option: --hidden"),
        ("here --count much", "--count"),
        ("", "Missing argument"),
    ],
)
def test_a_mistake_names_the_value_and_the_remedy(words: str, said: str) -> None:
    result, seen = invoke(*words.split())
    assert result.exit_code == 2
    assert said.lower() in " ".join(result.output.replace("│", " ").split()).lower()
    assert not seen


def test_fields_of_the_library_are_picked_by_name() -> None:
    engine = Options(EngineConfig, "max_seqs", "kv", kv_memory=Flag(help="Memory."))
    sampling = Options(SamplingParams, "top_k", temperature=Flag(default=0.0))
    words = "--max-seqs 3 --kv-memory 8MiB --top-k 5"
    result, seen = invoke(*words.split(), parts=(engine, sampling))
    assert result.exit_code == 0, result.output
    assert seen == [
        EngineConfig(max_seqs=3, kv_memory="8MiB"),
        SamplingParams(top_k=5, temperature=0.0),
    ]
    assert engine.flags["kv_memory"].help == "Memory."
    assert engine.flags["kv_memory"].default == EngineConfig.kv_memory
    assert engine.flags["max_seqs"].help == "Requests that run at once."
    assert sampling.flags["top_k"].help.startswith("Keep this many of the likeliest tokens")


def test_every_option_of_an_engine_has_a_help() -> None:
    """`vkv` may pick any of them."""
    said = field_docs(EngineConfig)
    assert set(said) == set(EngineConfig.__dataclass_fields__)
    assert all(text[0].isupper() or not text[0].isalpha() for text in said.values())


def test_every_bench_offers_options_with_help() -> None:
    commands = typer.main.get_command(bench).commands  # type: ignore[attr-defined]
    assert {"memory", "serve", "attention", "report"} <= set(commands)
    for name, command in commands.items():
        assert isinstance(command, LazyCommand)
        assert command.made.params, name
        assert all(param.help for param in command.made.params), name
        assert command.made.help == command.help


def test_no_bench_takes_a_number_that_it_could_not_work_with() -> None:
    """Whole numbers have a least, but for seeds."""
    folders = ("", ".kernels", ".models", ".load", ".cluster", ".cluster.long", ".soak")
    modules = [importlib.import_module(f"vkv.bench{folder}.options") for folder in folders]
    kinds = {
        kind
        for module in modules
        for kind in vars(module).values()
        if is_dataclass(kind) and kind.__module__ == module.__name__
    }
    assert len(kinds) > 20
    open_ended = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name, flag in Options(kind).flags.items()
        if flag.kind in (int, int | None) and flag.least is None and name != "seed"
    ]
    assert not open_ended


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ("torch", "transformers", "numpy", "matplotlib")),
        (["bench", "--help"], ("torch", "transformers", "numpy", "matplotlib")),
        (["bench", "throughput", "--help"], ("torch", "transformers", "numpy", "matplotlib")),
        (["quantize", "--help"], ("torch", "transformers", "numpy", "matplotlib")),
        (["info"], ("transformers", "matplotlib")),
    ],
)
def test_a_command_loads_no_more_than_it_needs(
    arguments: list[str], absent: tuple[str, ...]
) -> None:
    program = f"""
import sys
from vkv.runtime.cli.main import app
app({arguments!r}, standalone_mode=False)
print("loaded:", *(name for name in {absent!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_import_vkv_loads_none_of_it() -> None:
    program = "import sys, vkv; print('torch' in sys.modules, 'typer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
