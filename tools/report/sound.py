"""What there is to hear and see of a clip, small enough for a page: an MP3 and a picture of its log-mels."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from posixpath import basename
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from PIL import Image

from configs.errors import DataError, ShardError
from configs.run.predictions import Prediction
from data.decode import SAMPLE_RATE, BadSample, decode
from data.location import Location
from data.storage import read
from data.tar import BLOCK
from trainer.picture import palette, picture

THREADS = 8
"""Clips at a time: most of the time is waited for storage."""
AT_ONCE = 32
"""Clips that are read before it is seen whether more have room."""
COLOURS = 16
PLAIN_NAME = re.compile(r"[ -~]{1,98}")
"""Names that stand in a tar header as they are; of others it may hold a part."""


@dataclass(frozen=True)
class Media:
    """audio, picture: as data URLs; silent: why there are none."""

    audio: str = ""
    picture: str = ""
    silent: str = ""

    @property
    def size(self) -> int:
        """Bytes of a page."""
        return len(self.audio) + len(self.picture)


class Recordings:
    """Reads clips from their shards. What fails costs the clips that it is about, and is told in
    `failures`."""

    def __init__(self, options: Mapping[str, dict[str, Any]]) -> None:
        """options: `storage_options` by source."""
        self._options = {source: json.dumps(value, sort_keys=True) for source, value in options.items()}
        self._broken: set[str] = set()
        self.failures: list[str] = []
        """Of shards, in full: with their URLs, which are not for the page."""

    def media(self, predictions: Sequence[Prediction], most: int) -> Iterator[Media]:
        """What there is of each clip, until it is `most` bytes altogether."""
        left = most
        with ThreadPoolExecutor(THREADS) as pool:
            for first in range(0, len(predictions), AT_ONCE):
                for media in pool.map(self._media, predictions[first : first + AT_ONCE]):
                    left -= media.size
                    if left < 0:
                        return
                    yield media

    def _media(self, prediction: Prediction) -> Media:
        try:
            audio, ending = self._read(prediction), prediction.sound.ending
            waveform = decode(audio, ending, lambda seconds: _heard(seconds, prediction))
        except BadSample as error:
            return Media(silent=str(error))
        return Media(audio=_audio(waveform), picture=_picture(waveform))

    def _read(self, prediction: Prediction) -> bytes:
        """The file of a clip. Raises BadSample if its shard cannot be read or holds another one there."""
        sound = prediction.sound
        location = Location(sound.url, self._options.get(prediction.source, "{}"))
        folder = sound.url.rpartition("/")[0]
        why = f"{location.name} could not be read when this page was made"
        if self._broken & {sound.url, folder}:
            raise BadSample(why)
        try:
            content = read(location, sound.start - BLOCK, sound.end)
        except (DataError, ShardError) as error:
            # After minutes of waiting: what lies beside it is as far away.
            is_away = isinstance(error, ShardError) and not location.is_local
            place = folder if is_away else sound.url
            if place not in self._broken:  # else another thread has met it, too
                self._broken.add(place)
                self.failures.append(str(error))
            raise BadSample(why) from None
        _check_header(content[:BLOCK], prediction)
        return content[BLOCK:]


def _check_header(header: bytes, prediction: Prediction) -> None:
    """Raise BadSample if another file lies where a clip should be, as in a shard that was packed again."""
    sound = prediction.sound
    shard, _, key = prediction.key.partition("/")[2].partition("/")
    key = basename(key)
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        member = tarfile.TarInfo()
    name = basename(member.name)
    is_whole = PLAIN_NAME.fullmatch(member.name) and PLAIN_NAME.fullmatch(key) and "?" not in name
    if member.size != sound.end - sound.start or (is_whole and not name.startswith(f"{key}.")):
        there = f"holds {name} there" if name else "holds no file there"
        raise BadSample(f"{shard} {there} now: was it packed again?")


def _heard(seconds: float, prediction: Prediction) -> tuple[float, float] | None:
    """The stretch of a recording that the model has heard (start, length), None where that is all of it."""
    if seconds <= prediction.seconds + 0.1:
        return None
    return prediction.sound.begins, prediction.seconds


def _audio(waveform: npt.NDArray[np.int16]) -> str:
    """As MP3, which every browser plays; older Safaris play no Ogg."""
    file = io.BytesIO()
    soundfile.write(
        file,
        waveform,
        SAMPLE_RATE,
        format="MP3",
        subtype="MPEG_LAYER_III",
        bitrate_mode="VARIABLE",
        compression_level=0.5,
    )
    return _data_url("audio/mpeg", file.getvalue())


def _picture(waveform: npt.NDArray[np.int16]) -> str:
    """A PNG of the clip's log-mel spectrogram."""
    image = Image.fromarray(picture(torch.from_numpy(waveform), COLOURS))
    image.putpalette(palette(COLOURS).tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True, bits=4)
    return _data_url("image/png", file.getvalue())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
