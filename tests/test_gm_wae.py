"""gm_wae.py: kernel, MMD and both objectives in float64 against loops; the prior; pre-training; --init."""

import csv
import math
from argparse import Namespace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import gm_wae

SCALES = (0.1, 0.2, 0.5, 1, 2, 5, 10)
POINTS = [
    "--dataset",
    "ring",
    "--device",
    "cpu",
    "--width",
    "2",
    "--batch-size",
    "4",
    "--pretrain-steps",
    "3",
]


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def weights(n, components):
    return normal(n, components).softmax(1)


def prior(n, components, d, std=0.3):
    """One draw of each component in a row, and the weights 1/K."""
    z = torch.eye(components, d, dtype=torch.float64) + std * normal(n, components, d)
    return z, torch.full((n, components), 1 / components, dtype=torch.float64)


def settings(**changes):
    """A configuration for component_means and draw_z."""
    return Namespace(**{"z_dim": 4, "components": 4, "prior_std": 0.3} | changes)


# Kernel


@pytest.mark.parametrize("c", [0.3, 5.0])
def test_kernel_is_the_sum_over_scales(c):
    a, b = normal(5, 3), 3 * normal(4, 3)
    expected = torch.zeros(5, 4).double()
    for i, j, s in product(range(5), range(4), SCALES):
        squared = sum((a[i, d] - b[j, d]) ** 2 for d in range(3))
        expected[i, j] += c * s / (c * s + squared)
    assert_close(gm_wae.imq_kernel(a, b, c), expected, atol=1e-12, rtol=0)


def test_kernel_of_a_point_with_itself_is_the_number_of_scales():
    a = normal(6, 10).requires_grad_()
    kernel = gm_wae.imq_kernel(a, a, 5)
    assert_close(kernel.diagonal(), torch.full((6,), 7.0).double())
    assert_close(kernel, kernel.T)
    kernel.sum().backward()
    assert a.grad.isfinite().all()


def test_kernel_is_exact_for_close_points_far_from_0():
    """As ‖a‖² + ‖b‖² − 2ab in single precision the distance would be lost."""
    a = torch.full((30, 8), 100.0)
    b = a + 0.01
    assert_close(gm_wae.imq_kernel(a, b, 0.01), gm_wae.imq_kernel(a.double(), b.double(), 0.01).float())


# MMD


def looped(z_q, w_q, z_p, w_p):
    """The estimator, a pair of points at a time; c is half the dimension."""
    n, components, d = z_q.shape

    def k(a, b):
        squared = float((a - b).square().sum())
        return sum(d / 2 * s / (d / 2 * s + squared) for s in SCALES)

    value = 0.0
    for i, j in product(range(n), range(n)):
        for a, b in product(range(components), range(components)):
            if i != j:
                value += float(w_q[i, a] * w_q[j, b]) * k(z_q[i, a], z_q[j, b]) / (n * (n - 1))
                value += float(w_p[i, a] * w_p[j, b]) * k(z_p[i, a], z_p[j, b]) / (n * (n - 1))
            value -= 2 * float(w_q[i, a] * w_p[j, b]) * k(z_q[i, a], z_p[j, b]) / n**2
    return value


@pytest.mark.parametrize("n, components, d", [(4, 3, 2), (2, 1, 5), (5, 4, 3)])
def test_mmd_equals_a_double_loop(n, components, d):
    z_q, w_q, z_p = normal(n, components, d), weights(n, components), 1 + normal(n, components, d)
    w_p = weights(n, components)
    assert_close(gm_wae.mmd(z_q, w_q, z_p, w_p).item(), looped(z_q, w_q, z_p, w_p), atol=1e-10, rtol=0)


