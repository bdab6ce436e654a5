"""Orders, batches and shards."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.data.order import BatchPlan, epoch_order, evaluation_batches, hash64, uniform_below
from harness.errors import HarnessError


def test_hash_is_splitmix64_and_never_changes() -> None:
    # The first is the first output of Vigna's splitmix64.c with seed 0; the others hold runs together over time.
    assert int(hash64(0)) == 0xE220A8397B1DCDAF
    assert int(hash64(1, 2, 3)) == 15020427595393229491
    assert [int(h) for h in hash64(7, 1, 0, np.arange(3))] == [
        3642079336031410661,
        17074719602325123750,
        10718186259896329565,
    ]
    assert epoch_order(8, seed=3, epoch=5, shuffle=True).tolist() == [4, 2, 5, 3, 1, 0, 7, 6]


def test_hash_takes_any_whole_numbers_and_their_order_counts() -> None:
    assert int(hash64(-1, 5)) == int(hash64(2**64 - 1, 5))
    assert int(hash64(0, -1)) == int(hash64(0, np.array(-1)))
    assert len({int(hash64(*key)) for key in [(0,), (0, 0), (0, 0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 0, 1)]}) == 7
    grid = hash64(4, np.arange(3)[:, None], np.arange(5))
    assert grid.shape == (3, 5)
    assert grid.dtype == np.uint64
    assert int(grid[2, 3]) == int(hash64(4, 2, 3))


def test_uniform_below_is_uniform() -> None:
    seen = np.bincount(uniform_below(9, hash64(11, np.arange(90_000))), minlength=9)
    assert len(seen) == 9
    assert np.abs(seen - 10_000).max() < 400  # the standard deviation of each is 94
    assert int(uniform_below(2**31, np.array([2**64 - 1], dtype=np.uint64))[0]) == 2**31 - 1


def test_epoch_order_is_a_permutation_of_its_own_for_each_epoch_and_seed() -> None:
    orders = [epoch_order(1000, seed=seed, epoch=epoch, shuffle=True) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(1000))
    for first in range(6):
        for second in range(first):
            # Two random permutations agree in one place on average.
            assert (orders[first] == orders[second]).sum() < 10
    assert epoch_order(5, seed=0, epoch=3, shuffle=False).tolist() == [0, 1, 2, 3, 4]
    assert epoch_order(0, seed=0, epoch=0, shuffle=True).tolist() == []


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    """Plans that fit, of rank 0."""
    world_size, accumulation_steps = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    unit = world_size * accumulation_steps
    size = unit * draw(st.integers(1, 6))
    whole = draw(st.integers(1, 6))
    rest = draw(st.one_of(st.just(0), st.integers(0, size - 1)))
    drop_last = draw(st.booleans())
    if not drop_last and 0 < rest < world_size:
        rest = 0
    return BatchPlan(
        size * whole + rest,
        size,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        seed=draw(st.integers(0, 3)),
        shuffle=draw(st.booleans()),
        drop_last=drop_last,
    )


def global_micro_batches(plan: BatchPlan, epoch: int) -> list[list[list[int]]]:
    """[step][micro-batch] ids over all ranks."""
    ranks = [replace(plan, rank=rank).micro_batches(epoch) for rank in range(plan.world_size)]
    return [
        [[int(i) for rank in ranks for i in rank[step][micro]] for micro in range(len(ranks[0][step]))]
        for step in range(plan.steps_per_epoch)
    ]


@given(plans(), st.integers(0, 3))
def test_an_epoch_shows_each_image_once(plan: BatchPlan, epoch: int) -> None:
    steps = [list(chain.from_iterable(step)) for step in global_micro_batches(plan, epoch)]
    assert [len(step) for step in steps] == [plan.global_count(step) for step in range(plan.steps_per_epoch)]
    shown = [i for step in steps for i in step]
    assert shown == epoch_order(plan.count, seed=plan.seed, epoch=epoch, shuffle=plan.shuffle)[: len(shown)].tolist()
    assert len(set(shown)) == len(shown)
    left_out = plan.count - len(shown)
    assert left_out == (plan.count % plan.global_batch_size if plan.drop_last else 0)


@given(plans(), st.integers(0, 3))
def test_ranks_go_in_step(plan: BatchPlan, epoch: int) -> None:
    ranks = [replace(plan, rank=rank).micro_batches(epoch) for rank in range(plan.world_size)]
    for step in range(plan.steps_per_epoch):
        counts = {len(rank[step]) for rank in ranks}
        assert len(counts) == 1
        assert 1 <= counts.pop() <= plan.accumulation_steps
        sizes = [len(micro_batch) for rank in ranks for micro_batch in rank[step]]
        assert min(sizes) >= 1
        assert all(micro_batch.dtype == np.int64 for rank in ranks for micro_batch in rank[step])
        if plan.global_count(step) == plan.global_batch_size:
            assert set(sizes) == {plan.global_batch_size // (plan.world_size * plan.accumulation_steps)}
        for micro in range(len(ranks[0][step])):
            shares = [len(rank[step][micro]) for rank in ranks]
            assert max(shares) - min(shares) <= 1


@given(plans(), st.integers(0, 2))
def test_the_number_of_ranks_does_not_change_a_global_batch(plan: BatchPlan, epoch: int) -> None:
    alone = replace(plan, rank=0, world_size=1)
    both = zip(global_micro_batches(alone, epoch), global_micro_batches(plan, epoch), strict=True)
    for step, (one, many) in enumerate(both):
        assert list(chain.from_iterable(one)) == list(chain.from_iterable(many))
        # Nor a micro-batch, unless a small last one has too few images to give each rank one.
        assert one == many or plan.global_count(step) < plan.world_size * plan.accumulation_steps


@given(plans(), st.integers(0, 2), st.data())
def test_a_later_start_gives_the_tail(plan: BatchPlan, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, plan.steps_per_epoch))
    plan = replace(plan, rank=data.draw(st.integers(0, plan.world_size - 1)))
    whole, tail = plan.micro_batches(epoch), plan.micro_batches(epoch, start)
    assert list(map(str, tail)) == list(map(str, whole[start:]))


def test_a_small_last_batch_has_fewer_micro_batches() -> None:
    plan = BatchPlan(35, 16, world_size=2, accumulation_steps=4)
    assert [[len(m) for m in step] for step in plan.micro_batches(0)] == [[2, 2, 2, 2], [2, 2, 2, 2], [2]]
    assert [len(m) for m in replace(plan, rank=1).micro_batches(0)[2]] == [1]


@pytest.mark.parametrize(
    ("count", "size", "options", "expected"),
    [
        (100, 7, {"world_size": 2}, ["7 is not divisible by 2", "2 ranks × 1 accum", "is 6 or 8"]),
        (100, 6, {"world_size": 2, "accumulation_steps": 2}, ["6 is not divisible by 4", "is 4 or 8"]),
        (100, 128, {}, ["128 is larger than the 100 training images", "is 100"]),
        (101, 20, {"world_size": 2}, ["would hold 1 images for 2 ranks", "Set drop_last, or: ", "is 18 or 22"]),
        (3, 4, {"world_size": 4}, ["larger than the 3", "no size fits"]),
    ],
)
def test_numbers_that_do_not_go_together(count: int, size: int, options: dict[str, int], expected: list[str]) -> None:
    with pytest.raises(HarnessError) as caught:
        BatchPlan(count, size, **options)
    for text in expected:
        assert text in str(caught.value)


@given(st.integers(1, 60), st.integers(1, 80), st.integers(1, 4), st.integers(1, 4))
def test_the_sizes_a_hint_names_are_valid(count: int, size: int, world_size: int, accumulation: int) -> None:
    try:
        BatchPlan(count, size, world_size=world_size, accumulation_steps=accumulation)
    except HarnessError as error:
        hint = error.hint or ""
        unit = world_size * accumulation
        valid = [s for s in range(unit, count + 1, unit) if not 0 < count % s < world_size]
        named = [int(word) for word in hint.split(" is ")[-1].replace(" or ", " ").split() if word.isdigit()]
        below, above = [s for s in valid if s <= size], [s for s in valid if s > size]
        assert named == below[-1:] + above[:1]
        assert ("no size fits" in hint) == (not valid)


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 7))
def test_evaluation_shows_each_image_once(count: int, batch_size: int, world_size: int) -> None:
    ranks = [
        evaluation_batches(count, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert [int(i) for rank in ranks for ids_B in rank for i in ids_B] == list(range(count))
    assert all(1 <= len(ids_B) <= batch_size for rank in ranks for ids_B in rank)
    assert all(len(ids_B) == batch_size for rank in ranks for ids_B in rank[:-1])
