"""Claims of the WGAN papers, without a data set; networks and losses are those of the model files.

A claim is a function of the number of training steps and the path of its figure; it returns its table.
"""

import math
from copy import deepcopy
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

import loss_sensitive_gan
import wgan
from common import load_data, sample_batch
from dcgan import discriminator_loss, generator_loss, js_estimate, minimax_generator_loss
from tools import figures
from tools.runs import load_sets
from wgan import clip_weights, critic_loss
from wgan import generator_loss as critic_generator_loss
from wgan_gp import gradient_penalty, mlp

BATCH, MANY = 256, 10_000  # samples in a step of training; samples that a result is taken on
GP_WEIGHT, CLIP = 10, 0.01  # as published for WGAN-GP and WGAN
MARGIN_WEIGHT = loss_sensitive_gan.DEFAULTS["margin_weight"]
GP_WEIGHTS = (GP_WEIGHT, 1)  # of the second there is one best critic, see penalised_em
THETAS = (-1, -0.5, -0.1, 0, 0.1, 0.5, 1)
MEAN, STD = 2, 0.5  # of the Gaussians: data N(−2, ½²), fakes N(2, ½²)
CLIPS, LAYERS, UNITS, LR = (0.001, 0.01, 0.1), 12, 128, 5e-4  # of the deep critics
RULES = {"RMSProp": torch.optim.RMSprop}  # of WGAN's critic
RULES |= {f"Adam, β1 {beta}": partial(torch.optim.Adam, betas=(beta, 0.99)) for beta in (0.0, 0.9)}
LRS = (5e-4, 5e-3)  # WGAN's 5e-5 is slow here

# Training to optimality


def network(n_in, units=64, layers=2, slope=0.2):
    """x (N, n_in) → (N,): the mlp of the model files."""
    return nn.Sequential(*mlp(n_in, 1, units, layers, slope=slope), nn.Flatten(0))


def wasserstein(critic, x, x_fake):
    """The loss of a critic; WGAN's if `fit` clips the weights."""
    return critic_loss(critic(x), critic(x_fake))


def penalised(critic, x, x_fake, gp_weight=GP_WEIGHT):
    """The loss of WGAN-GP's critic."""
    return wasserstein(critic, x, x_fake) + gp_weight * gradient_penalty(critic, x, x_fake)


def logistic(discriminator, x, x_fake):
    """The loss of a discriminator."""
    return discriminator_loss(discriminator(x), discriminator(x_fake))


def loss_sensitive(critic, x, x_fake, margin_weight=MARGIN_WEIGHT):
    """The loss of the loss-sensitive GAN's critic, which is low where samples are real."""
    margin = loss_sensitive_gan.margin(x, x_fake)
    return loss_sensitive_gan.critic_loss(critic(x), critic(x_fake), margin, margin_weight)


def fit(net, loss, draw, steps, lr=1e-3, clip=None):
    """Minimise loss(net, x, x_fake) with (x, x_fake) = draw(n); the learning rate falls to 0 on the way."""
    kind = partial(torch.optim.Adam, betas=(0.5, 0.9)) if clip is None else torch.optim.RMSprop
    optimizer = kind(net.parameters(), lr)
    for step in tqdm(range(steps), disable=None, leave=False):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        value = loss(net, *draw(BATCH))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if clip is not None:
            clip_weights(net, clip)
    return net