def test_mmd_is_0_on_average_where_q_is_p():
    """Within four standard errors, also if q finds the mixture with other weights, as an encoder may."""
    draws = []
    for _ in range(400):
        z_p, w_p = prior(8, 3, 4)
        k = torch.randint(3, (8,))
        z_q, w_q = prior(8, 3, 4)[0], nn.functional.one_hot(k, 3).double()
        draws.append(gm_wae.mmd(z_q, w_q, z_p, w_p))
    draws = torch.stack(draws)
    assert draws.min() < 0
    assert_close(draws.mean().item(), 0.0, atol=4 * draws.std().item() / 20, rtol=0)


def test_mmd_of_a_shifted_cloud_does_not_grow_with_n():
    values = {}
    for n in (8, 80):
        draws = []
        for _ in range(60 if n == 8 else 6):
            (z_q, w_q), (z_p, w_p) = prior(n, 2, 3), prior(n, 2, 3)
            draws.append(gm_wae.mmd(z_q + 0.7, w_q, z_p, w_p))
        values[n] = torch.stack(draws).mean()
    assert values[8] > 0.1
    assert_close(values[8], values[80], rtol=0.1, atol=0)


def test_mmd_tells_a_wide_shifted_cloud_from_the_prior():
    """The kernel's width fits: MMD(N(0, I), N(2, 9I)) is far from 0."""
    z_q, w = 3 * normal(60, 1, 10) + 2, torch.ones(60, 1).double()
    same, other = (gm_wae.mmd(z, w, normal(60, 1, 10), w) for z in (normal(60, 1, 10), z_q))
    assert other > 1 and same.abs() < 0.1


def test_descending_the_mmd_moves_a_shifted_cloud_to_the_prior():
    shift = torch.full((4,), 1.0, dtype=torch.float64, requires_grad=True)
    for _ in range(150):
        (z_q, w), (z_p, _) = prior(16, 4, 4), prior(16, 4, 4)
        loss = gm_wae.mmd(z_q + shift, w, z_p, w)
        shift.data -= 0.3 * torch.autograd.grad(loss, shift)[0]
    assert_close(shift.detach(), torch.zeros(4).double(), atol=0.1, rtol=0)


def test_descending_the_mmd_moves_weight_to_the_components_that_lack_it():
    logits = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        (z_q, _), (z_p, w_p) = prior(16, 3, 3), prior(16, 3, 3)
        loss = gm_wae.mmd(z_q, logits.softmax(0).expand(16, 3), z_p, w_p)
        logits.data -= 2 * torch.autograd.grad(loss, logits)[0]
    assert_close(logits.detach().softmax(0), torch.full((3,), 1 / 3).double(), atol=0.05, rtol=0)


# WAE


@pytest.mark.parametrize("n, shape", [(4, (1, 3, 3)), (2, (3, 2, 4)), (5, (2,))])
def test_wae_loss_equals_a_loop_over_the_components(n, shape):
    """c is the squared error of (x + 1)/2, summed over pixels and channels, and a mean over samples alone."""
    x, x_rec, q = normal(n, *shape), normal(n, 3, *shape), weights(n, 3)
    z_q, (z_p, w_p) = normal(n, 3, 4), prior(n, 3, 4)
    expected = 0.0
    for i, k in product(range(n), range(3)):
        error = (x[i] + 1) / 2 - (x_rec[i, k] + 1) / 2
        expected += float(q[i, k]) * float((error**2).sum()) / n
    loss, reconstruction, divergence = gm_wae.wae_loss(x, x_rec, q, z_q, z_p, 7.0).values()
    assert_close(reconstruction.item(), expected)
    assert_close(divergence.item(), looped(z_q, q, z_p, w_p), atol=1e-10, rtol=0)
    assert_close(loss, reconstruction + 7 * divergence)


def test_the_gradient_of_wae_loss_reaches_q_of_k():
    """∂/∂q(k|x_i) is the cost of k, over n: no sampling, no relaxation, nothing detached."""
    x, x_rec = normal(4, 1, 2, 2), normal(4, 3, 1, 2, 2)
    z_q, (z_p, _) = normal(4, 3, 5), prior(4, 3, 5)
    q, x_rec, z_q = (part.requires_grad_() for part in (weights(4, 3), x_rec, z_q))
    _, reconstruction, divergence = gm_wae.wae_loss(x, x_rec, q, z_q, z_p, 7.0).values()
    (gradient,) = torch.autograd.grad(reconstruction, q)
    assert_close(gradient, ((x[:, None] - x_rec) ** 2).sum((2, 3, 4)).detach() / 4 / 4)
    for part in torch.autograd.grad(divergence, (q, z_q)):
        assert (part != 0).all()


