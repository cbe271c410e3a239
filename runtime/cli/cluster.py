"""`vkv cluster`: what a server of several instances has, and what it is told to do."""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ...vmem.errors import InvalidConfig, InvalidOperation

cluster = typer.Typer(
    help="Look after the instances of a server (`vkv serve --instances`).", no_args_is_help=True
)

Url = Annotated[str, typer.Option(help="Where the server is.")]
Key = Annotated[
    str | None, typer.Option(help="A key that it takes. Default: $VKV_API_KEY.", show_default=False)
]
_URL = "http://127.0.0.1:8000"
_NO_ANSWER = (OSError, ValueError, http.client.HTTPException)  # cut off, no such server, no URL
_LOOK_S = 0.5  # between two looks at how far an order has come
_COLUMNS = (
    "id",
    "role",
    "state",
    "node",
    "pid",
    "running",
    "waiting",
    "KV, MiB",
    "of, MiB",
    "pages moved",
    "MiB copied",
    "tokens lent",
    "borrowed",
)
_WORDS = ("role", "state", "node")


@cluster.command()
def status(url: Url = _URL, api_key: Key = None) -> None:
    """The instances, what each has, and what has moved away from it."""
    _show(_ask(url, "/cluster", api_key))


@cluster.command()
def drain(
    instance: Annotated[int, typer.Argument(help="Its id, as of `vkv cluster status`.")],
    url: Url = _URL,
    api_key: Key = None,
) -> None:
    """Move everything away from an instance and end it. Waits until that is done.

    Nothing is computed again but what is longer than its memory. Interrupted, it drains on all the
    same.
    """

    def progress(state: Any) -> str:
        left = [one["num_sequences"] for one in state["instances"] if one["id"] == instance]
        return f"instance {instance}: {left[0]} sequences left" if left else "ending it"

    _order(url, "/cluster/drain", api_key, {"instance": instance}, progress)


@cluster.command()
def scale(
    instances: Annotated[int, typer.Argument(min=1, help="How many there are to be.")],
    url: Url = _URL,
    api_key: Key = None,
) -> None:
    """Start instances, or drain some. Waits until that is done.

    Interrupted, the server goes on with it.
    """

    def progress(state: Any) -> str:
        there = [one for one in state["instances"] if one["state"] == "working"]
        left = sum(one["num_sequences"] for one in state["instances"] if one["is_draining"])
        waits = f", {left} sequences to move away" if left else ""
        return f"{len(there)} of {instances} instances{waits}"

    _order(url, "/cluster/scale", api_key, {"instances": instances}, progress)


def _order(
    url: str, path: str, key: str | None, body: dict[str, int], progress: Callable[[Any], str]
) -> None:
    """Have something done, say how far it is meanwhile, and show what came of it.

    Raises as `_ask`.
    """
    from rich.console import Console

    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(_told(url, path, key, body)))
    thread.daemon = True  # who is interrupted waits no longer
    thread.start()
    with Console(stderr=True).status("asking the server") as line:
        while thread.is_alive():
            began_s = time.monotonic()
            state = _told(url, "/cluster", key)
            if not isinstance(state, Exception):
                line.update(progress(state))
            thread.join(max(0.0, began_s + _LOOK_S - time.monotonic()))
    (answer,) = answers
    if isinstance(answer, Exception):
        raise answer
    _show(answer)


def _told(url: str, path: str, key: str | None, body: dict[str, int] | None = None) -> Any:
    """What the server answers, or why it does not."""
    try:
        return _ask(url, path, key, body)
    except (InvalidConfig, InvalidOperation) as error:
        return error


def _ask(url: str, path: str, key: str | None, body: dict[str, int] | None = None) -> Any:
    """What the server answers. Raises InvalidConfig if it cannot be reached, InvalidOperation with
    what it says if it refuses."""
    key = key or os.environ.get("VKV_API_KEY", "").split(",")[0]
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    if not url.startswith(("http://", "https://")):
        raise InvalidConfig(f"url is {url!r}; write it as http://host:port")
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url.rstrip("/") + path, data, headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise InvalidOperation(_message(error)) from error
    except urllib.error.URLError as error:
        raise InvalidConfig(f"no server answers at {url} ({error.reason}); see --url") from error
    except _NO_ANSWER as error:
        raise InvalidConfig(f"{url} gives no answer of vkv's ({error}); see --url") from error


def _message(error: urllib.error.HTTPError) -> str:
    if error.code == 404:
        return "the server has one engine and no instances; see `vkv serve --instances`"
    try:
        said = str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answers {error.code}"
    return f"{said} (give a key by --api-key or VKV_API_KEY)" if error.code == 401 else said


def _show(state: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in _WORDS else "right")
    for one in state["instances"]:
        table.add_row(*_row(one))
    console = Console()
    console.print(table)
    console.print(
        f"{state['num_migrations']} sequences moved, {state['num_stayed']} stayed after all, "
        f"{state['num_recomputed']} were computed again, {state['num_under_way']} are on their way"
    )
    console.print(
        f"{state['num_pages_moved']} pages changed hands, {_mib(state['num_bytes_copied'])} MiB "
        f"were copied; {state['num_died']} instances died, {state['num_drained']} were ended"
    )
    for one in state["loans"]:
        console.print(
            f"instance {one['creditor']} lends instance {one['debtor']} room for "
            f"{one['num_tokens']:,} tokens; {one['bytes_a_step'] / 1024:.1f} KiB a step"
        )
    if state["num_loans_called_back"] or state["num_loans_lost"]:
        console.print(
            f"{state['num_loans_called_back']} loans were called back, "
            f"{state['num_loans_lost']} were lost; their tokens were computed again"
        )


def _row(one: Any) -> list[str]:
    return [
        str(one["id"]),
        one["role"],
        one["state"],
        one["node"][:8] or "here",
        *(str(one[name]) for name in ("pid", "running", "waiting")),
        *(_mib(one[name]) for name in ("kv_used_bytes", "kv_limit_bytes")),
        str(one["handed_pages"]),
        _mib(one["carried_bytes"]),
        *(f"{one[name]:,}" for name in ("lent_tokens", "borrowed_tokens")),
    ]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f}"
