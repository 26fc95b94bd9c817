"""The objectives, in float64 against values worked out by hand. A new file joins by its name in the lists."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

WASSERSTEIN = ["wgan", "wgan_gp", "wbli"]  # critic_loss
ONE_WAY = ["wgan", "wgan_gp"]  # generator_loss = −E f_fake
TWO_WAY = ["wbli"]  # generator_encoder_loss; their critics and penalties take x and z
PENALTY = ["wgan_gp", "wbli"]  # gradient_penalty
CLIP = ["wgan", "wbli"]  # clip_weights

SHAPES = [(1, 5, 5), (3, 4, 6), (2,)]


def each(models):
    return pytest.mark.parametrize("model", models, indirect=True)


def scores(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def two_way(model):
    return model.__name__ in TWO_WAY


def loss_of_g(model, f_real, f_fake):
    """What the generator minimises, up to a constant."""
    return model.generator_encoder_loss(f_real, f_fake) if two_way(model) else model.generator_loss(f_fake)


# Losses


@each(WASSERSTEIN)
def test_critic_loss(model):
    f_real, f_fake = scores(1, 2, 6), scores(-4, 2)  # each with a mean of its own
    loss = model.critic_loss(f_real, f_fake)
    assert_close(loss, torch.tensor(-4.0).double())
    loss.backward()
    assert_close(f_real.grad, torch.full((3,), -1 / 3).double())
    assert_close(f_fake.grad, torch.full((2,), 1 / 2).double())


@each(ONE_WAY)
def test_generator_loss(model):
    f_fake = scores(-4, 2, 5)
    loss = model.generator_loss(f_fake)
    assert_close(loss, torch.tensor(-1.0).double())
    loss.backward()
    assert_close(f_fake.grad, torch.full((3,), -1 / 3).double())


@each(TWO_WAY)
def test_generator_encoder_loss(model):
    f_real, f_fake = scores(1, 2, 6), scores(-4, 2)
    loss = model.generator_encoder_loss(f_real, f_fake)
    assert_close(loss, torch.tensor(4.0).double())
    assert_close(loss, -model.critic_loss(f_real, f_fake))
    loss.backward()
    assert_close(f_real.grad, torch.full((3,), 1 / 3).double())
    assert_close(f_fake.grad, torch.full((2,), -1 / 2).double())


@each(WASSERSTEIN)
def test_critic_and_generator_pull_the_fakes_opposite_ways(model):
    f_real, f_fake = normal(7), normal(7).requires_grad_()
    (up,) = torch.autograd.grad(model.critic_loss(f_real, f_fake), f_fake)
    (down,) = torch.autograd.grad(loss_of_g(model, f_real, f_fake), f_fake)
    assert_close(up, torch.full((7,), 1 / 7).double())
    assert_close(down, -up)


@each(WASSERSTEIN)
@pytest.mark.parametrize("theta", [-1.5, -0.1, 0.0, 0.4, 2.0])
def test_w_estimate_is_the_distance_of_parallel_lines(model, theta):
    """WGAN's example 1: data on the line x₁ = 0, samples on x₁ = θ; EM is |θ|, its derivative sign θ."""
    height, shift = torch.rand(100).double(), torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    x, x_fake = torch.stack([0 * height, height], 1), torch.stack([shift + 0 * height, height], 1)

    angles = torch.arange(360) * 2 * math.pi / 360
    directions = torch.stack([angles.cos(), angles.sin()], 1).double()
    estimates = torch.stack([-model.critic_loss(x @ a, x_fake @ a) for a in directions])
    assert_close(estimates.max(), shift.detach().abs(), atol=1e-7, rtol=0)

    if theta:
        best = directions[estimates.argmax()]
        assert_close(best, torch.tensor([-math.copysign(1, theta), 0]).double(), atol=1e-7, rtol=0)
        loss_of_g(model, x @ best, x_fake @ best).backward()
        assert_close(shift.grad, shift.detach().sign(), atol=1e-7, rtol=0)


