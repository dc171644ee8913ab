import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import psutil
import pytest

from bestiary.errors import BestiaryError
from bestiary.evaluation.sharing import one_process_per_core

NEVER = 600.0  # seconds: longer than a test may take


def test_results_of_several_processes_come_in_the_order_of_the_items() -> None:
    assert list(one_process_per_core(math.sqrt, [4.0, 9.0, 16.0])) == [2.0, 3.0, 4.0]


def test_an_error_in_another_process_is_raised_here_and_a_killed_process_is_explained() -> None:
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(one_process_per_core(math.sqrt, [-1.0]))
    with pytest.raises(BestiaryError, match=r"was killed, perhaps because memory ran out\. Close other programs"):
        list(one_process_per_core(signal.raise_signal, [signal.SIGKILL]))


def test_processes_end_when_their_results_are_no_longer_wanted() -> None:
    with closing(one_process_per_core(time.sleep, [0.0, NEVER, NEVER])) as results:
        next(results)
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()


def test_processes_end_with_a_parent_that_is_killed() -> None:
    program = f"""
import time
from bestiary.evaluation.sharing import one_process_per_core

results = one_process_per_core(time.sleep, [0.0, {NEVER}, {NEVER}])
next(results)
print("started", flush=True)
next(results)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == "started\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        os.kill(parent.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert children
        assert not alive
