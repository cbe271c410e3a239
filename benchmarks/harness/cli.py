"""The `vkv bench` commands: what each measures, and its tables and the record's place shown.

The options of a command are the fields of its dataclass, in `<folder>/options.py`; what it runs is
imported when it runs.
"""

import importlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..runtime.cli.lazy import LazyCommand
from ..runtime.cli.options import Options, function
from .options import Folder, Output, StartupOptions

if TYPE_CHECKING:
    from .record import Table

Command = Callable[..., None]

bench = typer.Typer(
    help="Measure: each run writes a record, a table and a plot.", no_args_is_help=True
)


@bench.command(cls=LazyCommand)
def attention() -> Command:
    """Contiguous against paged attention, the kernels alone, on mapped virtual memory.

    Decodes and prompt chunks over slots in several layouts and over shuffled blocks that hold the
    same numbers, in turns, beside the machine's memory bandwidth and matrix rate; on a CPU, vLLM's
    paged kernel too, where `--peer` names an interpreter that has it.
    """
    from .kernels.options import AttentionOptions

    return _measuring(AttentionOptions, ".kernels.attention")


@bench.command(cls=LazyCommand)
def linear() -> Command:
    """4-bit against dense linear layers, by number of rows, the products alone.

    All products of a layer of real shapes, by vkv's int4 kernels and by the dense library, in
    turns, beside the machine's memory bandwidth and matrix rate.
    """
    from .kernels.options import LinearOptions

    return _measuring(LinearOptions, ".kernels.linear")


@bench.command(cls=LazyCommand)
def vmm() -> Command:
    """Every driver call by page size and run length: create, map, access, unmap, release."""
    from .kernels.options import VmmOptions

    return _measuring(VmmOptions, ".kernels.vmm")


@bench.command(cls=LazyCommand)
def stall() -> Command:
    """Whether mapping memory is hidden behind the computation, step by step.

    Decodes over slots that grow as in the engine, all layers' attention and no more, with mapping
    in the background and, in turns with it, without: how long each step waited for memory.
    """
    from .kernels.options import StallOptions

    return _measuring(StallOptions, ".kernels.stall")


@bench.command(cls=LazyCommand)
def move() -> Command:
    """KV to another process: pages handed over against bytes copied, by size.

    Slots go to a second process and are read there, by each channel in turns: how long until they
    are the other's, how long the first read of them takes, and what was copied.
    """
    from .kernels.options import MoveOptions

    return _measuring(MoveOptions, ".kernels.move")


@bench.command(cls=LazyCommand)
def memory() -> Command:
    """Memory held against tokens held, over ragged requests, and after them.

    vkv's contiguous and paged caches, beside the static and dynamic caches of transformers as a
    padded batch fills them. Also reports the time that mapping took of the engine's steps.
    """
    from .models.options import MemoryOptions

    return _measuring(MemoryOptions, ".models.memory")


@bench.command(cls=LazyCommand)
def throughput() -> Command:
    """Tokens a second, offline, against transformers, vLLM, llama.cpp and OpenVINO.

    Each system runs in a process of its own on the same model, prompts, output lengths and
    threads, taking turns cell by cell; medians and ratios of interleaved repeats. --quant adds
    vkv-int4, whose output layer stays dense, vkv-int4-head, where it is in 4 bits too,
    vkv-int4-int8, which rounds activations to 8 bits besides, and to llama.cpp and OpenVINO their
    own 4 bits. Ctrl-C ends it and writes what has been measured.
    """
    from .models.options import ThroughputOptions

    return _measuring(ThroughputOptions, ".models.throughput")


@bench.command("first-token", cls=LazyCommand)
def first_token() -> Command:
    """How long a fresh process takes to its first token, the model's file in the system's cache.

    On the CPU, in turns with other systems; what Python's imports take of it is shown beside.
    """
    from .models.options import FirstTokenOptions

    return _measuring(FirstTokenOptions, ".models.first_token")


@bench.command(cls=LazyCommand)
def cache() -> Command:
    """VirtualCache against transformers' DynamicCache and StaticCache, under model.generate.

    On the CPU: time of a decoded token and of a prompt, and peak memory beyond the model's. The
    context is filled with random keys and values; the caches take turns in fresh processes.
    """
    from .models.options import CacheOptions

    return _measuring(CacheOptions, ".models.cache")


