"""DCGAN's objective, in float64 against values worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

import dcgan


def logits(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def log(p):
    return torch.tensor(p, dtype=torch.float64).log()


def test_losses_are_those_of_the_probabilities():
    d_real, d_fake = logits(math.log(3), 0.0), logits(-math.log(4))  # D = 3/4 and 1/2, and 1/5
    expected = -(log(0.75) + log(0.5)) / 2 - log(0.8)
    assert_close(dcgan.discriminator_loss(d_real, d_fake), expected)
    assert_close(dcgan.generator_loss(d_fake), -log(0.2))
    assert_close(dcgan.minimax_generator_loss(d_fake), log(0.8))
    assert_close(dcgan.js_estimate(d_real, d_fake), math.log(2) - expected / 2)


def test_an_undecided_discriminator():
    """At D = 1/2 the value V is −log 4 and the estimate of the divergence 0."""
    half = logits(0.0, 0.0)
    assert_close(dcgan.discriminator_loss(half, half).item(), math.log(4))
    assert_close(dcgan.js_estimate(half, half).item(), 0.0)


def test_a_sure_discriminator():
    """The estimate is at most log 2, and nothing overflows."""
    assert_close(dcgan.js_estimate(logits(500.0), logits(-500.0)).item(), math.log(2))


@pytest.mark.parametrize("loss, slope", [(dcgan.generator_loss, -1.0), (dcgan.minimax_generator_loss, 0.0)])
def test_where_the_discriminator_is_sure_only_the_minimax_gradient_vanishes(loss, slope):
    d_fake = logits(-120.0)
    loss(d_fake).backward()
    assert_close(d_fake.grad.item(), slope)


@pytest.mark.parametrize("loss", [dcgan.generator_loss, dcgan.minimax_generator_loss])
def test_generator_and_discriminator_pull_the_fakes_opposite_ways(loss):
    d_fake = logits(0.7, -1.3)
    (of_g,) = torch.autograd.grad(loss(d_fake), d_fake)
    (of_d,) = torch.autograd.grad(dcgan.discriminator_loss(logits(0.0), d_fake), d_fake)
    assert (of_g < 0).all() and (of_d > 0).all()
