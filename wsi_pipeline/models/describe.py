"""A model in words, for people: from its card and the header of its weights, without torch."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.card import OURS, ModelCard, read_card
from wsi_pipeline.models.model_folder import find_model

Section = tuple[str, list[tuple[str, str]]]
NAMES_SHOWN = 5
"""Slides or patients of a split that are named; the rest is counted."""
OUR_NETWORKS = {
    "vgg16": "VGG16's convolutions, global max pooling, one dense unit",
    "patchnet": "PatchNet: the mean over small patches",
    "cam": "the CAM network of the PatchNet paper",
    "vgg11": "the Grad-CAM network of the PatchNet paper",
}
FIGURES = {
    "slide_accuracy": "slide accuracy",
    "slide_roc_auc": "slide ROC AUC",
    "patch_roc_auc": "patch ROC AUC",
    "froc_corrected": "FROC score (corrected)",
}


def describe_model(path: str | Path) -> list[Section]:
    """What a model is, what it takes and gives, and where it comes from.

    Parameters
    ----------
    path : path-like
        Its folder.

    Returns
    -------
    list of (str, list of (str, str))
        Titles of sections, and their rows: a label and a text.

    Raises
    ------
    ModelError
        If it is not a model folder, or its card or weights cannot be read.
    """
    folder = find_model(path)
    card = read_card(folder)
    sections = [
        ("Model", _identity(folder, card)),
        ("Input", _input(card)),
        ("Output", _output(card)),
        ("Training", _training(card.training)),
        ("Evaluation", _evaluation(card.evaluation)),
        ("Made with", list(card.versions.items())),
    ]
    return [(title, rows) for title, rows in sections if rows]


def _identity(folder: Path, card: ModelCard) -> list[tuple[str, str]]:
    weights = folder / card.weights_file
    try:
        size = weights.stat().st_size
    except OSError as error:
        raise ModelError(f"{weights} cannot be read: {error}") from error
    return [
        ("name", card.name or folder.absolute().name),
        ("network", _network(card)),
        *[(f"argument {name}", str(value)) for name, value in card.arguments.items()],
        ("weights", f"{weights.name}, {size / 1e6:,.1f} MB{_count(weights)}"),
        ("SHA-256 of the weights", card.weights_sha256),
        *_origin(card.training),
    ]


def _network(card: ModelCard) -> str:
    if card.architecture in OURS:
        return f"{card.architecture}: {OUR_NETWORKS[card.architecture]}"
    if card.archived:
        return f"{card.architecture}: in the file of the weights, for inference alone"
    if card.architecture.startswith("timm:"):
        return f"{card.architecture}, with the lecture's head"
    return f"{card.architecture}: runs code of this Python environment"


def _count(weights: Path) -> str:
    """How many numbers a .safetensors file holds, from its header."""
    if weights.suffix != ".safetensors":
        return ""
    try:
        with weights.open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        numbers = sum(math.prod(of["shape"]) for name, of in header.items() if name[0] != "_")
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ModelError(f"{weights} is damaged: {error}") from error
    return f", {numbers:,} numbers"


def _origin(training: Mapping) -> list[tuple[str, str]]:
    rows = []
    if "imported_from" in training:
        rows.append(("imported from", str(training["imported_from"])))
    if "exported_from" in training:
        of = training["exported_from"]
        rows.append(("exported from", f"{of['architecture']}, weights {of['weights_sha256'][:12]}"))
    return rows


def _input(card: ModelCard) -> list[tuple[str, str]]:
    corrections = []
    if card.gamma is not None:
        corrections.append(f"gamma correction {card.gamma:g}")
    if card.shades_of_gray is not None:
        corrections.append(f"shades of gray, p = {card.shades_of_gray:g}")
    side_um = card.patch_px * card.mpp
    return [
        ("patches", f"{card.patch_px} x {card.patch_px} px ({side_um:,.4g} x {side_um:,.4g} um)"),
        ("resolution", f"{card.mpp:.4g} um per px"),
        ("mean of red, green, blue", _numbers(card.mean)),
        ("standard deviation", _numbers(card.std)),
        *([("colours", ", ".join(corrections))] if corrections else []),
        *[(f"tiling {name}", _plain(value)) for name, value in card.tiling.items()],
    ]


def _plain(value) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(of)}" for name, of in value.items())
    return "none" if value is None else str(value)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _output(card: ModelCard) -> list[tuple[str, str]]:
    column = card.output.tumour_class
    classes = "one value a patch" if column is None else f"classes; tumour is column {column}"
    slide, patch = card.thresholds.slide, card.thresholds.patch
    return [
        ("network returns", f"{card.output.kind}, {classes}"),
        ("slide threshold", _threshold(slide)),
        ("patch threshold", _threshold(patch)),
    ]


def _threshold(value: float | None) -> str:
    return "none: no evaluation has chosen one" if value is None else f"probability >= {value:.4g}"


def _training(training: Mapping) -> list[tuple[str, str]]:
    rows = []
    best = training.get("best") or {}
    if "epoch" in best:
        rows.append(("best epoch", str(best["epoch"])))
    for name, value in best.items():
        if name.startswith("validation_") and name != "validation_seconds":
            rows.append((name.replace("_", " "), f"{value:.4g}"))
    for of in ("slides", "patients"):
        for part, names in (training.get(of) or {}).items():
            if names:
                rows.append((f"{of}, {part.replace('_', ' ')}", _listed(names)))
    if "seed" in training:
        rows.append(("seed", str(training["seed"])))
    if not rows:
        rows.append(("slides", "not known: the model was not trained by this pipeline"))
    return rows


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:NAMES_SHOWN]))
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{len(names)}: {shown}{more}"


def _evaluation(evaluation: Mapping) -> list[tuple[str, str]]:
    if not evaluation:
        return []
    rows = [("run", str(evaluation.get("run", "")))]
    for name in ("slides", "tumour_slides", "patients", "validation_slides"):
        if name in evaluation:
            rows.append((name.replace("_", " "), str(evaluation[name])))
    for name, title in FIGURES.items():
        if found := evaluation.get(name):
            rows.append((title, _with_interval(found)))
    return rows


def _with_interval(found: Mapping) -> str:
    if found.get("value") is None:
        return "undefined"
    low, high = found.get("low"), found.get("high")
    interval = "" if low is None or high is None else f" (95 % interval {low:.3f} to {high:.3f})"
    return f"{found['value']:.3f}{interval}"
