"""What is known of a session on disk."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Session:
    """Tokens whose keys and values are in a file.

    Attributes:
        path: the file.
        tokens: what the keys and values are of.
        num_bytes: of the file.
        is_usable: False if the file is damaged from the first token on, or is not of this model and
            cache: a prompt that begins with the tokens is computed then.
        extra: what `save_session` was given to keep beside them.
    """

    path: Path
    tokens: tuple[int, ...] = field(repr=False)
    num_bytes: int
    is_usable: bool = True
    extra: bytes = field(default=b"", repr=False)

    @property
    def num_tokens(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)