def gradients(loss, x):
    """∂ℓ/∂x at each of the x (N, 1), where `loss` is the mean of ℓ over them."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x) * len(x), x)[0].flatten()


# Example 1 of WGAN


def em_of_lines(theta):
    """W(P_0, P_θ), P_θ being uniform on {θ} × [0, 1]."""
    return abs(theta)


def js_of_lines(theta):
    """JS(P_0, P_θ)."""
    return math.log(2) if theta else 0.0


def penalised_em(distance, gp_weight=GP_WEIGHT):
    """The W of the best critic with a penalty between points this far apart: its slope is 1 + d/2λ.

    For a slope s it maximises s·d − λ(|s| − 1)², which has a second maximum at s = −1 + d/2λ where d < 2λ.
    """
    return distance * (1 + distance / (2 * gp_weight))


def draw_lines(theta, n):
    """n points of P_0 and n of P_θ, independent of each other."""
    y = torch.rand(2, n)
    return torch.stack([torch.zeros(n), y[0]], 1), torch.stack([torch.full((n,), float(theta)), y[1]], 1)


@torch.no_grad()
def estimates(critic, discriminator, draw):
    """The W and the JS that the two tell on fresh samples."""
    x, x_fake = draw(MANY)
    w = -critic_loss(critic(x), critic(x_fake))
    return w.item(), js_estimate(discriminator(x), discriminator(x_fake)).item()


def lines(steps, path):
    """The table and the figure of example 1."""
    rows, found = [["θ", "EM", "EM, penalised", "W estimate", "JS", "JS estimate"]], []
    for theta in THETAS:
        draw = partial(draw_lines, theta)
        nets = [fit(network(2), loss, draw, steps) for loss in (penalised, logistic)]
        w, js = estimates(*nets, draw)
        found.append((w, js))
        numbers = em_of_lines(theta), penalised_em(abs(theta)), w, js_of_lines(theta), js
        rows.append([f"{theta:g}", *(f"{number:.4f}" for number in numbers)])
    figure, panels = figures.axes(1, 2)
    for i, (panel, name, of) in enumerate(zip(panels, ("EM", "JS"), (em_of_lines, js_of_lines), strict=True)):
        at = (-1, -1e-9, 0, 1e-9, 1)
        panel.plot(at, [of(theta) for theta in at], color="0.5", label=f"{name}, closed form")
        panel.plot(THETAS, [pair[i] for pair in found], "o", label="estimate")
        panel.set(xlabel="θ", xticks=(-1, -0.5, 0, 0.5, 1), title=f"{name} of two parallel lines")
    biased = [penalised_em(abs(theta)) for theta in THETAS]
    panels[0].plot(THETAS, biased, "k:", label="EM with the penalty's bias")
    for panel in panels:
        panel.legend(fontsize="x-small")
    figures.save(figure, path)
    return rows


# Figure 2 of WGAN


def draw_gaussians(n):
    """n samples of the data and n fakes, (n, 1) each."""
    return -MEAN + STD * torch.randn(n, 1), MEAN + STD * torch.randn(n, 1)


def best_logit(x):
    """log p_data(x) − log p_fake(x), the logit of the optimal discriminator."""
    return (-2 * MEAN / STD**2 * x).flatten()


def gaussians(steps, path):
    """The table and the figure of figure 2."""
    d, critics = fit(network(1), logistic, draw_gaussians, steps), {}
    critics[f"clipped at {CLIP}"] = fit(network(1), wasserstein, draw_gaussians, steps, clip=CLIP)
    for weight in GP_WEIGHTS:
        loss = partial(penalised, gp_weight=weight)
        critics[f"penalty {weight}"] = fit(network(1), loss, draw_gaussians, steps)
    low = fit(network(1), loss_sensitive, draw_gaussians, steps)
    critics["loss-sensitive"] = lambda x: -low(x)
    losses = {
        "log(1 − D), optimal D": lambda x: minimax_generator_loss(best_logit(x)),
        "log(1 − D)": lambda x: minimax_generator_loss(d(x)),
        "−log D, optimal D": lambda x: generator_loss(best_logit(x)),
        "−log D": lambda x: generator_loss(d(x)),
    }
    losses |= {f"−F, {name}": lambda x, f=f: critic_generator_loss(f(x)) for name, f in critics.items()}
    _, x_fake = draw_gaussians(MANY)
    between = torch.linspace(-MEAN, MEAN, 1001)[:, None]
    rows = [["loss of G", "mean |gradient|", "median", "to the data", "least / greatest"]]
    for name, loss in losses.items():
        here, slopes = gradients(loss, x_fake), gradients(loss, between).abs()
        sizes = f"{here.abs().mean():.3g}", f"{here.abs().median():.3g}"
        rows.append([name, *sizes, f"{(here > 0).float().mean():.1%}", f"{slopes.min() / slopes.max():.2g}"])
    x, ends = torch.linspace(-2 * MEAN, 2 * MEAN, 401)[:, None], torch.tensor([[-1.0], [1.0]]) * MEAN
    figure, (panel,) = figures.axes(width=6.5, height=4)
    for mean, name in zip(ends, ("data", "fakes"), strict=True):
        density = torch.exp(-(((x - mean) / STD) ** 2) / 2)
        panel.fill_between(x[:, 0], density[:, 0], alpha=0.25, label=f"density of {name}, scaled")
    with torch.no_grad():
        panel.plot(x, d(x).sigmoid(), color="k", label="D")
        for name, f in critics.items():
            scaled = 0.5 + (f(x) - f(ends).mean()) / f(ends).diff().abs()
            panel.plot(x, scaled, label=f"F, {name}, scaled to differ by 1 at the means")
    panel.set(xlabel="x", ylim=(-0.9, 1.6), title="D and F between two Gaussians")
    panel.legend(fontsize="x-small", loc="lower left")
    figures.save(figure, path)
    return rows


# Figure 1b of WGAN-GP


def activation_gradients(critic, x):
    """The mean norm of ∂F/∂h over x for each hidden layer's activations h, from the input on."""
    critic, x, activations = deepcopy(critic).double(), x.double(), []  # floats end at 1e-45
    for layer in critic:
        x = layer(x)
        if isinstance(layer, nn.LeakyReLU):
            activations.append(x)
    gradients = torch.autograd.grad(x.sum(), activations)
    return [gradient.norm(dim=1).mean().item() for gradient in gradients]


