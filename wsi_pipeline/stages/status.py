"""What of a run is done, what failed, what is left, from its files alone."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from wsi_pipeline.config import Config
from wsi_pipeline.config_file import load_config
from wsi_pipeline.errors import RunError
from wsi_pipeline.jobs.record import Failure, read_done, read_failures
from wsi_pipeline.stages.leakage import learned_patients, of_patients
from wsi_pipeline.stages.run_directory import (
    CACHE_STAGES,
    EXPLAIN_STAGES,
    FINE_STAGES,
    TRAINING_SPLITS,
    cache_path,
    evaluation_folder,
    fine_folder,
    heatmap_folder,
    index_path,
    model_folder,
    model_id,
    of_model,
    prediction_folder,
    read_model_card,
    read_slides,
    slides_path,
)

REASONS_TOLD = 3
"""Why OpenSlide reads slides: the most frequent reasons."""


@dataclass(frozen=True)
class StageStatus:
    """One stage and its units, which are slides, or for training the model, of today's settings.

    Parameters
    ----------
    stage : str
    done, failed : int
        As recorded, but for what has lost its output or is of other weights than the model's.
        Whether other inputs changed since is found out only by running the stage.
    left : int or None
        None until the stage before says how many there are.
    """

    stage: str
    done: int
    failed: int
    left: int | None


def stage_status(run_dir: Path) -> list[StageStatus]:
    """Count what a run has done, also while it runs.

    Raises
    ------
    ConfigError, RunError
        If there is no run, or a file of it is damaged.
    """
    run_dir = Path(run_dir)
    config = load_config(run_dir / "config.yaml")
    failures = read_failures(run_dir)
    found = []
    for stage, expected in _expected_units(run_dir, config).items():
        failed = {row.unit for row in failures if row.stage == stage}
        done = _still_done(run_dir, config.train.name, stage) - failed
        if expected is not None:  # of today's settings: what others left does not count
            failed, done = failed & expected, done & expected
        left = None if expected is None else len(expected) - len(done) - len(failed)
        found.append(StageStatus(stage, len(done), len(failed), left))
    return found


def notes_by_slide(run_dir: Path, model: str) -> dict[str, list[str]]:
    """What a stage did not fail on but wants known: repaired outlines, lesions without tissue."""
    notes: defaultdict[str, list[str]] = defaultdict(list)
    for stage in ("catalog", "tile", *(of_model(stage, model) for stage in ("heatmap", "fine"))):
        for slide_id, line in read_done(run_dir, stage).items():
            notes[slide_id] += line["result"].get("notes", [])
    return {slide_id: list(dict.fromkeys(found)) for slide_id, found in notes.items() if found}


def reading_summary(results: Iterable[dict]) -> str:
    """Say in a sentence what reads the slides.

    Parameters
    ----------
    results : iterable of dict
        Of the heatmap stage's units; those of slides have ``backend`` and, unless they are of an
        older version, ``backend_reason``: see `stores.finish_slide`.

    Returns
    -------
    str
        Empty if no slide's result has a backend.
    """
    slides = [result for result in results if "backend" in result]
    others = [slide for slide in slides if slide["backend"] != "tiles"]
    parts = []
    if decoded := len(slides) - len(others):
        parts.append(
            f"tiles are decoded for {_slides(decoded)}, after the first 4 megapixels of each"
        )
    if others:
        reasons = Counter(slide.get("backend_reason", slide["backend"]) for slide in others)
        told = "; ".join(f"{n}: {reason}" for reason, n in reasons.most_common(REASONS_TOLD))
        parts.append(f"OpenSlide reads {_slides(len(others))} ({told})")
    return "; ".join(parts)


def _slides(count: int) -> str:
    return f"{count} slide{'' if count == 1 else 's'}"


def heatmap_reading(run_dir: Path, model: str) -> str:
    """Give the `reading_summary` of one model's heatmaps, as they are on record."""
    done = read_done(run_dir, of_model("heatmap", model))
    return reading_summary(line["result"] for line in done.values())


def precision_difference(run_dir: Path, model: str, stage: str = "precision") -> dict | None:
    """How far a model's probabilities in bfloat16 are from those in float32, as it is on record.

    Parameters
    ----------
    run_dir : Path
    model : str
        Its name.
    stage : {"precision", "fine_precision"}
        Of heatmaps or of fine heatmaps.

    Returns
    -------
    dict or None
        ``patches`` compared, ``largest`` and ``mean`` absolute difference. None if today's model
        was not compared: its heatmaps are in float32, or of an earlier version.
    """
    line = read_done(run_dir, of_model(stage, model)).get(model)
    if line is None or line["result"]["model"] != _model_today(run_dir, model):
        return None
    return {name: line["result"][name] for name in ("patches", "largest", "mean")}


def precision_summary(run_dir: Path, model: str, stage: str = "precision") -> str:
    """Say `precision_difference` in a sentence; empty where there is none."""
    found = precision_difference(run_dir, model, stage)
    if found is None or not found["patches"]:
        return ""
    return (
        f"computed in bfloat16. On {found['patches']} patch{'' if found['patches'] == 1 else 'es'}"
        " drawn at random, the probabilities"
        f" differ from float32 by at most {found['largest']:.2g} (mean {found['mean']:.2g})"
    )


