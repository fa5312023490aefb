import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.overlap import STATISTICS, average_overlap, overlap

NAN = float("nan")


def one(heatmap, mask):
    """The figures of a single image."""
    frame = overlap([np.array(heatmap, float)], [np.array(mask, bool)])
    assert frame.shape == (1, 5)
    return frame.iloc[0].to_dict()


def test_hand_worked_image():
    # Rounded: 1 1 / 0 0. Equal to the mask in the two left pixels of four.
    # Of the two mask pixels, 0.9 is found, 0.4 is not.
    # Pairs (mask, other): 0.9 > 0.6, 0.9 > 0.1, 0.4 < 0.6, 0.4 > 0.1: 3 of 4.
    # The highest pixel, 0.9, is in the mask. Sum in the mask 1.3 of 2.
    assert one([[0.9, 0.6], [0.1, 0.4]], [[1, 0], [0, 1]]) == pytest.approx(
        {
            "exact_match": 2 / 4,
            "recall": 1 / 2,
            "auroc": 3 / 4,
            "pointing_game": 1,
            "energy_inside": 1.3 / 2,
        }
    )


def test_figures_are_scikit_learns_in_each_image():
    rng = np.random.default_rng(0)
    shapes = [(9, 7), (12, 5), (1, 30)]
    heatmaps = [np.round(rng.random(shape), 1).astype(np.float32) for shape in shapes]
    masks = [rng.random(shape) < 0.3 for shape in shapes]
    frame = overlap(heatmaps, masks)
    assert frame.index.tolist() == [0, 1, 2]
    for row, heatmap, mask in zip(frame.itertuples(), heatmaps, masks, strict=True):
        truth, score = mask.ravel(), heatmap.ravel()
        rounded = np.floor(score.astype(float) + 0.5) == 1
        assert row.exact_match == pytest.approx(accuracy_score(truth, rounded))
        assert row.recall == pytest.approx(recall_score(truth, rounded))
        assert row.auroc == pytest.approx(roc_auc_score(truth, score))
        assert row.energy_inside == pytest.approx(np.average(truth, weights=score))


def test_one_half_rounds_to_1():
    below = np.nextafter(0.5, 0)
    assert one([[0.5, below]], [[1, 0]])["exact_match"] == 1
    assert one([[0.5, below]], [[1, 1]])["recall"] == 1 / 2


def test_of_several_highest_pixels_the_share_in_the_mask_points_right():
    # 0.7 four times, of which one in the mask; one pixel of the mask is lower
    heatmap, mask = [[0.7, 0.7, 0.2], [0.7, 0.7, 0.0]], [[1, 0, 1], [0, 0, 0]]
    assert one(heatmap, mask)["pointing_game"] == 1 / 4
    assert one([[0.7, 0.8]], [[1, 0]])["pointing_game"] == 0


def test_an_empty_mask_has_an_exact_match_alone():
    # rounded 1 0 0: two of three are 0 as the mask is
    figures = one([[0.9, 0.2, 0.1]], [[0, 0, 0]])
    assert figures.pop("exact_match") == pytest.approx(2 / 3)
    assert np.isnan(list(figures.values())).all()


def test_a_full_mask_has_no_auroc():
    figures = one([[0.9, 0.2]], [[1, 1]])
    assert np.isnan(figures.pop("auroc"))
    assert figures == {
        "exact_match": 1 / 2, "recall": 1 / 2, "pointing_game": 1, "energy_inside": 1,
    }  # fmt: skip


def test_a_heatmap_of_zeros_has_no_energy_and_points_everywhere():
    figures = one([[0, 0, 0, 0]], [[1, 0, 0, 0]])
    assert np.isnan(figures.pop("energy_inside"))
    assert figures == {
        "exact_match": 3 / 4, "recall": 0, "auroc": 1 / 2, "pointing_game": 1 / 4,
    }  # fmt: skip


def test_pixels_that_are_not_predicted_are_left_out():
    rng = np.random.default_rng(1)
    heatmap, mask = rng.random((4, 6)), rng.random((4, 6)) < 0.4
    holed = heatmap.copy()
    holed[:, 4:] = NAN
    assert one(holed, mask) == pytest.approx(one(heatmap[:, :4], mask[:, :4]))
    mask_is_unseen = one([[0.3, NAN]], [[0, 1]])
    assert mask_is_unseen["exact_match"] == 1
    assert np.isnan(mask_is_unseen["recall"])


def test_an_image_without_predictions_has_a_row_without_figures():
    frame = overlap([np.full((2, 2), NAN), np.eye(2)], [np.eye(2, dtype=bool)] * 2)
    assert frame.iloc[0].isna().all()
    assert frame.iloc[1].tolist() == [1, 1, 1, 1, 1]
    assert (frame.dtypes == np.float64).all()


def test_averages_are_over_the_images_where_a_figure_is_defined():
    # Recall 1/2, 1 and, for the empty mask, none; exact match 1/2, 1, 1.
    heatmaps = [np.array([[0.9, 0.1]]), np.array([[0.8, 0.3]]), np.array([[0.1, 0.2]])]
    masks = [np.array([[True, True]]), np.array([[True, False]]), np.array([[False, False]])]
    frame = overlap(heatmaps, masks).assign(method="cam")
    expected = pd.DataFrame(
        {
            # energy: 1 and 0.8 / 1.1
            "mean": [2.5 / 3, 1.5 / 2, 1, 1, (1 + 0.8 / 1.1) / 2],
            "images": [3, 2, 1, 2, 2],
        },
        index=["exact_match", "recall", "auroc", "pointing_game", "energy_inside"],
    )
    pd.testing.assert_frame_equal(average_overlap(frame), expected)


def test_no_images_have_no_averages():
    frame = overlap([], [])
    assert list(frame.columns) == list(STATISTICS)
    averages = average_overlap(frame)
    assert averages["mean"].isna().all()
    assert averages["images"].tolist() == [0] * 5


def test_arrays_of_images_will_do():
    heatmaps, masks = np.random.default_rng(2).random((3, 4, 5)), np.ones((3, 4, 5), bool)
    assert len(overlap(heatmaps, masks)) == 3


@pytest.mark.parametrize(
    ("heatmap", "mask", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2), bool), r"image 1: .* \(2, 3\), the mask's \(3, 2\)"),
        (np.zeros(3), np.zeros(3, bool), r"image 1: .* \(3,\).* the same \(H, W\)"),
        (np.zeros((2, 2)), np.zeros((2, 2), np.uint8), "image 1: the mask is uint8"),
        (np.array([[0, 1.5]]), np.ones((1, 2), bool), "image 1: .* value 1.5, not in 0..1"),
        (np.array([[-0.1, NAN]]), np.ones((1, 2), bool), "value -0.1"),
        (np.array([[0, np.inf]]), np.ones((1, 2), bool), "value inf"),
    ],
)
def test_what_cannot_be_compared_is_refused(heatmap, mask, message):
    with pytest.raises(RunError, match=message):
        overlap([np.eye(2), heatmap], [np.eye(2, dtype=bool), mask])


def test_a_heatmap_without_a_mask_is_refused():
    with pytest.raises(RunError, match="2 heatmaps and 1 masks"):
        overlap([np.eye(2)] * 2, [np.eye(2, dtype=bool)])
