"""What a run has finished and what has failed: two files that outlive a kill.

``RUN/done/STAGE.jsonl`` gets a line when a unit of work has ended, never before, and
``RUN/failures.csv`` a row when one has failed. Only the process that submits the work writes them,
never a worker.
"""

import csv
import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from wsi_pipeline.errors import RunError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.jobs.unit import Unit


@dataclass(frozen=True)
class Failure:
    """A row of ``failures.csv``: what went wrong with a unit, or with a part of it."""

    stage: str
    slide_id: str
    unit: str
    error: str
    reason: str
    time: str


FAILURE_COLUMNS = tuple(column.name for column in fields(Failure))
DONE_FIELDS = ("key", "hash", "finished", "seconds", "result")


class Record:
    """What a stage has finished so far, read from its run directory; open it to add to it.

    ``with Record(...) as record`` opens it for one run of the stage and its single writer. Lines
    reach the operating system one by one, so a kill loses none, and the disk at the end. At a
    regular end the stage's failures of earlier runs give way to those of this one; after an
    interruption both are there.

    Parameters
    ----------
    run_dir : path-like
    stage : str
    keep : collection of str
        Keys of units that this run does not touch and that still count: their failures of earlier
        runs stay, unless the unit was done after them.

    Raises
    ------
    RunError
        If the file of finished units is damaged elsewhere than at its end.
    """

    def __init__(self, run_dir, stage: str, keep: Collection[str] = ()):
        self.stage = stage
        self.failures: list[Failure] = []
        self._keep = frozenset(keep)
        self._run_dir = Path(run_dir)
        self._done = read_done(run_dir, stage)

    def __enter__(self) -> "Record":
        path = _done_path(self._run_dir, self.stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        _cut_torn_line(_failures_path(self._run_dir))
        self._file = path.open("a", encoding="utf-8")
        return self

    def __exit__(self, error_type, *_):
        os.fsync(self._file.fileno())
        self._file.close()
        if error_type is None:
            before = read_failures(self._run_dir)
            earlier = [row for row in before if row.stage != self.stage or self._stays(row)]
            with replace_atomically(_failures_path(self._run_dir)) as part:
                _append_failures(part, [*earlier, *self.failures])

    def _stays(self, row: Failure) -> bool:
        """Whether an earlier failure still counts; a unit done in part has its rows after it."""
        line = self._done.get(row.unit)
        return row.unit in self._keep and (line is None or line["finished"] <= row.time)

    def is_done(self, unit: Unit, schema_version) -> bool:
        """Whether the unit is recorded under the same hash and its outputs still exist."""
        line = self._done.get(unit.key)
        if line is None or line["hash"] != unit.hash(schema_version):
            return False
        return all(output.exists() for output in unit.outputs)

    def result(self, key: str) -> dict:
        """What the unit of this key returned when it was last done."""
        return self._done[key]["result"]

    def add(self, unit: Unit, schema_version, *, seconds: float, result: dict):
        """Record a unit as done; its output must be in place."""
        line = {
            "key": unit.key,
            "hash": unit.hash(schema_version),
            "finished": _now(),
            "seconds": round(seconds, 3),
            "result": result,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._done[unit.key] = line

    def fail(self, unit: Unit, *, error: str, reason: str):
        """Record that a unit, or a part of it, failed: the error's class and the reason."""
        reason = " ".join(reason.split())  # a row is a line: see _cut_torn_line
        failure = Failure(self.stage, unit.slide_id, unit.key, error, reason, _now())
        self.failures.append(failure)
        _append_failures(_failures_path(self._run_dir), [failure])


def read_done(run_dir, stage: str) -> dict[str, dict]:
    """The finished units of a stage, also while it runs.

    Returns
    -------
    dict
        For each key its last line: ``key, hash, finished`` (UTC), ``seconds, result``.

    Raises
    ------
    RunError
        If a line is damaged. A last one that a kill has torn is passed over: its unit is not done.
    """
    path = _done_path(Path(run_dir), stage)
    done = {}
    for number, text in enumerate(_complete_lines(path), start=1):
        try:
            line = json.loads(text)
            done[line["key"]] = {name: line[name] for name in DONE_FIELDS}
        except (ValueError, KeyError, TypeError):
            raise RunError(
                f"{path}, line {number}: {text[:80]!r} is no record of a finished unit: delete the"
                " line, and its unit is done anew"
            ) from None
    return done


def read_failures(run_dir) -> list[Failure]:
    """The rows of ``RUN/failures.csv``; none if it does not exist.

    Raises
    ------
    RunError
        If its columns are not those of `Failure`.
    """
    path = _failures_path(Path(run_dir))
    header, *rows = csv.reader(_complete_lines(path) or [",".join(FAILURE_COLUMNS)])
    if tuple(header) != FAILURE_COLUMNS or any(len(row) != len(header) for row in rows):
        raise RunError(f"{path} does not hold the columns {', '.join(FAILURE_COLUMNS)} throughout")
    return [Failure(*row) for row in rows]


def _done_path(run_dir: Path, stage: str) -> Path:
    return run_dir / "done" / f"{stage}.jsonl"


def _failures_path(run_dir: Path) -> Path:
    return run_dir / "failures.csv"


def _append_failures(path: Path, failures: list[Failure]):
    with path.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, FAILURE_COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(asdict(failure) for failure in failures)


def _complete_lines(path: Path) -> list[str]:
    """Lines that end in a newline: what comes after the last one is torn by a kill."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1].decode(errors="replace").split("\n")[:-1]


def _cut_torn_line(path: Path):
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
