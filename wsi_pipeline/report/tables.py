"""What the report says of a cohort, as counts and tables: slides, lesions, the scores' distance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd

VERDICTS: dict[tuple[int, bool | None], str] = {
    (1, True): "found",
    (1, False): "missed",
    (0, True): "false alarm",
    (0, False): "correctly negative",
}
MISTAKES = ("missed", "false alarm")
READING_ORDER = (*MISTAKES, "not evaluated", "found", "correctly negative")


@dataclass(frozen=True)
class SlidePanel:
    """A slide in the report.

    Parameters
    ----------
    slide_id : str
    patient_id : str
    split : "validation" or "test"
    label : int
        1 tumour, 0 no tumour, -1 unknown.
    score : float
        The largest probability of its patches; -inf: it has none, NaN: none could be scored.
    called : bool or None
        Whether it is called positive; None if it has no score.
    picture : bytes, optional
        JPEG: the slide with its annotation beside its heatmap.
    notes : tuple of str
        What a reader should know: repairs of its annotation, unreadable patches.
    """

    slide_id: str
    patient_id: str
    split: Literal["validation", "test"]
    label: int
    score: float
    called: bool | None
    picture: bytes | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The call against the truth."""
        return VERDICTS.get((self.label, self.called), "not evaluated")


def reading_order(slides: Sequence[SlidePanel]) -> list[SlidePanel]:
    """The test split before the validation split, mistakes before the rest, then by name."""
    return sorted(
        slides, key=lambda s: (s.split != "test", READING_ORDER.index(s.verdict), s.slide_id)
    )


def cohort_counts(slides: Sequence[SlidePanel], lesions: pd.DataFrame) -> dict:
    """What was evaluated: the counts of the test split, and of validation slides.

    Parameters
    ----------
    slides : sequence of SlidePanel
        Of both splits.
    lesions : DataFrame
        ``status``: "missed", "found" or "ITC"; a row for each lesion of the test split.

    Returns
    -------
    dict
        ``slides, tumour_slides, normal_slides, patients, lesions, lesions_found, lesions_missed,
        lesions_itc``, all of the test split, and ``validation_slides``.
    """
    test = [slide for slide in slides if slide.split == "test"]
    return {
        "slides": len(test),
        "tumour_slides": sum(slide.label == 1 for slide in test),
        "normal_slides": sum(slide.label == 0 for slide in test),
        "patients": len({slide.patient_id for slide in test}),
        "lesions": len(lesions),
        "lesions_found": int((lesions["status"] == "found").sum()),
        "lesions_missed": int((lesions["status"] == "missed").sum()),
        "lesions_itc": int((lesions["status"] == "ITC").sum()),
        "validation_slides": len(slides) - len(test),
    }


def slide_table(slides: Sequence[SlidePanel], lesions: pd.DataFrame) -> pd.DataFrame:
    """A row for each slide, mistakes first.

    Parameters
    ----------
    slides : sequence of SlidePanel
        Of both splits.
    lesions : DataFrame
        ``slide_id, status``; a row for each lesion of the test split.

    Returns
    -------
    DataFrame
        ``split, slide_id, patient_id, label, score, called, verdict, lesions_found,
        lesions_missed, lesions_itc, notes``. The counts of lesions are missing where they are not
        known: of validation slides and of slides of unknown label.
    """
    count = lesions.groupby(["slide_id", "status"], observed=True).size().to_dict()
    rows = []
    for slide in reading_order(slides):
        known = slide.split == "test" and slide.label >= 0
        rows.append(
            {
                "split": slide.split,
                "slide_id": slide.slide_id,
                "patient_id": slide.patient_id,
                "label": slide.label,
                "score": slide.score,
                "called": slide.called,
                "verdict": slide.verdict,
                **{
                    f"lesions_{status.lower()}": count.get((slide.slide_id, status), 0)
                    if known
                    else None
                    for status in ("found", "missed", "ITC")
                },
                "notes": "; ".join(slide.notes),
            }
        )
    counts = dict.fromkeys(("lesions_found", "lesions_missed", "lesions_itc"), "Int64")
    columns = ["split", "slide_id", "patient_id", "label", "score", "called", "verdict"]
    return pd.DataFrame(rows, columns=[*columns, *counts, "notes"]).astype(counts)


def score_gap(froc: Mapping[str, dict]) -> dict | None:
    """How far apart the definitions of FROC lie on one cohort.

    Parameters
    ----------
    froc : mapping
        `froc_metrics` of each definition, read off at the same points.

    Returns
    -------
    dict or None
        ``score``: the distance of the ``highest`` from the ``lowest`` score, of the definitions
        named so; ``sensitivity``: the largest distance of two sensitivities at one point,
        ``average_fps`` (as text), of the definitions ``above`` and ``below`` there. None unless
        two definitions are defined.
    """
    defined = {mode: found for mode, found in froc.items() if not found["undefined"]}
    if len(defined) < 2:
        return None
    score = pd.Series({mode: found["score"] for mode, found in defined.items()})
    points = pd.DataFrame({mode: found["sensitivity_at"] for mode, found in defined.items()})
    apart = points.max(axis=1) - points.min(axis=1)
    widest = apart.idxmax()
    return {
        "score": float(score.max() - score.min()),
        "highest": score.idxmax(),
        "lowest": score.idxmin(),
        "sensitivity": float(apart[widest]),
        "average_fps": widest,
        "above": points.loc[widest].idxmax(),
        "below": points.loc[widest].idxmin(),
    }
