"""The objectives of dcgan, wgan, wgan_gp, bigan and wbli, in float64 against values worked out by hand."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bigan
import dcgan

WASSERSTEIN = ["wgan", "wgan_gp", "wbli"]  # critic_loss
PENALTY = ["wgan_gp", "wbli"]  # gradient_penalty
CLIP = ["wgan", "wbli"]  # clip_weights
JOINT = ["wbli"]  # generator_encoder_loss; the critic and the penalty take x and z
SHAPES = [(1, 5, 5), (3, 4, 6), (2,)]


def each(models):
    return pytest.mark.parametrize("model", models, indirect=True)


def scores(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def joint(model):
    return model.__name__ in JOINT


def loss_of_g(model, f_real, f_fake):
    """What the generator minimises, up to a constant."""
    return model.generator_encoder_loss(f_real, f_fake) if joint(model) else model.generator_loss(f_fake)


# Wasserstein losses


@each(WASSERSTEIN)
def test_wasserstein_losses(model):
    """Each a difference of two means; critic and generator push the fakes in opposite directions."""
    f_real, f_fake = scores(1, 2, 6), scores(-4, 2)
    loss = model.critic_loss(f_real, f_fake)
    assert_close(loss, number(-4.0))
    of_critic = torch.autograd.grad(loss, (f_real, f_fake))
    assert_close(of_critic, (number([-1 / 3] * 3), number([1 / 2] * 2)))
    loss = loss_of_g(model, f_real, f_fake)
    assert_close(loss, number(4.0 if joint(model) else 1.0))
    by_real, by_fake = torch.autograd.grad(loss, (f_real, f_fake), allow_unused=True)
    assert_close(by_fake, -of_critic[1])
    if joint(model):
        assert_close(by_real, -of_critic[0])
    else:
        assert by_real is None


@each(WASSERSTEIN)
@pytest.mark.parametrize("theta", [-1.5, 0.0, 0.4])
def test_w_estimate_is_the_distance_of_parallel_lines(model, theta):
    """WGAN's example 1: data on the line x₁ = 0, samples on x₁ = θ; EM is |θ|, its derivative sign θ."""
    height, shift = torch.rand(100).double(), scores(theta)
    x, x_fake = torch.stack([0 * height, height], 1), torch.stack([shift + 0 * height, height], 1)
    angles = torch.arange(360) * 2 * math.pi / 360
    directions = torch.stack([angles.cos(), angles.sin()], 1).double()
    estimates = torch.stack([-model.critic_loss(x @ a, x_fake @ a) for a in directions])
    assert_close(estimates.max(), shift.detach().abs()[0], atol=1e-7, rtol=0)
    if theta:
        best = directions[estimates.argmax()]
        assert_close(best, number([-math.copysign(1, theta), 0]), atol=1e-7, rtol=0)
        loss_of_g(model, x @ best, x_fake @ best).backward()
        assert_close(shift.grad, shift.detach().sign(), atol=1e-7, rtol=0)


@each(CLIP)
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


# Cross-entropies, of logits


def log(p):
    return number(p).log()


def test_losses_of_dcgan():
    d_real, d_fake = scores(math.log(3), 0.0), scores(-math.log(4))  # D = 3/4 and 1/2, and 1/5
    expected = -(log(0.75) + log(0.5)) / 2 - log(0.8)
    assert_close(dcgan.discriminator_loss(d_real, d_fake), expected)
    assert_close(dcgan.generator_loss(d_fake), -log(0.2))
    assert_close(dcgan.minimax_generator_loss(d_fake), log(0.8))
    assert_close(dcgan.js_estimate(d_real, d_fake), math.log(2) - expected / 2)


def test_js_estimate_at_both_ends():
    """0 where D is undecided, log 2 where it is sure; nothing overflows."""
    assert_close(dcgan.js_estimate(scores(0.0, 0.0), scores(0.0)).item(), 0.0)
    assert_close(dcgan.js_estimate(scores(500.0), scores(-500.0)).item(), math.log(2))


@pytest.mark.parametrize("loss, slope", [(dcgan.generator_loss, -1.0), (dcgan.minimax_generator_loss, 0.0)])
def test_where_d_is_sure_only_the_minimax_gradient_vanishes(loss, slope):
    d_fake = scores(-120.0)
    loss(d_fake).backward()
    assert_close(d_fake.grad.item(), slope)


def test_losses_of_bigan():
    """D: 1 for (x, E(x)) and 0 for (G(z), z); G and E: the other way round; 2 log 2 where D is ½."""
    d_real, d_fake = scores(-1.5, 0.3, 4), scores(2, -0.7)
    real, fake = (1 / (1 + (-d.detach()).exp()) for d in (d_real, d_fake))
    loss = bigan.discriminator_loss(d_real, d_fake)
    assert_close(loss.detach(), -real.log().mean() - (1 - fake).log().mean(), rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(loss, (d_real, d_fake)), ((real - 1) / 3, fake / 2))
    loss = bigan.generator_encoder_loss(d_real, d_fake)
    assert_close(loss.detach(), -(1 - real).log().mean() - fake.log().mean(), rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(loss, (d_real, d_fake)), (real / 3, (fake - 1) / 2))
    for loss in (bigan.discriminator_loss, bigan.generator_encoder_loss):
        assert_close(loss(scores(0, 0, 0), scores(0, 0)).item(), 2 * math.log(2))


