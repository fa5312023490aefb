"""Weights drawn anew layer by layer, rank correlation of maps, deletion and insertion by hand."""

import numpy as np
import pytest
import torch
from scipy.ndimage import sobel
from small_networks import (
    Failing,
    PixelWeights,
    SmallAverage,
    SmallVgg,
    in_odd_state,
    seeded,
    state_of,
)
from torch import nn

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.gradients import saliency
from wsi_pipeline.explain.trust import Curves, deletion_and_insertion, randomised, similarity
from wsi_pipeline.models.patchnet import PatchNet

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count=2, height=16, width=24, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(count, 3, height, width, dtype=dtype)


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(model, before):
    now = weights_of(model)
    return {name for name, value in now.items() if not torch.equal(value, before[name])}


def logistic(*logits):
    return 1 / (1 + np.exp(-np.array(logits, dtype=float)))


# Randomisation


def test_the_cascade_goes_from_the_head_down_one_layer_more_each_time():
    model = seeded(SmallVgg)
    before, seen = weights_of(model), []
    for layer, copy in randomised(model):
        seen.append((layer, changed(copy, before)))
    head, second, first = (
        {f"{layer}.weight", f"{layer}.bias"} for layer in ("head", "features.3", "features.0")
    )
    assert seen == [
        ("head", head),
        ("features.3", head | second),
        ("features.0", head | second | first),
    ]
    assert head | second | first == set(before)


def test_it_is_one_copy_and_the_model_given_stays_as_it_was():
    model = in_odd_state(SmallVgg)
    before = state_of(model)
    copies = [copy for _, copy in randomised(model)]
    assert state_of(model) == before
    assert len({id(copy) for copy in copies}) == 1
    assert copies[0] is not model


def test_each_parameter_keeps_its_root_mean_square_and_loses_its_values():
    # 20,000 normal values: their root mean square is known to 1 / sqrt(40,000) = 0.5 %.
    model = nn.Sequential(nn.Linear(200, 100))
    nn.init.normal_(model[0].weight, mean=5, std=0.1)
    nn.init.constant_(model[0].bias, 3)
    before = weights_of(model)
    ((_, copy),) = randomised(model)
    assert copy[0].weight.square().mean().sqrt().item() == pytest.approx(5.001, rel=0.02)
    assert abs(copy[0].weight.mean().item()) < 5 * 5 / 20_000**0.5
    assert copy[0].bias.std().item() == pytest.approx(3, rel=0.4)  # 100 values
    correlation = np.corrcoef(before["0.weight"].flatten(), copy[0].weight.detach().flatten())
    assert abs(correlation[0, 1]) < 5 / 20_000**0.5


def test_a_bias_of_zero_stays_zero_and_buffers_stay_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.zeros_(model[0].bias)
    model[1].running_mean.fill_(7)
    *_, (_, copy) = randomised(model)
    assert not copy[0].bias.any()
    assert (copy[1].running_mean == 7).all()
    assert not torch.equal(copy[1].weight, model[1].weight)  # all 1 before


def test_draws_derive_from_the_seed_and_the_parameters_name():
    model = seeded(SmallVgg)
    random_state = torch.get_rng_state()

    def last(seed, **settings):
        *_, (_, copy) = randomised(model, seed, **settings)
        return weights_of(copy)

    first = last(0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, first[name]) for name, value in last(0).items())
    assert all(not torch.equal(value, first[name]) for name, value in last(1).items())
    alone = last(0, layers=["features.3"])
    assert torch.equal(alone["features.3.weight"], first["features.3.weight"])


def test_layers_can_be_named_in_their_order():
    torch.manual_seed(0)
    model = PatchNet(8, 8, filters=2, layers=1)
    head, readout, convolution = ("subnet.head", "subnet", "subnet.convolutions.0")
    before = weights_of(model)
    cascade = randomised(model, layers=[head, readout, convolution])
    steps = [(layer, len(changed(copy, before))) for layer, copy in cascade]
    # weight and bias of each, but for the convolution's biases, which start at 0 and stay there
    assert steps == [(head, 2), (readout, 4), (convolution, 5)]
    assert [layer for layer, _ in randomised(model)] == [head, convolution, readout]


@pytest.mark.parametrize("layers", [["features"], ["head", "features.1"], ["neck"], []])
def test_layers_without_parameters_are_refused(layers):
    with pytest.raises(ModelError, match=r"layers.*'features.0', 'features.3', 'head'"):
        randomised(seeded(SmallVgg), layers=layers)
    with pytest.raises(ModelError, match="of the model are none"):
        randomised(nn.ReLU())


