"""`{"name": …, "parameters": …}` as the whole answer, or behind `<|python_tag|>`: Llama 3 and 4."""

import re

from ..draft import Draft
from ..json_calls import CallReader
from ..source import Reading, Source

_TAG = "<|python_tag|>"
_BETWEEN = re.compile(r"[\s;,]+")


class Llama3Json:
    """Calls as bare JSON where the answer begins, several with semicolons between.

    An object is a call if it has a name and parameters, and nothing that calls do not have: other
    JSON may be what the user asked for.
    """

    openers = (_TAG,)

    def read_start(self, source: Source, draft: Draft) -> Reading[None]:
        """Read the calls with which the content begins."""
        draft.content((yield from source.skip_space()))
        draft.content((yield from self.read("", source, draft)))

    def read(self, opener: str, source: Source, draft: Draft) -> Reading[str]:
        """Read calls up to what is none. The tag is a token of its own, and never text."""
        between = ""
        if opener:
            yield from source.skip_space()
        while (yield from source.peek()) == "{":
            text = yield from CallReader(source, draft, strict=True).read()
            if text is not None:
                return between + text
            between = yield from source.read_run(_BETWEEN)
        return between if between.strip() else ""
