"""Run all benchmarks one after the other (`make bench`). The last line is JSON with all their numbers."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run each script of this folder, also after one that fails."""
    started, failed = time.monotonic(), []
    results: dict[str, object] = {}  # each script's last line, parsed
    for script in sorted(HERE.glob("[a-z]*.py")):
        last = ""
        with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            for line in running.stdout:
                print(last, end="", flush=True)
                last = line
        if running.returncode:
            failed.append(script.name)
        with suppress(ValueError):  # what a script that failed printed last
            results[script.stem] = json.loads(last)
    print(json.dumps(results | {"seconds": round(time.monotonic() - started)}))
    if failed:
        sys.exit(f"{', '.join(failed)} failed.")


if __name__ == "__main__":
    main()
