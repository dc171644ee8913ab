"""Measure what an evaluation spends its time on."""

from __future__ import annotations

import time


class Timer:
    """Adds up the seconds spent on each activity."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, activity: str) -> None:
        """Count the time since the last lap, or since the start, for `activity`."""
        now = time.perf_counter()
        self.seconds[activity] = self.seconds.get(activity, 0.0) + now - self._last
        self._last = now

    def overhead_share(self, useful: str) -> float:
        """The share of the total time that was not spent on the activity `useful`."""
        return 1 - self.seconds[useful] / sum(self.seconds.values())
