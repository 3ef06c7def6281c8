"""Each step brings its samples wherever reading starts, however many ranks share it, and whatever way they
are read."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import GenerationConfig, WhisperConfig, WhisperProcessor

from configs.errors import DataError, EarwitnessError, ShardError
from configs.load import validate
from configs.run.crash_journal import CrashJournal
from data import dataset, location, retry, storage
from data.balance import Balance
from data.cache import Cache
from data.captions import CaptionEncoder, prefix_tokens
from data.index import index_shard
from data.loader import Loader, Step
from data.location import Location
from data.order import EMPTY, Order, rank_lanes
from data.retry import STATS
from data.samples import SampleReader
from data.windows import Windows
from tests.making import WINDOW_SECONDS, config_values
from tools.sandbox import faults, s3
from tools.sandbox.faults import Fault, Proxy
from trainer.loaders import sample_work

BATCH, STEPS = (
    7,
    range(24),
)  # two epochs and a half: 60 clips, some held out, each 1.5 times per epoch; 7 do not divide by 2 or 3
Opened = tuple[SampleReader, Order]
Open = Callable[..., Opened]
Members = list[tuple[str, bytes]]


@pytest.fixture
def opened(model: Path, tmp_path: Path) -> Open:
    """Opens shards as a run does; keyword arguments are settings of `data`."""

    def opened(
        shards: str, *, full: bool = False, weight: float = 1.5, batch: int = BATCH, **data: object
    ) -> Opened:
        values = config_values("run", tmp_path, model, shards, batch={"global_size": batch})
        values["data"] |= {
            "sources": [{"name": "sounds", "shards": shards, "validation": 0.15, "weight": weight}],
            "shuffle_window": 5,
            **data,
        }
        config = validate(values, "test")
        for shard in dataset.list_shards(config) if full else []:
            index_shard(shard, config.data.index_dir, full=True)
        dataset.build(config, config.run.dir, WINDOW_SECONDS)
        found = dataset.open_dataset(config, config.run.dir)
        tokenizer = WhisperProcessor.from_pretrained(model).tokenizer
        encoder = CaptionEncoder(
            tokenizer.backend_tokenizer,
            prefix_tokens(tokenizer.backend_tokenizer, GenerationConfig.from_pretrained(model).to_dict()),
            positions=64,
            long_caption="truncate",
        )
        longest = config.data.max_seconds or WINDOW_SECONDS
        samples = SampleReader(
            found.training,
            encoder,
            windows=Windows.of(config, 100 * WINDOW_SECONDS),
            max_seconds=longest,
            overlong=config.data.overlong,
            seed=config.run.seed,
            crash_journal=CrashJournal(8),
        )
        return samples, found.order(config)

    return opened


def loader(
    opened: Opened,
    *,
    rank: int = 0,
    ranks: int = 1,
    steps: range = STEPS,
    threads: int = 2,
    read_ahead_mb: int = 512,
    **options: Any,
) -> Loader:
    samples, order = opened
    return Loader(
        samples,
        order,
        rank_lanes(rank, ranks, order.global_batch),
        steps,
        threads=threads,
        read_ahead_mb=read_ahead_mb,
        **options,
    )


def balanced(opened: Opened, model: Path, *, rank: int, ranks: int, **options: Any) -> Loader:
    """The loader of a rank that is evened out with the others."""
    samples, order = opened
    shape = WhisperConfig.from_pretrained(model)
    work = sample_work(shape, samples.windows, samples.index.column("seconds"), WINDOW_SECONDS)
    balance = Balance(work, rank, ranks, order.global_batch)
    return loader(opened, rank=rank, ranks=ranks, balance=balance, **options)


def content(steps: list[Step]) -> list[list[tuple[object, ...]]]:
    """What a step trains on, in the order of lanes."""
    return [
        [(step.number, s.key, s.caption, *s.tokens.labels, s.waveform.tobytes()) for s in step.samples]
        for step in steps
    ]


def of_ranks(opened: Opened, ranks: int, steps: range = STEPS) -> list[list[tuple[object, ...]]]:
    """What the ranks train on together."""
    parts = [content(list(loader(opened, rank=rank, ranks=ranks, steps=steps))) for rank in range(ranks)]
    return [list(itertools.chain(*together)) for together in zip(*parts, strict=True)]


def write_tar(path: Path, members: Members) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", encoding="utf-8") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def repack(shards: str, folder: Path, change: Callable[[Members], Members]) -> str:
    """Copies of shards under the same names with other members."""
    for shard in Path(shards).parent.glob("*.tar"):
        with tarfile.open(shard) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        write_tar(folder / shard.name, change(members))
    return f"{folder}/*.tar"


@pytest.fixture
def copied(shards: str, tmp_path: Path) -> str:
    """Copies of the shards that a test may spoil."""
    shutil.copytree(Path(shards).parent, tmp_path / "shards")
    return f"{tmp_path}/shards/*.tar"


def test_steps_bring_what_the_order_says(shards: str, opened: Open) -> None:
    samples, order = found = opened(shards)
    steps = list(loader(found))
    assert [step.number for step in steps] == list(STEPS) and not any(step.rejected for step in steps)
    for step in steps:
        epoch, position = order.locate(step.number)
        rows = order.lanes(epoch, range(BATCH))[:, position]
        assert [s.key for s in step.samples] == [samples.index.identity(row) for row in rows if row >= 0]
    assert {len(step.samples) for step in steps} > {BATCH}, "a short last batch of an epoch is among them"


def test_starting_at_any_step_goes_on_as_if_from_the_first(shards: str, opened: Open) -> None:
    found = opened(shards)
    whole = content(list(loader(found)))
    for start in (1, 7, *(step for step in STEPS if found[1].locate(step)[1] == 0), STEPS.stop):
        assert content(list(loader(found, steps=range(start, STEPS.stop)))) == whole[start:], start


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_ranks_together_take_the_batches_of_one(shards: str, opened: Open, ranks: int) -> None:
    found = opened(shards)
    assert of_ranks(found, ranks) == content(list(loader(found)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_balanced_ranks_together_take_the_same_batches(
    shards: str, opened: Open, model: Path, ranks: int
) -> None:
    """Each sample on one rank, cropped and padded as everywhere; the rank with the most audio has less."""
    found = opened(shards, full=True, batch=16, max_seconds=1.2, overlong="crop")
    steps = range(12)
    whole = list(loader(found, steps=steps))
    parts = [list(balanced(found, model, rank=rank, ranks=ranks, steps=steps)) for rank in range(ranks)]
    kept = [list(loader(found, rank=rank, ranks=ranks, steps=steps)) for rank in range(ranks)]
    by_lane = [
        {
            lane: sample
            for part in parts
            for lane, sample in zip(part[step].lanes, part[step].samples, strict=True)
        }
        for step in steps
    ]
    together = [
        Step(step, [taken[lane] for lane in sorted(taken)], [], 0.0) for step, taken in enumerate(by_lane)
    ]
    assert content(together) == content(whole)
    assert [[s.frames for s in step.samples] for step in together] == [
        [s.frames for s in step.samples] for step in whole
    ]
    assert all(part[step].lanes == sorted(part[step].lanes) for part in parts for step in steps)
    if ranks > 1:
        assert fullest(parts) < fullest(kept)
        assert [step.lanes for part in parts for step in part] != [
            step.lanes for part in kept for step in part
        ]


def fullest(parts: list[list[Step]]) -> int:
    """Frames of the fullest rank, over all steps."""
    by_step = zip(*parts, strict=True)
    return sum(max(sum(s.frames for s in step.samples) for step in of_ranks) for of_ranks in by_step)


def test_a_balanced_rank_goes_on_at_any_step(shards: str, opened: Open, model: Path) -> None:
    found = opened(shards, full=True, batch=16)
    for rank in range(3):
        whole = list(balanced(found, model, rank=rank, ranks=3, steps=range(12)))
        for start in (1, 3, 5, 8):  # an epoch has five steps
            rest = list(balanced(found, model, rank=rank, ranks=3, steps=range(start, 12)))
            assert content(rest) == content(whole[start:]), start
            assert [step.lanes for step in rest] == [step.lanes for step in whole[start:]]


def test_single_reads_bring_the_samples_of_long_ones(shards: str, opened: Open) -> None:
    found = opened(shards, shuffle_window=50)
    assert (
        sum(found[0].place(row).end - found[0].place(row).start for row in range(len(found[0].index)))
        > 1 << 20
    )
    assert content(list(loader(found, read_ahead_mb=1))) == content(list(loader(found)))


def test_members_in_another_order_bring_the_same_samples(shards: str, opened: Open, tmp_path: Path) -> None:
    def audio_first(members: Members) -> Members:
        return sorted(members, key=lambda member: member[0].endswith(".json"))

    def text_first_from_the_end(members: Members) -> Members:
        return [
            member
            for pair in zip(members[1::2], members[::2], strict=True)
            for member in sorted(pair, key=lambda m: not m[0].endswith(".json"))
        ]

    whole = content(list(loader(opened(shards))))
    assert content(list(loader(opened(repack(shards, tmp_path / "one", audio_first))))) == whole
    assert (
        content(
            list(loader(opened(repack(shards, tmp_path / "two", text_first_from_the_end)), read_ahead_mb=1))
        )
        == whole
    )


def test_a_sample_that_cannot_be_decoded_keeps_its_place(shards: str, opened: Open, tmp_path: Path) -> None:
    sound = list(loader(opened(shards)))
    bad = sound[0].samples[3].key
    name = bad.rpartition("/")[2]

    def spoil(members: Members) -> Members:
        return [
            (file, bytes(len(data)) if file.startswith(f"{name}.") and not file.endswith(".json") else data)
            for file, data in members
        ]

    steps = list(loader(opened(repack(shards, tmp_path / "spoilt", spoil))))
    assert content(steps) == [[sample for sample in batch if sample[1] != bad] for batch in content(sound)]
    assert [[(one.key, one.bad) for one in step.rejected] for step in steps] == [
        [(s.key, True) for s in step.samples if s.key == bad] for step in sound
    ]


def test_overlong_clips_are_skipped_or_cropped_or_taken_from_their_start(shards: str, opened: Open) -> None:
    whole = {sample.key: sample.waveform for step in loader(opened(shards)) for sample in step.samples}
    short = {key for key, waveform in whole.items() if len(waveform) <= 16_000}
    assert 0 < len(short) < len(whole)
    for step in loader(opened(shards, max_seconds=1.0, overlong="skip")):
        assert {sample.key for sample in step.samples} <= short
        assert not {one.key for one in step.rejected} & short and not any(one.bad for one in step.rejected)
        assert all(np.array_equal(sample.waveform, whole[sample.key]) for sample in step.samples)
    starts: dict[str, set[int]] = {}
    for step in loader(opened(shards, max_seconds=1.0, overlong="crop")):
        for sample in step.samples:
            assert len(sample.waveform) == min(16_000, len(whole[sample.key]))
            starts.setdefault(sample.key, set()).add(find(sample.waveform, whole[sample.key]))
            begins = round(sample.begins * 16_000)
            there = whole[sample.key][begins:][: len(sample.waveform)].astype(float)
            assert np.abs(there - sample.waveform)[400:-400].max() <= 2
    assert any(len(found) > 1 for found in starts.values()), "another epoch takes another stretch"
    for step in loader(opened(shards, max_seconds=1.0, overlong="start")):
        for sample in step.samples:
            assert len(sample.waveform) == min(16_000, len(whole[sample.key]))
            start = whole[sample.key][: len(sample.waveform)]
            assert np.abs(start[:15_000] - sample.waveform[:15_000].astype(float)).max() <= 1
        assert not step.rejected


def find(stretch: np.ndarray, whole: np.ndarray) -> int:
    """Where a stretch lies in a waveform; at its ends it may differ, as the resampler's filter does not see
    what is beyond."""
    inner, whole = stretch[400:-400].astype(float), whole.astype(float)
    size = len(whole) + len(inner)  # np.correlate, which knows no FFT, takes most of the test's time
    products = np.fft.rfft(whole, size) * np.fft.rfft(inner, size).conj()
    at = int(np.fft.irfft(products, size)[: len(whole) - len(inner) + 1].argmax())
    assert np.corrcoef(whole[at : at + len(inner)], inner)[0, 1] > 0.999
    return at


def test_a_full_index_leaves_out_overlong_clips_beforehand(shards: str, opened: Open) -> None:
    samples, _ = found = opened(shards, full=True, max_seconds=1.0, overlong="skip")
    assert all(len(sample.waveform) <= 16_000 for step in loader(found) for sample in step.samples)
    assert not any(step.rejected for step in loader(found))
    assert len(samples.index) < len(opened(shards, full=True, max_seconds=1.0, overlong="start")[0].index)


def test_crops_are_the_same_under_every_version_of_numpy(shards: str, opened: Open) -> None:
    """In numbers (seconds where a crop begins, and its length); who changes them, changes ORDER_VERSION."""
    samples, _ = opened(shards, max_seconds=0.6, overlong="crop")
    crops = [samples._fit(10.0, row, step) for row, step in ((3, 5), (4, 5), (3, 6))]
    assert crops == [(6.99, 0.6), (1.62, 0.6), (7.38, 0.6)]


@pytest.mark.parametrize(("ranks", "start"), [(1, 11), (3, 0)])
def test_crops_do_not_depend_on_ranks_or_start(shards: str, opened: Open, ranks: int, start: int) -> None:
    found = opened(shards, max_seconds=0.6, overlong="crop")
    assert of_ranks(found, ranks, range(start, STEPS.stop)) == content(list(loader(found)))[start:]


def test_waiting_may_be_cut_into_slices(shards: str, opened: Open) -> None:
    """What comes is what comes without."""
    found, held = opened(shards), threading.Event()

    def read(location: Location, start: int, end: int) -> bytes:
        held.wait()
        return storage.read(location, start, end)

    sliced, steps = loader(found, read=read), []
    assert not sliced.ready(0) and not sliced.ready(0.01)
    held.set()
    while sliced.ready(60) and (step := next(sliced, None)):
        steps.append(step)
    assert content(steps) == content(list(loader(found)))
    assert steps[0].waited >= 0.01


def test_an_error_is_there_though_other_reads_of_the_step_do_not_come(shards: str, opened: Open) -> None:
    found, never = opened(shards), threading.Event()
    reads = itertools.count()

    def read(location: Location, start: int, end: int) -> bytes:
        if next(reads) == 0:
            never.wait(60)
        raise ShardError(f"{location.url}: gone")

    failing = loader(found, read=read)
    assert failing.ready(50)
    with pytest.raises(ShardError, match="gone"):
        next(failing)
    assert not never.is_set()
    failing.close()
    never.set()


def error_of(found: Opened) -> EarwitnessError:
    """The error that reading everything ends with, before a minute is over."""
    outcome: Queue[object] = Queue()

    def read() -> None:
        try:
            outcome.put(list(loader(found)))
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=read, daemon=True).start()
    error = outcome.get(timeout=60)
    assert isinstance(error, EarwitnessError), error
    return error


def test_changed_audio_is_an_error_that_names_the_sample(copied: str, opened: Open) -> None:
    samples, _ = found = opened(copied, full=True)
    place = samples.place(5)
    shard = Path(place.location.url)
    before = shard.stat()
    with shard.open("r+b") as file:
        file.seek((place.audio[0] + place.audio[1]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    error = error_of(found)
    assert (
        isinstance(error, DataError)
        and str(shard) in str(error)
        and repr(samples.index.text("key", 5)) in str(error)
    )


@pytest.mark.parametrize(
    "spoil", [Path.unlink, functools.partial(os.truncate, length=50_000)], ids=["missing", "cut off"]
)
def test_a_shard_that_went_away_is_an_error_that_names_it(
    copied: str, opened: Open, spoil: Callable[[Path], None]
) -> None:
    found = opened(copied)
    shard = Path(found[0].place(len(found[0].index) // 2).location.url)
    spoil(shard)
    assert str(shard) in str(error_of(found))


@pytest.mark.parametrize(("weight", "batch"), [(1.0, 1), (2.0, 2)], ids=["once", "twice, in two lanes"])
def test_undecoded_bytes_stay_within_the_read_ahead(
    opened: Open, tmp_path: Path, weight: float, batch: int
) -> None:
    noise = np.random.default_rng(0).integers(-9999, 9999, 160_000).astype(np.int16)
    audio = BytesIO()
    soundfile.write(audio, noise, 16_000, format="WAV")  # 10 s, 320 kB
    members = [
        (f"{n}.{ending}", data)
        for n in range(50)
        for ending, data in [("wav", audio.getvalue()), ("json", b'{"caption": "Noise."}')]
    ]
    write_tar(tmp_path / "one" / "long.tar", members)
    found = opened(f"{tmp_path}/one/*.tar", weight=weight, batch=batch, overlong="crop", shuffle_window=256)
    tracemalloc.start()
    held = [
        tracemalloc.get_traced_memory()[0] for _ in loader(found, steps=range(40), threads=1, read_ahead_mb=1)
    ]
    tracemalloc.stop()
    assert max(held) < 5 << 20, "1 MB, the two steps that are being decoded, and what those take"


@pytest.fixture
def behind_a_proxy(
    shards: str, s3_server: s3.Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Proxy]]:
    """The shards on S3, and the proxy before it."""
    client = s3_server.client()
    with contextlib.suppress(
        client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists
    ):
        client.create_bucket(Bucket="flips")
    for shard in Path(shards).parent.glob("*.tar"):
        client.upload_file(str(shard), "flips", shard.name)
    monkeypatch.setattr(location, "_open", {})
    STATS.clear()
    with faults.serve(s3_server.endpoint) as proxy:
        for name, value in {**s3_server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        yield "s3://flips/*.tar", proxy


def test_a_bit_that_flips_on_its_way_is_seen_and_the_sample_is_read_again(
    shards: str, opened: Open, behind_a_proxy: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in each shard, so that no flip can hit what is read again, and twice over; in the sixth byte of an
    answer, which belongs to the first sample of a read. No second request replaces a flipped one, and
    no sample comes twice, whose bytes would be read again twice."""
    url, proxy = behind_a_proxy
    monkeypatch.setattr(retry, "LIMITS", replace(retry.LIMITS, answer=600, stall=600, hedge=600))
    expected = content(list(loader(opened(shards, full=True, weight=1))))
    found = opened(url, full=True, weight=1)
    for flips in (2, 4):
        proxy.set(*(Fault("flip", after=5, key=shard.name) for shard in Path(shards).parent.glob("*.tar")))
        assert content(list(loader(found))) == expected
        assert set(proxy.hits.values()) == {1} and STATS["reread"] == flips


