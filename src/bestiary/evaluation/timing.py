"""Where the time of an evaluation goes."""

from __future__ import annotations

import time


class Laps:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def note(self, what: str) -> None:
        """Add the time since the last note, or since the start, to `what`."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._last
        self._last = now

    def report(self, work: str) -> dict[str, float]:
        """All laps, and the share of their sum that is not `work`."""
        laps = {f"{what}_s": seconds for what, seconds in self.seconds.items()}
        return laps | {"overhead_share": 1 - self.seconds[work] / sum(self.seconds.values())}
