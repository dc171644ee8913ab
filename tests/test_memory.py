import subprocess
import sys

import pytest

COUNTED = """
import resource, threading
import torch
if {kept}:
    from bestiary.memory import keep_freed_memory
    keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(25_000_000)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

found = []
for _ in range(2):
    faults()
for _ in range(2):
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
print(found[1], found[3])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is asked to")
@pytest.mark.slow
def test_a_tensor_reuses_the_memory_of_a_freed_one_in_every_thread() -> None:
    """Pages that the system had to clear for ten tensors of 100 MB, in the main thread and in another."""

    def pages(kept: bool) -> list[int]:
        done = subprocess.run([sys.executable, "-c", COUNTED.format(kept=kept)], capture_output=True, check=True)
        return [int(number) for number in done.stdout.split()]

    with_it, without = pages(True), pages(False)
    assert max(with_it) < min(without) / 4