# Similarity


def test_similarity_by_hand():
    # Magnitudes 1 2 3 4 against 1 3 2 4: rank differences 0 1 1 0, 1 - 6 * 2 / (4 * 15) = 0.8.
    maps = torch.tensor([[[1.0, -2.0], [3.0, 4.0]]])
    others = torch.tensor([[[-10.0, 30.0], [20.0, 40.0]]])
    assert similarity(maps, others) == pytest.approx([0.8])
    # In reverse, -1; and with a monotonic change of the values or of their signs, 1.
    assert similarity(maps, 5 - maps.abs()) == pytest.approx([-1])
    assert similarity(maps, -(maps**3)) == pytest.approx([1])


def test_equal_values_share_their_mean_rank():
    # Ranks 1.5 1.5 3.5 3.5 against 1 2 3 4, about 2.5: sum of products 1.5 + 0.5 + 0.5 + 1.5 = 4,
    # sums of squares 4 and 5, so 4 / sqrt(20).
    maps = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    others = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert similarity(maps, others) == pytest.approx([4 / 20**0.5])


@pytest.mark.filterwarnings("error")
def test_a_constant_map_has_no_similarity_and_spares_the_others():
    maps = images(3)[:, 0].float()
    maps[1] = 0
    others = maps.clone()
    others[2] = 5
    np.testing.assert_allclose(similarity(maps, others), [1, np.nan, np.nan])
    np.testing.assert_allclose(similarity(others, maps), [1, np.nan, np.nan])


def test_an_edge_detector_is_told_apart_from_saliency():
    def edges(model, pixels, *, target=1):
        grey = pixels.mean(1).numpy()
        return torch.from_numpy(np.hypot(sobel(grey, axis=1), sobel(grey, axis=2)))

    model, pixels = seeded(SmallAverage), images(4)
    found = {}
    for method in (edges, saliency):
        maps = method(model, pixels)
        found[method] = np.stack(
            [similarity(maps, method(copy, pixels)) for _, copy in randomised(model)]
        )
    np.testing.assert_allclose(found[edges], 1)
    assert (np.abs(found[saliency][-1]) < 0.5).all()


def test_maps_that_cannot_be_ranked_together_are_refused():
    maps = torch.zeros(1, 4, 4)
    with pytest.raises(ConfigError, match=r"\(1, 4, 4\) and \(1, 4, 5\)"):
        similarity(maps, torch.zeros(1, 4, 5))
    with pytest.raises(ConfigError, match=r"\(4, 4\) and \(4, 4\)"):
        similarity(maps[0], maps[0])
    for pair in ((maps, maps / 0), (maps / 0, maps)):
        with pytest.raises(ConfigError, match="16 values of the maps are NaN or infinite"):
            similarity(*pair)


# Deletion and insertion


def one_channel(*values):
    """An image of 2 x 2 px whose first channel has these values; the others are 0."""
    pixels = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    pixels[0, 0] = torch.tensor(values).view(2, 2)
    return pixels


ONES = PixelWeights(torch.ones(3, 2, 2, dtype=torch.float64))


