"""Whose slide it is: patients from a table or from file names, and ids that mean the same one."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pandas as pd

from wsi_pipeline.errors import CatalogError

# How public cohorts name a patient's slides; upper and lower case count alike. An id has to match
# from its beginning to its end.
KNOWN_NAMES = {
    "tcga": r"(TCGA[-.][A-Z0-9]{2}[-.][A-Z0-9]{4})(?:[-._].*)?",  # TCGA-AA-0001-01Z-00-DX1
    "cptac": r"(C3[LN]-\d{5})-\d{2}.*",  # C3L-00001-21
    "gtex": r"(GTEX-[A-Z0-9]{4,5})-\d{4}.*",  # GTEX-1117F-0126
    "camelyon17": r"(patient_\d+)_node_\d+.*",  # patient_010_node_4
}
NO_PATIENT = frozenset((
    "na", "n/a", "n.a.", "#n/a", "#ref!", "nan", "null", "none", "unknown", "missing",
    "[not available]", "-", "--", "?",
))  # fmt: skip
"""What tables write where they know no patient; case ignored."""
AUTO, FROM_TABLE, FROM_SETTING, ITSELF = "auto", "table", "setting", "slide"
PATIENTS_NAMED = 5
DASHES = "\u2010-\u2015\u2212"


def check_patient_rule(rule: str | None) -> str | None:
    """Check a value of ``catalog.patient_from``.

    Parameters
    ----------
    rule : str or None
        "auto", a name of `KNOWN_NAMES`, or a regular expression. A slide's patient is the group
        called ``patient`` of the first place in its id that matches, else the only group.

    Returns
    -------
    str or None
        `rule` itself.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    if rule is None or rule == AUTO or rule in KNOWN_NAMES:
        return rule
    try:
        found = re.compile(rule)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if found.groups != 1 and "patient" not in found.groupindex:
        raise ValueError(
            f"must be null, auto, {', '.join(KNOWN_NAMES)}, or a regular expression with one group"
            " or a group (?P<patient>...)"
        )
    return rule


def known_patient(name: str, cohorts: Sequence[str] = tuple(KNOWN_NAMES)) -> tuple[str, str] | None:
    """Find the cohort and the patient in a name of a public cohort's slide; None in others."""
    for cohort in cohorts:
        if found := re.fullmatch(KNOWN_NAMES[cohort], name, re.IGNORECASE):
            patient = found[1]
            spelled = patient.lower() if cohort == "camelyon17" else patient.upper()
            return cohort, spelled.replace(".", "-")
    return None


def same_patient_key(patient: str) -> str:
    """What is alike for two spellings of one patient's id.

    Case, spaces, the kind of dash, zeros before a number, the ``.0`` that a spreadsheet adds, forms
    of Unicode and, in names of `KNOWN_NAMES`, what follows the patient do not count: ``P 01`` is
    ``p-1``, ``7.0`` is ``7``, and ``TCGA-AA-0001-01Z`` is ``TCGA-AA-0001``.
    """
    text = unicodedata.normalize("NFKC", patient)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").strip()
    if found := known_patient(text):
        text = found[1]
    text = re.sub(r"^(\d+)\.0+$", r"\1", text.casefold())
    text = re.sub(rf"[\s._{DASHES}-]+", "-", text)
    return re.sub(r"(?<!\d)0+(?=\d)", "", text)


def with_patients(
    slides: pd.DataFrame, rule: str | None, source: str, places: Sequence[str]
) -> pd.DataFrame:
    """Give each slide its patient.

    Parameters
    ----------
    slides : DataFrame
        ``slide_id`` and ``patient_id``, which is missing where the table does not state it.
    rule : str or None
        See `check_patient_rule`. None: a slide without a patient is its own. "auto": unless its id
        is a name of `KNOWN_NAMES`. Else every such slide's id has to match.
    source : str
        The table or folder, for messages.
    places : sequence of str
        Where in it each slide is stated.

    Returns
    -------
    DataFrame
        A copy with ``patient_id`` filled, and ``patient_source``: ``"table"``, a name of
        `KNOWN_NAMES`, ``"setting"`` (a regular expression) or ``"slide"`` (its own patient).

    Raises
    ------
    CatalogError
        If an id does not match the rule, or two patients differ only in spelling.
    """
    patients, sources = [], []
    for row, place in zip(slides.itertuples(), places, strict=True):
        stated = not pd.isna(row.patient_id)
        source_of, patient = (
            (FROM_TABLE, row.patient_id) if stated else _from_name(row.slide_id, rule)
        )
        if not patient:
            raise CatalogError(
                f"{source}, {place}: no patient is found in the slide id {row.slide_id!r} by"
                f" catalog.patient_from, which is {rule!r}. Give the slide a patient_id in a table,"
                " or change the setting"
            )
        patients.append(patient)
        sources.append(source_of)
    filled = slides.assign(patient_id=patients, patient_source=sources)
    filled = filled.astype({"patient_id": "string", "patient_source": "string"})
    refuse_two_spellings(filled, source, places)
    return filled


