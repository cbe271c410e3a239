"""How much the server takes on: requests that run or wait, and whose they are."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from .http.errors import ApiError
from .options import ServeOptions

REFUSALS = ("key_share", "queue_full", "queue_tokens")


class Admittance:
    """Counts what is under way, and refuses what would be too much.

    With several front processes each has an equal part of the places.

    Args:
        on_refusal: called with the reason of each.
    """

    def __init__(
        self, options: ServeOptions, max_seqs: int, on_refusal: Callable[[str], None]
    ) -> None:
        parts = options.api_server_count
        self._num_places = -(-(max_seqs + options.max_num_queued_reqs) // parts)
        self._max_seqs = max_seqs
        self._most_tokens = options.max_num_queued_tokens // parts
        several = len(options.keys) > 1
        self._places_of_a_key = self._num_places
        if several:
            self._places_of_a_key = max(1, int(self._num_places * options.key_share))
        self.num_requests = 0
        self.num_tokens = 0
        self._of_key: Counter[int] = Counter()
        self._on_refusal = on_refusal

    @contextmanager
    def place(self, num_requests: int, num_tokens: int, key: int | None) -> Iterator[None]:
        """Hold places for requests with so many prompt tokens. Raises ApiError 503 or 429."""
        self.check(num_requests, num_tokens, key)
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        if key is not None:
            self._of_key[key] += num_requests
        try:
            yield
        finally:
            self.num_requests -= num_requests
            self.num_tokens -= num_tokens
            if key is not None:
                self._of_key[key] -= num_requests

    def _refuse_queue(self) -> NoReturn:
        self._on_refusal("queue_full")
        raise ApiError(
            503,
            f"{self.num_requests} requests run or wait, and {self._num_places} may; try again",
            "queue_full",
            retry_after_s=self._patience_s(),
        )

    def check(self, num_requests: int, num_tokens: int, key: int | None) -> None:
        """Raises ApiError 503 or 429 if there are no places for so many; 400 if never will be."""
        most = self._num_places if key is None else self._places_of_a_key
        if num_requests > most:
            raise ApiError(
                400,
                f"this asks for {num_requests} outputs at once, and {most} may run or wait; send "
                "several requests",
                "invalid_value",
            )
        if key is not None and self._of_key[key] + num_requests > self._places_of_a_key:
            self._on_refusal("key_share")
            raise ApiError(
                429,
                f"this key has {self._of_key[key]} requests under way, and may have "
                f"{self._places_of_a_key}; wait for some to end",
                "key_share",
                retry_after_s=1,
            )
        if self.num_requests + num_requests > self._num_places:
            self._refuse_queue()
        waits = self.num_requests >= self._max_seqs
        if waits and self.num_tokens + num_tokens > self._most_tokens:
            self._on_refusal("queue_tokens")
            raise ApiError(
                503,
                f"prompts of {self.num_tokens} tokens run or wait, and another {num_tokens} are "
                f"more than max_num_queued_tokens = {self._most_tokens}; try again",
                "queue_full",
                retry_after_s=self._patience_s(),
            )

    def _patience_s(self) -> float:
        """Longer the longer the line is."""
        return min(30.0, 1.0 + self.num_requests / max(1, self._max_seqs))
