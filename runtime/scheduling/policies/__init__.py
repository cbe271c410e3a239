"""Which tokens a step computes, and whose: pure objects, chosen by name."""

from ..plan import Policy
from .fair import Fair
from .fcfs import Fcfs
from .prefill_first import PrefillFirst
from .priority import Priority
from .splitfuse import SplitFuse

POLICIES: dict[str, type[Policy]] = {SplitFuse.name: SplitFuse, PrefillFirst.name: PrefillFirst}

__all__ = ["POLICIES", "Fair", "Fcfs", "PrefillFirst", "Priority", "SplitFuse"]
