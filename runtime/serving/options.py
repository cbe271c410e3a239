"""Options of a server, resolved once."""

import hmac
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...vmem.errors import InvalidConfig
from .keys import read_keys, tenant_weights

LogFormat = Literal["line", "json"]
MiB = 1 << 20
_LAST_PORT = 65535
_NOT_NEGATIVE = ("shutdown_timeout", "stuck_after", "sse_keep_alive_interval", "max_chunk_rate")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a server listens, whom it lets in, and how much it takes on.

    Attributes:
        host: the address to listen on; 0.0.0.0 for all of this machine's.
        port: the port to listen on; 0 takes a free one and says which.
        uds: a Unix socket to listen on instead of host and port.
        api_key: a key that callers must show; may be given several times. Also the environment's
            VKV_API_KEY, where several stand apart by commas.
        api_key_file: a file of keys, one a line; lines that begin with # are left out. Behind a
            key may stand whose it is, and that one's part where service is shared out fairly:
            tenant=NAME weight=2.
        served_model_name: the names that requests may use for the model; the first is in answers.
        root_path: the path under which a proxy shows this server.
        ssl_certfile: a certificate, for HTTPS.
        ssl_keyfile: the certificate's key.
        api_server_count: processes that take requests; more than one where one is the bottleneck.
        instances: engines, each a process; with several, requests move between them as the cluster
            policy says. They are actors of Ray. One is a plain engine, unless `--cluster-policy`,
            `--roles` or `--max-instances` is given.
        max_instances: with more than `instances`, as many are started as are needed, and ended when
            they are not; with the policy llumnix alone, and without roles of their own.
        roles: what each instance is for: prefill, decode or both, with commas; with the policy
            disaggregated alone.
        cluster_policy: one of round_robin, least_loaded, least_time, llumnix, disaggregated; by
            default llumnix, or disaggregated where there are roles.
        lending: instances lend each other memory, so that more requests run at once; by default
            for requests that are longer than one instance's memory alone.
        ray_address: of a Ray cluster to join, auto for the one that this machine is a node of; its
            nodes share the instances out. By default one is started, on this machine alone.
        max_num_queued_reqs: requests that may wait for a place beside those that run; more get 503.
        max_num_queued_tokens: prompt tokens that may wait; more get 503.
        key_share: the part of all places that one of several keys may hold; more get 429.
        tenants_share_prefixes: a prompt may begin with what was computed for another tenant's. By
            default, each tenant's keys and values are found by its own requests alone.
        max_body_bytes: the most bytes of a request's body.
        max_n: the most outputs that one request may ask for.
        max_logprobs: the most alternatives of a token whose log probabilities a request may ask
            for; -1 for all. Each takes time of everybody's.
        shutdown_timeout: seconds that requests under way have to finish after SIGTERM.
        restart_engine: start the engine again if its process dies.
        stuck_after: seconds without a step, while requests wait, until /health says 503; 0 for
            never.
        sse_keep_alive_interval: seconds without an event until a stream gets a comment; 0 for none.
        max_chunk_rate: chunks a second that a front process sends to all streams together; above
            it, chunks hold more tokens. 0 for a chunk each token.
        log_format: access and error logs as lines or as JSON.
        tool_call_parser: how calls are written in answers; auto knows it of the tokenizer.
        reasoning_parser: how reasoning is marked in answers; auto knows it of the tokenizer.
        chat_template: a file with a template in place of the tokenizer's.
        trust_request_chat_template: take templates from requests, too. They are programs, and may
            run for hours.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_key: Sequence[str] = ()
    api_key_file: Path | None = None
    served_model_name: Sequence[str] = ()
    root_path: str = ""
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    api_server_count: int = 1
    instances: int = 1
    max_instances: int | None = None
    roles: str | None = None
    cluster_policy: str | None = None
    lending: bool | None = None
    ray_address: str | None = None
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int = 1 << 20
    key_share: float = 0.5
    tenants_share_prefixes: bool = False
    max_body_bytes: int = 16 * MiB
    max_n: int = 16
    max_logprobs: int = 20
    shutdown_timeout: float = 30.0
    restart_engine: bool = False
    stuck_after: float = 60.0
    sse_keep_alive_interval: float = 15.0
    max_chunk_rate: float = 500.0
    log_format: LogFormat = "line"
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    chat_template: Path | None = None
    trust_request_chat_template: bool = False
    keys: tuple[str, ...] = field(init=False, repr=False, default=())
    tenants: tuple[str, ...] = field(init=False, default=())
    """Whose each of the keys is."""
    tenant_weights: Mapping[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (
            ("port", 0),
            ("api_server_count", 1),
            ("instances", 1),
            ("max_num_queued_reqs", 0),
            ("max_num_queued_tokens", 0),
            ("max_body_bytes", 1),
            ("max_n", 1),
            ("max_logprobs", -1),
        ):
            if getattr(self, name) < least:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.port > _LAST_PORT:
            raise InvalidConfig(f"port is {self.port}; it must be at most {_LAST_PORT}")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InvalidConfig(f"{name} is {value}; use a finite number of at least 0")
        if not 0 < self.key_share <= 1:
            raise InvalidConfig(f"key_share is {self.key_share}; use a part in (0, 1]")
        if self.log_format not in ("line", "json"):
            raise InvalidConfig(f"log_format is {self.log_format!r}; use line or json")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise InvalidConfig("ssl_certfile and ssl_keyfile go together; give both, or neither")
        if self.is_cluster and (self.api_server_count > 1 or self.restart_engine):
            raise InvalidConfig(
                "api_server_count and restart_engine are for one engine; leave them out with "
                "several instances"
            )
        for name in ("lending", "ray_address"):
            if getattr(self, name) and not self.is_cluster:
                raise InvalidConfig(
                    f"{name} is {getattr(self, name)!r}, and there is one engine: give instances, "
                    "2 or more, or a cluster_policy to have a cluster of one"
                )
        is_apart = any(role.strip() != "both" for role in (self.roles or "both").split(","))
        if self.max_instances is not None and (
            is_apart
            or self.max_instances < self.instances
            or self.cluster_policy not in (None, "llumnix")
        ):
            raise InvalidConfig(
                f"max_instances is {self.max_instances}: use at least instances, "
                f"{self.instances}, the cluster policy llumnix, and no roles but both"
            )
        keys = read_keys(self.api_key, self.api_key_file)
        object.__setattr__(self, "keys", tuple(key.text for key in keys))
        object.__setattr__(self, "tenants", tuple(key.tenant for key in keys))
        object.__setattr__(self, "tenant_weights", tenant_weights(keys))
        self.read_chat_template()  # to refuse it now, and not when the model is there

    @property
    def has_tenants(self) -> bool:
        """Whether callers are several, and are kept apart."""
        return len(set(self.tenants)) > 1

    @property
    def is_cluster(self) -> bool:
        """Whether the engines are instances of a cluster."""
        asked = (self.max_instances, self.roles, self.cluster_policy)
        return self.instances > 1 or any(option is not None for option in asked)

    def read_chat_template(self) -> str | None:
        """The template's text, where one is given. Raises InvalidConfig."""
        if self.chat_template is None:
            return None
        try:
            return self.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"chat_template {self.chat_template}: {error}") from error

    def key_index(self, shown: str) -> int | None:
        """Which of the keys it is, in a time that tells nothing; None if it is none."""
        found = None
        for index, key in enumerate(self.keys):
            if hmac.compare_digest(key.encode(), shown.encode(errors="surrogateescape")):
                found = index
        return found
