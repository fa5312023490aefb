"""What an evaluation leaves in the model's card: its thresholds, and the figures that matter."""

import json
from dataclasses import replace
from pathlib import Path

from wsi_pipeline.models.card import Thresholds, read_card, write_card


def record_evaluation(model: Path, evaluation: Path, run: str) -> None:
    """Write an evaluation's thresholds and main figures in a model's card.

    The slide threshold is kept only if validation slides chose it.

    Parameters
    ----------
    model, evaluation : Path
        Folders of the model and of its evaluation, with ``metrics.json``.
    run : str
        Name of the evaluated run.

    Raises
    ------
    ModelError
        If the card is missing or damaged.
    """
    metrics = json.loads((evaluation / "metrics.json").read_text())
    slide, cohort = metrics["slide"], metrics["cohort"]
    chosen = slide["threshold"] if slide["threshold_from"] == "validation" else None
    counts = ("slides", "tumour_slides", "patients", "validation_slides")
    figures = {
        "slide_accuracy": (slide, "accuracy"),
        "slide_roc_auc": (slide, "roc_auc"),
        "patch_roc_auc": (metrics["patch"], "roc_auc"),
        "froc_corrected": (metrics["froc"]["corrected"], "score"),
    }
    card = replace(
        read_card(model),
        thresholds=Thresholds(slide=chosen, patch=metrics["patch"]["threshold"]),
        evaluation={
            "run": run,
            **{name: cohort[name] for name in counts},
            **{name: _with_interval(of, key) for name, (of, key) in figures.items()},
        },
    )
    write_card(model, card)


def _with_interval(metrics: dict, key: str) -> dict:
    """A figure and the ends of its 95 % interval; None where undefined."""
    interval = metrics["intervals"][key]
    return {"value": metrics[key], "low": interval["low"], "high": interval["high"]}
