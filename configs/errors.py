"""Errors that a user can act on: one paragraph (what, where, what to do) and an exit code. A traceback is for
bugs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn

from configs.disk import words_of_disk
from configs.run.causes import Cause
from configs.streams import open_streams, speak_utf8


class ExitCode(IntEnum):
    """Exit codes of `launch train` and of a single rank; anything else is a crash."""

    FINISHED = 0
    USAGE = 2
    """Bad usage or configuration."""
    DATA = 3
    """Bad data or credentials."""
    SAVED = 85
    """Saved, and wants to go on: start the same command again."""


class EarwitnessError(Exception):
    """A failure with a message for the user; `exit_code` is what the process ends with, `cause` what the
    ledger is told if it ends a rank."""

    exit_code: int = 1
    cause: Cause = Cause.ERROR


class ConfigError(EarwitnessError):
    """The configuration or the command line is wrong."""

    exit_code = ExitCode.USAGE
    cause = Cause.BAD_INPUT


class DataError(EarwitnessError):
    """The data, or the access to them, is wrong; trying again would not help."""

    exit_code = ExitCode.DATA
    cause = Cause.BAD_INPUT


class UnusableData(DataError):
    """Too little of the data that were read can be used."""

    cause = Cause.UNUSABLE_DATA


class PeerFailed(EarwitnessError):
    """Another rank failed, and says why; this one only leaves."""

    cause = Cause.LOST_PEER


class CannotMeet(EarwitnessError):
    """This rank does not find the others at the start."""

    cause = Cause.LOST_PEER


class UnfitNode(EarwitnessError):
    """A node cannot take part; `node` is its name."""

    cause = Cause.UNFIT_NODE

    def __init__(self, node: str, message: str) -> None:
        super().__init__(message)
        self.node = node


class ShardError(EarwitnessError):
    """A shard could not be read although it should be there; a later attempt may succeed."""


class CheckpointError(EarwitnessError):
    """A checkpoint could not be written or read."""


def run_command(command: Callable[[], object]) -> NoReturn:
    """Run a command-line program: an EarwitnessError, and what a disk refuses, becomes a paragraph on stderr
    and an exit code."""
    speak_utf8()
    open_streams()
    try:
        try:
            command()
        finally:
            sys.stdout.flush()
    except EarwitnessError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        words = words_of_disk(error)
        if not words:
            raise
        print(f"error: {words}", file=sys.stderr)
        sys.exit(1)
    sys.exit(ExitCode.FINISHED)
