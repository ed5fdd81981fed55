"""A drawn token comes from the model's own shares, whatever is asked for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_pipeline.serving.sampling import Sampling, choose

NUM_DRAWS = 2000
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])


def drawn(sampling: Sampling, count: int = NUM_DRAWS, logits: torch.Tensor = LOGITS) -> list[float]:
    """The share of draws of each token."""
    generator = sampling.generator()
    tokens = [choose(logits[None], [sampling], [generator])[0] for _ in range(count)]
    return (torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count).tolist()


def assert_close(found: list[float], expected: list[float]) -> None:
    """Within five standard deviations of as many draws."""
    for share, true in zip(found, expected, strict=True):
        assert abs(share - true) <= 5 * math.sqrt(true * (1 - true) / NUM_DRAWS) + 1e-12, (found, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_are_as_frequent_as_the_softmax_says(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1).tolist()
    assert_close(drawn(Sampling(1, temperature, seed=3)), expected)


def test_top_p_draws_from_the_fewest_tokens_that_have_so_much_together() -> None:
    shares = LOGITS.softmax(-1)
    assert shares[:2].sum() < 0.8 < shares[:3].sum()
    expected = torch.cat([shares[:3] / shares[:3].sum(), torch.zeros(3)]).tolist()
    assert_close(drawn(Sampling(1, 1.0, top_p=0.8, seed=3)), expected)


def test_the_order_of_the_vocabulary_does_not_matter_to_top_p() -> None:
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    found = drawn(Sampling(1, 1.0, top_p=0.8, seed=3), logits=LOGITS[order])
    assert [order[k].item() for k, share in enumerate(found) if share > 0] == [0, 2, 1]


@pytest.mark.parametrize("logits", [LOGITS, LOGITS * 50, -LOGITS.exp() * 1e4, torch.zeros(6)])
@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy(logits: torch.Tensor, temperature: float) -> None:
    token = choose(logits[None], [sampling := Sampling(1, temperature, seed=1)], [sampling.generator()])[0]
    assert logits[token] == logits.max()


@pytest.mark.parametrize("top_p", [0.0, 5e-324, 1e-9])
def test_a_tiny_top_p_is_greedy(top_p: float) -> None:
    assert drawn(Sampling(1, 2.0, top_p=top_p, seed=1), 50)[0] == 1.0


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    st.floats(0, 2, exclude_min=True),
    st.floats(0, 1),
    st.integers(-(1 << 80), 1 << 80),
)
def test_every_setting_draws_a_token_of_the_vocabulary(
    logits: list[float], temperature: float, top_p: float, seed: int
) -> None:
    sampling = Sampling(1, temperature, top_p, seed)
    first, again = (choose(torch.tensor([logits]), [sampling], [sampling.generator()]) for _ in range(2))
    assert 0 <= first[0] < len(logits)
    assert first == again


def test_rows_of_one_batch_are_chosen_each_by_its_own_settings() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    settings = [Sampling(1), Sampling(1), Sampling(1, 1.5, seed=11)]
    alone = choose(LOGITS[None], [settings[2]], [settings[2].generator()])
    assert choose(logits, settings, [one.generator() for one in settings]) == [0, 5, *alone]


def test_without_a_seed_draws_differ() -> None:
    sampling = Sampling(1, 1.0)
    logits = torch.zeros((1, 1 << 16))
    tokens = {choose(logits, [sampling], [sampling.generator()])[0] for _ in range(4)}
    assert len(tokens) > 1
