"""Units of work for the tests of jobs, and of other tests, in a module that workers can import."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from distributed import get_worker

from wsi_pipeline.errors import SlideError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.jobs.unit import Output, Unhashed, Unit


@dataclass(frozen=True)
class Call(Unit):
    """A unit that calls a function: only `inputs` and the names count."""

    name: str
    inputs: dict
    function: Unhashed[Callable]
    arguments: Unhashed[dict] = field(default_factory=dict)
    out: Output | None = None
    picture: Output | None = None

    @property
    def key(self):
        return self.name

    def run(self):
        return self.function(**self.arguments)


def call(key, slide_id, inputs, function, arguments=None, out=None) -> Call:
    return Call(slide_id, key, inputs, function, arguments or {}, out and Output(out))


def square(number: int, out: str | None = None, log: str | None = None, seconds: float = 0) -> dict:
    """Square a number into a file; the log gets a line for each time this is executed."""
    _log(log, number)
    time.sleep(seconds)
    if out is not None:
        with replace_atomically(out) as part:
            part.write_text(str(number**2))
    return {"square": number**2}


def refuse(path: str, log: str | None = None) -> dict:
    _log(log, path)
    raise SlideError(f"{path}: is no slide,\n  the first bytes say")


def divide_by_zero() -> dict:
    return {"quotient": 1 / 0}


def read_in_part(out: str, unread: list[str]) -> dict:
    Path(out).write_text("the rest")
    return {"patches": 3, "failures": unread}


def die(log: str) -> dict:
    _log(log, "die")
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def unserialisable() -> dict:
    return {"path": Path("a")}


def pairs() -> dict:
    return {"pairs": [(1, 2)], "by": {1: "one"}}


def visible_gpu() -> dict:
    return {"gpu": os.environ["CUDA_VISIBLE_DEVICES"]}


def exit_code_of_a_child() -> dict:
    child = multiprocessing.get_context("spawn").Process(target=os.getpid)
    child.start()
    child.join()
    return {"code": child.exitcode}


def log_steps(topic: str) -> dict:
    for step in (1, 2):
        event = {"epoch": 3, "epochs": 9, "step": step, "steps": 2, "loss": 0.25}
        get_worker().log_event(topic, event)
    return {}


def _log(path: str | None, line):
    if path is not None:
        with Path(path).open("a") as file:
            file.write(f"{line}\n")
