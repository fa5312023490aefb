"""Other readers on the patches of `benchmarks.reading`, in an environment of their own.

    make peers && python -m benchmarks reading

Run by that environment's Python as ``peers.py NAME SLIDE ORIGINS THREADS``: it reads the 512 px
patches at the origins (.npy, int, shape (N, 2): x, y) twice and prints the seconds that the second
time took. The code is what each library's documentation shows for the purpose.
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SIDE = 512


def tiffslide(path: str, origins: list[tuple[int, int]], threads: int) -> Callable[[], int]:
    """`read_region` into an array, in threads."""
    from tiffslide import TiffSlide

    slide = TiffSlide(path)
    return _in_threads(
        lambda at: slide.read_region(at, 0, (SIDE, SIDE), as_array=True), origins, threads
    )


def tifffile(path: str, origins: list[tuple[int, int]], threads: int) -> Callable[[], int]:
    """Slices of its Zarr view, in threads."""
    import zarr
    from tifffile import imread

    level = zarr.open(imread(path, aszarr=True, level=0), mode="r")
    return _in_threads(
        lambda at: level[max(at[1], 0) : at[1] + SIDE, max(at[0], 0) : at[0] + SIDE],
        origins, threads,
    )  # fmt: skip


def cucim(path: str, origins: list[tuple[int, int]], threads: int) -> Callable[[], int]:
    """`read_region` of all places, by its own threads, on the CPU."""
    from cucim import CuImage

    slide = CuImage(path)

    def run() -> int:
        regions = slide.read_region(
            origins, (SIDE, SIDE), level=0, num_workers=threads, batch_size=1
        )
        return sum(np.asarray(region).size > 0 for region in regions)

    return run


def tiatoolbox(path: str, origins: list[tuple[int, int]], threads: int) -> Callable[[], int]:
    """Its extractor of patches at points, which are their centres; it has no threads."""
    import pandas as pd
    from tiatoolbox.tools.patchextraction import get_patch_extractor

    if threads > 1:
        raise SystemExit("its extractor has no threads")
    places = pd.DataFrame([(x + SIDE // 2, y + SIDE // 2, 0) for x, y in origins])
    places.columns = ["x", "y", "class"]
    extractor = get_patch_extractor(
        "point", input_img=Path(path), locations_list=places, patch_size=(SIDE, SIDE),
        resolution=0, units="level",
    )  # fmt: skip
    return lambda: sum(patch.size > 0 for patch in extractor)


PEERS = {found.__name__: found for found in (tiffslide, tifffile, cucim, tiatoolbox)}


def _in_threads(read: Callable, origins: list, threads: int) -> Callable[[], int]:
    def run() -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(region.size > 0 for region in pool.map(read, origins))

    return run


def main(name: str, path: str, origins: str, threads: str) -> None:
    """Time one peer."""
    places = [(int(x), int(y)) for x, y in np.load(origins)]
    run = PEERS[name](path, places, int(threads))
    run()  # imports and caches are warm, as those are that it is compared with
    started = time.perf_counter()
    assert run() == len(places)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main(*sys.argv[1:])