@bench.command(cls=LazyCommand)
def session() -> Command:
    """The time to a first token from a session on disk, against computing its tokens.

    Fresh processes take turns: without the session, with its file in the system's cache, and with
    the cache dropped. Then several have it open at once: how much memory that takes.
    """
    from .models.options import SessionOptions

    return _measuring(SessionOptions, ".models.session")


@bench.command(cls=LazyCommand)
def speculate() -> Command:
    """Tokens a second with guesses against without, by how much a text repeats itself.

    Summaries that quote, code that is edited, a loop, what is new, and what misleads every guess:
    said by a model of a real shape whose texts are written beforehand.
    """
    from .models.options import SpeculateOptions

    return _measuring(SpeculateOptions, ".models.speculate")


@bench.command(cls=LazyCommand)
def serve() -> Command:
    """TTFT, TPOT and ITL while requests arrive; SplitFuse against prefill-first.

    Runs the engine in this process; with --server or --peer, drives servers over HTTP instead,
    beside the engine without one. Lengths are those of published traces, regenerated from their
    quantiles; the fields of the record are those of `vllm bench serve`.
    """
    from .load.options import ServeOptions

    return _measuring(ServeOptions, ".load.serve")


@bench.command(cls=LazyCommand)
def switch() -> Command:
    """Requests that give way to others and come back: computed again, or copied, in several ways.

    Conversations of several turns whose priorities change at random, as in FastSwitch's experiment;
    TTFT and time between tokens, copies and bytes a move, and how long steps waited for them.
    """
    from .load.options import SwitchOptions

    return _measuring(SwitchOptions, ".load.switch")


@bench.command(cls=LazyCommand)
def tenants() -> Command:
    """What a light tenant gets beside a heavy one: alone, by arrival and fairly scheduled."""
    from .load.options import TenantsOptions

    return _measuring(TenantsOptions, ".load.tenants")


@bench.command(cls=LazyCommand)
def chains() -> Command:
    """Fine-tunes that share blocks in one engine, beside one process a model, and the base alone.

    On the CPU: tokens a second, latency and memory of the same requests at the same times.
    """
    from .load.options import ChainsOptions

    return _measuring(ChainsOptions, ".load.chains")


@bench.command(cls=LazyCommand)
def tiers() -> Command:
    """What host memory and a folder behind the cache cost while they are not needed.

    Decode steps without a tier, beside an idle worker and beside a busy one; then many requests at
    once that share a long beginning, with and without tiers.
    """
    from .load.options import TiersOptions

    return _measuring(TiersOptions, ".load.tiers")


@bench.command(cls=LazyCommand)
def migrate() -> Command:
    """The pause that a client sees while its request moves to an engine in another process.

    By pages that change hands, by copies in stages and at rest, and by computing all again after
    its instance was killed; from short to long contexts.
    """
    from .load.options import MigrateOptions

    return _measuring(MigrateOptions, ".load.migrate")


@bench.command(cls=LazyCommand)
def cluster() -> Command:
    """Policies of a cluster on real instances, and what the simulator says of the same requests.

    Each policy serves the same trace, where memory is short: TTFT, TPOT and latency, preemptions
    and moves, urgent requests apart. With --roles, prefill and decode apart against instances that
    do both: how many requests a second keep three pairs of promises.
    """
    from .cluster.options import ClusterOptions

    return _measuring(ClusterOptions, ".cluster.bench")


@bench.command(cls=LazyCommand)
def long() -> Command:
    """Contexts beyond one pool: how long, what a token then takes, what lending memory brings.

    The longest context over 1, 2, 4 and 8 instances, compared with one engine's; decode steps
    where first tokens lie at creditors, in host memory or in a file, with the bytes of each link.
    """
    from .cluster.long.options import LongOptions

    return _measuring(LongOptions, ".cluster.long.bench")


@bench.command(cls=LazyCommand)
def schedule() -> Command:
    """What a request costs the scheduler, from a hundred requests in line to a hundred thousand."""
    from .load.options import ScheduleOptions

    return _measuring(ScheduleOptions, ".load.schedule")


@bench.command(cls=LazyCommand)
def adapters() -> Command:
    """What LoRA adapters cost, many in one batch, beside the same requests on the base alone.

    On the CPU: requests with one adapter, with several and with half of them on the base, then
    prompts of all adapters in one step; medians and ratios of turns on one engine.
    """
    from .models.options import AdaptersOptions

    return _measuring(AdaptersOptions, ".models.adapters")