def test_losses_of_bigan_where_d_is_sure():
    """Nothing overflows, and what G and E learn from does not vanish."""
    d_real, d_fake = scores(120.0), scores(-120.0)
    assert_close(bigan.discriminator_loss(d_real, d_fake).item(), 0.0)
    bigan.generator_encoder_loss(d_real, d_fake).backward()
    assert (d_real.grad.item(), d_fake.grad.item()) == (1, -1)


# Gradient penalty


class Linear(nn.Module):
    """⟨a, x⟩ + ⟨b, z⟩ with √(‖a‖² + ‖b‖²) = k, b shorter than a; without z, ⟨a, x⟩ with ‖a‖ = k."""

    def __init__(self, model, x, z, k):
        super().__init__()
        a, b = normal(x[0].numel()), normal(z.shape[1])
        share = 0.6 if joint(model) else 0
        self.a = nn.Parameter(k * math.sqrt(1 - share**2) * a / a.norm())
        self.b = nn.Parameter(k * share * b / b.norm())

    def forward(self, x, z=None):
        return x.flatten(1) @ self.a + (0 if z is None else z @ self.b)


class Quadratic(nn.Module):
    """½c(‖x‖² + ‖z‖²), or without z ½c‖x‖², and a list of the points where it was asked."""

    def __init__(self, c):
        super().__init__()
        self.c, self.calls = nn.Parameter(number(c)), []

    def forward(self, *arguments):
        self.calls.append([part.detach().clone() for part in arguments])
        return self.c / 2 * sum(part.flatten(1).square().sum(1) for part in arguments)


def batch(shape, n=7, z_dim=4):
    """x, z_hat, x_fake, z"""
    return normal(n, *shape), normal(n, z_dim), normal(n, *shape), normal(n, z_dim)


def penalty(model, critic, x, z_hat, x_fake, z):
    return model.gradient_penalty(critic, *((x, z_hat, x_fake, z) if joint(model) else (x, x_fake)))


@each(PENALTY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n, k", [(7, 0.5), (1, 1.5), (7, 4)])
def test_penalty_of_a_linear_critic(model, shape, n, k):
    """(k − 1)²: the norm is over the whole sample, x and z together; below 1 counts as above; λ is not in."""
    x, z_hat, x_fake, z = batch(shape, n)
    loss = penalty(model, Linear(model, x, z, k), x, z_hat, x_fake, z)
    assert_close(loss, number((k - 1) ** 2))


@each(PENALTY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("c", [-0.3, 2.0])
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
        assert len(ratios) == 1 + joint(model)
        ratios, epsilon = torch.cat(ratios, 1), ratios[0].median(1).values
        # Where real and fake all but agree, the division loses digits.
        assert_close(ratios, epsilon[:, None].expand_as(ratios), atol=1e-8, rtol=0)
        assert_close(epsilon.sort().values, torch.linspace(0, 1, 2000).double(), atol=0.05, rtol=0)
        assert epsilon.min() >= 0 and epsilon.max() <= 1
        drawn.append(epsilon)
    assert_close((drawn[0] - drawn[1]).abs().mean().item(), 1 / 3, atol=0.03, rtol=0)


@each(PENALTY)
@pytest.mark.parametrize("flags", [[], ["--network", "mlp"]], ids=["conv", "mlp"])
def test_penalty_of_a_flat_critic(model, flags, configure):
    """Where the gradient is 0 the penalty is 1 and its own gradient finite."""
    critic = model.networks(configure(model, [1, 8, 8], *flags))["critic"].double()
    for weight in critic.parameters():
        nn.init.zeros_(weight)
    loss = penalty(model, critic, *batch([1, 8, 8], z_dim=5))
    assert_close(loss.detach(), number(1.0))
    loss.backward()
    grads = [weight.grad for weight in critic.parameters() if weight.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


@each(PENALTY)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_penalty_leaves_its_inputs_alone(model, requires_grad):
    inputs = [part.float().requires_grad_(requires_grad) for part in batch((3, 4, 4))]
    before = [part.detach().clone() for part in inputs]
    loss = penalty(model, Quadratic(0.5).float(), *inputs)
    assert loss.shape == () and loss.dtype == torch.float32
    loss.backward()
    for part, old in zip(inputs, before, strict=True):
        assert torch.equal(part, old)
        assert part.requires_grad == requires_grad and part.is_leaf and part.grad is None


# Clipping


@pytest.mark.parametrize("model", CLIP[:1], indirect=True)  # the same function in all of them
@pytest.mark.parametrize("c", [0.01, 2.0])
def test_clip_weights(model, c):
    """All parameters, in place, batch norm's included; neither their gradients nor any buffer."""
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
