"""A command: alone in its folder, stages with one Dask client, their outcomes, an exit status."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wsi_pipeline import __version__
from wsi_pipeline.config import Config
from wsi_pipeline.config_file import dump_config
from wsi_pipeline.errors import ConfigError, RunError

FAILED, WRONG = 1, 2
"""Exit statuses: some slides failed; nothing could be done with these settings or files."""

WITHOUT_RESULTS = frozenset((".lock", "config.yaml", "catalog.csv", "models"))
"""What a command writes to its folder before it works."""

MADE_BY = "# wsi_pipeline "
"""How a run's settings begin; the version follows."""

console = Console(stderr=True)


def run_stages(
    config: Config,
    stages: tuple[str, ...],
    plan: Callable[[], dict[str, object]] | None = None,
    *,
    keep_settings: bool = False,
) -> NoReturn:
    """Run stages with one Dask client and leave with the status that their failures call for.

    Parameters
    ----------
    config : Config
    stages : tuple of str
        Modules of `wsi_pipeline.stages`, in this order. Without a model none follows training.
    plan : callable, optional
        Called once this command is alone in the folder, before the settings are written and any
        worker is there: it may refuse what is asked for, and write what the stages need. It
        returns plans by the names of stages; each is handed to its stage.
    keep_settings : bool
        Leave the run's settings file as it is, though these settings differ from it.

    Raises
    ------
    ConfigError, RunError
        As `alone_in`, `plan` and the stages.
    """
    from wsi_pipeline.jobs.cluster import connect

    outcomes = []
    jobs = config.jobs
    with alone_in(config.out):
        plans = {} if plan is None else plan()
        if not keep_settings:
            write_settings(config)
        with connect(jobs.scheduler, workers=jobs.workers) as client:
            for name in stages:
                stage = import_module(f"wsi_pipeline.stages.{name}")
                options = {"plan": plans[name]} if name in plans else {}
                outcome = stage.run(config, client, **options)
                if name == "check":
                    _tell_findings(config.out, goes_on=stages != ("check",))
                    continue
                outcomes.append((name, outcome))
                if name == "train" and not outcomes[-1][1].results:
                    break  # a failed slide stops nothing, but without a model there is no going on
    _tell_results(config, outcomes)
    finish(outcomes, config.out)


def _tell_findings(folder: Path, goes_on: bool) -> None:
    """Show what the check found; leave if it is all that was asked for, or if a run is refused."""
    from wsi_pipeline.stages.check import read_findings
    from wsi_pipeline.stages.run_directory import check_path

    findings = read_findings(folder)
    if findings:
        table = Table("slide", "kind", "what is wrong", "what to do", show_lines=True)
        for column in table.columns:
            column.overflow = "fold"
        for row in findings:
            slide = row.slide_id or "(all)"
            table.add_row(*map(escape, (slide, row.kind, row.what, row.advice)))
        Console().print(table)
    found = f"{len(findings)} found: see {check_path(folder)}" if findings else "nothing is wrong"
    console.print(f"check: {found}", markup=False, soft_wrap=True)
    if not goes_on:
        sys.exit(FAILED if findings else 0)
    if refused := [row for row in findings if row.refuses]:
        raise RunError(
            f"the run would end in the middle, or for nothing: {'; '.join(r.what for r in refused)}"
        )


def finish(outcomes: list[tuple], folder: Path) -> NoReturn:
    """Say how each stage ended, and leave with the status that the failures call for.

    Parameters
    ----------
    outcomes : list of (str, Outcome)
        Names of stages and what became of their units.
    folder : Path
        Of ``failures.csv``.
    """
    failed = sum(outcome.failed for _, outcome in outcomes)
    for name, outcome in outcomes:
        units = ", ".join(f"{stage} {number}" for stage, number in outcome.counted.items())
        console.print(
            f"{name}: {outcome.done} done, {outcome.skipped} already done, {outcome.failed} failed"
            + (f" (units: {units})" if len(outcome.counted) > 1 else ""),
            soft_wrap=True,
        )
    if failed:
        console.print(f"{failed} failed: see {folder / 'failures.csv'}", style="red", markup=False)
    sys.exit(FAILED if failed else 0)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder of results: two commands in one would overwrite each other's records.

    A folder that is made here and gets no result (the command failed at once) is removed again.

    Raises
    ------
    RunError
        If another command holds it.
    ConfigError
        If it cannot be made or written to.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(f"{folder}: another wsi command is at work in this directory") from None
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    except Exception:
        if made and {path.name for path in folder.glob("*")} <= WITHOUT_RESULTS:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release()


def write_settings(config: Config) -> None:
    """Write the settings of a run beside its results, where `wsi status` looks for them.

    Raises
    ------
    ConfigError
        If they cannot be written.
    RunError
        If another version made the run: its records do not say what this one has to know.
    """
    from wsi_pipeline.files import write_whole

    path = config.out / "config.yaml"
    try:
        if path.exists():
            _refuse_another_version(config.out, path.read_text(errors="replace"))
        text = f"{MADE_BY}{__version__}\n{dump_config(config)}"
        write_whole(path, text.encode())
    except OSError as error:
        raise _unwritable(config.out, error) from error


def _refuse_another_version(folder: Path, settings: str) -> None:
    """Major and minor version count: a run of others cannot be continued."""
    made_by = settings.partition("\n")[0].removeprefix(MADE_BY)
    if made_by.split(".")[:2] != __version__.split(".")[:2]:
        raise RunError(
            f"{folder} holds a run of wsi_pipeline {made_by or 'unknown'}, which {__version__}"
            " cannot continue. Set `out` to another folder, or delete this one"
        )


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"out is {folder}: it cannot be written to: {error}")


def _tell_results(config: Config, outcomes: list[tuple]):
    """Say how slides were read and predicted, and where the last stage's page is."""
    from wsi_pipeline.stages.run_directory import (
        EXPLANATIONS_PAGE,
        PREDICTIONS_PAGE,
        TISSUE_PAGE,
        evaluation_folder,
        explanation_folder,
        prediction_folder,
        tissue_folder,
    )
    from wsi_pipeline.stages.status import precision_summary, reading_summary

    for name, outcome in outcomes:
        if name == "heatmap" and (reading := reading_summary(outcome.results.values())):
            console.print(f"heatmap: {reading}", markup=False, soft_wrap=True)
        comparison = {"heatmap": "precision", "fine": "fine_precision"}.get(name)
        if comparison and (text := precision_summary(config.out, config.train.name, comparison)):
            console.print(f"{name}: {text}", markup=False, soft_wrap=True)
    pages = {
        "tile": tissue_folder(config.out) / TISSUE_PAGE,
        "evaluate": evaluation_folder(config.out, config.train.name) / "report.html",
        "explain": explanation_folder(config.out, config.train.name) / EXPLANATIONS_PAGE,
        "predictions": prediction_folder(config.out, config.train.name) / PREDICTIONS_PAGE,
    }
    last = [name for name, _ in outcomes if name != "export"][-1:]
    if last and last[0] in pages:
        console.print(f"report: {pages[last[0]]}", markup=False, soft_wrap=True)
