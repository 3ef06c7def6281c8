"""The code that a run's jobs run: copied when it is submitted, and looked at by each process of a job."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from configs.errors import ConfigError
from configs.run.folder import PACKAGES, RunDir

ROOT = Path(__file__).parents[1]
"""Where the code lies that runs now."""


def take(run: RunDir) -> Path:
    """Copy the code into the run's folder, so that its jobs go on with it whatever happens to the
    checkout."""
    new, old = run.path / "code.new", run.path / "code.old"
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, new / package, ignore=shutil.ignore_patterns("__pycache__"))
    if run.code.exists():
        run.code.rename(old)
    new.rename(run.code)
    shutil.rmtree(old, ignore_errors=True)
    return run.code


def check(code: Path) -> None:
    """Raise ConfigError if this process has, or would import, a package from elsewhere than `code`: others
    install packages of such names, too."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or [str(spec.origin)]) if spec else []
        if not places or Path(places[0]).resolve() != (code / package).resolve():
            found = places[0] if places else "none"
            raise ConfigError(
                f"{package}: this process gets {found}, not the run's own code ({code / package}), which"
                " stands first in PYTHONPATH. A container or a wrapper drops PYTHONPATH (slurm.python,"
                " slurm.srun_args), or a sitecustomize.py or .pth file changes where Python looks: `python -c"
                " 'import sys; print(sys.path)'` shows it"
            )