def test_the_reconstruction_grows_with_the_area():
    x, x_rec, q = normal(3, 1, 4, 4), normal(3, 2, 1, 4, 4), weights(3, 2)
    z = normal(3, 2, 2)
    losses = {
        "wae": lambda x, x_rec: gm_wae.wae_loss(x, x_rec, q, z, z, 1.0),
        "vae": lambda x, x_rec: gm_wae.elbo_loss(x, x_rec, q.log(), z, z, z[0], 1.0),
    }
    for loss in losses.values():
        one, double = loss(x, x_rec), loss(torch.cat([x, x], -1), torch.cat([x_rec, x_rec], -1))
        assert_close(double["reconstruction"], 2 * one["reconstruction"])
        assert_close(double["loss"] - one["loss"], one["reconstruction"])


# ELBO


def elbo_inputs(n=4, components=3, d=2, shape=(1, 2, 2)):
    """x, logits, log q(k|x), mean, log-variance, means, std"""
    mean, log_var = normal(n, components, d), normal(n, components, d)
    x, logits = torch.rand(n, *shape).double() * 2 - 1, normal(n, components, *shape)
    return x, logits, normal(n, components).log_softmax(1), mean, log_var, normal(components, d), 0.4


def test_elbo_loss_equals_a_loop_over_the_components():
    x, logits, log_q, mean, log_var, means, std = elbo_inputs()
    normals, bernoulli = torch.distributions.Normal, torch.distributions.Bernoulli
    expected = torch.zeros(3).double()
    for i in range(4):
        for k in range(3):
            q, target = log_q[i, k].exp(), (x[i] + 1) / 2
            likelihood = bernoulli(logits=logits[i, k], validate_args=False).log_prob(target).sum()
            posterior = normals(mean[i, k], log_var[i, k].exp().sqrt())
            kl = torch.distributions.kl_divergence(posterior, normals(means[k], std)).sum()
            expected += torch.stack([-q * likelihood, q * kl, q * (log_q[i, k] - math.log(1 / 3))]) / 4
    loss, *terms = gm_wae.elbo_loss(x, logits, log_q, mean, log_var, means, std).values()
    assert_close(torch.stack(terms), expected)
    assert_close(loss, expected.sum())


def test_elbo_is_exact_where_the_posterior_is():
    """If G ignores z, −ELBO at q = prior is −log p(x); K is not a factor of it."""
    logits, x = normal(2, 2, 2), torch.randint(2, (5, 2, 2, 2)).double()[:, 0] * 2 - 1
    for components in (1, 3):
        means, std = normal(components, 4), 0.7
        log_q = torch.full((5, components), -math.log(components), dtype=torch.float64)
        log_var = torch.full((5, components, 4), 2 * math.log(std), dtype=torch.float64)
        mean = means.expand(5, components, 4)
        same = logits[0].expand(5, components, 2, 2)
        loss, reconstruction, *kl = gm_wae.elbo_loss(x, same, log_q, mean, log_var, means, std).values()
        p = torch.where(x > 0, logits[0].sigmoid(), 1 - logits[0].sigmoid())
        assert_close(loss, -p.log().sum((1, 2)).mean())
        assert_close(torch.stack(kl), torch.zeros(2).double(), atol=1e-12, rtol=0)


