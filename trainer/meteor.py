"""METEOR by its authors' program in Java, from a folder that holds it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

from configs.errors import ConfigError, EarwitnessError
from trainer.said import Figures, Metric, Said

JAR = "meteor-1.5.jar"
FILES = (JAR, "data/paraphrase-en.gz")
GET = (
    "`pip download --no-deps pycocoevalcap==1.2 && python -m zipfile -e pycocoevalcap-1.2-py3-none-any.whl"
    " coco` puts it into coco/pycocoevalcap/meteor"
)


def check(folder: Path) -> None:
    """Raise ConfigError if the program cannot be run from a folder."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"evaluate.parts.meteor: {folder} does not hold {' and '.join(missing)}; {GET}")
    java = shutil.which("java")
    if java is None or subprocess.run([java, "-version"], capture_output=True, check=False).returncode:
        raise ConfigError(
            f"evaluate.parts.meteor: METEOR needs Java, and {f'{java} fails' if java else 'there is none'}:"
            " `apt-get install default-jre-headless`, or `module load java` on a cluster; or leave"
            " evaluate.parts.meteor out"
        )


@contextmanager
def opened(folder: Path) -> Iterator[Metric]:
    """The metric, as long as the program runs. It takes seconds to start, and answers line by line."""
    command = ["java", "-Xmx2G", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US", "-jar"]
    command += [str(folder / JAR), "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as complaints:
        try:
            with Popen(command, stdin=PIPE, stdout=PIPE, stderr=complaints, encoding="utf-8") as program:
                try:
                    yield _Meteor(program)
                finally:
                    program.kill()
        except (OSError, ValueError) as error:  # it is gone, or what it says is no number
            complaints.seek(0)
            words = complaints.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise EarwitnessError(f"METEOR failed: {words or error}") from None


class _Meteor:
    """Speaks with the program: it counts what a caption and its references share, clip by clip, and makes
    scores of counts."""

    def __init__(self, program: Popen[str]) -> None:
        self._program = program
        self._counts: dict[tuple[str, ...], str] = {}

    def __call__(self, clips: Sequence[Said]) -> Figures:
        self._tell("EVAL", *(self._counted(*clip.references, clip.caption) for clip in clips))
        each = [float(self._answer()) for _ in clips]
        return Figures(float(self._answer()), each)

    def _counted(self, *captions: str) -> str:
        if captions not in self._counts:
            self._tell("SCORE", *captions)
            self._counts[captions] = self._answer()
        return self._counts[captions]

    def _tell(self, *words: str) -> None:
        assert self._program.stdin
        self._program.stdin.write(" ||| ".join(words) + "\n")
        self._program.stdin.flush()

    def _answer(self) -> str:
        assert self._program.stdout
        answer = self._program.stdout.readline().strip()
        if not answer:
            raise ValueError("it does not answer")
        return answer
