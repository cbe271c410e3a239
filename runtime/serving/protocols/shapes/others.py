"""Answers about tokens, models and the server itself."""

from typing import Literal

from .base import Shape


class Tokens(Shape):
    """A text's tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Shape):
    """Tokens' text."""

    prompt: str


class Status(Shape):
    """How the server is, or what it did."""

    status: Literal["ok", "ready", "awake"]


class Version(Shape):
    """Which vkv it is."""

    version: str


class Model(Shape):
    """The model under one of its names, or an adapter."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class Models(Shape):
    """The model under each of its names, and its adapters."""

    object: Literal["list"]
    data: list[Model]


class Load(Shape):
    """How much is under way, in requests and bytes."""

    server_load: int
    running: int
    waiting: int
    max_running: int
    kv_used_bytes: int
    kv_parked_bytes: int
    kv_limit_bytes: int
    kv_physical_bytes: int
    kv_virtual_bytes: int


class Freed(Shape):
    """What was given back."""

    freed_bytes: int


class InstanceState(Shape):
    """One instance of a cluster."""

    id: int
    role: str
    pid: int
    node: str
    state: str
    is_draining: bool
    num_sequences: int
    carried_bytes: int
    handed_pages: int
    running: int
    waiting: int
    kv_used_bytes: int
    kv_limit_bytes: int
    borrowed_tokens: int
    lent_tokens: int


class LoansState(Shape):
    """What an instance has lent another: tokens of requests that are longer than its memory."""

    debtor: int
    creditor: int
    num_loans: int
    num_tokens: int
    bytes_a_step: float


class ClusterState(Shape):
    """The instances of a cluster."""

    num_migrations: int
    num_stayed: int
    num_recomputed: int
    num_under_way: int
    num_bytes_copied: int
    num_pages_moved: int
    num_died: int
    num_drained: int
    num_loans_called_back: int
    num_loans_lost: int
    instances: list[InstanceState]
    loans: list[LoansState]


class Sleeping(Shape):
    """Whether the engine sleeps."""

    is_sleeping: bool
