"""The chat of `vkv chat`: streaming, many turns, on a terminal or through a pipe."""

import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from ...vmem.errors import (
    KVFileDamaged,
    KVFileMismatch,
    RequestTooLarge,
    RequestTooLong,
    VkvError,
)
from ..frontend.llm import LLM
from ..request.sampling_params import SamplingParams

_HELP = """\
/stats   memory: virtual against physical, pages, prefix reuse
/trim    give memory of finished turns back to the system
/reset   begin a new conversation
/exit    leave (or Ctrl-D)"""


class _Kept(msgspec.Struct):
    """What a file keeps of a conversation, beside its keys and values."""

    system: list[dict[str, str]]
    turns: list[dict[str, str]]


class ChatSession:
    """One conversation with a model; the oldest turns go when the slot is full.

    Args:
        llm: the model.
        params: how it answers.
        system: a system message to begin with; None for the file's, if that has one.
        path: a file that keeps the conversation, from which this one goes on if it is there.
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None = None,
        path: Path | None = None,
    ) -> None:
        self.llm = llm
        self.params = params
        self._system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []
        self.num_dropped = 0
        self._path = path
        self._kept: list[dict[str, str]] = []  # the turns that are in the file
        if path is not None and path.exists():
            self._resume(path)
        if self._system:  # what no message could follow is refused at once
            llm.render_chat([*self._system, {"role": "user", "content": "hello"}])

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns.clear()

    def answer(self, text: str) -> Iterator[str]:
        """Stream the answer to a message. An interrupted answer stays in the conversation.

        A message that is refused, or gets no answer for an error, leaves it; the error is raised.
        """
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        failed = False
        try:
            self._make_room()
            for delta in self.llm.stream([*self._system, *self.turns], self.params):
                text = delta.text if pieces else delta.text.lstrip()
                if text:
                    pieces.append(text)
                    yield text
        except VkvError:
            failed = True
            raise
        finally:
            if failed and not pieces:
                self.turns.pop()
            else:
                self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def _resume(self, path: Path) -> None:
        """Take the conversation up that a file keeps; one that is damaged is set aside.

        Raises a KVFileError for a file that is not to be touched.
        """
        try:
            kept = msgspec.json.decode(self.llm.open_session(path).extra, type=_Kept)
        except KVFileDamaged as error:
            aside = path.with_name(f"{path.name}.damaged")
            path.replace(aside)
            _complain(f"{error}; it is kept as {aside}, and another conversation begins")
            return
        except msgspec.MsgspecError as error:
            raise KVFileMismatch(
                f"{path} keeps keys and values, but no conversation; give another name"
            ) from error
        self._system = self._system or kept.system
        self.turns, self._kept = kept.turns, list(kept.turns)

    def keep(self) -> None:
        """Save what is new of the conversation; an error is told, and raises nothing."""
        if self._path is None or self.turns == self._kept:
            return
        try:
            if self.turns:
                tokens = self.llm.render_chat(
                    [*self._system, *self.turns], add_generation_prompt=False
                )
                extra = msgspec.json.encode(_Kept(self._system, self.turns))
                self.llm.save_session(self._path, tokens[: self.llm.max_len - 1], extra=extra)
            else:
                self._path.unlink(missing_ok=True)
            self._kept = list(self.turns)
        except (VkvError, OSError) as error:
            _complain(f"the conversation could not be saved: {error}")

    def _make_room(self) -> None:
        """Drop the oldest turns until the conversation fits, with room for an answer.

        Raises RequestTooLong or RequestTooLarge, with none dropped, if the newest message does not
        fit even alone.
        """
        wanted = self.llm.max_len // 4
        wanted = min(wanted, self.params.max_tokens or wanted)
        kept = list(self.turns)
        while True:
            tokens = self.llm.render_chat([*self._system, *kept])
            is_alone = len(kept) < 3
            try:
                if self.llm.check(tokens, self.params) >= wanted or is_alone:
                    break
            except (RequestTooLong, RequestTooLarge):
                if is_alone:
                    raise
            del kept[:2]
        self.num_dropped += len(self.turns) - len(kept)
        self.turns = kept


def run_chat(
    llm: LLM, params: SamplingParams, *, system: str | None = None, path: Path | None = None
) -> None:
    """Chat on standard input and output until it ends; `path` as of `ChatSession`."""
    session = ChatSession(llm, params, system, path)
    try:
        if sys.stdin.isatty():
            _run_terminal(session)
        else:
            _run_pipe(session)
    finally:
        session.keep()  # where a signal came before the end of a turn


def _run_pipe(session: ChatSession) -> None:
    """A line is a turn; its answer is a line (or several, if the model makes several).

    One that is refused has an empty line for an answer, and the exit status is 2 in the end.
    """
    failed = False
    for line in sys.stdin:
        if text := line.strip():
            try:
                _show(session, text)
            except VkvError as error:
                failed = True
                sys.stdout.write("\n")
                sys.stdout.flush()
                _complain(error)
    if failed:
        raise typer.Exit(2)


def _show(session: ChatSession, text: str) -> None:
    try:
        with closing(_respond(session, text)) as pieces:  # or an interrupted answer ends later
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
    finally:
        session.keep()


def _complain(what: object) -> None:
    typer.echo(f"vkv: {what}", err=True)


def _run_terminal(session: ChatSession) -> None:
    console = Console()
    llm = session.llm
    console.print(
        f"[bold]vkv chat[/] with {llm.name} on {llm.device} "
        f"({llm.attention_backend} attention). /help shows the commands."
    )
    if session.turns:
        console.print(f"[dim]{len(session.turns) // 2} turns so far; /reset begins anew[/]")
    while True:
        try:
            text = console.input("[bold green]you>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text in ("/exit", "/quit"):
            return
        if not text:
            continue
        try:
            if not text.startswith("/"):
                console.print("[bold blue]vkv>[/] ", end="")
            _show(session, text)
        except KeyboardInterrupt:
            console.print("\n[dim](interrupted)[/]")
        except VkvError as error:
            console.print(f"({error})", style="red", markup=False, highlight=False)


def _respond(session: ChatSession, text: str) -> Generator[str, None, None]:
    """What a line of input shows: a command's result, or the model's answer."""
    if text == "/help":
        yield _HELP + "\n"
    elif text == "/stats":
        yield _stats(session.llm)
    elif text == "/trim":
        yield f"returned {_size(session.llm.trim())}\n"
    elif text == "/reset":
        session.reset()
        yield "a new conversation begins\n"
    elif text.startswith("/"):
        yield f"no command {text.split()[0]}; there are:\n{_HELP}\n"
    else:
        dropped = session.num_dropped
        yield from session.answer(text)
        yield "\n"
        if session.num_dropped > dropped:
            yield "(the conversation outgrew its slot: the oldest turns were dropped)\n"


def _stats(llm: LLM) -> str:
    stats = llm.stats()
    table = Table(show_header=False, box=None)
    mapped = f"{stats.pages_held} mapped, of {stats.pages_limit} allowed"
    table.add_row("virtual memory reserved", _size(stats.virtual_bytes))
    table.add_row("physical memory", _size(stats.physical_bytes))
    table.add_row("pages", f"{mapped}, {_size(stats.page_bytes)} each")
    table.add_row("", f"{stats.pages_parked} kept from earlier turns")
    if stats.pages_of_files:
        table.add_row("", f"{stats.pages_of_files} of the session's file, which are no memory")
    table.add_row("tokens held", f"{stats.tokens_held} ({stats.growth_tokens} a page)")
    reused = stats.prefix_hit_tokens
    table.add_row("prefix reuse", f"{reused} prompt tokens not computed again")
    table.add_row("computed", f"{stats.num_prompt_tokens} prompt tokens")
    table.add_row("generated", f"{stats.num_output_tokens} tokens in {stats.step_time_s:.2f} s")
    share = stats.mapping_time_s / stats.step_time_s if stats.step_time_s else 0.0
    table.add_row("mapping", f"{stats.mapping_time_s * 1e3:.1f} ms, {share:.2%} of step time")
    calls = ", ".join(f"{kind} {count}" for kind, count in sorted(stats.driver_calls.items()))
    table.add_row("driver calls", calls or "none")
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
