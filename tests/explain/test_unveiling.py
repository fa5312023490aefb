"""Iterative unveiling: regions by hand, a network that looks at two squares, the end of it."""

import pytest
import torch
from small_networks import SmallVgg, seeded
from torch import nn

from wsi_pipeline.errors import ConfigError, ModelError
from wsi_pipeline.explain.gradients import guided_backpropagation, smooth_grad
from wsi_pipeline.explain.unveiling import smooth_to_region, unveil, unveiled_regions

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"kernel_px": 3, "passes": 1}


class BrightestSquare(nn.Module):
    """The logit is 20 times the mean of the brightest 8 x 8 square, less 10."""

    def __init__(self):
        super().__init__()
        self.square = nn.Conv2d(3, 1, 8, bias=False)
        nn.init.constant_(self.square.weight, 1 / (3 * 8 * 8))

    def forward(self, images):
        return 20 * self.square(images).amax((1, 2, 3)) - 10


def gradient(model, images, *, target=1):
    """Absolute gradient: of BrightestSquare, 20 / 64 over the brightest square."""
    images = images.detach().requires_grad_()
    score = (model(images) if target == 1 else -model(images)).sum()
    return torch.autograd.grad(score, images)[0].abs().sum(1)


def with_squares(*squares):
    """32 x 48 px; squares of 8 px at (y, x) of one value."""
    image = torch.zeros(1, 3, 32, 48)
    for y, x, value in squares:
        image[..., y : y + 8, x : x + 8] = value
    return image


def grown_square(y, x):
    """The square after one pass of 3 x 3 at a threshold of 1/4, 88 px: 3 of the 9 pixels around one
    beside it are in the square, but beside the end of a side 2, and beyond a corner 1.
    """
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[y : y + 8, x : x + 8] = True
    mask[y - 1 : y + 9, x + 1 : x + 7] = True
    mask[y + 1 : y + 7, x - 1 : x + 9] = True
    return mask


TWO = with_squares((4, 5, 0.8), (20, 30, 1.0))


def test_two_squares_are_found_one_after_the_other():
    first, second = unveil(BrightestSquare(), TWO, saliency=gradient, **SMALL)
    assert torch.equal(first.masks[0], grown_square(20, 30))
    assert torch.equal(second.masks[0], grown_square(4, 5))
    torch.testing.assert_close(first.maps[0].amax(), torch.tensor(20 / 64))
    assert torch.equal(first.images, with_squares((4, 5, 0.8)))
    assert torch.equal(second.images, with_squares())
    # logits 20 * 1 - 10, 20 * 0.8 - 10, -10: under 1/2 after the second round
    expected = torch.sigmoid(torch.tensor([10.0, 6.0, -10.0]))
    found = torch.cat([first.before, first.after, second.after])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(second.before, first.after)


def test_rounds_end_it():
    only = unveil(BrightestSquare(), TWO, rounds=1, saliency=gradient, **SMALL)
    assert [each.masks.sum().item() for each in only] == [88]
    # with nothing to stop at, the dark image's maps go on to be taken
    every = unveil(BrightestSquare(), TWO, rounds=4, until=0.0, saliency=gradient, **SMALL)
    assert len(every) == 4


def test_a_probability_under_the_threshold_ends_it():
    # sigmoid(6) = 0.9975: over 0.99 there is a second round, over 0.999 there is none
    for until, rounds in ((0.99, 2), (0.999, 1)):
        found = unveil(BrightestSquare(), TWO, until=until, saliency=gradient, **SMALL)
        assert len(found) == rounds


def test_each_image_of_a_batch_ends_by_itself():
    one, none = with_squares((4, 5, 1.0)), with_squares((4, 5, 0.2))
    batch = torch.cat([none, TWO, one])
    asked = []

    def saliency(model, images, *, target):
        asked.append((len(images), target))
        return gradient(model, images, target=target)

    first, second = unveil(BrightestSquare(), batch, saliency=saliency, **SMALL)
    assert asked == [(2, 1), (1, 1)]
    assert [each.masks.sum((1, 2)).tolist() for each in (first, second)] == [
        [0, 88, 88],
        [0, 88, 0],
    ]
    assert second.maps.sum((1, 2)).gt(0).tolist() == [False, True, False]
    assert torch.equal(second.images[:1], none)
    union = unveiled_regions(BrightestSquare(), batch, saliency=gradient, **SMALL)
    both = grown_square(4, 5) | grown_square(20, 30)
    expected = [torch.zeros(32, 48), both.float(), grown_square(4, 5).float()]
    assert torch.equal(union, torch.stack(expected))


def test_class_0_has_its_own_probability():
    dark = with_squares((4, 5, 0.2))  # logit 20 * 0.2 - 10 = -6
    assert unveil(BrightestSquare(), TWO, target=0, saliency=gradient, **SMALL) == []
    found = unveil(BrightestSquare(), dark, target=0, rounds=1, saliency=gradient, **SMALL)
    torch.testing.assert_close(found[0].before, torch.sigmoid(torch.tensor([6.0])))


