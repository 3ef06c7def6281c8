"""The benchmark of starts: `python -m tools.bench.starts WORK RANK WORLD_SIZE` is a rank that does with an
index what each line of its input says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
NOT_NEEDED: Any = None
"""What reading would need, and planning does not."""
KEY_LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def make(work: Path, samples: int, shards: int, held_out: float, root: str) -> None:
    """Write empty shards below `root`, sidecars for them as full indexes have them, and a config: one sample
    in 1,000 has a problem, one in 20 is too long."""
    total = sum(SHARES.values())
    locations = [
        Location(f"{root}/{name}/{name}-{number:06d}.tar")
        for name, share in SHARES.items()
        for number in range(max(1, shards * share // total))
    ]
    with ThreadPoolExecutor(storage.REQUESTS) as pool:
        list(pool.map(lambda location: write(b"", location), locations))
    sources = [{"name": name, "shards": f"{root}/{name}/*.tar", "validation": held_out} for name in SHARES]
    sections = {
        "run": {"name": "bench"},
        "model": {"name_or_path": "none"},
        "optim": {"epochs": 1},
        "batch": {"global_size": 64},
        "data": {"sources": sources, "index_dir": str(work / "index")},
    }
    config = RunConfig.model_validate(sections)
    (work / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    listed = dataset.list_shards(config)
    bounds = [samples * number // len(listed) for number in range(len(listed) + 1)]
    for number, shard in enumerate(listed):
        _make_sidecar(shard, config, seed=number, samples=bounds[number + 1] - bounds[number])


def _make_sidecar(shard: Shard, config: RunConfig, seed: int, samples: int) -> None:
    random = np.random.default_rng(seed)
    letters = random.choice(KEY_LETTERS, (samples, 11))
    starts = random.integers(0, 600, samples) * 1000
    keys = [
        f"Y{''.join(name)}_{start:06d}_{start + 10_000:06d}"
        for name, start in zip(letters.tolist(), starts.tolist(), strict=True)
    ]
    text = random.integers(100, 500, samples)
    audio = random.integers(20_000, 400_000, samples)
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
        "captions": [1] * samples,
        "members": [2] * samples,
        "problem": np.where(random.random(samples) < 1e-3, "the audio is empty (0 bytes)", "").tolist(),
    }
    table = pa.table(columns, SCHEMA)
    stat = storage.stat(shard.location)
    save_sidecar(
        shard,
        config.data.index_dir,
        table,
        stat,
        full=True,
        damage="",
        members=2 * samples,
        ignored={},
    )


@dataclass(frozen=True)
class Memory:
    """Memory of a process, in megabytes."""

    private: float
    """Pages of this process alone."""
    pss: float
    """Those, and its share of the pages that it has in common with others."""
    rss: float
    """All pages that it has."""
    peak: float
    """The most that RSS has been."""


class Rank:
    """A process that has imported everything, and now waits to be told what to do."""

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

    def tell(self, command: str) -> None:
        """Begin with a command: build, open, plan PART."""
        assert self.process.stdin
        print(command, file=self.process.stdin, flush=True)

    def seconds(self) -> float:
        """Wait for the command, or for the imports; returns how long it took. Raises EarwitnessError if it
        failed."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise EarwitnessError("a process of the benchmark failed; see above")
        return float(line)

    def memory(self) -> Memory:
        """Memory of the process now."""
        folder = Path(f"/proc/{self.process.pid}")
        megabytes = {}
        for file in ("smaps_rollup", "status"):
            for line in (folder / file).read_text(encoding="utf-8").splitlines():
                name, _, value = line.partition(":")
                if value.endswith("kB"):
                    megabytes[name] = int(value.split()[0]) * 1024 / 1e6
        return Memory(
            private=megabytes["Private_Clean"] + megabytes["Private_Dirty"],
            pss=megabytes["Pss"],
            rss=megabytes["Rss"],
            peak=megabytes["VmHWM"],
        )

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.communicate()


def measure_merge(work: Path) -> Figures:
    """Measure the first start of a run, on rank 0: from all sidecars to the merged indexes."""
    shutil.rmtree(work / "run", ignore_errors=True)
    with _ranks(work, 1) as (rank,):
        before = rank.memory()
        seconds = _slowest([rank], "build")
        return {"seconds": seconds, "peak_megabytes": rank.memory().peak - before.rss}


def measure_start(work: Path, world_size: int) -> Figures:
    """Measure a later start: seconds of the slowest rank, and megabytes of all ranks, beyond those that they
    have after their imports."""
    with _ranks(work, world_size) as ranks:
        before = [rank.memory() for rank in ranks]
        check = _slowest(ranks[:1], "build")
        opening = _slowest(ranks, "open")
        plans = {f"plan_{point}_seconds": _slowest(ranks, f"plan {part}") for point, part in POINTS.items()}
        after = [rank.memory() for rank in ranks]
        return {
            "check_seconds": check,
            "open_seconds": opening,
            "ready_seconds": check + opening,
            **plans,
            "first_batch_seconds": check + opening + max(plans.values()),
            "private_megabytes": sum(m.private for m in after) - sum(m.private for m in before),
            "node_megabytes": sum(m.pss for m in after) - sum(m.pss for m in before),
            "peak_megabytes": after[-1].peak - before[-1].rss,
        }


@contextmanager
def _ranks(work: Path, world_size: int) -> Iterator[list[Rank]]:
    """Fresh processes that have imported everything."""
    ranks = [Rank(work, rank, world_size) for rank in range(world_size)]
    try:
        for rank in ranks:
            rank.seconds()
        yield ranks
    finally:
        for rank in ranks:
            rank.end()


def _slowest(ranks: list[Rank], command: str) -> float:
    """Give all ranks a command at once; returns the seconds of the slowest one."""
    for rank in ranks:
        rank.tell(command)
    return max(rank.seconds() for rank in ranks)


class _Start:
    """What a rank does with an index when a run starts, in steps."""

    def __init__(self, work: Path, rank: int, world_size: int) -> None:
        text = (work / "config.json").read_text(encoding="utf-8")
        self.config = RunConfig.model_validate_json(text)
        self.folder = work / "run"
        self.lanes = rank_lanes(rank, world_size, self.config.batch.global_size)

    def build(self) -> None:
        """Merge the indexes, or find that they are current."""
        dataset.build(self.config, self.folder, SECONDS)

    def open_indexes(self) -> None:
        """Map the merged indexes, and cut the samples into runs."""
        self.dataset = dataset.open_dataset(self.config, self.folder)
        self.order = self.dataset.order(self.config)
        self.steps = self.order.steps_of(self.config.optim.epochs or 1)

    def plan(self, part: float) -> None:
        """Plan what is read first when that part of an epoch is over."""
        samples = SampleReader(
            self.dataset.training,
            NOT_NEEDED,
            windows=NOT_NEEDED,
            max_seconds=SECONDS,
            overlong="skip",
            seed=0,
            crash_journal=NOT_NEEDED,
        )
        loader = Loader(
            samples,
            self.order,
            self.lanes,
            range(int(part * self.steps), self.steps),
            threads=1,
            read_ahead_mb=self.config.data.read_ahead_mb,
        )
        assert loader._plan_step()  # reading would follow, and there is nothing to read


def main(work: Path, rank: int, world_size: int) -> None:
    """Do what each line of the input says, and print how many seconds it took."""
    start = _Start(work, rank, world_size)
    print(0.0, flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        began = time.perf_counter()
        match command:
            case "build":
                start.build()
            case "open":
                start.open_indexes()
            case "plan":
                start.plan(float(arguments[0]))
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
