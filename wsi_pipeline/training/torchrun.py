"""Work in several processes under torchrun: started, listened to, and ended together."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dask.system import CPU_COUNT

from wsi_pipeline.errors import RunError, WsiError
from wsi_pipeline.files import write_json

Report = Callable[[dict], None]
Work = Callable[[object, Report], dict]

RESULT, ERROR = "result.json", "error.txt"
"""How the work ended, beside the file of its job."""
REPORT = "\x1e"
"""Before JSON on standard output, on which libraries print as well (RFC 7464)."""


def in_processes(
    work: Work, job: object, *, processes: int, gpus: list[str], folder: Path, report: Report
) -> dict:
    """Do the same work in several processes of this machine. They end when this one does.

    Parameters
    ----------
    work : callable
        Defined at a module's top level. Takes the job and a function that takes a dict of plain
        JSON values now and then, and returns such a dict. See `distributed`.
    job : object
        Picklable.
    processes : int
    gpus : list of str
        Those that the processes see, as ``CUDA_VISIBLE_DEVICES`` names them.
    folder : path
        Gets ``torchrun.log``, what the processes print to standard error.
    report : callable
        Gets what the first process reports.

    Returns
    -------
    dict
        The first process's result.

    Raises
    ------
    RunError
        With the error of the process that failed first, or with the log's end where none told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "torchrun.log"
    with tempfile.TemporaryDirectory() as exchange:
        job_file = Path(exchange) / "job.pickle"
        job_file.write_bytes(pickle.dumps((work, job)))
        # Not `-m`: each process that the work starts would import what it runs anew.
        run = f"from {__name__} import process; process({str(job_file)!r})"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={processes}", "--no-python", sys.executable, "-c", run,
        ]  # fmt: skip
        environment = {
            **os.environ,
            # A local worker sees one GPU alone; this takes all that its client was shown.
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            # Dask gives a worker one, but this is alone.
            "OMP_NUM_THREADS": str(max(1, CPU_COUNT // processes)),
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with (
            log_file.open("w") as log,
            subprocess.Popen(command, stderr=log, env=environment, **pipes) as torchrun,
        ):
            for line in torchrun.stdout:
                if line.startswith(REPORT):
                    report(json.loads(line.removeprefix(REPORT)))
        result, error = (job_file.with_name(name) for name in (RESULT, ERROR))
        result = json.loads(result.read_text()) if result.is_file() else None
        error = error.read_text(encoding="utf-8") if error.is_file() else ""
    if error:
        raise RunError(error)
    if torchrun.returncode or result is None:
        raise RunError(
            f"the work of {processes} processes ended with status {torchrun.returncode}; the end of"
            f" {log_file}: {log_file.read_text()[-2000:]}"
        )
    return result


def process(job_file: str) -> None:
    """What each process of `in_processes` does.

    Beside the job's file the first rank leaves its result, or the first to fail its error; the
    first rank prints what it reports, in lines of JSON after a mark. Standard input, which ends
    with the process that started torchrun, ends it too.
    """

    def end_with_it() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    job_file = Path(job_file)
    try:
        work, job = pickle.loads(job_file.read_bytes())
        result = work(job, _say)
        if os.environ["RANK"] == "0":
            write_json(job_file.with_name(RESULT), result)
    except Exception as error:
        reason = str(error) if isinstance(error, WsiError) else traceback.format_exc()
        _tell_first(job_file.with_name(ERROR), reason)
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # an orderly end may wait for processes that wait for this one


def _tell_first(path: Path, reason: str) -> None:
    """Write a reason, unless another process has: this one's follows from it."""
    with (
        suppress(FileExistsError),
        path.open("x", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(reason)


def _say(event: dict) -> None:
    print(REPORT + json.dumps(event), flush=True)
