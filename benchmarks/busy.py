"""Runs a command while other processes keep cores busy: python benchmarks/busy.py [--cores N] COMMAND ...

GOMP_SPINCOUNT=300000 in the environment switches common/cores.py off, as this is what libgomp does by itself.
"""

import argparse
import subprocess
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cores", type=int, default=1, metavar="N", help="so many busy processes (default 1)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    args = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.cores)]
    try:
        return subprocess.run(args.command).returncode
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
