"""`vkv cluster`: what a server of several instances has, and what it is told to do."""

import json
import os
import urllib.error
import urllib.request
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
_COLUMNS = ("id", "role", "pid", "running", "waiting", "KV, MiB", "of, MiB", "state")


@cluster.command()
def status(url: Url = _URL, api_key: Key = None) -> None:
    """The instances, and how many requests have moved between them."""
    _show(_ask(url, "/cluster", api_key))


@cluster.command()
def drain(
    instance: Annotated[int, typer.Argument(help="Its id, as of `vkv cluster status`.")],
    url: Url = _URL,
    api_key: Key = None,
) -> None:
    """Move everything away from an instance and end it. Waits until that is done."""
    _show(_ask(url, "/cluster/drain", api_key, {"instance": instance}))


@cluster.command()
def scale(
    instances: Annotated[int, typer.Argument(min=1, help="How many there are to be.")],
    url: Url = _URL,
    api_key: Key = None,
) -> None:
    """Start instances, or drain some. Waits until that is done."""
    _show(_ask(url, "/cluster/scale", api_key, {"instances": instances}))


def _ask(url: str, path: str, api_key: str | None, body: dict[str, int] | None = None) -> Any:
    """What the server answers. Raises InvalidConfig if it cannot be reached, InvalidOperation with
    what it says if it refuses."""
    key = api_key or os.environ.get("VKV_API_KEY", "").split(",")[0]
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    if not url.startswith(("http://", "https://")):
        raise InvalidConfig(f"url is {url!r}; write it as http://host:port")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise InvalidOperation(_message(error)) from error
    except urllib.error.URLError as error:
        raise InvalidConfig(f"no server answers at {url} ({error.reason}); see --url") from error


def _message(error: urllib.error.HTTPError) -> str:
    if error.code == 404:
        return "the server has one engine and no instances; see `vkv serve --instances`"
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answers {error.code}"


def _show(state: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("role", "state") else "right")
    for one in state["instances"]:
        mib = [f"{one[name] / 2**20:.1f}" for name in ("kv_used_bytes", "kv_limit_bytes")]
        counts = [str(one[name]) for name in ("running", "waiting")]
        what = "draining" if one["is_draining"] else "working"
        table.add_row(str(one["id"]), one["role"], str(one["pid"]), *counts, *mib, what)
    console = Console()
    console.print(table)
    console.print(
        f"{state['num_migrations']} sequences moved, {state['num_stayed']} stayed after all, "
        f"{state['num_recomputed']} were computed again"
    )
