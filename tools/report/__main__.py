"""`python -m tools.report RUN|PREDICTIONS OUT.html`: what a model says of clips, as one page to listen to
that needs nothing else."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.errors import ConfigError, run_command
from configs.run.files import replacing
from configs.run.folder import RunDir
from configs.run.predictions import Prediction, read_predictions, steps_of
from tools.arguments import StorageOptions, mapping
from tools.report.listing import add_history, listed, names_of_scores, worst_first
from tools.report.overview import Overview, of_file, of_run
from tools.report.page import Page, is_page
from tools.report.sound import Media, Recordings

NO_PREDICTIONS = (
    "No evaluation of this run has left what the model said, as one of an earlier version leaves none:"
    " `python -m tools.evaluate RUN CONFIG --predictions FILE` captions the clips now, and `python -m"
    " tools.report FILE OUT.html` shows them."
)
EMPTY = "There are no clips: the evaluation had none to caption."
NO_ROOM = "left out, as the page is full (--megabytes)"


def report(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run (its last evaluation), or a file of tools.evaluate --predictions.",
            metavar="RUN|PREDICTIONS",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The page to write.", metavar="OUT.html")],
    clips: Annotated[
        int, typer.Option(min=0, help="Most clips on the page: the worst of each source.")
    ] = 300,
    megabytes: Annotated[
        float, typer.Option(min=0, help="Most megabytes of sounds and pictures, again of the worst first.")
    ] = 24,
    storage_options: StorageOptions = None,
) -> None:
    """Write one page with an evaluation's clips to listen to, their captions and scores, worst first, and the
    curves and attempts of a run. It works from disk and may be sent around."""
    _check_out(out)
    shown = _of_run(source, storage_options) if source.is_dir() else _of_file(source, storage_options)
    metric = shown.metric
    chosen = worst_first(shown.predictions, metric)[:clips]
    media = list(shown.recordings.media(chosen, round(megabytes * 1e6)))
    media += [Media(silent=NO_ROOM)] * (len(chosen) - len(media))
    on_page = listed(chosen, media, metric)
    add_history(on_page, shown.earlier, shown.step or 0)
    notices = [*shown.notices, *_left_out(len(shown.predictions), media)]
    scores = names_of_scores(chosen)
    page = Page(shown.top, on_page, shown.step, len(shown.predictions), metric, scores, notices)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        file.write(page.html().encode())
    for line in [*shown.recordings.failures, *notices]:
        print(line, file=sys.stderr)
    playing = sum(bool(each.audio) for each in media)
    size = out.stat().st_size / 1e6
    print(f"{out}: {len(on_page):,} clips, {playing:,} with sound, {size:.1f} MB; open it in a browser")


@dataclass(frozen=True)
class _Shown:
    """What is to be shown. step: of the evaluation, None for predictions of no run; earlier: files of the
    evaluations of the run, by step."""

    top: Overview
    predictions: list[Prediction]
    recordings: Recordings
    step: int | None
    earlier: dict[int, Path]
    notices: list[str]

    @property
    def metric(self) -> str:
        """By which clips are in order: the run's `evaluate.best_metric`, if it is one of single clips."""
        known = names_of_scores(self.predictions)
        return self.top.best_metric if self.top.best_metric in known else "loss"


def _of_run(folder: Path, storage_options: str | None) -> _Shown:
    run = RunDir(folder)
    if storage_options is not None:
        raise ConfigError("--storage-options: is for PREDICTIONS; the config of a run says it itself")
    config = run.read_config()
    files = steps_of(run.evaluations)
    step = max(files, default=None)
    predictions = [] if step is None else read_predictions(files[step])
    options = {source.name: source.storage_options for source in config.data.sources}
    notices = [] if predictions else [NO_PREDICTIONS if step is None else EMPTY]
    return _Shown(of_run(run, config), predictions, Recordings(options), step, files, notices)


def _of_file(path: Path, storage_options: str | None) -> _Shown:
    if not path.exists():
        raise ConfigError(
            f"{path}: does not exist; name the folder of a run, or a file that `python -m tools.evaluate ..."
            " --predictions FILE` has written"
        )
    predictions = read_predictions(path)
    options: dict[str, Any] = {} if storage_options is None else mapping(storage_options)
    recordings = Recordings({prediction.source: options for prediction in predictions})
    notices = [] if predictions else [EMPTY]
    return _Shown(of_file(path, predictions), predictions, recordings, None, {}, notices)


def _check_out(out: Path) -> None:
    """Raise ConfigError if OUT is no place for a page."""
    if out.suffix.lower() not in (".html", ".htm") or re.match(r"\w+:/", str(out)):
        raise ConfigError(f"{out}: a page is written to a file of this machine whose name ends in .html")
    if out.is_dir() or (out.exists() and not is_page(out)):
        raise ConfigError(f"{out}: exists and is no page of tools.report; remove it or choose another name")


def _left_out(total: int, media: list[Media]) -> list[str]:
    """What is not on the page, in words."""
    lines = []
    if len(media) < total:
        lines.append(f"{len(media):,} of {total:,} clips are here, the worst of each source (--clips).")
    without = sum(not each.audio for each in media)
    full = sum(each.silent == NO_ROOM for each in media)
    if full:
        lines.append(f"Without sound and picture, as the page is full (--megabytes): {full:,} of the clips.")
    if without > full:
        lines.append(f"Without sound, and beside each stands why: {without - full:,} of the clips.")
    return lines


if __name__ == "__main__":
    run_command(lambda: typer.run(report))
