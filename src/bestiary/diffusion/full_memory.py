"""Handle a full GPU memory: halve batches where that changes only rounding, else explain what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from bestiary.errors import BestiaryError

Result = TypeVar("Result")


class Halving:
    """Processes batches in parts that fit into the GPU's memory. A part that does not fit is halved permanently.

    what names the work in messages, such as "Drawing". key is the parameter for the batch size. largest is the size of
    the first parts; with None, the first part is the whole batch.
    """

    def __init__(self, what: str, key: str, largest: int | None = None) -> None:
        self.what = what
        self.key = key
        self.largest = largest  # size of a part that fits; None: every batch has fitted so far

    def parts(self, work: Callable[[Any], Result], batch: Any) -> list[Result]:
        """`work` on each part of a batch (a sequence, or a tensor that is split by its first dimension), in order.

        Raises BestiaryError when not even a single item fits.
        """
        results: list[Result] = []
        done = 0
        while done < len(batch):
            part = batch[done : done + (self.largest or len(batch))]
            try:
                results.append(work(part))
                done += len(part)
                continue
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise BestiaryError(
                        f"{self.what} does not fit into the GPU's memory, even one at a time. Close other programs "
                        "that use the GPU, or choose a smaller encode.resolution."
                    ) from error
            # After the except block, because the error holds tensors until then.
            torch.cuda.empty_cache()
            self.largest = len(part) // 2
            tqdm.write(
                f"{self.what} {len(part)} at a time does not fit into the GPU's memory. Continuing with "
                f"{self.largest} at a time. Lower {self.key} to start with that."
            )
        return results


@contextmanager
def explained(work: str, advice: str) -> Iterator[None]:
    """Turn a full GPU memory in the body into a BestiaryError with this advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BestiaryError(f"{work} does not fit into the GPU's memory. {advice}") from error
