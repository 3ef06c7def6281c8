"""Python imports this at its start, in jobs of tests: errors come into a rank from outside, by a file that names them.

EARWITNESS_FAULTS is a folder. `rank-2` in it, with the name of an exception, is raised in rank 2's main thread, once; `every-rank-2` in every attempt.
"""

import builtins
import ctypes
import os
import sys
import threading
import time
from pathlib import Path

POLL = 0.05


def _wait_for_fault(folder: Path, rank: str) -> None:
    once, always = folder / f"rank-{rank}", folder / f"every-rank-{rank}"
    while True:
        for file in (once, always):
            if file.exists():
                error = getattr(builtins, file.read_text().strip())
                if file is once:
                    file.unlink()
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.main_thread().ident or 0), ctypes.py_object(error))
                return
        time.sleep(POLL)


if "EARWITNESS_FAULTS" in os.environ and "SLURM_PROCID" in os.environ and "launch.worker" in sys.orig_argv:
    threading.Thread(target=_wait_for_fault, args=(Path(os.environ["EARWITNESS_FAULTS"]), os.environ["SLURM_PROCID"]), daemon=True).start()
