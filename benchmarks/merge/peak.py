"""Runs a command and prints, as JSON, its exit code, wall seconds and peak memory in bytes.

    python -I -S benchmarks/merge/peak.py OUTPUT COMMAND …

The command's standard output goes to the file OUTPUT. This is a program of its own since Linux counts the memory of the process
that starts another towards the other's peak: this one is small, while a benchmark holds gigabytes.
"""

import json
import os
import sys
import time


def main() -> None:
    output = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    begun = time.perf_counter()
    child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, output, 1)])
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - begun
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
