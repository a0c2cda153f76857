"""How a contender in a process of its own is spoken to. Nothing but the standard library and numpy is imported here.

One JSON object a line, from the driver on stdin and back on stdout:

    {"do": "prepare", ...case}        -> {}  or {"needs": bytes, "free": bytes}: it does not fit
    {"do": "run"}                     -> {"seconds": ..., "cpu_seconds": ...}
    {"do": "save", "path": "..."}     -> {}         the last result, as .npy
    {"do": anything else}             -> whatever the contender's function of that name returns

Each answer also has the peak resident memory of the process so far, "peak", in bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import numpy as np


class DoesNotFit(Exception):
    """Raised by ``prepare`` with the bytes that the contender would need and those that are free."""


def serve(prepare: Callable, **extras: Callable) -> None:
    """Answer until stdin ends.

    Args:
        prepare: takes a case, returns ``run``: a function that computes the matrix from the loaded inputs and waits
            until it is there.
        extras: other commands; each is given the case.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    case = run = result = None
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict = {}
        if command["do"] == "prepare":
            case = command
            try:
                run = prepare(case)
            except DoesNotFit as error:
                answer["needs"], answer["free"] = error.args
        elif command["do"] == "run":
            result = None  # not two of them at a time
            start, cpu_start = time.perf_counter(), time.process_time()
            result = run()
            answer["seconds"], answer["cpu_seconds"] = time.perf_counter() - start, time.process_time() - cpu_start
        elif command["do"] == "save":
            np.save(command["path"], np.asarray(result))
        else:
            answer["result"] = extras[command["do"]](case)
        answer["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps(answer), file=answers, flush=True)


def require(num_bytes: int, free: int) -> None:
    """Raise :class:`DoesNotFit` unless so many bytes fit into nine tenths of what is free."""
    if num_bytes > 0.9 * free:
        raise DoesNotFit(int(num_bytes), int(free))


def free_memory() -> int:
    """Bytes of main memory that are available."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def versions(*packages: str) -> str:
    """As installed in this environment."""
    found = [f"Python {sys.version.split()[0]}"]
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)
