"""What a decode step takes where a context's first tokens lie elsewhere: where, and in how much.

One engine in this process is turned by hand; lenders are engines in processes of their own. The
same contexts are decoded with all tokens at home, at several lenders and in several segments, in
host memory and in a mapped file. What goes over each link is counted: queries and results, and not
a key.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ....runtime.cluster.simulator.costs import LoanCost
from ....runtime.cluster.simulator.fitting import non_negative_least_squares
from ....runtime.frontend.llm import LLM
from ....vmem.errors import InvalidOperation
from ...models.checkpoints import Checkpoints
from ...record import Table
from . import lender
from .options import LongOptions
from .spread_driver import SpreadDriver, Stripe

HOME, LENDERS, HOST, FILE = "at home", "lenders", "host memory", "mapped file"
_WARM_STEPS = 4
_SPARE_TOKENS = 1024  # of pools, beside what they are to hold


@dataclass(frozen=True)
class Cell:
    """Where the first tokens of each request lie.

    Attributes:
        creditors, segments: how many; of the latter all creditors' together.
    """

    where: str
    link: str = ""
    creditors: int = 0
    segments: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """As it is shown."""
        if self.where != LENDERS:
            return self.where
        ends = "" if self.creditors == 1 else "s"
        return f"{self.creditors} creditor{ends}, {self.link}"


@dataclass
class Decoded:
    """Samples of one cell.

    Attributes:
        step_s: of each decode step.
        segments, elsewhere_tokens: of all requests together, as they were.
        sent_bytes, received_bytes: a step, over all links.
        waited_s: a step, for answers that were not there when they were wanted.
        moved_bytes, moved_s: keys and values that went to lenders once, and what that took.
    """

    step_s: list[float] = field(default_factory=list)
    segments: int = 0
    elsewhere_tokens: int = 0
    sent_bytes: float = 0.0
    received_bytes: float = 0.0
    waited_s: float = 0.0
    moved_bytes: int = 0
    moved_s: float = 0.0

    @property
    def median_s(self) -> float:
        """Of a step."""
        return statistics.median(self.step_s)

    @property
    def link_bytes(self) -> float:
        """That a step sends and receives."""
        return self.sent_bytes + self.received_bytes


Decodes = dict[Cell, Decoded]


def cells(options: LongOptions) -> list[Cell]:
    """All of them, those that are compared close to each other."""
    found = []
    shared, *others = options.segments
    for batch in options.batches:
        found.append(Cell(HOME, batch=batch))
        for link in options.links:
            found += [
                Cell(LENDERS, link, creditors, shared, batch) for creditors in options.creditors
            ]
            if link == options.links[0]:  # of one segment a second request finds no room at home
                few = [count for count in others if count > 1 or batch == 1]
                found += [Cell(LENDERS, link, 1, count, batch) for count in few]
        found += [Cell(HOST, segments=1, batch=batch), Cell(FILE, segments=1, batch=batch)]
    return found


def measure(options: LongOptions, saved: Checkpoints, found: Decodes) -> Iterator[None]:
    """Measure all cells, one after the other; yields after each."""
    plan = cells(options)
    most_tokens = max(options.batches) * options.elsewhere_tokens + _SPARE_TOKENS
    with tempfile.TemporaryDirectory(prefix="vkv-long-") as folder, ExitStack() as stack:
        lenders = lender.start(
            stack,
            max((cell.creditors for cell in plan), default=0),
            Path(folder),
            model=str(saved.dense),
            dtype=str(options.dtype).removeprefix("torch."),
            max_len=saved.max_positions,
            kv_memory=most_tokens * saved.kv_bytes_per_token,
        )
        site = _Site(options, saved, lenders, Path(folder))
        for _ in range(options.repeats):
            for cell in plan:
                site.run(cell, found.setdefault(cell, Decoded()))
                yield


def num_tokens(options: LongOptions) -> int:
    """Of a request, prompt and output."""
    return options.elsewhere_tokens + options.at_home_tokens + _num_outputs(options)


def _num_outputs(options: LongOptions) -> int:
    """Tokens of an answer: more than are timed, so that it outgrows the pool for sure."""
    return _WARM_STEPS + options.num_steps + options.at_home_tokens


class _Site:
    """What cells have in common."""

    def __init__(
        self,
        options: LongOptions,
        saved: Checkpoints,
        lenders: Sequence[lender.Lender],
        folder: Path,
    ) -> None:
        self._options = options
        self._saved = saved
        self._lenders = lenders
        self._session = folder / "begin.kv"

    def run(self, cell: Cell, found: Decoded) -> None:
        """Measure one, and add it to what was found."""
        options = self._options
        if cell.where == FILE and not self._session.exists():
            begin = self._prompts(cell)[0][: options.elsewhere_tokens]
            with self._llm(HOME, 1) as llm:
                llm.save_session(self._session, begin)
        with self._llm(cell.where, cell.batch) as llm, ExitStack() as stack:
            driver = SpreadDriver(llm)
            if cell.where == FILE:
                llm.open_session(self._session)
            stripes = self._borrow(driver, cell, stack)
            if (
                cell.where != HOME
            ):  # in the tier they make one segment, however many times they move
                num_moves = cell.segments if cell.where == LENDERS else options.segments[0]
                driver.keep(options.elsewhere_tokens // num_moves)
            self._decode(driver, cell, stripes, found)

    def _llm(self, where: str, batch: int) -> LLM:
        options = self._options
        # Less than a request comes to, or it would be kept at home.
        pool_tokens = options.elsewhere_tokens + options.at_home_tokens // 2
        more: dict[str, Any] = {}
        if where == HOME:
            pool_tokens = batch * (num_tokens(self._options) + _SPARE_TOKENS)
        elif where in (HOST, FILE):
            held = batch * (num_tokens(self._options) + _SPARE_TOKENS)
            more["swap_memory"] = held * self._saved.kv_bytes_per_token
        return LLM(
            self._saved.dense,
            device="cpu",
            dtype=options.dtype,
            max_len=num_tokens(self._options),
            max_seqs=max(options.batches),
            kv_memory=pool_tokens * self._saved.kv_bytes_per_token,
            **more,
        )

    def _prompts(self, cell: Cell) -> list[list[int]]:
        """Random; those with a file begin alike, as it is of one beginning."""
        options = self._options
        draw = np.random.default_rng(options.seed)
        shape = cell.batch, options.elsewhere_tokens + options.at_home_tokens
        prompts = draw.integers(0, self._saved.vocab_size, shape)
        if cell.where == FILE:
            prompts[:, : options.elsewhere_tokens] = prompts[0, : options.elsewhere_tokens]
        return prompts.tolist()

    def _borrow(self, driver: SpreadDriver, cell: Cell, stack: ExitStack) -> list[Stripe]:
        """Connections to the lenders of a cell, each for its part of every request; closed with
        `stack`."""
        stripes = []
        for number, one in enumerate(self._lenders[: cell.creditors]):
            width = self._options.elsewhere_tokens // cell.creditors
            stripe = Stripe(
                f"lender {number}", one.call(cell.link), number * width, (number + 1) * width
            )
            stripes.append(stack.enter_context(closing(stripe)))
            driver.borrow(stripe, cell.batch * width)
        return stripes

    def _decode(
        self, driver: SpreadDriver, cell: Cell, stripes: Sequence[Stripe], found: Decoded
    ) -> None:
        options = self._options
        for number, prompt in enumerate(self._prompts(cell)):
            driver.submit(f"{number}", prompt, _num_outputs(options))
        while not _all_decode(driver, cell.batch):
            if any(token.is_finished for token in driver.step()):
                raise InvalidOperation(
                    f"requests of {cell} do not run together: their pool is too small for "
                    f"{cell.batch} of {options.elsewhere_tokens} tokens in {cell.segments} segments"
                )
        for _ in range(_WARM_STEPS):
            driver.step()
        before = _counters(stripes)
        for _ in range(options.num_steps):
            start_s = time.perf_counter()
            tokens = driver.step()
            found.step_s.append(time.perf_counter() - start_s)
            if len(tokens) != cell.batch:
                raise InvalidOperation(
                    f"a step of {cell} gave {len(tokens)} tokens; is at_home_tokens "
                    f"{options.at_home_tokens} too little for {options.num_steps} steps?"
                )
        spent = [after - was for after, was in zip(_counters(stripes), before, strict=True)]
        sent, received, waited = (one / options.num_steps for one in spent)
        found.sent_bytes, found.received_bytes, found.waited_s = sent, received, waited
        there = driver.elsewhere()
        found.segments = sum(one.num_segments for one in there)
        found.elsewhere_tokens = sum(one.num_tokens for one in there)
        found.moved_bytes = sum(stripe.moved_bytes for stripe in stripes)
        found.moved_s = sum(stripe.moved_s for stripe in stripes)


def _all_decode(driver: SpreadDriver, count: int) -> bool:
    running = driver.running()
    return len(running) == count and all(one.num_output_tokens for one in running)


def _counters(stripes: Sequence[Stripe]) -> tuple[float, float, float]:
    """Bytes sent and received, and seconds waited, so far."""
    return (
        sum(stripe.sent_bytes for stripe in stripes),
        sum(stripe.received_bytes for stripe in stripes),
        sum(stripe.waited_s for stripe in stripes),
    )


# -- results -----------------------------------------------------------------------------------


def table(found: Mapping[Cell, Decoded], saved: Checkpoints) -> Table:
    """A row a cell; steps beside those of the same batch with all tokens at home."""
    rows = []
    for cell, one in found.items():
        home = found.get(Cell(HOME, batch=cell.batch))
        there = one.elsewhere_tokens * saved.kv_bytes_per_token
        cells = [cell.name, str(cell.batch), str(one.segments), f"{one.median_s * 1e3:.2f}"]
        cells.append("" if home is None else f"{one.median_s / home.median_s:.2f}")
        if cell.where == LENDERS:
            rate = one.moved_bytes / one.moved_s
            cells += [f"{one.sent_bytes / 1024:.1f}", f"{one.received_bytes / 1024:.1f}"]
            cells += [f"{one.waited_s * 1e3:.2f}", f"{there / 2**20:.1f}"]
            cells += [f"{there / one.link_bytes:.0f}", f"{there / rate * 1e3:.1f}"]
        else:
            cells += ["", "", "", f"{there / 2**20:.1f}" if there else "", "", ""]
        rows.append(cells)
    return Table(
        title="Decode steps where a context's first tokens lie elsewhere",
        columns=(
            *("where", "requests", "segments", "ms a step", "times at home"),
            *("sent, KiB", "received, KiB", "waited, ms", "KV there, MiB", "KV / link bytes"),
            "moving it, ms",
        ),
        rows=rows,
        notes=[
            "Sent and received are queries and results of a step, of all layers and links; keys "
            "and values went there once. What moving them in every step would be is beside it: "
            "their bytes over those of the link, and the time at the rate at which they went.",
            "Results are of each half that keys are summed by: a segment of 512 tokens, or of a "
            "power of two times as many, has one, and others have more.",
            "Steps with all tokens at home are replayed from recordings; others are not.",
        ],
    )


def link_cost(found: Mapping[Cell, Decoded], link: str) -> tuple[LoanCost, float] | None:
    """Fitted to what lenders over `link` added to steps; and the mean of what single cells differ
    from it by, as a share of the mean that was added. None if there is nothing to fit to."""
    pairs = [
        (cell, one, home)
        for cell, one in found.items()
        if cell.link == link and (home := found.get(Cell(HOME, batch=cell.batch))) is not None
    ]
    if not pairs:
        return None
    work = np.array([(1.0, cell.creditors, one.link_bytes) for cell, one, _ in pairs])
    added = np.array([one.median_s - home.median_s for _, one, home in pairs])
    costs = non_negative_least_squares(work, added)
    error = np.mean(np.abs(work @ costs - added)) / max(float(np.mean(np.abs(added))), 1e-12)
    step_s, holder_s, byte_s = map(float, costs)
    moved_bytes = sum(one.moved_bytes for _, one, _ in pairs)
    cost = LoanCost(
        step_s=step_s,
        holder_s=holder_s,
        byte_s=byte_s,
        query_bytes=statistics.median(one.link_bytes / one.segments for _, one, _ in pairs),
        move_bytes_per_s=moved_bytes / sum(one.moved_s for _, one, _ in pairs),
    )
    return cost, float(error)


def fitted(found: Mapping[Cell, Decoded]) -> Table | None:
    """The costs of each link, for the simulator."""
    rows = []
    for link in dict.fromkeys(cell.link for cell in found if cell.link):
        if (fit := link_cost(found, link)) is not None:
            cost, error = fit
            rows.append(
                [
                    link,
                    f"{cost.step_s * 1e6:.0f}",
                    f"{cost.holder_s * 1e6:.0f}",
                    f"{cost.byte_s * 2**20 * 1e6:.0f}",
                    f"{cost.query_bytes / 1024:.1f}",
                    f"{cost.move_bytes_per_s / 2**20:.0f}",
                    f"{error:.0%}",
                ]
            )
    if not rows:
        return None
    return Table(
        title="What tokens elsewhere add to a step, fitted",
        columns=(
            *("link", "a step, µs", "a creditor, µs", "a MiB of the link, µs"),
            *("a token and segment, KiB", "moving, MiB/s", "error"),
        ),
        rows=rows,
    )
