"""The page of explanations: places with their maps, and how far the methods can be trusted."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from wsi_pipeline.files import write_csv, write_json, write_whole
from wsi_pipeline.report.curves import similarity_figure
from wsi_pipeline.report.evaluation_page import environment

PAGE, SUMMARY = "index.html", "summary.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExplainedPlace:
    """A place on the page.

    Parameters
    ----------
    name : str
        Of its folder, which holds its maps.
    group : str
        Heading that it belongs under.
    title, where : str
        What kind of place it is; where, and what the model says.
    made : str
        The settings that its maps were made with; may be empty.
    picture : bytes
        PNG: the place beside its maps.
    """

    name: str
    group: str
    title: str
    where: str
    made: str
    picture: bytes = field(repr=False)


@dataclass(frozen=True, eq=False)
class MethodChecks:
    """How methods do on annotated patches; each table may be empty.

    Parameters
    ----------
    ranking : DataFrame
        ``method, patches, exact_match, recall, auroc, pointing_game, energy_inside, seconds``,
        the best first.
    drawn : int
        Patches that were drawn for it, of which only those with and without tumour count.
    trust : DataFrame
        ``method, patches, deletion_area, insertion_area, similarity, warning``.
    layers : DataFrame
        ``method, depth, layer, similarity``.
    """

    ranking: pd.DataFrame
    drawn: int
    trust: pd.DataFrame
    layers: pd.DataFrame


def write_explanations(
    folder,
    *,
    title: str,
    model: str,
    report: str | None,
    run: Mapping[str, str],
    places: Sequence[ExplainedPlace],
    table: pd.DataFrame,
    words: Mapping[str, Mapping[str, str]],
    checks: MethodChecks,
    failures: pd.DataFrame,
) -> Path:
    """Write ``index.html``, ``summary.json`` and the tables as CSV, each whole or not at all.

    The page needs no other file and no network, runs no script, and can be printed.

    Parameters
    ----------
    folder : path-like
        Made when missing.
    title : str
    model : str
        What tells it from all others: name and weights.
    report : str or None
        Relative link to the evaluation's report, if there is one.
    run : mapping
        What to say of the model and the settings of the checks, by name.
    places : sequence of ExplainedPlace
        In order; those of a group together.
    table : DataFrame
        The same places as figures: ``places.csv``.
    words : mapping
        ``name`` and ``legend`` of each method on the page, in the order of the pictures.
    checks : MethodChecks
        ``ranking.csv``, ``trust.csv``, ``similarity.csv`` where they are not empty.
    failures : DataFrame
        What failed on the way; any columns.

    Returns
    -------
    Path
        Of ``index.html``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {method: of_method["name"] for method, of_method in words.items()}
    groups: dict[str, list[ExplainedPlace]] = {}
    for place in places:
        groups.setdefault(place.group, []).append(place)
    drawn = not checks.layers.empty
    html = environment().get_template("explanations.html.j2").render(
        title=title,
        report=report,
        run=run,
        groups=groups,
        words=words,
        names=names,
        ranking=_named(checks.ranking, names),
        drawn=checks.drawn,
        trust=checks.trust.to_dict("records"),
        similarity=similarity_figure(checks.layers, names) if drawn else None,
        failures=failures,
    )  # fmt: skip
    tables = {
        "places": table,
        "ranking": checks.ranking,
        "trust": checks.trust,
        "similarity": checks.layers,
    }
    for name, rows in tables.items():
        path = folder / f"{name}.csv"
        if rows.empty:
            path.unlink(missing_ok=True)
        else:
            write_csv(path, rows)
    write_whole(folder / PAGE, html.encode())
    write_json(folder / SUMMARY, {"model": model, "places": len(places), **_summary(checks, names)})
    return folder / PAGE


def read_summary(folder, model: str) -> dict | None:
    """What the evaluation's report says of a model's explanations.

    Parameters
    ----------
    folder : path-like
        What `write_explanations` was given.
    model : str
        The same.

    Returns
    -------
    dict or None
        ``places``, their number; ``ranked_on, tried_on``, numbers of patches; and ``methods``, the
        best first: for each a dict of ``name``, the figures of `MethodChecks.ranking`, and of
        `MethodChecks.trust` ``similarity, warning``; None where undefined or unknown. None where
        there are no explanations, they are of another model, or their summary is damaged, which
        is warned of: a report goes without.
    """
    path = Path(folder) / SUMMARY
    if not (path.is_file() and (path.parent / PAGE).is_file()):
        return None
    try:
        found = json.loads(path.read_text())
        if lacking := {"model", "places", "ranked_on", "tried_on", "methods"} - found.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (ValueError, AttributeError) as error:
        log.warning("%s: no readable summary of explanations: %s", path, error)
        return None
    return found if found["model"] == model else None


def _named(table: pd.DataFrame, names: Mapping[str, str]) -> list[dict]:
    return table.assign(name=table["method"].map(names)).to_dict("records")


def _summary(checks: MethodChecks, names: Mapping[str, str]) -> dict:
    """The ranking with what the trust checks found; methods without a rank come last."""
    tables = (checks.ranking, checks.trust[["method", "similarity", "warning"]])
    methods = pd.concat([table.set_index("method") for table in tables], axis=1).reset_index()
    return {
        "ranked_on": _most(checks.ranking["patches"]),
        "tried_on": _most(checks.trust["patches"]),
        "methods": _named(methods.drop(columns="patches"), names),
    }


def _most(patches: pd.Series) -> int:
    return 0 if patches.empty else int(patches.max())
