"""BiGAN: its losses, one forward pass for three updates, the learning rate's decay, the paper's networks."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bigan

POINTS, GREY, COLOUR = [2], [1, 8, 8], [3, 8, 8]
CASES = [(COLOUR, []), (GREY, ["--network", "mlp"]), (POINTS, [])]
TINY = ["--dataset", "ring", "--device", "cpu", "--width", "2", "--batch-size", "4"]
each_case = pytest.mark.parametrize("shape, flags", CASES, ids=["conv", "mlp", "points"])


def logits(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def of_kind(net, *kinds):
    return [module for module in net.modules() if isinstance(module, kinds)]


def weights(run):
    return {name: [weight.detach().clone() for weight in net.parameters()] for name, net in run.nets.items()}


def gradients(run):
    """{network: its gradients in the latest update}, seen by the hooks of `start`."""
    return {name: before[name][1] for name, before, _ in run.updates}


# Losses


def test_losses_where_the_discriminator_cannot_tell():
    for loss in (bigan.discriminator_loss, bigan.generator_encoder_loss):
        assert_close(loss(logits(0, 0, 0), logits(0, 0)).detach(), torch.tensor(2 * math.log(2)).double())


def test_losses_are_cross_entropies():
    """D: 1 for (x, E(x)) and 0 for (G(z), z); G and E: the other way round."""
    d_real, d_fake = logits(-1.5, 0.3, 4), logits(2, -0.7)
    real = [1 / (1 + math.exp(-d)) for d in d_real.tolist()]
    fake = [1 / (1 + math.exp(-d)) for d in d_fake.tolist()]
    right = -sum(map(math.log, real)) / 3 - sum(math.log(1 - p) for p in fake) / 2
    swapped = -sum(math.log(1 - p) for p in real) / 3 - sum(map(math.log, fake)) / 2
    assert_close(bigan.discriminator_loss(d_real, d_fake).item(), right, rtol=1e-12, atol=0)
    assert_close(bigan.generator_encoder_loss(d_real, d_fake).item(), swapped, rtol=1e-12, atol=0)


def test_swapping_the_pairs_swaps_the_losses():
    d_real, d_fake = logits(-1.5, 0.3, 4), logits(2, -0.7)
    assert_close(bigan.generator_encoder_loss(d_real, d_fake), bigan.discriminator_loss(d_fake, d_real))
    assert_close(bigan.discriminator_loss(d_real, d_fake), bigan.generator_encoder_loss(d_fake, d_real))
    assert bigan.discriminator_loss(d_real, d_fake) != bigan.generator_encoder_loss(d_real, d_fake)


def test_gradients_of_the_losses():
    d_real, d_fake = logits(-1.5, 0.3, 4), logits(2, -0.7)
    real, fake = d_real.detach().sigmoid(), d_fake.detach().sigmoid()
    found = torch.autograd.grad(bigan.discriminator_loss(d_real, d_fake), (d_real, d_fake))
    assert_close(found, ((real - 1) / 3, fake / 2))
    found = torch.autograd.grad(bigan.generator_encoder_loss(d_real, d_fake), (d_real, d_fake))
    assert_close(found, (real / 3, (fake - 1) / 2))


def test_losses_of_a_sure_discriminator():
    """Nothing overflows, and what G and E learn from does not vanish."""
    d_real, d_fake = (torch.tensor([d], requires_grad=True) for d in (120.0, -120.0))
    assert bigan.discriminator_loss(d_real, d_fake).item() == 0
    loss = bigan.generator_encoder_loss(d_real, d_fake)
    loss.backward()
    assert (loss.item(), d_real.grad.item(), d_fake.grad.item()) == (240, 1, -1)


# The updates


@pytest.fixture
def double(monkeypatch):
    """Everything in float64."""
    sample_batch = bigan.sample_batch
    monkeypatch.setattr(bigan, "sample_batch", lambda *args: sample_batch(*args).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def adam(net, grads, moments, t, lr):
    """One step of Adam (0.5, 0.999) with L2 2.5e-5, written out."""
    for i, (weight, grad) in enumerate(zip(net.parameters(), grads, strict=True)):
        grad = grad + 2.5e-5 * weight.detach()
        m, v = moments.get(i, (0, 0))
        m, v = 0.5 * m + 0.5 * grad, 0.999 * v + 0.001 * grad**2
        moments[i] = m, v
        weight.data -= lr * (m / (1 - 0.5**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


@each_case
def test_all_three_are_updated_from_one_forward_pass(shape, flags, double, start):
    """The weights and the batch norms' statistics after four steps, worked out again, with a decay."""
    decay = ["--decay-start", 1, "--decay-end", 3, "--lr", 1e-3]
    run = start(bigan, shape, *flags, *decay)
    nets, moments = copy.deepcopy(run.nets), {name: {} for name in run.nets}
    generator, encoder, discriminator = nets["generator"], nets["encoder"], nets["discriminator"]
    for draws in run.draws.values():
        draws.clear()
    for t, lr in enumerate([1e-3, 1e-3, 1e-4, 1e-5], start=1):
        metrics = run.iteration()
        ((x, z),) = zip(run.draws["x"], run.draws["z"], strict=True)
        for draws in run.draws.values():
            draws.clear()
        d_real, d_fake = discriminator(x, encoder(x)), discriminator(generator(z), z)
        right = nn.functional.binary_cross_entropy_with_logits
        ones, zeros = torch.ones_like(d_real), torch.zeros_like(d_real)
        swapped = right(d_real, zeros) + right(d_fake, ones)
        losses = {"generator": swapped, "encoder": swapped}
        losses["discriminator"] = right(d_real, ones) + right(d_fake, zeros)
        grads = {
            name: torch.autograd.grad(loss, [*nets[name].parameters()], retain_graph=True)
            for name, loss in losses.items()
        }
        for name, net in nets.items():
            adam(net, grads[name], moments[name], t, lr)
            assert_close(net.state_dict(), run.nets[name].state_dict(), rtol=1e-7, atol=1e-10)
        assert_close(metrics["discriminator_loss"], losses["discriminator"].detach())
        assert_close(metrics["generator_encoder_loss"], swapped.detach())
        assert_close(metrics["D(x)"], d_real.detach().sigmoid().mean())
        assert_close(metrics["D(G(z))"], d_fake.detach().sigmoid().mean())
    assert max((weight - old).abs().max() for net in run.nets for weight, old in pairs(run, net)) > 1e-3


