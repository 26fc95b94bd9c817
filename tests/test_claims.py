"""experiments.claims: its closed forms hold, and what it estimates has the right sign, size and place."""

import math
import re
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import random_set
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.distributions import Normal
from torch.testing import assert_close

from dcgan import generator_loss, minimax_generator_loss
from experiments import claims, wasserstein
from tools import flags
from wgan import clip_weights

ROOT = Path(__file__).parents[1]


class Score(nn.Module):
    """A critic or discriminator of one formula."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def of(rows, name):
    """A row of a table as numbers, by its first cell."""
    (row,) = (row for row in rows if row[0] == name)
    return [float(re.sub("[×%]", "", cell)) for cell in row[1:] if cell != "–"]


# Example 1


@pytest.mark.parametrize("theta", [-0.7, 0, 0.3])
def test_em_of_lines_is_what_the_best_transport_costs(theta):
    x, x_fake = wasserstein.draw_lines(theta, 500)
    cost = torch.cdist(x, x_fake)
    best = cost[linear_sum_assignment(cost.numpy())].mean().item()
    assert wasserstein.em_of_lines(theta) == abs(theta)
    assert best == pytest.approx(abs(theta), abs=0.05)


@pytest.mark.parametrize("theta", [-0.7, 0, 0.3])
def test_js_of_lines_is_what_the_best_discriminator_finds(theta):
    """Its logit is ±∞ where only one of the lines is, 0 where both are."""
    draw = partial(wasserstein.draw_lines, theta)
    best = Score(lambda x: torch.where(x[:, 0] == 0, 80.0, -80.0) * (theta != 0))
    assert wasserstein.js_of_lines(theta) == (math.log(2) if theta else 0)
    assert wasserstein.estimates(Score(lambda x: x[:, 0]), best, draw)[1] == pytest.approx(
        wasserstein.js_of_lines(theta), abs=1e-6
    )


@pytest.mark.parametrize("theta", [-1, -0.1, 0.5])
def test_the_best_critic_finds_the_em_of_lines(theta):
    draw, sign = partial(wasserstein.draw_lines, theta), math.copysign(1, theta)
    zero = Score(lambda x: 0 * x[:, 0])
    assert wasserstein.estimates(Score(lambda x: -sign * x[:, 0]), zero, draw)[0] == pytest.approx(abs(theta))
    assert wasserstein.estimates(Score(lambda x: sign * x[:, 0]), zero, draw)[0] == pytest.approx(-abs(theta))


@pytest.mark.parametrize("d, gp_weight, second", [(1, 10, True), (4, 10, True), (4, 1, False)])
def test_the_slope_under_a_penalty(d, gp_weight, second):
    """Its maximum is penalised_em; the wrong sign has a maximum of its own, at −1 + d/2λ, where d < 2λ."""
    s = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    value = s * d - gp_weight * (s.abs() - 1) ** 2
    assert (s[value.argmax()] * d).item() == pytest.approx(
        wasserstein.penalised_em(d, gp_weight), abs=1e-3 * d
    )
    tops = s[1:-1][(value[1:-1] > value[:-2]) & (value[1:-1] > value[2:])]
    assert_close(tops[tops < 0], torch.tensor([-1 + d / (2 * gp_weight)] * second, dtype=torch.float64))


@pytest.mark.parametrize("theta", [-0.5, 0.5])
def test_trained_estimates_of_lines(theta):
    draw = partial(wasserstein.draw_lines, theta)
    nets = [
        wasserstein.fit(wasserstein.network(2), loss, draw, 200)
        for loss in (wasserstein.penalised, wasserstein.logistic)
    ]
    w, js = wasserstein.estimates(*nets, draw)
    assert w == pytest.approx(wasserstein.penalised_em(0.5), abs=0.05)
    assert 0.6 < js <= math.log(2)


# Figure 2


def test_gradients_between_the_gaussians():
    x = torch.linspace(-3, 3, 61)[:, None].double()
    real, fake = Normal(-wasserstein.MEAN, wasserstein.STD), Normal(wasserstein.MEAN, wasserstein.STD)
    assert_close(wasserstein.best_logit(x), (real.log_prob(x) - fake.log_prob(x)).flatten())
    d, slope = wasserstein.best_logit(x).sigmoid(), -2 * wasserstein.MEAN / wasserstein.STD**2
    minimax = wasserstein.gradients(lambda x: minimax_generator_loss(wasserstein.best_logit(x)), x)
    assert_close(minimax, -d * slope)
    other = wasserstein.gradients(lambda x: generator_loss(wasserstein.best_logit(x)), x)
    assert_close(other, -(1 - d) * slope)
    real, fake = wasserstein.draw_gaussians(10_000)
    assert_close(torch.stack([real.mean(), fake.mean()]), torch.tensor([-2.0, 2]), atol=0.03, rtol=0)
    assert_close(torch.stack([real.std(), fake.std()]), torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)


def test_d_saturates_and_f_does_not(tmp_path):
    rows = wasserstein.gaussians(200, tmp_path / "figure.png")
    assert rows[0][1:] == ["mean |gradient|", "median", "to the data", "least / greatest"]
    for name in ("log(1 − D), optimal D", "log(1 − D)"):
        assert of(rows, name)[1] < 1e-3 and of(rows, name)[3] < 1e-3
    assert of(rows, "−log D, optimal D")[0] == pytest.approx(16, rel=0.01)
    for name in ("−F, clipped at 0.01", "−F, penalty 1", "−F, loss-sensitive"):
        assert of(rows, name)[2] == 100 and of(rows, name)[3] > 0.2
    assert of(rows, "−F, penalty 1")[0] == pytest.approx(wasserstein.penalised_em(4, 1) / 4, rel=0.2)
    assert 0 < of(rows, "−F, clipped at 0.01")[0] < 0.1


# Figure 1b


def test_activation_gradients_are_products_of_the_later_weights():
    """Where the slope is 1, F is linear."""
    critic = wasserstein.network(2, units=3, layers=3, slope=1)
    matrices = [layer.weight.detach().double() for layer in critic if isinstance(layer, nn.Linear)]
    expected = [torch.linalg.multi_dot(matrices[:i:-1]) if i < 2 else matrices[-1] for i in range(3)]
    expected = [product.norm().item() for product in expected]
    assert wasserstein.activation_gradients(critic, torch.randn(7, 2)) == pytest.approx(expected)
    assert critic[1].weight.dtype == torch.float32


def test_weights_at_the_ends():
    critic = wasserstein.network(2, units=4, layers=1)
    with torch.no_grad():
        critic[1].weight.copy_(torch.tensor([[0.1, -0.1], [0.0995, 0.098], [0, -0.0985], [0.05, -0.0999]]))
        critic[4].weight.zero_()
        critic[4].bias.fill_(0.1)
    assert wasserstein.share_at(critic, 0.1) == pytest.approx(4 / 12)
    clip_weights(critic, 0.01)
    assert wasserstein.share_at(critic, 0.01) == pytest.approx(7 / 12)


@pytest.mark.parametrize("clip", [None, 0.02])
def test_fit_clips_where_it_is_told_to(clip):
    net = wasserstein.fit(
        wasserstein.network(1), wasserstein.wasserstein, wasserstein.draw_gaussians, 5, clip=clip
    )
    assert (max(weight.abs().max() for weight in net.parameters()) <= 0.02) == (clip is not None)


def test_clipped_gradients_explode_or_vanish(tmp_path):
    rows = wasserstein.depth(25, tmp_path / "figure.png")
    assert rows[0][1:3] == ["first layer", "last layer"] and rows[0][4:] == ["at ±c at first", "at last"]
    first, last, factor = of(rows, "before training")
    assert first < 1e-2 * last and factor == pytest.approx((first / last) ** (1 / 11), rel=0.01)
    for c in (0.001, 0.01):
        assert 0 < of(rows, f"clipped at {c}")[0] < 1e-6 * of(rows, f"clipped at {c}")[1]
        assert of(rows, f"clipped at {c}")[4] > 80
    first, last, factor, before, after = of(rows, "clipped at 0.1")
    assert first > 100 * last and factor > 1.5 and before < 1 < after
    assert of(rows, "penalty 10")[2] > of(rows, "before training")[2] * 1.3


# Section 4.3


def test_the_cosine_of_updates_and_gradients(configure):
    """1 for the steepest descent, −1 for the steepest ascent, and between them with momentum."""
    config = configure(import_module("wgan"), [1, 16, 16], "--lr", 1e-4)
    sets = [random_set(50, [1, 16, 16], 10)] * 2
    up = partial(torch.optim.SGD, maximize=True)
    for rule, cosine in ((torch.optim.SGD, 1), (up, -1)):
        w, cosines = wasserstein.trained_by(rule, config, sets, 2)
        assert len(w) == 2 and cosines == pytest.approx([cosine] * 10, abs=1e-3)
    _, cosines = wasserstein.trained_by(wasserstein.RULES["Adam, β1 0.9"], config, sets, 2)
    assert cosines[0] > 0 and max(map(abs, cosines)) < 0.999


# The command


def test_the_command(tmp_path, capsys):
    """Every claim follows from the seed, whatever is checked beside it; the figures are small."""

    def printed(*flags):
        claims.main([*flags, "--steps", "2", "--out", str(tmp_path / "out")])
        return capsys.readouterr().out

    every = printed()
    assert [name for name in claims.CLAIMS if f"{name}, 2 steps, seed 0" not in every] == []
    assert printed("gaussians").split("\n\n")[0] == every.split("\n\n")[1]
    assert printed("gaussians", "--seed", "1").split("\n")[2:10] != every.split("\n\n")[1].split("\n")[2:10]
    for name in claims.CLAIMS:
        assert 5_000 < (tmp_path / f"out/claims-{name}.png").stat().st_size < 150_000


@pytest.mark.parametrize("argv", [["nothing"], ["--steps", "0"], ["lines", "--out", "taken"]], ids=str)
def test_a_mistake_is_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("")
    with pytest.raises(SystemExit) as stopped:
        claims.main(argv)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_missing_package_is_told_at_once(monkeypatch, capsys):
    monkeypatch.setattr(flags, "find_spec", lambda package: None)
    with pytest.raises(SystemExit):
        claims.main(["lines"])
    assert "matplotlib is missing: pip install -r requirements-dev.txt" in capsys.readouterr().err


def test_the_document():
    """It names every command and shows its figure."""
    document = (ROOT / "docs/claims.md").read_text(encoding="utf-8")
    for name in claims.CLAIMS:
        assert f"python -m experiments.claims {name}" in document and f"(claims-{name}.png)" in document
        assert (ROOT / f"docs/claims-{name}.png").stat().st_size < 150_000