def _from_name(slide_id: str, rule: str | None) -> tuple[str, str | None]:
    """Where a patient comes from, and who it is; nobody where the id does not match the rule."""
    if rule is None:
        return ITSELF, slide_id
    if rule == AUTO:
        return known_patient(slide_id) or (ITSELF, slide_id)
    if rule in KNOWN_NAMES:
        return known_patient(slide_id, (rule,)) or (rule, None)
    pattern = re.compile(rule)
    found = pattern.search(slide_id)
    group = "patient" if "patient" in pattern.groupindex else 1
    return FROM_SETTING, found and found[group]


def refuse_two_spellings(slides: pd.DataFrame, source: str, places: Sequence[str]) -> None:
    """Refuse patients that differ only in how they are spelled.

    Parameters
    ----------
    slides : DataFrame
        ``slide_id``, ``patient_id`` and optionally ``patient_source``: slides that are their own
        patients are not compared with each other.
    source, places
        See `with_patients`.

    Raises
    ------
    CatalogError
        If there are any; see `same_patient_key`.
    """
    spellings: defaultdict[str, dict] = defaultdict(dict)
    stated = set()
    sources = slides.get("patient_source", [FROM_TABLE] * len(slides))
    for at, (patient, source_of) in enumerate(zip(slides["patient_id"], sources, strict=True)):
        if not pd.isna(patient):
            key = same_patient_key(patient)
            spellings[key].setdefault(patient, at)
            if source_of != ITSELF:
                stated.add(key)
    for key, first in spellings.items():
        if len(first) > 1 and key in stated:
            raise CatalogError(
                f"{source}: these patient ids differ only in spelling and look like one patient:"
                f" {_listed(first.values(), slides, places)}. Write one patient's id alike in all"
                " rows; give different patients ids that differ in more than case, spaces, dashes"
                " or zeros"
            )


def refuse_several_for_a_name(slides: pd.DataFrame, source: str, places: Sequence[str]) -> None:
    """Refuse several patients for slides whose names state one patient of a public cohort.

    Parameters
    ----------
    slides, source, places
        See `with_patients`.

    Raises
    ------
    CatalogError
        If there are any.
    """
    patients: defaultdict[str, dict] = defaultdict(dict)
    for at, row in enumerate(slides.itertuples(index=False)):
        if found := known_patient(row.slide_id):
            patients[found[1]].setdefault(row.patient_id, at)
    for named, first in patients.items():
        if len(first) > 1:
            raise CatalogError(
                f"{source}: by their names these slides are of one patient, {named}, but their"
                f" patient ids differ: {_listed(first.values(), slides, places)}. Give them one"
                " patient_id, or set catalog.patient_from: null if their names do not state the"
                " patient"
            )


def _listed(positions: Iterable[int], slides: pd.DataFrame, places: Sequence[str]) -> str:
    told = [
        f"{slides['patient_id'].iloc[at]!r} (slide {slides['slide_id'].iloc[at]}, {places[at]})"
        for at in positions
    ]
    more = f" and {len(told) - PATIENTS_NAMED} more" if len(told) > PATIENTS_NAMED else ""
    return ", ".join(told[:PATIENTS_NAMED]) + more


def patient_notes(
    slides: pd.DataFrame, remedy: str = "fill in patient_id or set catalog.patient_from"
) -> list[str]:
    """Say which patients the table does not state, of what `with_patients` gave.

    `remedy` is what to do where a patient has several slides that count as patients of their own.
    """
    notes = []
    groups = defaultdict(list)
    for row in slides.itertuples(index=False):
        groups[row.patient_source].append(row)
    for source, rows in groups.items():
        first, patients = rows[0], len({row.patient_id for row in rows})
        if source == ITSELF and len(slides) > 1:
            who = f"each of the {len(rows)} slides" if len(rows) == len(slides) else (
                f"each of {len(rows)} of the {len(slides)} slides (first: {first.slide_id})"
            )  # fmt: skip
            notes.append(
                f"{who} was taken as its own patient: no patient_id is stated, and none is known"
                f" from the name. If a patient has several slides, {remedy}, since splits and"
                " intervals are over patients"
            )
        elif source not in (ITSELF, FROM_TABLE):
            how = "catalog.patient_from" if source == FROM_SETTING else f"{source} names"
            notes.append(
                f"patients were taken from slide ids by {how}: slides {len(rows)}, patients"
                f" {patients} (first: slide {first.slide_id} of patient {first.patient_id})"
            )
    return notes
