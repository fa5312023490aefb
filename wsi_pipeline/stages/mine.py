"""Hard negatives: what a model took for tumour, to be drawn more often in another training.

They come from the validation split, of a share of its patients. The next training takes these
patients out of its own validation (see the train stage), and so does the choice of the slide
threshold: nothing is validated on what was trained on. The test split is never touched.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from wsi_pipeline.config import Config
from wsi_pipeline.errors import RunError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.heatmaps.store import open_heatmap
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.slides.splits import assign_splits
from wsi_pipeline.stages.leakage import learned_patients, of_patients
from wsi_pipeline.stages.run_directory import (
    heatmap_folder,
    index_path,
    mined_path,
    model_id,
    read_model_card,
    tiled_slides,
)


def run(config: Config) -> tuple[Path, pd.DataFrame]:
    """Write ``RUN/mined/NAME.parquet``: ``slide_id, x, y`` (level-0 px) and ``score``.

    A patch without tumour is mined from ``mine.min_probability`` on, the highest first, up to
    ``mine.count``. Those beside a patch with tumour are left out: an outline drawn by hand is not
    exact, and what lies next to it may well be tumour.

    Returns
    -------
    Path, DataFrame
        The file, and what is in it.

    Raises
    ------
    RunError
        If the validation slides have no heatmaps of the model, too few patients to leave some
        for validation, or no false positive.
    """
    settings, name = config.mine, config.train.name
    card = read_model_card(config.out, name)
    slides = tiled_slides(config.out, ["validation"])
    slides = slides[~of_patients(slides, learned_patients(card))]
    if slides.empty:
        raise RunError(
            f"no validation slide of {config.out} is left to mine: {name} has learned from all of"
            " their patients"
        )
    shares = {"mined": settings.patients, "kept": 1 - settings.patients}
    part = assign_splits(slides.assign(split=pd.NA), shares, config.seed)["split"]
    if not slides.loc[part == "kept", "label"].eq(1).any() or not (part == "mined").any():
        raise RunError(
            f"the validation split is too small (slides: {len(slides)}, patients:"
            f" {slides['patient_id'].nunique()}): with {settings.patients:g} of the patients mined,"
            " none is mined or none with tumour is left to validate another training with; change"
            " mine.patients, or give the validation split more patients"
        )
    tables = [
        _false_positives(config, slide_id, model_id(name, card["weights_sha256"]))
        for slide_id in slides.loc[part == "mined", "slide_id"]
    ]
    table = pd.concat(tables, ignore_index=True)
    table = table.sort_values(["score", "slide_id", "y", "x"], ascending=[False, True, True, True])
    table = table.head(settings.count).reset_index(drop=True)
    if table.empty:
        raise RunError(
            f"no patch without tumour of the {len(tables)} mined slides has a probability of"
            f" {settings.min_probability:g} or more: there is nothing to mine; lower"
            " mine.min_probability"
        )
    path = mined_path(config.out, name)
    path.parent.mkdir(exist_ok=True)
    with replace_atomically(path) as part_file:
        table.to_parquet(part_file, index=False)
    return path, table


def _false_positives(config: Config, slide_id: str, model: str) -> pd.DataFrame:
    path = heatmap_folder(config.out, config.train.name) / f"{slide_id}.zarr"
    index, heatmap = read_index(index_path(config.out, slide_id)), open_heatmap(path)
    if heatmap.model != model or heatmap.grid != index.grid:
        raise RunError(
            f"{path}: made by {heatmap.model}, or from other patches: run the heatmap stage again"
        )
    x, y, label = (index.table[column].to_numpy() for column in ("x", "y", "label"))
    score = heatmap.at(x, y)
    rows, cols = index.cells()
    tumour = np.zeros(index.grid.shape, bool)
    tumour[rows[label == 1], cols[label == 1]] = True
    beside = ndimage.binary_dilation(tumour, np.ones((3, 3)))[rows, cols]
    chosen = (label == 0) & ~beside & (score >= config.mine.min_probability)
    return pd.DataFrame(
        {"slide_id": slide_id, "x": x[chosen], "y": y[chosen], "score": score[chosen]}
    )
