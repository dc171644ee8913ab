"""Share work between Accelerate's processes. The result is the same for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_across_processes(work: Callable[[Item], Result], items: Sequence[Item], task: str, unit: str) -> list[Result]:
    """`work(item)` for every item, in order. One process computes each result, and all processes return all results.

    The main process shows a progress bar for its share, labelled `task`. Results must be picklable.
    """
    from accelerate.utils import gather_object

    from bestiary.diffusion.base import processes

    state = processes()
    own = range(state.process_index, len(items), state.num_processes)
    bar = tqdm(own, desc=task, unit=unit, disable=not state.is_main_process)
    results = gather_object([(index, work(items[index])) for index in bar])
    return [result for _, result in sorted(results, key=lambda pair: pair[0])]
