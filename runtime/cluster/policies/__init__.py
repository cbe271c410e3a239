"""Where requests go, and which of them move: pure objects, chosen by name."""

from .disaggregated import Disaggregated, Switching
from .draining import drained_first
from .freeness import Freeness
from .least_time import LeastTime, Way
from .ledger import Credit, Ledger, Settlement
from .llumnix import Llumnix
from .policy import ClusterPolicy, Move, Reason
from .scaling import Scaling
from .simple import LeastLoaded, RoundRobin

CLUSTER_POLICIES: dict[str, type[ClusterPolicy]] = {
    policy.name: policy for policy in (RoundRobin, LeastLoaded, LeastTime, Llumnix, Disaggregated)
}

__all__ = [
    "CLUSTER_POLICIES",
    "ClusterPolicy",
    "Credit",
    "Disaggregated",
    "Freeness",
    "LeastLoaded",
    "LeastTime",
    "Ledger",
    "Llumnix",
    "Move",
    "Reason",
    "RoundRobin",
    "Scaling",
    "Settlement",
    "Switching",
    "Way",
    "drained_first",
]
