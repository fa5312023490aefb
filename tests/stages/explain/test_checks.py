"""Methods held against annotations of the run made by hand, see explain_run.py, and in figures."""

import numpy as np
import pytest
import torch
from explain_run import settings

from wsi_pipeline.jobs.unit import SmallFile
from wsi_pipeline.models.checkpoint import load_model
from wsi_pipeline.stages.explain import checks
from wsi_pipeline.stages.explain.places import Place


def test_the_mask_of_a_patch_is_the_annotation_at_its_pixels(run):
    """The patch at (80, 80) reaches from there to 144: tumour from working px 8 on, to its end."""
    place = Place("s", 80, 80, 32, 32, 2.0, 32, "asked")
    slide, annotation = str(run.parent / "s.tif"), SmallFile.at(run.parent / "s.geojson")
    rules = settings(run).catalog.annotation
    expected = np.zeros((32, 32), bool)
    expected[8:, 8:] = True
    found = checks.place_mask(slide, 0.5, place, annotation, rules)
    np.testing.assert_array_equal(found, expected)


def test_a_map_of_evidence_against_ranks_by_its_order():
    """The mask has -1 and 2, the rest -3 and 1.

    AUROC: of the 4 pairs of a pixel inside and one outside, 2 > 1, 2 > -3 and -1 > -3 are in
    order: 0.75, where -1 and -3 both as 0 would give (2 + 1/2) / 4. In 0..1 the map is 0, 1, 0,
    1/2, rounded 0, 1, 0, 1: the two in the middle are right, one of two in the mask is found, and
    1 of 1.5 lies inside. Without any evidence for tumour the highest pixel, -1, is one inside,
    where four times 0 would give 1/2.
    """
    mask = np.array([[True, True], [False, False]])
    mixed = torch.tensor([[[-1.0, 2.0], [-3.0, 1.0]]])
    found = checks.map_overlap("lime", mixed, mask)
    expected = {
        "exact_match": 0.5, "recall": 0.5, "auroc": 0.75, "pointing_game": 1,
        "energy_inside": 1 / 1.5,
    }  # fmt: skip
    assert found.to_dict() == pytest.approx(expected)
    against = torch.tensor([[[-1.0, -2.0], [-3.0, -4.0]]])
    found = checks.map_overlap("lime", against, mask)
    assert (found["auroc"], found["pointing_game"]) == (1, 1)
    q = torch.tensor([[[0.4, 0.2], [0.1, 0.3]]])  # PatchNet's: under 0.5, none is called tumour
    assert checks.map_overlap("patchnet", q, mask)["recall"] == 0
    assert checks.map_overlap("lime", q, mask)["recall"] == 1  # 0.4 and 0.2 of 0.4


def test_methods_are_ranked_over_patches_of_both_kinds():
    def result(auroc, mixed=True):
        figures = dict.fromkeys(("exact_match", "recall", "pointing_game", "energy_inside"), 0.5)
        return {"mixed": mixed, "seconds": 2.0, "auroc": auroc, **figures}

    results = {
        "s/0,0/saliency": result(0.6), "s/9,9/saliency": result(0.8),
        "s/0,0/lime": result(0.9), "s/9,9/lime": result(None),
        "s/5,5/saliency": result(0.1, mixed=False),
    }  # fmt: skip
    table = checks.ranking_table(results)
    assert table["method"].tolist() == ["lime", "saliency"]
    assert table["auroc"].tolist() == pytest.approx([0.9, 0.7])  # of one patch, and of two
    assert table["patches"].tolist() == [2, 2]
    assert checks.ranking_table({}).empty


def test_a_method_that_random_weights_do_not_change_gets_a_warning():
    def result(last):
        return {
            "deletion": 0.2, "insertion": 0.8, "layers": ["head", "first"],
            "similarity": [0.9, last],
        }  # fmt: skip

    results = {
        "s/0,0/saliency": result(0.1), "s/9,9/saliency": result(0.3),
        "s/0,0/deconvolution": result(0.7), "s/9,9/deconvolution": result(0.5),
        "s/0,0/grad_cam": result(0.8), "s/9,9/grad_cam": result(None),
        "s/0,0/clear": result(None), "s/9,9/clear": result(None),
    }  # fmt: skip
    trust, layers = checks.trust_tables(results)
    # Grad-CAM's other map vanished: (0.8 + 0) / 2 is under 0.5.
    assert trust["similarity"].tolist() == pytest.approx([0.2, 0.6, 0.4, 0])
    assert trust["warning"].str.len().gt(0).tolist() == [False, True, False, False]
    assert "0.60, over 0.5" in trust["warning"][1]
    assert layers["layer"].tolist() == ["head", "first"] * 4


def test_maps_that_are_constant_under_random_weights_get_no_warning():
    """0.9 with a random head alone says nothing of all weights."""
    result = {
        "deletion": 0.2, "insertion": 0.8, "layers": ["head", "first"], "similarity": [0.9, None],
    }  # fmt: skip
    trust, layers = checks.trust_tables({"s/0,0/clear": result, "s/9,9/clear": result})
    assert trust["similarity"].tolist() == [0]
    assert trust["warning"].tolist() == [""]
    assert layers["similarity"].tolist() == [0.9, 0]


def test_layers_become_random_from_the_head_down(run):
    model, _ = load_model(run / "models/net")
    assert checks.cascade_layers(model) == [
        "subnet.head", "subnet", "subnet.convolutions.1", "subnet.convolutions.0",
    ]  # fmt: skip
