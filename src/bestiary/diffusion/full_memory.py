"""What happens when a GPU's memory is full: batches are halved where that changes nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from bestiary.errors import BestiaryError

Result = TypeVar("Result")


class Halving:
    """Works on batches in parts as large as the GPU's memory holds; what does not fit is halved, for good.

    what names the work in messages, such as "Drawing", and key is the parameter with the batch size.
    """

    def __init__(self, what: str, key: str) -> None:
        self.what = what
        self.key = key
        self.largest: int | None = None  # that fits; None: every batch so far

    def parts(self, work: Callable[[Any], Result], batch: Any) -> list[Result]:
        """`work` on each part of a batch (a sequence, or a tensor that is split by its first dimension), in order.

        Raises BestiaryError when not even one of its items fits.
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
                        f"{self.what} does not fit into the GPU's memory, even one at a time. End other programs that "
                        "use the GPU, or choose a smaller encode.resolution."
                    ) from error
            # Only here, when the error and the tensors that it holds are gone.
            torch.cuda.empty_cache()
            self.largest = len(part) // 2
            tqdm.write(
                f"{self.what} {len(part)} at a time does not fit into the GPU's memory. Continuing with "
                f"{self.largest} at a time: lower {self.key} to start with that."
            )
        return results


@contextmanager
def explained(work: str, advice: str) -> Iterator[None]:
    """Inside, a GPU whose memory is full is an error with the advice that helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BestiaryError(f"{work} does not fit into the GPU's memory. {advice}") from error
