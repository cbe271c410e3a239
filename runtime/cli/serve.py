"""`vkv serve`: what it can be told, and what it starts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...vmem.errors import InvalidConfig
from .commands import SPECULATION
from .options import Flag, Options, TypedOptions, function, option

if TYPE_CHECKING:
    from ..serving.options import ServeOptions

_SWAP = "Host memory for KV that leaves --kv-memory and comes back by a copy, such as 8GiB."
_KV_DIR = "A folder that KV of requests is saved to and comes back from, in other processes too."
_SEVERAL = Flag(default=None, kind=list[str])


@dataclass(frozen=True, kw_only=True)
class Served:
    """Which model, and where."""

    model: str | None = option(
        None,
        is_argument=True,
        help="A model folder, GGUF file, hub id or zoo. Default: the built-in tiny model.",
    )
    name: str | None = option(
        None, names=("--model",), help="With a zoo of blocks, the name of a model in it."
    )
    device: str = option("auto", help="auto, cpu or cuda.")
    dtype: str = option("auto", help="auto (the checkpoint's), float32, bfloat16 or float16.")


def serve_command() -> Callable[..., None]:
    """`vkv serve`."""
    try:
        from ..serving.options import ServeOptions
        from ..serving.processes import run  # noqa: F401 - whether all it needs is installed
    except ModuleNotFoundError as error:
        raise InvalidConfig(
            f"vkv serve needs {error.name}, which is not installed: pip install 'vkv[serve]'"
        ) from error
    from ..engine.config import EngineConfig

    server = Options(
        ServeOptions,
        "host",
        "port",
        "uds",
        api_key=_SEVERAL,
        api_key_file=Flag(),
        served_model_name=_SEVERAL,
        **{name: Flag() for name in _OTHERS},
    )
    engine = TypedOptions(
        EngineConfig,
        "repeatable",
        "lm_head_bits",
        "activation_bits",
        max_len=Flag(names=("--max-model-len",)),
        max_seqs=Flag(names=("--max-num-seqs",)),
        max_batch_tokens=Flag(names=("--max-num-batched-tokens",)),
        kv_memory=Flag(
            help="The most memory KV may take, such as 64MiB. Taken only as it is used."
        ),
        swap_memory=Flag(default=None, kind=str, help=_SWAP),
        kv_dir=Flag(default=None, kind=str, help=_KV_DIR),
        kv_dir_limit=Flag(kind=str, help="The most bytes that the files of --kv-dir may take."),
        attention=Flag(help="An attention backend (see `vkv info`), or auto."),
        generation_config=Flag(help="auto: sample as the model's authors say; vllm: do not."),
        idle_trim_s=Flag(),
        scheduling_policy=Flag(
            help="fcfs: by arrival. priority: by requests' priority, the lower first. fair: the "
            "key that got least first."
        ),
        priority_aging_s=Flag(
            names=("--priority-aging",),
            help="Seconds of waiting that count as one priority better; 0: a better priority "
            "always goes first.",
            kind=float,
            parse=lambda seconds: seconds or None,
        ),
        **_beyond_the_model(),
    )
    return function(_serve, Options(Served), server, engine)


def _beyond_the_model() -> dict[str, Flag]:
    """What is put on a model: adapters, and guesses of what it will say."""
    return {
        "adapters": Flag(
            names=("--adapter",),
            default=None,
            kind=list[str],
            parse=_adapters,
            help="A LoRA adapter as NAME=FOLDER, which requests name as their model; may be given "
            "several times.",
        ),
        **SPECULATION,
    }


def _adapters(given: list[str]) -> dict[str, str]:
    """Folders by name. Raises ValueError."""
    found: dict[str, str] = {}
    for one in given:
        name, is_pair, folder = one.partition("=")
        if not name or not is_pair or not folder or name in found:
            raise ValueError(f"{one!r}: give each adapter once, as NAME=FOLDER")
        found[name] = folder
    return found


_OTHERS = (
    "root_path",
    "ssl_certfile",
    "ssl_keyfile",
    "api_server_count",
    "instances",
    "max_instances",
    "roles",
    "cluster_policy",
    "lending",
    "ray_address",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "key_share",
    "tenants_share_prefixes",
    "max_body_bytes",
    "max_n",
    "max_logprobs",
    "shutdown_timeout",
    "restart_engine",
    "stuck_after",
    "sse_keep_alive_interval",
    "max_chunk_rate",
    "log_format",
    "tool_call_parser",
    "reasoning_parser",
    "chat_template",
    "trust_request_chat_template",
)


def _serve(served: Served, options: "ServeOptions", engine: dict[str, Any]) -> None:
    from ..chains.family import gather
    from ..serving.processes.run import serve

    model, following = gather(served.model, served.name)
    engine = following | engine
    if following or served.name is not None:
        own = served.name or Path(str(model)).name
        options = replace(options, served_model_name=options.served_model_name or (own,))
    status = serve(
        options,
        model=None if model is None else str(model),
        device=served.device,
        dtype=served.dtype,
        engine=engine,
    )
    raise typer.Exit(status)