def test_curves_of_a_linear_model_by_hand():
    # The logit is the sum 4 + 3 - 1 - 2 = 4 of what is left. By the map: 4, 3, -1, -2.
    # Deleted: 4, 0, -3, -2, 0 is left. Inserted: 0, 4, 7, 6, 4.
    pixels = one_channel(4.0, 3.0, -1.0, -2.0)
    found = deletion_and_insertion(ONES, pixels, pixels[:, 0], steps=4)
    assert found.fraction.tolist() == [0, 0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(found.deletion, [logistic(4, 0, -3, -2, 0)], rtol=1e-6)
    np.testing.assert_allclose(found.insertion, [logistic(0, 4, 7, 6, 4)], rtol=1e-6)
    # For class 0 the probabilities are the others'.
    other = deletion_and_insertion(ONES, pixels, pixels[:, 0], steps=4, target=0)
    np.testing.assert_allclose(other.deletion, [logistic(-4, 0, 3, 2, 0)], rtol=1e-6)


def test_areas_are_of_trapezoids():
    curves = Curves(np.array([0, 0.5, 1]), np.array([[1, 0.5, 0], [1, 0, 0]]), np.ones((2, 3)))
    # (1 + 0.5) / 4 + (0.5 + 0) / 4 = 0.5 and (1 + 0) / 4 = 0.25
    assert curves.deletion_area.tolist() == [0.5, 0.25]
    assert curves.insertion_area.tolist() == [1, 1]


def test_no_order_is_better_than_a_linear_models_own():
    # Of a linear model every curve is lowest, or highest, at every step by weight times value.
    torch.manual_seed(3)
    model = PixelWeights(torch.randn(3, 16, 24, dtype=torch.float64) / 20)
    pixels = images(3)
    own = (model.weights.detach() * pixels).sum(1)
    best = deletion_and_insertion(model, pixels, own)
    assert best.deletion.shape == (3, 21)
    for other in (torch.randn_like(own), -own, own.abs()):
        worse = deletion_and_insertion(model, pixels, other)
        assert (best.deletion <= worse.deletion + 1e-6).all()
        assert (best.insertion >= worse.insertion - 1e-6).all()
        assert (best.deletion_area < worse.deletion_area).all()
        assert (best.insertion_area > worse.insertion_area).all()


def test_steps_part_the_pixels_as_evenly_as_whole_ones_can():
    # 4 px in 3 steps: round(4/3) = 1, round(8/3) = 3, 4.
    pixels = one_channel(4.0, 3.0, 2.0, 1.0)
    found = deletion_and_insertion(ONES, pixels, pixels[:, 0], steps=3)
    assert found.fraction.tolist() == [0, 0.25, 0.75, 1]
    np.testing.assert_allclose(found.deletion, [logistic(10, 6, 1, 0)], rtol=1e-6)


def test_pixels_of_equal_value_go_row_by_row():
    pixels = one_channel(4.0, 3.0, 2.0, 1.0)
    ties = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])  # first 3 then 1, then 4 then 2
    found = deletion_and_insertion(ONES, pixels, ties, steps=4)
    np.testing.assert_allclose(found.insertion, [logistic(0, 3, 4, 8, 10)], rtol=1e-6)


def test_the_fill_takes_the_place_of_all_channels():
    pixels = one_channel(4.0, 3.0, 2.0, 1.0)
    # 0.5 in three channels: a pixel covered gives 1.5. 10; 7.5; 6; 5.5; 6.
    found = deletion_and_insertion(ONES, pixels, pixels[:, 0], steps=4, fill=0.5)
    np.testing.assert_allclose(found.deletion, [logistic(10, 7.5, 6, 5.5, 6)], rtol=1e-6)
    np.testing.assert_allclose(found.insertion, [logistic(6, 8.5, 10, 10.5, 10)], rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_the_batch_size_changes_no_curve_and_bounds_each_run(batch_size):
    model, pixels, sizes = seeded(SmallVgg), images(), []
    maps = pixels[:, 0]
    expected = deletion_and_insertion(model, pixels, maps)
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    found = deletion_and_insertion(model, pixels, maps, batch_size=batch_size)
    assert max(sizes) <= batch_size
    assert sum(sizes) == 2 * 2 * 21
    np.testing.assert_allclose(found.deletion, expected.deletion, rtol=1e-6)
    np.testing.assert_allclose(found.insertion, expected.insertion, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((2, 16, 23), {}, r"\(2, 16, 23\) for images of shape \(2, 3, 16, 24\)"),
        ((1, 16, 24), {}, "one map for each image"),
        ((2, 16, 24), {"steps": 0}, "steps is 0"),
        ((2, 16, 24), {"steps": 385}, "steps is 385.*384"),
        ((2, 16, 24), {"batch_size": 0}, "batch_size 0"),
    ],
)
def test_settings_out_of_range_are_refused(shape, settings, message):
    with pytest.raises(ConfigError, match=message):
        deletion_and_insertion(seeded(SmallVgg), images(), torch.zeros(shape), **settings)


def test_maps_with_nan_no_images_and_an_unknown_target_are_refused():
    model, pixels = seeded(SmallVgg), images()
    maps = pixels[:, 0].clone()
    with pytest.raises(ModelError, match="target is 2"):
        deletion_and_insertion(model, pixels, maps, target=2)
    with pytest.raises(ConfigError, match="one or more"):
        deletion_and_insertion(model, pixels[:0], maps[:0])
    maps[0, 3, 4] = np.nan
    with pytest.raises(ConfigError, match="1 values of the maps are NaN"):
        deletion_and_insertion(model, pixels, maps)


def test_the_model_is_left_as_it_was():
    model, pixels = in_odd_state(SmallVgg), images(dtype=torch.float32)
    before = state_of(model)
    deletion_and_insertion(model, pixels, pixels[:, 0], steps=2)
    assert state_of(model) == before
    failing = in_odd_state(Failing)
    before = state_of(failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        deletion_and_insertion(failing, pixels, pixels[:, 0], steps=2)
    assert state_of(failing) == before
