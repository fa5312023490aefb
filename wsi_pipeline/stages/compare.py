"""Two evaluations of the same slides, side by side: which figures differ by more than chance."""

import json
from pathlib import Path

import pandas as pd

from wsi_pipeline.errors import CatalogError, RunError
from wsi_pipeline.evaluation.cohort_hits import FROC_MODES, load_froc_hits
from wsi_pipeline.evaluation.patch_scores import read_scores
from wsi_pipeline.evaluation.uncertainty import REPLICATES, compare
from wsi_pipeline.evaluation.weighted_metrics import Statistic, binary_statistic, froc_statistic


def run(first: Path, second: Path, *, replicates: int = REPLICATES, seed: int = 0) -> dict:
    """Compare two evaluations by a paired bootstrap over patients.

    Parameters
    ----------
    first, second : Path
        Run directories, or where these hold evaluations of several models one of these:
        ``RUN/evaluation/NAME``.
    replicates, seed : int

    Returns
    -------
    dict
        For each of ``patch``, ``slide``, ``froc.lecture``, ``froc.official``, ``froc.corrected``
        what `wsi_pipeline.evaluation.uncertainty.compare` gives; or, where the two cannot be
        compared (patches of another size, say), ``refused``: why.

    Raises
    ------
    RunError
        If there is no evaluation, or nothing in the two can be compared.
    """
    folders = [evaluation_of(path) for path in (first, second)]
    slides = _slides(folders[0])
    patients = dict(zip(slides["slide_id"], slides["patient_id"], strict=True))
    one, other = (_statistics(folder) for folder in folders)
    found: dict[str, dict] = {}
    for name in one:
        try:
            found[name] = compare(
                one[name], other[name], patients, replicates=replicates, seed=seed
            )
        except (CatalogError, RunError) as error:
            found[name] = {"refused": str(error)}
    if all("refused" in part for part in found.values()):
        raise RunError(f"{first} and {second}: {found['slide']['refused']}")
    return found


def evaluation_of(path: Path) -> Path:
    """The evaluation that a path names: itself, or the only one of a run directory.

    Raises
    ------
    RunError
        If there is none, or several.
    """
    if (path / "metrics.json").is_file():
        return path
    found = sorted(file.parent for file in path.glob("evaluation/*/metrics.json"))
    if len(found) != 1:
        several = ": name one of " + ", ".join(map(str, found)) if found else ""
        raise RunError(f"{path}: it holds {len(found)} evaluations, not one{several}")
    return found[0]


def figure_name(part: str, name: str) -> str:
    """A figure's name for a reader: "patch roc_auc", "froc.lecture at 0.25"."""
    return f"{part} at {name}" if part.startswith("froc") and name != "score" else f"{part} {name}"


def cells(row: dict) -> list[str]:
    """A compared figure as text: first, second, difference, interval, p."""

    def text(value):
        return "undefined" if value is None else f"{value:.3f}"

    ends = "undefined" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    return [
        *(text(row[name]) for name in ("first", "second", "difference")),
        ends,
        text(row["p_value"]),
    ]


def _slides(folder: Path) -> pd.DataFrame:
    slides = pd.read_csv(folder / "slides.csv", dtype={"slide_id": str, "patient_id": str})
    return slides[slides["split"] == "test"]


def _statistics(folder: Path) -> dict[str, Statistic]:
    metrics, slides = json.loads((folder / "metrics.json").read_text()), _slides(folder)
    patches = read_scores(folder, slides["slide_id"].tolist())
    return {
        "patch": binary_statistic(patches, metrics["patch"]["threshold"], "patches"),
        "slide": binary_statistic(slides, metrics["slide"]["threshold"], "slides"),
        **{
            f"froc.{mode}": froc_statistic(
                load_froc_hits(folder / "froc", mode),
                [float(point) for point in metrics["froc"][mode]["sensitivity_at"]],
            )
            for mode in FROC_MODES
        },
    }
