"""Coarser levels of a heatmap, by hand."""

import numpy as np
import pytest

from wsi_pipeline.heatmaps.pyramid import block_means

NAN = np.nan


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_are_means_of_what_is_known_also_at_the_edges(dtype):
    values = np.array([[0, 1, NAN], [1, 0, 0.25], [NAN, NAN, 0.5]], dtype)
    found = block_means(values)
    np.testing.assert_array_equal(found, np.array([[0.5, 0.25], [NAN, 0.5]]))
    assert found.dtype == dtype


def test_blocks_may_be_larger_or_single_pixels():
    values = np.array([[0, 1, NAN], [1, 0, 0.25], [NAN, NAN, 0.25]])
    np.testing.assert_array_equal(block_means(values, 3), [[2.5 / 6]])
    np.testing.assert_array_equal(block_means(values, 1), values)