def test_elbo_bounds_the_evidence_of_a_toy():
    """One pixel, p(x = 1|z) = sigmoid(3z), two components: true for any q, close for a good one."""
    means, std = torch.tensor([[-1.0], [1.0]]).double(), 0.5
    grid = torch.linspace(-6, 6, 4001).double()
    density = torch.stack([torch.distributions.Normal(m, std).log_prob(grid).exp() for m in means[:, 0]]) / 2
    evidence = (density.sum(0) * (3 * grid).sigmoid()).sum() * (grid[1] - grid[0])  # of x = 1
    share = (density * (3 * grid).sigmoid()).sum(1)
    share = share / share.sum()  # p(k|x = 1)
    n = 20_000
    good = (share.log(), torch.tensor([[-0.72], [1.03]]), torch.tensor([[0.40], [0.47]]))
    poor = (torch.tensor([0.5, 0.5]).log(), means, torch.tensor([[0.5], [0.5]]))
    gaps = []
    for log_q, mean, deviation in (good, poor):
        mean, log_var = mean.double().expand(n, 2, 1), 2 * deviation.double().log().expand(n, 2, 1)
        z = mean + (log_var / 2).exp() * normal(n, 2, 1)
        x = torch.ones(n, 1).double()
        log_q = log_q.double().expand(n, 2)
        loss = gm_wae.elbo_loss(x, 3 * z, log_q, mean, log_var, means, std)["loss"]
        gaps.append((loss + evidence.log()).item())
    assert -0.01 < gaps[0] < 0.05 and gaps[1] > 0.3


def test_elbo_is_finite_where_q_of_k_is_certain_and_logits_are_large():
    x, logits, _, mean, log_var, means, std = elbo_inputs()
    scores = torch.tensor([[800.0, 0, 0]]).double().expand(4, 3).clone().requires_grad_()
    logits = (1000 * logits).requires_grad_()
    loss = gm_wae.elbo_loss(x, logits, scores.log_softmax(1), mean, log_var, means, std)["loss"]
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all() and logits.grad.isfinite().all()


def test_logits_belong_to_the_pictures(configure):
    """sigmoid(logit) is (G(z) + 1)/2, for both kinds of network; and no logit comes out of a rounded tanh."""
    for network, shape in product(("conv", "mlp"), ([1, 8, 8], [3, 8, 8])):
        nets = gm_wae.networks(configure(gm_wae, shape, "--network", network))
        for net in nets.values():
            net.eval()
        z = 20 * torch.randn(4, 5)
        logits = gm_wae.generate(nets, z, logits=True)
        assert logits.shape == (4, *shape)
        assert_close(logits.sigmoid(), (gm_wae.generate(nets, z) + 1) / 2)
        with torch.no_grad():
            list(nets["generator"].parameters())[-1].fill_(1000.0)
        assert_close(gm_wae.generate(nets, z, logits=True).min().item(), 2000.0, rtol=0.1, atol=0)


# Prior


@pytest.mark.parametrize("z_dim, components", [(4, 4), (5, 2), (3, 4), (1, 2), (2, 3), (10, 11), (3, 1)])
def test_component_means_are_at_equal_distances(z_dim, components):
    means = gm_wae.component_means(settings(z_dim=z_dim, components=components))
    assert means.shape == (components, z_dim)
    distances = torch.cdist(means, means)
    assert_close(distances, math.sqrt(2) * (1 - torch.eye(components)), atol=1e-5, rtol=0)
    if components <= z_dim:
        assert torch.equal(means, torch.eye(z_dim)[:components])
    else:
        assert_close(means.mean(0), torch.zeros(z_dim), atol=1e-6, rtol=0)


def test_there_are_as_many_components_as_dimensions_unless_told():
    assert len(gm_wae.component_means(settings(z_dim=7, components=None))) == 7
    assert gm_wae.parse_args(["--device", "cpu"]).z_dim == 10


def test_too_many_components_are_refused(configure, capsys):
    with pytest.raises(ValueError, match="--components 7.* 6$") as error:
        gm_wae.networks(configure(gm_wae, [1, 32, 32], "--components", 7))
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit) as stopped:
        gm_wae.main(["--dataset", "mnist", "--data-dir", "/nowhere", "--components", "12", "--device", "cpu"])
    assert stopped.value.code == 2
    assert "--components 12" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("z_dim, components", [(4, 4), (3, 2), (3, 4)])
