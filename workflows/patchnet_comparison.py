"""PatchNet beside CAM and Grad-CAM: how well each classifies, and what each shows.

    python workflows/patchnet_comparison.py configs/patchnet_comparison.yaml [--tiles FOLDER]

Trains every model of the file with the loop of the train stage on the same images: labelled tiles
(folders ``training/CLASS`` and ``test/CLASS``; left out without a folder) and patches of phantom
slides, whose true masks the heatmaps are held against. A training that was stopped goes on where
it was. Writes comparison.md, models.csv, overlap.csv and heatmaps_*.png to `out`.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
import torch
from dask.system import CPU_COUNT
from matplotlib.figure import Figure
from PIL import Image
from pydantic import Field, ValidationError
from sklearn.metrics import log_loss, roc_auc_score

from wsi_pipeline.config import CatalogConfig, Config, Section, TileConfig, TrainConfig
from wsi_pipeline.config_file import read_yaml
from wsi_pipeline.errors import CatalogError, ConfigError, WsiError
from wsi_pipeline.evaluation.overlap import average_overlap, overlap
from wsi_pipeline.explain.cam import class_activation_map, grad_cam
from wsi_pipeline.files import write_csv
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.jobs.cluster import connect
from wsi_pipeline.jobs.progress import progress_bar
from wsi_pipeline.jobs.unit import hash_inputs
from wsi_pipeline.models.card import ModelCard
from wsi_pipeline.models.checkpoint import load_model, save_model
from wsi_pipeline.models.inference import normalise, predictor
from wsi_pipeline.models.patchnet_heatmaps import global_heatmap
from wsi_pipeline.models.precision import native_precision
from wsi_pipeline.models.start import start_model
from wsi_pipeline.models.vgg16 import IMAGENET_MEAN, IMAGENET_STD
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.patches.sampling import PatchPool, draw
from wsi_pipeline.raster import fill
from wsi_pipeline.seeds import derived_seed
from wsi_pipeline.slides.annotations import read_annotation
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages import phantom, tile
from wsi_pipeline.stages.run_directory import index_path, tiled_slides
from wsi_pipeline.training.augment import augment
from wsi_pipeline.training.loop import best_epoch, best_folder, fit
from wsi_pipeline.training.recipe import Feed, Recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHOWN = 3
"""Images of each class in a picture."""


class ImagesConfig(Section):
    """How many images of each class, and their side."""

    side_px: int = Field(gt=0, multiple_of=2)
    train: int = Field(gt=0)
    validation: int = Field(gt=0)
    test: int = Field(gt=0)


class TilesConfig(Section):
    """Labelled tiles, brought to `images.side_px`."""

    normal: str
    tumour: str


class PhantomConfig(Section):
    """Phantom slides, and the patches that are drawn from them in three steps."""

    slides: int = Field(gt=0)
    size_px: int = Field(gt=0)
    mpp: float = Field(gt=0)
    patch_mpp: float = Field(gt=0)
    overlap: int = Field(gt=0, description="test patches whose heatmaps are held against masks")


class ComparisonConfig(Section):
    """All of the file."""

    out: Path
    seed: int = Field(ge=0)
    images: ImagesConfig
    tiles: TilesConfig
    phantom: PhantomConfig
    models: dict[str, TrainConfig]


@dataclass(frozen=True, eq=False)
class Images:
    """Images of both classes, mixed: uint8 (N, H, W, 3), labels (N,), masks (N, H, W) or None."""

    pixels: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None


Data = dict[str, Images]
"""By split: train, validation, test."""


def read_tiles(folder: Path, config: ComparisonConfig) -> Data:
    """Read tiles; validation is taken from the training folder, test from the other."""
    counts = config.images
    parts = {
        "train": ("training", 0, counts.train),
        "validation": ("training", counts.train, counts.train + counts.validation),
        "test": ("test", 0, counts.test),
    }
    return {
        split: _read_split(folder / part, slice(first, last), config)
        for split, (part, first, last) in parts.items()
    }


def _read_split(folder: Path, part: slice, config: ComparisonConfig) -> Images:
    pixels, labels = [], []
    side = config.images.side_px
    for label, name in enumerate((config.tiles.normal, config.tiles.tumour)):
        files = sorted(path for path in (folder / name).glob("*") if path.is_file())
        if len(files) < part.stop:
            raise CatalogError(f"{folder / name}: {part.stop} tiles are needed, {len(files)} found")
        rng = np.random.default_rng(derived_seed(config.seed, f"tiles {folder.name}"))
        for path in [files[i] for i in rng.permutation(len(files))[part]]:
            with Image.open(path) as tile_image:
                resized = tile_image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            pixels.append(np.asarray(resized))
            labels.append(label)
    return Images(np.stack(pixels), np.array(labels, np.int8))


def draw_phantom_patches(config: ComparisonConfig) -> Data:
    """Draw slides, tile them, and draw patches by the three steps, with their true masks."""
    side, settings = config.images.side_px, config.phantom
    cohort = config.out / "phantom"
    run = Config(
        out=cohort / "run",
        seed=config.seed,
        catalog=CatalogConfig(
            csv=cohort / "slides.csv", split={"train": 0.5, "validation": 0.2, "test": 0.3}
        ),
        tile=TileConfig(
            level=None,
            mpp=settings.patch_mpp,
            patch_px=side,
            stride_px=side // 4 * 2,
            inner_px=side // 4 * 2,  # even, as the sides are: it is centred on whole pixels
        ),
    )
    run.out.mkdir(parents=True, exist_ok=True)
    with connect() as client:
        drawn = phantom.run(
            cohort,
            client,
            slides=settings.slides,
            seed=config.seed,
            size=(settings.size_px, settings.size_px),
            mpp=settings.mpp,
        )
        if (drawn + tile.run(run, client)).failed:
            raise WsiError(f"not all phantom slides could be made: see {run.out / 'failures.csv'}")
    return {split: _draw_split(split, run, config) for split in ("train", "validation", "test")}


def _draw_split(split: str, run: Config, config: ComparisonConfig) -> Images:
    slides = tiled_slides(run.out, [split])
    pool = PatchPool.from_indexes(read_index(index_path(run.out, s)) for s in slides["slide_id"])
    count = 2 * getattr(config.images, split)
    draws = draw(pool, seed=config.seed, name=split, first=0, count=count)
    pixels, masks = [], []
    lesions = {}
    for number, x, y in zip(draws.slide.tolist(), draws.x.tolist(), draws.y.tolist(), strict=True):
        grid = pool.grids[number]
        row = slides.set_index("slide_id").loc[pool.slide_ids[number]]
        if number not in lesions:
            rules = run.catalog.annotation
            lesions[number] = row["annotation"] and read_annotation(
                row["annotation"], positive=rules.positive, exclusion=rules.exclusion
            )
        with Slide(row["path"], row["mpp"]) as slide:
            pixels.append(slide.read(x, y, grid.patch_px, grid.patch_px, grid.downsample))
        masks.append(_mask(lesions[number], x, y, grid))
    return Images(np.stack(pixels), draws.label.astype(np.int8), np.stack(masks))


def _mask(annotation, x: int, y: int, grid) -> np.ndarray:
    """Pixels of a patch of which more than half is tumour: bool (patch_px, patch_px)."""
    side, step = grid.patch_px, round(grid.downsample)
    if annotation is None:
        return np.zeros((side, side), bool)
    exact = fill(shapely.MultiPolygon(annotation.lesions), Bounds(x, y, side * step, side * step))
    return exact.reshape(side, step, side, step).mean(axis=(1, 3)) > 0.5


def train(name: str, data: Data, folder: Path, config: ComparisonConfig) -> pd.DataFrame:
    """Train one model on the images; its best state lies in ``folder/best``."""
    settings = config.models[name]
    precision = settings.precision or native_precision(DEVICE)
    settings = settings.model_copy(update={"precision": precision})
    arguments = settings.patchnet.model_dump() if settings.model == "patchnet" else {}
    card = ModelCard(
        architecture=settings.model,
        arguments=arguments,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        gamma=settings.gamma,
        shades_of_gray=settings.shades_of_gray,
        precision=precision,
        patch_px=config.images.side_px,
        mpp=config.phantom.patch_mpp,
    )
    images, size = data["train"], settings.batch_size
    steps = -(-len(images.labels) // size)
    augmentation = settings.augment.model_dump()

    def train_batches(first_step: int, count: int) -> Iterator:
        for step in range(first_step, first_step + count):
            epoch, place = divmod(step, steps)
            rng = np.random.default_rng(derived_seed(config.seed, f"order of epoch {epoch}"))
            chosen = rng.permutation(len(images.labels))[place * size : (place + 1) * size]
            yield _batch(images, chosen, numbers=epoch * len(images.labels) + chosen)

    def validation_batches() -> Iterator:
        everything = np.arange(len(data["validation"].labels))
        for start in range(0, len(everything), size):
            yield _batch(data["validation"], everything[start : start + size])

    def prepare(batch: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
        if numbers is not None:
            batch = augment(batch, numbers, seed=config.seed, **augmentation)
        return normalise(batch, **card.normalisation)

    with progress_bar(f"{folder.parent.name}: {name}", settings.max_epochs * steps) as update:
        return fit(
            start_model(settings.model, settings.weights, arguments=arguments, seed=config.seed),
            Recipe(**settings.model_dump(include={of.name for of in fields(Recipe)})),
            Feed(train_batches, validation_batches, prepare, steps),
            folder=folder,
            fingerprint=hash_inputs(
                {
                    "settings": settings.model_dump(mode="json", exclude={"max_epochs"}),
                    "images": config.images.model_dump(),
                    "seed": config.seed,
                    "data": _fingerprint(data),
                }
            ),
            seed=config.seed,
            save_best=lambda best, module, row: save_model(best, module, card),
            device=DEVICE,
            on_progress=lambda now: update((now["epoch"] - 1) * steps + now["step"]),
            checkpoint_seconds=settings.checkpoint_seconds,
        )


def _fingerprint(data: Data) -> str:
    """Hash of what a training sees: pixels and labels of its two splits."""
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        digest.update(data[split].pixels.tobytes())
        digest.update(data[split].labels.tobytes())
    return digest.hexdigest()


def _batch(images: Images, chosen: np.ndarray, numbers: np.ndarray | None = None):
    pixels = torch.from_numpy(images.pixels[chosen]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(images.labels[chosen].astype(np.float32))
    return pixels, labels, torch.from_numpy(chosen if numbers is None else numbers)


def figures(folder: Path, history: pd.DataFrame, data: Data, best_by: str) -> dict:
    """What the best epoch of a training reached, and what it reaches on the test images."""
    best = best_epoch(history, best_by)
    weights = best_folder(folder, history, best_by)
    p, labels = _probabilities(weights, data["test"].pixels), data["test"].labels
    return {
        "best_epoch": int(best["epoch"]),
        "epochs": len(history),
        "train_loss": best["train_loss"],
        "train_accuracy": best["train_accuracy"],
        "validation_loss": best["validation_loss"],
        "validation_accuracy": best["validation_accuracy"],
        "test_loss": log_loss(labels, p.astype(np.float64), labels=[0, 1]),
        "test_accuracy": float(np.mean((p > 0.5) == labels)),
        "test_roc_auc": roc_auc_score(labels, p),
        "seconds_an_epoch": history["seconds"].median(),
    }


def _probabilities(folder: Path, pixels: np.ndarray) -> np.ndarray:
    module, card = load_model(folder)
    predict = predictor(module, **card.normalisation, device=DEVICE, precision=card.precision)
    return np.concatenate([predict(part) for part in np.array_split(pixels, -(-len(pixels) // 16))])


def heatmaps(folder: Path, pixels: np.ndarray) -> list[np.ndarray]:
    """What a model shows of each image: float (H, W), in 0..1, white for tumour.

    PatchNet: Q of the patch centred at each pixel. CAM and Grad-CAM have no such scale: as is
    usual, each image's map is stretched from its least to its greatest value.
    """
    module, card = load_model(folder, DEVICE)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(DEVICE)
    prepared = normalise(images, **card.normalisation)
    if card.architecture == "patchnet":
        return [global_heatmap(module.subnet, image).cpu().numpy() for image in prepared]
    method = class_activation_map if card.architecture == "cam" else grad_cam
    return [_stretched(method(module, image[None])[0].cpu().numpy()) for image in prepared]


def _stretched(values: np.ndarray) -> np.ndarray:
    spread = np.ptp(values)
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


def hold_against_masks(data: Data, maps: Callable, config: ComparisonConfig) -> pd.DataFrame:
    """Overlap statistics of every model on the same test patches, half of them with tumour."""
    test = data["test"]
    chosen = _of_both_classes(test.labels, config.phantom.overlap // 2)
    rows = {}
    with progress_bar("heatmaps against masks", len(config.models)) as update:
        for done, name in enumerate(config.models, 1):
            found = overlap(maps(name, test.pixels[chosen]), test.masks[chosen])
            rows[name] = average_overlap(found)["mean"]
            update(done)
    return pd.DataFrame(rows).T


def _of_both_classes(labels: np.ndarray, of_each: int) -> np.ndarray:
    return np.concatenate([np.flatnonzero(labels == label)[:of_each] for label in (0, 1)])


def picture(data: Data, maps: Callable, config: ComparisonConfig, path: Path) -> None:
    """Draw some test images of both classes, their masks if known, and each model's heatmaps."""
    test = data["test"]
    chosen = _of_both_classes(test.labels, SHOWN)
    columns = {"image": list(test.pixels[chosen])}
    if test.masks is not None:
        columns["true mask"] = list(test.masks[chosen].astype(float))
    columns |= {name: maps(name, test.pixels[chosen]) for name in config.models}
    figure = Figure(figsize=(1.5 * len(columns) + 0.6, 1.5 * len(chosen) + 0.3))
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns.items()):
        for row, shown in enumerate(pictures):
            axes[row, column].imshow(shown, cmap="gray", vmin=0, vmax=1)
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(title, fontsize=10)
    for row, label in enumerate(test.labels[chosen]):
        axes[row, 0].set_ylabel("tumour" if label else "normal", fontsize=10)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=130)


