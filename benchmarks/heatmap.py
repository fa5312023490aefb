"""VGG16 on batches of patches, and the heatmap stage against VGG16 alone."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from benchmarks.measure import Row, busy_share, busy_text, compare, watched_gpu
from wsi_pipeline.config import CatalogConfig, Config, HeatmapConfig, TileConfig
from wsi_pipeline.jobs.cluster import GPU, GPU_THREADS, connect, has_resource, worker_threads
from wsi_pipeline.models.card import ModelCard
from wsi_pipeline.models.checkpoint import save_model
from wsi_pipeline.models.inference import predictor, use_batch_size
from wsi_pipeline.models.precision import native_precision
from wsi_pipeline.models.start import start_model
from wsi_pipeline.models.vgg16 import IMAGENET_MEAN, IMAGENET_STD
from wsi_pipeline.phantom import plan_cohort, write_slide
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.stages import heatmap, tile
from wsi_pipeline.stages.run_directory import model_folder
from wsi_pipeline.stages.status import reading_summary
from wsi_pipeline.stages.worker_model import TrainedModel, worker_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALING = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
PATCH_PX = 128 if DEVICE == "cpu" else 512
"""Of the stage; patches of 512 px would take a CPU an hour."""
MPP = 2.0
TILES = 16

Predict = Callable[[np.ndarray], np.ndarray]


def rows(quick: bool) -> list[Row]:
    """The stage against VGG16 alone."""
    return [heatmap_stage(quick)]


def model_speed(quick: bool) -> list[Row]:
    """Ways to run VGG16, each against float32 in contiguous tensors; batches against larger ones.

    On a CPU in one thread, as its workers run it. Beside each way stands the largest change of
    F(I) on some tiles, by weights that spread F(I) over 0 to 1.
    """
    images = h_and_e_tiles()
    module = spread(start_model("vgg16", "none").to(DEVICE).eval(), images)
    plain = in_float32(module, torch.contiguous_format)
    expected = in_batches(plain, images, 4)
    sizes = ((128, 8), (512, 1)) if DEVICE == "cpu" else ((128, 64), (512, 32))
    found = []
    with one_thread_on_a_cpu():
        for name, way in ways(module, quick).items():
            change = np.abs(in_batches(way, images, 4) - expected).max()
            for side, batch in sizes[: 1 if quick else 2]:
                patches = random_patches(batch, side)
                what = f"VGG16 ({DEVICE}), {side} px, batches of {batch}, {name}"
                work = [partial(predicted, run, patches, batch) for run in (way, plain)]
                found.append(timed(f"{what}: F(I) within {change:.0e}", "float32", *work))
        return [*found, batch_sizes(predictor(deepcopy(module), **as_heatmaps()))]


def batch_sizes(run: Predict) -> Row:
    """The batch size that heatmaps take by default against another one."""
    size, other = use_batch_size(DEVICE, None, 128), 32 if DEVICE == "cpu" else 8
    work = [partial(predicted, run, random_patches(32, 128), n) for n in (size, other)]
    return timed(f"VGG16 ({DEVICE}), 128 px, batches of {size}", f"batches of {other}", *work)


def heatmap_stage(quick: bool) -> Row:
    """The heatmap stage, reading and writing included, against the model on patches in memory.

    Both on the workers that `wsi heatmap` starts, in which the model is loaded beforehand, and in
    batches of one size.
    """
    side = (1536 if DEVICE == "cpu" else 32_768) // (2 if quick else 1)
    with tempfile.TemporaryDirectory() as folder, connect() as client:
        config = run_directory(Path(folder), side)
        tiled = tile.run(config, client).results.values()
        patches = sum(result.get("patches", 0) for result in tiled)
        save_random_model(config)
        model = TrainedModel.of_run(config)
        resources = {GPU: 1 / GPU_THREADS} if has_resource(client, GPU) else None
        threads = worker_threads(client, resources)
        client.run(alone, model, 1)
        told, busy = [], []

        def stage() -> int:
            shutil.rmtree(config.out / "heatmaps", ignore_errors=True)
            for record in (config.out / "done").glob("*-*.jsonl"):
                record.unlink()
            started = time.perf_counter()
            with watched_gpu() as samples:
                outcome = heatmap.run(config, client)
            busy.append(busy_share(samples, started, time.perf_counter()))
            told[:] = [reading_summary(outcome.results.values())]
            return sum(result.get("patches", 0) for result in outcome.results.values())

        def model_alone() -> int:
            shares = np.diff(np.linspace(0, patches, threads + 1).astype(int)).tolist()
            jobs = [
                client.submit(alone, model, share, resources=resources, pure=False)
                for share in shares
            ]
            return sum(client.gather(jobs))

        what = (
            f"heatmap stage ({DEVICE}), {patches} patches of {PATCH_PX} px at a stride of"
            f" {PATCH_PX // 2}, {threads} threads"
        )
        row = timed(what, "the model alone on as many", stage, model_alone)
        return replace(row, what=f"{row.what}; {told[0]}{busy_text(busy[1:])}")  # 0: a warm-up


def alone(model: TrainedModel, patches: int) -> int:
    """Predict as many patches as that, all of them the same batch, on a worker."""
    module, _ = worker_model(model)
    run, batch = predictor(module, **as_heatmaps()), use_batch_size(DEVICE, None, PATCH_PX)
    images = random_patches(batch, PATCH_PX)
    for start in range(0, patches, batch):
        run(images[: patches - start])
    return patches


def run_directory(folder: Path, side: int) -> Config:
    """Settings of a run with one phantom slide, so many px a side."""
    (plan,) = plan_cohort(1, 0, size=(side, side), mpp=MPP)
    write_slide(plan, folder)
    slides = pd.DataFrame({"path": [f"slides/{plan.slide_id}.tif"], "split": ["test"]})
    slides.assign(slide_id=plan.slide_id).to_csv(folder / "slides.csv", index=False)
    return Config(
        out=folder / "run",
        catalog=CatalogConfig(csv=folder / "slides.csv"),
        tile=TileConfig(patch_px=PATCH_PX, stride_px=PATCH_PX // 2, inner_px=PATCH_PX // 2),
        heatmap=HeatmapConfig(splits=("test",), chunk=4 if DEVICE == "cpu" else 16),
    )


def save_random_model(config: Config) -> None:
    """Save a VGG16 as the run's model."""
    card = ModelCard(architecture="vgg16", **SCALING, patch_px=PATCH_PX, mpp=MPP)
    folder = model_folder(config.out, config.train.name)
    save_model(folder, start_model("vgg16", "none"), card)


