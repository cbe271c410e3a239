"""Which tokens a step computes: pure objects, chosen by name."""

from ..plan import Policy
from .prefill_first import PrefillFirst
from .splitfuse import SplitFuse

POLICIES: dict[str, type[Policy]] = {SplitFuse.name: SplitFuse, PrefillFirst.name: PrefillFirst}
