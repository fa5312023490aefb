"""Phantom slides, each drawn by a task of its own."""

from dataclasses import asdict
from pathlib import Path

from distributed import Client

from wsi_pipeline.jobs.run import Outcome, Unit, run_units
from wsi_pipeline.phantom import SlidePlan, plan_cohort, write_slide, write_table

SCHEMA_VERSION = 1


def run(
    out: Path, client: Client, *, slides: int, seed: int, size: tuple[int, int], mpp: float,
    textures: Path | None = None, normal: str = "H", lesion: str = "AC", naevi: int = 0,
) -> Outcome:  # fmt: skip
    """Write a cohort to a folder: slides, annotations, masks and the table ``slides.csv``.

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
    outcome = run_units(
        client,
        [_unit(plan, out) for plan in plans],
        run_dir=out,
        stage="phantom",
        schema_version=SCHEMA_VERSION,
    )
    write_table([outcome.results[p.slide_id] for p in plans if p.slide_id in outcome.results], out)
    return outcome


def draw_slide(plan: SlidePlan, out: str) -> dict:
    """Draw one slide: the work of a unit; its row of the table."""
    return write_slide(plan, out)


def _unit(plan: SlidePlan, out: Path) -> Unit:
    return Unit(
        plan.slide_id,
        plan.slide_id,
        inputs=asdict(plan),
        function=draw_slide,
        arguments={"plan": plan, "out": str(out)},
        output=out / "slides" / f"{plan.slide_id}.tif",
    )