@pytest.mark.parametrize(
    ("index_dir", "prefix"), [("beside", "index/"), ("s3://flips/kept/elsewhere", "kept/elsewhere/")]
)
def test_indexes_may_lie_in_a_bucket_too(
    shards: str,
    opened: Open,
    behind_a_proxy: tuple[str, Proxy],
    s3_server: s3.Server,
    monkeypatch: pytest.MonkeyPatch,
    index_dir: str,
    prefix: str,
) -> None:
    url, proxy = behind_a_proxy
    expected = content(list(loader(opened(shards, full=True))))
    assert content(list(loader(opened(url, full=True, index_dir=index_dir)))) == expected
    kept = s3_server.client().list_objects_v2(Bucket="flips", Prefix=prefix)["Contents"]
    assert len(kept) == len(list(Path(shards).parent.glob("*.tar"))) and all(
        one["Key"].endswith(".parquet") for one in kept
    )
    proxy.set()
    opened(url, index_dir=index_dir)  # a later start
    assert not [
        path for method, path, _ in proxy.requests if method in ("GET", "PUT") and "list-type" not in path
    ], "looks at what is there, no more"


def test_with_a_cache_the_same_comes_and_a_second_time_nothing_is_asked_for(
    opened: Open, behind_a_proxy: tuple[str, Proxy], tmp_path: Path
) -> None:
    url, proxy = behind_a_proxy
    found = opened(url, full=True)
    expected = content(list(loader(found)))
    for asks in (True, False):
        proxy.set()
        with contextlib.closing(loader(found, read=Cache(tmp_path / "cache", 1).read)) as cached:
            assert content(list(cached)) == expected
        assert any(method == "GET" for method, _, _ in proxy.requests) == asks


