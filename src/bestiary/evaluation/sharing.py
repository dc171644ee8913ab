"""Share work between processes. The result is the same for any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from bestiary.errors import BestiaryError
from bestiary.memory import keep_freed_memory
from bestiary.worker_processes import cores, empty_main_module

Item = TypeVar("Item")
Result = TypeVar("Result")
_WORK: list[Callable[[Any], Any]] = []  # of this process, if `one_process_per_core` started it


def map_across_processes(work: Callable[[Item], Result], items: Sequence[Item], task: str, unit: str) -> list[Result]:
    """`work(item)` for every item, in order. One of Accelerate's processes computes each; all return all results.

    The main process shows a progress bar for its share, labelled `task`. Results must be picklable.
    """
    from accelerate.utils import gather_object

    from bestiary.diffusion.base import processes

    state = processes()
    own = range(state.process_index, len(items), state.num_processes)
    bar = tqdm(own, desc=task, unit=unit, disable=not state.is_main_process)
    results = gather_object([(index, work(items[index])) for index in bar])
    return [result for _, result in sorted(results, key=lambda pair: pair[0])]


def one_process_per_core(work: Callable[[Item], Result], items: Sequence[Item]) -> Generator[Result]:
    """`work(item)` for every item, in order, by new processes on this machine that give torch one thread each.

    `work`, the items and the results must be picklable. The processes end with the generator: close it.
    Raises what `work` raises, and BestiaryError when one of the processes is killed.
    """
    others = set(multiprocessing.active_children())
    # spawn: a fork would copy this process's threads in an undefined state. Pickled by hand, because multiprocessing
    # would pass tensors through shared memory, which containers have little of.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cores(), len(items)), context, _begin, (pickle.dumps(work),)) as pool:
        try:
            with empty_main_module():
                pending = [pool.submit(_work, item) for item in items]
            for future in pending:
                yield future.result()
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise BestiaryError(
                    "A process that shares the work was killed, perhaps because memory ran out. Close other programs, "
                    "then try again."
                ) from None
            raise


def _begin(work: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is a semaphore, which this process would leave behind
    torch.set_num_threads(1)
    keep_freed_memory()
    _WORK.append(pickle.loads(work))


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _work(item: Any) -> Any:
    return _WORK[0](item)
