"""How fast something goes, from what it took lately."""

_MEMORY = 0.9  # share of the past in the next value


class Rate:
    """Amounts per second, recent ones counting most.

    Attributes:
        per_s: 0 before the first sample.
    """

    def __init__(self) -> None:
        self._amount = self._time_s = 0.0

    @property
    def per_s(self) -> float:
        return self._amount / self._time_s if self._time_s else 0.0

    def add(self, amount: float, time_s: float) -> None:
        """`amount` took `time_s`."""
        self._amount = _MEMORY * self._amount + amount
        self._time_s = _MEMORY * self._time_s + time_s
