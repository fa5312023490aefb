"""The train stage: the patch classifier, as one job on a worker with a GPU when there is one."""

import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from dask.system import CPU_COUNT
from distributed import Client, get_worker

from wsi_pipeline.config import Config, PatchNetConfig, TrainConfig
from wsi_pipeline.errors import RunError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.jobs.cluster import GPU, has_resource, visible_gpus
from wsi_pipeline.jobs.progress import step_progress
from wsi_pipeline.jobs.run import Outcome, run_units
from wsi_pipeline.jobs.unit import Output, SmallFile, Unhashed, Unit, hash_inputs, state_of
from wsi_pipeline.models.architectures import NetworkPlan
from wsi_pipeline.models.card import TIMM, ModelCard, read_card, with_version, write_card
from wsi_pipeline.models.checkpoint import save_model
from wsi_pipeline.models.inference import normalise
from wsi_pipeline.models.start import start_model
from wsi_pipeline.patches.index import read_index
from wsi_pipeline.patches.sampling import (
    MAX_MPP_RATIO,
    PatchPool,
    add_hard_negatives,
    read_hard_negatives,
)
from wsi_pipeline.slides.threads import decoding_in
from wsi_pipeline.stages.cache import CacheStore, cache_of
from wsi_pipeline.stages.leakage import patients_of_weights, shared_patients
from wsi_pipeline.stages.network import network_plan
from wsi_pipeline.stages.precision import decide_precision
from wsi_pipeline.stages.run_directory import (
    TRAINING_SPLITS,
    cache_path,
    model_folder,
    read_slides,
    tiled_slides,
)
from wsi_pipeline.training.augment import augment
from wsi_pipeline.training.dataset import PatchDataset, PatchLoader
from wsi_pipeline.training.loop import best_epoch, best_folder, fit
from wsi_pipeline.training.processes import distributed
from wsi_pipeline.training.recipe import Feed, Recipe
from wsi_pipeline.training.torchrun import in_processes

SCHEMA_VERSION = 2
TOPIC = "wsi-training"
SECONDS_BETWEEN_EVENTS = 0.5
RECIPE = {of.name for of in fields(Recipe)}
DOES_NOT_CHANGE_THE_STEPS = {"max_epochs", "stop_after", "stop_at_accuracy", "processes"}
"""With other values of these a training goes on where it was, unless it would have ended before."""
TILING = {"stride_px", "inner_px", "min_tissue", "tissue"}
"""Settings of ``tile`` that the card states, besides patch size and resolution."""
CORES_LEFT = 2
"""For training itself, where loader processes follow the machine."""
MOST_LOADER_WORKERS = 16

logger = logging.getLogger(__name__)


def run(config: Config, client: Client) -> Outcome:
    """Write ``RUN/models/NAME/``: the weights of the best epoch, and the history.

    While training goes on they lie in ``best/EPOCH/``; only when it has ended is there a model.

    Raises
    ------
    RunError
        If no slide of the train or the validation split is tiled, none is left to validate with,
        or the start weights or hard negatives come from the test split.
    ModelError
        If the network cannot be built or does not fit the patches.
    """
    config = decide_precision(config, client, "train")
    with step_progress(client, TOPIC, "train"):
        return run_units(
            client,
            [_unit(config)],
            run_dir=config.out,
            stage="train",
            schema_version=SCHEMA_VERSION,
            retries=config.jobs.retries,
            window=config.jobs.window,
            resources={GPU: 1} if has_resource(client, GPU) else None,
            progress=False,
        )


@dataclass(frozen=True)
class LearnedSlide:
    """A slide of a training: its patient, and its patches, which a cache may hold."""

    patient_id: str
    patches: CacheStore


