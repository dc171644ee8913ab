"""Work that Accelerate's processes share, so that the result is the same however many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def shared(work: Callable[[Item], Result], items: Sequence[Item], name: str, unit: str) -> list[Result]:
    """`work(item)` for every item, in their order, each done in one process and then known to all of them.

    A bar counts the items of the main process. Results must pickle.
    """
    from accelerate.utils import gather_object

    from bestiary.diffusion.base import processes

    state = processes()
    mine = range(state.process_index, len(items), state.num_processes)
    bar = tqdm(mine, desc=name, unit=unit, disable=not state.is_main_process)
    done = gather_object([(index, work(items[index])) for index in bar])
    return [result for _, result in sorted(done, key=lambda pair: pair[0])]
