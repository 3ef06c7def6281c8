"""Finds files whose names are written in another spelling than the disk's."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from html import unescape
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from data.decode import AUDIO_ENDINGS
from data.texts import bare

FOLDERS = 64
"""Whose names are kept in memory."""


def native(root: Path, name: str) -> Path:
    """The path of a file, in UTF-8 on the disk, whatever the locale."""
    return root / os.fsdecode(name.encode("utf-8", "surrogateescape"))


def find(root: Path, written: str) -> str | None:
    """The spelling by which a file is there: as written, else without blanks around it, with `/` for `\\`, in
    another Unicode form, or all of that. None if it is not there."""
    spellings = _spellings(written)
    for spelling in spellings:
        if _is_there(native(root, spelling)):
            return spelling
    for spelling in spellings:
        found = list(_search(root, spelling, _has_same_letters)) if not spelling.isascii() else []
        if len(found) == 1:
            return found[0]
    return None


def identity(root: Path, written: str) -> str:
    """A name that all spellings of a file share; other files may share it, too."""
    name = unicodedata.normalize("NFC", _plain(written))
    if name.startswith("/"):
        name = _below(root, name)
    name = os.path.normpath(name)
    if name.startswith(".."):  # and perhaps back into the root
        name = _below(root, os.path.normpath(root.absolute() / name))
    return written if name == written else name  # of millions each is kept


def hint(root: Path, written: str) -> str:
    """What is there in place of a file that is not, as it stands behind `No such file`; "" if nothing is."""
    scheme, separator, _ = written.partition("://")
    if separator and scheme.strip().lower() != "file":
        return "; clips are read from the disk: download it, and write its path"
    plain = _plain(written)
    for spelling in dict.fromkeys([plain, _unescaped(plain)]):
        name = PurePosixPath(spelling).name
        places = [(spelling, _looks_same), (spelling, _is_same_clip), (name, _is_same_clip)]
        places += [(f"{folder}/{name}", _is_same_clip) for folder in _subfolders(root)]
        for place, alike in places:
            if found := list(_search(root, place, alike)):
                return f"; {', '.join(found)} {'are' if len(found) > 1 else 'is'} there"
    return ""


def _unescaped(spelling: str) -> str:
    """A name as it was before a program wrote it into a URL, a page, or quotation marks."""
    return unescape(unquote(spelling)).strip("\"'")


def _plain(written: str) -> str:
    """A name without blanks around it, and with `/`."""
    return _path(written).replace("\\", "/")


def _path(written: str) -> str:
    """A name without blanks around it; of a `file://` URL its path."""
    name = bare(written)
    return unquote(urlsplit(name).path) if name.lower().startswith("file://") else name


def _spellings(written: str) -> list[str]:
    """Names to try, in this order."""
    path = _path(written)
    # With `\\` a name is on the disk where an archive from Windows was unpacked by a program that knows none.
    return list(dict.fromkeys([written, path, _plain(written), path.replace("/", "\\")]))


def _is_there(path: Path) -> bool:
    """Whether a file is there, even if it cannot be read: reading it will say why."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def _search(root: Path, spelling: str, alike: Callable[[str, str], bool]) -> Iterator[str]:
    """Spellings that are there, and of which each part is like that of this one."""
    first, *rest = PurePosixPath(spelling).parts or ("",)
    found = [PurePosixPath(first)]
    if first not in ("/", ".."):
        found, rest = [PurePosixPath()], [first, *rest]
    for part in rest:
        found = [
            path / name
            for path in found
            for name in (
                [".."] if part == ".." else _names(native(root, str(path))).get(_loose_stem(part), ())
            )
            if name == part or alike(name, part)
        ]
    return map(str, found)


def _below(root: Path, path: str) -> str:
    """An absolute path as it is written below the root, if it is there."""
    for folder in _roots(root):
        path = path.removeprefix(folder)
    return path


@lru_cache(1)
def _roots(root: Path) -> tuple[str, ...]:
    """How absolute paths of files below the root begin."""
    return tuple(f"{folder}/" for folder in (root.absolute(), root.resolve()))


@lru_cache(FOLDERS)
def _names(folder: Path) -> dict[str, list[str]]:
    """The names in a folder, by what is alike in them."""
    names: dict[str, list[str]] = {}
    with suppress(OSError):
        for name in sorted(os.fsencode(entry.name) for entry in folder.iterdir()):
            spelled = name.decode("utf-8", "surrogateescape")
            names.setdefault(_loose_stem(spelled), []).append(spelled)
    return names


@lru_cache(1)
def _subfolders(root: Path) -> list[str]:
    """Folders in the root, if they are few enough to be searched."""
    with suppress(OSError), os.scandir(root) as entries:
        names = sorted(os.fsencode(entry.name) for entry in entries if entry.is_dir())
        return [name.decode("utf-8", "surrogateescape") for name in names if len(names) < FOLDERS]
    return []


def _has_same_letters(name: str, written: str) -> bool:
    return unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", written)


def _looks_same(name: str, written: str) -> bool:
    return _loose(name) == _loose(written)


def _is_same_clip(name: str, written: str) -> bool:
    """Whether a name differs in its letter case, its blanks, or its ending only."""
    return _looks_same(name, written) or _ending(name) in AUDIO_ENDINGS


def _loose(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _loose_stem(name: str) -> str:
    """What is left of a name without the ending of an audio file."""
    name = _loose(name)
    return name.rpartition(".")[0] if _ending(name) in AUDIO_ENDINGS else name


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()
