"""`tools.report` makes one page to listen to, which is looked at in a real browser here."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Page, sync_playwright

from configs.errors import ConfigError
from configs.load import dump, validate
from configs.run.causes import Cause
from configs.run.events import AttemptBegan, Ended, Evaluated, Event, TrainingBegan
from configs.run.folder import RunDir
from configs.run.predictions import NAME, Prediction, Sound, read_predictions, write_predictions
from data.tar import walk
from tests.making import caption_of, config_values, sound_of
from tools.report.__main__ import report
from tools.report.sound import Recordings
from tools.report.texts import pieces

HOSTILE = '<script>window.pwned = 1</script> "quoted" \u2028 & <b>bold</b> 🐕'
ARABIC = "كلب ينبح"
LOOP = "tek " * 79 + "tek"
SECRET = "hidden-place"
"""Stands in all names of folders and machines: none of them is for the page."""


def write_shard(path: Path, files: dict[str, bytes]) -> list[Sound]:
    """A shard, and where its files lie."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    content = path.read_bytes()
    members = walk(lambda start, end: content[start:end], len(content))
    return [
        Sound(str(path), member.offset, member.offset + member.size, member.name.rpartition(".")[2])
        for member in members
    ]


def clip(number: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound_of(number), 16_000, format="FLAC")
    return file.getvalue()


def make_predictions(folder: Path) -> list[Prediction]:
    """Ten clips of two sources; three of them cannot be heard. The loss of clip N is N."""
    sounds = write_shard(folder / "sounds-0.tar", {f"clip{number}.flac": clip(number) for number in range(6)})
    speech = write_shard(
        folder / "speech-0.tar",
        {"clip6.flac": clip(6), "clip7.flac": b"no audio" * 99, "clip8.flac": clip(8)},
    )
    speech[2] = replace(speech[0], ending="flac")  # as if clip8 had been there once
    speech.append(Sound(str(folder / "gone-0.tar"), 512, 1024, "flac"))
    captions = {1: HOSTILE, 2: ARABIC, 3: LOOP, 4: "", 5: caption_of(5)}
    return [
        Prediction(
            key=f"{'sounds' if number < 6 else 'speech'}/{Path(sound.url).name}/clip{number}",
            source="sounds" if number < 6 else "speech",
            seconds=0.5 + 0.1 * number,
            references=[caption_of(number), f"Another word for {number}."],
            caption=captions.get(number, "A low beep."),
            loss=float(number),
            sound=sound,
            scores={"cider_d": (number * 7 % 10) / 10} | ({"length_ratio": number / 4} if number < 6 else {}),
        )
        for number, sound in enumerate([*sounds, *speech])
    ]


def test_of_a_long_recording_the_stretch_is_heard_that_the_model_has_heard(tmp_path: Path) -> None:
    file = io.BytesIO()
    silence_then_tone = np.concatenate([np.zeros(16_000), np.sin(np.arange(16_000) / 4)])
    soundfile.write(file, silence_then_tone, 16_000, format="FLAC")
    (sound,) = write_shard(tmp_path / "long-0.tar", {"clip.flac": file.getvalue()})
    loudness = []
    for begins in (0.0, 1.2):
        heard = replace(sound, begins=begins)
        prediction = Prediction("long/long-0.tar/clip", "long", 0.5, ["A tone."], "A tone.", 1.0, heard)
        (media,) = Recordings({}).media([prediction], 10**6)
        audio, rate = soundfile.read(io.BytesIO(base64.b64decode(media.audio.partition(",")[2])))
        assert len(audio) / rate == pytest.approx(0.5, abs=0.2)
        loudness.append(float(np.abs(audio).max()))
    assert loudness[0] < 0.01 and loudness[1] > 0.5