def pairs(run, name):
    """The weights of a network now and at first."""
    return zip(run.nets[name].parameters(), run.initial[name][0], strict=True)


@each_case
def test_each_network_is_run_once_for_each_half(shape, flags, start):
    run, calls = start(bigan, shape, *flags), []
    for name, net in run.nets.items():
        net.register_forward_hook(lambda *_, name=name: calls.append(name))
    run.iteration()
    run.iteration()
    assert sorted(calls) == 4 * ["discriminator"] + 2 * ["encoder"] + 2 * ["generator"]
    assert sorted(name for name, *_ in run.updates) == sorted(2 * [*run.nets])
    assert all(weight.grad is None for weight in run.nets.parameters())


@each_case
@pytest.mark.parametrize("term", ["discriminator_loss", "generator_encoder_loss"])
def test_each_loss_reaches_its_networks_and_no_others(shape, flags, term, start, monkeypatch):
    """With the other loss 0, its networks have no gradient, and these the same as with both."""
    found = {}
    for alone in (False, True):
        for other in {"discriminator_loss", "generator_encoder_loss"} - {term}:
            if alone:
                monkeypatch.setattr(bigan, other, lambda *scores: 0 * sum(d.mean() for d in scores))
        x = torch.arange(50 * math.prod(shape)).view(50, *shape) * 37 % 256
        run = start(bigan, shape, *flags, x_train=x / 128 - 1 if shape == POINTS else x.byte())
        run.iteration()
        found[alone] = gradients(run)
    own = ["discriminator"] if term == "discriminator_loss" else ["generator", "encoder"]
    for name in run.nets:
        if name in own:
            assert equal(found[True][name], found[False][name])
            assert max(grad.abs().max() for grad in found[True][name]) > 1e-7
        else:
            assert all((grad == 0).all() for grad in found[True][name])


@each_case
@pytest.mark.parametrize("half, reached", [(0, "encoder"), (1, "generator")])
def test_each_half_of_the_joint_loss_reaches_one(shape, flags, half, reached, start, monkeypatch):
    """−E log(1 − D(x, E(x))) alone teaches E, −E log D(G(z), z) alone teaches G."""
    both = bigan.generator_encoder_loss

    def one(*scores):
        return both(*(d if i == half else d.detach() for i, d in enumerate(scores)))

    monkeypatch.setattr(bigan, "generator_encoder_loss", one)
    run = start(bigan, shape, *flags)
    run.iteration()
    for name, grads in gradients(run).items():
        assert any(grad is not None and (grad != 0).any() for grad in grads) == (
            name in (reached, "discriminator")
        )


