import mmap
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bestiary.memory import MIB, peak_memory, reset_peak_memory

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and glibc")

COUNT_PAGE_FAULTS = """
import resource, threading
import torch
if {kept}:
    from bestiary.memory import keep_freed_memory
    keep_freed_memory()

def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def steady():  # small allocations may break up a freed block: only then does a round take new memory
    found.append(min(count() for _ in range(4)))

found = []
steady()
thread = threading.Thread(target=steady)
thread.start()
thread.join()
print(*found)
"""

MEASURE_CHILDREN = """
import subprocess, sys
from bestiary.memory import peak_memory
for mib in (120, 60):
    subprocess.run([sys.executable, "-c", f"b'x' * ({mib} * 2**20)"], check=True)
alone, two = peak_memory(), peak_memory(child_processes=2)
assert "torch" not in sys.modules
assert alone.device_mib is None
print(alone.process_mib, two.process_mib)
"""


def run(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return [float(number) for number in done.stdout.split()]


def use_memory(mib: int) -> None:
    block = b"x" * MIB
    with mmap.mmap(-1, mib * MIB) as memory:  # returned to the system at once, whatever the allocator does
        for _ in range(mib):
            memory.write(block)


@linux_only
def test_the_peak_counts_memory_that_was_freed_until_it_is_reset() -> None:
    reset_peak_memory()
    before = peak_memory().process_mib
    use_memory(200)
    assert peak_memory().process_mib > before + 150
    reset_peak_memory()
    assert peak_memory().process_mib < before + 100


@linux_only
def test_child_processes_count_with_the_largest_and_torch_is_not_imported() -> None:
    alone, with_two = run(MEASURE_CHILDREN)
    assert 240 < with_two - alone < 500
    assert alone < 120


def test_the_device_is_measured_where_torch_has_used_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [300 * MIB]
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        max_memory_allocated=lambda: peaks[-1],
        reset_peak_memory_stats=lambda: peaks.append(0),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert peak_memory().device_mib == 300
    reset_peak_memory()
    assert peak_memory().device_mib == 0
    cuda.is_initialized = lambda: False
    assert peak_memory().device_mib is None


@linux_only
@pytest.mark.slow
def test_a_tensor_reuses_the_memory_of_a_freed_tensor_in_every_thread() -> None:
    """Counts the pages that the system clears for five tensors of 100 MB, in the main thread and in another thread."""
    with_it, without = run(COUNT_PAGE_FAULTS.format(kept=True)), run(COUNT_PAGE_FAULTS.format(kept=False))
    assert max(with_it) < min(without) / 4
