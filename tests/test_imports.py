"""The house stands as it is drawn: imports go one way, and the command line answers without waiting for
torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.load import validate
from configs.ports import free_ports
from configs.run.folder import RunDir
from launch import local
from tests.making import ROOT, config_values, run_program
from trainer.model import load, save_base

MAY_IMPORT = {
    "configs": set(),
    "data": {"configs"},
    "trainer": {"configs", "data"},
    "slurm": {"configs"},
    "launch": {"configs", "data", "trainer", "slurm"},
    "tools": {"configs", "data", "trainer", "slurm"},
}
QUICK = ("configs", "slurm", "launch")
HOUSE = {*MAY_IMPORT, "tests"}
FILES = sorted(path.relative_to(ROOT) for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imports(path: Path, *, at_start_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import of a file, those inside functions too unless only what runs
    at its start is wanted."""
    waiting: list[ast.AST] = [ast.parse((ROOT / path).read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, path.parts[0] if node.level else (node.module or "").split(".")[0]
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if not (later and at_start_only):
            waiting.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    files = [path for path in FILES if path.parts[0] == package]
    assert files
    assert not [
        f"{path}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        if name in HOUSE - allowed
    ]


def test_no_torch_at_the_start_of_what_answers_at_once() -> None:
    heavy = {"torch", "deepspeed", "transformers"}
    files = [path for path in FILES if path.parts[0] in QUICK]
    assert not [
        f"{path}:{line} imports {name}"
        for path in files
        for line, name in imports(path, at_start_only=True)
        if name in heavy
    ]


def test_no_torch_is_loaded_by_way_of_others() -> None:
    modules = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path.parts[0] in QUICK
    ]
    assert "launch.__main__" in modules
    program = (
        f"import importlib, sys\nfor name in {modules}:\n    importlib.import_module(name)\n    assert"
        " 'torch' not in sys.modules, name"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_launcher_that_starts_local_ranks_loads_neither_torch_nor_what_speaks_to_buckets() -> None:
    program = "import sys, launch.__main__, configs.load, data.dataset, launch.local"
    assert not loaded(program, {"torch", "transformers", "aiohttp", "botocore", "huggingface_hub"})


GOES_ON = """
import os, sys, launch.worker, torch
from pathlib import Path
from trainer import distributed, model
from trainer.loop import train
from trainer.preflight import look_over
from trainer.start import Start, StopRequested
from configs.load import validate
from configs.run.folder import RunDir
config = validate({values!r}, "test")
world = distributed.start(["here"], torch.device("cpu"))
captioner = model.load_base(RunDir(config.run.dir), config.model)
start = Start(config, None, None, world, None, None)
encoder = start._encoder(captioner)
assert encoder.encode("A low beep, twice.").labels
engine = start._engine(captioner)
"""
"""What rank 0 of a run that goes on does, up to the state of its checkpoint. Values: of its config."""
NOT_NEEDED = {
    "fsdp2": {
        "transformers",
        "aiohttp",
        "botocore",
        "tensorboard",
        "deepspeed",
        "torch._inductor.compile_fx",
    },
    "zero2": {"transformers.models.whisper.modeling_whisper", "aiohttp", "torch._inductor.compile_fx"},
}


@pytest.mark.parametrize("backend", NOT_NEEDED)
def test_a_rank_that_goes_on_loads_no_more_than_it_needs(backend: str, model: Path, tmp_path: Path) -> None:
    engine = {"backend": backend, "dtype": "fp32"}
    values = config_values("run", tmp_path, model, "none", engine=engine)
    config = validate(values, "test")
    save_base(RunDir(config.run.dir), load(config.model, seed=0))
    meeting = local.rank_environment(0, 1, free_ports(1)[0]) | {"CUDA_VISIBLE_DEVICES": ""}
    assert not loaded(GOES_ON.format(values=values), NOT_NEEDED[backend], meeting)


def loaded(program: str, modules: set[str], env: dict[str, str] | None = None) -> list[str]:
    """Those of some modules that a process has loaded when it has run a program."""
    program += f"\nprint(*({modules!r} & set(sys.modules)))\nsys.stdout.flush()\nimport os; os._exit(0)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | (env or {}),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_help_answers_in_under_a_second() -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = run_program("launch", "--help")
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0 and "train" in done.stdout, done.stderr
    assert min(seconds) < 1, seconds