def test_an_image_that_starts_under_the_threshold_has_no_region():
    dark = with_squares((4, 5, 0.2))
    assert unveil(BrightestSquare(), dark, saliency=gradient) == []
    regions = unveiled_regions(BrightestSquare(), dark, saliency=gradient)
    assert regions.dtype == torch.float32
    assert regions.shape == (1, 32, 48)
    assert regions.count_nonzero() == 0


def test_fills():
    images = with_squares((20, 30, 1.0))
    images[:, 1] *= 3
    mask = grown_square(20, 30)
    # 64 pixels of 32 * 48 are bright: 64 / 1536 = 1/24, in the second channel 3/24
    for fill, colour in (
        (0.0, [0, 0, 0]),
        (-0.5, [-0.5, -0.5, -0.5]),
        ("mean", [1 / 24, 3 / 24, 1 / 24]),
    ):
        (found,) = unveil(
            BrightestSquare(), images, fill=fill, rounds=1, saliency=gradient, **SMALL
        )
        expected = torch.where(mask, torch.tensor(colour)[:, None, None], images[0])
        torch.testing.assert_close(found.images[0], expected)


def test_the_mean_fill_is_that_of_the_whole_image_in_every_round():
    rounds = unveil(BrightestSquare(), TWO, fill="mean", rounds=2, saliency=gradient, **SMALL)
    mean = (64 * 0.8 + 64 * 1.0) / (32 * 48)
    filled = rounds[1].images[0, 0][grown_square(4, 5) | grown_square(20, 30)]
    torch.testing.assert_close(filled, torch.full((176,), mean))


def one_pixel(height=9, width=9, y=4, x=4):
    maps = torch.zeros(1, height, width)
    maps[0, y, x] = 5
    return maps


def test_regions_of_one_pixel_by_hand():
    # Pass 1: nine means of 5/9, all the largest. Pass 2: of the 3 x 3 ones at (i, j) from a corner
    # of the 5 x 5 square, (1 2 3 2 1)_i (1 2 3 2 1)_j ninths; the largest is 9 ninths. Over 1/4
    # are 3 ninths or more; over 1/2 are 6 or more.
    nine = smooth_to_region(one_pixel(), kernel_px=3, passes=1)
    grown = smooth_to_region(one_pixel(), kernel_px=3, passes=2)
    most = smooth_to_region(one_pixel(), kernel_px=3, passes=2, threshold=0.5)
    assert nine[0, 3:6, 3:6].all() and nine.sum() == 9
    assert grown[0, 2:7, 2:7].long().tolist() == [
        [0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0],
    ]  # fmt: skip
    assert grown.sum() == 13
    assert most[0, 3:6, 3:6].long().tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    assert most.sum() == 5


def test_at_the_border_means_are_over_what_lies_within():
    # From the corner: 1/4 at itself, 1/6 beside it, 1/9 at the diagonal; over half of 1/4 are two
    maps = one_pixel(4, 5, 0, 0)
    region = smooth_to_region(maps, kernel_px=3, passes=1, threshold=0.5)
    assert region[0, :2, :2].tolist() == [[True, True], [True, False]]
    assert region.sum() == 3
    assert smooth_to_region(torch.ones(1, 4, 5)).all()


def test_each_maps_threshold_is_its_own():
    both = torch.cat([one_pixel(), 1000 * one_pixel(), 0 * one_pixel(), -one_pixel()])
    assert smooth_to_region(both, kernel_px=3).sum((1, 2)).tolist()[2:] == [0, 0]
    regions = smooth_to_region(both, kernel_px=3)
    assert torch.equal(regions[0], regions[1])
    assert torch.equal(regions[:1], smooth_to_region(one_pixel(), kernel_px=3))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rounds": 0}, "rounds is 0 and until 0.5"),
        ({"until": 1.5}, "rounds is 5 and until 1.5: they must be 1 or more, and a probability"),
        ({"fill": "black"}, "fill is 'black': it must be a number or 'mean'"),
        ({"kernel_px": 4}, "kernel_px is 4"),
        ({"passes": 0}, "passes 0"),
        ({"threshold": 1.0}, r"threshold 1.0: they must be odd, 1 or more, and in \[0, 1\)"),
    ],
)
def test_settings_outside_of_their_ranges_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        unveil(BrightestSquare(), TWO, **{"saliency": gradient} | setting)


def test_an_unknown_target_is_refused():
    with pytest.raises(ModelError, match="target is 2"):
        unveil(BrightestSquare(), TWO, target=2, saliency=gradient)


def images(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(2, 3, 16, 24, dtype=dtype)


def test_the_saliency_is_smooth_grad_of_guided_backpropagation():
    model, pixels = seeded(SmallVgg), images()
    (found,) = unveil(model, pixels, until=0.0, rounds=1)
    expected = smooth_grad(model, pixels, method=guided_backpropagation)
    torch.testing.assert_close(found.maps, expected.float())
    assert found.maps.std() > 0
