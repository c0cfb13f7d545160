"""The command line in processes of its own that start at once: torch is imported here, and every run is a fork.

Reads one JSON line per run from stdin: argv, a file for stderr; if files are to stay small, their limit in bytes; if it is to
wait for a signal, behind which addition to its journal. Answers with the process id, and once the run is over with how it ended.
"""

import gc
import json
import os
import resource
import signal
import sys
import time

import torch

import planner.commands.check
import planner.commands.profile
import planner.commands.sweep  # noqa: F401 - so that no run has to
from planner.cli import main
from planner.files import Journal
from planner.profiler import acceptance, device, latency, texts, trial  # noqa: F401
from planner.runtime import native  # noqa: F401


def hold(count: int) -> None:
    real, left = Journal.add, [count]

    def add(self, entry):
        real(self, entry)
        left[0] -= 1
        if left[0] == 0:
            time.sleep(600)

    Journal.add = add


def run(order: dict) -> None:
    for number, name in ((1, os.devnull), (2, order["stderr"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if order.get("max_file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["max_file_bytes"], resource.RLIM_INFINITY))
    if order.get("hold_after"):
        hold(order["hold_after"])
    sys.argv = ["planner", *order["argv"]]
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    device.BUSY_SECONDS = 0.0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
    gc.freeze()  # every trial collects garbage: not what was imported here
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            run(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