def compare(name: str, data: Data, config: ComparisonConfig) -> pd.DataFrame:
    """Train every model on one set of images; a row for each."""
    rows, best = [], {}
    for model, settings in config.models.items():
        folder = config.out / name / model
        history = train(model, data, folder, config)
        best[model] = best_folder(folder, history, settings.best_by)
        rows.append(
            {"images": name, "model": model, **figures(folder, history, data, settings.best_by)}
        )

    def maps(model: str, pixels: np.ndarray) -> list[np.ndarray]:
        return heatmaps(best[model], pixels)

    picture(data, maps, config, config.out / f"heatmaps_{name}.png")
    if data["test"].masks is not None:
        found = hold_against_masks(data, maps, config)
        write_csv(config.out / "overlap.csv", found.rename_axis("model").reset_index())
    return pd.DataFrame(rows)


def page(rows: pd.DataFrame, config: ComparisonConfig) -> str:
    """The tables as Markdown."""
    percent = [name for name in rows if name.endswith("accuracy")]
    shown = rows.assign(**{name: rows[name].map("{:.1%}".format) for name in percent})
    found = pd.read_csv(config.out / "overlap.csv")
    images = config.images
    return "\n\n".join(
        [
            f"{images.train} images of each class to train on, {images.validation} to choose the"
            f" epoch by, {images.test} to test on; {images.side_px} px; seed {config.seed};"
            f" {DEVICE}, torch {torch.__version__}.",
            _markdown(shown),
            f"Overlap with the true masks of {config.phantom.overlap} phantom test patches:",
            _markdown(found),
        ]
    )


def _markdown(table: pd.DataFrame) -> str:
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in table.values]
    lines = [[name.replace("_", " ") for name in table], ["---"] * table.shape[1], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load(path: Path) -> ComparisonConfig:
    """Read the settings; ConfigError names what is wrong in them."""
    try:
        return ComparisonConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error


def main() -> int:
    """Compare on both kinds of images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--tiles", type=Path, help="folder with training/CLASS and test/CLASS")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config)
        config = config.model_copy(update={"out": config.out.absolute()})
        sets = {"phantom": draw_phantom_patches(config)}
        if arguments.tiles is not None:
            sets["tiles"] = read_tiles(arguments.tiles, config)
        torch.set_num_threads(CPU_COUNT)  # Dask's local workers leave this process one
        rows = pd.concat([compare(name, data, config) for name, data in sets.items()])
    except WsiError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    write_csv(config.out / "models.csv", rows)
    (config.out / "comparison.md").write_text(page(rows, config) + "\n")
    print((config.out / "comparison.md").read_text())
    return 0


if __name__ == "__main__":  # Dask starts its workers by importing this file again
    sys.exit(main())
