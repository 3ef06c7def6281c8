"""Puts a page together: page.html, filled in, with page.css and page.js inside. It asks no network for
anything, and its Content-Security-Policy lets no other script run."""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from configs.metrics import HIGHER_IS_BETTER
from tools.report.listing import Clip
from tools.report.overview import ALL, Overview

FOLDER = Path(__file__).parent
GENERATOR = "Earwitness, tools.report"
BEGINNING = 1024
"""Bytes in which a page says who made it."""
ARROWS = {True: " ↑", False: " ↓", None: ""}
"""Behind the names of metrics: which way is better."""


@dataclass(frozen=True)
class Page:
    """What a page shows. step: of its evaluation, None for predictions of no run; total: clips of that
    evaluation; metric: by which the clips are in order; scores: all that they have; notices: what is not on
    the page, and what to do."""

    top: Overview
    clips: Sequence[Clip]
    step: int | None
    total: int
    metric: str
    scores: Sequence[str]
    notices: Sequence[str]

    def html(self) -> str:
        """The whole page."""
        environment = Environment(
            loader=FileSystemLoader(FOLDER, encoding="utf-8"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        script, style = (
            f"\n{(FOLDER / name).read_text(encoding='utf-8').strip()}\n" for name in ("page.js", "page.css")
        )
        counts = Counter(clip.prediction.source for clip in self.clips)
        told = {source for values in self.top.metrics.values() for source in values} - {ALL}
        names = list(dict.fromkeys([*self.top.sources, *sorted(told | set(counts))]))
        return environment.get_template("page.html").render(
            vars(self),
            generator=GENERATOR,
            facts=self._facts(),
            script=Markup(script),
            script_hash=_hash(script),
            style=Markup(style),
            source_names=names,
            sources={name: counts[name] for name in names if counts[name]},
            columns=[name for name in names if name in told],
            names=lambda name: name.replace("_", " "),
            number=_number,
            arrow=lambda name: ARROWS[HIGHER_IS_BETTER.get(name)],
        )

    def _facts(self) -> list[str]:
        """What stands under the name."""
        facts = [f"from {self.top.model}"] if self.top.model else []
        facts += [self.top.progress] if self.top.progress else []
        if self.total:
            at = "" if self.step is None else f" at step {self.step:,}"
            facts.append(("1 clip" if self.total == 1 else f"{self.total:,} clips") + at)
        return [*facts, time.strftime("page of %Y-%m-%d %H:%M UTC", time.gmtime())]


def is_page(path: Path) -> bool:
    """Whether a file is a page of this tool. Raises OSError."""
    with path.open("rb") as file:
        return f'content="{GENERATOR}"'.encode() in file.read(BEGINNING)


def _number(value: float) -> str:
    """As 0.491, 12.35 or 0: what is almost nothing is nothing."""
    return f"{round(value, 3):.4g}"


def _hash(script: str) -> str:
    """As a Content-Security-Policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
