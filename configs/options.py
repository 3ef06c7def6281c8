"""Options of Slurm's commands, read as getopt reads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple


class Option(NamedTuple):
    """The words that it is written as, its long name, its value."""

    words: tuple[str, ...]
    name: str
    value: str

    @property
    def written(self) -> str:
        """As people see it."""
        return " ".join(self.words)


class NotAnOption(ValueError):
    """A word that is neither an option nor the value of one."""


class Options:
    """The options of a command. table: long name, `/` and short one, and `=` where it takes the word after
    it; decided: long names of those that are refused alike, so that it need not be clear which one is
    meant."""

    def __init__(self, command: str, table: str, decided: Collection[str]) -> None:
        entries = re.findall(r"([a-z-]+)/?([a-zA-Z]?)(=?)(?:\s|$)", table)
        self.command = command
        self.long = [name for name, _, _ in entries]
        self._short = {letter: name for name, letter, _ in entries if letter}
        self._takes_a_word = {name for name, _, takes in entries if takes}
        self._decided = set(decided)

    def read(self, given: Iterable[str]) -> Iterator[Option]:
        """The options that words stand for. Raises NotAnOption."""
        left = list(given)
        while left:
            word = left.pop(0)
            if not re.match("-[^-]|--[^-]", word):
                raise NotAnOption(f"{word!r}: not an option of {self.command}")
            for name, value in self._names(word):
                is_foreign = name not in self.long and word.startswith("--")  # of a plugin of the site
                takes_it = name in self._takes_a_word or (is_foreign and left[:1] and left[0][:1] != "-")
                words: tuple[str, ...] = (word,)
                if value is None and left and takes_it:
                    value = left.pop(0)
                    words = (word, value)
                yield Option(words, name, value or "")

    def _names(self, word: str) -> Iterator[tuple[str, str | None]]:
        """The options that a word stands for: a long one, maybe its beginning only, or short ones in a row,
        the last of which may have its value in the same word."""
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            meant = [long for long in self.long if long.startswith(name)]
            is_clear = name not in meant and (len(meant) == 1 or set(meant) <= self._decided)
            yield meant[0] if meant and is_clear else name, value if equals else None
            return
        for at, letter in enumerate(word[1:], 2):
            name = self._short.get(letter, letter)
            if name in self._takes_a_word:
                yield name, word[at:] or None
                return
            yield name, ""
