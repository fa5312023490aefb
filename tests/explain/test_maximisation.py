"""Activation maximisation: closed forms, the course of the objective, units."""

import pytest
import torch
from small_networks import Failing, PixelWeights, SmallVgg, in_odd_state, seeded, state_of
from torch import nn

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.maximisation import START_STD, activation_maximisation

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(size_px=4):
    torch.manual_seed(5)
    return PixelWeights(torch.randn(3, size_px, size_px, dtype=torch.float64))


def test_the_maximum_of_a_linear_model_is_its_weights_over_twice_the_penalty():
    # d/dx (w x - lambda |x|^2) = w - 2 lambda x = 0 at x = w / (2 lambda); the objective there is
    # |w|^2 / (4 lambda). A step leaves 1 - 2 * 0.5 * 0.25 = 3/4 of the distance: 0.75^100 = 3e-13.
    model = linear()
    found = activation_maximisation(model, size_px=4, steps=100, learning_rate=0.5, penalty=0.25)
    weights = model.weights.detach()
    torch.testing.assert_close(found.image, 2 * weights)
    assert found.objective[-1].item() == pytest.approx(weights.square().sum().item())
    against = activation_maximisation(
        model, target=0, size_px=4, steps=100, learning_rate=0.5, penalty=0.25
    )
    torch.testing.assert_close(against.image, -2 * weights)


def test_one_step_by_hand():
    model = linear()
    start = activation_maximisation(model, size_px=4, steps=1, learning_rate=1e-9, penalty=0.25)
    found = activation_maximisation(model, size_px=4, steps=1, learning_rate=0.5, penalty=0.25)
    x, w = start.image, model.weights.detach()
    torch.testing.assert_close(found.image, x + 0.5 * (w - 2 * 0.25 * x))
    objective = [(w * y).sum() - 0.25 * y.square().sum() for y in (x, found.image)]
    torch.testing.assert_close(found.objective, torch.stack(objective))


def test_the_start_is_faint_noise_that_the_seed_gives():
    def start(seed):
        settings = {"size_px": 32, "steps": 1, "learning_rate": 1e-12, "seed": seed}
        return activation_maximisation(linear(32), **settings).image

    assert torch.equal(start(1), start(1))
    assert not torch.allclose(start(1), start(2))
    assert start(1).std().item() == pytest.approx(START_STD, rel=0.1)  # of 3072 values


def test_the_objective_of_a_network_rises():
    model = seeded(SmallVgg)
    with torch.no_grad():
        model.head.weight.mul_(10)
    found = activation_maximisation(model, size_px=16, steps=30, learning_rate=1.0, penalty=0.01)
    assert found.objective.shape == (31,)
    assert found.objective.dtype == torch.float64
    assert found.objective[-1] > found.objective[0] + 1
    with torch.no_grad():
        value = model(found.image[None])[0] - 0.01 * found.image.square().sum()
    assert found.objective[-1].item() == pytest.approx(value.item())


def test_a_units_activity_is_the_maximum_of_its_feature_map():
    # A 1 x 1 kernel (1, 2, -1): the place where it is largest is drawn to w / (2 lambda), all
    # others, without a gradient of their own, to 0.
    model = SmallVgg()
    model.features, model.head = nn.Conv2d(3, 2, 1, bias=False), nn.Linear(2, 1)
    kernel = torch.tensor([1.0, 2, -1])
    with torch.no_grad():
        model.features.weight.copy_(torch.stack([torch.ones(3), kernel])[:, :, None, None])
    found = activation_maximisation(
        model, unit=1, size_px=4, steps=60, learning_rate=0.5, penalty=0.5
    )
    places = found.image.flatten(1).T
    strongest = (places @ kernel).argmax()
    torch.testing.assert_close(places[strongest], kernel, rtol=1e-5, atol=1e-6)
    assert places.abs().sum(1).gt(1e-6).sum() == 1
    assert found.objective[-1].item() == pytest.approx(6 - 0.5 * 6, rel=1e-5)
    by_name = activation_maximisation(
        model, layer="features", unit=1, size_px=4, steps=60, learning_rate=0.5, penalty=0.5
    )
    assert torch.equal(by_name.image, found.image)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size_px": 0}, "size_px is 0: it must be 1 or more"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0 and penalty 0.001: they must be over 0"),
        ({"penalty": -1.0}, "penalty -1.0"),
        ({"learning_rate": 10.0, "penalty": 0.1}, "their product must be under 1"),
    ],
)
def test_numbers_outside_of_their_ranges_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        activation_maximisation(linear(), **setting)


def test_units_that_are_not_there_are_refused():
    model = seeded(SmallVgg)
    with pytest.raises(ModelError, match="unit is 5: the layer has units 0 to 4"):
        activation_maximisation(model, unit=5, size_px=8)
    with pytest.raises(ModelError, match=r"layer 'features.0' is named without a unit"):
        activation_maximisation(model, layer="features.0", size_px=8)
    model.spare = nn.Conv2d(3, 1, 1)
    with pytest.raises(ModelError, match="does not call layer 'spare'"):
        activation_maximisation(model, layer="spare", unit=0, size_px=8)


def test_the_model_is_left_as_it_was():
    model = in_odd_state(SmallVgg)
    before = state_of(model)
    found = activation_maximisation(model, size_px=8, steps=2)
    activation_maximisation(model, size_px=8, steps=2, unit=0)
    assert state_of(model) == before
    assert found.image.dtype == torch.float32
    assert not found.image.requires_grad


@pytest.mark.parametrize("unit", [None, 0])
def test_the_model_is_left_as_it_was_after_an_error(unit):
    model = in_odd_state(Failing)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        activation_maximisation(model, size_px=8, unit=unit)
    assert state_of(model) == before
