"""CGAN: where the label goes, and that every picture is judged with its own."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import cgan

POINTS, GREY, COLOUR = [2], [1, 8, 8], [3, 8, 8]
CASES = [(COLOUR, ()), (GREY, ("--network", "mlp")), (POINTS, ())]

each_case = pytest.mark.parametrize("shape, flags", CASES, ids=["conv", "mlp", "points"])


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def rewind(run, before):
    """Give the networks the weights that they had at this update."""
    for name, net in run.nets.items():
        for weight, old in zip(net.parameters(), before[name][0], strict=True):
            weight.data.copy_(old)


# z


def test_z_is_noise_and_a_one_hot_label(configure):
    """Labels are drawn alike: a label's count in 20 000 is 5 standard deviations from its mean at most."""
    config = configure(cgan, GREY)
    z = cgan.draw_z(20_000, config, "cpu")
    assert z.shape == (20_000, config.z_dim + 10) and z.dtype == torch.float32
    noise, label = z.split([config.z_dim, 10], dim=1)
    assert_close(noise.mean(0), torch.zeros(config.z_dim), atol=0.04, rtol=0)
    assert_close(noise.std(0), torch.ones(config.z_dim), atol=0.04, rtol=0)
    assert ((label == 0) | (label == 1)).all() and (label.sum(1) == 1).all()
    assert_close(label.mean(0), torch.full((10,), 0.1), atol=0.0106, rtol=0)
    assert_close(
        torch.corrcoef(z.T)[: config.z_dim, config.z_dim :].abs().max().item(), 0.0, atol=0.04, rtol=0
    )


@pytest.mark.parametrize(
    "label", [7, torch.tensor(7), torch.tensor([0, 9, 7, 7])], ids=["int", "one", "many"]
)
def test_z_of_the_label_that_is_asked_for(label, configure):
    config = configure(cgan, GREY)
    z = cgan.draw_z(4, config, "cpu", label=label)
    expected = torch.as_tensor(label).expand(4)
    assert torch.equal(z[:, config.z_dim :].argmax(1), expected)
    assert len(z[:, : config.z_dim].unique()) == 4 * config.z_dim


# The networks


@pytest.mark.parametrize("network", ["conv", "mlp"])
@pytest.mark.parametrize("classes", [1, 3, 12])
@pytest.mark.parametrize("shape", [[c, size, size] for c in (1, 3) for size in (32, 64)] + [[2]], ids=str)
def test_shapes(shape, classes, network, configure):
    if shape == POINTS and network == "conv":
        pytest.skip("points take an mlp")
    config = configure(cgan, shape, "--network", network)
    config.classes = classes
    nets = {name: net.eval() for name, net in cgan.networks(config).items()}
    assert list(nets) == ["generator", "discriminator"]
    for n in (3, 1):  # a batch of one keeps its shape
        x = cgan.generate(nets, cgan.draw_z(n, config, "cpu"))
        assert x.shape == (n, *shape)
        assert nets["discriminator"](x).shape == (n, classes)


@each_case
def test_the_label_is_more_than_a_shift(shape, flags, configure):
    """D(x, a) − D(x, b) depends on x: as f(x) + b_y, D would have nothing to teach G about labels."""
    config = configure(cgan, shape, *flags)
    nets = cgan.networks(config)
    x = torch.randn(6, *shape)
    logits = nets["discriminator"].eval()(x)
    gaps = logits[:, 0] - logits[:, 1]
    assert gaps.std() > 1e-4
    noise = torch.randn(1, config.z_dim)
    first, second = (
        cgan.generate(nets, torch.cat([noise, F.one_hot(torch.tensor([y]), config.classes)], 1))
        for y in (0, 1)
    )
    assert not torch.allclose(first, second, atol=1e-4)


# The updates


@each_case
def test_each_picture_is_judged_with_its_own_label(shape, flags, start):
    """D's and G's gradients and the numbers, worked out again with log and sigmoid from what was drawn."""
    run = start(cgan, shape, *flags, "--batch-size", 9)
    for draws in run.draws.values():
        draws.clear()
    metrics = run.iteration()
    (x,), (y,), z = run.draws["x"], run.draws["y"], list(run.draws["z"])
    generator, discriminator = run.nets["generator"], run.nets["discriminator"]
    assert [name for name, *_ in run.updates] == ["discriminator", "generator"]
    for i, (updated, before, _) in enumerate(run.updates):
        rewind(run, before)
        y_fake = z[i][:, run.config.z_dim :].argmax(1)
        assert not torch.equal(y, y_fake)
        real = discriminator(x).sigmoid()[torch.arange(9), y]
        fake = discriminator(generator(z[i])).sigmoid()[torch.arange(9), y_fake]
        loss = -real.log().mean() - (1 - fake).log().mean() if i == 0 else -fake.log().mean()
        assert_close(metrics[f"{updated}_loss"], loss.detach())
        if i == 0:
            assert_close(metrics["D(x)"], real.mean().detach())
            assert_close(metrics["D(G(z))"], fake.mean().detach())
        expected = torch.autograd.grad(loss, [*run.nets[updated].parameters()])
        for grad, wanted in zip(before[updated][1], expected, strict=True):
            assert_close(grad, wanted, rtol=1e-3, atol=1e-5)
        assert max(grad.abs().max() for grad in expected) > 1e-3


