"""The paper's appendix A: what Q converges to on black images and images with a white corner."""

import runpy
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wsi_pipeline.models.patchnet import PatchNet

WORKFLOW = Path(__file__).parents[2] / "workflows" / "patchnet_convergence.py"
workflow = SimpleNamespace(**runpy.run_path(str(WORKFLOW)))


@pytest.mark.parametrize(
    # b of a + b patches are white: (a - b) / 2a. 4 of 64: 56 / 120. 16: 32 / 96. 32 and more: 0.
    ("share", "expected"),
    [
        (Fraction(1, 16), Fraction(7, 15)),
        (Fraction(1, 4), Fraction(1, 3)),
        (Fraction(1, 2), 0),
        (Fraction(3, 4), 0),
    ],
)
def test_the_closed_form(share, expected):
    assert workflow.closed_form(share) == expected


def test_each_distinct_patch_once_has_the_loss_of_all(one_thread):
    images = workflow.black_and_white(64, 64)
    module = workflow.trained(images, steps=0)
    loss = workflow.loss_of_distinct(module, *workflow.distinct_patches(images))
    with torch.no_grad():
        logits = PatchNet.forward(module, images)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.tensor([0.0, 1.0])
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("share", workflow.SQUARES)
def test_training_ends_at_the_closed_form(share, one_thread):
    module = workflow.trained(workflow.black_and_white(*workflow.SQUARES[share]))
    black, white = workflow.black_and_white_q(module)
    assert black == pytest.approx(float(workflow.closed_form(share)), abs=0.02)
    assert white > 0.95
