"""Samples are packed and split into passes without losing, doubling or reordering any."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.spec import StepSpec
from llava_pipeline.training.pack import make_pack, needed, passes
from llava_pipeline.training.samples import NO_PICTURE, Samples, collect, shared_prefix
from tests.tiny import samples_of

IMAGE = 99
WHOLE = StepSpec(select=False)
SPECS = [StepSpec(), WHOLE, StepSpec(pack=False), StepSpec(pack=False, select=False)]


def samples(rows: Sequence[tuple[list[int], list[int]]], image: int = 0) -> Samples:
    """From ids and from labels, where 0 is none."""
    labels = [torch.tensor([label or IGNORE_INDEX for label in row]) for _, row in rows]
    return collect([torch.tensor(ids) for ids, _ in rows], labels, [image] * len(rows))


@st.composite
def any_samples(draw: st.DrawFn, prefix: int = 0) -> Samples:
    """Some samples behind a common beginning, each with a label or more after it."""
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        own = draw(st.lists(st.integers(10, 20), min_size=1, max_size=9))
        ids = [*range(1, prefix + 1), *own]
        keep = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        last = draw(st.integers(max(1, prefix + 1 if len(own) > 1 else prefix), max(1, len(ids) - 1)))
        if len(ids) == 1:
            ids, keep, last = [*ids, 5], [*keep, True], 1
        keep[min(last, len(ids) - 1)] = True
        rows.append((ids, [token if kept else 0 for token, kept in zip(ids, keep, strict=True)]))
    return samples(rows)


# --------------------------------------------------------------------------------------------- passes


@given(data=any_samples(), spec=st.sampled_from(SPECS), most=st.integers(1, 40), rounds=st.integers(1, 3))
def test_passes_have_every_sample_once_in_order_and_keep_the_limit(
    data: Samples, spec: StepSpec, most: int, rounds: int
) -> None:
    indices = [k for _ in range(rounds) for k in reversed(range(len(data)))]
    found = passes(data, indices, 0, most, spec)
    assert [k for part in found for k in part] == indices
    for part in found:
        assert part
        assert len(part) == 1 or len(make_pack(data, part, 0, spec).input_ids) <= most
    for part, following in pairwise(found):  # none could have taken one more
        assert len(make_pack(data, [*part, following[0]], 0, spec).input_ids) > most


def test_no_samples_make_no_pass() -> None:
    assert passes(samples([([1, 2], [0, 2])]), [], 0, 100, StepSpec()) == []


def test_everything_is_one_pass_where_there_is_room(llava: Llava) -> None:
    data = samples_of(llava)
    assert passes(data, range(5), 0, 1000, StepSpec()) == [[0, 1, 2, 3, 4]]
    assert passes(data, range(5), 0, 1, StepSpec()) == [[0], [1], [2], [3], [4]]


def test_padding_counts_where_there_is_some(llava: Llava) -> None:
    data = samples_of(llava)  # 16, 34, 49, 11 and 27 tokens
    whole = StepSpec(pack=False, select=False)
    assert passes(data, [0, 1, 2], 0, 100, WHOLE) == [[0, 1, 2]]
    assert passes(data, [0, 1, 2], 0, 100, whole) == [[0, 1], [2]]
    assert passes(data, [3, 2], 0, 97, whole) == [[3], [2]]
    assert passes(data, [3, 2], 0, 98, whole) == [[3, 2]]


# --------------------------------------------------------------------------------------------- packs


P, I, Q, A = 1, IMAGE, 2, 3  # noqa: E741
PICTURE = [
    ([P, P, I, I, Q, A, 11, 12, 4], [0, 0, 0, 0, 0, 0, 11, 12, 0]),
    ([P, P, I, I, Q, Q, A, 13, 4], [0, 0, 0, 0, 0, 0, 0, 13, 0]),
]


def test_the_picture_in_the_docstring_is_true() -> None:
    pack = make_pack(samples(PICTURE), [0, 1], 2, StepSpec())
    assert pack.input_ids.tolist() == [I, I, Q, A, 11, I, I, Q, Q, A]
    assert pack.positions.tolist() == [2, 3, 4, 5, 6, 2, 3, 4, 5, 6]
    assert pack.lengths == (5, 5)
    assert pack.rows.tolist() == [3, 4, 9]
    assert pack.targets.tolist() == [11, 12, 13]
    assert pack.input_ids[pack.rows].tolist() == [A, 11, A]
    assert len(pack.prefix_rows) == len(pack.prefix_targets) == 0


def test_so_is_the_picture_of_two_samples_about_one() -> None:
    r = 5
    rows = [PICTURE[0], ([P, P, I, I, Q, r, A, 13, 4], [0, 0, 0, 0, 0, 0, 0, 13, 0])]
    pack = make_pack(samples(rows), [0, 1], 2, StepSpec(), IMAGE)
    assert pack.input_ids.tolist() == [I, I, Q, A, 11, r, A]
    assert pack.positions.tolist() == [2, 3, 4, 5, 6, 5, 6]
    assert (pack.lengths, pack.shared, pack.images) == ((5, 2), ((0, 0), (0, 3)), [0])
    assert pack.rows.tolist() == [3, 4, 6]
    assert pack.targets.tolist() == [11, 12, 13]


def test_a_label_right_behind_what_is_shared_is_predicted_there() -> None:
    rows = [([P, I, I, Q, A, 11, 4], [0, 0, 0, 0, 0, 11, 0]), ([P, I, I, Q, A, 12, 4], [0, 0, 0, 0, A, 12, 0])]
    pack = make_pack(samples(rows), [0, 1], 0, StepSpec(), IMAGE)
    assert pack.input_ids.tolist() == [P, I, I, Q, A, A]  # a sample keeps one token of its own
    assert pack.rows.tolist() == [4, 3, 5]
    assert pack.targets.tolist() == [11, A, 12]


@pytest.mark.parametrize(
    ("image", "ids"),
    [(NO_PICTURE, [P, P, I, I, Q, A, 13, 4]), (1, [P, P, I, I, Q, A, 13, 4]), (0, [P, Q, I, I, Q, A, 13, 4])],
    ids=["no picture", "another picture", "another beginning"],
)
def test_samples_share_one_picture_behind_one_beginning_or_nothing(image: int, ids: list[int]) -> None:
    first, second = torch.tensor(PICTURE[0][0]), torch.tensor(ids)
    data = collect([first, second], [first, second], [0, image])
    assert make_pack(data, [0, 1], 0, WHOLE, IMAGE).shared == ((0, 0), (len(first), 0))
    assert make_pack(data, [0, 1], 0, WHOLE, IMAGE).input_ids.tolist() == [*first.tolist(), *ids]


@given(data=any_samples(prefix=3), most=st.integers(1, 40), num_prefix=st.integers(0, 2), select=st.booleans())
def test_passes_count_what_is_shared_once(data: Samples, most: int, num_prefix: int, select: bool) -> None:
    indices, spec, image = list(range(len(data))) * 2, StepSpec(select=select), 3  # the prefix's last token

    def count(part: Sequence[int]) -> int:
        return len(make_pack(data, part, num_prefix, spec, image).input_ids)

    found = passes(data, indices, num_prefix, most, spec, image)
    assert [k for part in found for k in part] == indices
    assert all(len(part) == 1 or count(part) <= most for part in found)
    assert all(count([*part, following[0]]) > most for part, following in pairwise(found))


def test_without_selection_the_rest_of_a_sample_stays() -> None:
    pack = make_pack(samples(PICTURE), [1, 0], 2, WHOLE)
    assert pack.input_ids.tolist() == [I, I, Q, Q, A, 13, 4, I, I, Q, A, 11, 12, 4]
    assert pack.targets.tolist() == [13, 11, 12]


def test_without_packing_samples_are_padded_on_the_right() -> None:
    longer = [*PICTURE, ([P, P, I, I, Q, A, 14], [0, 0, 0, 0, 0, 0, 14])]
    pack = make_pack(samples(longer), [0, 2], 2, StepSpec(pack=False))
    assert pack.lengths == (5, 5)
    assert pack.input_ids.tolist() == [I, I, Q, A, 11, I, I, Q, A, 0]
    assert pack.rows.tolist() == [3, 4, 8]
    assert pack.targets.tolist() == [11, 12, 14]


def test_labels_in_the_prefix_are_predicted_there() -> None:
    rows = [(ids, ids) for ids, _ in PICTURE]
    pack = make_pack(samples(rows), [0, 1], 3, StepSpec())
    assert pack.prefix_rows.tolist() == [0, 1, 2] * 2
    assert pack.prefix_targets.tolist() == [P, I, I] * 2  # the last one is the first token behind the prefix
    assert pack.targets.tolist() == [*rows[0][0][4:], *rows[1][0][4:]]


@given(data=any_samples(prefix=3), spec=st.sampled_from(SPECS), num_prefix=st.integers(0, 3))
def test_every_supervised_token_is_predicted_once_by_the_token_before_it(
    data: Samples, spec: StepSpec, num_prefix: int
) -> None:
    num_prefix = min(num_prefix, len(shared_prefix(data, IMAGE)))
    indices = list(range(len(data)))
    pack = make_pack(data, indices, num_prefix, spec)
    assert len(pack.targets) + len(pack.prefix_targets) == data.num_supervised(indices)
    starts = torch.tensor([0, *pack.lengths]).cumsum(0)
    assert len(pack.input_ids) == len(pack.positions) == int(starts[-1])
    pairs = []
    for row, target in zip(pack.rows.tolist(), pack.targets.tolist(), strict=True):
        number = int(torch.searchsorted(starts, row, right=True)) - 1
        place = int(pack.positions[row])
        ids, labels = data.of(number)
        assert int(pack.input_ids[row]) == int(ids[place])
        assert target == int(labels[place + 1])
        pairs.append((number, place))
    assert len(set(pairs)) == len(pairs)
    assert pairs == sorted(pairs)
    shared, _ = data.of(0)
    for row, target in zip(pack.prefix_rows.tolist(), pack.prefix_targets.tolist(), strict=True):
        assert 0 <= row < num_prefix
        assert row == num_prefix - 1 or target == int(shared[row + 1])


@given(data=any_samples(), spec=st.sampled_from(SPECS))
def test_what_is_needed_ends_with_the_last_predictor(data: Samples, spec: StepSpec) -> None:
    for k in range(len(data)):
        ids, labels = data.of(k)
        count = needed(data, k, 0, spec)
        if spec.select:
            assert labels[count] != IGNORE_INDEX
            assert (labels[count + 1 :] == IGNORE_INDEX).all()
        else:
            assert count == len(ids)


def test_a_pack_moves_whole() -> None:
    pack = make_pack(samples(PICTURE), [0, 1], 2, StepSpec()).to(torch.device("meta"))
    tensors = (pack.input_ids, pack.positions, pack.rows, pack.targets, pack.prefix_rows, pack.prefix_targets)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert pack.lengths == (5, 5)


# --------------------------------------------------------------------------------------------- the shared prefix


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, IMAGE, 3, 4], [1, 2, IMAGE, 3, 5]], [1, 2]),  # never past a picture
        ([[1, 2, 3, 4], [1, 2, 5, 4]], [1, 2]),
        ([[IMAGE, 1, 2], [IMAGE, 1, 3]], []),
        ([[1, 2, 3], [4, 2, 3]], []),
        ([[1, 2, 3, 4]], [1, 2]),  # each sample keeps the predictor of its last label
        ([[1, 2, 3, 4], [1, 2, 5]], [1]),
        ([[1, 2, 3, 4], [1, 2]], []),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], [1, 2]),  # texts alone
    ],
)
def test_the_prefix_is_what_all_begin_with_before_any_picture(rows: list[list[int]], expected: list[int]) -> None:
    assert shared_prefix(samples([(row, row) for row in rows]), IMAGE).tolist() == expected
    assert shared_prefix(samples([(row, row) for row in reversed(rows)]), IMAGE).tolist() == expected


def test_a_text_among_pictures_may_share_what_stands_before_them() -> None:
    ids = [torch.tensor(row) for row in ([1, 2, 3, IMAGE, 4], [1, 2, 3, 4, 5])]
    assert shared_prefix(collect(ids, ids, [0, NO_PICTURE]), IMAGE).tolist() == [1, 2, 3]


def test_it_ends_before_the_predictor_of_the_last_label() -> None:
    ids = [1, 2, 3, 4, 5, 6]
    rows = [(ids, ids), (ids, [0, 0, 3, 0, 0, 0])]
    found = shared_prefix(samples(rows), IMAGE)
    assert found.tolist() == [1]  # the second sample's only label is predicted by 2, which is its own
    assert all(needed(samples(rows), k, len(found), StepSpec()) == count for k, count in ((0, 4), (1, 1)))


@given(data=any_samples(prefix=4))
def test_every_sample_keeps_a_token_behind_it(data: Samples) -> None:
    found = shared_prefix(data, IMAGE)
    for k in range(len(data)):
        assert torch.equal(data.of(k)[0][: len(found)], found)
        assert needed(data, k, len(found), StepSpec()) >= 1


def test_that_of_the_tiny_conversations_stops_before_the_picture(llava: Llava) -> None:
    data = samples_of(llava)
    image = llava.processor.image_token_id
    found = shared_prefix(data, image)
    assert len(found) == 2
    assert {int(data.of(k)[0][2]) for k in range(5)} == {image}


# --------------------------------------------------------------------------------------------- samples


@given(data=any_samples(), count=st.integers(1, 9))
def test_the_first_samples_are_the_same_samples(data: Samples, count: int) -> None:
    first = data.first(count)
    assert len(first) == min(count, len(data))
    for k in range(len(first)):
        for one, other in zip(first.of(k), data.of(k), strict=True):
            assert torch.equal(one, other)
    assert first.num_tokens(range(len(first))) == len(first.ids) == len(first.labels)


def test_samples_name_their_pictures_in_order() -> None:
    ids = [torch.tensor([1, 2])] * 4
    data = collect(ids, ids, [7, NO_PICTURE, 3, 7])
    assert data.images_of([3, 1, 2, 0]) == [7, 3, 7]
    assert data.num_tokens([0, 0, 1]) == 6
    assert data.num_supervised([0, 0, 1]) == 3


@given(data=any_samples())
def test_what_is_counted_of_samples_is_what_their_rows_say(data: Samples) -> None:
    for k in range(len(data)):
        ids, labels = data.of(k)
        supervised = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0].tolist()
        assert data.num_tokens([k]) == data.lengths[k] == len(ids)
        assert data.num_supervised([k]) == data.supervised[k] == len(supervised)
        assert data.last_predictor[k] == supervised[-1]
