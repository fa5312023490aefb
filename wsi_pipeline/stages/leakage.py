"""Who has seen which patient: what a model has learned from is neither validated nor tested on."""

import json
import logging
from collections.abc import Set
from pathlib import Path

import pandas as pd

from wsi_pipeline.errors import RunError
from wsi_pipeline.models.card import NAMED_WEIGHTS
from wsi_pipeline.slides.patients import same_patient_key

logger = logging.getLogger(__name__)


def learned_patients(card: dict) -> set[str]:
    """Patients that a model's weights come from: they cannot validate it."""
    patients = card["training"].get("patients", {})
    return {p for part in ("train", "hard_negatives", "earlier") for p in patients.get(part, [])}


def seen_patients(card: dict) -> set[str]:
    """Patients that a model's weights or epoch come from, now or earlier: they cannot test it."""
    return set().union(*card["training"].get("patients", {}).values())


def seen_slides(card: dict) -> set[str]:
    """Slides that a model was trained or validated on, whoever their patients were taken for."""
    return set().union(*card["training"].get("slides", {}).values())


def of_patients(slides: pd.DataFrame, patients: Set[str]) -> pd.Series:
    """Whether each slide's ``patient_id`` is one of `patients`, however either is spelled."""
    return slides["patient_id"].map(same_patient_key).isin(set(map(same_patient_key, patients)))


def shared_patients(some: Set[str], others: Set[str]) -> list[str]:
    """Those of `some` that `others` have too, in whatever spelling; sorted."""
    keys = set(map(same_patient_key, others))
    return sorted(patient for patient in some if same_patient_key(patient) in keys)


def refuse_leakage(card: dict, *, test: Set[str], test_slides: Set[str] = frozenset()) -> None:
    """Refuse to test a model on patients that it has seen, however they were spelled then.

    Slides that it has seen count too: one whose patient is known only now was its own patient.

    Raises
    ------
    RunError
        If there are any; the message names the first five.
    """
    if shared := sorted(seen_slides(card) & test_slides):
        raise RunError(
            f"slides {shared[:5]} of the test split were trained or validated on: the splits have"
            " changed since, so train again"
        )
    if shared := shared_patients(test, seen_patients(card)):
        raise RunError(
            f"patients {shared[:5]} of the test split were trained or validated on: the splits have"
            " changed since, so train again"
        )


def patients_of_weights(
    weights: str, *, test: Set[str], test_slides: Set[str] = frozenset()
) -> dict[str, list[str]]:
    """Patients that start weights have seen, as parts of a card; none of the test split.

    Parameters
    ----------
    weights : str
        ``train.weights``.
    test, test_slides : set of str
        Patients and slides of the test split: a slide whose patient is known only now was its own
        patient when the weights were trained.

    Returns
    -------
    dict
        ``earlier`` were learned from; ``earlier_validation`` only chose the epoch, and may again.

    Raises
    ------
    RunError
        If the weights' card is damaged, or they have seen a test patient or a test slide.
    """
    path, learned, seen = Path(weights).with_name("model.json"), set(), set()
    slides = set()
    if weights not in NAMED_WEIGHTS:
        try:
            card = json.loads(path.read_bytes())
            learned, seen, slides = learned_patients(card), seen_patients(card), seen_slides(card)
        except FileNotFoundError:
            logger.warning("%s: whose slides it has seen is not known: no %s", weights, path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{path}: no description of one of our models ({error!r}), so whose slides"
                f" {weights} has seen is not known: move it away to start from them nevertheless"
            ) from error
    if shared := shared_patients(test, seen):
        raise RunError(
            f"{weights}: the patients {shared[:5]} of the test split ({len(shared)} in all) trained"
            " or validated these weights: what starts from them cannot be tested on their slides;"
            " set train.weights to others, or move the patients to another split"
        )
    if shared := sorted(slides & test_slides):
        raise RunError(
            f"{weights}: these weights were trained or validated on slides of the test split, under"
            f" other patient ids: {shared[:5]} ({len(shared)} in all). Set train.weights to others,"
            " or move the patients to another split"
        )
    return {"earlier": sorted(learned), "earlier_validation": sorted(seen - learned)}
