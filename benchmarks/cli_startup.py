"""How long `claas --help` takes, from the start of the process to its end. The aim is 0.5 s; what is imported is a test of its own.

python benchmarks/cli_startup.py [RUNS]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

AIM_S = 0.5


def seconds_of(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "claas", *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    slowest = 0.0
    for arguments in (["--help"], ["--version"], ["teach", "--help"], ["adapters", "--help"]):
        seconds = [seconds_of(*arguments) for _ in range(runs)]
        slowest = max(slowest, statistics.median(seconds))
        print(f"claas {' '.join(arguments):16} median {statistics.median(seconds):.3f} s, worst {max(seconds):.3f} s of {runs}")
    sys.exit(slowest > AIM_S)


if __name__ == "__main__":
    main()
