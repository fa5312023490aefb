"""The table of methods: one call form, and lengths that follow the image."""

from functools import partial

import pytest
import torch
from small_networks import (
    Failing,
    SmallAverage,
    SmallVgg,
    in_odd_state,
    seeded,
    state_of,
)

from wsi_pipeline.errors import ModelError
from wsi_pipeline.explain import perturbation
from wsi_pipeline.explain.cam import grad_cam
from wsi_pipeline.explain.gradients import smooth_grad
from wsi_pipeline.explain.methods import METHODS, unit_maps
from wsi_pipeline.explain.unveiling import guided_smooth_grad, unveiled_regions

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count=2, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_one_finite_map_for_each_image(name):
    maps = METHODS[name](seeded(SmallAverage, dtype=torch.float32), images(), target=1)
    assert (maps.shape, maps.dtype) == ((2, 32, 32), torch.float32)
    assert maps.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_left_as_it_was(name):
    model, pixels = in_odd_state(SmallAverage), images().requires_grad_()
    before = state_of(model)
    assert not METHODS[name](model, pixels).requires_grad
    assert state_of(model) == before
    assert pixels.requires_grad
    assert pixels.grad is None


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_left_as_it_was_after_an_error(name):
    model, pixels = in_odd_state(Failing), images()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        METHODS[name](model, pixels)
    assert state_of(model) == before
    assert not pixels.requires_grad


def test_every_method_is_told_in_words():
    assert all(method.legend.endswith(".") for method in METHODS.values())


def test_occlusions_window_is_an_eighth_of_the_image():
    model = seeded(SmallVgg, dtype=torch.float32)
    expected = perturbation.occlusion(model, images(side=48), window_px=6, stride_px=3)
    torch.testing.assert_close(METHODS["occlusion"](model, images(side=48)), expected)


@pytest.mark.parametrize(("side", "kernel_px"), [(32, 3), (224, 11), (512, 25)])
def test_unveiling_smooths_as_the_paper_on_its_image_size(side, kernel_px, monkeypatch):
    """11 px of 224 are 25.1 of 512, and 1.6 of 32, where 3 is the least."""
    used = []
    monkeypatch.setattr(
        "wsi_pipeline.explain.methods.unveiled_regions",
        lambda model, images, *, target, **settings: used.append(settings["kernel_px"]),
    )
    METHODS["unveiling"](None, torch.empty(1, 3, side, side))
    assert used == [kernel_px]


def test_seeds_and_layers_reach_the_methods_that_take_them():
    model, batch = seeded(SmallVgg, dtype=torch.float32), images()
    torch.testing.assert_close(
        METHODS["smooth_grad"](model, batch, seed=5), smooth_grad(model, batch, seed=5)
    )
    model.head.bias.data += 5  # both are called tumour
    torch.testing.assert_close(
        METHODS["unveiling"](model, batch, seed=5),
        unveiled_regions(model, batch, kernel_px=3, saliency=partial(guided_smooth_grad, seed=5)),
    )
    torch.testing.assert_close(
        METHODS["grad_cam"](model, batch, layer="features.0"),
        grad_cam(model, batch, layer="features.0"),
    )
    METHODS["saliency"](model, batch, seed=5, layer="no such layer")
    with pytest.raises(ModelError, match="'nowhere' is not in the model"):
        METHODS["grad_cam"](model, batch, layer="nowhere")


def test_unit_maps_keep_evidence_for_the_target_up_to_one():
    maps = torch.tensor([[[-8.0, 2.0], [4.0, 0.0]], [[-1.0, -2.0], [-3.0, 0.0]]])
    expected = torch.tensor([[[0.0, 0.5], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(unit_maps(maps), expected)
