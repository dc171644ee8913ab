"""How many processes can work side by side on this machine, and how they start quickly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from joblib import cpu_count


def cores() -> int:
    """Return the number of cores that this process may use, which a container can limit."""
    return int(cpu_count())


@contextmanager
def empty_main_module() -> Iterator[None]:
    """Hide the running script from processes that start meanwhile: importing it would cost each of them a second."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
