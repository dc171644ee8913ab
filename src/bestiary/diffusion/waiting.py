"""A progress bar for work that reports no progress."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def waiting_bar(expected_seconds: float) -> Iterator[None]:
    """A bar that moves each second while a model compiles."""
    finished = threading.Event()
    seconds = round(expected_seconds)
    with tqdm(
        total=seconds, desc="compile the model", bar_format="{desc}: {bar}| {elapsed} of about " + f"{seconds} s"
    ) as bar:

        def move() -> None:
            while not finished.wait(1.0):
                if bar.n < seconds:
                    bar.update()
                bar.refresh()

        mover = threading.Thread(target=move, daemon=True)
        mover.start()
        try:
            yield
        finally:
            finished.set()
            mover.join()
