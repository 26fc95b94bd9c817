"""LS-GAN: the margin and both sides of the hinge by hand; what L's step leaves alone."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import loss_sensitive_gan as ls

POINTS, GREY, COLOUR = [2], [1, 8, 8], [3, 16, 16]
CASES = [(COLOUR, ()), (GREY, ("--network", "mlp")), (POINTS, ())]

each_case = pytest.mark.parametrize("shape, flags", CASES, ids=["conv", "mlp", "points"])


def scores(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True)


# The margin


def test_margin_adds_up_distances_not_differences():
    """Of x = (1, −1) and 0 it is 1; |1 − 1| would be 0."""
    x, x_fake = scores([1, -1], [0.5, 0.5]), scores([0, 0], [0.5, -1.5])
    assert_close(ls.margin(x, x_fake), scores(1, 1).detach())


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 2, 6), (2,)])
def test_margin_is_a_mean_of_each_pair(shape):
    x, x_fake = normal(5, *shape), normal(5, *shape)
    expected = [
        sum(abs(a - b) for a, b in zip(p.flatten(), q.flatten(), strict=True)) / p.numel()
        for p, q in zip(x, x_fake, strict=True)
    ]
    assert_close(ls.margin(x, x_fake), torch.stack(expected))
    larger = ls.margin(torch.cat([x, x], 1), torch.cat([x_fake, x_fake], 1))
    assert_close(larger, ls.margin(x, x_fake))  # it does not grow with the picture
    assert_close(ls.margin(x, x), torch.zeros(5).double())


# The losses


@pytest.mark.parametrize("weight", [0.5, 2.46])
def test_critic_loss_pair_by_pair(weight):
    """A loop; a hinge of the means, or over all pairs, would be another number."""
    f_real, f_fake, margin = normal(9), normal(9), torch.rand(9).double()
    pairs = zip(f_real.tolist(), f_fake.tolist(), margin.tolist(), strict=True)
    terms = [max(0.0, weight * m + a - b) for a, b, m in pairs]
    assert 0 < sum(term > 0 for term in terms) < 9
    assert_close(ls.critic_loss(f_real, f_fake, margin, weight).item(), sum(terms) / 9)


def test_both_sides_of_the_hinge():
    """A sample's loss that is higher by more than the margin is left alone; else both of the pair move."""
    f_real, f_fake, margin = scores(0, 0, 3), scores(2, 0.5, 1), scores(1, 1, 0.25)
    loss = ls.critic_loss(f_real, f_fake, margin, 1)
    assert_close(loss.item(), (0 + 0.5 + 2.25) / 3)
    by_real, by_fake = gradients(loss, f_real, f_fake)
    assert_close(by_real, torch.tensor([0, 1, 1]).double() / 3)
    assert_close(by_fake, torch.tensor([0, -1, -1]).double() / 3)


@pytest.mark.parametrize("shift", [-50, 7])
def test_only_differences_count(shift):
    """So L needs no lower bound, and no ReLU at its end."""
    f_real, f_fake, margin = normal(9), normal(9), torch.rand(9).double()
    loss = ls.critic_loss(f_real, f_fake, margin, 2)
    assert_close(ls.critic_loss(f_real + shift, f_fake + shift, margin, 2), loss)
    squares = (f_real - 1).square().mean() + f_fake.square().mean()  # least squares, its namesake
    assert not torch.isclose(loss, squares)


def test_generator_loss():
    """E L(G(z)), at any level of L alike; L's step pulls the samples' losses up, G's down."""
    f_real, f_fake = scores(0, 0, 0), scores(-4, 2, 5)
    loss = ls.generator_loss(f_fake)
    assert_close(loss.item(), 1.0)
    (by_g,) = gradients(loss, f_fake)
    assert_close(by_g, torch.full((3,), 1 / 3).double())
    (by_l,) = gradients(ls.critic_loss(f_real, f_fake, torch.full((3,), 9).double(), 1), f_fake)
    assert_close(by_l, -by_g)


# The networks


def test_the_prior_is_uniform(configure):
    z = ls.draw_z(20_000, configure(ls, GREY), "cpu")
    assert z.shape == (20_000, 5) and z.abs().max() <= 1
    assert_close(z.flatten().sort().values, torch.linspace(-1, 1, 100_000), atol=0.02, rtol=0)
    assert_close(torch.corrcoef(z.T), torch.eye(5), atol=0.04, rtol=0)


