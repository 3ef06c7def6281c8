"""Members of an archive -> samples, whatever their order and spelling; every member is accounted for."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from configs.errors import DataError
from configs.schema import Source
from data.decode import AUDIO_ENDINGS
from data.tar import Kind, Member

FOLLOWED = 40
"""Links that are followed, one to the next, before they are taken for a circle."""
OF_MACOS = re.compile(r"(^|/)(\._|__MACOSX(/|$)|\.DS_Store$)")
"""In names of what macOS adds to archives."""
NO_FILE = "is no file of this archive (`tar -h` packs what links point to)"
CONTROL = re.compile(r"[\0-\x1f\x7f\x85\u2028\u2029]")
LEADING_TO_FILES = (Kind.FILE, Kind.HARD_LINK, Kind.SYMBOLIC_LINK)


class Part(NamedTuple):
    """A member of a sample. ending: of its name, from the sample's key on, in lower case; broken: why it has
    no content, or ""."""

    ending: str
    member: Member
    broken: str = ""


@dataclass
class Group:
    """Members that belong together. others: what is neither audio that is wanted nor a caption."""

    key: str
    audio: list[Part] = field(default_factory=list)
    text: list[Part] = field(default_factory=list)
    others: list[Part] = field(default_factory=list)
    hint: str = ""
    """Of one that is incomplete, where the rest may be."""

    @property
    def is_pair(self) -> bool:
        """Whether it is clear which audio belongs to which caption."""
        return len(self.audio) == len(self.text) == 1

    @property
    def members(self) -> int:
        """How many there are."""
        return len(self.audio) + len(self.text) + len(self.others)


@dataclass
class Contents:
    """What an archive holds: samples; groups that are none, as they lack a member or have too many; and how
    many members are ignored, by what they are."""

    samples: list[Group] = field(default_factory=list)
    incomplete: list[Group] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def sort_out(members: Sequence[Member], source: Source) -> Contents:
    """Find the samples among the members of an archive.

    A sample's members are called alike up to the first dot, as WebDataset has it. Those that this leaves
    alone are put together in spite of another Unicode form, or by their last endings: names may hold dots.
    """
    wanted = _Wanted(source.audio and source.audio.lower().lstrip("."), text_endings(source))
    contents = Contents()
    by_key: dict[str, list[Part]] = {}
    for key, part in _parts(members, contents.ignored):
        by_key.setdefault(key, []).append(part)
    alone: dict[str, list[Part]] = {}
    incomplete: list[Group] = []
    for key, parts in by_key.items():
        group = wanted.group(key, parts)
        if group.is_pair:
            contents.samples.append(group)
        else:
            alone.setdefault(_composed(key), []).extend(parts)
    for parts in alone.values():
        for group in _put_together(parts, wanted):
            (contents.samples if group.is_pair else incomplete).append(group)
    for group in contents.samples:
        contents.ignored.update(f".{_last(part)} beside samples" for part in group.others)
    for group in incomplete:
        if group.audio or group.text:
            contents.incomplete.append(group)
        else:
            contents.ignored.update(f"neither audio nor caption (.{_last(part)})" for part in group.others)
    _add_hints(contents.incomplete)
    return contents


def problem_of(group: Group, source: Source) -> str:
    """Why a group cannot be a sample, "" if it can. Raises DataError for several audio members of which one
    must be chosen."""
    if not group.audio:
        there = ", .".join(part.ending for part in [*group.text, *group.others])
        return f"no audio member (there are .{there}){group.hint}"
    if not group.text:
        there = f" (but .{', .'.join(part.ending for part in group.others)})" if group.others else ""
        return f"no .{' or .'.join(text_endings(source))} member{there}{group.hint}"
    if len({part.ending for part in group.audio}) > 1:
        there = ", .".join(part.ending for part in group.audio)
        raise DataError(
            f"source {source.name}: sample {group.key!r} has several audio members (.{there}); say which one"
            f" to use: data.sources.{source.name}.audio={group.audio[0].ending}"
        )
    if not group.is_pair:
        return "the key occurs twice in this shard"
    (audio,), (text,) = group.audio, group.text
    if audio.broken or text.broken:
        return audio.broken or text.broken
    return "" if audio.member.size else "the audio is empty (0 bytes)"


def split(name: str) -> tuple[str, str]:
    """The key of a member, up to the first dot of its file name, and what comes after that dot."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending


def text_endings(source: Source) -> list[str]:
    """Endings of the member that holds a source's captions, in order of preference."""
    endings = [key.lower().lstrip(".") for key in source.caption_keys if key.startswith(".")]
    return endings or ["json"]


def _parts(members: Sequence[Member], ignored: Counter[str]) -> Iterator[tuple[str, Part]]:
    """The files that may be parts of samples, each with its key by the first dot; the others are counted."""
    links = _Links(members)
    for member in members:
        name = _utf8(member.name)
        key, ending = split(name)
        file = name[name.rfind("/") + 1 :]
        if member.kind not in LEADING_TO_FILES:
            ignored[member.kind.value] += 1
        elif OF_MACOS.search(name):
            ignored["left by macOS"] += 1
        elif file.startswith("."):
            ignored["hidden files"] += 1
        elif not ending:
            ignored["names without an ending"] += 1
        else:
            yield key, links.resolved(Part(ending.lower().rstrip(), member))


