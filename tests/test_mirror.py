"""A run whose folder is lost goes on from the copies of its checkpoints; and a mirror that does not work ends
no training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pytest

from configs.load import validate
from configs.run import events
from configs.run.events import Damaged, Event, MirrorFailed, Restored, TrainingBegan
from configs.run.folder import RunDir
from configs.run.lease import Superseded
from data import location, retry
from tests.forks import Course, Done, Kill, Launcher
from tests.making import config_values
from tools.sandbox import faults
from tools.sandbox.faults import Fault, Proxy
from trainer import checkpoint
from trainer.checkpoint import Reader
from trainer.mirror import Mirror

NOWHERE = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
"""An S3 server that is gone: nobody listens on the port."""
NO_BUCKET = "s3://no-such-bucket/runs"
NEVER = {"every_steps": 1000}
SOON = {"give_up": 1.0}
"""Who does not answer is given up after a second."""


class Copies:
    """Where copies lie: paths below the mirror's URL, read with a client that remembers nothing."""

    def __init__(self, url: str, env: dict[str, str]) -> None:
        self.url, self.env = url, env
        options = (
            {
                "endpoint_url": env["AWS_ENDPOINT_URL"],
                "key": env["AWS_ACCESS_KEY_ID"],
                "secret": env["AWS_SECRET_ACCESS_KEY"],
            }
            if env
            else {}
        )
        self._files, self._root = fsspec.core.url_to_fs(url, **options, use_listings_cache=False)

    def names(self, run: str) -> set[str]:
        """All files of a run."""
        return {path.removeprefix(f"{self._root}/{run}/") for path in self._files.find(f"{self._root}/{run}")}

    def read(self, name: str) -> bytes:
        return self._files.cat_file(f"{self._root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        if not self.env:
            Path(f"{self._root}/{name}").parent.mkdir(parents=True, exist_ok=True)
        self._files.pipe_file(f"{self._root}/{name}", content)

    def remove(self, name: str) -> None:
        self._files.rm_file(f"{self._root}/{name}")


@dataclass
class Mirrored(Course):
    """Runs with a mirror."""

    place: Copies

    def config(self, name: str, steps: int, **sections: dict[str, Any]) -> dict[str, Any]:
        own = {
            "engine": {"backend": "fsdp2", "dtype": "fp32"},
            "batch": {"micro_seconds": 8},
            "optim": {"max_steps": steps, "lr": 1e-3, "schedule": "constant"},
            "evaluate": {"every_steps": 3, "captions": 0, "max_samples": 4},
            "checkpoint": {"every_steps": 1, "keep_last": 2, "mirror": self.place.url},
        }
        more = {section: own.get(section, {}) | sections.get(section, {}) for section in (*own, *sections)}
        return config_values(name, self.folder, self.model, self.shards, **more)

    def train(
        self,
        name: str,
        steps: int,
        procs: int = 2,
        kill: Kill | None = None,
        env: dict[str, str] | None = None,
        limits: dict[str, float] | None = None,
        **sections: Any,
    ) -> Done:
        return self.launch(
            self.config(name, steps, **sections),
            procs=procs,
            kill=kill,
            env=self.place.env | (env or {}),
            limits=limits,
        )

    def started_at(self, name: str) -> int:
        return self.run(name).ledger.read().of(TrainingBegan)[-1].step

    def told(self, name: str, kind: type[Event]) -> list[Any]:
        return self.run(name).ledger.read().of(kind)

    def same(self, name: str) -> None:
        """The copies are those of the local checkpoints, no more and no less, and complete."""
        run = self.run(name)
        expected = {
            f"checkpoints/{file.parent.name}/{file.name}": file
            for folder in checkpoint.find(run.checkpoints)
            for file in folder.iterdir()
        }
        expected |= {f"base/{file.name}": file for file in run.base.iterdir()} | {"config.yaml": run.config}
        assert self.place.names(name) == set(expected)
        for path, file in expected.items():
            assert self.place.read(f"{name}/{path}") == file.read_bytes(), path


@pytest.fixture(scope="module", params=["s3", pytest.param("folder", marks=pytest.mark.slow)])
def course(
    request, tmp_path_factory: pytest.TempPathFactory, model: Path, shards: str, launch: Launcher
) -> Mirrored:
    folder = tmp_path_factory.mktemp("mirror")
    if request.param == "folder":
        return Mirrored(folder, model, shards, launch, Copies(f"{folder}/copies", {}))
    server = request.getfixturevalue("s3_server")
    server.client().create_bucket(Bucket="copies")
    return Mirrored(folder, model, shards, launch, Copies("s3://copies/runs", server.environment))


@pytest.fixture(scope="module")
def mirrored(course: Mirrored) -> str:
    """A run of 5 steps on 2 ranks, of which all checkpoints are kept."""
    assert course.train("run", 5, checkpoint={"keep_last": 9}).returncode == 0
    course.same("run")
    assert len(checkpoint.find(course.run("run").checkpoints)) == 5
    return "run"


def copied(course: Mirrored, mirrored: str, name: str) -> str:
    """Another run with the same copies, whose own folder is lost."""
    for path in course.place.names(mirrored):
        course.place.write(f"{name}/{path}", course.place.read(f"{mirrored}/{path}"))
    return name


@pytest.mark.parametrize("lost", ["all", pytest.param("checkpoints", marks=pytest.mark.slow)])
def test_a_run_whose_folder_is_lost_goes_on_from_its_mirror(
    course: Mirrored, mirrored: str, lost: str
) -> None:
    """On other ranks, from the newest copy. It now keeps two, and so does the mirror then."""
    name = copied(course, mirrored, f"lost-{lost}")
    if lost == "checkpoints":
        shutil.copytree(course.run(mirrored).path, course.run(name).path)
        shutil.rmtree(course.run(name).checkpoints)
    assert course.train(name, 6, procs=3).returncode == 0
    assert course.started_at(name) == 5
    assert [line.folder for line in course.told(name, Restored)] == ["step-00000005"]
    restored = course.run(name).checkpoints / "step-00000005"
    assert all(
        file.read_bytes() == (course.run(mirrored).checkpoints / restored.name / file.name).read_bytes()
        for file in restored.iterdir()
    )
    assert {path.split("/")[1] for path in course.place.names(name) if path.startswith("checkpoints/")} == {
        "step-00000005",
        "step-00000006",
    }
    course.same(name)


def test_copies_of_a_course_that_was_given_up_are_deleted(course: Mirrored, mirrored: str) -> None:
    """A run goes on from step 2 though there are copies up to step 5: they must not count as the newest
    later."""
    name = copied(course, mirrored, "given-up")
    shutil.copytree(course.run(mirrored).path, course.run(name).path)
    for step in (3, 4, 5):
        shutil.rmtree(course.run(name).checkpoints / f"step-{step:08d}")
    assert course.train(name, 4).returncode == 0
    course.same(name)
    assert "checkpoints/step-00000004/manifest.json" in course.place.names(name)
    assert "checkpoints/step-00000005/manifest.json" not in course.place.names(name)


@pytest.mark.slow
def test_the_metrics_of_an_evaluation_after_the_copy_are_copied_too(course: Mirrored) -> None:
    """Killed when a step is saved and copied, but not evaluated; else the best one would not be known
    there."""
    killed = course.train(
        "evaluated",
        1000,
        kill=Kill("trainer.mirror:Mirror._copy", after=True, rank=0),
        checkpoint={"every_steps": 10},
        evaluate=NEVER,
    )
    assert killed.returncode == 1
    saved = checkpoint.find(course.run("evaluated").checkpoints)[0].name
    step = int(saved.removeprefix("step-"))
    assert (
        course.train(
            "evaluated", step + 1, checkpoint={"every_steps": 1000}, evaluate={"every_steps": 1}
        ).returncode
        == 0
    )
    assert course.started_at("evaluated") == step
    assert (
        "validation/loss"
        in json.loads(course.place.read(f"evaluated/checkpoints/{saved}/manifest.json"))["metrics"]
    )
    course.same("evaluated")


def flip_a_byte(place: Copies, folder: str) -> None:
    content = bytearray(place.read(name := f"{folder}/rank-00001-of-00002.safetensors"))
    content[len(content) // 2] ^= 1
    place.write(name, bytes(content))


def cut_off(place: Copies, folder: str) -> None:
    place.write(name := f"{folder}/rank-00000-of-00002.safetensors", place.read(name)[:1000])


def without_a_file(place: Copies, folder: str) -> None:
    place.remove(f"{folder}/rank-00000-of-00002.safetensors")


def half_a_manifest(place: Copies, folder: str) -> None:
    place.write(name := f"{folder}/manifest.json", place.read(name)[:200])


DAMAGE = {
    flip_a_byte: "damaged between bytes",
    cut_off: "has 1000 bytes",
    without_a_file: "No such file",
    half_a_manifest: "not a valid checkpoint",
}


def test_damaged_copies_are_named_and_the_newest_sound_one_is_used(course: Mirrored, mirrored: str) -> None:
    """The newest four are damaged, each in another way. On the way they are made anew."""
    name = copied(course, mirrored, "damaged")
    for step, damage in zip((5, 4, 3, 2), DAMAGE, strict=True):
        damage(course.place, f"{name}/checkpoints/step-{step:08d}")
    done = course.train(name, 5, checkpoint={"keep_last": 9})
    assert done.returncode == 0 and course.started_at(name) == 1
    told = course.told(name, Damaged)
    assert [line.folder for line in told] == [
        f"{course.place.url}/{name}/checkpoints/step-{step:08d}" for step in (5, 4, 3, 2)
    ]
    for line, said in zip(told, DAMAGE.values(), strict=True):
        assert said in line.message and line.folder in done.stdout
    assert not [
        folder
        for folder in course.run(name).checkpoints.iterdir()
        if not (folder / "manifest.json").is_file()
    ]
    course.same(name)


def test_a_run_of_which_all_copies_are_damaged_does_not_begin_anew(course: Mirrored, mirrored: str) -> None:
    name = copied(course, mirrored, "all-damaged")
    for step in range(1, 6):
        flip_a_byte(course.place, f"{name}/checkpoints/step-{step:08d}")
    done = course.train(name, 6)
    assert done.returncode == 1 and f"{course.place.url}/{name}: " in done.stderr
    assert (
        "every copy there is damaged (step-00000005, step-00000004, " in done.stderr
        and "checkpoint.mirror=null" in done.stderr
    )
    assert not list(course.run(name).checkpoints.iterdir())


@pytest.mark.slow
def test_a_copy_that_was_cut_short_does_not_count_and_is_removed(course: Mirrored, mirrored: str) -> None:
    """Killed before the manifest of the first one; then the run begins anew on three ranks, which leaves
    other files."""
    base = len([path for path in course.place.names(mirrored) if path.startswith("base/")])
    done = course.train("cut-short", 2, kill=Kill("trainer.mirror:Mirror._put", nth=base + 1 + 2 + 1, rank=0))
    assert done.returncode == 1
    left = {path for path in course.place.names("cut-short") if path.startswith("checkpoints/")}
    assert left == {f"checkpoints/step-00000001/rank-0000{rank}-of-00002.safetensors" for rank in (0, 1)}
    shutil.rmtree(course.run("cut-short").path)
    assert course.train("cut-short", 2, procs=3).returncode == 0
    assert course.started_at("cut-short") == 0
    course.same("cut-short")


@pytest.mark.parametrize("trouble", ["no bucket", "server gone"])
def test_copies_that_cannot_be_made_are_told_and_training_goes_on(
    course: Mirrored, mirrored: str, trouble: str
) -> None:
    """A bucket that is not there is not made; in folders, a file is in the way."""
    name, url, on_s3 = f"no-copies-{trouble.replace(' ', '-')}", course.place.url, bool(course.place.env)
    if trouble == "no bucket":
        (course.folder / "file").write_text("in the way", encoding="utf-8")
        url = NO_BUCKET if on_s3 else f"{course.folder}/file/copies"
    elif not on_s3:
        pytest.skip("a folder has no server")
    shutil.copytree(course.run(mirrored).path, course.run(name).path)
    env = NOWHERE if trouble == "server gone" else {}
    done = course.train(name, 6, checkpoint={"mirror": url}, env=env, limits=SOON)
    assert done.returncode == 0 and course.started_at(name) == 5
    told = course.told(name, MirrorFailed)
    assert "step-00000006" in {line.folder for line in told}
    assert all(line.mirror == f"{url}/{name}" and line.message for line in told)
    assert all(
        f"{url}/{name}: {line.folder} could not be copied: {line.message}. Training goes on" in done.stdout
        for line in told
    )


@pytest.mark.slow
def test_a_copy_that_another_version_made_is_left_alone(course: Mirrored, mirrored: str) -> None:
    """A manifest that says nothing to this one; the others are copied all the same."""
    name = copied(course, mirrored, "foreign")
    foreign = json.dumps({"format": 99, "step": 3}).encode()
    course.place.write(f"{name}/checkpoints/step-00000003/manifest.json", foreign)
    assert course.train(name, 7).returncode == 0
    assert course.started_at(name) == 5
    assert course.place.read(f"{name}/checkpoints/step-00000003/manifest.json") == foreign
    assert "checkpoints/step-00000007/manifest.json" in course.place.names(name)


@pytest.mark.parametrize("trouble", ["no bucket", "server gone", "wrong key"])
def test_a_lost_run_is_not_begun_anew_while_its_mirror_cannot_be_read(
    course: Mirrored, mirrored: str, trouble: str
) -> None:
    if not course.place.env:
        pytest.skip("a folder is there, or is not")
    env = {"server gone": NOWHERE, "wrong key": {"AWS_SECRET_ACCESS_KEY": "wrong"}}.get(trouble, {})
    url = NO_BUCKET if trouble == "no bucket" else course.place.url
    name = f"unreachable-{trouble.replace(' ', '-')}"
    done = course.train(name, 6, env=env, limits=SOON, checkpoint={"mirror": url})
    assert (
        done.returncode == (1 if trouble == "server gone" else 3)
        and f"{url}/{name}: " in done.stderr
        and "has no checkpoint, and this mirror of it cannot be read: " in done.stderr
    )
    assert "checkpoint.mirror=null" in done.stderr and "Traceback" not in done.stderr
    assert not list(course.run(name).checkpoints.iterdir())


def test_a_copy_is_never_seen_with_a_manifest_and_without_its_files(course: Mirrored) -> None:
    """By what the server is asked to do, in its order."""
    if not course.place.env:
        pytest.skip("a folder is asked for nothing")
    with faults.serve(course.place.env["AWS_ENDPOINT_URL"]) as proxy:
        done = course.train("in-order", 2, env={"AWS_ENDPOINT_URL": proxy.endpoint})
    assert done.returncode == 0, done.stderr
    written = [urlsplit(path).path.split("/") for method, path, _ in proxy.requests if method == "PUT"]
    copies = {name: [file for *_, folder, file in written if folder == name] for *_, name, _ in written}
    assert "step-00000002" in copies
    for name, files in copies.items():
        if name.startswith("step-"):
            assert len(files) == 3 and files[-1] == "manifest.json", (name, files)


def test_an_attempt_that_was_superseded_leaves_the_copies_alone(
    course: Mirrored, mirrored: str, tmp_path: Path
) -> None:
    """Those of a later attempt, which goes on from an earlier step."""
    run = course.run(mirrored)

    def fence() -> None:
        raise Superseded("attempt 7 has taken over this run")

    lease: Any = SimpleNamespace(check=fence, attempt=6)
    config = run.read_config()
    checkpoints = config.checkpoint.model_copy(update={"mirror": str(tmp_path)})
    theirs = tmp_path / mirrored / "checkpoints/step-00000003/manifest.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("of attempt 7", encoding="utf-8")
    ours = Mirror(run, config.model_copy(update={"checkpoint": checkpoints}), lease)
    ours.begin(1)
    ours.upload(run.checkpoints / "step-00000005")
    ours.finish()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]


@pytest.fixture
def behind_a_proxy(course: Mirrored, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The mirror in this process, which comes to it through a proxy."""
    if not course.place.env:
        pytest.skip("a folder has no keys")
    monkeypatch.setattr(location, "_open", {})
    monkeypatch.setattr(retry, "LIMITS", replace(retry.LIMITS, first_pause=0.02, longest_pause=0.1))
    with faults.serve(course.place.env["AWS_ENDPOINT_URL"]) as proxy:
        for variable, value in {**course.place.env, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(variable, value)
        yield proxy


def mirror_of(course: Mirrored, name: str) -> Mirror:
    config = validate(course.config(name, 5), "test")
    course.run(name).checkpoints.mkdir(parents=True, exist_ok=True)
    return Mirror(course.run(name), config, SimpleNamespace(attempt=7, check=lambda: None))


def test_keys_that_have_expired_are_waited_for(
    course: Mirrored, mirrored: str, behind_a_proxy: Proxy
) -> None:
    """While a lost run is brought back (two connections break besides), and while a copy is made."""
    expired, broken = Fault("400", times=5), Fault("reset", after=5000, times=2, skip=5)
    name = copied(course, mirrored, "expired")
    behind_a_proxy.set(expired, broken)
    mirror_of(course, name).restore()
    assert behind_a_proxy.hits == {expired: 5, broken: 2}
    restored = checkpoint.find(course.run(name).checkpoints)[0]
    assert restored.name == "step-00000005" and not list(Reader(restored).verify())

    run = RunDir(shutil.copytree(course.run(mirrored).path, course.run("copies").path))
    behind_a_proxy.set(expired)
    mirror = mirror_of(course, "copies")
    for folder in checkpoint.find(run.checkpoints)[:2]:
        mirror.upload(folder)
        mirror.finish()
    assert behind_a_proxy.hits == {expired: 5} and not run.ledger.read().of(MirrorFailed)
    copies = {line.folder for line in run.ledger.read().of(events.Mirrored)}
    assert copies >= {"step-00000004", "step-00000005"}


def test_keys_that_were_changed_are_taken_up(
    course: Mirrored, mirrored: str, behind_a_proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rotation does: those that the mirror began with are refused, until the file has others."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    run = RunDir(shutil.copytree(course.run(mirrored).path, course.run("rotated").path))
    mirror = mirror_of(course, "rotated")
    newest = checkpoint.find(run.checkpoints)[0]
    for key, secret in (
        ("old", "gone"),
        (course.place.env["AWS_ACCESS_KEY_ID"], course.place.env["AWS_SECRET_ACCESS_KEY"]),
    ):
        file.write_text(
            f"[default]\naws_access_key_id={key}\naws_secret_access_key={secret}\n", encoding="utf-8"
        )
        mirror.upload(newest)
        mirror.finish()
    (failed,) = run.ledger.read().of(MirrorFailed)
    assert "access denied" in failed.message
    made = run.ledger.read().of(events.Mirrored)
    assert made[-1].folder == newest.name and made[-1].time > failed.time