@each_case
def test_a_constant_discriminator_teaches_nothing(shape, flags, start):
    """No reconstruction term: all that G and E learn comes through D."""
    run = start(bigan, shape, *flags)
    run.iteration()
    assert all((grad != 0).any() for name in ("generator", "encoder") for grad in gradients(run)[name][-2:])
    nn.init.zeros_(of_kind(run.nets["discriminator"], nn.Linear)[-1].weight)
    run.iteration()
    for name in ("generator", "encoder"):
        assert all((grad == 0).all() for grad in gradients(run)[name])


# The optimisers and their learning rate


@pytest.mark.parametrize("lr", [None, 3e-4])
@each_case
def test_optimizers(shape, flags, lr, start):
    run = start(bigan, shape, *flags, *(["--lr", lr] if lr else []))
    for optimizer in run.optimizers.values():
        assert type(optimizer) is torch.optim.Adam
        (group,) = optimizer.param_groups
        assert_close(float(group["lr"]), lr or 2e-4)
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.999), 1e-8, 2.5e-5)
        assert not group["amsgrad"] and not group.get("decoupled_weight_decay")


def rates(run, n):
    """The learning rates of the next n steps, as each optimiser has it when it steps."""
    found = {name: [] for name in run.optimizers}
    hooks = [
        optimizer.register_step_pre_hook(
            lambda o, *_, name=name: found[name].append(o.param_groups[0]["lr"].item())
        )
        for name, optimizer in run.optimizers.items()
    ]
    for _ in range(n):
        run.iteration()
    for hook in hooks:
        hook.remove()
    first, *others = found.values()
    assert len(first) == n and all(other == first for other in others)
    return first


@pytest.mark.parametrize("steps", [4, 1000])
def test_the_learning_rate_decays_by_absolute_steps(steps, start):
    flags = ["--steps", steps, "--lr", 0.01, "--decay-start", 3, "--decay-end", 7]
    expected = 4 * [0.01] + [0.01 * 0.01 ** (late / 4) for late in (1, 2, 3, 4)] + 3 * [1e-4]
    assert_close(rates(start(bigan, POINTS, *flags), 11), expected, rtol=1e-5, atol=0)


def test_the_papers_decay(start):
    """200 epochs of MNIST, 469 batches each, at one rate, 200 down to a hundredth."""
    run = start(bigan, GREY, "--network", "mlp")
    assert_close(rates(run, 3), 3 * [2e-4])
    for step, share in [(93_799, 1), (93_800, 1), (140_700, 0.1), (187_600, 0.01), (300_000, 0.01)]:
        for optimizer in run.optimizers.values():
            for state in optimizer.state.values():
                state["step"].fill_(step)
        assert_close(rates(run, 1), [share * 2e-4], rtol=1e-5, atol=0)


@pytest.mark.parametrize("end", [1, 3])
def test_a_decay_that_ends_before_it_starts_falls_at_once(end, start):
    run = start(bigan, POINTS, "--lr", 0.01, "--decay-start", 3, "--decay-end", end)
    assert_close(rates(run, 6), 4 * [0.01] + 2 * [1e-4], rtol=1e-5, atol=0)


def test_no_rate_is_read_on_the_host(start, monkeypatch):
    """An iteration neither waits for the device nor makes a new tensor of the rate, which a graph needs."""
    run = start(bigan, POINTS, "--decay-start", 1, "--decay-end", 4)
    run.iteration()
    before = [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers.values()]

    def item(self, *_):
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, item)
        run.iteration()
        run.iteration()
    for optimizer, lr in zip(run.optimizers.values(), before, strict=True):
        assert optimizer.param_groups[0]["lr"] is lr
        assert isinstance(lr, torch.Tensor) and 0 < lr.item() < 1e-4