def test_prior(z_dim, components):
    config, n = settings(z_dim=z_dim, components=components, prior_std=0.1), 12_000
    means, z = gm_wae.component_means(config), gm_wae.draw_z(n, config, "cpu")
    assert z.shape == (n, z_dim) and z.dtype == torch.float32
    k = torch.cdist(z, means).argmin(1)  # at σ = 0.1 they are 14σ apart
    counts = torch.bincount(k, minlength=components) / n
    assert_close(counts, torch.full((components,), 1 / components), atol=5 * 0.5 / n**0.5, rtol=0)
    for i in range(components):
        for draws in (z[k == i], gm_wae.draw_z(n // components, config, "cpu", component=i)):
            error = 5 * 0.1 / len(draws) ** 0.5
            assert_close(draws.mean(0), means[i], atol=error, rtol=0)
            assert_close(draws.std(0), torch.full((z_dim,), 0.1), atol=error, rtol=0)
            assert_close(torch.corrcoef(draws.T), torch.eye(z_dim), atol=5 / len(draws) ** 0.5, rtol=0)
    assert not torch.equal(gm_wae.draw_z(5, config, "cpu"), z[:5])
    assert gm_wae.draw_z(2, config, torch.device("meta")).device.type == "meta"


def test_what_iteration_draws(start, monkeypatch):
    """Codes from q(z|k,x), and as many of each component of the prior; with --z-samples 2 two of each."""
    found, seen = start(gm_wae, [1, 8, 8], "--z-samples", 2, "--pretrain-steps", 0), []
    mean, log_var = torch.randn(6, 5, 5), torch.full((6, 5, 5), 2 * math.log(0.7))
    monkeypatch.setattr(gm_wae, "component_codes", lambda nets, x: (mean, log_var))
    monkeypatch.setattr(gm_wae, "mmd", lambda *args: seen.append(args) or args[1].sum() * 0)
    for _ in range(100):
        found.iteration()
    z_q, w_q, z_p, w_p = (torch.stack(part).detach() for part in zip(*seen, strict=True))
    assert z_q.shape == z_p.shape == (100, 6, 10, 5) and w_q.shape == w_p.shape == (100, 6, 10)
    assert_close(w_p, torch.full((100, 6, 10), 0.1))
    assert_close(w_q.sum(2), torch.ones(100, 6))
    assert torch.equal(w_q[..., :5], w_q[..., 5:])
    means, std = gm_wae.component_means(found.config).repeat(2, 1), found.config.prior_std
    for noise in ((z_q - mean.repeat(1, 2, 1)) / 0.7, (z_p - means) / std):
        assert_close(noise.mean(0), torch.zeros(6, 10, 5), atol=0.5, rtol=0)
        assert_close(noise.std(), torch.tensor(1.0), atol=0.03, rtol=0)
        pairs = noise.flatten(2).flatten(0, 1)  # each of its numbers is drawn by itself
        assert_close(torch.corrcoef(pairs.T), torch.eye(50), atol=0.25, rtol=0)


# Networks


@pytest.mark.parametrize(
    "shape, network",
    [(s, n) for s in ([1, 8, 8], [3, 16, 16]) for n in ("conv", "mlp")] + [([2], "mlp"), ([3, 7, 7], "mlp")],
    ids=str,
)
def test_shapes(shape, network, configure):
    config = configure(gm_wae, shape, "--network", network, "--components", 3)
    nets = gm_wae.networks(config)
    assert list(nets) == ["generator", "encoder", "classifier"]
    for net in nets.values():
        net.eval()
    for n in (4, 1):
        x, z = torch.rand(n, *shape) * 2 - 1, gm_wae.draw_z(n, config, "cpu")
        assert gm_wae.generate(nets, z).shape == (n, *shape)
        mean, log_var = gm_wae.component_codes(nets, x)
        assert mean.shape == log_var.shape == (n, 3, 5)
        q = gm_wae.component_probabilities(nets, x)
        assert q.shape == (n, 3)
        assert_close(q.sum(1), torch.ones(n))
        code = gm_wae.encode(nets, x)
        assert code.shape == (n, 5)
        for i in range(n):
            assert_close(code[i], mean[i, q[i].argmax()])
        hidden = gm_wae.features(nets, x)
        assert hidden.ndim == 2 and len(hidden) == n
        assert_close(nets["classifier"][-1](hidden).softmax(1), q)


def test_each_component_has_a_network_of_its_own(configure):
    nets = gm_wae.networks(configure(gm_wae, [1, 8, 8]))
    for part in (0, 1):
        nets["encoder"].zero_grad()
        gm_wae.component_codes(nets, torch.randn(6, 1, 8, 8))[part][:, 2].sum().backward()
        reached = {n.split(".")[0] for n, w in nets["encoder"].named_parameters() if (w.grad != 0).any()}
        assert reached == {"2"}


def test_points_take_no_likelihood_of_pixels(configure):
    with pytest.raises(ValueError, match="--objective vae"):
        gm_wae.networks(configure(gm_wae, [2], "--objective", "vae"))


# Training


@pytest.mark.parametrize("objective", ["wae", "vae"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_iteration(objective, samples, network, start):
    flags = ["--objective", objective, "--z-samples", samples, "--network", network, "--pretrain-steps", 2]
    found = start(gm_wae, [3, 8, 8], *flags)
    for _ in range(3):
        metrics = found.iteration()
    terms = {"wae": ["mmd"], "vae": ["kl_z", "kl_k"]}[objective]
    assert list(metrics) == ["loss", "reconstruction", *terms, "usage_min", "usage_max"]
    for value in metrics.values():
        assert value.shape == () and not value.requires_grad and value.isfinite()
    total = metrics["reconstruction"] + sum(metrics[name] for name in terms) * (
        found.config.mmd_weight if objective == "wae" else 1
    )
    assert_close(metrics["loss"], total)
    assert 0 <= metrics["usage_min"] <= 1 / 5 <= metrics["usage_max"] <= 1
    assert [name for name, *_ in found.updates] == ["generator", "encoder", "classifier"] * 3
    assert all(weight.grad is None for weight in found.nets.parameters())
    for name, before, after in found.updates:
        for other in before:
            changed = [not torch.equal(a, b) for a, b in zip(before[other][0], after[other][0], strict=True)]
            assert all(changed) if other == name else not any(changed)


@pytest.mark.parametrize("objective", ["wae", "vae"])
def test_iteration_reads_no_number_from_the_device(objective, start, monkeypatch):
    """As a CUDA graph asks: nothing in it waits for a value, or branches on one."""
    found = start(gm_wae, [1, 8, 8], "--objective", objective, "--z-samples", 2, "--pretrain-steps", 0)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(name))
        metrics = found.iteration()
    assert all(value.isfinite() for value in metrics.values())


def test_z_samples_change_no_expectation(configure):
    """S samples of each component are S copies of it of weight 1/S: every term keeps its mean, kl exactly."""
    x, logits, log_q, mean, log_var, means, std = elbo_inputs()
    copied = [log_q.repeat(1, 3) - math.log(3), *(part.repeat(1, 3, 1) for part in (mean, log_var))]
    logits = logits.repeat(1, 3, 1, 1, 1)
    one = gm_wae.elbo_loss(x, logits[:, :3], log_q, mean, log_var, means, std)
    assert_close(gm_wae.elbo_loss(x, logits, *copied, means.repeat(3, 1), std), one)


@pytest.mark.parametrize("shape", [[1, 8, 8], [2]], ids=str)
def test_pictures(shape, start, monkeypatch):
    """The columns of a picture are the components; neither the statistics nor any random number moves."""
    found = start(gm_wae, shape, "--pretrain-steps", 0, "--components", 3)
    means = gm_wae.component_means(found.config)
    found.nets.eval()
    codes, fixed_z = [], gm_wae.draw_z(64, found.config, "cpu")
    monkeypatch.setattr(gm_wae, "generate", lambda nets, z: codes.append(z) or nets["generator"](z))
    state, before = torch.get_rng_state(), [part.clone() for part in found.nets.state_dict().values()]
    with torch.no_grad():
        grids = found.pictures(fixed_z)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, found.nets.state_dict().values(), strict=True))
    assert list(grids) == ["samples", "reconstructions", "components", "components-half"]
    rows = 8 if len(shape) == 3 else 500
    whole, half = (z.unflatten(0, (rows, 3)) - means for z in codes[-2:])
    assert_close(half, whole / 2)
    assert_close(whole, whole[:, :1].expand_as(whole))  # the same noise in a row
    assert_close(whole[:, 0].std().item(), found.config.prior_std, rtol=0.5, atol=0)
    for name in ("components", "components-half"):
        x, columns = grids[name]
        assert x.shape == (rows, 3, *shape) and columns == 3


def matched(config, nets, x):
    """How far mean and standard deviation of each q(z|k) are from those of p(z|k), at most."""
    with torch.no_grad():
        mean, log_var = gm_wae.component_codes(nets, x)
        z = mean + (log_var / 2).exp() * torch.randn(200, *mean.shape)
    far = (z.mean((0, 1)) - gm_wae.component_means(config)).abs().max()
    return max(far.item(), (z.std((0, 1)) - config.prior_std).abs().max().item())


@pytest.mark.parametrize("shape", [[1, 8, 8], [2]], ids=str)
def test_pretraining_takes_every_component_to_its_prior(shape, start):
    x = torch.randint(256, (64, *shape), dtype=torch.uint8) if len(shape) == 3 else torch.randn(64, 2)
    flags, far = ["--batch-size", 64, "--components", 4, "--prior-std", 0.5], {}
    for steps in (0, 700):
        found = start(gm_wae, shape, *flags, "--pretrain-steps", steps, x_train=x)
        far[steps] = matched(found.config, found.nets, gm_wae.as_float(x))
        torch.manual_seed(found.config.seed)
        for name, net in gm_wae.networks(found.config).items():  # the others are as they were
            if name != "encoder":
                assert same(dict(net.state_dict()), dict(found.nets[name].state_dict()))
    assert far[0] > 0.5 and far[700] < 0.15


def test_moments_are_those_of_the_mixture_over_x():
    """By the law of total variance: E_x of the variances, plus the variance of the means."""
    mean, log_var, means = normal(5, 2, 3), normal(5, 2, 3), normal(2, 3)
    expected = 0.0
    for k, d in product(range(2), range(3)):
        m, v = mean[:, k, d], log_var[:, k, d].exp()
        variance = (v + m**2).mean() - m.mean() ** 2
        expected += (m.mean() - means[k, d]) ** 2 + (variance - 0.3**2) ** 2
    assert_close(gm_wae.moment_loss(mean, log_var, means, 0.3), expected)
    exact = means.expand(5, 2, 3), torch.full((5, 2, 3), 2 * math.log(0.3), dtype=torch.float64)
    assert_close(gm_wae.moment_loss(*exact, means, 0.3), torch.tensor(0.0).double(), atol=1e-14, rtol=0)


# Runs


def load(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def train(*flags):
    gm_wae.main([*POINTS, *map(str, flags)])


def test_a_run_resumes_bit_for_bit_and_pretrains_once(tmp_path, monkeypatch):
    calls, moment_loss = [], gm_wae.moment_loss
    monkeypatch.setattr(gm_wae, "moment_loss", lambda *args: calls.append(0) or moment_loss(*args))
    train("--steps", 6, "--log-every", 1, "--out", tmp_path / "whole")
    assert len(calls) == 3
    train("--steps", 2, "--log-every", 1, "--out", tmp_path / "parts")
    torch.rand(5)
    gm_wae.main(["--resume", str(tmp_path / "parts"), "--steps", "6", "--device", "cpu"])
    assert len(calls) == 6
    assert same(load(tmp_path / "whole"), load(tmp_path / "parts"))
    for name in ("metrics.csv", *(f"{n}/0000006.png" for n in ("components", "components-half", "samples"))):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    with open(tmp_path / "whole" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "loss", "reconstruction", "mmd", "usage_min", "usage_max"]


def test_step_0_holds_the_pretrained_networks(tmp_path, monkeypatch):
    """Killed in its first step, a run goes on without pre-training again."""
    run = gm_wae.run

    def killed(config, nets, optimizers, iteration, *others):
        return run(config, nets, optimizers, lambda: 1 / 0, *others)

    with monkeypatch.context() as patch:
        patch.setattr(gm_wae, "run", killed)
        with pytest.raises(ZeroDivisionError):
            train("--steps", 4, "--out", tmp_path / "run")
    assert load(tmp_path / "run")["step"] == 0
    monkeypatch.setattr(gm_wae, "moment_loss", None)
    gm_wae.main(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    monkeypatch.undo()
    train("--steps", 4, "--out", tmp_path / "whole")
    assert same(load(tmp_path / "run"), load(tmp_path / "whole"))


def test_init_starts_from_another_runs_networks(tmp_path, monkeypatch):
    train("--steps", 2, "--out", tmp_path / "first")
    monkeypatch.setattr(gm_wae, "moment_loss", None)  # without pre-training

    def stopped(config, nets, *others):
        for name, net in nets.items():
            assert same(dict(net.state_dict()), dict(first["networks"][name]))
        run(config, nets, *others)

    first, run = load(tmp_path / "first"), gm_wae.run
    with monkeypatch.context() as patch:
        patch.setattr(gm_wae, "run", stopped)
        train("--steps", 3, "--init", tmp_path / "first", "--seed", 5, "--out", tmp_path / "second")
    # It resumes without the first run.
    (tmp_path / "first" / "checkpoint.pt").unlink()
    gm_wae.main(["--resume", str(tmp_path / "second"), "--steps", "5", "--device", "cpu"])
    assert load(tmp_path / "second")["step"] == 5


@pytest.mark.parametrize("wrong", ["missing", "damaged", "foreign", "other size", "other model"])
def test_a_wrong_init_gets_one_line(wrong, tmp_path, capsys):
    first = tmp_path / "first"
    train("--steps", 1, "--out", first)
    path, saved = first / "checkpoint.pt", load(first)
    if wrong == "missing":
        path.unlink()
    elif wrong == "damaged":
        path.write_bytes(path.read_bytes()[:1000])
    elif wrong == "foreign":
        torch.save([1, 2], path)
    elif wrong == "other model":
        del saved["networks"]["classifier"]
        torch.save(saved, path)
    capsys.readouterr()
    width = ["--width", 3] if wrong == "other size" else []
    with pytest.raises(SystemExit) as stopped:
        train("--steps", 1, *width, "--init", first, "--out", tmp_path / "second")
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gm_wae.py")]
    assert len(lines) == 1 and str(first) in lines[0]
    assert not (tmp_path / "second" / "checkpoint.pt").exists()


def test_a_gm_vae_starts_from_a_gm_wae(tmp_path):
    flags = ["--dataset", "glyphs", "--image-size", 8, "--z-dim", 3, "--steps", 2, "--sample-every", 1]
    train(*flags, "--out", tmp_path / "wae")
    train(*flags, "--objective", "vae", "--init", tmp_path / "wae", "--out", tmp_path / "vae")
    header = "step,loss,reconstruction,kl_z,kl_k,usage_min,usage_max"
    train(*flags, "--objective", "vae", "--log-every", 1, "--out", tmp_path / "alone")
    assert (tmp_path / "alone" / "metrics.csv").read_text().startswith(header)
    pictures = sorted(path.parent.name for path in (tmp_path / "vae").glob("*/0000002.png"))
    assert pictures == ["components", "components-half", "reconstructions", "samples"]
