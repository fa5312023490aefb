"""Phantom slides, each drawn by a task of its own."""

import json
from dataclasses import dataclass
from pathlib import Path

from distributed import Client

from wsi_pipeline.errors import RunError
from wsi_pipeline.files import write_json
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import Output, Unit
from wsi_pipeline.phantom import SlidePlan, plan_cohort, write_slide, write_table

SCHEMA_VERSION = 2


def run(
    out: Path, client: Client, *, slides: int, seed: int, size: tuple[int, int], mpp: float,
    textures: Path | None = None, normal: str = "H", lesion: str = "AC", naevi: int = 0,
) -> Outcome:  # fmt: skip
    """Write a cohort to a folder: slides, annotations, masks and the table ``slides.csv``.

    A cohort of the same plan goes on where it was.

    Parameters
    ----------
    out : path
    client : Client
    slides, seed, size, mpp, textures, normal, lesion, naevi
        As `plan_cohort` takes them.

    Raises
    ------
    ConfigError
        If the cohort cannot be planned.
    RunError
        If the folder holds a slide of another plan: runs may use it.
    """
    plans = plan_cohort(
        slides,
        seed,
        size=size,
        mpp=mpp,
        textures=textures,
        normal=normal,
        lesion=lesion,
        naevi=naevi,
    )
    out = Path(out)
    units = [DrawSlide(plan.slide_id, plan, Output(out)) for plan in plans]
    _refuse_another_cohort(units, out)
    outcome = run_units(
        client,
        units,
        run_dir=out,
        stage="phantom",
        schema_version=SCHEMA_VERSION,
    )
    write_table([outcome.results[p.slide_id] for p in plans if p.slide_id in outcome.results], out)
    return outcome


@dataclass(frozen=True)
class DrawSlide(Unit):
    """Draw one slide; what it returns is its row of the table."""

    plan: SlidePlan
    folder: Output

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The slide."""
        return (Path(self.folder) / "slides" / f"{self.slide_id}.tif",)

    def run(self) -> dict:
        """As `write_slide`."""
        return write_slide(self.plan, self.folder)


def _refuse_another_cohort(units: list[Unit], out: Path) -> None:
    """Refuse to overwrite slides; the plans are written down before the first of them is drawn."""
    path = out / "plans.json"
    drawn = json.loads(path.read_bytes()) if path.exists() else {}
    plans = {unit.key: unit.hash(SCHEMA_VERSION) for unit in units}
    for unit in units:
        (slide,) = unit.outputs
        if slide.exists() and drawn.get(unit.key) != plans[unit.key]:
            raise RunError(
                f"{slide}: it was drawn to another plan (seed, size, mpp, tiles, naevi or"
                " version of the program), and runs may use it: choose another folder, or delete"
                " this cohort first"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, drawn | plans)