def as_heatmaps() -> dict:
    """How the heatmap stage runs a model by default."""
    return {**SCALING, "device": DEVICE, "precision": native_precision(DEVICE)}


def ways(module: nn.Module, quick: bool) -> dict[str, Predict]:
    """Predictors by name; the first is the heatmap stage's."""
    settings, last = as_heatmaps(), torch.channels_last
    module = deepcopy(module).to(memory_format=last)  # the baseline keeps contiguous weights
    name = f"channels-last, {settings['precision']}"
    found = {f"as heatmaps ({name})": predictor(module, **settings)}
    if quick:
        return found
    example = torch.zeros(1, 3, 128, 128, device=DEVICE).to(memory_format=last)
    with torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.trace(module, example))
        found["optimize_for_inference"] = in_float32(torch.jit.optimize_for_inference(frozen), last)
    found["torch.compile"] = in_float32(torch.compile(module), last)
    return found


def in_float32(module: Callable, memory_format: torch.memory_format) -> Predict:
    """A module as a function of patches, normalisation spelt out."""
    mean, std = (torch.tensor(v, device=DEVICE).view(1, 3, 1, 1) for v in SCALING.values())

    def predict(patches: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(patches).to(DEVICE).permute(0, 3, 1, 2)
        with torch.no_grad():
            values = (images.contiguous(memory_format=memory_format) / 255 - mean) / std
            return torch.sigmoid(module(values)).cpu().numpy()

    return predict


def spread(module: nn.Module, images: np.ndarray) -> nn.Module:
    """Scale a network's dense unit so that its logits of these images are 0 +- 2."""
    logits = []
    hook = module.register_forward_hook(lambda _module, _input, output: logits.append(output))
    in_batches(in_float32(module, torch.contiguous_format), images, 4)
    hook.remove()
    logits = torch.cat(logits)
    with torch.no_grad():
        scale = 2 / logits.std()
        module.head.weight.mul_(scale)
        module.head.bias.sub_(logits.mean()).mul_(scale)
    return module


def h_and_e_tiles() -> np.ndarray:
    """Real tiles of 224 px, as the tests' data has them, else patches of a phantom slide."""
    real = Path(os.environ.get("WSI_TEST_DATA", "")) / "flagy-colorectal" / "test"
    files = sorted(real.glob("*/*.jpg"))
    if files:
        chosen = files[:: -(-len(files) // TILES)]
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in chosen])
    (plan,) = plan_cohort(1, 0, size=(896, 896), mpp=MPP)
    with tempfile.TemporaryDirectory() as folder:
        write_slide(plan, Path(folder))
        with Slide(Path(folder) / "slides" / f"{plan.slide_id}.tif") as slide:
            pixels = slide.read(0, 0, 896, 896)
    return pixels.reshape(4, 224, 4, 224, 3).swapaxes(1, 2).reshape(-1, 224, 224, 3)


def random_patches(count: int, side: int) -> np.ndarray:
    """Noise, uint8 (count, side, side, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def in_batches(run: Predict, patches: np.ndarray, batch: int) -> np.ndarray:
    """Probabilities of all patches."""
    return np.concatenate([run(patches[i : i + batch]) for i in range(0, len(patches), batch)])


def predicted(run: Predict, patches: np.ndarray, batch: int) -> int:
    """How many patches there are, once they are predicted."""
    return len(in_batches(run, patches, batch))


def timed(what: str, baseline: str, ours: Callable[[], int], plain: Callable[[], int]) -> Row:
    """Compare two ways of work, each returning how many patches it did, after a warm-up."""
    ours(), plain()
    return compare(what, baseline, "patches", ours, plain)


@contextmanager
def one_thread_on_a_cpu() -> Iterator[None]:
    """Let torch compute in one thread, unless a GPU does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if DEVICE == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
