"""Settings for new slides: where they are, and how the model's card says to read them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from wsi_pipeline.config import (
    CatalogConfig,
    Config,
    HeatmapConfig,
    JobsConfig,
    TileConfig,
    TrainConfig,
)
from wsi_pipeline.config.section import Precision
from wsi_pipeline.config_file import broken_rules, load_config
from wsi_pipeline.errors import ConfigError, RunError
from wsi_pipeline.files import write_whole
from wsi_pipeline.models.card import ModelCard
from wsi_pipeline.slides.catalog import CatalogRow, parse_row, read_catalog
from wsi_pipeline.stages.run_directory import model_folder

TABLE_SUFFIX = ".csv"
LISTED = "catalog.csv"
"""The slides, in the run directory, where they are not a folder."""
KEPT_COLUMNS = ["slide_id", "path", "tissue", "exclude", "patient_id", "mpp"]
"""Of a table of slides; labels, splits and annotations play no part."""


def settings_for(
    card: ModelCard,
    name: str,
    slides: Sequence[Path],
    out: Path,
    *,
    stride_px: int | None = None,
    mpp: float | None = None,
    precision: Precision | None = None,
    jobs: dict[str, Any] | None = None,
) -> Config:
    """Settings of a run that applies a model to new slides.

    Slides are read at the model's resolution, in patches of its size, with the tissue mask and the
    step of its training where the card states them; else the step is half a patch.

    Parameters
    ----------
    card : ModelCard
    name : str
        What the run calls the model.
    slides : sequence of Path
        A folder, a table (``.csv``), or slide files.
    out : Path
        The run directory.
    stride_px : int, optional
        Step between patches, working px, in place of the card's.
    mpp : float, optional
        Micrometres per level-0 px of slides that do not state their own.
    precision : {"float32", "bfloat16"}, optional
        Of the heatmaps; unless given, the workers decide.
    jobs : dict, optional
        Settings of the section ``jobs``.

    Raises
    ------
    ConfigError
        If the card's tiling, the stride or a path breaks a rule.
    """
    setting, source = _source(slides, out)
    catalog: dict[str, Any] = {
        setting: source, "mpp": mpp, "split": {"test": 1.0}, "patient_from": None, "copies": "keep",
    }  # fmt: skip
    try:
        return Config(
            out=out,
            catalog=CatalogConfig(**catalog),
            tile=TileConfig(**tiling(card, stride_px)),
            train=TrainConfig(name=name, weights="none"),
            heatmap=HeatmapConfig(splits=("train", "validation", "test"), precision=precision),
            jobs=JobsConfig(**(jobs or {})),
        )
    except ValidationError as error:
        raise ConfigError(
            f"model {name} cannot be applied with these settings: {broken_rules(error)}"
        ) from error


def tiling(card: ModelCard, stride_px: int | None = None) -> dict:
    """The settings of the section ``tile`` under which a model is applied.

    Parameters
    ----------
    card : ModelCard
    stride_px : int, optional
        In place of the card's.
    """
    half = card.patch_px // 2
    found = {"stride_px": half, "inner_px": half + (card.patch_px - half) % 2, **card.tiling}
    if stride_px is not None:
        found["stride_px"] = stride_px
    # Without labels, nothing is lost between inner squares.
    return {**found, "gaps": True, "level": None, "mpp": card.mpp, "patch_px": card.patch_px}


def _source(slides: Sequence[Path], out: Path) -> tuple[str, Path]:
    """The setting of ``catalog`` that names the slides, and its value."""
    for path in slides:
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist. Give slide files, a folder or a table (.csv)"
            )
    folders = [path for path in slides if path.is_dir()]
    tables = [path for path in slides if path.suffix.lower() == TABLE_SUFFIX]
    if (folders or tables) and len(slides) > 1:
        raise ConfigError(
            f"{(folders or tables)[0]} and {len(slides) - 1} more are given. Give one folder, one"
            " table (.csv), or any number of slide files"
        )
    return ("slides", slides[0].absolute()) if folders else ("csv", out / LISTED)


def begin(config: Config, model: Path, slides: Sequence[Path]) -> None:
    """Put the model and the list of slides in the run directory.

    Raises
    ------
    RunError
        If the directory holds anything but an earlier prediction.
    CatalogError
        If the given table breaks a rule.
    ModelError
        If the model's files do not belong together.
    """
    from wsi_pipeline.models.checkpoint import copy_model

    _refuse_other_content(config)
    _write_list(config, slides)
    copy_model(model, model_folder(config.out, config.train.name))


def _refuse_other_content(config: Config) -> None:
    """Refuse a folder that holds anything but an earlier prediction."""
    out = config.out
    found = sorted(path.name for path in out.glob("*") if not path.name.startswith("."))
    if not found:
        return
    if "config.yaml" not in found:
        raise RunError(
            f"{out} is not a run directory: it holds {', '.join(found[:3])}. Give --out another"
            " folder"
        )
    if load_config(out / "config.yaml").catalog.copies != config.catalog.copies:
        raise RunError(f"{out} holds a run of `wsi run`. Give --out another folder")


def _write_list(config: Config, slides: Sequence[Path]) -> None:
    """Write the table of slides that the settings name, where they are not a folder."""
    if config.catalog.csv is None:
        return
    given = slides[0].suffix.lower() == TABLE_SUFFIX
    frame = read_catalog(slides[0]) if given else _of_files(slides)
    frame = frame.reindex(columns=KEPT_COLUMNS)
    write_whole(config.catalog.csv, frame.to_csv(index=False).encode())


def _of_files(slides: Sequence[Path]) -> pd.DataFrame:
    """A row for each slide file: its id is its name without the suffix."""
    rows = [
        parse_row({"slide_id": path.stem, "path": str(path.absolute())}, str(path), CatalogRow)
        for path in slides
    ]
    return pd.DataFrame([row.model_dump() for row in rows])
