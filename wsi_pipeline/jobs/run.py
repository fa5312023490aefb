"""Units of work on Dask: submitted in a bounded window, recorded one by one, done only once."""

import json
import logging
import shutil
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sized
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from distributed import CancelledError, Client, Future, KilledWorker, as_completed

from wsi_pipeline.errors import RunError, WsiError
from wsi_pipeline.jobs.cluster import worker_threads
from wsi_pipeline.jobs.progress import progress_bar
from wsi_pipeline.jobs.record import Record
from wsi_pipeline.jobs.unit import Unit

SECONDS_BETWEEN_COUNTS = 10.0
PARTIAL = "PartialFailure"

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """How a run of units ended.

    Parameters
    ----------
    done, skipped, failed : int
        Units done now, done by an earlier run, and failed in whole or, now or earlier, in part.
    results : dict
        What each unit returned, now or earlier, by key; of units that failed in part as well.
    counted : Counter
        All units, by what the record calls their stage: a command's stage may have several.
    """

    done: int = 0
    skipped: int = 0
    failed: int = 0
    results: dict[str, dict] = field(default_factory=dict)
    counted: Counter[str] = field(default_factory=Counter)

    @property
    def units(self) -> int:
        """All units so far."""
        return self.done + self.skipped + self.failed

    def __add__(self, later: "Outcome") -> "Outcome":
        """Both together; where a key is in both, the later result."""
        return Outcome(
            self.done + later.done,
            self.skipped + later.skipped,
            self.failed + later.failed,
            self.results | later.results,
            self.counted + later.counted,
        )


def run_units(
    client: Client,
    units: Iterable[Unit],
    *,
    run_dir,
    stage: str,
    schema_version,
    retries: int = 2,
    window: int = 4,
    resources: dict[str, float] | None = None,
    total: int | None = None,
    progress: bool = True,
    keep: Collection[str] = (),
) -> Outcome:
    """Do the units that are not done yet, and keep ``RUN/done`` and ``RUN/failures.csv``.

    A unit that raises gets a row in ``failures.csv`` and the others go on. It is not tried again
    in this run: what it read would be the same. A unit that returns ``failures`` is done, with
    parts missing that would be missing again: it gets a row for each, now and in every later run
    that skips it, and counts as failed.

    When a worker dies, so do all units that it holds, whichever of them killed it. They are
    suspects: after all other units each is done again with no other in flight, so that only a unit
    that kills its worker uses up its `retries`.

    The output of a unit whose inputs have changed is removed before the unit is done anew: should
    that fail, no later stage takes the old one for it.

    Parameters
    ----------
    client : distributed.Client
    units : iterable of Unit
        Taken one by one as places in the window become free, so there may be any number of them.
    run_dir : path-like
    stage : str
        Names the record: its failures of earlier runs give way to those of this one.
    schema_version : plain JSON value
        Of the code that makes the output; another one makes every unit undone.
    retries : int
        New submissions of a unit whose worker died while no other unit was in flight. A scheduler
        hands a unit to another worker itself, up to its own
        ``distributed.scheduler.allowed-failures`` (0 in the local cluster of `connect`, 3 elsewhere
        unless set), before it counts as one death here.
    window : int
        Units in flight for each worker thread, the one that it works on included.
    resources : dict, optional
        What a worker must offer: ``{"GPU": 1}``.
    total : int, optional
        Number of units, for the progress bar, where `units` does not know its length.
    progress : bool
        Whether to show the progress.
    keep : collection of str
        Keys of units that are not handed in, and whose failures of earlier runs stay: see `Record`.

    Returns
    -------
    Outcome

    Raises
    ------
    RunError
        If no worker offers `resources`, the scheduler is lost, or the record is damaged. What was
        finished stays recorded.
    ValueError
        If two units have the same key.
    """
    outcome = Outcome()
    if total is None and isinstance(units, Sized):
        total = len(units)
    bar = progress_bar(stage, total) if progress else nullcontext(lambda *_: None)
    with Record(run_dir, stage, keep) as record, bar as update:
        undone = _undone(units, record, schema_version, outcome)
        with closing(_attempts(client, undone, stage, retries, window, resources)) as attempts:
            for unit, attempt in attempts:
                _settle(unit, attempt, record, schema_version, outcome)
                update(outcome.units, f"{outcome.failed} failed" if outcome.failed else "")
        update(outcome.units, f"{outcome.failed} failed" if outcome.failed else "")
    outcome.counted[stage] = outcome.units
    return outcome


@dataclass(frozen=True)
class _Attempt:
    """What came of a unit, as its worker reports it; `result` is None where it raised."""

    result: dict | None = None
    seconds: float = 0.0
    error: str = ""
    reason: str = ""
    trace: str = ""


