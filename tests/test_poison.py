"""A sample that its decoder does not survive, or never ends with, is left out the third time; nothing else
is."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import soundfile

from configs.run import crash_journal
from configs.run.crash_journal import CrashJournal
from configs.run.events import DeathInHand
from configs.run.folder import RunDir
from data.merged import Index
from tests.forks import Course, Kill, Launcher
from tests.making import ROOT, audit_of_attempts, config_values, make_clips, run_program

DECODER = "data.decode:_sndfile"


class Poisoned(Course):
    """Runs over clips that have their key as title, by which the decoder can tell them."""

    def config(self, name: str) -> dict[str, Any]:
        return config_values(
            name,
            self.folder,
            self.model,
            self.shards,
            optim={"max_steps": 3},
            engine={"backend": "fsdp2"},
            evaluate={"captions": 1, "max_samples": 4},
        )


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory, model: Path, launch: Launcher) -> Poisoned:
    """With the run `whole`, which nothing happens to."""
    folder = tmp_path_factory.mktemp("poison")
    table = make_clips(folder / "clips", range(30), ("flac",))
    for clip in table.parent.glob("*.flac"):
        sound, rate = soundfile.read(clip, always_2d=True)
        with soundfile.SoundFile(clip, "w", rate, sound.shape[1]) as file:
            file.title = clip.stem
            file.write(sound)
    assert run_program("tools.pack", table, folder / "shards").returncode == 0
    course = Poisoned(folder, model, f"{folder}/shards/*.tar", launch)
    assert launch(course.config("whole"), procs=2).returncode == 0
    return course


@pytest.mark.slow
@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_sample_that_crashes_its_decoder_twice_is_left_out_then(
    course: Poisoned, launch: Launcher, part: str
) -> None:
    whole, run, config = course.run("whole"), course.run(part), course.config(part)
    taken = {step: found.keys for (_, step), found in audit_of_attempts(whole.path).items()}
    key = (
        taken[2][5]
        if part == "training"
        else Index(whole.path / "index-validation.arrow", whole.read_config().data.sources).identity(0)
    )
    crash = Kill(DECODER, content=key.rpartition("/")[2])
    for _ in range(2):
        done = launch(config, procs=2, kill=crash)
        assert done.returncode == 1
        assert (
            f"was killed by SIGSEGV: Segmentation fault while sample {key} of"
            f" {course.folder}/shards/shard-000000.tar was decoded" in done.stderr
        )
        assert "in string_at" in done.stderr, "the trace is shown"
    assert not run.quarantine.read().samples
    assert launch(config, procs=2, kill=crash).returncode == 0

    assert [(line.attempt, line.key, line.how) for line in run.ledger.read().of(DeathInHand)] == [
        (n, key, "Segmentation fault") for n in (0, 1)
    ]
    (quarantined,) = run.quarantine.read().samples
    assert (quarantined.attempt, quarantined.key, quarantined.reason) == (
        2,
        key,
        "its decoder crashed or never ended in 2 attempts",
    )
    for step, keys in taken.items():
        found = audit_of_attempts(run.path)[2, step]
        assert found.keys == [one for one in keys if one != key] and found.rejected == [
            one for one in keys if one == key
        ]
    assert not list(run.attempt_logs(2).glob("*.fatal")) and not list(run.attempt_logs(2).glob("*.inhand"))


def test_a_rank_that_is_killed_with_a_sample_in_hand_does_not_count(
    course: Poisoned, launch: Launcher
) -> None:
    run = course.run("killed")
    done = launch(course.config("killed"), procs=2, kill=Kill(DECODER, 9, rank=1))
    assert "rank 1 was killed by SIGKILL: by hand" in done.stderr
    (held,) = crash_journal.read(run.attempt_logs(0) / "rank-00001.inhand")
    assert (
        held.key.startswith("sounds/shard-000000.tar/clip")
        and held.shard == f"{course.folder}/shards/shard-000000.tar"
    )
    assert launch(course.config("killed"), procs=2).returncode == 0
    assert not run.ledger.read().of(DeathInHand) and not run.quarantine.read().samples


CRASH = """
import ctypes, faulthandler, os, sys, threading, time
from pathlib import Path
from configs.run.crash_journal import CrashJournal
folder, culprit = Path(sys.argv[1]), sys.argv[2]
faulthandler.enable((folder / "rank-00003.fatal").open("w"))
journal = CrashJournal(3, folder / "rank-00003.inhand")
def hold(key):
    with journal.holding(key, "s3://bucket/a.tar"):
        held.wait()
        if key == culprit:
            ctypes.string_at(0) if len(sys.argv) == 3 else os.kill(os.getpid(), int(sys.argv[3]))
        time.sleep(60)
held = threading.Barrier(4)
for key in ("one", "two", "three"):
    threading.Thread(target=hold, args=(key,), daemon=True).start()
held.wait()
ctypes.string_at(0) if culprit == "main" else time.sleep(60)
"""


@pytest.mark.parametrize(("culprit", "blamed"), [(["two"], ["two"]), (["main"], []), (["two", "9"], [])])
def test_only_what_the_crashing_thread_had_in_hand_is_blamed(
    tmp_path: Path, culprit: list[str], blamed: list[str]
) -> None:
    run = RunDir(tmp_path)
    run.attempt_logs(0).mkdir(parents=True)
    done = subprocess.run([sys.executable, "-c", CRASH, run.attempt_logs(0), *culprit], cwd=ROOT, check=False)
    assert done.returncode < 0
    assert sorted(held.key for held in crash_journal.read(run.attempt_logs(0) / "rank-00003.inhand")) == [
        "one",
        "three",
        "two",
    ]
    deaths = crash_journal.deaths(run, 0)
    assert [(death.rank, death.key, death.how) for death in deaths] == [
        (3, key, "Segmentation fault") for key in blamed
    ]
    for _ in range(2):  # looked at twice, told once
        assert not crash_journal.find_poisoned(run, 1)
        assert [line.key for line in run.ledger.read().of(DeathInHand)] == blamed


def test_a_decoder_that_never_ends_counts_as_a_death(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for attempt, keys in enumerate((["endless", "slow"], ["endless"], [])):
        assert crash_journal.find_poisoned(run, attempt) == ({"endless"} if attempt == 2 else set())
        record, done = CrashJournal(3), threading.Event()

        def hold(key: str, record: CrashJournal = record, done: threading.Event = done) -> None:
            with record.holding(key, "a.tar"):
                done.wait()

        threads = [threading.Thread(target=hold, args=(key,)) for key in keys]
        for number, thread in enumerate(threads, 1):
            thread.start()
            while len(record.now()) < number:
                pass
        assert [held.key for held in record.now()] == keys, "the longest comes first"
        assert not record.endless(60)
        assert [held.key for held in record.endless(0)] == keys
        for key in keys:  # as the watchdog of a hung rank does
            run.ledger.record(DeathInHand(attempt=attempt, rank=0, key=key, shard="a.tar", how="never ended"))
        done.set()
        for thread in threads:
            thread.join()
        assert not record.now()


def test_names_too_long_for_the_record_are_cut_off_at_the_shard(tmp_path: Path) -> None:
    record = CrashJournal(1, tmp_path / "record")
    with record.holding("é" * 300, "s3://" + "ü" * 600):
        (held,) = crash_journal.read(tmp_path / "record")
    assert (
        held.key == "é" * 300
        and held.shard.startswith("s3://üü")
        and crash_journal.read(tmp_path / "record") == []
    )
