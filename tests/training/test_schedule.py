"""The lecture's two sentences, on scripted losses and ROC AUCs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.training.schedule import Schedule

NAN = math.nan


def optimizer(learning_rate=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)


def play(losses, aucs, halve_after=3, stop_after=5):
    """Epochs (from 1) at whose end the rate was halved; the epoch that stopped, or None."""
    opt = optimizer()
    schedule = Schedule(opt, halve_after=halve_after, stop_after=stop_after)
    halved = []
    for epoch, (loss, auc) in enumerate(zip(losses, aucs, strict=True), start=1):
        before = opt.param_groups[0]["lr"]
        schedule.step(loss, auc)
        after = opt.param_groups[0]["lr"]
        if after != before:
            assert after == before / 2
            halved.append(epoch)
        if schedule.stopped:
            return halved, epoch
    return halved, None


def halvings(losses, **settings):
    return play(losses, [epoch / 1000 for epoch in range(len(losses))], **settings)[0]


def stop(aucs, **settings):
    return play([-epoch for epoch in range(len(aucs))], aucs, **settings)[1]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # epoch 1    2    3    4    5    6    7    8    9   10
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0], []),
        # never better than the first epoch: bad epochs 2 3 4, 5 6 7, 8 9 10
        ([0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6], [4, 7, 10]),
        # a tie is no improvement
        ([0.5, 0.5, 0.5, 0.5, 0.5], [4]),
        # improvement in the last moment: bad 2 3, better 4, bad 5 6 7
        ([0.5, 0.6, 0.6, 0.4, 0.6, 0.6, 0.6], [7]),
        # however small it is
        ([0.5, 0.6, 0.6, 0.5 - 1e-12, 0.6, 0.6], []),
        # better than the epoch before is not better than the best
        ([0.5, 0.9, 0.8, 0.7, 0.6], [4]),
        # the best loss outlives the halving at 4: 0.6 at 5 does not beat 0.5; 5 6 7
        ([0.5, 0.9, 0.9, 0.9, 0.6, 0.55, 0.52, 0.49], [4, 7]),
        # NaN is no improvement, not even in the first epoch; nor does it hide a later one
        ([0.5, NAN, NAN, NAN, 0.4, NAN], [4]),
        ([NAN, NAN, NAN, 0.5, 0.6, 0.6, 0.6], [3, 7]),
    ],
)
def test_the_rate_is_halved_at_exactly_these_epochs(losses, expected):
    assert halvings(losses) == expected


@pytest.mark.parametrize(
    ("aucs", "expected"),
    [
        # epoch 1    2    3    4    5    6    7    8    9
        ([0.5, 0.6, 0.7, 0.8, 0.9, 0.91, 0.92, 0.93, 0.94], None),
        # bad epochs 2 to 6
        ([0.9, 0.8, 0.8, 0.8, 0.8, 0.8], 6),
        ([0.9, 0.8, 0.8, 0.8, 0.8], None),
        # ties
        ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9], 6),
        # improvement in the last moment, at 6; then bad 7 to 11
        ([0.8, 0.7, 0.7, 0.7, 0.7, 0.81, 0.8, 0.8, 0.8, 0.8, 0.8], 11),
        # rising, but never above the best
        ([0.9, 0.1, 0.2, 0.3, 0.4, 0.5], 6),
        ([0.9, NAN, 0.8, NAN, 0.8, NAN], 6),
        ([NAN, NAN, NAN, NAN, NAN], 5),
    ],
)
def test_training_stops_at_exactly_this_epoch(aucs, expected):
    assert stop(aucs) == expected


def test_the_two_counts_are_independent():
    losses = [0.5, 0.6, 0.6, 0.6, 0.4, 0.6, 0.6, 0.6]
    aucs = [0.8, 0.9, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    assert play(losses, aucs) == ([4], 7)


def test_the_first_epoch_improves_and_a_tie_does_not():
    schedule = Schedule(optimizer())
    assert [schedule.step(0.5, auc) for auc in (0.0, 0.0, NAN, 0.1)] == [True, False, False, True]


def test_the_rate_keeps_halving_when_it_is_tiny():
    opt = optimizer(5e-5)
    schedule = Schedule(opt, halve_after=1)
    for _ in range(41):
        schedule.step(1.0, 1.0)
    assert opt.param_groups[0]["lr"] == 5e-5 / 2**40


def test_the_rate_may_never_be_halved():
    opt = optimizer()
    schedule = Schedule(opt, halve_after=None)
    for _ in range(100):
        schedule.step(1.0, 0.5)
    assert opt.param_groups[0]["lr"] == 1.0


def test_by_loss_the_lowest_is_best_and_its_standstill_ends_training():
    schedule = Schedule(optimizer(), best_by="loss", stop_after=2)
    #         epoch     1    2    3    4    5
    losses, aucs = [0.7, 0.5, 0.6, 0.4, 0.4], [0.9, 0.1, 0.8, 0.2, 0.3]
    improved = [schedule.step(loss, auc) for loss, auc in zip(losses, aucs, strict=True)]
    assert improved == [True, True, False, True, False]
    assert not schedule.stopped
    assert not schedule.step(0.5, 1.0)
    assert schedule.stopped


@pytest.mark.parametrize(("reached", "stopped"), [(0.999, False), (1.0, True)])
def test_training_accuracy_ends_training(reached, stopped):
    schedule = Schedule(optimizer(), stop_at_accuracy=1.0)
    schedule.step(0.5, 0.9, train_accuracy=0.5)
    assert not schedule.stopped
    schedule.step(0.4, 0.95, train_accuracy=reached)
    assert schedule.stopped == stopped


def test_without_a_limit_no_training_accuracy_ends_training():
    schedule = Schedule(optimizer())
    schedule.step(0.5, 0.9, train_accuracy=1.0)
    assert not schedule.stopped


def improves(values, epoch, better):
    """Whether 1-based `epoch` beats every epoch before it."""
    value, earlier = values[epoch - 1], values[: epoch - 1]
    return not math.isnan(value) and all(math.isnan(v) or better(value, v) for v in earlier)


def sentence(values, patience, better, from_epoch=1):
    """First epoch that ends `patience` epochs in a row, none of them an improvement."""
    for epoch in range(from_epoch + patience - 1, len(values) + 1):
        if not any(improves(values, e, better) for e in range(epoch - patience + 1, epoch + 1)):
            return epoch
    return None


measures = st.lists(st.one_of(st.integers(0, 6).map(lambda n: n / 8), st.just(NAN)), max_size=25)


@given(losses=measures, halve_after=st.integers(1, 4))
def test_halving_follows_the_sentence(losses, halve_after):
    expected, start = [], 1
    while (epoch := sentence(losses, halve_after, float.__lt__, start)) is not None:
        expected.append(epoch)
        start = epoch + 1
    assert halvings(losses, halve_after=halve_after, stop_after=100) == expected


@given(aucs=measures, stop_after=st.integers(1, 6))
def test_stopping_follows_the_sentence(aucs, stop_after):
    assert stop(aucs, stop_after=stop_after) == sentence(aucs, stop_after, float.__gt__)


@given(data=st.data(), losses=measures)
def test_a_saved_state_goes_on_the_same(data, losses):
    aucs = data.draw(
        st.lists(st.integers(0, 6).map(float), min_size=len(losses), max_size=len(losses))
    )
    cut = data.draw(st.integers(0, len(losses)))
    whole, first, second = optimizer(), optimizer(), optimizer()
    straight, before, after = Schedule(whole), Schedule(first), Schedule(second)
    for loss, auc in zip(losses, aucs, strict=True):
        straight.step(loss, auc)
    for loss, auc in zip(losses[:cut], aucs[:cut], strict=True):
        before.step(loss, auc)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    for loss, auc in zip(losses[cut:], aucs[cut:], strict=True):
        after.step(loss, auc)
    assert second.param_groups[0]["lr"] == whole.param_groups[0]["lr"]
    assert after.stopped == straight.stopped
    assert after.best == straight.best