def test_bits_that_flip_always_end_it_with_the_shard_and_the_sample(
    opened: Open, behind_a_proxy: tuple[str, Proxy]
) -> None:
    url, proxy = behind_a_proxy
    found = opened(url, full=True)
    proxy.set(Fault("flip", after=1000, times=0))
    with pytest.raises(
        DataError,
        match=(
            r"s3://flips/shard-00000\d.tar: sample 'clip\d+' is not what was indexed \(CRC32 differs, read"
            r" twice\)"
        ),
    ):
        list(loader(found))


def test_after_a_start_in_the_middle_of_a_window_nothing_is_read_of_what_was_used(
    opened: Open, tmp_path: Path
) -> None:
    """Neighbours in a shard come in one read, and a run that starts there needs some of them only."""
    noise = np.random.default_rng(0).integers(-9999, 9999, 50_000).astype(np.int16)
    audio = BytesIO()
    soundfile.write(audio, noise, 44_100, format="WAV")  # 100 kB: too much to read along as a gap
    members = [
        (f"{number:02d}.{ending}", data)
        for number in range(64)
        for ending, data in [("wav", audio.getvalue()), ("json", b'{"caption": "Noise."}')]
    ]
    write_tar(tmp_path / "one" / "noise.tar", members)
    samples, order = found = opened(f"{tmp_path}/one/*.tar", weight=1.0, batch=1, shuffle_window=16)
    rows = order.lanes(0, range(1))[0]
    for start in (5, 13):
        asked: list[tuple[int, int]] = []

        def read(place: location.Location, first: int, end: int, asked: Any = asked) -> bytes:
            asked.append((first, end))
            return storage.read(place, first, end)

        list(loader(found, steps=range(start, 16), read=read))
        for step, row in enumerate(rows[:16]):
            first, end = samples.place(int(row)).audio
            assert any(low <= first and end <= high for low, high in asked) == (step >= start), step


