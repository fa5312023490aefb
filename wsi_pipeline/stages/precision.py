"""The precision of a run's models: decided once, kept by whoever goes on, and what it changes."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from distributed import Client
from pydantic import TypeAdapter, ValidationError

from wsi_pipeline.config import Config
from wsi_pipeline.errors import RunError, SlideError
from wsi_pipeline.files import write_json
from wsi_pipeline.jobs.cluster import GPU, has_resource, worker_addresses
from wsi_pipeline.jobs.run import Outcome, Unit, run_units
from wsi_pipeline.models.checkpoint import ModelCard
from wsi_pipeline.models.inference import dense_predictor, predictor
from wsi_pipeline.models.precision import Precision, native_precision
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.seeds import derived_seed
from wsi_pipeline.slides.open_slides import cached_slide
from wsi_pipeline.stages.run_directory import (
    model_folder,
    model_id,
    of_model,
    precision_path,
)
from wsi_pipeline.stages.slab_stores import StorePlan
from wsi_pipeline.stages.worker_model import worker_model

SCHEMA_VERSION = 1
SLIDES_COMPARED, PATCHES_COMPARED = 16, 4
"""Slides, and patches of each, that bfloat16 is compared with float32 on."""
FINE_PATCHES_COMPARED = 1
"""The same where each patch gives a whole square of fine heatmap pixels."""

logger = logging.getLogger(__name__)


def decide_precision(
    config: Config, client: Client, section: Literal["train", "heatmap"]
) -> Config:
    """Give settings that say which precision a stage computes in: all workers, all resumptions.

    A setting is obeyed. Where it is null, what the run began with is kept (``RUN/precision.json``).
    A run that begins takes bfloat16 if all workers that may do the work have it natively, else
    float32, and writes down which.

    Workers without native bfloat16 emulate it where they must: slowly, and the log says so.

    Raises
    ------
    RunError
        If the file cannot be read.
    """
    path = precision_path(config.out)
    settings, decided = getattr(config, section), _read(path)
    precision = settings.precision or decided.get(section)
    if precision != "float32":
        precision = _of_workers(client, section, precision)
    if settings.precision is None:
        write_json(path, decided | {section: precision})
    settings = settings.model_copy(update={"precision": precision})
    return config.model_copy(update={section: settings})


def _of_workers(client: Client, section: str, precision: Precision | None) -> Precision:
    """The precision unless it is still to be decided, from what the workers have natively."""
    native = _native_precisions(client)
    slow = native.count("float32")
    if precision is None:
        precision = "float32" if slow else "bfloat16"
        if 0 < slow < len(native):
            logger.info(
                "%s: float32, because %d of %d workers have no bfloat16 instructions",
                section, slow, len(native),
            )  # fmt: skip
    elif slow:
        logger.warning(
            "%s.precision is bfloat16, but %d of %d workers have no instructions for it: they"
            " emulate it, several times slower than float32",
            section, slow, len(native),
        )  # fmt: skip
    return precision


def compare_precisions(
    config: Config,
    client: Client,
    card: ModelCard,
    plans: Sequence[StorePlan],
    *,
    stage: str,
    fine_stride_px: int | None = None,
) -> Outcome:
    """Compare the model in bfloat16 with itself in float32, on patches drawn from the slides.

    Parameters
    ----------
    config, client, card
    plans : sequence of StorePlan
        Of the heatmaps.
    stage : str
        What the record calls this work, before the model's name.
    fine_stride_px : int, optional
        Of a fine heatmap; unless given, the model gives one probability for each patch.

    Returns
    -------
    Outcome
        One unit, see `probability_differences`.
    """
    name = config.train.name
    unit = _comparison(config, card, plans, fine_stride_px)
    return run_units(
        client,
        [unit],
        run_dir=config.out,
        stage=of_model(stage, name),
        schema_version=SCHEMA_VERSION,
        retries=config.jobs.retries,
        window=config.jobs.window,
        resources={GPU: 1} if has_resource(client, GPU) else None,
    )


def probability_differences(
    patches: list[dict], model: str, weights: str, model_name: str, fine_stride_px: int | None
) -> dict:
    """How far a model's probabilities in bfloat16 are from those in float32: the work of a unit.

    Parameters
    ----------
    patches : list of dict
        ``path``, ``mpp``, ``x``, ``y`` (level-0 px), ``patch_px``, ``downsample``. Those that
        cannot be decoded are passed over: the heatmap stage reports them.

    Returns
    -------
    dict
        ``model`` (see `model_id`), ``patches`` compared, ``largest`` and ``mean`` absolute
        difference (None without patches).
    """
    module, card = worker_model(model, weights)
    device = next(module.parameters()).device
    exact, fast = (
        _predictor(module, card, device, precision, fine_stride_px)
        for precision in ("float32", "bfloat16")
    )
    found = []
    for patch in patches:
        side = patch["patch_px"]
        slide = cached_slide(patch["path"], patch["mpp"])
        try:
            pixels = slide.read(patch["x"], patch["y"], side, side, patch["downsample"])
        except SlideError:
            continue
        found.append(np.abs(exact(pixels) - fast(pixels)).ravel())
    differences = np.concatenate(found) if found else None
    return {
        "model": model_name,
        "patches": len(found),
        "largest": None if differences is None else float(differences.max()),
        "mean": None if differences is None else float(differences.mean()),
    }


def _predictor(module, card: ModelCard, device, precision: Precision, fine_stride_px: int | None):
    """A patch, uint8 (H, W, 3), to its probabilities."""
    options = {"device": device, "precision": precision}
    if fine_stride_px is None:
        predict = predictor(module, **card.normalisation, **options)
        return lambda pixels: predict(pixels[np.newaxis])
    options |= {"mean": card.mean, "std": card.std, "gamma": card.gamma}
    return dense_predictor(module.subnet, stride_px=fine_stride_px, **options)


def _comparison(
    config: Config, card: ModelCard, plans: Sequence[StorePlan], fine_stride_px: int | None
) -> Unit:
    rng = np.random.default_rng(derived_seed(config.seed, "precision"))
    drawn = rng.permutation(len(plans))[:SLIDES_COMPARED]
    drawn = [plans[number] for number in sorted(drawn)]
    count = PATCHES_COMPARED if fine_stride_px is None else FINE_PATCHES_COMPARED
    own = {
        "model_name": model_id(config.train.name, card.weights_sha256),
        "fine_stride_px": fine_stride_px,
    }
    inputs = own | {"seed": config.seed, "slides": [plan.inputs for plan in drawn]}
    arguments = own | {
        "patches": [patch for plan in drawn for patch in _draw(plan, count, rng)],
        "model": str(model_folder(config.out, config.train.name)),
        "weights": card.weights_sha256,
    }
    return Unit(config.train.name, "", inputs, probability_differences, arguments)


def _draw(plan: StorePlan, count: int, rng: np.random.Generator) -> list[dict]:
    """Some of a slide's indexed patches; none where the index cannot be read."""
    try:
        index = read_index(plan.index)
    except RunError:  # its heatmap has failed and says why
        return []
    corners = index.table.select(["x", "y"]).take(
        np.sort(rng.permutation(index.table.num_rows)[:count])
    )
    common = {
        "path": plan.slide_path,
        "mpp": plan.mpp,
        "patch_px": index.grid.patch_px,
        "downsample": index.grid.downsample,
    }
    return [corner | common for corner in corners.to_pylist()]


def _native_precisions(client: Client) -> list[Precision]:
    """Of each worker that models may run on."""
    resources = {GPU: 1} if has_resource(client, GPU) else None
    found = client.run(_native_precision, workers=worker_addresses(client, resources))
    return list(found.values())


def _native_precision() -> Precision:
    return native_precision("cuda" if torch.cuda.is_available() else "cpu")


def _read(path: Path) -> dict[str, Precision]:
    try:
        return TypeAdapter(dict[str, Precision]).validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise RunError(
            f"{path} cannot be read: {error}. It says in which precision the run began. Set"
            " train.precision and heatmap.precision, and delete it"
        ) from error
