"""The phantom cohort: its files agree with each other and with what was planned."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pytest
import shapely
import tifffile
from PIL import Image
from scipy.spatial.distance import pdist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.evaluation.lesion_pixels import read_mask
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.phantom import plan_cohort, pyramid, write_slide, write_table
from wsi_pipeline.phantom.feather import feather
from wsi_pipeline.phantom.histology import Histology
from wsi_pipeline.phantom.layout import draw_layout
from wsi_pipeline.phantom.mosaic import Mosaic
from wsi_pipeline.phantom.pyramid import write_slide_pyramid
from wsi_pipeline.raster import fill
from wsi_pipeline.slides.annotations import read_annotation

SIZE = (1160, 1091)  # no multiple of a tile, odd rows


@pytest.fixture(scope="module")
def plans():
    return plan_cohort(10, seed=5, size=SIZE, mpp=1.0)


@pytest.fixture(scope="module")
def cohort(plans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    write_table([write_slide(plan, folder) for plan in plans], folder)
    return folder


def mask_of(cohort, plan):
    return tifffile.imread(cohort / "masks" / f"{plan.slide_id}.tif")


def lesions_of(cohort, plan):
    path = cohort / "annotations" / f"{plan.slide_id}.xml"
    return read_annotation(path, positive=["Tumor"], exclusion=["Exclusion"]).lesions


def level_pixels(slide, level):
    return np.array(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]


def test_the_plan_of_a_slide_does_not_depend_on_how_many_follow(plans):
    assert plan_cohort(6, seed=5, size=SIZE, mpp=1.0) == plans[:6]


def test_another_seed_gives_other_slides(plans):
    other = plan_cohort(10, seed=6, size=SIZE, mpp=1.0)
    assert not {plan.seed for plan in plans} & {plan.seed for plan in other}


def test_two_slides_in_five_are_normal_and_patients_have_one_or_two(plans):
    assert [plan.label for plan in plans] == [1, 0, 1, 1, 0] * 2
    assert {*pd.Series([plan.patient_id for plan in plans]).value_counts()} == {1, 2}


def test_the_table_names_the_files_and_only_tumour_slides_are_annotated(plans, cohort):
    table = pd.read_csv(cohort / "slides.csv")
    assert list(table.columns) == ["slide_id", "path", "annotation", "patient_id", "label"]
    assert list(table.slide_id) == [plan.slide_id for plan in plans]
    assert list(table.annotation.notna()) == [bool(plan.label) for plan in plans]
    for file in [*table.path, *table.annotation.dropna()]:
        assert (cohort / file).is_file()
    assert len(list((cohort / "annotations").iterdir())) == table.label.sum()


def test_a_plan_gives_the_same_bytes_whenever_it_is_drawn(plans, cohort, tmp_path):
    plan = plans[2]
    row = write_slide(plan, tmp_path)
    for file in (row["path"], row["annotation"], f"masks/{plan.slide_id}.tif"):
        assert (tmp_path / file).read_bytes() == (cohort / file).read_bytes()
    write_slide(replace(plan, seed=plan.seed + 1), tmp_path)
    assert (tmp_path / row["path"]).read_bytes() != (cohort / row["path"]).read_bytes()


def test_openslide_opens_every_level_at_the_right_resolution(plans, cohort):
    with openslide.OpenSlide(cohort / "slides" / f"{plans[0].slide_id}.tif") as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.level_dimensions == (SIZE, (580, 545))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(1.0)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(1.0)


def test_each_level_is_the_mean_of_the_one_before(tmp_path):
    rng = np.random.default_rng(0)
    smooth = np.asarray(
        Image.fromarray(rng.integers(0, 255, (41, 35, 3), np.uint8)).resize((2100, 2561))
    )
    path = tmp_path / "slide.tif"
    write_slide_pyramid(
        path, (2100, 2561), 0.25, (smooth[y : y + 256] for y in range(0, 2561, 256))
    )
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((2100, 2561), (1050, 1280), (525, 640))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        for level, factor in enumerate((1, 2, 4)):
            height, width = 640 * 4 // factor, 525 * 4 // factor
            cells = smooth[: height * factor, : width * factor].reshape(
                height, factor, width, factor, 3
            )
            difference = level_pixels(slide, level)[:height, :width] - cells.mean(axis=(1, 3))
            assert np.abs(difference).mean() < 2


def test_the_mask_is_255_inside_the_annotated_lesions(plans, cohort):
    for plan in plans[:4]:
        mask = mask_of(cohort, plan)
        assert mask.shape == SIZE[::-1]
        if not plan.label:
            assert not mask.any()
            continue
        y, x = np.indices(mask.shape) + 0.5
        expected = np.zeros_like(mask)
        for lesion in lesions_of(cohort, plan):
            shapely.prepare(lesion)
            expected[shapely.contains_xy(lesion, x, y)] = 255
        assert np.array_equal(mask, expected)


def test_froc_reads_the_masks_of_all_slides(plans, cohort):
    assert max(len(plan.lesion_diameters_um) for plan in plans) > 1
    for plan in plans:
        read = read_mask(cohort / "masks" / f"{plan.slide_id}.tif", level=0)
        assert np.array_equal(read, mask_of(cohort, plan) > 0)


def test_lesions_have_the_planned_diameters_and_one_is_under_200_um(plans, cohort):
    drawn = [
        sorted(pdist(lesion.exterior.coords).max() for lesion in lesions_of(cohort, plan))[::-1]
        for plan in plans
        if plan.label
    ]
    planned = [plan.lesion_diameters_um for plan in plans if plan.label]
    for diameters, expected in zip(drawn, planned, strict=True):
        assert diameters == pytest.approx(expected, abs=0.1)  # mpp is 1
    assert min(min(diameters) for diameters in planned) < 200
    assert len({diameter for diameters in planned for diameter in diameters}) >= 6


def test_lesions_lie_apart_and_within_the_tissue():
    for plan in plan_cohort(30, seed=1, size=(2048, 3000)):
        layout = draw_layout(plan)
        assert all(layout.tissue.contains(lesion) for lesion in layout.lesions)
        for number, lesion in enumerate(layout.lesions):
            assert all(lesion.distance(other) > 50 for other in layout.lesions[:number])


def test_large_lesions_may_have_a_hole():
    layouts = [draw_layout(plan) for plan in plan_cohort(20, seed=2)]
    assert any(lesion.interiors for layout in layouts for lesion in layout.lesions)


def test_mean_colour_alone_does_not_find_the_lesions(plans, cohort):
    """Spec: patch ROC AUC under 0.8 on slides that the classifier has not seen."""
    colours, labels, slides = [], [], []
    for number, plan in enumerate(plans):
        with openslide.OpenSlide(cohort / "slides" / f"{plan.slide_id}.tif") as slide:
            pixels = level_pixels(slide, 0)
        height, width = (side // 32 for side in pixels.shape[:2])
        squares = pixels[: height * 32, : width * 32].reshape(height, 32, width, 32, 3)
        mask = mask_of(cohort, plan)[: height * 32, : width * 32].reshape(height, 32, width, 32)
        tissue = (np.ptp(squares.astype(int), axis=-1) > 20).mean(axis=(1, 3)) > 0.5
        colours.append(squares.mean(axis=(1, 3))[tissue])
        labels.append(mask.any(axis=(1, 3))[tissue])
        slides.append(np.full(tissue.sum(), number))
    colours, labels, slides = map(np.concatenate, (colours, labels, slides))
    scores = np.empty(len(labels))
    for fold in range(2):
        held_out = slides % 2 == fold
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
        model.fit(colours[~held_out], labels[~held_out])
        scores[held_out] = model.predict_proba(colours[held_out])[:, 1]
        assert roc_auc_score(labels[held_out], scores[held_out]) < 0.8


def test_stain_varies_from_slide_to_slide(plans, cohort):
    means = []
    for plan in plans:
        with openslide.OpenSlide(cohort / "slides" / f"{plan.slide_id}.tif") as slide:
            pixels = level_pixels(slide, 0)
        tissue = np.ptp(pixels.astype(int), axis=-1) > 20
        means.append(pixels[tissue & (mask_of(cohort, plan) == 0)].mean(axis=0))
    assert (np.std(means, axis=0) > 4).all()  # grey levels, in each of red, green and blue


@pytest.mark.parametrize("kind", ["drawn", "pieced together"])
def test_a_block_looks_the_same_in_every_window(kind, plans, tiles):
    plan = plans[0]
    layout = draw_layout(plan)
    if kind == "drawn":
        texture = Histology(plan.seed, plan.mpp, layout)
    else:
        texture = Mosaic(plan_cohort(1, seed=0, size=SIZE, mpp=1.0, textures=tiles)[0])
    x, y = layout.lesions[0].centroid.coords[0]
    wide = Bounds(int(x) - 200, int(y) - 150, 300, 260)
    part = Bounds(wide.x + 90, wide.y + 70, 128, 101)
    tumour = shapely.union_all(layout.lesions)
    pictures = [texture.density(window, feather(tumour, window, 3)) for window in (wide, part)]
    assert np.allclose(pictures[0][70:171, 90:218], pictures[1], atol=1e-4)


COLOURS = {
    ("training", "H"): (200, 120, 140),
    ("training", "AC"): (140, 90, 170),
    ("test", "H"): (170, 160, 120),
    ("test", "AC"): (120, 150, 180),
}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    for (split, name), colour in COLOURS.items():
        (folder / split / name).mkdir(parents=True)
        for number in range(70):
            tile = np.clip(colour + rng.normal(0, 3, (100, 100, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(tile).save(folder / split / name / f"{number}.png")
    return folder


def test_slides_of_real_tiles_use_those_of_their_split_only(tiles, tmp_path):
    plans = plan_cohort(10, seed=3, size=SIZE, mpp=1.0, textures=tiles)
    assert {plan.split for plan in plans} == {"train", "validation", "test"}
    by_patient = pd.DataFrame(plans).groupby("patient_id").split.nunique()
    assert (by_patient == 1).all()
    for plan in plans:
        pool = "test" if plan.split == "test" else "training"
        assert len(plan.normal_tiles) == len(plan.lesion_tiles) == 64
        assert {Path(file).parent for file in plan.normal_tiles} == {tiles / pool / "H"}
        assert {Path(file).parent for file in plan.lesion_tiles} == {tiles / pool / "AC"}
    plan = next(plan for plan in plans if plan.label and plan.split == "test")
    row = write_slide(plan, tmp_path)
    assert row["split"] == "test"
    with openslide.OpenSlide(tmp_path / row["path"]) as slide:
        pixels = level_pixels(slide, 0)
    lesion = max(draw_layout(plan).lesions, key=lambda lesion: lesion.area)
    x, y = (round(value) for value in lesion.representative_point().coords[0])
    expected = np.array(COLOURS["test", "AC"]) * 243 / 255  # as light through tissue on glass
    assert np.abs(pixels[y - 8 : y + 8, x - 8 : x + 8].mean(axis=(0, 1)) - expected).max() < 4


def test_tiles_without_splits_leave_the_split_to_the_catalog(tiles):
    plans = plan_cohort(4, seed=3, size=SIZE, mpp=1.0, textures=tiles / "training")
    assert {plan.split for plan in plans} == {None}
    assert {Path(file).parent.name for plan in plans for file in plan.lesion_tiles} == {"AC"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": (1900, 5000)}, r"1900 x 5000 px at 0\.5 um per px: each side .* 1000 um"),
        ({"mpp": 0.0}, "0.0 um per px"),
        ({"slides": 0}, "slides is 0"),
    ],
)
def test_sizes_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        plan_cohort(**{"slides": 2, "seed": 0, "size": (4000, 4000), "mpp": 0.5} | change)


def test_a_folder_without_the_classes_is_refused(tiles, tmp_path):
    with pytest.raises(ConfigError, match=r"training/tumour.*settings normal and lesion"):
        plan_cohort(2, 0, textures=tiles, lesion="tumour")
    with pytest.raises(ConfigError, match=r"H: no tiles here"):
        plan_cohort(2, 0, textures=tmp_path)
    (tmp_path / "training" / "H").mkdir(parents=True)
    with pytest.raises(ConfigError, match="'training' only"):
        plan_cohort(2, 0, textures=tmp_path)


def test_every_slide_of_a_cohort_has_room_for_its_lesions():
    for plan in plan_cohort(20, 5, size=(3072, 3072), mpp=1.0):  # 3 mm: one piece or two
        assert len(draw_layout(plan).lesions) == len(plan.lesion_diameters_um)


def test_naevi_are_drawn_like_tumour_but_neither_annotated_nor_in_the_mask(tmp_path):
    settings = {"size": (1536, 1536), "mpp": 1.0}
    with_naevi, plain = (plan_cohort(1, 0, naevi=naevi, **settings)[0] for naevi in (2, 0))
    layout = draw_layout(with_naevi)
    assert len(layout.naevi) == 2
    assert layout.lesions == draw_layout(plain).lesions
    apart_px = min(naevus.distance(lesion) for naevus in layout.naevi for lesion in layout.lesions)
    assert apart_px >= 75  # um
    images = []
    for plan in (with_naevi, plain):
        write_slide(plan, tmp_path / str(len(images)))
        images.append(tifffile.imread(tmp_path / f"{len(images)}/slides/phantom_000.tif"))
    masks = [tifffile.imread(tmp_path / f"{i}/masks/phantom_000.tif") for i in range(2)]
    np.testing.assert_array_equal(*masks)
    changed = np.abs(images[0].astype(int) - images[1]).max(axis=2) > 40
    inside = np.zeros(changed.shape, bool)
    for naevus in layout.naevi:
        inside |= fill(naevus.buffer(10), Bounds(0, 0, *with_naevi.size))
    assert changed[inside].mean() > 0.2
    assert changed[~inside].mean() < 0.001


def test_a_lesion_that_the_tissue_has_no_room_for_is_refused(plans):
    plan = replace(plans[0], lesion_diameters_um=(600.0, 600.0, 600.0))
    with pytest.raises(
        ConfigError, match=r"phantom_000: no room for lesions of 600.0, 600.0, 600.0 um"
    ):
        draw_layout(plan)


MEMORY = """
import resource, sys
from wsi_pipeline.phantom import plan_cohort, write_slide
for side in (2048, 12000):
    write_slide(plan_cohort(1, 0, size=(side, side), mpp=0.5)[0], sys.argv[1])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_grows_with_the_width_of_a_slide_not_its_area(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    small_kb, large_kb = map(int, done.stdout.split())
    # A band of 512 rows is 18 MB; the whole of level 0 would be 432 MB.
    assert (large_kb - small_kb) / 1000 < 120


def test_tiles_of_smaller_levels_wait_on_disk_to_the_same_file(tmp_path, monkeypatch):
    strips = [np.random.default_rng(0).integers(0, 256, (256, 1100, 3), np.uint8)] * 8
    write_slide_pyramid(tmp_path / "memory.tif", (1100, 2048), 0.5, strips)
    monkeypatch.setattr(pyramid, "SPOOL_BYTES", 1)
    write_slide_pyramid(tmp_path / "disk.tif", (1100, 2048), 0.5, strips)
    assert (tmp_path / "disk.tif").read_bytes() == (tmp_path / "memory.tif").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"disk.tif", "memory.tif"}
