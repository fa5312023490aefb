import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from unit_functions import (
    call,
    die,
    divide_by_zero,
    pairs,
    read_in_part,
    refuse,
    square,
    unserialisable,
)

from wsi_pipeline.errors import RunError
from wsi_pipeline.jobs import cluster
from wsi_pipeline.jobs import run as run_module
from wsi_pipeline.jobs.cluster import connect
from wsi_pipeline.jobs.record import read_done, read_failures
from wsi_pipeline.jobs.run import Outcome, run_units

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def client():
    with connect(workers=2) as client:
        yield client


def run(client, units, folder, **options):
    options = {"stage": "squares", "schema_version": 1, **options}
    return run_units(client, units, run_dir=folder / "run", **options)


def squares(folder, count, seconds=0.0):
    """Units that square 0, 1, ... into files and log each time that they are executed."""
    return [
        call(
            f"square {number}",
            f"slide {number}",
            {"number": number},
            square,
            {
                "number": number,
                "out": str(folder / f"{number}.txt"),
                "log": str(folder / "executed.log"),
                "seconds": seconds,
            },
        )
        for number in range(count)
    ]


def outputs(folder):
    return {int(path.stem): int(path.read_text()) for path in folder.glob("*.txt")}


def executed(folder):
    """How often each number was squared."""
    return Counter(int(line) for line in (folder / "executed.log").read_text().split())


def reasons(folder):
    return [(row.unit, row.error, row.reason) for row in read_failures(folder / "run")]


def recorded(folder):
    """Numbers whose squares are recorded as done."""
    done = read_done(folder / "run", "squares").values()
    return {math.isqrt(line["result"]["square"]) for line in done}


def wait_for_record(folder, count, seconds=120):
    """Until so many squares are recorded; after so many seconds at most."""
    end = time.monotonic() + seconds
    while len(recorded(folder)) < count and time.monotonic() < end:
        time.sleep(0.02)


def test_units_are_done_once_and_later_runs_return_the_recorded_results(client, tmp_path):
    units = squares(tmp_path, 10)
    expected = {f"square {number}": {"square": number**2} for number in range(10)}
    counted = {"squares": 10}
    assert run(client, units, tmp_path) == Outcome(done=10, results=expected, counted=counted)
    assert run(client, units, tmp_path) == Outcome(skipped=10, results=expected, counted=counted)
    assert executed(tmp_path) == dict.fromkeys(range(10), 1)
    assert outputs(tmp_path) == {number: number**2 for number in range(10)}


def test_changed_inputs_are_done_anew_and_so_is_all_under_another_schema(client, tmp_path):
    units = squares(tmp_path, 4)
    run(client, units, tmp_path)
    units[2].inputs["slide_file"] = "7 bytes"
    ended = run(client, units, tmp_path)
    assert (ended.done, ended.skipped) == (1, 3)
    assert executed(tmp_path) == {0: 1, 1: 1, 2: 2, 3: 1}
    ended = run(client, units, tmp_path, schema_version=2)
    assert (ended.done, ended.skipped) == (4, 0)


def test_no_more_units_are_taken_than_the_window_holds(client, tmp_path):
    taken, open_units = 0, []
    done = tmp_path / "run" / "done" / "squares.jsonl"

    def lazily():
        nonlocal taken
        for unit in squares(tmp_path, 40):
            taken += 1
            open_units.append(taken - done.read_text().count("\n"))
            yield unit

    ended = run(client, lazily(), tmp_path, window=3)
    assert ended.done == 40
    assert max(open_units) == 3 * 2  # two workers of one thread
    assert open_units[:6] == [1, 2, 3, 4, 5, 6]


def test_the_window_follows_the_workers_that_come_and_go(client, tmp_path, monkeypatch):
    counts = iter([1, 0, 3])
    monkeypatch.setattr(run_module, "worker_threads", lambda *_: next(counts, 3))
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_COUNTS", 0)
    sizes = run_module._window_sizes(client, 4, {"GPU": 1})
    assert [next(sizes) for _ in range(4)] == [4, 1, 12, 12]  # none left: wait for their return