@dataclass(frozen=True)
class TrainModel(Unit):
    """Train a model, in this process or in several under torchrun.

    Parameters
    ----------
    settings : TrainConfig
        With a precision.
    network : NetworkPlan
        What `settings` name.
    seed : int
    slides : dict
        Of each split, and of ``hard_negatives``: those that they are read from.
    earlier_patients : dict
        Patients that the start weights have seen, as parts of a card.
    weights_file, hard_negatives_file : SmallFile or None
    tiling : dict
        Settings of the patch indices that the card states, see `ModelCard`.
    gpus : tuple of str
        Those of this machine, where its own worker trains; else empty.
    card : Output
        ``model.json`` in the model's folder.
    """

    settings: TrainConfig
    network: NetworkPlan
    seed: int
    slides: dict[str, tuple[LearnedSlide, ...]]
    earlier_patients: dict[str, list[str]]
    weights_file: SmallFile | None
    hard_negatives_file: SmallFile | None
    tiling: Unhashed[dict]
    gpus: Unhashed[tuple[str, ...]]
    card: Output

    @property
    def key(self) -> str:
        """The model's name."""
        return self.settings.name

    @property
    def folder(self) -> Path:
        """The model's."""
        return Path(self.card).parent

    @property
    def fingerprint(self) -> str:
        """Hash of what each step depends on: with the same, a training goes on where it was."""
        steps = state_of(self)
        for name in DOES_NOT_CHANGE_THE_STEPS:
            del steps["settings"][name]
        return hash_inputs({**steps, "schema": SCHEMA_VERSION})

    def run(self) -> dict:
        """Train.

        Returns
        -------
        dict
            ``epochs``, ``best_epoch`` and its ``validation_roc_auc``; ``failures``: the patches
            that could not be decoded, and were left out of their batches. They are noted in
            ``unread.txt`` as they are found, for a training that goes on after an interruption.
        """
        report = partial(get_worker().log_event, TOPIC)
        gpus = list(self.gpus) or visible_gpus()
        processes = self.settings.processes or max(1, len(gpus))
        if gpus and processes > len(gpus):
            raise RunError(
                f"train.processes is {processes}: each takes a GPU, and there are {len(gpus)}"
            )
        workers = loader_workers(self.settings.loader_workers, gpus, processes)
        settings = self.settings.model_copy(update={"loader_workers": workers})
        job = replace(self, settings=settings)
        if processes > 1:
            return in_processes(
                _train, job, processes=processes, gpus=gpus, folder=self.folder, report=report
            )
        threads = torch.get_num_threads()
        torch.set_num_threads(CPU_COUNT)  # Dask gives a worker one, but training is alone
        try:
            with decoding_in(CPU_COUNT):
                return _train(job, report)
        finally:
            torch.set_num_threads(threads)


def loader_workers(stated: int | None, gpus: list[str], processes: int) -> int:
    """Loader processes of each of so many training processes that share this machine.

    Raises
    ------
    RunError
        If some are asked for in a Dask worker that may start none.
    """
    may_start = processes > 1 or not multiprocessing.current_process().daemon  # torchrun's may
    if stated is None:
        shared = max(0, CPU_COUNT - CORES_LEFT) // processes
        return min(shared, MOST_LOADER_WORKERS) if gpus and may_start else 0
    if stated and not may_start:
        raise RunError(
            f"train.loader_workers is {stated}, but this Dask worker may not start processes: start"
            " the workers with DASK_DISTRIBUTED__WORKER__DAEMON=False in their environment or with"
            " --no-nanny, or set train.loader_workers to 0"
        )
    return stated


