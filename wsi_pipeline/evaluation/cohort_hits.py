"""One slide's detections against its lesions, as files: what FROC on detections is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import shapely

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.detection_hits import SlideHits, detection_froc_hits, detection_hits
from wsi_pipeline.evaluation.detections import COLUMNS, read_detections
from wsi_pipeline.evaluation.evaluation_mask import EvaluationMask, Mode, evaluation_mask
from wsi_pipeline.evaluation.froc import FrocHits
from wsi_pipeline.evaluation.lesion_pixels import (
    OFFICIAL_LEVEL,
    raster_downsample,
    rasterise,
    read_mask,
)
from wsi_pipeline.evaluation.lesions import LESION_COLUMNS, annotated_lesions, mask_lesions
from wsi_pipeline.files import replace_atomically

MODES: tuple[Mode, ...] = ("official", "corrected")
FROC_MODES = ("lecture", *MODES)
NO_LESIONS = pd.DataFrame(
    {name: pd.Series(dtype=kind) for name, kind in {"slide_id": object, **LESION_COLUMNS}.items()}
)
NO_DETECTIONS = pd.DataFrame(
    {"slide_id": pd.Series(dtype=object), **dict.fromkeys(COLUMNS, pd.Series(dtype="float64"))}
)


def write_hits(
    folder: Path,
    slide_id: str,
    detections: pd.DataFrame,
    *,
    size: tuple[int, int],
    mpp: float,
    labels: Mapping[str, int],
    truth: Sequence[shapely.Polygon] | Path,
) -> int:
    """Write ``SLIDE.MODE.npz`` for both modes and ``SLIDE.lesions.parquet``.

    Parameters
    ----------
    folder : Path
    slide_id : str
    detections : DataFrame
        ``probability, x, y`` (level-0 px).
    size : (int, int)
        Width and height of the slide, level-0 px.
    mpp : float
        Micrometres per level-0 px.
    labels : mapping
        For each mode whether it takes the slide for a tumour slide (1) or not (0).
    truth : sequence of shapely.Polygon, or Path
        The lesions, level-0 px, or the challenge's mask TIFF of them.

    Returns
    -------
    int
        Number of lesions in the table.

    Raises
    ------
    RunError
        If a detection lies off the slide, or a mask cannot be read or does not fit the slide.
    """
    hits, masks = {}, {}
    lesions, pixels = ((), _mask_pixels(truth, size)) if isinstance(truth, Path) else (truth, None)
    for mode in MODES:
        if labels[mode]:
            masks[mode] = _mask(lesions, pixels, size, mpp, mode)
        probability, x, y = (detections[c].to_numpy() for c in ("probability", "x", "y"))
        hits[mode] = detection_hits(
            slide_id, probability, x, y, masks.get(mode), mode=mode, size_level0=size
        )
        with (
            replace_atomically(_hits_path(folder, slide_id, mode)) as part,
            part.open("wb") as file,
        ):
            np.savez_compressed(file, **asdict(hits[mode]))
    mask = masks.get("corrected") or _mask((), None, size, mpp, "corrected")
    table = (
        annotated_lesions(lesions, mpp, mask, hits["corrected"])
        if pixels is None
        else mask_lesions(pixels, mpp, mask, hits["corrected"])
    )
    with replace_atomically(_lesions_path(folder, slide_id)) as part:
        table.assign(slide_id=slide_id).to_parquet(part, index=False)
    return len(table)


def _mask(truth, pixels, size, mpp: float, mode: Mode) -> EvaluationMask:
    official = mode == "official"
    if pixels is not None:
        return evaluation_mask(pixels, 2**OFFICIAL_LEVEL, mpp, mode)
    downsample = 2**OFFICIAL_LEVEL if official else raster_downsample(mpp)
    drawn = rasterise(truth, size, downsample, keep_thin=not official)
    return evaluation_mask(drawn, downsample, mpp, mode)


def _mask_pixels(path: Path, size: tuple[int, int]) -> np.ndarray:
    pixels = read_mask(path)
    wanted = [side / 2**OFFICIAL_LEVEL for side in size]
    if max(abs(a - b) for a, b in zip(pixels.shape[::-1], wanted, strict=True)) > 1:
        raise RunError(
            f"{path}: at level {OFFICIAL_LEVEL} it has {pixels.shape[1]} x {pixels.shape[0]} px,"
            f" but its slide of {size[0]} x {size[1]} px would have {wanted[0]:g} x {wanted[1]:g}"
        )
    return pixels


def cohort_hits(folder: Path, slide_ids: Sequence[str], mode: Mode) -> FrocHits:
    """Join what `write_hits` wrote for the slides of a cohort."""
    return detection_froc_hits(mode, [_read(folder, slide_id, mode) for slide_id in slide_ids])


def _read(folder: Path, slide_id: str, mode: Mode) -> SlideHits:
    with np.load(_hits_path(folder, slide_id, mode)) as arrays:
        return SlideHits(
            **{
                name: arrays[name].item() if arrays[name].ndim == 0 else arrays[name]
                for name in arrays
            }
        )


def save_froc_hits(folder: Path, hits: FrocHits) -> None:
    """Write ``MODE.npz``."""
    with replace_atomically(folder / f"{hits.mode}.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **vars(hits))


def load_froc_hits(folder: Path, mode: str) -> FrocHits:
    """Read what `save_froc_hits` wrote."""
    with np.load(folder / f"{mode}.npz") as arrays:
        values = {name: arrays[name] for name in arrays}
    return FrocHits(**values | {"mode": mode, "slide_ids": tuple(values["slide_ids"].tolist())})


def cohort_lesions(folder: Path, slide_ids: Sequence[str]) -> pd.DataFrame:
    """The lesion tables of the slides of a cohort, one below the other."""
    tables = [pd.read_parquet(_lesions_path(folder, slide_id)) for slide_id in slide_ids]
    return pd.concat([NO_LESIONS, *tables], ignore_index=True)


def false_positives(
    folder: Path, slide_ids: Sequence[str], detections: Mapping[str, Path]
) -> pd.DataFrame:
    """Detections, read from each slide's CSV, that hit no lesion in the corrected mode.

    Returns
    -------
    DataFrame
        ``slide_id, probability, x, y``, the most confident first.
    """
    tables = [
        read_detections(detections[slide_id])[_read(folder, slide_id, "corrected").hit == 0].assign(
            slide_id=slide_id
        )
        for slide_id in slide_ids
    ]
    table = pd.concat([NO_DETECTIONS, *tables], ignore_index=True)
    return table.sort_values("probability", ascending=False, kind="stable", ignore_index=True)


def _hits_path(folder: Path, slide_id: str, mode: str) -> Path:
    return folder / f"{slide_id}.{mode}.npz"


def _lesions_path(folder: Path, slide_id: str) -> Path:
    return folder / f"{slide_id}.lesions.parquet"
