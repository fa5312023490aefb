"""Measure the pipeline's hot paths, each against a plain baseline in the same run.

    python -m benchmarks [--quick] [--out docs/benchmarks.md] [SECTION ...]

Machines differ and are noisy: what counts is the ratio, the median over repeated pairs of runs of
baseline and pipeline in turn. The page keeps what was measured before of other sections, and on
machines with other devices.
"""

import argparse
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import feed, froc, heatmap, labelling, patchnet, reading, sampling, scale, tissue
from benchmarks.measure import Row, Scale, Table

SECTIONS: dict[str, Callable[[bool], list[Row | Scale | Table | str]]] = {
    "reading": reading.rows,
    "labelling": labelling.rows,
    "sampling": sampling.rows,
    "feed": feed.rows,
    "training": feed.training_rows,
    "model": heatmap.model_speed,
    "heatmap": heatmap.rows,
    "patchnet": patchnet.rows,
    "froc": froc.rows,
    "scale": scale.rows,
    "tissue": tissue.rows,
}
LIBRARIES = (
    "wsi_pipeline", "torch", "openslide-python", "simplejpeg", "tifffile", "zarr", "shapely",
    "numpy",
)  # fmt: skip
INTRODUCTION = """# Benchmarks

Written by `make bench` (`make bench QUICK=1`: small sizes, in minutes). Each row compares the
pipeline with a plain baseline in the same run, in turn; the ratio is the median of the pairs'
ratios. Absolute figures vary with the machine.
"""


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    for name in arguments.sections or SECTIONS:
        found = section(name, SECTIONS[name](arguments.quick), arguments.quick)
        print(found, flush=True)
        arguments.out.write_text(with_section(_text(arguments.out), found))


def section(name: str, rows: list[Row | Scale | Table | str], quick: bool) -> str:
    """A section of the page: its figures as tables, notes, and what they were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    ratios, jobs = ([row for row in rows if isinstance(row, kind)] for kind in (Row, Scale))
    tables = "".join(_table(row.header, row.lines) for row in rows if isinstance(row, Table))
    notes = [f"- {note}" for note in rows if isinstance(note, str)]
    libraries = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    return f"""## {name.capitalize()}, {os.cpu_count()} cores, {device}
{tables}{_ratios(ratios)}{_jobs(jobs)}{_lines(notes)}
{datetime.now(UTC):%Y-%m-%d}, commit {_commit()}: `python -m benchmarks{" --quick" * quick} {name}`,
{platform.machine()}, Python {platform.python_version()}, {libraries}.
"""


def with_section(page: str, new: str) -> str:
    """The page with a section in the place of the one of its heading, or at the end."""
    _, *old = page.split("\n## ")
    sections = {text.splitlines()[0]: text.rstrip() for text in old}
    new = new.removeprefix("## ").rstrip()
    sections[new.splitlines()[0]] = new
    return INTRODUCTION + "".join(f"\n## {text}\n" for text in sections.values())


def _ratios(rows: list[Row]) -> str:
    lines = [
        f"| {r.what} | {_figure(r.per_second)} {r.unit}/s | {r.baseline} |"
        f" {_figure(r.baseline_per_second)} {r.unit}/s | {_figure(r.ratio)} |"
        for r in rows
    ]
    return _table("| what | pipeline | baseline | baseline's rate | ratio |", lines)


def _jobs(rows: list[Scale]) -> str:
    lines = [
        f"| {r.what} | {r.did} | {r.seconds:,.1f} s | {r.own_mib:,.0f} MiB |"
        f" {'' if r.worker_mib is None else f'{r.worker_mib:,.0f} MiB'} |"
        f" {'' if r.tasks is None else f'{r.tasks:,}'} |"
        for r in rows
    ]
    header = "| job | done | time | most memory of its process | of a worker | tasks |"
    return _table(header, lines)


def _table(header: str, lines: list[str]) -> str:
    rule = "|---" * (header.count("|") - 1) + "|"
    return _lines([header, rule, *lines] if lines else [])


def _lines(lines: list[str]) -> str:
    return "\n".join(["", *lines, ""]) if lines else ""


def _figure(value: float) -> str:
    """At least two significant digits."""
    return f"{value:,.0f}" if value >= 20 else f"{value:.2g}"


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
