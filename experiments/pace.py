"""How long a run takes, from what its first rounds took."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from .statistics import duration

SHORT = 60.0  # seconds; what is left of a run is announced where it is longer


class Phase(NamedTuple):
    """Rounds of a run, one after another, that do the same work."""

    rounds: int
    sample: int = 1  # rounds after which the others are known, such as one of each rule where rules take turns
    name: str = ""  # what the rounds are of, such as "the readout"; empty where there is one phase alone
    apart: int = 0  # rounds at its start that do more than the others, and tell nothing about them


class Pace:
    """Announces, once in each phase, how long the rest of it will take.

    Args:
        phases: in their order.
        unit: of rounds, such as "epoch".
        done: rounds that an interrupted run had done; those of another machine tell nothing about this one.
    """

    def __init__(self, phases: Sequence[Phase], unit: str, done: int = 0) -> None:
        self._phases, self._unit, self._done = phases, unit, done
        self._spent: list[float] = []  # in this phase

    def after(self, number: int, seconds: float) -> str:
        """The announcement after this round, counted from 1, which took these seconds; mostly there is none."""
        ends = list(accumulate(phase.rounds for phase in self._phases))
        index = bisect_left(ends, number)
        phase, first = self._phases[index], ends[index] - self._phases[index].rounds + 1
        start = max(first, self._done + 1)
        if number == start:
            self._spent = []
        if number < start + phase.apart:
            return ""
        self._spent.append(seconds)
        left = ends[index] - number
        expected = left * sum(self._spent) / len(self._spent)
        if len(self._spent) != phase.sample or expected < SHORT:
            return ""
        of = f" of {phase.name}" if phase.name else ""
        then = [f"{self._count(later.rounds)} of {later.name}" for later in self._phases[index + 1 :]]
        return ", then ".join([f"about {duration(expected)} for the next {self._count(left)}{of}", *then])

    def _count(self, rounds: int) -> str:
        return f"{rounds:,} {self._unit}{'s' * (rounds > 1)}"