class _Links:
    """What the links of an archive point to."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members

    @cached_property
    def _by_name(self) -> dict[str, Member]:
        return {posixpath.normpath(member.name).lstrip("/"): member for member in self._members}

    @cached_property
    def _by_form(self) -> dict[str, Member]:
        return {_composed(name): member for name, member in self._by_name.items()}

    def resolved(self, part: Part) -> Part:
        """The part with the content that its link points to; a part that is no link as it is."""
        if part.member.kind is Kind.FILE:
            return part
        member = part.member
        for _ in range(FOLLOWED):
            target = self._target(member)
            if target is None or target.kind not in LEADING_TO_FILES:
                return part._replace(broken=_broken(part, NO_FILE))
            if target.kind is Kind.FILE:
                return part._replace(member=target._replace(name=part.member.name))
            member = target
        return part._replace(broken=_broken(part, "leads to itself"))

    def _target(self, member: Member) -> Member | None:
        """The member that a link points to, if it is in the archive: a hard link has its name, a symbolic one
        the way to it, or its path from the root, whose slash tar leaves out in names."""
        folder = posixpath.dirname(member.name) if member.kind is Kind.SYMBOLIC_LINK else ""
        name = posixpath.normpath(posixpath.join(folder, member.link))
        for _ in range(FOLLOWED):
            if found := self._named(name):
                return found
            if (through := self._through_folder(name)) is None:
                return None
            name = through
        return None

    def _named(self, name: str) -> Member | None:
        name = name.lstrip("/")
        return self._by_name.get(name) or self._by_form.get(_composed(name))

    def _through_folder(self, name: str) -> str | None:
        """A name with one of its folders, which is a link, replaced by what that points to; None if none
        is."""
        folder = posixpath.dirname(name)
        while folder not in ("", "/", ".", ".."):
            link = self._named(folder)
            if link and link.kind is Kind.SYMBOLIC_LINK:
                target = posixpath.join(posixpath.dirname(link.name), link.link)
                return posixpath.normpath(posixpath.join(target, posixpath.relpath(name, folder)))
            folder = posixpath.dirname(folder)
        return None


def _broken(part: Part, why: str) -> str:
    return f"its .{part.ending} is a link to {part.member.link!r}, which {why}"


@dataclass(frozen=True)
class _Wanted:
    """What a source takes of a sample. audio: the ending that it chooses; text: endings, in order of
    preference."""

    audio: str | None
    text: list[str]

    def group(self, key: str, parts: Sequence[Part]) -> Group:
        """Parts of one key, by what they are for this source."""
        group = Group(key)
        there = {part.ending for part in parts}
        text = next((ending for ending in self.text if ending in there), None)
        for part in parts:
            ending = part.ending
            if ending == text:
                group.text.append(part)
            elif self.audio in (None, ending) and ending[ending.rfind(".") + 1 :] in AUDIO_ENDINGS:
                group.audio.append(part)
            else:
                group.others.append(part)
        return group


def _put_together(parts: Sequence[Part], wanted: _Wanted) -> list[Group]:
    """Groups of parts whose keys by the first dot differ in their Unicode form at most.

    Each caption's name, without its ending, is a key, and `a.wav.json` is called as `a.json` where there is
    an `a.wav`; a part belongs to the longest key that it begins with. If no sample comes of that, all are one
    group.
    """
    names = [_composed(_utf8(part.member.name)) for part in parts]
    audio = {name for name in names if name.rpartition(".")[2].lower() in AUDIO_ENDINGS}
    names = [_without_middle(name, audio, wanted.text) for name in names]
    keys = {name[: -len(ending) - 1] for name in names for ending in wanted.text if _ends(name, ending)}
    by_key: dict[str, list[Part]] = {}
    for name, part in zip(names, parts, strict=True):
        dots = [place for place, character in enumerate(name) if character == "."]
        end = next((dot for dot in reversed(dots) if name[:dot] in keys), dots[-1])
        by_key.setdefault(name[:end], []).append(part._replace(ending=name[end + 1 :].lower()))
    groups = [wanted.group(key, of_key) for key, of_key in by_key.items()]
    if any(group.is_pair for group in groups):
        return groups
    key, _ = split(names[0])
    return [wanted.group(key, parts)]


def _without_middle(name: str, audio: Collection[str], endings: Sequence[str]) -> str:
    """The name of a caption as `a.json` where it is `a.wav.json`; other names as they are. audio: names."""
    for ending in endings:
        whole = name[: -len(ending) - 1]
        if _ends(name, ending) and whole in audio:
            return whole.rpartition(".")[0] + name[len(whole) :]
    return name


def _ends(name: str, ending: str) -> bool:
    return name.lower().endswith(f".{ending}")


def _add_hints(incomplete: Sequence[Group]) -> None:
    """Say of audio without a caption, and of captions without audio, where the other of that name is."""
    mute = {_alike(group): group for group in incomplete if not group.audio}
    for group in incomplete:
        other = None if group.text else mute.get(_alike(group))
        if other is not None:
            in_folder = posixpath.dirname(group.key) == posixpath.dirname(other.key)
            where = "in other capitals" if in_folder else "in another folder"
            group.hint = other.hint = f"; one of that name is there {where}"


def _alike(group: Group) -> str:
    """What the keys have in common of members that may belong together: all but folders and capitals."""
    return _composed(posixpath.basename(group.key)).casefold()


def _last(part: Part) -> str:
    """The last ending of a member."""
    return part.ending.rpartition(".")[2]


def _utf8(name: str) -> str:
    """A name that Arrow takes, which takes UTF-8 only, and that stays in one line."""
    if not name.isascii():
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], name) if CONTROL.search(name) else name


def _composed(name: str) -> str:
    """A name in the Unicode form that is usual but on macOS."""
    return unicodedata.normalize("NFC", name)
