import pytest
from unit_functions import log_steps

from wsi_pipeline.jobs import progress
from wsi_pipeline.jobs.cluster import connect
from wsi_pipeline.jobs.progress import progress_bar, step_progress


@pytest.fixture(autouse=True)
def plain_stream(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def test_a_log_gets_the_last_state_only_when_it_is_soon_over(capsys):
    with progress_bar("tile", 3) as update:
        update(1)
        update(3, "1 failed")
    assert capsys.readouterr().err == "tile: 3/3, 1 failed, 0 s\n"


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with progress_bar("tile") as update:
        update(1)
        update(2, "[red] failed", total=7)
    lines = ["tile: 1/?, 0 s", "tile: 2/7, [red] failed, 0 s"]
    assert capsys.readouterr().err.splitlines() == lines


def test_nothing_is_said_of_nothing(capsys):
    with progress_bar("tile", 0):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_counts_and_note(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("tile", 3) as update:
        update(2, "1 failed")
    shown = capsys.readouterr().err
    assert "━" in shown
    assert "tile" in shown
    assert "2/3" in shown
    assert "1 failed" in shown


def test_steps_logged_on_a_worker_are_shown_here(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with connect(workers=1) as client, step_progress(client, "steps", "train"):
        client.submit(log_steps, "steps").result()
    lines = capsys.readouterr().err.splitlines()
    assert [line.rsplit(",", 1)[0] for line in lines] == [
        "train: 1/2, epoch 3 of at most 9, loss 0.2500",
        "train: 2/2, epoch 3 of at most 9, loss 0.2500",
    ]
