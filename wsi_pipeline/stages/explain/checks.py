"""Methods of explanation held against annotations, and against what a map must depend on."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import shapely
import torch
from scipy.stats import rankdata
from shapely.affinity import translate
from torch import nn

from wsi_pipeline.config import AnnotationConfig, Config
from wsi_pipeline.evaluation.lesion_pixels import rasterise
from wsi_pipeline.evaluation.overlap import STATISTICS, average_overlap, overlap
from wsi_pipeline.explain.methods import unit_maps
from wsi_pipeline.explain.trust import deletion_and_insertion, randomised, similarity
from wsi_pipeline.jobs.unit import LargeFile, SmallFile, Unit
from wsi_pipeline.models.card import ModelCard
from wsi_pipeline.models.patchnet import PatchNet
from wsi_pipeline.seeds import derived_seed
from wsi_pipeline.slides.open_slides import cached_slide
from wsi_pipeline.stages.explain.maps_and_panels import (
    map_grid,
    method_settings,
    read_patches,
    trained_model,
)
from wsi_pipeline.stages.explain.methods import ALL_METHODS
from wsi_pipeline.stages.explain.places import Place, PlacedPixels, catalogued
from wsi_pipeline.stages.slide_annotation import slide_annotation
from wsi_pipeline.stages.worker_model import TrainedModel, held_model, worker_device

SIMILAR = 0.5
"""Mean rank correlation with the maps of a model of random weights, from which on a method is
warned of. Unrelated maps have about 0; two maps of one image share its edges and its background."""
DEPTHS = 5
"""Depths of the randomisation that are compared: each costs as much as the method itself."""


def place_mask(path: str, mpp: float, place: PlacedPixels, annotation, rules) -> np.ndarray:
    """The place's pixels whose centres are annotated as tumour, bool (height_px, width_px)."""
    slide = cached_slide(path, mpp)
    lesions = slide_annotation(slide, annotation, rules).lesions
    grid = map_grid(place, mpp)
    size = (grid.level0_length(place.width_px), grid.level0_length(place.height_px))
    inside = [
        shapely.clip_by_rect(translate(lesion, -place.x, -place.y), 0, 0, *size)
        for lesion in lesions
    ]
    return rasterise([part for part in inside if part.area > 0], size, place.downsample)


@dataclass(frozen=True)
class MethodOnPatch(Unit):
    """A method on an annotated patch: what the two checks share."""

    slide: LargeFile
    mpp: float
    place: PlacedPixels
    method: str
    settings: dict
    model: TrainedModel

    @property
    def key(self) -> str:
        """Place and method."""
        return f"{self.slide_id}/{self.place.x},{self.place.y}/{self.method}"


@dataclass(frozen=True)
class RankPatch(MethodOnPatch):
    """Compare a method's map of a patch with the annotation."""

    annotation: SmallFile | None
    annotation_rules: AnnotationConfig

    def run(self) -> dict:
        """Explain the patch.

        Returns
        -------
        dict
            ``mixed``: whether the patch has pixels with and without tumour; ``seconds`` of the
            method; and the `STATISTICS`, None where undefined, see `map_overlap`.
        """
        path, place = self.slide.path, self.place
        mask = place_mask(path, self.mpp, place, self.annotation, self.annotation_rules)
        with held_model(self.model) as (module, card):
            device = worker_device()
            [(*_, patch)] = read_patches(path, self.mpp, place, card, device)
            started = time.perf_counter()
            maps = ALL_METHODS[self.method].with_settings(**self.settings)(module, patch).cpu()
            seconds = time.perf_counter() - started
        figures = map_overlap(self.method, maps, mask)
        return {
            "mixed": bool(mask.any() and not mask.all()),
            "seconds": seconds,
            **{name: None if np.isnan(v) else float(v) for name, v in figures.items()},
        }


