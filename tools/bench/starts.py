"""The starts of a benchmark: `python -m tools.bench.starts WORK RANK WORLD_SIZE` does what a rank does with
an index, one thing for each line it reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.errors import EarwitnessError
from configs.schema import RunConfig
from data import dataset, storage
from data.index import SCHEMA, save_sidecar
from data.loader import Loader
from data.location import Location
from data.order import rank_lanes
from data.samples import SampleReader
from data.sources import Shard
from data.upload import write
from tools.bench.report import ROOT, Figures

SHARES = {
    "audioset": 1760,
    "music": 236,
    "speech": 372,
    "events": 178,
    "freesound": 327,
    "effects": 175,
    "clips": 72,
}
"""Thousands of samples by source, in a set of 3.1 million."""
FRAMES, SECONDS = 3000, 30.0
POINTS = {"start": 0.0, "middle": 0.5, "end": 0.999}
"""Parts of an epoch that are over when planning begins."""
NOTHING: Any = None


def make(work: Path, samples: int, shards: int, held_out: float, root: str) -> None:
    """Sidecars of empty shards below `root`, as full indexes have them, and a config: a sample in 1,000 has a
    problem, one in 20 is too long."""
    total = sum(SHARES.values())
    sources = [{"name": name, "shards": f"{root}/{name}/*.tar", "validation": held_out} for name in SHARES]
    numbers = [
        (name, number) for name, share in SHARES.items() for number in range(max(1, shards * share // total))
    ]
    with ThreadPoolExecutor(storage.REQUESTS) as pool:
        list(
            pool.map(
                lambda shard: write(b"", Location(f"{root}/{shard[0]}/{shard[0]}-{shard[1]:06d}.tar")),
                numbers,
            )
        )
    sections = {
        "run": {"name": "bench"},
        "model": {"name_or_path": "none"},
        "optim": {"epochs": 1},
        "batch": {"global_size": 64},
    }
    config = RunConfig.model_validate(
        {**sections, "data": {"sources": sources, "index_dir": str(work / "index")}}
    )
    (work / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    found = dataset.list_shards(config)
    for number, shard in enumerate(found):
        _make_sidecar(
            shard, config, number, samples * (number + 1) // len(found) - samples * number // len(found)
        )


def _make_sidecar(shard: Shard, config: RunConfig, seed: int, samples: int) -> None:
    random = np.random.default_rng(seed)
    letters = random.choice(
        list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"), (samples, 11)
    )
    starts = random.integers(0, 600, samples) * 1000
    keys = [
        f"Y{''.join(name)}_{start:06d}_{start + 10_000:06d}"
        for name, start in zip(letters.tolist(), starts.tolist(), strict=True)
    ]
    text, audio = random.integers(100, 500, samples), random.integers(20_000, 400_000, samples)
    ends = np.cumsum(2048 + audio + audio % 512)  # two headers, the text in a block
    columns = {
        "key": keys,
        "ending": ["flac"] * samples,
        "audio_offset": ends - audio,
        "audio_size": audio,
        "text_offset": ends - audio - 1024,
        "text_size": text,
        "crc32": random.integers(0, 2**32, samples),
        "seconds": random.exponential(10, samples).astype(np.float32),
        "caption_characters": text - 20,
        "problem": np.where(random.random(samples) < 1e-3, "the audio is empty (0 bytes)", "").tolist(),
    }
    save_sidecar(
        shard,
        config.data.index_dir,
        pa.table(columns, SCHEMA),
        storage.stat(shard.location),
        full=True,
        damage="",
    )


class Rank:
    """A process that has imported everything, and now waits to be told."""

    def __init__(self, work: Path, rank: int, world_size: int) -> None:
        command = [sys.executable, "-m", "tools.bench.starts", str(work), str(rank), str(world_size)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def tell(self, what: str) -> None:
        """Have something done: build, open, plan PART."""
        assert self.process.stdin
        print(what, file=self.process.stdin, flush=True)

    def seconds(self) -> float:
        """What that has taken. Raises EarwitnessError if it failed."""
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise EarwitnessError("a process of the benchmark failed; see above")
        return float(line)

    def memory(self) -> Figures:
        """Megabytes: private to this process, with its share of what others have too (PSS), with all of that
        (RSS), and the peak of RSS."""
        place = Path(f"/proc/{self.process.pid}")
        lines = [
            *(place / "smaps_rollup").read_text(encoding="utf-8").splitlines()[1:],
            *(place / "status").read_text(encoding="utf-8").splitlines(),
        ]
        size = {
            name: int(rest.split()[0]) * 1024 / 1e6
            for name, _, rest in (line.partition(":") for line in lines)
            if rest.endswith("kB")
        }
        return {
            "private": size["Private_Clean"] + size["Private_Dirty"],
            "pss": size["Pss"],
            "rss": size["Rss"],
            "peak": size["VmHWM"],
        }

    def end(self) -> None:
        """Let it go."""
        self.process.kill()
        self.process.communicate()


def measure_merge(work: Path) -> Figures:
    """The first start of a run, on rank 0: from all sidecars to the merged indexes."""
    shutil.rmtree(work / "run", ignore_errors=True)
    (rank,) = ranks = _begin(work, 1)
    try:
        before = rank.memory()["rss"]
        seconds = _all(ranks, "build")
        return {"seconds": seconds, "peak_megabytes": rank.memory()["peak"] - before}
    finally:
        rank.end()


def measure_start(work: Path, world_size: int) -> Figures:
    """A later start: seconds of the slowest rank, megabytes of all of them, more than after their imports."""
    ranks = _begin(work, world_size)
    try:
        before = [rank.memory() for rank in ranks]
        check, opening = _all(ranks[:1], "build"), _all(ranks, "open")
        plans = {f"plan_{point}_seconds": _all(ranks, f"plan {part}") for point, part in POINTS.items()}
        after = [rank.memory() for rank in ranks]
        more = {
            name: sum(now[name] - then[name] for now, then in zip(after, before, strict=True))
            for name in ("private", "pss")
        }
        return {
            "check_seconds": check,
            "open_seconds": opening,
            "ready_seconds": check + opening,
            **plans,
            "first_batch_seconds": check + opening + max(plans.values()),
            "private_megabytes": more["private"],
            "node_megabytes": more["pss"],
            "peak_megabytes": after[-1]["peak"] - before[-1]["rss"],
        }
    finally:
        for rank in ranks:
            rank.end()


def _begin(work: Path, world_size: int) -> list[Rank]:
    ranks = [Rank(work, rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        rank.seconds()
    return ranks


def _all(ranks: list[Rank], what: str) -> float:
    """Seconds of the slowest."""
    for rank in ranks:
        rank.tell(what)
    return max(rank.seconds() for rank in ranks)


def main(work: Path, rank: int, world_size: int) -> None:
    """Do what is asked for, and print how many seconds it took."""
    config = RunConfig.model_validate_json((work / "config.json").read_text(encoding="utf-8"))
    lanes = rank_lanes(rank, world_size, config.batch.global_size)
    print(0.0, flush=True)
    for line in sys.stdin:
        what, *arguments = line.split()
        began = time.perf_counter()
        if what == "build":
            dataset.build(config, work / "run", SECONDS)
        elif what == "open":
            found = dataset.open_dataset(config, work / "run")
            order = found.order(config, FRAMES)
            total = order.steps_of(config.optim.epochs or 1)
        else:
            samples = SampleReader(
                found.training, NOTHING, max_seconds=SECONDS, overlong="skip", seed=0, in_hand=NOTHING
            )
            loader = Loader(
                samples,
                order,
                lanes,
                range(int(float(arguments[0]) * total), total),
                threads=1,
                read_ahead_mb=config.data.read_ahead_mb,
            )
            assert loader._plan_step()  # reading would follow, and there is nothing to read
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
