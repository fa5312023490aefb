import time

import pytest

from benchmarks.measure import busy_share, busy_text, row_of, watched_gpu


def test_a_sample_counts_by_the_time_since_the_one_before_it():
    """From 10 to 15 s: 1 s at 50 %, 3 s at 100 %, 1 s at 0 %: 3.5 of 5 s."""
    samples = [(9.0, 0.9), (10.0, 0.8), (11.0, 0.5), (14.0, 1.0), (15.0, 0.0), (16.0, 0.7)]
    assert busy_share(samples, 10.0, 15.0) == pytest.approx(3.5 / 5)
    assert busy_share(samples, 10.5, 14.5) == pytest.approx((0.5 * 0.5 + 3 * 1.0) / 3.5)


def test_without_samples_there_is_no_share_and_nothing_to_tell():
    assert busy_text([busy_share([(1.0, 0.5)], 2.0, 3.0)] * 2) == ""
    assert busy_text([0.5, float("nan"), 0.929, 0.95]) == "; kernels ran 93% of the time"


def test_a_row_has_the_median_ratio_of_pairs_not_the_ratio_of_medians():
    row = row_of("a", "b", "images", [10, 40, 90], [10, 10, 30])  # ratios 1, 4 and 3
    assert (row.per_second, row.baseline_per_second, row.ratio) == (40, 10, 3)


def test_a_gpu_is_asked_while_the_context_is_open(tmp_path, monkeypatch):
    """A driver's tool that lists one GPU, and says that it is busy 37 % of the time."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: one" || echo 37\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    started = time.perf_counter()
    with watched_gpu() as samples:
        while len(samples) < 2:
            time.sleep(0.01)
    assert {share for _, share in samples} == {0.37}
    assert busy_share(samples, started, time.perf_counter()) == pytest.approx(0.37)