EVENTS: list[Event] = [
    AttemptBegan(time=1e9, attempt=0, ranks=4, nodes=[f"{SECRET}-1", f"{SECRET}-2"]),
    TrainingBegan(time=1e9, attempt=0, step=0, total_steps=30, global_size=8, ranks=4, device="cpu"),
    Evaluated(
        time=1e9,
        attempt=0,
        step=0,
        metrics={"validation/loss": 5.5, "validation/loss/sounds": 6.25, "validation/cider_d": 0.01},
        captions=[],
    ),
    Ended(time=1e9, attempt=0, cause=Cause.CRASH, words=f"crash: /{SECRET}/core", at=1e9 + 60),
    AttemptBegan(time=1e9 + 90, attempt=1, ranks=2, nodes=[f"{SECRET}-1"]),
    Evaluated(
        time=1e9 + 99,
        attempt=1,
        step=30,
        metrics={"validation/loss": 0.5, "validation/loss/sounds": 0.625, "validation/cider_d": 1.5},
        captions=[],
    ),
    Ended(time=1e9 + 120, attempt=1, cause=Cause.FINISHED, words="finished", at=1e9 + 120),
]


def make_run(folder: Path, *, evaluated: bool = True) -> RunDir:
    """A run that was evaluated three times."""
    shards = folder / SECRET
    predictions = make_predictions(shards)
    sources = [{"name": name, "shards": [f"{shards}/{name}-*.tar"]} for name in ("sounds", "speech")]
    values = config_values("listener", folder, Path(f"/{SECRET}/tiny"), "", data={"sources": sources})
    config = validate(values, "test")
    run = RunDir.create(config)
    run.config.write_text(dump(config), encoding="utf-8")
    for event in EVENTS:
        run.ledger.record(event)
    if evaluated:
        before = [replace(prediction, caption="A high beep.", loss=9.0) for prediction in predictions]
        for step, said in ((10, before), (20, before), (30, predictions)):
            write_predictions(run.evaluations / NAME.format(step), said)
    return run


@dataclass
class Room:
    """A page in a browser. heard: what it asked for, and what it complained of."""

    page: Page
    file: Path
    said: str
    """By the tool."""
    heard: list[str] = field(default_factory=list)

    def shown(self) -> list[int]:
        """Numbers of the clips that are to be seen, from above."""
        keys = self.page.locator(".clip:visible").evaluate_all("clips => clips.map(each => each.id)")
        return [int(key[-1]) for key in keys]

    def until(self, condition: str) -> None:
        """Wait until JavaScript says so (the page's policy forbids Playwright's own way of asking)."""
        deadline = time.monotonic() + 20
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(10)

    def clip(self, number: int) -> Any:
        return self.page.locator(f'.clip[id$="clip{number}"]')


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None and os.environ.get("CI"):
        pytest.fail("CI must have Chromium")
    if program is None:
        pytest.skip("there is no Chromium to look at pages with")
    folder = tmp_path_factory.mktemp("room")
    run, out = make_run(folder), folder / "pages/room.html"
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr("sys.stderr", said)
        report(run.path, out)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        shown = Room(page, out, said.getvalue())
        page.on("console", lambda message: shown.heard.append(message.text))
        page.on("pageerror", lambda error: shown.heard.append(str(error)))
        page.on("request", lambda request: shown.heard.append(request.url))
        page.goto(out.as_uri())
        yield shown
        browser.close()


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    """The page as it is at first."""
    if "room" in request.fixturenames:
        shown = request.getfixturevalue("room")
        shown.heard.clear()
        shown.page.goto("about:blank")
        shown.page.goto(shown.file.as_uri())


def test_the_page_asks_nothing_of_anybody_and_has_no_complaint(room: Room) -> None:
    room.page.locator(".mel img").evaluate_all("images => Promise.all(images.map(each => each.decode()))")
    asked = [text for text in room.heard if not text.startswith("data:")]
    assert asked == [room.file.as_uri()]


def test_a_clip_plays_to_the_end_of_what_was_recorded_and_one_at_a_time(room: Room) -> None:
    first, second = room.clip(5), room.clip(3)
    first.locator(".play").click()
    room.until("document.querySelector('.playing audio').currentTime > 0.1")
    assert abs(first.locator("audio").evaluate("audio => audio.duration") - 1.0) < 0.1
    second.locator(".play").click()
    room.until("document.querySelector('.playing').id.endsWith('clip3')")
    assert room.page.locator(".playing").count() == 1
    room.until("document.querySelector('[id$=clip3] audio').ended")
    assert room.page.locator(".playing").count() == 0