def _undone(
    units: Iterable[Unit], record: Record, schema_version, outcome: Outcome
) -> Iterator[Unit]:
    seen = set()
    for unit in units:
        if unit.key in seen:
            raise ValueError(f"two units of stage {record.stage} have the key {unit.key!r}")
        seen.add(unit.key)
        if record.is_done(unit, schema_version):
            if _take(unit, record.result(unit.key), record, outcome):
                outcome.skipped += 1
        else:
            for output in unit.outputs:
                _remove(output)
            yield unit


def _settle(unit: Unit, attempt: _Attempt, record: Record, schema_version, outcome: Outcome):
    if attempt.result is None:
        record.fail(unit, error=attempt.error, reason=attempt.reason)
        outcome.failed += 1
        if attempt.trace:
            logger.error("unit %s of stage %s: %s", unit.key, record.stage, attempt.trace)
        return
    record.add(unit, schema_version, seconds=attempt.seconds, result=attempt.result)
    if _take(unit, attempt.result, record, outcome):
        outcome.done += 1


def _take(unit: Unit, result: dict, record: Record, outcome: Outcome) -> bool:
    """Keep a unit's result and report what is missing in it; whether nothing is."""
    outcome.results[unit.key] = result
    reasons = result.get("failures", [])
    for reason in reasons:
        record.fail(unit, error=PARTIAL, reason=reason)
    outcome.failed += bool(reasons)
    return not reasons


def _remove(output: Path):
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


def _attempts(
    client: Client, units: Iterator[Unit], stage: str, retries: int, window: int, resources
) -> Iterator[tuple[Unit, _Attempt]]:
    """Submit units, a new one when one has ended; give what came of each in order of ending.

    Suspects, units whose worker died, are submitted last, each when nothing else is in flight.
    """
    in_flight: dict[Future, Unit] = {}
    alone: Future | None = None  # in flight without another since it was submitted
    ended = as_completed(loop=client.loop)
    suspects: deque[Unit] = deque()
    deaths = Counter()  # of a unit alone, by key
    size = _window_sizes(client, window, resources)

    def submit(unit: Unit):
        nonlocal alone
        future = client.submit(
            _attempt,
            unit,
            key=f"{stage}-{uuid.uuid4().hex}",
            resources=resources,
        )
        alone = None if in_flight else future
        in_flight[future] = unit
        ended.add(future)

    def fill_window():
        for unit in islice(units, max(0, next(size) - len(in_flight))):
            submit(unit)
        if suspects and not in_flight:
            submit(suspects.popleft())

    try:
        fill_window()
        for future in ended:
            unit = in_flight.pop(future)
            try:
                attempt = future.result()
            except KilledWorker as error:
                deaths[unit.key] += future is alone
                if deaths[unit.key] <= retries:
                    logger.warning("a worker died; %s of %s is done again, alone", unit.key, stage)
                    suspects.append(unit)
                    fill_window()
                    continue
                attempt = _killed(error, deaths[unit.key])
            except CancelledError:
                raise RunError(
                    f"stage {stage}: the Dask scheduler at {client.scheduler.address} is gone, or"
                    " has cancelled the units; those finished are recorded: start again"
                ) from None
            except Exception as error:  # before the unit began: its function is unknown there, say
                attempt = _Attempt(error=type(error).__name__, reason=str(error))
            yield unit, attempt
            fill_window()
    finally:
        client.cancel(list(in_flight))


def _window_sizes(client: Client, window: int, resources) -> Iterator[int]:
    """Units that may be in flight now; workers come and go, so they are counted again."""
    threads = worker_threads(client, resources)
    if resources and not threads:
        raise RunError(f"no worker of {client.scheduler.address} offers {resources}")
    counted = time.monotonic()
    while True:
        yield max(1, window * threads)
        if time.monotonic() - counted >= SECONDS_BETWEEN_COUNTS:
            threads = worker_threads(client, resources)
            counted = time.monotonic()


def _attempt(unit: Unit) -> _Attempt:
    """Do a unit, on a worker; an exception comes back as text, which always travels."""
    started = time.perf_counter()
    try:
        result = json.loads(json.dumps(unit.run()))  # as it will be read back
        return _Attempt(result, time.perf_counter() - started)
    except WsiError as error:
        return _Attempt(error=type(error).__name__, reason=str(error))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return _Attempt(
            error=type(error).__name__,
            reason=f"{error} ({Path(place.filename).name}, line {place.lineno}, in {place.name})",
            trace=traceback.format_exc(),
        )


def _killed(error: KilledWorker, deaths: int) -> _Attempt:
    return _Attempt(
        error=type(error).__name__,
        reason=f"the worker doing it alone died, {deaths} times, last {error.last_worker.address}:"
        " out of memory, or a crash in a library; see the worker's log",
    )