def failures_on_the_way(run_dir: Path, model: str) -> list[Failure]:
    """The failures of the stages that lead to one model's evaluation."""
    shared = ("catalog", "tile", "train")
    stages = ("predict", "heatmap", "predictions", "evaluate", "pictures")
    own = {of_model(stage, model) for stage in stages}
    return [row for row in read_failures(run_dir) if row.stage in shared or row.stage in own]


def _still_done(run_dir: Path, model: str, stage: str) -> set[str]:
    """Units on record whose output is there, made by today's model and of today's heatmaps."""
    done = read_done(run_dir, stage)
    output = _outputs(run_dir, model).get(stage)
    if output is not None:
        done = {key: line for key, line in done.items() if output(key).exists()}
    if stage in (of_model("heatmap", model), of_model("fine", model)):
        today = _model_today(run_dir, model)
        made_by = {key: line["result"].get("model", today) for key, line in done.items()}
        return {key for key, of in made_by.items() if of == today}  # older records do not say
    if source := _made_of(model).get(stage):
        lines, there = read_done(run_dir, source), _still_done(run_dir, model, source)
        return {k for k in done if k in there and lines[k]["finished"] <= done[k]["finished"]}
    return set(done)


def _outputs(run_dir: Path, model: str) -> dict[str, Callable[[str], Path]]:
    """Where the outputs of a stage's units lie, by key; of stages whose outputs stay there."""
    heatmaps, fine = heatmap_folder(run_dir, model), fine_folder(run_dir, model)
    _, fine_stage, pictures = (of_model(stage, model) for stage in FINE_STAGES)
    return {
        "tile": partial(index_path, run_dir),
        CACHE_STAGES[1]: partial(cache_path, run_dir),
        "train": lambda name: model_folder(run_dir, name) / "model.json",
        of_model("heatmap", model): lambda slide_id: heatmaps / f"{slide_id}.zarr",
        of_model("evaluate", model): lambda slide_id: (
            evaluation_folder(run_dir, model) / "slides" / f"{slide_id}.jpg"
        ),
        fine_stage: lambda slide_id: fine / f"{slide_id}.zarr",
        pictures: lambda slide_id: fine / f"{slide_id}.jpg",
    }


def _made_of(model: str) -> dict[str, str]:
    """Which stage's heatmaps a stage reads, slide by slide."""
    made_of = {"evaluate": "heatmap", "predictions": "heatmap", "fine_pictures": "fine"}
    return {of_model(stage, model): of_model(source, model) for stage, source in made_of.items()}


def _model_today(run_dir: Path, model: str) -> str | None:
    try:
        return model_id(model, read_model_card(run_dir, model)["weights_sha256"])
    except RunError:  # not there
        return None


def _expected_units(run_dir: Path, config: Config) -> dict[str, set[str] | None]:
    predict, heatmap, evaluate = (
        of_model(stage, config.train.name) for stage in ("predict", "heatmap", "evaluate")
    )
    if not slides_path(run_dir).exists():
        return dict.fromkeys(("catalog", "tile", "train", predict, heatmap, evaluate))
    slides = read_slides(run_dir)
    begun = [of_model(stage, config.train.name) for stage in EXPLAIN_STAGES]
    begun = [stage for stage in begun if read_done(run_dir, stage)]  # no part of every run
    in_split = slides["split"].isin
    predicted = set(slides["slide_id"][in_split(config.heatmap.splits)])
    learned = of_patients(slides, _learned(run_dir, config.train.name))
    found = {
        "catalog": set(pd.read_parquet(slides_path(run_dir), columns=["slide_id"])["slide_id"]),
        "tile": set(slides["slide_id"]),
        "train": {config.train.name},
        predict: None,  # slabs: how many there are is known while they are made
        heatmap: predicted,
        evaluate: predicted - set(slides["slide_id"][learned]),
        **dict.fromkeys(begun),  # how many there are depends on what is asked for
    }
    if fine_folder(run_dir, config.train.name).is_dir():  # a stage that only some runs have
        slabs, fine, pictures = (of_model(stage, config.train.name) for stage in FINE_STAGES)
        found |= {slabs: None, fine: predicted, pictures: predicted}
    if prediction_folder(run_dir, config.train.name).is_dir():
        for unneeded in ("train", evaluate):  # where a model was brought in and there are no labels
            if not read_done(run_dir, unneeded):
                del found[unneeded]
        found[of_model("predictions", config.train.name)] = predicted
    if cache_path(run_dir, "any").parent.is_dir():  # another
        shards, cache = CACHE_STAGES
        found |= {shards: None, cache: set(slides["slide_id"][in_split(TRAINING_SPLITS)])}
    return found


def _learned(run_dir: Path, model: str) -> set[str]:
    try:
        return learned_patients(read_model_card(run_dir, model))
    except RunError:  # not trained yet
        return set()
