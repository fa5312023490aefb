"""Views of a model: first filters, feature maps, the inputs it responds to most."""

import numpy as np
import pytest
import torch
from small_networks import Failing, PixelWeights, SmallVgg, in_odd_state, seeded, state_of
from torch import nn

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.views import feature_maps, first_layer_filters, most_representative

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count=2, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(count, 3, 8, 12, dtype=dtype)


def test_first_layer_filters_by_hand():
    model = SmallVgg()
    model.features[0] = nn.Conv2d(3, 2, (1, 2))
    red, green, blue = [[0.5, -2.0]], [[1.0, 0.0]], [[2.0, -1.0]]
    with torch.no_grad():
        model.features[0].weight.copy_(torch.tensor([[red, green, blue], [[[0.0, 0.0]]] * 3]))
    # 128 + 127 w / 2: 0.5 gives 159.75, 1 gives 191.5 (to even), -1 gives 64.5 (to even)
    pictures = first_layer_filters(model)
    assert pictures.tolist() == [[[[160, 192, 255], [1, 128, 64]]], [[[128] * 3] * 2]]
    assert pictures.dtype == np.uint8


def test_first_layers_without_pictures_are_refused():
    with pytest.raises(ModelError, match="filters have 1 channels: pictures need 3"):
        first_layer_filters(nn.Sequential(nn.Conv2d(1, 4, 3)))
    with pytest.raises(ModelError, match="has no convolution"):
        first_layer_filters(nn.Linear(3, 1))


def test_feature_maps_are_what_the_layer_hands_on():
    model, pixels = seeded(SmallVgg), images()
    with torch.no_grad():
        before = model.features[0](pixels)
        after = model.features[:5](pixels)
    assert before.min() < 0  # which the in-place ReLU behind would have overwritten
    torch.testing.assert_close(feature_maps(model, pixels, "features.0"), before)
    torch.testing.assert_close(feature_maps(model, pixels, "features.4"), after)
    assert torch.equal(feature_maps(model, pixels), feature_maps(model, pixels, "features.3"))


def test_the_most_representative_inputs_of_the_logit_over_batches():
    # Each input is one value everywhere, and so is its logit, times 3 * 8 * 12 = 288.
    levels = [3.0, -1, 7, 7, 2, -9, 5]
    inputs = torch.tensor(levels)[:, None, None, None].expand(-1, 3, 8, 12)
    model = PixelWeights(torch.ones(3, 8, 12))
    found = most_representative(model, inputs.split(3), top=3)
    assert found.places.tolist() == [2, 3, 6]
    assert found.values.tolist() == [288 * 7, 288 * 7, 288 * 5]
    assert found.images[:, 0, 0, 0].tolist() == [7, 7, 5]
    against = most_representative(model, inputs.split(3), target=0, top=2)
    assert against.places.tolist() == [5, 1]
    assert against.values.tolist() == [288 * 9, 288 * 1]
    assert most_representative(model, inputs.split(3), top=20).places.tolist() == [
        2, 3, 6, 0, 4, 1, 5,
    ]  # fmt: skip


def test_the_most_representative_inputs_of_a_unit():
    model, pixels = seeded(SmallVgg), images(11)
    with torch.no_grad():
        activity = model.features[:5](pixels)[:, 2].amax((1, 2))
    found = most_representative(model, pixels.split(4), layer="features.4", unit=2, top=4)
    expected = activity.topk(4)
    assert found.places.tolist() == expected.indices.tolist()
    torch.testing.assert_close(found.values, expected.values)
    assert torch.equal(found.images, pixels[expected.indices])


def test_nothing_to_represent_is_refused():
    model = seeded(SmallVgg)
    with pytest.raises(ConfigError, match="top is 0: it must be 1 or more"):
        most_representative(model, [images()], top=0)
    with pytest.raises(ConfigError, match="no batches"):
        most_representative(model, [])


VIEWS = pytest.mark.parametrize(
    "view",
    [feature_maps, lambda model, pixels: most_representative(model, [pixels], unit=0).values],
    ids=["feature_maps", "most_representative"],
)


@VIEWS
def test_the_model_is_left_as_it_was(view):
    model, pixels = in_odd_state(SmallVgg), images(dtype=torch.float32)
    before = state_of(model)
    assert not view(model, pixels).requires_grad
    first_layer_filters(model)
    assert state_of(model) == before


@VIEWS
def test_the_model_is_left_as_it_was_after_an_error(view):
    model, pixels = in_odd_state(Failing), images(dtype=torch.float32)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        view(model, pixels)
    assert state_of(model) == before
