"""Who has seen which patient: what a model has learned from is neither validated nor tested on."""

import json
import logging
from pathlib import Path

from wsi_pipeline.errors import RunError

logger = logging.getLogger(__name__)


def learned_patients(card: dict) -> set[str]:
    """Patients that a model's weights come from: they cannot validate it."""
    patients = card["training"].get("patients", {})
    return {p for part in ("train", "hard_negatives", "earlier") for p in patients.get(part, [])}


def seen_patients(card: dict) -> set[str]:
    """Patients that a model's weights or epoch come from, now or earlier: they cannot test it."""
    return set().union(*card["training"].get("patients", {}).values())


def refuse_leakage(card: dict, *, test: set[str]) -> None:
    """Refuse to test a model on patients that it has seen.

    Raises
    ------
    RunError
        If there are any; the message names the first five.
    """
    if shared := sorted(seen_patients(card) & test):
        raise RunError(
            f"patients {shared[:5]} of the test split were trained or validated on: the splits have"
            " changed since, so train again"
        )


def patients_of_weights(weights: str, *, test: set[str]) -> dict[str, list[str]]:
    """Patients that start weights have seen, as parts of a card; none of the test split.

    Parameters
    ----------
    weights : str
        ``train.weights``.
    test : set of str
        Patients of the test split.

    Returns
    -------
    dict
        ``earlier`` were learned from; ``earlier_validation`` only chose the epoch, and may again.

    Raises
    ------
    RunError
        If the weights' card is damaged, or they have seen a test patient.
    """
    path, learned, seen = Path(weights).with_name("model.json"), set(), set()
    if weights not in ("imagenet", "none"):
        try:
            card = json.loads(path.read_bytes())
            learned, seen = learned_patients(card), seen_patients(card)
        except FileNotFoundError:
            logger.warning("%s: whose slides it has seen is not known: no %s", weights, path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{path}: no description of one of our models ({error!r}), so whose slides"
                f" {weights} has seen is not known: move it away to start from them nevertheless"
            ) from error
    if shared := sorted(seen & test):
        raise RunError(
            f"{weights}: the patients {shared[:5]} of the test split ({len(shared)} in all) trained"
            " or validated these weights: what starts from them cannot be tested on their slides;"
            " set train.weights to others, or move the patients to another split"
        )
    return {"earlier": sorted(learned), "earlier_validation": sorted(seen - learned)}