def flat(value, where=""):
    """{place: value} of everything in a checkpoint, tensors as bytes."""
    if isinstance(value, dict):
        return {at: leaf for key in value for at, leaf in flat(value[key], f"{where}/{key}").items()}
    if isinstance(value, list | tuple):
        return flat(dict(enumerate(value)), where)
    return {where: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


def load(out):
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    return flat({key: saved[key] for key in saved.keys() - {"config"}})


def main(*flags):
    bigan.main([str(flag) for flag in flags])


@pytest.mark.parametrize("first", [2, 3, 5, 8])
def test_resuming_across_the_decay_is_exact(first, tmp_path):
    """N steps and M more are N + M steps, wherever the decay is; without a decay they are others."""
    flags = [*TINY, "--lr", 0.01, "--log-every", 1]
    decay = ["--decay-start", 3, "--decay-end", 7]
    whole, parts, level = (tmp_path / name for name in ("whole", "parts", "level"))
    main(*flags, *decay, "--steps", 10, "--out", whole)
    main(*flags, *decay, "--steps", first, "--out", parts)
    main("--resume", parts, "--steps", 10, "--device", "cpu")
    main(*flags, "--steps", 10, "--out", level)
    assert load(whole) == load(parts)
    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
    assert (whole / "metrics.csv").read_bytes() != (level / "metrics.csv").read_bytes()


def test_another_decay_is_another_run(tmp_path, capsys):
    main(*TINY, "--steps", 1, "--out", tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        main("--resume", tmp_path / "run", "--steps", 2, "--decay-start", 5, "--device", "cpu")
    assert stopped.value.code == 2 and "--decay-start" in capsys.readouterr().err


# The prior and the networks


def test_prior(configure):
    config = configure(bigan, GREY, "--z-dim", 3)
    z = bigan.draw_z(60_000, config, torch.device("cpu"))
    assert config.prior == "uniform" and z.shape == (60_000, 3) and z.dtype == torch.float32
    assert z.abs().max() <= 1 and z.min() < -0.999 and z.max() > 0.999
    quantiles = torch.quantile(z, torch.linspace(0, 1, 11), dim=0)
    assert_close(quantiles, torch.linspace(-1, 1, 11)[:, None].expand(11, 3), atol=0.02, rtol=0)
    assert_close(z.T.cov(), torch.eye(3) / 3, atol=0.01, rtol=0)


def test_the_papers_settings_for_mnist():
    config = bigan.parse_args(["--dataset", "mnist", "--network", "mlp", "--device", "cpu"])
    assert (config.z_dim, config.batch_size, config.lr, 8 * config.width) == (50, 128, 2e-4, 1024)
    assert bigan.parse_args(["--device", "cpu"]).width == 64
    assert bigan.parse_args(["--network", "mlp", "--width", "7", "--device", "cpu"]).width == 7


def test_points_have_one_setting_with_or_without_naming_the_network():
    implied, named = (
        vars(bigan.parse_args(["--dataset", "ring", *more, "--device", "cpu"]))
        for more in ([], ["--network", "mlp"])
    )
    assert implied == named
    assert (implied["network"], implied["width"], implied["z_dim"], implied["batch_size"]) == (
        "mlp",
        64,
        2,
        256,
    )


LETTERS = {nn.Linear: "F", nn.BatchNorm1d: "B", nn.LeakyReLU: "L", bigan.Squash: "H"}
LETTERS |= {nn.Flatten: "", nn.Unflatten: "", nn.Identity: ""}


@pytest.mark.parametrize("shape", [GREY, POINTS], ids=["images", "points"])
def test_layers_of_the_mlps(shape, configure):
    """As in the paper: E has batch norm in its second layer only, so has D, G in both; points have none."""
    nets = bigan.networks(configure(bigan, shape, "--network", "mlp", "--width", 3))
    expected = {"generator": "FBLFBLFH", "encoder": "FLFBLFH", "discriminator": "FLFBLF"}
    for name, net in nets.items():
        spelled = "".join(LETTERS[type(module)] for module in net.modules() if not list(module.children()))
        wanted = expected[name] if shape == GREY else expected[name].replace("B", "")
        assert spelled == (wanted[:-1] if shape == POINTS and name == "generator" else wanted)
        slopes = {layer.negative_slope for layer in of_kind(net, nn.LeakyReLU)}
        assert slopes == ({0} if name == "generator" else {0.2})
        assert [layer.out_features for layer in of_kind(net, nn.Linear)][:2] == [24, 24]
        assert all(norm.weight is None and norm.bias is None for norm in of_kind(net, nn.BatchNorm1d))


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_z_is_an_added_linear_term_of_the_second_layer(name, configure):
    """What goes into the second batch norm is affine in z for a given output of the first layer."""
    config = configure(bigan, GREY, "--network", "mlp")
    net = bigan.networks(config)[name].double().eval()
    first, second, _ = of_kind(net, nn.Linear)
    seen = {}
    first.register_forward_hook(lambda *call: seen.update(first=call[2]))
    second.register_forward_hook(lambda *call: seen.update(second=call[2]))
    x = torch.rand(4, *(GREY if name == "discriminator" else [5])).double()
    z = 2 * torch.rand(2, 4, 5).double() - 1

    def sums(z):
        net(x, z)
        return seen["first"], seen["second"]

    (first_a, a), (first_b, b), (_, both), (_, none) = map(sums, (z[0], z[1], z[0] + z[1], 0 * z[0]))
    assert torch.equal(first_a, first_b)  # z is not in the first layer, unless it is what x is
    assert_close(a + b, both + none)
    assert (a - b).abs().min() > 0
    if name == "generator":
        assert_close(net(x), net(x, x))


def test_a_pixel_that_is_always_black_moves_no_weight_of_the_discriminator(configure):
    """Pictures are in [0, 1] where the discriminator weighs them, so that black is nothing."""
    config = configure(bigan, GREY, "--network", "mlp")
    discriminator = bigan.networks(config)["discriminator"]
    x = 2 * torch.rand(6, *GREY) - 1
    x[:, :, 0] = -1
    discriminator(x, bigan.draw_z(6, config, "cpu")).square().sum().backward()
    grad = of_kind(discriminator, nn.Linear)[0].weight.grad.view(-1, *GREY)
    assert (grad[:, :, 0] == 0).all() and (grad[:, :, 1:].abs().amax(0) > 0).all()


@each_case
def test_codes_have_the_priors_range(shape, flags, configure):
    nets = bigan.networks(configure(bigan, shape, *flags))
    for net in nets.values():
        net.eval()
    x = torch.rand(20, *shape) * 2 - 1
    last = of_kind(nets["encoder"], nn.Linear)[-1]
    last.weight.data *= 1000
    z_hat = bigan.encode(nets, x)
    assert z_hat.abs().max() <= 1 and z_hat.min() < -0.9 and z_hat.max() > 0.9
    assert_close(z_hat, 2 * last(bigan.features(nets, x)).sigmoid() - 1)


def test_initial_weights_of_the_conv_networks(configure):
    """N(0, 0.02) in every matrix and kernel; biases and the norms' gains are PyTorch's."""
    nets = bigan.networks(configure(bigan, [1, 32, 32], "--width", 16))
    for net in nets.values():
        for layer in of_kind(net, nn.Linear, nn.Conv2d, nn.ConvTranspose2d):
            n = layer.weight.numel()
            assert layer.weight.mean().abs() < 0.02 * 5 / n**0.5
            assert abs(layer.weight.std() / 0.02 - 1) < 5 / n**0.5
            assert layer.bias.abs().max() > 0
        assert all((layer.weight == 1).all() for layer in of_kind(net, nn.BatchNorm2d))


@each_case
def test_reconstructions_are_in_the_pictures(shape, flags, start):
    run = start(bigan, shape, *flags)
    run.nets.eval()
    with torch.no_grad():
        pictures = run.pictures(torch.rand(8, 5) * 2 - 1)
        x, columns = pictures["reconstructions"]
        assert x.shape == (4, 2, *shape) and columns == 8
        assert_close(x[:, 1], bigan.generate(run.nets, bigan.encode(run.nets, x[:, 0])))


# Learning


def test_it_learns_a_uniform_square_in_both_directions(start):
    """Samples like the data, and G(E(x)) near x, though no term asks for it."""
    middle, size = torch.tensor([0.5, -0.5]), torch.tensor([1.0, 0.4])
    x = middle + size * (2 * torch.rand(2000, 2) - 1)
    flags = ["--z-dim", 2, "--batch-size", 128, "--width", 8, "--lr", 5e-4]
    run = start(bigan, POINTS, *flags, "--decay-start", 1200, "--decay-end", 1600, x_train=x)
    for _ in range(1600):
        run.iteration()
    with torch.no_grad():
        x_fake = bigan.generate(run.nets, bigan.draw_z(2000, run.config, "cpu"))
        x_rec = bigan.generate(run.nets, bigan.encode(run.nets, x))
    assert_close(x_fake.mean(0), x.mean(0), atol=0.3, rtol=0)
    assert_close(x_fake.std(0), x.std(0), atol=0.35, rtol=0)
    error, of_chance = (x_rec - x).norm(dim=1).mean(), (x_rec - x.roll(1, 0)).norm(dim=1).mean()
    assert error < 0.75 * of_chance


def test_the_file_names_real_flags():
    """Every command in the docstring can be parsed."""
    commands = [
        line.split("#")[0].split()[2:]
        for line in bigan.__doc__.splitlines()
        if line.startswith("    python bigan.py")
    ]
    assert len(commands) >= 2
    for flags in commands:
        bigan.parse_args([*flags, "--device", "cpu"])
    assert Path(bigan.__file__).read_text(encoding="utf-8").count("def run(") == 1
