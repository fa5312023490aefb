"""The precision of a run's models: decided once, kept by whoever goes on, and what it changes."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from distributed import Client
from pydantic import TypeAdapter, ValidationError

from wsi_pipeline.config import Config
from wsi_pipeline.errors import ModelError, RunError, SlideError
from wsi_pipeline.files import write_json
from wsi_pipeline.jobs.cluster import GPU, has_resource, worker_addresses
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import Unit
from wsi_pipeline.models.card import ModelCard
from wsi_pipeline.models.inference import dense_predictor, predictor
from wsi_pipeline.models.patchnet import subnet_of
from wsi_pipeline.models.precision import Precision, native_precision
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.seeds import derived_seed
from wsi_pipeline.slides.open_slides import cached_slide
from wsi_pipeline.stages.run_directory import of_model, precision_path
from wsi_pipeline.stages.stores import SlabStore
from wsi_pipeline.stages.worker_model import TrainedModel, worker_device, worker_model

SCHEMA_VERSION = 1
SLIDES_COMPARED, PATCHES_COMPARED = 16, 4
"""Slides, and patches of each, that bfloat16 is compared with float32 on."""
FINE_PATCHES_COMPARED = 1
"""The same where each patch gives a whole square of fine heatmap pixels."""

logger = logging.getLogger(__name__)


def decide_precision(
    config: Config,
    client: Client,
    section: Literal["train", "heatmap"],
    card: ModelCard | None = None,
) -> Config:
    """Give settings that say which precision a stage computes in: all workers, all resumptions.

    A setting is obeyed. Where it is null, what the run began with is kept (``RUN/precision.json``).
    A run that begins takes bfloat16 if all workers that may do the work have it natively, else
    float32, and writes down which. Training on CPUs is float32: see docs/training.md.

    Workers without native bfloat16 emulate it where they must: slowly, and the log says so.

    A model that is an archive (see `card`) computes in float32, whatever the run began with.

    Raises
    ------
    RunError
        If the file cannot be read.
    ModelError
        If the setting is bfloat16 and the model an archive.
    """
    path = precision_path(config.out)
    settings = getattr(config, section)
    if card is not None and card.archived:
        refuse_precision(card, settings.precision)
        settings = settings.model_copy(update={"precision": "float32"})
        return config.model_copy(update={section: settings})
    decided = _read(path)
    precision = settings.precision or decided.get(section)
    if precision != "float32":
        precision = _of_workers(client, section, precision)
    if settings.precision is None:
        write_json(path, decided | {section: precision})
    settings = settings.model_copy(update={"precision": precision})
    return config.model_copy(update={section: settings})


def refuse_precision(card: ModelCard, precision: Precision | None) -> None:
    """Raise ModelError if a model cannot compute in a precision; None: it is to be decided."""
    if card.archived and precision == "bfloat16":
        raise ModelError(
            f"heatmap.precision is bfloat16, but the model {card.name} is a file of the format"
            f" {card.architecture}, which computes in float32. Set heatmap.precision to null"
        )


def _of_workers(client: Client, section: str, precision: Precision | None) -> Precision:
    """The precision unless it is still to be decided, from what the workers have natively."""
    native = _native_precisions(client, section)
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
    model: TrainedModel,
    stores: Sequence[SlabStore],
    *,
    stage: str,
    fine_stride_px: int | None = None,
) -> Outcome:
    """Compare the model in bfloat16 with itself in float32, on patches drawn from the slides.

    Parameters
    ----------
    config, client, model
    stores : sequence of SlabStore
        The heatmaps.
    stage : str
        What the record calls this work, before the model's name.
    fine_stride_px : int, optional
        Of a fine heatmap; unless given, the model gives one probability for each patch.

    Returns
    -------
    Outcome
        One unit, see `ComparePrecisions`.
    """
    order = np.random.default_rng(derived_seed(config.seed, "precision")).permutation(len(stores))
    drawn = [stores[number] for number in sorted(order[:SLIDES_COMPARED])]
    patches = PATCHES_COMPARED if fine_stride_px is None else FINE_PATCHES_COMPARED
    return run_units(
        client,
        [ComparePrecisions("", model, tuple(drawn), patches, fine_stride_px, config.seed)],
        run_dir=config.out,
        stage=of_model(stage, model.name),
        schema_version=SCHEMA_VERSION,
        retries=config.jobs.retries,
        window=config.jobs.window,
        resources={GPU: 1} if has_resource(client, GPU) else None,
    )


@dataclass(frozen=True)
class ComparePrecisions(Unit):
    """Find how far a model's probabilities in bfloat16 are from those in float32.

    Parameters
    ----------
    model : TrainedModel
    stores : tuple of SlabStore
        The heatmaps of the slides that patches are drawn from.
    patches : int
        Of each slide, at most. Those that cannot be decoded are passed over: the heatmap stage
        reports them.
    fine_stride_px : int or None
        See `compare_precisions`.
    seed : int
    """

    model: TrainedModel
    stores: tuple[SlabStore, ...]
    patches: int
    fine_stride_px: int | None
    seed: int

    @property
    def key(self) -> str:
        """The model's name."""
        return self.model.name

    def run(self) -> dict:
        """Compare.

        Returns
        -------
        dict
            ``model`` (see `TrainedModel.id`), ``patches`` compared, ``largest`` and ``mean``
            absolute difference (None without patches).
        """
        module, card = worker_model(self.model)
        device = worker_device()
        exact, fast = (
            _predictor(module, card, device, precision, self.fine_stride_px)
            for precision in ("float32", "bfloat16")
        )
        found = [
            np.abs(exact(pixels) - fast(pixels)).ravel()
            for store in self.stores
            for pixels in self._draw(store)
        ]
        differences = np.concatenate(found) if found else None
        return {
            "model": self.model.id,
            "patches": len(found),
            "largest": None if differences is None else float(differences.max()),
            "mean": None if differences is None else float(differences.mean()),
        }

    def _draw(self, store: SlabStore) -> Iterator[np.ndarray]:
        """Pixels of some of a slide's indexed patches; none where the index cannot be read."""
        try:
            index = read_index(store.index.path)
        except RunError:  # the slide's heatmap has failed and says why
            return
        rng = np.random.default_rng(derived_seed(self.seed, f"precision/{store.slide_id}"))
        drawn = np.sort(rng.permutation(index.table.num_rows)[: self.patches])
        slide, side = cached_slide(store.slide.path, store.mpp), index.grid.patch_px
        for corner in index.table.select(["x", "y"]).take(drawn).to_pylist():
            with suppress(SlideError):
                yield slide.read(corner["x"], corner["y"], side, side, index.grid.downsample)


def _predictor(module, card: ModelCard, device, precision: Precision, fine_stride_px: int | None):
    """A patch, uint8 (H, W, 3), to its probabilities."""
    options = {"device": device, "precision": precision}
    if fine_stride_px is None:
        predict = predictor(module, **card.normalisation, **options)
        return lambda pixels: predict(pixels[np.newaxis])
    options |= {"mean": card.mean, "std": card.std, "gamma": card.gamma}
    return dense_predictor(subnet_of(module), stride_px=fine_stride_px, **options)


def _native_precisions(client: Client, section: str) -> list[Precision]:
    """What each worker that models may run on computes in if it may choose."""
    resources = {GPU: 1.0} if has_resource(client, GPU) else None
    found = client.run(_native_precision, section, workers=worker_addresses(client, resources))
    return list(found.values())


def _native_precision(section: str) -> Precision:
    if torch.cuda.is_available():
        return native_precision("cuda")
    return "float32" if section == "train" else native_precision("cpu")


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
