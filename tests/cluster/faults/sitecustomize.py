"""Python imports this at its start, in jobs of tests: faults come into a rank from outside, by files in the
folder EARWITNESS_FAULTS.

`rank-2`: the exception that it names is raised in rank 2's main thread, once; `every-rank-2`: in every
attempt. `poison`: the CRC32 of the audio of a sample whose decoding ends in a segmentation fault. `skew-n2`:
node n2's clock is a hundred seconds fast.
"""

import builtins
import ctypes
import os
import sys
import threading
import time
import zlib
from pathlib import Path

POLL = 0.05


def _wait_for_fault(folder: Path, rank: str) -> None:
    once, always = folder / f"rank-{rank}", folder / f"every-rank-{rank}"
    while "trainer.start" not in sys.modules:
        time.sleep(POLL)
    while True:
        for file in (once, always):
            if file.exists():
                error = getattr(builtins, file.read_text(encoding="utf-8").strip())
                if file is once:
                    file.unlink()
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(threading.main_thread().ident or 0), ctypes.py_object(error)
                )
                time.sleep(5)  # an import may have swallowed it: again
        time.sleep(POLL)


def _poison(crc32: int) -> None:
    import data.samples

    decode = data.samples.decode

    def poisoned(audio: bytes, *rest: object) -> object:
        if zlib.crc32(audio) == crc32:
            ctypes.string_at(0)
        return decode(audio, *rest)

    data.samples.decode = poisoned


if "EARWITNESS_FAULTS" in os.environ and "SLURM_PROCID" in os.environ and "launch.worker" in sys.orig_argv:
    faults = Path(os.environ["EARWITNESS_FAULTS"])
    threading.Thread(target=_wait_for_fault, args=(faults, os.environ["SLURM_PROCID"]), daemon=True).start()
    if (faults / f"skew-{os.environ['SLURMD_NODENAME']}").exists():
        right = time.time
        time.time = lambda: right() + 100
    if (faults / "poison").exists():
        _poison(int((faults / "poison").read_text(encoding="utf-8")))
