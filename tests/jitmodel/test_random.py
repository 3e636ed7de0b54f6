"""Numbers have an address, not a history."""

import pytest
import torch

from jitmodel import random


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (0, 0, ("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")),
        (0xFFFFFFFF, 0xFFFFFFFF, ("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd")),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    words = random.philox((torch.tensor(counter),) * 4, (torch.tensor(key),) * 2)

    assert tuple(f"{int(word):08x}" for word in words) == expected


def test_an_image_draws_the_same_numbers_in_any_batch():
    index = torch.tensor([7, 0, 2**40 + 1])

    together = random.normal(5, index, (3, 4, 5), "noise")
    alone = [random.normal(5, index[i : i + 1], (3, 4, 5), "noise") for i in range(3)]

    assert torch.equal(together, torch.cat(alone))


def test_a_seed_for_each_image_equals_that_seed_alone():
    seeds = torch.tensor([1, 2**33, 3])
    together = random.normal(seeds, torch.zeros(3, dtype=torch.int64), (6,), "noise")

    for i, seed in enumerate(seeds.tolist()):
        assert torch.equal(together[i], random.normal(seed, torch.tensor([0]), (6,), "noise")[0])


def test_seeds_indices_and_streams_are_independent():
    index = torch.arange(4096)
    base = random.normal(0, index, (), "a")
    others = [
        random.normal(1, index, (), "a"),
        random.normal(0, index + 4096, (), "a"),
        random.normal(0, index + 2**32, (), "a"),
        random.normal(0, index, (), "b"),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack((base, other)))[0, 1]
        assert abs(correlation) < 0.06  # 4 standard errors of 4096 pairs


def test_normals_have_the_moments_of_a_normal_and_uniforms_fill_their_interval():
    n = random.normal(0, torch.arange(500), (3, 28, 28), "noise").double()
    u = random.uniform(0, torch.arange(100_000), "drop").double()

    assert abs(n.mean()) < 0.004
    assert abs(n.var() - 1) < 0.006
    assert abs((n**4).mean() - 3) < 0.04
    assert u.min() > 0
    assert u.max() <= 1
    assert abs(u.mean() - 0.5) < 0.004
    assert abs((u <= 0.1).double().mean() - 0.1) < 0.004


@pytest.mark.gpu
def test_a_gpu_draws_the_same_uniforms_and_nearly_the_same_normals():
    index = torch.arange(64)
    assert torch.equal(
        random.uniform(3, index, "drop"), random.uniform(3, index.cuda(), "drop").cpu()
    )
    cpu, gpu = (random.normal(3, i, (3, 8, 8), "noise").cpu() for i in (index, index.cuda()))
    torch.testing.assert_close(cpu, gpu, rtol=1e-5, atol=1e-6)