def test_keys_play_the_clip_in_focus_and_go_on_to_the_next(room: Room) -> None:
    room.clip(6).locator(".reference").first.click()
    room.page.keyboard.press("Space")
    room.until("document.querySelector('.playing')?.id.endsWith('clip6')")
    room.page.keyboard.press("ArrowDown")
    room.until("document.querySelector('.playing')?.id.endsWith('clip5')")
    assert room.page.evaluate("document.activeElement.id").endswith("clip5")
    room.page.keyboard.press("Space")
    room.until("!document.querySelector('.playing')")
    room.page.keyboard.press("ArrowUp")
    assert room.page.evaluate("document.activeElement.id").endswith("clip6")


def test_the_worst_comes_first_by_any_score_and_what_has_none_last(room: Room) -> None:
    assert room.shown() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    room.page.select_option("#order", "best")
    assert room.shown() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    room.page.select_option("#score", "cider_d")
    room.page.select_option("#order", "worst")
    assert room.shown() == sorted(range(10), key=lambda number: number * 7 % 10)
    room.page.select_option("#score", "length_ratio")
    assert set(room.shown()[:2]) == {0, 1} and room.shown()[5] == 4  # 1 is right, neither 0 nor more
    assert set(room.shown()[6:]) == {6, 7, 8, 9}


def test_clips_are_found_by_source_and_by_text(room: Room) -> None:
    room.page.locator(".chip", has_text="speech").click()
    assert room.shown() == [9, 8, 7, 6]
    room.page.fill("#search", "WORD 8")
    assert room.shown() == [8]
    assert room.page.locator("#count").inner_text() == "1 of 10"
    room.page.fill("#search", "no such word")
    assert room.page.locator("#none").is_visible()
    room.page.locator(".chip", has_text="all").click()
    room.page.fill("#search", ARABIC)
    assert room.shown() == [2]


def test_what_captions_hold_is_text(room: Room) -> None:
    assert room.clip(1).locator(".caption").text_content() == HOSTILE
    assert room.page.evaluate("window.pwned") is None
    assert room.clip(2).locator(".caption").evaluate("text => getComputedStyle(text).direction") == "rtl"
    assert room.clip(4).locator(".caption").inner_text() == "nothing"


def test_a_loop_is_folded_and_opens(room: Room) -> None:
    caption = room.clip(3).locator(".caption")
    assert caption.inner_text().split() == ["tek", "\N{MULTIPLICATION SIGN}", "80"]
    height = caption.bounding_box()["height"]
    caption.locator("summary").click()
    assert caption.inner_text().count("tek") == 81
    assert caption.bounding_box()["height"] > height


def test_captions_over_time_are_folded_and_what_is_new_is_marked(room: Room) -> None:
    history = room.clip(0).locator(".history")
    assert not history.locator("li").first.is_visible()
    history.locator("summary").first.click()
    then, now = history.locator("li").all()
    assert then.inner_text().split() == ["10–20", "9", "A", "high", "beep."]  # noqa: RUF001
    assert [mark.inner_text().strip() for mark in now.locator("ins").all()] == ["low"]
    assert room.clip(5).locator(".history summary").first.inner_text() == "2 captions since step 10"


def test_a_clip_that_cannot_be_heard_costs_its_player_only(room: Room) -> None:
    assert "the audio is text" in room.clip(7).locator(".silent").inner_text()
    assert "speech-0.tar holds clip6.flac there now" in room.clip(8).locator(".silent").inner_text()
    assert "gone-0.tar could not be read" in room.clip(9).locator(".silent").inner_text()
    assert room.page.locator("audio").count() == 7
    assert "Without sound, and beside each stands why: 3" in room.page.locator(".notice").inner_text()
    assert f"{SECRET}/gone-0.tar: cannot read" in room.said