def test_what_moves_to_another_rank_is_read_there_alone(opened: Open, model: Path, tmp_path: Path) -> None:
    """And not where it was; all that stays is read in runs."""
    noise = np.random.default_rng(0).integers(-9999, 9999, 88_200).astype(np.int16)
    members = []
    for number in range(128):
        audio = BytesIO()
        # At least 67 kB: too much to read along as a gap.
        soundfile.write(audio, noise[: 33_500 + 400 * number], 44_100, format="WAV")
        members += [(f"{number:03d}.wav", audio.getvalue()), (f"{number:03d}.json", b'{"caption": "Noise."}')]
    write_tar(tmp_path / "one" / "noise.tar", members)
    samples, order = found = opened(
        f"{tmp_path}/one/*.tar", full=True, weight=1.0, batch=8, shuffle_window=64
    )
    steps = range(order.steps_in(0))
    rows, reads_of_a_run, moved_in = order.lanes(0, range(8)), 0, 0
    for rank in range(2):
        asked: list[tuple[int, int]] = []

        def read(place: location.Location, first: int, end: int, asked: Any = asked) -> bytes:
            asked.append((first, end))
            return storage.read(place, first, end)

        taken = {
            int(rows[lane, step.number])
            for step in balanced(found, model, rank=rank, ranks=2, steps=steps, read=read)
            for lane in step.lanes
        }
        own = rows[rank_lanes(rank, 2, 8)]
        own = set(own[own != EMPTY].tolist())
        for row in set(range(len(samples.index))) - taken:
            place = samples.place(row)
            assert not any(first < place.end and place.start < end for first, end in asked), "left elsewhere"
        for row in taken - own:
            assert (samples.place(row).start, samples.place(row).end) in asked
        moved_in += len(taken - own)
        reads_of_a_run += len(taken & own) - (len(asked) - len(taken - own))
    assert moved_in > 0 and reads_of_a_run > 0
