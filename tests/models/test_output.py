"""What networks return, as one logit of tumour for each patch."""

import pytest
import torch
from own_networks import Colours
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.card import NetworkOutput
from wsi_pipeline.models.output import find_output, give_tumour_logit, tumour_logit


def values(*shape):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("column", [0, 2, 4])
def test_the_sigmoid_of_classes_is_their_softmax(column):
    classes = values(6, 5)
    found = tumour_logit(classes, NetworkOutput(tumour_class=column))
    assert found.shape == (6,)
    torch.testing.assert_close(torch.sigmoid(found), classes.softmax(1)[:, column])


def test_the_sigmoid_of_two_classes_is_worked_by_hand():
    # Softmax of (0, ln 3): 1 / 4 and 3 / 4.
    found = tumour_logit(torch.tensor([[0.0, 1.0986123]]), NetworkOutput(tumour_class=1))
    assert torch.sigmoid(found).item() == pytest.approx(0.75)


def test_classes_far_apart_stay_finite():
    found = tumour_logit(torch.tensor([[-500.0, 500.0]]), NetworkOutput(tumour_class=0))
    assert found.tolist() == [-1000.0]


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_logit_stays_what_it_is(shape):
    given = values(*shape)
    assert torch.equal(tumour_logit(given, NetworkOutput()), given.flatten())


@pytest.mark.parametrize(("shape", "column"), [((3,), None), ((3, 1), None), ((3, 2), 1)])
def test_the_sigmoid_of_a_probability_is_the_probability(shape, column):
    given = torch.tensor([0.0, 0.25, 1.0])
    if len(shape) == 2:
        given = given[:, None] if column is None else torch.stack([1 - given, given], 1)
    found = tumour_logit(given, NetworkOutput(kind="probability", tumour_class=column))
    assert found.isfinite().all()
    assert torch.sigmoid(found).tolist() == pytest.approx([0, 0.25, 1], abs=2e-7)


def test_low_precision_is_left_before_the_classes_are_compared():
    classes = values(6, 5).bfloat16()
    found = tumour_logit(classes, NetworkOutput(tumour_class=1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(torch.sigmoid(found), classes.float().softmax(1)[:, 1])


def test_names_of_weights_and_modules_stay_and_gradients_flow():
    network = Colours(3)
    names, modules = list(network.state_dict()), [name for name, _ in network.named_modules()]
    assert give_tumour_logit(network, NetworkOutput(tumour_class=2)) is network
    assert list(network.state_dict()) == names
    assert [name for name, _ in network.named_modules()] == modules
    images = values(4, 3, 8, 8).requires_grad_()
    network(images).sum().backward()
    assert images.grad.abs().sum() > 0 and network.head.weight.grad is not None


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return self.value


@pytest.mark.parametrize(
    ("returned", "tumour_class", "expected"),
    [
        (torch.zeros(2), None, NetworkOutput()),
        (torch.zeros(2, 1), None, NetworkOutput()),
        (torch.zeros(2, 2), None, NetworkOutput(tumour_class=1)),
        (torch.zeros(2, 2), 0, NetworkOutput(tumour_class=0)),
        (torch.zeros(2, 7), 6, NetworkOutput(tumour_class=6)),
    ],
)
def test_an_output_is_known_by_its_shape(returned, tumour_class, expected):
    network = Returns(returned)
    assert find_output(network, name="n", patch_px=8, tumour_class=tumour_class) == expected


@pytest.mark.parametrize(
    ("returned", "settings", "message"),
    [
        (torch.zeros(2, 5), {}, r"shape \(2, 5\) for 2 patches of 8 x 8 px. Say which column"),
        (torch.zeros(2, 5), {"tumour_class": 5}, "It has no column 5"),
        (torch.zeros(2), {"tumour_class": 1}, "has no classes, but the tumour class is 1"),
        (torch.zeros(2, 4, 4), {}, r"shape \(2, 4, 4\).*must be \(N,\), \(N, 1\) or \(N, classes"),
        (torch.zeros(3), {}, r"shape \(3,\)"),
        (torch.zeros(()), {}, r"shape \(\)"),
        ((torch.zeros(2), 1), {}, "n returns a tuple for 2 patches"),
        (torch.tensor([0.0, torch.inf]), {}, "not all finite"),
        (torch.zeros(2, dtype=torch.int64), {}, "type torch.int64"),
        (torch.tensor([0.5, 1.5]), {"kind": "probability"}, "0.5 to 1.5. They are no prob"),
    ],
)
def test_an_output_of_another_form_is_refused(returned, settings, message):
    with pytest.raises(ModelError, match=message):
        find_output(Returns(returned), name="n", patch_px=8, **settings)