def _train(job: TrainModel, report: Callable[[dict], None]) -> dict:
    settings, seed, folder = job.settings, job.seed, job.folder
    datasets = {split: _dataset(job, split) for split in TRAINING_SPLITS}
    examples = {"train": settings.epoch_examples, "validation": settings.validation_examples}
    steps = {split: -(-count // settings.batch_size) for split, count in examples.items()}
    pools = {split: dataset.pool for split, dataset in datasets.items()}
    _refuse_other_resolutions(pools)
    card = _card(job, pools["train"])
    unread = folder / "unread.txt"
    note = _noted_in(unread)
    with distributed() as process:
        loaders = {
            split: PatchLoader(
                dataset,
                batch_size=settings.batch_size,
                rank=process.rank,
                world=process.count,
                workers=settings.loader_workers or 0,
                pin=process.device.type == "cuda",
                on_unread=note,
            )
            for split, dataset in datasets.items()
        }
        history = fit(
            start_model(
                settings.model,
                settings.weights,
                arguments=card.arguments,
                output=card.output,
                freeze=settings.freeze,
                seed=seed,
            ),
            Recipe(**settings.model_dump(include=RECIPE)),
            Feed(
                train_batches=loaders["train"].batches,
                validation_batches=partial(loaders["validation"].batches, 0, steps["validation"]),
                prepare=partial(
                    _prepare, card=card, seed=seed, settings=settings.augment.model_dump()
                ),
                steps_per_epoch=steps["train"],
            ),
            folder=folder,
            fingerprint=job.fingerprint,
            seed=seed,
            save_best=lambda best, module, row: save_model(
                best, module, replace(card, training={**card.training, "best": row})
            ),
            on_start=partial(unread.unlink, missing_ok=True),
            device=process.device,
            on_progress=_throttled(report) if process.rank == 0 else None,
            checkpoint_seconds=settings.checkpoint_seconds,
        )
    if process.rank == 0:
        best = best_folder(folder, history, settings.best_by)
        with replace_atomically(folder / "model.safetensors") as part:
            shutil.copyfile(best / "model.safetensors", part)
        kept = read_card(best)  # of the settings of its epoch: those of the steps may have changed
        write_card(folder, replace(kept, training={**kept.training, **card.training}))
    row = best_epoch(history, settings.best_by)
    return {
        "epochs": len(history),
        "best_epoch": int(row["epoch"]),
        "validation_roc_auc": float(row["validation_roc_auc"]),
        "failures": _noted(unread),
    }


def _noted_in(path: Path) -> Callable[[str], None]:
    """A function that adds a reason to a file that all processes write to; each reason once."""
    known = None

    def note(reason: str) -> None:
        nonlocal known
        if known is None:  # not before: training may have removed the file when it started
            known = set(_noted(path))
        reason = " ".join(reason.split())
        if reason not in known:
            known.add(reason)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8", errors="backslashreplace") as lines:
                lines.write(f"{reason}\n")

    return note


def _noted(path: Path) -> list[str]:
    """What a file notes, each reason once."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return list(dict.fromkeys(text.splitlines()))


def _dataset(job: TrainModel, split: str) -> PatchDataset:
    slides = job.slides[split]
    pool = PatchPool.from_indexes(read_index(of.patches.index.path) for of in slides)
    hard = job.slides["hard_negatives"] if split == "train" else ()
    if hard and job.hard_negatives_file:
        path = job.hard_negatives_file.path
        pool = add_hard_negatives(
            pool,
            read_hard_negatives(path, test_slides=()),  # refused when the unit was made
            (read_index(of.patches.index.path) for of in hard),
            share=job.settings.hard_negative_share,
            path=path,
        )
    if len(pool.labels) < 2:
        only = "tumour" if pool.labels[0] else "no tumour"
        raise RunError(
            f"every labelled patch of the {len(slides)} slides in the {split} split is '{only}':"
            " training needs both labels in it"
        )
    by_id = {of.patches.slide_id: of.patches for of in [*slides, *hard]}
    patches = [by_id[slide_id] for slide_id in pool.slide_ids]
    return PatchDataset(
        pool,
        [(of.slide.path, of.mpp) for of in patches],
        seed=job.seed,
        name=split,
        caches=[cache_of(of) for of in patches] if job.settings.cache else None,
    )


def _prepare(images, numbers, *, card: ModelCard, seed: int, settings: dict) -> torch.Tensor:
    """A batch as the network takes it, augmented when it comes with its draw numbers."""
    if numbers is not None:
        images = augment(images, numbers, seed=seed, **settings)
    return normalise(images, **card.normalisation)


def _refuse_other_resolutions(pools: dict[str, PatchPool]) -> None:
    """One model is trained, and its epoch chosen, at one resolution."""
    (low, low_at), *_, (high, high_at) = sorted(
        (grid.working_mpp, f"slide {slide_id}, {split}")
        for split, pool in pools.items()
        for slide_id, grid in zip(pool.slide_ids, pool.grids, strict=True)
    )
    if high > MAX_MPP_RATIO * low:
        raise RunError(
            f"the working resolutions go from {low:.4g} ({low_at}) to {high:.4g} um per px"
            f" ({high_at}), but a model is trained and validated at one, the largest at most"
            f" {MAX_MPP_RATIO:g} times the smallest: set tile.mpp instead of tile.level, and"
            " tile again"
        )


def _card(job: TrainModel, pool: PatchPool) -> ModelCard:
    spacings = sorted(grid.working_mpp for grid in pool.grids)
    settings = job.settings
    dumped = settings.model_dump(mode="json")
    if settings.model != "patchnet":
        del dumped["patchnet"]
    slide_ids = {part: [of.patches.slide_id for of in job.slides[part]] for part in job.slides}
    patients = {part: sorted({of.patient_id for of in job.slides[part]}) for part in job.slides}
    card = ModelCard(
        architecture=job.network.architecture,
        name=settings.name,
        arguments=job.network.arguments,
        mean=job.network.mean,
        std=job.network.std,
        output=job.network.output,
        gamma=settings.gamma,
        shades_of_gray=settings.shades_of_gray,
        precision=settings.precision,
        patch_px=pool.grids[0].patch_px,
        mpp=spacings[len(spacings) // 2],
        tiling=job.tiling,
        training={
            "seed": job.seed,
            "settings": dumped,
            "slides": slide_ids,
            "patients": patients | job.earlier_patients,
        },
    )
    return with_version(card, "timm") if settings.model.startswith(TIMM) else card


def _throttled(report: Callable[[dict], None]) -> Callable[[dict], None]:
    """Pass on the last of an epoch's steps and, of the others, one now and then."""
    last = 0.0

    def pass_on(now: dict) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_EVENTS or now["step"] == now["steps"]:
            last = time.monotonic()
            report(now)

    return pass_on


def _unit(config: Config) -> TrainModel:
    slides = {split: _slides(config, split) for split in TRAINING_SPLITS}
    slides["hard_negatives"] = _hard_negative_slides(config, slides)
    test = read_slides(config.out, ["test"])
    earlier = patients_of_weights(
        config.train.weights, test=set(test["patient_id"]), test_slides=set(test["slide_id"])
    )
    mined = {of.patient_id for of in slides["hard_negatives"]}
    learned = shared_patients(
        {of.patient_id for of in slides["validation"]}, mined | set(earlier["earlier"])
    )
    left = tuple(of for of in slides["validation"] if of.patient_id not in learned)
    if slides["validation"] and not left:
        raise RunError(
            f"no slide of {config.out} is left to validate with: the start weights or the hard"
            " negatives come from all patients of its validation split (train.weights:"
            f" {config.train.weights}, train.hard_negatives: {config.train.hard_negatives})"
        )
    slides["validation"] = left
    settings = config.train
    if settings.model != "patchnet":  # its settings do not count
        settings = settings.model_copy(update={"patchnet": PatchNetConfig()})
    if not settings.model.startswith(TIMM):
        settings = settings.model_copy(update={"pooling": "max"})
    hard = settings.hard_negatives
    return TrainModel(
        slide_id="",
        settings=settings,
        network=network_plan(config),
        seed=config.seed,
        slides=slides,
        earlier_patients=earlier,
        weights_file=SmallFile.at(settings.weights) if settings.weights_path else None,
        hard_negatives_file=None if hard is None else SmallFile.at(hard),
        tiling=config.tile.model_dump(mode="json", include=TILING),
        gpus=tuple(visible_gpus()) if config.jobs.scheduler is None else (),
        card=Output(model_folder(config.out, settings.name) / "model.json"),
    )


def _hard_negative_slides(
    config: Config, slides: dict[str, tuple[LearnedSlide, ...]]
) -> tuple[LearnedSlide, ...]:
    """The slides that hard negatives are read from; none of the test split."""
    path = config.train.hard_negatives
    if path is None:
        return ()
    test = set(read_slides(config.out, ["test"])["slide_id"])
    wanted = set(read_hard_negatives(path, test_slides=test)["slide_id"])
    both = (of for split in TRAINING_SPLITS for of in slides[split])
    return tuple(of for of in both if of.patches.slide_id in wanted)


def _slides(config: Config, split: str) -> tuple[LearnedSlide, ...]:
    folder = cache_path(config.out, "any").parent
    return tuple(
        LearnedSlide(slide.patient_id, CacheStore.of_slide(slide, config, folder))
        for slide in tiled_slides(config.out, [split]).itertuples(index=False)
    )
