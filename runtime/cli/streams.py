"""Standard streams that take any byte, so that what is wrong can be said."""

import io
import sys


def tolerate_bytes() -> None:
    """Read what is not in the terminal's encoding as lone surrogates, which a prompt may not have;
    write what the encoding lacks as question marks."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
