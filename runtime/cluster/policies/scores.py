"""Instances by score, at the cost of those that changed."""

import operator
from collections.abc import Callable
from itertools import compress

from ..snapshot import InstanceSnapshot, Newcomer
from .rooms import AS_GOOD


class Scores:
    """The score of each instance, remembered for those whose snapshot is the same object.

    Among a thousand instances one or two have changed since the last question. Looking for them
    takes 20 µs, and scoring all of them again would take twenty times as long. What is remembered
    changes no answer: a score depends on the snapshot of its instance alone.

    Args:
        score: of an instance; the highest is the best, and minus infinity is out of the question.
    """

    def __init__(self, score: Callable[[InstanceSnapshot], float]) -> None:
        self._score = score
        self._instances: tuple[InstanceSnapshot, ...] = ()
        self._scores: list[float] = []

    def of(self, instances: tuple[InstanceSnapshot, ...]) -> list[float]:
        """One score for each; to be read, and not to be kept."""
        if len(instances) != len(self._instances):
            self._scores = [self._score(instance) for instance in instances]
        elif instances is not self._instances:
            changed = map(operator.is_not, instances, self._instances)
            for place in compress(range(len(instances)), changed):
                self._scores[place] = self._score(instances[place])
        self._instances = instances
        return self._scores

    def best(self, instances: tuple[InstanceSnapshot, ...]) -> InstanceSnapshot | None:
        """The first of those with the highest score; None if none is in question."""
        scores = self.of(instances)
        highest = max(scores, default=float("-inf"))
        return None if highest == float("-inf") else instances[scores.index(highest)]

    def best_for(
        self, instances: tuple[InstanceSnapshot, ...], newcomer: Newcomer
    ) -> InstanceSnapshot | None:
        """The same; or, if what a newcomer needs is not in memory there, one about as good that
        lacks less of it."""
        best = self.best(instances)
        if best is None or not best.missing_bytes(newcomer):
            return best
        highest = max(self._scores)
        least = highest - (1 - AS_GOOD) * abs(highest)
        able = [pair for pair in zip(instances, self._scores, strict=True) if pair[1] >= least]
        return min(able, key=lambda pair: (pair[0].missing_bytes(newcomer), -pair[1]))[0]