def test_real_pictures_come_with_their_labels(start):
    run = start(cgan, GREY, x_train=torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *GREY))
    run.iteration()
    (x,), (y,) = run.draws["x"], run.draws["y"]
    item = ((x[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert len(item.unique()) > 1
    assert torch.equal(y, run.y_train[item])


def test_the_losses():
    """At D = 3/4 for data, 1/5 for samples."""
    d_real, d_fake = torch.tensor([3.0, 0.25]).double().log()
    expected = -torch.tensor([0.75, 0.8, 0.2]).double().log()
    assert_close(cgan.discriminator_loss(d_real, d_fake), expected[0] + expected[1])
    assert_close(cgan.generator_loss(d_fake), expected[2])
    assert_close(cgan.js_estimate(d_real, d_fake), (torch.tensor(4.0).log() - expected[:2].sum()) / 2)


@pytest.mark.parametrize("flags", [(), ("--network", "mlp")], ids=["conv", "mlp"])
def test_samples_show_what_was_asked(flags, configure):
    """Pictures of class 0 are black, of class 1 white, of class 2 grey."""
    levels = torch.tensor([0, 255, 128], dtype=torch.uint8)
    y = torch.arange(60) % 3
    x = levels[y].view(-1, 1, 1, 1).expand(-1, *GREY)
    config = configure(cgan, GREY, *flags, "--batch-size", 24, "--lr", 2e-3)
    config.classes = 3
    nets, _, iteration, _ = cgan.build(config, (x, y), (x, y))
    for _ in range(100):
        iteration()
    z = cgan.draw_z(48, config, "cpu", label=torch.arange(48) % 3)
    with torch.no_grad():
        brightness = cgan.generate(nets.eval(), z).mean(dim=(1, 2, 3)).view(-1, 3)
    black, white, grey = brightness.mean(0)
    assert black < -0.5 and white > 0.5 and grey.abs() < 0.4


# Pictures and mistakes


@pytest.mark.parametrize("classes", [1, 10, 40])
@pytest.mark.parametrize("shape", [COLOUR, POINTS], ids=["images", "points"])
def test_a_column_of_each_class_and_a_row_of_each_noise(shape, classes, configure):
    """At most 32 columns. Drawing them changes neither the networks nor what is drawn next."""
    config = configure(cgan, shape)
    config.classes = classes
    x = torch.zeros(50, *shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32)
    y = torch.arange(50) % classes
    nets, _, _, pictures = cgan.build(config, (x, y), (x, y))
    nets.eval()
    for weight in nets["generator"].parameters():
        weight.data.normal_(0, 0.5)
    z = cgan.draw_z(64 if len(shape) == 3 else 2500, config, "cpu")
    rows, columns = 8 if len(shape) == 3 else 500, min(classes, 32)
    weights, random = [weight.clone() for weight in nets.state_dict().values()], torch.get_rng_state()
    with torch.no_grad():
        grids = pictures(z)
        assert list(grids) == ["samples", "classes"] and grids["classes"][1] == columns
        by_class = grids["classes"][0]
        assert by_class.shape == (rows, columns, *shape)
        for row, column in [(0, 0), (rows - 1, columns - 1), (1, columns // 2)]:
            label = F.one_hot(torch.tensor([column]), classes)
            expected = cgan.generate(nets, torch.cat([z[row : row + 1, : config.z_dim], label], dim=1))
            assert_close(by_class[row, column], expected[0], rtol=1e-3, atol=1e-5)
            assert expected.std() > 1e-3
    assert equal(nets.state_dict().values(), weights) and torch.equal(torch.get_rng_state(), random)


def test_data_without_labels(configure):
    x = torch.zeros(50, *GREY, dtype=torch.uint8)
    config = configure(cgan, GREY)
    config.classes = 0
    with pytest.raises(ValueError, match="has no labels"):
        cgan.build(config, (x, None), (x, None))


def test_swissroll_is_refused_in_one_line(tmp_path, capsys):
    flags = ["--dataset", "swissroll", "--device", "cpu", "--width", "2", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        cgan.main(flags)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "cgan.py: --dataset swissroll has no labels, which cgan.py needs"
    assert not (tmp_path / "run").exists()