def test_the_top_tells_the_run_its_metrics_curves_and_attempts(room: Room) -> None:
    top = room.page.locator("header")
    assert top.locator(".facts").inner_text().startswith("from tiny · step 0 of 30 · 10 clips at step 30")
    rows = [row.inner_text().split() for row in top.locator(".metrics tbody tr").all()]
    assert rows == [["loss", "↓", "0.5", "0.625"], ["cider", "d", "↑", "1.5"]]
    assert top.locator("svg").count() == 2
    assert "sounds: 6.25 at first, 0.625 at last" in top.locator("svg").first.get_attribute("aria-label")
    top.locator(".attempts summary").click()
    assert [row.inner_text().split("\t")[4] for row in top.locator(".attempts tbody tr").all()] == [
        "crash",
        "finished",
    ]


def test_the_page_names_no_folder_bucket_or_machine(room: Room) -> None:
    assert SECRET not in room.file.read_text(encoding="utf-8")


def test_a_link_leads_to_its_clip_whatever_is_filtered(room: Room) -> None:
    room.page.locator(".chip", has_text="speech").click()
    link = room.clip(1).locator(".key").get_attribute("href")
    room.page.evaluate("link => { location.hash = link }", link)
    room.until("document.activeElement.id.endsWith('clip1')")
    assert room.clip(1).is_visible()


def test_a_phone_shows_it_without_scrolling_sideways(room: Room) -> None:
    room.page.set_viewport_size({"width": 360, "height": 740})
    assert room.page.evaluate("document.documentElement.scrollWidth") == 360
    room.page.set_viewport_size({"width": 1200, "height": 900})


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictions")
    write_predictions(folder / "said.jsonl", make_predictions(folder / "shards"))
    return folder / "said.jsonl"


def test_predictions_come_back_whatever_captions_hold(predictions: Path) -> None:
    assert [prediction.caption for prediction in read_predictions(predictions)][1] == HOSTILE


def test_what_has_no_room_is_left_out_the_worst_stay_and_it_is_said(
    predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(predictions, tmp_path / "few.html", clips=4, megabytes=0.015)
    html = (tmp_path / "few.html").read_text(encoding="utf-8")
    assert re.findall(r'<article [^>]*clip(\d)"', html) == list("9854")
    said = capsys.readouterr()
    assert "4 of 10 clips are here, the worst of each source (--clips)." in said.err
    assert "as the page is full (--megabytes): 1 of" in said.err and "4 clips, 1 with sound" in said.out
    assert "4 of 10 clips are here" in html


def test_only_a_page_of_this_tool_is_overwritten(predictions: Path, tmp_path: Path) -> None:
    other, page = tmp_path / "other.html", tmp_path / "page.html"
    other.write_text("<!doctype html><title>Notes</title>", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other.html: exists and is no page of tools.report"):
        report(predictions, other)
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        report(predictions, tmp_path / "page.jsonl")
    with pytest.raises(ConfigError, match="a file of this machine"):
        report(predictions, Path("s3://bucket/page.html"))
    report(predictions, page, clips=1)
    report(predictions, page, clips=2)
    assert page.read_text(encoding="utf-8").count("<article") == 2
    with pytest.raises(ConfigError, match="does not exist"):
        report(tmp_path / "none.jsonl", page)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.html", "page.html"]


def test_a_run_without_predictions_has_its_curves_and_is_told_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, evaluated=False)
    report(run.path, tmp_path / "page.html")
    assert "python -m tools.evaluate RUN CONFIG --predictions FILE" in capsys.readouterr().err
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 2 and "tools.evaluate" in html and "<article" not in html


def test_no_predictions_make_a_page_that_says_so(tmp_path: Path) -> None:
    write_predictions(tmp_path / "none.jsonl", [])
    report(tmp_path / "none.jsonl", tmp_path / "page.html")
    assert "There are no clips" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_words_that_are_new_are_marked_and_loops_count_as_one() -> None:
    now = pieces("A dog barks: woof woof woof woof woof woof woof woof woof.", "A dog howls")
    assert [(piece.folded or piece.text.strip(), piece.is_new) for piece in now] == [
        ("A dog", False),
        ("barks:", True),
        ("woof", True),
        ("woof.", True),
    ]
    assert pieces("wow wow wow wow")[0].folded == ""  # short enough to read
    longer, shorter = (f"A tune: {'la ' * count}" for count in (40, 20))
    assert not any(piece.is_new for piece in pieces(longer, shorter))