@each(sorted({*WASSERSTEIN} & {*CLIP}))
def test_descending_both_losses_moves_the_samples_to_the_data(model):
    """Data N(3, 1), G(z) = z + b, and the critic ax: b ends at 3."""
    a, b = (nn.Linear(1, 1, bias=False).double().requires_grad_() for _ in range(2))
    nn.init.constant_(a.weight, -1)
    nn.init.zeros_(b.weight)
    x, z, one = normal(1000, 1), normal(1000, 1), torch.ones(1, 1).double()
    x = x - x.mean() + z.mean() + 3  # so that the answer is exact
    for _ in range(200):
        loss = model.critic_loss(a(x), a((z + b(one)).detach()))
        a.weight.data -= torch.autograd.grad(loss, a.weight)[0]
        model.clip_weights(a, 0.1)
        loss = loss_of_g(model, a(x), a(z + b(one)))
        b.weight.data -= torch.autograd.grad(loss, b.weight)[0]
    assert_close(b.weight.item(), 3.0, atol=0.2, rtol=0)


# Gradient penalty


class Linear(nn.Module):
    """⟨a, x⟩ + ⟨b, z⟩ with √(‖a‖² + ‖b‖²) = k, b shorter than a; without z, ⟨a, x⟩ with ‖a‖ = k."""

    def __init__(self, model, x, z, k):
        super().__init__()
        a, b = normal(x[0].numel()), normal(z.shape[1])
        share = 0.6 if two_way(model) else 0
        self.a = nn.Parameter(k * math.sqrt(1 - share**2) * a / a.norm())
        self.b = nn.Parameter(k * share * b / b.norm())

    def forward(self, x, z=None):
        return x.flatten(1) @ self.a + (0 if z is None else z @ self.b)


class Quadratic(nn.Module):
    """½c(‖x‖² + ‖z‖²), or without z ½c‖x‖², and a list of the points where it was asked."""

    def __init__(self, c):
        super().__init__()
        self.c, self.calls = nn.Parameter(torch.tensor(c, dtype=torch.float64)), []

    def forward(self, *arguments):
        self.calls.append([part.detach().clone() for part in arguments])
        return self.c / 2 * sum(part.flatten(1).square().sum(1) for part in arguments)


def batch(shape, n=7, z_dim=4):
    """x, z_hat, x_fake, z"""
    return normal(n, *shape), normal(n, z_dim), normal(n, *shape), normal(n, z_dim)


def penalty(model, critic, x, z_hat, x_fake, z):
    return model.gradient_penalty(critic, *((x, z_hat, x_fake, z) if two_way(model) else (x, x_fake)))


