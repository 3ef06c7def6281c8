"""What content is that is not what its name says: a download that failed, a pointer, another kind of file."""

from __future__ import annotations

import re

BEGINNING = 4096
"""Bytes that are looked at."""
TEXTS = {
    b"version https://git-lfs.github.com/spec/": (
        "a pointer of Git LFS, not the file itself (`git lfs pull` fetches that)"
    ),
    b"version https://git-annex": "a pointer of git-annex, not the file itself (`git annex get` helps)",
    b"annex/objects/": "a pointer of git-annex, not the file itself (`git annex get` helps)",
    b"git/annex/objects/": "a pointer of git-annex, not the file itself (`git annex get` helps)",
    b"#EXTM3U": "a list of files to play, not the audio",
}
"""By the first bytes of a text, dots and slashes apart, what it stands for, as it is said after `it is`."""
BINARIES = {
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"\x1f\x8b": "compressed by gzip; unpack it (gunzip)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it (zstd -d)",
    b"\xfd7zXZ\0": "compressed by xz; unpack it (unxz)",
    b"BZh": "compressed by bzip2; unpack it (bunzip2)",
    b"\x04\x22\x4d\x18": "compressed by LZ4; unpack it (lz4 -d)",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it",
    b"Rar!\x1a\x07": "a RAR archive; unpack it",
    b"PAR1": "a Parquet file: a table, whose audio and captions are columns",
    b"ARROW1": "an Arrow file: a table, whose audio and captions are columns",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "an array of NumPy",
    b"\x80\x02": "a pickle of Python",
    b"\x80\x03": "a pickle of Python",
    b"\x80\x04": "a pickle of Python",
    b"\x80\x05": "a pickle of Python",
    b"SQLite format 3": "a data base of SQLite",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"GIF8": "a picture (GIF)",
    b"\x00\x05\x16\x07": "what macOS keeps beside a file (AppleDouble), not the file itself",
    b"\x7fELF": "a program",
    b"MZ": "a program of Windows",
    b"RIFF": "audio (WAV)",
    b"RF64": "audio (WAV)",
    b"fLaC": "audio (FLAC)",
    b"OggS": "audio (Ogg)",
    b"ID3": "audio (MP3)",
    b"FORM": "audio (AIFF)",
    b"caff": "audio (CAF)",
    b".snd": "audio (AU)",
}
"""By the first bytes of what is no text, what it is."""
PAGE = re.compile(
    rb"\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body|title|script)\b", re.IGNORECASE | re.DOTALL
)
XML = re.compile(rb"\s*<(\?xml|error)\b", re.IGNORECASE)
JSON = re.compile(rb"\s*(\{\s*[\"}]|\[\s*[\[{\"\]\d-])")
OFFICE = re.compile(rb"\[Content_Types\]\.xml|_rels/|docProps/|xl/|opendocument")
"""In the first names within a zip archive that is one of a document."""
TAR_ARCHIVE = "a tar archive"
TAR = slice(257, 262)
"""Where a tar archive says `ustar`."""
MARK = b"\xef\xbb\xbf"
"""The byte order mark that Windows programs begin a text with."""
SHOWN = 60
"""Characters of a text that are shown."""


def what_it_is(content: bytes) -> str:
    """What a file is by its beginning, in words that go on after `it is`; "" if it is nothing known.
    content: all of it, or its first BEGINNING bytes."""
    beginning = content[:BEGINNING].removeprefix(MARK)
    if not content:
        return "empty (0 bytes): was its download broken off?"
    if not beginning.strip(b"\0"):
        return "nothing but zero bytes: was its download broken off?"
    if beginning[TAR] == b"ustar":
        return TAR_ARCHIVE
    if beginning.startswith(b"PK\x03\x04") and OFFICE.search(beginning):
        return "a document of Excel or Word; a table is saved from there as CSV UTF-8"
    if beginning[4:8] == b"ftyp":
        return "audio or video (MP4)"
    if not _is_text(beginning):
        return next((words for first, words in BINARIES.items() if beginning.startswith(first)), "")
    if words := what_it_stands_for(beginning):
        return words
    return f"{'JSON' if JSON.match(beginning) else 'text'} ({_line(beginning)})"


def what_it_stands_for(text: bytes) -> str:
    """What a text is that stands in the place of a file that was wanted: a pointer, a web page, a server's
    refusal; "" if it is none of these. The words go on after `it is`."""
    text = text[:BEGINNING].removeprefix(MARK)
    for first, words in TEXTS.items():
        if text.lstrip(b"./\\").startswith(first):
            return words
    if PAGE.match(text):
        return f"a web page{_title(text)}: did its download need a sign-in?"
    if XML.match(text):
        return f"XML, as a server answers that refuses ({_line(text)})"
    return ""


def _title(page: bytes) -> str:
    found = re.search(rb"<title[^>]*>(.*?)</title>", page, re.IGNORECASE | re.DOTALL)
    return f" ({_line(found[1])})" if found else ""


def _is_text(content: bytes) -> bool:
    """Whether this is UTF-8 without control characters; its last character may be cut off."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        if error.end < len(content) or error.reason != "unexpected end of data":
            return False
        text = content[: error.start].decode()
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)


def _line(content: bytes) -> str:
    """The beginning of a text, in one line."""
    return shown(content.decode("utf-8", "replace"))


def shown(text: str) -> str:
    """A text as messages show it: its beginning, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
