"""What a file system refuses, in words: what, where, and what to type."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ADVICE = {
    errno.ENOSPC: "make room there (`df -h {place}`, and `df -i` for the number of files)",
    errno.EDQUOT: "the quota there is used up: delete what is not needed, or ask for more (`quota -s`)",
    errno.EROFS: (
        "that file system may only be read: mount it for writing, or name another place (`findmnt -T {place}`"
        " says which one it is)"
    ),
    errno.EISDIR: "a folder has the name of a file: move it away (`mv {path} {path}.old`)",
    errno.ENOTDIR: "a file stands where a folder should be: move it away (`namei -l {path}`)",
    errno.EEXIST: "something else has that name: move it away (`mv {path} {path}.old`)",
    errno.ESTALE: (
        "the network file system does not know it any more: mount it anew, or start on another node (`stat"
        " {place}`)"
    ),
    errno.EMFILE: "this process may open no more files: `ulimit -n 65536` in the shell that starts it",
    errno.ENFILE: "this machine may open no more files (`cat /proc/sys/fs/file-nr`): end other programs",
    errno.EIO: "the disk or the way to it fails (`dmesg | tail`)",
    errno.EFBIG: "files may not grow so large here: `ulimit -f unlimited` in the shell that starts it",
    errno.ENAMETOOLONG: "names may not be so long there: choose a shorter one",
    errno.ENOENT: "it was never there, or was removed meanwhile (`ls -ld {place}`)",
    errno.ELOOP: "its links lead in a circle (`namei -l {path}`)",
    errno.ENODEV: "what was mounted there is gone (`findmnt -T {place}`)",
    errno.ETIMEDOUT: "the network file system does not answer (`stat {place}`)",
    errno.EHOSTDOWN: "the network file system does not answer (`stat {place}`)",
    errno.ENOTCONN: "what was mounted there is gone: mount it anew (`findmnt -T {place}`)",
}
"""What to do, by the number of an error. place: the folder, or what is there of it."""
OF_RUST = re.compile(r"\(os error (\d+)\)")
"""In what libraries in Rust say (safetensors, tokenizers)."""
UNMISTAKABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
    errno.EFBIG,
}
"""These are errors of a disk even where no file is named; others may be those of a connection."""
TEMPORARY = re.compile(r"/(tmp|earwitness-)\w{8}\b")
"""In paths that Python has made below $TMPDIR."""
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_PERMISSION = (errno.EACCES, errno.EPERM)


def words_of_disk(error: BaseException) -> str:
    """A paragraph for an error of a file system; empty for another one."""
    told = _as_os_error(error)
    if told is None or told.errno is None:
        return ""
    name = told.filename2 or told.filename  # of a rename, the new one
    if isinstance(name, str | bytes):
        path = Path(os.fsdecode(name))
        return f"{path}: {os.strerror(told.errno)}{_advice(told.errno, path)}"
    if told.errno in UNMISTAKABLE:
        return f"{os.strerror(told.errno)}{_advice(told.errno, None)}"
    if str(told.strerror).startswith("No usable temporary directory"):
        return f"{told.strerror}: set TMPDIR to a folder that you may write"
    return ""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system in this block that names no file, as that of a write, name this one."""
    try:
        yield
    except Exception as error:
        told = _as_os_error(error)
        if told is None or told.errno is None or told.filename:
            raise
        raise OSError(told.errno, os.strerror(told.errno), str(path)) from error


def _as_os_error(error: BaseException) -> OSError | None:
    """An error of the system that is none of a connection, also where a library in Rust has made words of
    it."""
    if isinstance(error, ConnectionError):
        return None
    if isinstance(error, OSError):
        return error
    said = OF_RUST.search(str(error))
    return OSError(int(said[1]), "") if said else None


def _advice(number: int, path: Path | None) -> str:
    """What to type, after a colon; empty if there is nothing to say. path: None if it is not known."""
    if path and number in NO_PERMISSION:
        return f": {_who_may(_what_is_there(path))}"
    if number not in ADVICE:
        return ""
    place = shlex.quote(str(_what_is_there(path if path.is_dir() else path.parent))) if path else ""
    advice = ADVICE[number].format(place=place, path=shlex.quote(str(path)))
    if number in FULL and path and TEMPORARY.search(str(path)):
        advice += ", or set TMPDIR to a folder on another disk"
    return f": {advice}"


def _what_is_there(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(above for above in (path, *path.parents) if os.path.lexists(above))


def _who_may(place: Path) -> str:
    """Whose a file or a folder is, who asks, and what the owner types."""
    name = shlex.quote(str(place))
    try:
        known = place.stat()
    except OSError:  # not even that may be seen
        return f"you ({_user(os.geteuid())}) may not look into a folder above it (`namei -l {name}`)"
    mode = stat.filemode(known.st_mode)
    if known.st_uid == os.geteuid():
        return f"{place} is yours, but closed ({mode}): `chmod -R u+rwX {name}`"
    owner = _user(known.st_uid)
    return (
        f"{place} belongs to {owner} ({mode}, group {_group(known.st_gid)}), and you are"
        f" {_user(os.geteuid())}. If you are in that group, {owner} types `chmod -R g+rwX {name}`; else"
        " choose another place"
    )


def _user(number: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return f"user {number}"


def _group(number: int) -> str:
    with suppress(KeyError):
        return grp.getgrgid(number).gr_name
    return str(number)