@bench.command(cls=LazyCommand)
def profile() -> Command:
    """Where a decode step's time goes on a CPU, kernel by kernel.

    Beside what reading all weights once, and multiplying by them, would take at the machine's
    limits. Only of models whose decodes are recorded; `vkv info MODEL` says whether they are.
    """
    from .models.options import ProfileOptions

    return _measuring(ProfileOptions, ".models.profile")


@bench.command(cls=LazyCommand)
def startup() -> Command:
    """How long `import vkv`, `vkv --help` and `vkv info` take, in fresh processes."""
    return _measuring(StartupOptions, ".startup")


@bench.command(cls=LazyCommand)
def report() -> Command:
    """All records on one page, REPORT.md: the newest of each kind and machine."""
    return function(_report, Options(Folder))


def simulate() -> Command:
    """Simulate a cluster: latencies, goodput and moves under several policies.

    The real scheduler runs over a cache that only counts, on a virtual clock. What steps take comes
    from a table, or is fitted to steps that were measured. With --record, runs of `vkv bench serve`
    are simulated again, beside what was measured.
    """
    from .cluster.options import SimulateOptions

    return _telling(SimulateOptions, ".cluster.simulate")


def place() -> Command:
    """Search which instances serve most requests a GPU as promised, and say why.

    How many, how large, and whether prompts are computed on other instances than the tokens after
    them: each placement that the machines have room for is simulated at rising rates.
    """
    from .cluster.options import PlaceOptions

    return _telling(PlaceOptions, ".cluster.place")


def soak() -> Command:
    """Everything at once for some minutes; exit status 0 only if nothing was wrong.

    Requests of all kinds are asked of a cluster, while they are moved from instance to instance,
    and instances are killed, stopped, drained and added, and have less memory for a while. What
    comes is compared, token by token, with what a process says that does none of it. From time to
    time all requests end, and nothing may be left of them: pages, descriptors, memory, processes.

    Two clusters take turns, since roles of their own and lending exclude each other, and a cluster
    loads one model or a zoo of alike ones. "mixed" is a model with a fine-tune and adapters, with
    fair shares, lending and guesses from the text. "apart" is a 4-bit model with adapters, with
    instances for prompts and others for tokens, priorities and guesses by half of its layers. All
    models are tiny, in float32; that in 4 bits is in bfloat16, for which its kernels are, and all
    compute the same to the bit in any batch (`repeatable`).
    """
    from .soak.options import SoakOptions

    def measure(chosen: SoakOptions) -> None:
        from .soak.run import run

        path, tables, tally = run(chosen, command_line())
        show_tables(tables)
        if path is not None:
            typer.echo(f"record: {path}")
        if not tally.is_right:
            raise typer.Exit(1)

    return function(measure, Options(SoakOptions))


def _report(chosen: Folder) -> None:
    from .report import report as write_report

    typer.echo(write_report(chosen.folder))


def _measuring(options: type, module: str) -> Command:
    """A command that takes `options` and calls `run` of `module` on them."""

    def measure(chosen: Any, output: Output) -> None:
        run = importlib.import_module(module, __package__).run
        path, tables = run(chosen, output.out, command_line())
        show(path, tables)

    return function(measure, Options(options), Options(Output))


def _telling(options: type, module: str) -> Command:
    """A command that takes `options`, calls `run` of `module` on them and shows its tables."""

    def tell(chosen: Any) -> None:
        run = importlib.import_module(module, __package__).run
        show_tables(run(chosen, command_line()))

    return function(tell, Options(options))


def show(path: Path, tables: "list[Table]") -> None:
    """Print the tables of a benchmark, the machine's limits and where the record is."""
    from rich.console import Console

    from .limits import Limits

    show_tables(tables)
    console = Console()
    limits = Limits.from_record(json.loads(path.read_text())["limits"])
    console.print(str(limits), style="dim")
    console.print(f"record: {path}", style="dim", soft_wrap=True)


def show_tables(tables: "list[Table]") -> None:
    """Print tables, and what the rows do not say."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for table in tables:
        shown = RichTable(title=table.title)
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if index == 0 else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in table.notes:
            console.print(note, markup=False, highlight=False)


def command_line() -> str:
    """What the user typed, for the record."""
    return "vkv " + shlex.join(sys.argv[1:])