def test_failing_units_are_recorded_while_the_others_go_on(client, tmp_path, caplog):
    caplog.set_level("ERROR")  # Dask, silencing its handlers, silences the one that pytest adds
    log = str(tmp_path / "refused.log")
    failing = [
        call("refused", "slide r", {}, refuse, {"path": "a.svs", "log": log}),
        call("divided", "slide d", {}, divide_by_zero),
        call("no json", "slide n", {}, unserialisable),
    ]
    ended = run(client, failing + squares(tmp_path, 6), tmp_path)
    assert (ended.done, ended.failed) == (6, 3)
    assert set(ended.results) == {f"square {number}" for number in range(6)}
    found = {(row.unit, row.slide_id): row for row in read_failures(tmp_path / "run")}
    assert len(found) == 3
    row = found["refused", "slide r"]
    reason = "a.svs: is no slide, the first bytes say"
    assert (row.stage, row.error, row.reason) == ("squares", "SlideError", reason)
    assert (tmp_path / "refused.log").read_text() == "a.svs\n"  # not tried again
    row = found["divided", "slide d"]
    assert row.error == "ZeroDivisionError"
    assert row.reason.startswith("division by zero (unit_functions.py, line ")
    assert "Traceback" in caplog.text
    assert found["no json", "slide n"].error == "TypeError"


def test_a_failure_is_gone_after_a_run_without_it(client, tmp_path):
    broken = call("square 0", "slide 0", {"number": 0}, divide_by_zero)
    run(client, [broken], tmp_path)
    assert len(reasons(tmp_path)) == 1
    assert run(client, squares(tmp_path, 1), tmp_path).done == 1
    assert reasons(tmp_path) == []


def test_a_unit_that_failed_in_part_is_reported_in_every_run_until_its_inputs_change(
    client, tmp_path
):
    out = tmp_path / "heatmap"

    def unit(unread, **inputs):
        return call("a", "slide a", inputs, read_in_part, {"out": str(out), "unread": unread})

    unread = ["patch at (0, 0)", "patch at (0, 256)"]
    rows = [("a", "PartialFailure", reason) for reason in unread]
    for _ in range(2):
        ended = run(client, [unit(unread)], tmp_path)
        assert (ended.done, ended.skipped, ended.failed) == (0, 0, 1)
        assert ended.results["a"]["patches"] == 3
        assert out.read_text() == "the rest"
        assert reasons(tmp_path) == rows
    assert len((tmp_path / "run/done/squares.jsonl").read_text().splitlines()) == 1
    assert run(client, [unit([], slide="mended")], tmp_path).done == 1
    assert reasons(tmp_path) == []


def test_the_output_of_other_inputs_does_not_outlive_a_failure(client, tmp_path):
    old = tmp_path / "index"
    old.write_text("of other settings")
    run(client, [call("a", "slide a", {}, divide_by_zero, out=old)], tmp_path)
    assert not old.exists()


def test_a_result_is_the_same_when_it_is_read_back(client, tmp_path):
    unit = call("a", "slide a", {}, pairs)
    first = run(client, [unit], tmp_path).results
    assert first == {"a": {"pairs": [[1, 2]], "by": {"1": "one"}}}
    assert run(client, [unit], tmp_path).results == first


def test_two_units_of_one_key_are_refused(client, tmp_path):
    with pytest.raises(ValueError, match="the key 'square 0'"):
        run(client, [*squares(tmp_path, 1), *squares(tmp_path, 1)], tmp_path)


def test_nothing_to_do_is_done_at_once(client, tmp_path):
    assert run(client, [], tmp_path) == Outcome()


def test_outcomes_add_up():
    first = Outcome(1, 2, 3, {"a": {"n": 1}, "b": {}}, Counter(slabs=6))
    later = Outcome(10, 20, 30, {"a": {"n": 2}}, Counter(slabs=50, slides=10))
    both = Outcome(11, 22, 33, {"a": {"n": 2}, "b": {}}, Counter(slabs=56, slides=10))
    assert first + later == both


def test_a_unit_that_kills_its_worker_is_retried_then_recorded(client, tmp_path):
    log = tmp_path / "died.log"
    deadly = call("deadly", "slide d", {}, die, {"log": str(log)})
    ended = run(client, [deadly, *squares(tmp_path, 8)], tmp_path, retries=1, window=1)
    # Once with others in flight, which does not count, and then twice alone.
    assert log.read_text() == "die\n" * (1 + 2)
    assert (ended.done, ended.failed) == (8, 1)
    ((unit, error, reason),) = reasons(tmp_path)
    assert (unit, error) == ("deadly", "KilledWorker")
    assert "died, 2 times" in reason