def weights_of(critic):
    """All entries of the weight matrices; no biases."""
    return torch.cat([layer.weight.detach().flatten() for layer in critic if isinstance(layer, nn.Linear)])


def share_at(critic, c):
    """The share of weights within 1 % of −c or c."""
    return (weights_of(critic).abs() > 0.99 * c).float().mean().item()


def depth(steps, path):
    """The table and the figure of figure 1b; the fakes are the swiss roll's points with noise N(0, I)."""
    x_train, _ = load_data("swissroll", "data", "train", 0, "cpu")

    def draw(n):
        return sample_batch(x_train, n, "cpu"), sample_batch(x_train, n, "cpu") + torch.randn(n, 2)

    rows = [["critic", "first layer", "last layer", "per layer back", "at ±c at first", "at last"]]
    figure, (left, middle, right) = figures.axes(1, 3)
    start = network(2, UNITS, LAYERS, slope=0)
    for i, c in enumerate(["start", *CLIPS, None]):
        critic, name, shares = deepcopy(start), "before training", ["–", "–"]
        if c is None:
            name = f"penalty {GP_WEIGHT}"
            fit(critic, penalised, draw, steps, LR)
        elif c in CLIPS:
            name = f"clipped at {c}"
            clip_weights(critic, c)
            before = share_at(critic, c)
            fit(critic, wasserstein, draw, steps, LR, clip=c)
            shares = [f"{share:.1%}" for share in (before, share_at(critic, c))]
        norms = activation_gradients(critic, x_train[:MANY])
        factor = (norms[0] / norms[-1]) ** (1 / (LAYERS - 1))
        rows.append([name, f"{norms[0]:.3g}", f"{norms[-1]:.3g}", f"× {factor:.3g}", *shares])
        left.semilogy(range(1, LAYERS + 1), norms, "o-", color=f"C{i}", label=name)
        panel, scale = (middle, c) if c in CLIPS else (right, 1)
        settings = {"density": True, "histtype": "step", "color": f"C{i}", "label": name}
        panel.hist((weights_of(critic) / scale).numpy(), 101, **settings)
    left.set(xlabel="hidden layer", title="mean ‖∂F/∂h‖")
    middle.set(xlabel="weight / c", title="weights, clipped", yscale="log")
    right.set(xlabel="weight", title="weights, not clipped", yscale="log")
    for panel in (left, middle, right):
        panel.legend(fontsize="x-small")
    figures.save(figure, path)
    return rows


# Section 4.2 of WGAN: momentum


def trained_by(rule, config, sets, steps):
    """wgan.py on these sets with this rule for its critic: W in each step, and the cosine between each of
    the critic's updates, before the clipping, and its gradient downhill.

    Of the same config.seed all rules have the same initial weights and the same batches.
    """
    torch.manual_seed(config.seed)
    nets, optimizers, iteration, _ = wgan.build(config, *sets)
    weights, before, cosines = list(nets["critic"].parameters()), [], []
    optimizers["critic"] = rule(weights, config.lr)

    def flat(tensors):
        return torch.cat([tensor.detach().flatten() for tensor in tensors])

    def remember(*_):
        before[:] = flat(weights), flat(weight.grad for weight in weights)

    def compare(*_):
        update = flat(weights) - before[0]
        cosines.append(torch.cosine_similarity(update, -before[1], dim=0).item())

    optimizers["critic"].register_step_pre_hook(remember)
    optimizers["critic"].register_step_post_hook(compare)
    return [iteration()["W"].item() for _ in tqdm(range(steps), disable=None, leave=False)], cosines


def momentum(steps, path):
    """The table and the figure of section 4.2's remark, on glyphs of 16 pixels.

    W through a running median over a tenth of the steps.
    """
    rows = [["critic's rule", "learning rate", "W, greatest", "W, at last", "cosine", "cosine < 0"]]
    figure, panels = figures.axes(1, len(LRS))
    config = wgan.parse_args(["--width", "8", "--image-size", "16", "--device", "cpu"])
    config.seed = torch.initial_seed()  # that of experiments.claims
    sets = load_sets(config)
    for panel, lr in zip(panels, LRS, strict=True):
        config.lr = lr
        for name, rule in RULES.items():
            w, cosines = trained_by(rule, config, sets, steps)
            tenth, cosines = max(1, steps // 10), torch.tensor(cosines)
            w = torch.tensor(w).unfold(0, tenth, 1).median(1)[0]
            row = [name, f"{lr:g}", f"{w.max():.4f}", f"{w[-1]:.4f}", f"{cosines.mean():.2f}"]
            rows.append([*row, f"{(cosines < 0).float().mean():.1%}"])
            panel.plot(range(tenth, steps + 1), w, label=name)
        panel.set(xlabel="step", title=f"W at a learning rate of {lr:g}")
        panel.legend(fontsize="x-small")
    figures.save(figure, path)
    return rows