@pytest.mark.parametrize("network", ["conv", "mlp"])
@pytest.mark.parametrize("shape", [[c, size, size] for c in (1, 3) for size in (32, 64)] + [[2]], ids=str)
def test_shapes(shape, network, configure):
    if shape == POINTS and network == "conv":
        pytest.skip("points take an mlp")
    config = configure(ls, shape, "--network", network)
    nets = {name: net.eval() for name, net in ls.networks(config).items()}
    assert list(nets) == ["generator", "critic"]
    for n in (3, 1):  # a batch of one keeps its shape
        x = ls.generate(nets, ls.draw_z(n, config, "cpu"))
        assert x.shape == (n, *shape)
        assert nets["critic"](x).shape == (n,)


def test_batch_norm(configure):
    """In both conv networks, as the file says; pairs of an mlp are on their own in train mode, too."""

    def norms(net):
        return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]

    for (shape, flags), expected in zip(CASES, (True, False, False), strict=True):
        nets = ls.networks(configure(ls, shape, *flags))
        for net in nets.values():
            assert bool(norms(net)) == expected
            assert all(norm.eps <= 1e-3 and norm.momentum == 0.1 for norm in norms(net))
        critic, x = nets["critic"].train(), torch.randn(4, *shape, requires_grad=True)
        (gradient,) = gradients(critic(x)[0], x)
        assert gradient[0].norm() > 0 and bool((gradient[1:] == 0).all()) != expected


@each_case
def test_the_loss_is_free_to_be_negative(shape, flags, start):
    """Where all of L is below 0 it still moves G, and its own step is what it is at any other level."""
    norms = []
    for level in (0, -100):
        torch.manual_seed(1)
        run = start(ls, shape, *flags)
        last = [
            module for module in run.nets["critic"].modules() if isinstance(module, nn.Linear | nn.Conv2d)
        ][-1]
        last.bias.data.fill_(level)
        for optimizer in run.optimizers.values():
            optimizer.param_groups[0]["lr"] = 0.0
        metrics = run.iteration()
        assert (metrics["generator_loss"] < 0) or level == 0
        grads = [torch.cat([g.flatten() for g in before[name][1]]) for name, before, _ in run.updates]
        norms.append(torch.stack([grad.norm() for grad in grads]))
    assert (norms[0] > 1e-5).all()
    assert_close(norms[0], norms[1], rtol=1e-2, atol=1e-5)


# The updates


@each_case
def test_gradients_and_numbers_are_those_of_the_paper(shape, flags, start):
    """Worked out again, pair by pair, from the batches that were drawn."""
    run = start(ls, shape, *flags, "--batch-size", 12, "--margin-weight", 0.02)
    for draws in run.draws.values():
        draws.clear()
    generator, critic = run.nets["generator"], run.nets["critic"]
    for weight in critic.parameters():
        weight.data *= 3  # so that some gaps are as wide as the margin
    metrics = run.iteration()
    (x,), zs = run.draws["x"], list(run.draws["z"])
    for z, (updated, before, _) in zip(zs, run.updates, strict=True):
        for name, net in run.nets.items():
            for weight, old in zip(net.parameters(), before[name][0], strict=True):
                weight.data.copy_(old)
        x_fake = generator(z)
        if updated == "critic":
            wanted = torch.stack(
                [0.02 * (a - b).abs().mean() for a, b in zip(x, x_fake.detach(), strict=True)]
            )
            terms = wanted + critic(x) - critic(x_fake.detach())
            loss = terms[terms > 0].sum() / 12
            assert 0 < (terms > 0).sum() < 12
            assert_close(metrics["margin"], wanted.mean())
            assert_close(metrics["active"].item(), (terms > 0).sum().item() / 12)
        else:
            loss = critic(x_fake).mean()
        assert_close(metrics[f"{updated}_loss"], loss.detach(), rtol=1e-3, atol=1e-5)
        expected = torch.autograd.grad(loss, [*run.nets[updated].parameters()])
        for grad, wanted in zip(before[updated][1], expected, strict=True):
            assert_close(grad, wanted, rtol=1e-3, atol=1e-5)
        assert max(grad.abs().max() for grad in expected) > 1e-4
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


def test_samples_move_to_the_data(configure):
    """Points at (1, −1): some hundred updates bring the samples near."""
    x = torch.tensor([1.0, -1.0]) + 0.1 * torch.randn(200, 2)
    config = configure(ls, POINTS, "--batch-size", 64, "--lr", 2e-3)
    nets, _, iteration, _ = ls.build(config, (x, None), (x, None))
    for _ in range(300):
        iteration()
    with torch.no_grad():
        centre = ls.generate(nets, ls.draw_z(500, config, "cpu")).mean(0)
    assert_close(centre, torch.tensor([1.0, -1.0]), atol=0.3, rtol=0)
