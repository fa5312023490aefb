"""Progress on the standard error stream: a bar on a terminal, a line now and then in a log."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from distributed import Client
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0

Update = Callable[..., None]
"""``update(completed, note="", total=None)``: what is done by now, and what to say beside it."""


def progress_bar(title: str, total: int | None = None) -> AbstractContextManager[Update]:
    """Show how far something is: count, note, time elapsed and remaining.

    Parameters
    ----------
    title : str
    total : int, optional
        How many there are, if known.

    Returns
    -------
    context manager
        It gives the function ``update(completed, note="", total=None)``.
    """
    console = Console(stderr=True)
    return (_bar if console.is_terminal else _lines)(console, title, total)


@contextmanager
def step_progress(client: Client, topic: str, title: str) -> Iterator[None]:
    """Show the steps of a training that runs on a worker and logs them under a Dask topic.

    Parameters
    ----------
    client : distributed.Client
    topic : str
        Each event is a dict: ``epoch`` (from 1), ``epochs``, ``step``, ``steps``, ``loss``.
    title : str
    """
    with progress_bar(title) as update:

        def show(event):
            _, now = event
            note = f"epoch {now['epoch']} of at most {now['epochs']}"
            if not math.isnan(now["loss"]):  # in an epoch's first second none is known
                note += f", loss {now['loss']:.4f}"
            update(now["step"], note, total=now["steps"])

        client.subscribe_topic(topic, show)
        try:
            yield
        finally:
            client.unsubscribe_topic(topic)


@contextmanager
def _bar(console: Console, title: str, total: int | None) -> Iterator[Update]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, note="")

        def update(completed: int, note: str = "", total: int | None = None):
            bar.update(task, completed=completed, note=note, total=total)

        yield update


@contextmanager
def _lines(console: Console, title: str, total: int | None) -> Iterator[Update]:
    started = printed = time.monotonic()
    line = None

    def update(completed: int, note: str = "", total: int | None = total):
        nonlocal line, printed
        counted = f"{completed}/{'?' if total is None else total}"
        line = ", ".join(filter(None, (f"{title}: {counted}", note)))
        if time.monotonic() - printed >= SECONDS_BETWEEN_LINES:
            show()

    def show():
        nonlocal line, printed
        printed = time.monotonic()
        text = f"{line}, {printed - started:.0f} s"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        line = None

    try:
        yield update
    finally:
        if line is not None:
            show()
