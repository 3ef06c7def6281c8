from __future__ import annotations

import io
import os
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.tar import BLOCK, KINDS, Damage, Kind, Member, walk

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
OTHERS = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
formats = pytest.mark.parametrize("layout", FORMATS)

# Latin letters, what only UTF-8 can say, and a byte that is not UTF-8 (é in Latin-1), as old tars have it.
parts = st.text("aB0 .-_é漢🎵\udce9", min_size=1, max_size=30) | st.integers(90, 140).map("x".__mul__)
names = st.builds(
    lambda start, path: start + "/".join(path),
    st.sampled_from(["", "./"]),
    st.lists(parts, min_size=1, max_size=5),
)
types = st.sampled_from([tarfile.REGTYPE] * 4 + [tarfile.AREGTYPE, tarfile.CONTTYPE] + OTHERS)
entries = st.lists(
    st.tuples(types, names, st.integers(0, 1500), names, st.sampled_from([0, 1.5])), max_size=8
)


def info(
    name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "", mtime: float = 0
) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type, made.linkname, made.mtime = size, kind, link, mtime
    return made


def make(layout: str, *members: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[layout], encoding="utf-8") as tar:
        for member in members:
            with suppress(ValueError):  # ustar cannot hold every long name
                tar.addfile(member, io.BytesIO(b"s" * member.size) if member.isreg() else None)
    return file.getvalue()


def example(layout: str) -> bytes:
    """An archive with all that stands between samples: a folder, a link, an empty file, a long name, one that
    is not ASCII."""
    long = "folder/" * 14 + "long-name.wav"
    return make(
        layout,
        info("./a.wav", 700),
        info("b", kind=tarfile.DIRTYPE),
        info(long, 10),
        info("c", kind=tarfile.SYMTYPE, link="a"),
        info("é.json", 0),
        info("d", 512),
    )


def listed(archive: bytes) -> list[Member]:
    """The members as Python's tarfile finds them."""
    with tarfile.open(fileobj=io.BytesIO(archive), encoding="utf-8") as tar:
        return [
            Member(
                member.name.removeprefix("./"),
                member.offset_data,
                member.size if member.isreg() else 0,
                Kind.FILE if member.isreg() else KINDS[member.type],
                member.linkname if member.islnk() or member.issym() else "",
            )
            for member in tar
        ]


def walked(archive: bytes) -> tuple[list[Member], str]:
    """The members found, and the damage reported after them."""
    members: list[Member] = []
    try:
        for member in walk(lambda start, end: archive[start:end], len(archive)):
            members.append(member)
    except Damage as damage:
        return members, str(damage)
    return members, ""


