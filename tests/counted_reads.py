"""Count the px that slides read, where they are decoded: in simplejpeg and in OpenSlide."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import openslide
import simplejpeg


class ReadPx:
    """What was read so far, by all threads.

    Attributes
    ----------
    decoded : list of int
        Px of each JPEG tile that was decoded without OpenSlide.
    asked : list of int
        Px of each region that OpenSlide returned.
    """

    def __init__(self):
        self.decoded: list[int] = []  # lists: threads append to them safely
        self.asked: list[int] = []

    @property
    def by_tiles(self) -> int:
        return sum(self.decoded)

    @property
    def by_openslide(self) -> int:
        return sum(self.asked)


@contextmanager
def counted_reads(slide=None) -> Iterator[ReadPx]:
    """Count within; the tiles of a slide given are compared with OpenSlide's beforehand."""
    if slide is not None:
        for level in range(len(slide.level_sizes)):
            slide.backend(level)
    found = ReadPx()
    decode, read_region = simplejpeg.decode_jpeg, openslide.OpenSlide.read_region

    def decode_and_count(*arguments, **options):
        pixels = decode(*arguments, **options)
        found.decoded.append(pixels.shape[0] * pixels.shape[1])
        return pixels

    def read_and_count(handle, location, level, size):
        region = read_region(handle, location, level, size)
        found.asked.append(size[0] * size[1])
        return region

    with (
        mock.patch.object(simplejpeg, "decode_jpeg", decode_and_count),
        mock.patch.object(openslide.OpenSlide, "read_region", read_and_count),
    ):
        yield found