def test_a_unit_without_company_is_retried_no_more_often_than_asked(client, tmp_path):
    log = tmp_path / "died.log"
    deadly = call("deadly", "slide d", {}, die, {"log": str(log)})
    assert run(client, [deadly], tmp_path, retries=0).failed == 1
    assert log.read_text() == "die\n"


def test_units_that_wait_for_a_gpu_do_not_fail_with_the_one_that_kills_its_worker(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster, "visible_gpus", lambda: ["0"])
    log = tmp_path / "died.log"
    deadly = call("deadly", "slide d", {}, die, {"log": str(log)})
    units = [deadly, *squares(tmp_path, 6)]
    with connect(workers=1) as client:  # of two threads: all seven are in flight
        ended = run(client, units, tmp_path, retries=1, window=4, resources={cluster.GPU: 1})
    assert (ended.done, ended.failed) == (6, 1)
    assert [unit for unit, *_ in reasons(tmp_path)] == ["deadly"]
    assert outputs(tmp_path) == {number: number**2 for number in range(6)}
    # Once with others in flight, which does not count, and then twice alone.
    assert log.read_text() == "die\n" * (1 + 2)


def test_a_running_scheduler_gives_the_same_also_when_a_worker_is_killed(start_scheduler, tmp_path):
    address, _, (victim, _) = start_scheduler(workers=2)
    with connect(address) as client:

        def kill_in_the_middle():
            wait_for_record(tmp_path, 4)
            victim.kill()

        killer = threading.Thread(target=kill_in_the_middle)
        killer.start()
        ended = run(client, squares(tmp_path, 16, seconds=0.1), tmp_path)
        killer.join()
    assert victim.poll() == -signal.SIGKILL
    assert (ended.done, ended.failed) == (16, 0)
    assert outputs(tmp_path) == {number: number**2 for number in range(16)}
    assert reasons(tmp_path) == []


def test_a_lost_scheduler_ends_the_run_and_keeps_the_record(start_scheduler, tmp_path):
    address, scheduler, _ = start_scheduler(workers=1)
    with connect(address) as client:

        def kill_in_the_middle():
            wait_for_record(tmp_path, 3)
            scheduler.kill()

        killer = threading.Thread(target=kill_in_the_middle)
        killer.start()
        with pytest.raises(RunError, match=f"scheduler at {address} is gone"):
            run(client, squares(tmp_path, 50, seconds=0.1), tmp_path)
        killer.join()
    assert 3 <= len(recorded(tmp_path)) < 50


COUNT = 16
CLIENT = """
import signal
import sys
from pathlib import Path
from test_run import COUNT, run, squares
from wsi_pipeline.jobs.cluster import connect

if __name__ == "__main__":
    # As at a terminal: what a shell runs in the background ignores Ctrl-C, and passes that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(sys.argv[1])
    with connect(workers=2) as client:
        run(client, squares(folder, COUNT, seconds=0.4), folder)
"""


def start_client(folder):
    """Run the units in a program of its own, a process group as a terminal makes it."""
    script = folder / "client.py"
    script.write_text(CLIENT)
    importable = (str(TESTS), str(TESTS / "jobs"), os.environ.get("PYTHONPATH"))
    return subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, importable))},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_redoes_only_unfinished_units(tmp_path, stop):
    program = start_client(tmp_path)
    wait_for_record(tmp_path, 4)
    # SIGKILL hits one process (out of memory); Ctrl-C all that belong to the terminal.
    (os.kill if stop == signal.SIGKILL else os.killpg)(program.pid, stop)
    _, said = program.communicate(timeout=120)
    assert program.returncode == -stop
    assert said.count("Traceback") == (stop == signal.SIGINT)  # workers stay silent
    done = recorded(tmp_path)
    assert 4 <= len(done) < COUNT

    program = start_client(tmp_path)
    _, said = program.communicate(timeout=120)
    assert program.returncode == 0, said
    assert executed(tmp_path).keys() == set(range(COUNT))
    for number, times in executed(tmp_path).items():
        # Twice: under way when it was stopped, or so lately done that it was not recorded.
        assert times == 1 or (times == 2 and number not in done)
    assert outputs(tmp_path) == {number: number**2 for number in range(COUNT)}
    assert recorded(tmp_path) == set(range(COUNT))