@each(PENALTY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("k", [0.5, 1, 1.5, 4])
def test_penalty_of_a_linear_critic(model, shape, n, k):
    """(k − 1)²: the norm is over the whole sample, x and z together; below 1 counts as above; λ is not in."""
    x, z_hat, x_fake, z = batch(shape, n)
    loss = penalty(model, Linear(model, x, z, k), x, z_hat, x_fake, z)
    assert_close(loss, torch.tensor((k - 1) ** 2).double())


@each(PENALTY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("c", [-0.3, 0.2, 2.0])
def test_penalty_reaches_the_critics_weights(model, shape, c):
    """Of ½c‖x‖² the gradient's norm is |c|·r at a distance r from 0; each sample counts by itself."""
    critic = Quadratic(c)
    loss = penalty(model, critic, *batch(shape))
    ((*parts,),) = critic.calls
    r = torch.cat([part.flatten(1) for part in parts], 1).norm(dim=1)
    assert_close(loss.detach(), ((abs(c) * r - 1) ** 2).mean())
    loss.backward()
    expected = (2 * (abs(c) * r - 1) * r * math.copysign(1, c)).mean()
    assert expected.abs() > 0.1
    assert_close(critic.c.grad, expected)


@each(PENALTY)
@pytest.mark.parametrize("shape", SHAPES)
def test_penalty_is_taken_between_real_and_fake(model, shape):
    """x̂ = εx + (1 − ε)x_fake, with one ε ~ U[0, 1] in a sample, x and z alike, and a new one each time."""
    x, z_hat, x_fake, z = batch(shape, n=2000)
    critic = Quadratic(1.0)
    drawn = []
    for _ in range(2):
        penalty(model, critic, x, z_hat, x_fake, z)
        ratios = [
            ((mixed - fake) / (real - fake)).flatten(1)
            for mixed, real, fake in zip(critic.calls[-1], (x, z_hat), (x_fake, z), strict=False)
        ]
        assert len(ratios) == 1 + two_way(model)
        ratios, epsilon = torch.cat(ratios, 1), ratios[0].median(1).values
        # Where real and fake all but agree, the division loses digits.
        assert_close(ratios, epsilon[:, None].expand_as(ratios), atol=1e-8, rtol=0)
        assert_close(epsilon.sort().values, torch.linspace(0, 1, 2000).double(), atol=0.05, rtol=0)
        assert epsilon.min() >= 0 and epsilon.max() <= 1
        drawn.append(epsilon)
    assert_close((drawn[0] - drawn[1]).abs().mean().item(), 1 / 3, atol=0.03, rtol=0)


@each(PENALTY)
@pytest.mark.parametrize("shape", SHAPES)
def test_penalty_of_a_flat_critic(model, shape):
    """Where the gradient is 0 the penalty is 1 and its gradient finite."""
    x, z_hat, x_fake, z = batch(shape)
    critic = Linear(model, x, z, 0)
    loss = penalty(model, critic, x, z_hat, x_fake, z)
    assert_close(loss.detach(), torch.tensor(1.0).double())
    loss.backward()
    assert critic.a.grad.isfinite().all()
    assert not two_way(model) or critic.b.grad.isfinite().all()


@each(PENALTY)
@pytest.mark.parametrize("flags", [[], ["--network", "mlp"]], ids=["conv", "mlp"])
def test_penalty_of_a_critic_with_zero_weights(model, flags, configure):
    critic = model.networks(configure(model, [1, 8, 8], *flags))["critic"].double()
    for weight in critic.parameters():
        nn.init.zeros_(weight)
    loss = penalty(model, critic, *batch([1, 8, 8], z_dim=5))
    assert_close(loss.detach(), torch.tensor(1.0).double())
    loss.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in critic.parameters())


@each(PENALTY)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_penalty_leaves_its_inputs_alone(model, requires_grad):
    inputs = [part.requires_grad_(requires_grad) for part in batch((3, 4, 4))]
    before = [part.detach().clone() for part in inputs]
    penalty(model, Quadratic(0.5), *inputs).backward()
    for part, old in zip(inputs, before, strict=True):
        assert torch.equal(part, old)
        assert part.requires_grad == requires_grad and part.is_leaf and part.grad is None


@each(PENALTY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_penalty_keeps_the_dtype(model, dtype):
    x, z_hat, x_fake, z = (part.to(dtype) for part in batch((1, 4, 4)))
    loss = penalty(model, Linear(model, x, z, 3).to(dtype), x, z_hat, x_fake, z)
    assert loss.shape == ()
    assert_close(loss, torch.tensor(4, dtype=dtype))


# Clipping


@each(CLIP)
@pytest.mark.parametrize("c", [0.01, 0.3, 2.0])
def test_clip_weights(model, c):
    inner = nn.Sequential(nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 3))
    critic = nn.Sequential(nn.Conv2d(2, 6, 3), inner)
    for weight in critic.parameters():
        steps = torch.linspace(-3 * c, 3 * c, weight.numel())[torch.randperm(weight.numel())]
        weight.data.copy_(steps.view_as(weight))
        weight.grad = torch.ones_like(weight)
    before = [(weight, weight.data_ptr(), weight.detach().clone()) for weight in critic.parameters()]
    buffers = [buffer.clone() for buffer in critic.buffers()]
    model.clip_weights(critic, c)

    limit = torch.tensor(c)
    assert len(before) == 6
    for weight, (same, pointer, old) in zip(critic.parameters(), before, strict=True):
        assert weight is same and weight.data_ptr() == pointer and weight.requires_grad and weight.is_leaf
        assert torch.equal(weight.grad, torch.ones_like(weight))
        inside = old.abs() <= c
        assert inside.any() and (old > c).any() and (old < -c).any()
        assert torch.equal(weight[inside], old[inside])
        assert torch.equal(weight[~inside], limit * old[~inside].sign())
    assert all(torch.equal(now, old) for now, old in zip(critic.buffers(), buffers, strict=True))