def headers(archive: bytes) -> dict[int, int]:
    """Where each header block of a member lies -> how many members come before it."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive), encoding="utf-8") as tar:
        for number, member in enumerate(tar):
            found |= {member.offset: number, member.offset_data - BLOCK: number}
    return found


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError("it never ends")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@formats
@settings(max_examples=150, derandomize=True, deadline=None)
@given(entries=entries)
def test_lists_the_members_that_tarfile_lists(layout: str, entries: list[tuple]) -> None:
    # Old tar's type with a name that only PAX can hold: tarfile takes it for a folder where its cut-off name
    # ends with a slash.
    assume(not any(kind == tarfile.AREGTYPE and len(os.fsencode(name)) >= 100 for kind, name, *_ in entries))
    archive = make(
        layout,
        *(
            info(name, size if kind not in OTHERS else 0, kind, link, mtime)
            for kind, name, size, link, mtime in entries
        ),
    )
    assert walked(archive) == (listed(archive), "")


@formats
@pytest.mark.parametrize("size", [700, 5 << 30])
def test_a_size_at_a_link_or_a_folder_is_not_content(layout: str, size: int) -> None:
    for kind in OTHERS:
        archive = make(layout, info("a.wav", 700), info("b", size, kind, link="a.wav"), info("c.wav", 700))
        assert [member.name for member in listed(archive)] == ["a.wav", "b", "c.wav"]
        assert walked(archive) == (listed(archive), "")


@formats
def test_a_cut_at_any_byte_is_reported_after_the_whole_members(layout: str) -> None:
    archive = example(layout)
    members = listed(archive)
    assert len(members) == 6
    end_marker = members[-1].offset + 512
    assert walked(archive[: end_marker + BLOCK]) == (members, "")
    for cut in range(end_marker + BLOCK):
        whole, damage = walked(archive[:cut])
        assert damage and whole == [member for member in members if member.offset + member.size <= cut], (
            f"cut at byte {cut}"
        )


@formats
@pytest.mark.parametrize("flip", [0x01, 0x10, 0x80, 0xFF])
def test_a_flipped_byte_in_a_header_is_reported(layout: str, flip: int) -> None:
    archive = example(layout)
    members = listed(archive)
    for header, before in headers(archive).items():
        for place in range(BLOCK):
            flipped = bytearray(archive)
            flipped[header + place] ^= flip
            found, damage = walked(bytes(flipped))
            if 148 <= place < 156 and not damage:  # the checksum itself, written in another way
                assert found == members
            else:
                assert damage and found == members[:before], f"byte {place} of the header at {header}"


@formats
def test_what_follows_an_end_marker_is_not_passed_over(layout: str) -> None:
    archive = example(layout)
    members = listed(archive)
    second = members[1].offset - BLOCK
    zeroed = (
        archive[:second] + bytes(BLOCK) + archive[second + BLOCK :]
    )  # as a copy that lost a block leaves it
    for damaged, before in ((zeroed, members[:1]), (archive + archive, members)):
        found, damage = walked(damaged)
        assert found == before
        assert damage, "samples were lost without a word"


def test_a_damaged_pax_header_is_reported_and_never_a_crash() -> None:
    archive = make("pax", info("é.wav", 9 << 10, mtime=1.5), info("b.wav", 3))
    payload = slice(BLOCK, archive.index(bytes(8), BLOCK))
    assert b"path=" in archive[payload] and b"mtime=" in archive[payload]
    for place in range(payload.start, payload.stop):
        for byte in b"0-9 =\n\0\xff":
            damaged = bytearray(archive)
            damaged[place] = byte
            with at_most(10):
                members, damage = walked(bytes(damaged))
            assert damage or len(members) == 2, f"byte {place} set to {bytes([byte])!r}"


@pytest.mark.parametrize("size", ["-512", "x", "1.5", "9" * 30])
def test_a_pax_size_that_is_none_is_reported(size: str) -> None:
    member = info("a.wav", 3)
    member.pax_headers = {"size": size}
    with at_most(10):
        assert walked(make("pax", member))[1]


@pytest.mark.parametrize("layout", ["gnu", "pax"])
def test_a_member_of_9_gb_is_passed_without_reading_it(layout: str) -> None:
    size = 9 << 30
    head = info("long.wav", size).tobuf(FORMATS[layout])
    tail = make(layout, info("next.wav", 3))
    sizes = []
    members = list(walk(_hollow(head, size, tail, sizes), len(head) + size + len(tail)))
    assert members == [Member("long.wav", len(head), size), Member("next.wav", len(head) + size + BLOCK, 3)]
    assert sum(sizes) <= len(head) + len(tail)


def _hollow(head: bytes, size: int, tail: bytes, sizes: list[int]) -> Callable[[int, int], bytes]:
    """Bytes of head, `size` bytes of content that is nowhere, and tail; notes how much is read."""

    def read(start: int, end: int) -> bytes:
        sizes.append(end - start)
        if end <= len(head):
            return head[start:end]
        assert start >= len(head) + size, "content was read"
        return tail[start - len(head) - size : end - len(head) - size]

    return read


@pytest.mark.parametrize(
    "options",
    [
        "--format=gnu",
        "--format=pax --sparse-version=0.0",
        "--format=pax --sparse-version=0.1",
        "--format=pax --sparse-version=1.0",
    ],
)
def test_sparse_members_are_refused(tmp_path: Path, options: str) -> None:
    (tmp_path / "a.wav").write_bytes(b"whole")
    with (tmp_path / "b.wav").open("wb") as file:
        file.write(b"s" * 4096)
        file.seek(1 << 20)
        file.write(b"s" * 4096)
    subprocess.run(
        ["tar", *options.split(), "--sparse", "--hole-detection=raw", "-cf", "x.tar", "a.wav", "b.wav"],
        cwd=tmp_path,
        check=True,
    )
    archive = (tmp_path / "x.tar").read_bytes()
    assert len(archive) < 1 << 20
    members, damage = walked(archive)
    assert [member.name for member in members] == ["a.wav"]
    assert "sparse" in damage and "b.wav" in damage and "--sparse" in damage


def test_times_in_the_headers_of_a_backup_are_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"sound")
    subprocess.run(["tar", "-g", "snapshot", "-cf", "x.tar", "a.wav"], cwd=tmp_path, check=True)
    members, damage = walked((tmp_path / "x.tar").read_bytes())
    assert ([member.name for member in members], damage) == (["a.wav"], "")