def map_overlap(method: str, maps: torch.Tensor, mask: np.ndarray) -> pd.Series:
    """The `STATISTICS` of a map, float tensor (1, H, W), with a mask, bool (H, W).

    AUROC and the pointing game need the order of the pixels alone, and take the map's own, in which
    weak evidence against tumour comes before strong. The others need values from 0 to 1: PatchNet's
    Q as it is, as its paper does; all other maps as `unit_maps`.
    """
    values = (maps if ALL_METHODS[method].probability else unit_maps(maps))[0].numpy()
    ranks = rankdata(maps[0].numpy(), "dense").reshape(mask.shape)
    figures = overlap([values, ranks / ranks.max()], [mask, mask])
    ordered = ["auroc", "pointing_game"]
    figures.loc[0, ordered] = figures.loc[1, ordered]
    return figures.loc[0]


@dataclass(frozen=True)
class CheckPatch(MethodOnPatch):
    """Try whether a method's map of a patch can be trusted; `seed` is of the random weights."""

    seed: int

    def run(self) -> dict:
        """Explain the patch with the model's weights, with random ones, and with pixels removed.

        Returns
        -------
        dict
            ``deletion``, ``insertion``: areas, see `deletion_and_insertion`; ``layers``: the layers
            down to which the weights were random, from the head on; ``similarity`` of the maps at
            each of these depths to the model's own, None where a map is constant.
        """
        explain = ALL_METHODS[self.method].with_settings(**self.settings)
        with held_model(self.model) as (module, card):
            device = worker_device()
            [(*_, patch)] = read_patches(self.slide.path, self.mpp, self.place, card, device)
            maps = explain(module, patch)
            curves = deletion_and_insertion(module, patch, maps)
            layers = cascade_layers(module)  # none of an archive
            depths = np.unique(np.linspace(0, len(layers) - 1, DEPTHS).round().astype(int))
            found = {}
            drawn = randomised(module, self.seed, layers=layers) if layers else ()
            for depth, (layer, other) in enumerate(drawn):
                if depth in depths:
                    alike = similarity(maps, explain(other, patch))[0]
                    found[layer] = None if np.isnan(alike) else float(alike)
        return {
            "deletion": float(curves.deletion_area[0]),
            "insertion": float(curves.insertion_area[0]),
            "layers": list(found),
            "similarity": list(found.values()),
        }


def cascade_layers(model: nn.Module) -> list[str]:
    """Layers with parameters from the last to the first, as the image meets them.

    The order of definition is that of use in all our models but PatchNet, whose readout belongs
    to its subnet and comes between its convolutions and its head.
    """
    layers = [name for name, part in model.named_modules() if list(part.parameters(False))]
    layers.reverse()
    if isinstance(model, PatchNet):
        layers.remove("subnet")
        layers.insert(layers.index("subnet.head") + 1, "subnet")
    return layers


def rank_units(
    patches: Sequence[Place], methods: Sequence[str], slides: pd.DataFrame, config: Config,
    card: ModelCard,
) -> list[RankPatch]:  # fmt: skip
    """A unit for each method and patch; `slides` are the catalog's rows, by slide id."""
    annotations = {
        patch.slide_id: catalogued(slides, patch.slide_id).annotation for patch in patches
    }
    annotations = {name: path and SmallFile.at(path) for name, path in annotations.items()}
    return [
        RankPatch(
            **inputs,
            annotation=annotations[inputs["slide_id"]],
            annotation_rules=config.catalog.annotation,
        )
        for inputs in _on_patches(patches, methods, slides, config, card)
    ]


def trust_units(
    patches: Sequence[Place], methods: Sequence[str], slides: pd.DataFrame, config: Config,
    card: ModelCard,
) -> list[CheckPatch]:  # fmt: skip
    """A unit for each method and patch; `slides` are the catalog's rows, by slide id."""
    seed = derived_seed(config.seed, "explain/weights")
    return [
        CheckPatch(**inputs, seed=seed)
        for inputs in _on_patches(patches, methods, slides, config, card)
    ]


