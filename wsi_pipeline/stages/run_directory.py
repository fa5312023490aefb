"""Where the files of a run lie, and the slides that each stage hands to the next."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from wsi_pipeline.errors import RunError

SLIDE_COLUMNS = (
    "slide_id", "path", "annotation", "patient_id", "split",
    "label", "mpp", "width", "height", "status",
)  # fmt: skip
MASK_COLUMNS = ("tissue", "exclude")
"""Of slides that have masks made elsewhere; a catalog need not have these columns."""
FINE_STAGES = ("fine_predict", "fine", "fine_pictures")
"""What the record calls the fine stage's work on slabs, on slides and on pictures. No hyphen: it
parts a stage's name from its model's, see `of_model`."""

CACHE_STAGES = ("cache_shards", "cache")
"""The same of the cache stage's work on shards and on slides."""
TRAINING_SPLITS = ("train", "validation")

TISSUE_PAGE = "index.html"
"""In the folder of the tissue masks' pictures."""

EXPLANATIONS_PAGE = "index.html"
"""In the folder of a model's explanations."""

PREDICTIONS_PAGE = "index.html"
"""In the folder of a model's predictions."""
PRECISION_STAGES = ("precision", "fine_precision")
"""The same of the comparison of bfloat16 with float32, of heatmaps and of fine heatmaps."""
EXPLAIN_STAGES = ("explain", "panels", "rank", "trust")
"""What the record calls the explain stage's work: maps, pictures, and the two checks of methods."""


def slides_path(run_dir: Path) -> Path:
    """Where the catalog lies."""
    return Path(run_dir) / "slides.parquet"


def notes_path(run_dir: Path) -> Path:
    """Where the notes lie that are of the whole catalog: a line each."""
    return Path(run_dir) / "notes.txt"


def catalog_notes(run_dir: Path) -> list[str]:
    """What the catalog stage noted of all slides together; none where it has not run."""
    path = notes_path(run_dir)
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def check_path(run_dir: Path) -> Path:
    """Where what the check found lies."""
    return Path(run_dir) / "check.csv"


def index_path(run_dir: Path, slide_id: str) -> Path:
    """Where a slide's patch index lies."""
    return Path(run_dir) / "patches" / f"{slide_id}.parquet"


def precision_path(run_dir: Path) -> Path:
    """Where it lies which precision was decided where the settings say null."""
    return Path(run_dir) / "precision.json"


def tissue_folder(run_dir: Path) -> Path:
    """Where the tissue masks' pictures lie: ``SLIDE.jpg``, and the page that shows them."""
    return Path(run_dir) / "tissue"


def cache_path(run_dir: Path, slide_id: str) -> Path:
    """Where a slide's cached patches lie."""
    return Path(run_dir) / "cache" / f"{slide_id}.zarr"


def model_folder(run_dir: Path, name: str) -> Path:
    """Where a model lies."""
    return Path(run_dir) / "models" / name


def of_model(stage: str, name: str) -> str:
    """What the record calls a stage's work with one model: models do not undo each other's."""
    return f"{stage}-{name}"


def model_id(name: str, weights_sha256: str) -> str:
    """What a heatmap calls its model: name and weights."""
    return f"{name}@{weights_sha256[:12]}"


def read_model_card(run_dir: Path, name: str) -> dict:
    """Read ``model.json`` without the libraries that the model itself needs.

    Raises
    ------
    RunError
        If it is missing or no JSON.
    """
    path = model_folder(run_dir, name) / "model.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path} does not exist: run `wsi train` first, or see train.name") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: no readable model description: {error}") from error


def heatmap_folder(run_dir: Path, name: str) -> Path:
    """Where the heatmaps of a model lie."""
    return Path(run_dir) / "heatmaps" / name


def fine_folder(run_dir: Path, name: str) -> Path:
    """Where the fine heatmaps of a PatchNet lie."""
    return Path(run_dir) / "fine" / name


def mined_path(run_dir: Path, name: str) -> Path:
    """Where the hard negatives of a model lie."""
    return Path(run_dir) / "mined" / f"{name}.parquet"


def evaluation_folder(run_dir: Path, name: str) -> Path:
    """Where the report on a model lies."""
    return Path(run_dir) / "evaluation" / name


def prediction_folder(run_dir: Path, name: str) -> Path:
    """Where the table and the page of a model's predictions lie."""
    return Path(run_dir) / "predictions" / name


def export_folder(run_dir: Path, name: str) -> Path:
    """Where the exports of a model's heatmaps lie, unless another folder is given."""
    return Path(run_dir) / "export" / name


def explanation_folder(run_dir: Path, name: str) -> Path:
    """Where the explanations of a model lie."""
    return Path(run_dir) / "explanations" / name


def explanations_link(name: str) -> str:
    """Where the page of a model's explanations lies, seen from the folder of its evaluation."""
    return f"../../explanations/{name}/{EXPLANATIONS_PAGE}"


def read_slides(run_dir: Path, splits: Sequence[str] | None = None) -> pd.DataFrame:
    """Read the catalog's slides that could be opened, of the given splits.

    Returns
    -------
    pandas.DataFrame
        Columns `SLIDE_COLUMNS` and `MASK_COLUMNS`; ``annotation``, ``tissue`` and ``exclude`` are
        None where there is none.

    Raises
    ------
    RunError
        If there is no catalog, or it lacks columns.
    """
    path = slides_path(run_dir)
    if not path.is_file():
        raise RunError(f"{path} does not exist: run the tile stage first")
    frame = pd.read_parquet(path)
    if missing := set(SLIDE_COLUMNS) - set(frame.columns):
        raise RunError(f"{path} lacks the columns {sorted(missing)}: it is no catalog of slides")
    frame = frame[frame["status"] == "ok"].copy()
    for column in ("annotation", *MASK_COLUMNS):
        if column not in frame:
            frame[column] = None
        frame[column] = frame[column].astype(object).where(frame[column].notna(), None)
    return frame if splits is None else frame[frame["split"].isin(splits)]


def tiled_slides(run_dir: Path, splits: Sequence[str]) -> pd.DataFrame:
    """Read the slides of the given splits that have a patch index, ordered by slide id.

    Raises
    ------
    RunError
        If there is none.
    """
    slides = read_slides(run_dir, splits)
    tiled = [index_path(run_dir, slide_id).is_file() for slide_id in slides["slide_id"]]
    if not any(tiled):
        raise RunError(
            f"{run_dir}: none of the {len(slides)} readable slides of the split"
            f" {' or '.join(splits)} is tiled: run the tile stage, or look at"
            " catalog.split and the catalog's split column"
        )
    return slides[tiled].sort_values("slide_id")
