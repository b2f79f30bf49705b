"""A pass contains every image, a batch has different classes, and batches do not depend on the number of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from math import ceil

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_memdml.data.sampler import ClassBalancedSampler


def labels_of(sizes: list[int]) -> Tensor:
    """Labels of classes of these sizes, with gaps between the labels and not in order."""
    labels = torch.tensor([7 * label for label, size in enumerate(sizes) for _ in range(size)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def positions(batch: list) -> list[int]:
    return [draw.position for draw in batch]


@st.composite
def configurations(draw: st.DrawFn) -> tuple[list[int], int, int]:
    sizes = draw(st.lists(st.integers(1, 12), min_size=2, max_size=12))
    return sizes, draw(st.integers(1, len(sizes))), draw(st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(configurations(), st.integers(0, 2**40), st.integers(0, 3))
def test_a_pass_contains_every_image_in_batches_of_different_classes(configuration, seed, epoch):
    sizes, classes_per_batch, images_per_class = configuration
    labels = labels_of(sizes)
    size_of = Counter(labels.tolist())
    sampler = ClassBalancedSampler(labels, classes_per_batch * images_per_class, images_per_class, seed)
    sampler.set_epoch(epoch)
    batches = [positions(batch) for batch in sampler]

    groups = [ceil(size / images_per_class) for size in sizes]
    assert len(batches) == len(sampler) == max(ceil(sum(groups) / classes_per_batch), max(groups))
    assert {position for batch in batches for position in batch} == set(range(len(labels)))
    for batch in batches:
        group_labels = labels[batch].view(classes_per_batch, images_per_class)
        assert (group_labels == group_labels[:, :1]).all()
        assert len(group_labels[:, 0].unique()) == classes_per_batch
        for start in range(0, len(batch), images_per_class):
            times = Counter(batch[start : start + images_per_class])
            size = size_of[labels[batch[start]].item()]
            assert len(times) == min(size, images_per_class), "an image repeats though the class has others"
            assert max(times.values()) - min(times.values()) <= 1, "a short class is filled unevenly"


@settings(max_examples=30, deadline=None)
@given(configurations(), st.integers(2, 4), st.booleans())
def test_the_ranks_share_the_global_batch_in_order(configuration, world_size, short_epochs):
    sizes, classes_per_rank, images_per_class = configuration
    classes_per_rank = max(1, classes_per_rank // world_size)
    labels, batch_size = labels_of(sizes), classes_per_rank * images_per_class
    assume(world_size * classes_per_rank <= len(sizes))
    options = {"seed": 3, "batches_per_epoch": 5 if short_epochs else None}
    one = ClassBalancedSampler(labels, world_size * batch_size, images_per_class, **options)
    ranks = [
        ClassBalancedSampler(labels, batch_size, images_per_class, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    for sampler in (one, *ranks):
        sampler.set_epoch(2)
    assert list(one) == [list(chain(*parts)) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_image_is_drawn_on_any_number_of_ranks(world_size):
    sizes = torch.randint(2, 13, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    labels = labels_of(sizes)
    samplers = [ClassBalancedSampler(labels, 64, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    drawn = Counter(position for sampler in samplers for batch in sampler for position in positions(batch))
    assert set(drawn) == set(range(len(labels)))
    batches = ceil(sum(ceil(size / 4) for size in sizes) / (16 * world_size))
    assert sum(drawn.values()) == batches * 64 * world_size


def test_with_a_very_large_class_the_others_are_drawn_again_evenly():
    labels = labels_of([100, 4, 4, 4, 4])
    batches = [positions(batch) for batch in ClassBalancedSampler(labels, batch_size=6, images_per_class=2)]
    assert len(batches) == 50
    for batch in batches:
        assert len(labels[batch].unique()) == 3
    groups = Counter(labels[position].item() for batch in batches for position in batch[::2])
    assert groups == {0: 50, 7: 25, 14: 25, 21: 25, 28: 25}


def test_classes_repeat_as_little_as_possible_in_a_global_batch_with_more_groups_than_classes():
    labels = labels_of([6] * 5)
    ranks = [ClassBalancedSampler(labels, 8, 2, rank=rank, world_size=3) for rank in range(3)]
    drawn = set()
    for parts in zip(*ranks, strict=True):
        batch = positions(list(chain(*parts)))
        drawn |= set(batch)
        assert max(Counter(labels[batch[::2]].tolist()).values()) == 3  # 12 groups of 5 classes: 2 or 3 of each
    assert drawn == set(range(30))


def test_a_batch_depends_on_seed_epoch_and_number_only():
    def batches(seed: int, epoch: int) -> list:
        sampler = ClassBalancedSampler(labels_of([5] * 8), 8, 2, seed)
        sampler.set_epoch(epoch)
        return [sampler.batch(number) for number in reversed(range(len(sampler)))][::-1]

    assert batches(0, 1) == batches(0, 1)
    assert positions(batches(0, 0)[0]) != positions(batches(1, 0)[0])
    assert positions(batches(0, 0)[0]) != positions(batches(0, 1)[0])
    seeds = [draw.seed for epoch in range(3) for batch in batches(0, epoch) for draw in batch]
    assert len(set(seeds)) == len(seeds)


def test_the_images_of_a_class_are_grouped_differently_in_every_pass():
    sampler = ClassBalancedSampler(torch.tensor([0] * 8 + [1] * 8), 4, 2)
    groups = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        groups |= {frozenset(positions(batch)[start : start + 2]) for batch in sampler for start in (0, 2)}
    assert len(groups) > 40  # of the 56 pairs of images of one class; 8 if they were always the same


def test_a_pass_continues_in_the_next_epoch():
    labels = labels_of([5, 9, 3, 2])
    whole, short = (ClassBalancedSampler(labels, 4, 2, batches_per_epoch=length) for length in (None, 3))

    def steps(sampler: ClassBalancedSampler, count: int) -> list:
        drawn, epoch = [], 0
        while len(drawn) < count:
            sampler.set_epoch(epoch)
            drawn, epoch = drawn + list(sampler), epoch + 1
        return drawn[:count]

    assert steps(short, 3 * len(whole)) == steps(whole, 3 * len(whole))


def test_classes_are_drawn_in_proportion_to_the_groups_they_have_left():
    # One group of class 0 and nine of class 1 in ten batches of one class: class 0 is equally likely in each of them.
    first = 0
    for seed in range(400):
        sampler = ClassBalancedSampler(torch.tensor([0] + [1] * 9), 1, 1, seed)
        first += sampler.batch(0)[0].position == 0
    assert 20 <= first <= 62  # 40 expected, standard deviation 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10, "images_per_class": 4}, r"multiple of `images_per_class`.*\. Pass batch_size=8 or 12\."),
        ({"batch_size": 2, "images_per_class": 4}, r"Pass batch_size=4\."),
        ({"batch_size": 8, "images_per_class": 0}, "`images_per_class` of at least 1 but got 0"),
        (
            {"batch_size": 16, "images_per_class": 4},
            "at most 3 classes per batch, the number of training classes, .*Pass batch_size=12 or less",
        ),
        ({"batch_size": 4, "seed": -1}, "`seed` of at least 0 but got -1"),
        ({"batch_size": 4, "batches_per_epoch": 0}, "`batches_per_epoch` of at least 1"),
        ({"batch_size": 4, "rank": 1}, "`rank` < `world_size`"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "`rank` < `world_size`"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClassBalancedSampler(torch.tensor([0, 0, 1, 1, 2, 2]), **options)


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="at least 2 training classes but got 1"):
        ClassBalancedSampler(torch.zeros(8, dtype=torch.long), 4, 4)


def test_batches_can_be_the_same_in_every_epoch() -> None:
    labels = torch.arange(20) // 2
    for same in (True, False):
        sampler = ClassBalancedSampler(labels, batch_size=4, images_per_class=2, same_every_epoch=same)
        first = [sampler.batch(number) for number in range(2)]
        sampler.set_epoch(3)
        assert ([sampler.batch(number) for number in range(2)] == first) is same