def _on_patches(patches, methods, slides, config, card) -> Iterator[dict]:
    """The fields of a `MethodOnPatch` for each method and patch."""
    rows = {patch.slide_id: catalogued(slides, patch.slide_id) for patch in patches}
    files = {slide_id: LargeFile.at(row.path) for slide_id, row in rows.items()}
    for method in methods:
        for patch in patches:
            yield {
                "slide_id": patch.slide_id,
                "slide": files[patch.slide_id],
                "mpp": float(rows[patch.slide_id].mpp),
                "place": patch.pixels,
                "method": method,
                "settings": method_settings(method, config),
                "model": trained_model(config, card),
            }


def ranking_table(results: Mapping[str, dict]) -> pd.DataFrame:
    """Methods by how well their maps lie over the annotation, the best first.

    Parameters
    ----------
    results : mapping
        What `rank_patch` returned, by key.

    Returns
    -------
    DataFrame
        ``method, patches`` (how many were used: those with pixels of both kinds), the means of
        the `STATISTICS` (NaN: undefined in all of them) and ``seconds`` for each patch; by
        falling AUROC.
    """
    rows = pd.DataFrame(
        [{"method": key.rpartition("/")[2], **result} for key, result in results.items()],
        columns=["method", "mixed", "seconds", *STATISTICS],
    )
    rows = rows[rows["mixed"].astype(bool)]
    table = [
        {
            "method": method,
            "patches": len(of_method),
            **average_overlap(of_method.astype(dict.fromkeys(STATISTICS, float)))["mean"],
            "seconds": of_method["seconds"].median(),
        }
        for method, of_method in rows.groupby("method", sort=False)
    ]
    frame = pd.DataFrame(table, columns=["method", "patches", *STATISTICS, "seconds"])
    return frame.sort_values("auroc", ascending=False, kind="stable", ignore_index=True)


def trust_tables(results: Mapping[str, dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the trust checks found, by method and by depth of the randomisation.

    Parameters
    ----------
    results : mapping
        What `check_patch` returned, by key.

    Returns
    -------
    trust : DataFrame
        ``method, patches, deletion_area, insertion_area``, ``similarity`` to the maps of a model
        whose weights are all random (mean over the patches), and ``warning``, a sentence or empty.
    layers : DataFrame
        ``method, depth`` (from 0), ``layer, similarity``.

    A map that became constant has changed: it counts as unlike, 0.
    """
    rows = [
        {"method": key.rpartition("/")[2], "depth": depth, "layer": layer, "similarity": alike}
        for key, result in results.items()
        for depth, (layer, alike) in enumerate(
            zip(result["layers"], result["similarity"], strict=True)
        )
    ]
    layers = (
        pd.DataFrame(rows, columns=["method", "depth", "layer", "similarity"])
        .astype({"similarity": float})
        .fillna({"similarity": 0.0})
        .groupby(["method", "depth", "layer"], sort=False, as_index=False)["similarity"]
        .mean()
    )
    areas = pd.DataFrame(
        [{"method": key.rpartition("/")[2], **result} for key, result in results.items()],
        columns=["method", "deletion", "insertion"],
    ).astype({"deletion": float, "insertion": float})
    trust = areas.groupby("method", sort=False).agg(
        patches=("deletion", "size"),
        deletion_area=("deletion", "mean"),
        insertion_area=("insertion", "mean"),
    )
    deepest = layers.loc[layers.groupby("method")["depth"].idxmax()].set_index("method")
    trust = trust.assign(similarity=deepest["similarity"]).reset_index()
    trust["warning"] = [_warning(row) for row in trust.itertuples()]
    return trust, layers


def _warning(row) -> str:
    if not row.similarity > SIMILAR:  # NaN: the model has no weights that could be drawn anew
        return ""
    return (
        f"{ALL_METHODS[row.method].title}: with random weights its maps stay much the same (rank"
        f" correlation {row.similarity:.2f}, over {SIMILAR:g}): they show the image more than what"
        " the model learned."
    )
