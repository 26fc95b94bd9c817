"""tools.evaluate: each measure against closed forms, on data and on noise; its files and its words."""

import json
import math
import shutil
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import having
from PIL import Image

from common import as_float, load_data
from tools import classifier, evaluate, evaluation, figures, flags, metrics, report, runs, tables

MNIST = Path(__file__).parents[2] / "shared/data"
PIXELS = 8

BANDS = '''
"""A model that this project does not know: z are pictures like the data's, with the band of the label."""
import torch
from torch import nn

def networks(config):
    return {"generator": nn.Linear(1, 1)}

def draw_z(n, config, device, label=None):
    z = 0.6 * torch.rand(n, 8, 8, device=device) - 1
    rows = 3 * (torch.randint(3, (n,)) if label is None else torch.full((n,), label))
    z[torch.arange(n), rows] += 1.3
    z[torch.arange(n), rows + 1] += 1.3
    return z.flatten(1)

def generate(nets, z):
    return z.view(-1, 1, 8, 8)

def encode(nets, x):
    return x.flatten(1)

def features(nets, x):
    return x.flatten(1)

def classify(nets, x):
    return (10 * x.mean((1, 3))[:, [6, 3, 0]]).softmax(1)
'''


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """A folder of 1 440 pictures, 8×8: noise with a bright band in one of three places, their class."""
    folder, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for label, row in enumerate((0, 3, 6)):
        (folder / "abc"[label]).mkdir()
        for i in range(480):
            picture = rng.integers(80, size=(PIXELS, PIXELS), dtype=np.uint8)
            picture[row : row + 2] += 170
            Image.fromarray(picture).save(folder / "abc"[label] / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where what is decoded and trained is kept, once for this file."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def quick(monkeypatch):
    """A small budget for the critic."""
    monkeypatch.setattr(metrics, "CRITIC", metrics.CRITIC | {"width": 4, "steps": 30})
    monkeypatch.setattr(metrics, "CRITIC_OF_POINTS", metrics.CRITIC_OF_POINTS | {"steps": 10, "batch": 64})


@pytest.fixture
def new_model(tmp_path, monkeypatch, bands, data_dir):
    """new_model(name="new") → the folder of a run of BANDS, whose file lies where the model files are."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "bands.py").write_text(BANDS, encoding="utf-8")
    monkeypatch.setattr(runs, "ROOT", folder)
    monkeypatch.syspath_prepend(folder)
    config = {"shape": [1, PIXELS, PIXELS], "dataset": str(bands), "classes": 3, "z_dim": 64}
    config |= {"data_dir": "nowhere", "image_size": PIXELS, "seed": 0}

    def new_model(name="new", **changes):
        path = tmp_path / name
        path.mkdir()
        saved = {"model": "bands", "step": 5, "config": config | changes}
        saved["networks"] = {"generator": torch.nn.Linear(1, 1).state_dict()}
        torch.save(saved, path / "checkpoint.pt")
        return path

    yield new_model
    sys.modules.pop("bands", None)


@pytest.fixture
def data(bands, data_dir, quick):
    """The Data of `bands`."""
    config = Namespace(dataset=str(bands), image_size=PIXELS, shape=[1, 8, 8])
    options = Namespace(n=800, seed=0, data_dir=str(data_dir), device=torch.device("cpu"), batch_size=250)
    options.stages, options.split = [*evaluation.STAGES], "test"
    return evaluation.Data(runs.Run(Path("run"), "", None, config, 0, None, options.device), options)


@pytest.fixture
def run(data_dir):
    """run(*argv) → the exit code of `python -m tools.evaluate argv`, in this process."""
    return lambda *argv: exit_code([*argv, "--data-dir", data_dir])


def exit_code(argv):
    try:
        evaluate.main([str(word) for word in argv] + ["--device", "cpu"])
    except SystemExit as stopped:
        return stopped.code
    return 0


def result(path):
    return json.loads((path / "evaluation.json").read_text(encoding="utf-8"))


def errors(capsys):
    return [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("tools.evaluate: error:")
    ]


# Fréchet distance


def with_moments(n, mean, covariance):
    """n vectors that have exactly this mean and (with n − 1) this covariance."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_independent_gaussians():
    """|m₁ − m₂|² + Σ (σ₁ − σ₂)²"""
    a = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    b = torch.tensor([3.0, 2.0, 1.5], dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    x, y = with_moments(500, 0 * shift, a.square().diag()), with_moments(300, shift, b.square().diag())
    expected = shift.square().sum() + (a - b).square().sum()
    assert metrics.frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_correlated_gaussians():
    """|m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁^½ S₂ S₁^½)^½), where S₁ and S₂ do not commute."""
    s1 = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    s2 = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)

    def root(s):
        values, vectors = torch.linalg.eigh(s)
        return vectors @ values.sqrt().diag() @ vectors.T

    shift = torch.tensor([0.5, 1.0], dtype=torch.float64)
    x, y = with_moments(400, 0 * shift, s1), with_moments(400, shift, s2)
    expected = shift.square().sum() + (s1 + s2 - 2 * root(root(s1) @ s2 @ root(s1))).trace()
    assert metrics.frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


# Inception score, classes


def test_inception_score():
    """Sure of ten classes, equally often: 10. The same for all: 1. Sure of one class: 1. A value between."""
    sure = 60 * torch.eye(10, dtype=torch.float64).repeat(30, 1)
    assert metrics.inception_score(sure) == pytest.approx(10, rel=1e-6)
    assert metrics.inception_score(torch.zeros(300, 10)) == pytest.approx(1, rel=1e-6)
    assert metrics.inception_score(sure[:1].repeat(300, 1)) == pytest.approx(1, rel=1e-6)
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    expected = math.exp(math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert metrics.inception_score(p.log()) == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_a_very_confident_classifier():
    assert metrics.inception_score(1e5 * torch.eye(10)[:5].repeat(40, 1)) == pytest.approx(5, rel=1e-4)


def test_class_balance():
    shares = metrics.class_shares(torch.tensor([0, 0, 0, 2]), 4)
    assert shares == [0.75, 0, 0.25, 0]
    assert metrics.entropy(shares) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert metrics.entropy([0.1] * 10) == pytest.approx(math.log(10))


def test_modes_of_stacked_mnist():
    """KL(p ‖ uniform) = Σ p log(1000 p): 0 for all classes equally often, log 1000 for one class."""
    assert metrics.covered_classes(torch.arange(1000), 1000) == (1000, pytest.approx(0, abs=1e-6))
    assert metrics.covered_classes(torch.full((9,), 7), 1000) == (1, pytest.approx(math.log(1000)))
    labels = torch.tensor([0, 0, 0, 5])
    expected = 0.75 * math.log(750) + 0.25 * math.log(250)
    assert metrics.covered_classes(labels, 1000) == (2, pytest.approx(expected))


# Diversity


def test_diversity():
    """Pairs of one picture: 0. It counts pairs (0, 1), (2, 3) …, and bytes as the floats they stand for."""
    x = torch.randint(256, (6, 1, 32, 32), dtype=torch.uint8)
    assert metrics.ms_ssim_diversity(x.repeat_interleave(2, 0)) == pytest.approx(0, abs=1e-5)
    both = torch.cat([x, x]).unflatten(0, (2, 6)).transpose(0, 1).flatten(0, 1)  # each twice in a row
    half = torch.cat([x[:4], x[4:5], x[4:5]])  # the last of three pairs is of one picture
    assert metrics.ms_ssim_diversity(both) == pytest.approx(0, abs=1e-5)
    first = metrics.ms_ssim_diversity(x[:4])
    assert metrics.ms_ssim_diversity(half) == pytest.approx(2 / 3 * first, rel=1e-4)
    assert metrics.ms_ssim_diversity(as_float(x)) == pytest.approx(metrics.ms_ssim_diversity(x))
    assert 0.5 < first <= 1


@pytest.mark.parametrize(
    "size, scales", [(7, 0), (8, 1), (16, 2), (28, 2), (32, 3), (64, 4), (128, 5), (256, 5)]
)
def test_scales(size, scales):
    assert metrics.ms_ssim_scales(size) == scales
    if scales > 0 and size < 128:
        metrics.ms_ssim_diversity(torch.rand(2, 3, size, size))


# Independent critic


def test_the_critic_between_two_gaussians_on_a_line():
    """W(N(0, 1), N(3, 1)) = 3, and 0 between samples of one."""
    x, fake, same = torch.randn(4000, 1), 3 + torch.randn(4000, 1), torch.randn(4000, 1)
    halves = [part for both in zip(x.chunk(2), fake.chunk(2), strict=True) for part in both]
    assert metrics.independent_critic(*halves, metrics.CRITIC) == pytest.approx(3, abs=0.3)
    halves = [part for both in zip(x.chunk(2), same.chunk(2), strict=True) for part in both]
    assert metrics.independent_critic(*halves, metrics.CRITIC) == pytest.approx(0, abs=0.15)


def test_the_critic_is_valued_on_what_it_has_not_learnt_from():
    """It learns that data lie above samples; where they lie below, the value is negative."""
    x, fake = torch.randn(500, 1) + 3, torch.randn(500, 1)
    assert metrics.independent_critic(x, fake, fake, x, metrics.CRITIC) < -2


# Modes


def test_modes_of_points_made_by_hand():
    """A sample counts within 3 standard deviations of the nearest centre, a mode with one such sample."""
    centres, std = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 0.1
    points = torch.tensor([[0.0, 0.29], [0.0, 0.31], [0.71, 0.0], [0.29, 0.0], [5.0, 5.0]])
    modes, quality, divergence = metrics.covered_modes(points, centres, std)
    assert (modes, quality) == (2, 3 / 5)
    expected = 2 / 3 * math.log(2 / 3 * 3) + 1 / 3 * math.log(1 / 3 * 3)  # two samples near one mode
    assert divergence == pytest.approx(expected, abs=1e-6)
    assert metrics.covered_modes(points[-1:], centres, std)[:2] == (0, 0)
    assert math.isnan(metrics.covered_modes(points[-1:], centres, std)[2])


@pytest.mark.parametrize("name, n", [("ring", 8), ("grid", 25)])
def test_modes_are_where_the_data_have_them(name, n):
    """All are found, each point's label is its mode, and 1 − exp(−9/2) of the points are good."""
    x, y = load_data(name, "data", "test", 32, "cpu")
    centres, std = metrics.mixture_modes(name)
    found, quality, divergence = metrics.covered_modes(x, centres, std)
    assert found == n and divergence < 1e-3 and quality == pytest.approx(1 - math.exp(-4.5), abs=0.005)
    assert torch.equal(metrics.nearest_mode(x, centres)[0], y)
    assert metrics.mixture_modes("swissroll") is None


# Encoders


def test_mean_absolute_error():
    x = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    assert metrics.mean_absolute_error(x, torch.zeros_like(x)) == pytest.approx(1)
    assert metrics.mean_absolute_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 1.0]])) == 0.75


def test_nearest_neighbour_against_a_loop():
    train, test = torch.randn(150, 7) + 100, torch.randn(701, 7) + 100
    y_train, y_test = torch.randint(4, (150,)), torch.randint(4, (701,))
    hits = 0
    for item, label in zip(test.double(), y_test, strict=True):
        distances = [((item - other) ** 2).sum().item() for other in train.double()]
        hits += int(y_train[distances.index(min(distances))] == label)
    assert metrics.nearest_neighbour_accuracy(train, y_train, test, y_test) == hits / 701
    assert metrics.nearest_neighbour_accuracy(train, y_train, train, y_train) == 1


def test_linear_probe():
    """Separable classes are found, whatever the scale of a dimension; labels that say nothing are not."""
    x, y = torch.randn(600, 5), torch.arange(600) % 3
    x[:, 0] = 1e-4 * (y + 0.1 * torch.randn(600))
    x[:, 4] = 7
    assert metrics.linear_probe_accuracy(x[:400], y[:400], x[400:], y[400:]) > 0.95
    y = y[torch.randperm(600)]
    assert metrics.linear_probe_accuracy(x[:400], y[:400], x[400:], y[400:]) < 0.5


# Clusters


def test_matching():
    labels = torch.arange(50) % 5
    renamed = torch.tensor([3, 0, 4, 1, 2])[labels]
    assert metrics.matching_accuracy(renamed, labels) == 1
    assert metrics.normalized_mutual_information(renamed, labels) == pytest.approx(1)
    renamed[:10] = 0
    by_hand = (40 + 2) / 50  # those of the cluster's own label are still right
    assert metrics.matching_accuracy(renamed, labels) == by_hand
    assert metrics.matching_accuracy(torch.zeros_like(labels), labels) == 0.2
    assert metrics.normalized_mutual_information(torch.zeros_like(labels), labels) == 0
    assert metrics.matching_accuracy(torch.arange(50), labels) == 0.1  # one cluster to a label


# Data and noise


def test_data_give_the_floor_and_noise_far_worse(data):
    """For every measure of pictures: real data, noise, and one picture repeated."""
    test = data.x_test[: len(data.x_test)]
    noise = torch.randint(256, (800, 1, PIXELS, PIXELS), dtype=torch.uint8)
    found = {}
    for name, x in (("real", test), ("train", data.x_train[:800]), ("noise", noise)):
        found[name] = {}
        for stage in (evaluation.classifier_scores, evaluation.diversity, evaluation.critic):
            torch.manual_seed(0)
            found[name] |= stage(evaluation.Subject(None, x), data)
    real, train, noise = found["real"], found["train"], found["noise"]
    assert data.accuracy > 0.99
    assert train["fid"] < real["fid"] < noise["fid"] / 5
    assert noise["inception_score"] < 2.6 < 2.8 < real["inception_score"] <= 3
    assert noise["rarest_class"] < 0.25 < real["rarest_class"]
    assert noise["entropy"] < 1.05 < real["entropy"]
    assert abs(train["diversity"] - real["diversity"]) < 0.06 < noise["diversity"] - real["diversity"]
    assert abs(train["critic"]) < 0.2 and noise["critic"] > 5 * abs(train["critic"])


@pytest.mark.parametrize("name", ["ring", "grid"])
def test_points_give_the_floor_and_noise_far_worse(name):
    x, _ = load_data(name, "data", "test", 32, "cpu")
    noise = 4 * torch.rand(2500, 2) - 2
    data = SimpleNamespace(modes=metrics.mixture_modes(name))
    real = evaluation.modes(evaluation.Subject(None, x[:2500]), data)
    assert real["high_quality"] > 10 * evaluation.modes(evaluation.Subject(None, noise), data)["high_quality"]
    one = evaluation.modes(evaluation.Subject(None, x[:1].expand(2500, 2)), data)
    assert one["modes"] == 1 < real["modes"]


def test_the_critic_of_points_reads_the_distance():
    """Of two equal Gaussians that lie apart W is how far."""
    torch.manual_seed(0)
    parts = [0.1 * torch.randn(2500, 2) for _ in range(4)]
    for fake in parts[1::2]:
        fake[:, 0] += 0.9
    assert metrics.independent_critic(*parts, metrics.CRITIC_OF_POINTS) == pytest.approx(0.9, rel=0.1)


def test_the_critic_of_points():
    x, _ = load_data("grid", "data", "test", 32, "cpu")
    budget = metrics.CRITIC_OF_POINTS | {"steps": 300, "batch": 64}
    parts, noise = x[torch.randperm(len(x))].split(2500), 4 * torch.rand(5000, 2) - 2
    real = metrics.independent_critic(*parts, budget)
    far = metrics.independent_critic(parts[0], noise[:2500], parts[2], noise[2500:], budget)
    assert abs(real) < 0.1 < far


def test_a_perfect_and_a_blind_encoder(data, new_model, monkeypatch):
    """Reconstruction, codes and clusters of a model that sees everything, and of one that sees nothing."""
    path = new_model()
    opened = runs.open_run(path, "cpu")
    stages = evaluation.reconstruction, evaluation.representation, evaluation.classification

    def measured():
        found = {}
        for stage in stages:
            found |= stage(evaluation.Subject(opened, None), data)
        return found

    good = measured()
    assert good["reconstruction"] == 0 < 0.2 < good["reconstruction_random"]
    assert good["label_kept"] > 0.99 and good["matching"] == 1 and good["nmi"] == pytest.approx(1)
    assert good["nn_z"] == good["nn_features"] == good["nn_untrained"] == 1
    assert good["probe_z"] > 0.99 and good["probe_features"] > 0.99
    pixels = data.references(opened)["raw pixels"]
    assert pixels == {name: good[name] for name in ("nn_features", "probe_features")}
    assert min(good["usage"]) == good["least_used"] > 0.2 and sum(good["usage"]) == pytest.approx(1)

    for name in ("encode", "features"):
        monkeypatch.setattr(opened.model, name, lambda nets, x: torch.randn(len(x), 64))
    monkeypatch.setattr(opened.model, "generate", lambda nets, z: z.view(-1, 1, 8, 8).tanh())
    monkeypatch.setattr(opened.model, "classify", lambda nets, x: torch.rand(len(x), 3))
    blind = measured()
    assert blind["reconstruction"] > 0.2 and blind["label_kept"] < 0.6
    assert max(blind[name] for name in ("nn_z", "nn_features", "probe_z", "probe_features", "matching")) < 0.6
    assert blind["nmi"] < 0.1
    assert data.chance["matching"] < 0.5 and data.chance["nmi"] < 0.05
    assert data.chance["label_kept"] == pytest.approx(1 / 3, abs=0.12)


def test_samples_that_show_what_was_asked(data, new_model, monkeypatch):
    """Of a model that does, one that mixes two classes up, and one that hears nothing."""
    opened = runs.open_run(new_model(), "cpu")
    subject = evaluation.Subject(opened, None)
    assert evaluation.asked(subject, data) == {}  # it classifies, too: its labels are its own
    monkeypatch.delattr(opened.model, "classify")
    assert opened.labels == 3
    assert min(evaluation.asked(subject, data).values()) > 0.99
    with monkeypatch.context() as patch:  # each class has noise of its own
        seen = []
        patch.setattr(evaluation, "draw_z", lambda *given: seen.append(given[2]) or runs.draw_z(*given))
        evaluation.asked(subject, data)
        assert len(set(seen)) == len(seen) == 3
    draw_z = opened.model.draw_z

    def mixed_up(n, config, device, label=None):
        return draw_z(n, config, device, label=(0, 2, 2)[label])

    def deaf(n, config, device, label=None):
        return draw_z(n, config, device)

    monkeypatch.setattr(opened.model, "draw_z", mixed_up)
    found = evaluation.asked(subject, data)
    assert found["asked"] == pytest.approx(2 / 3, abs=0.01) and found["asked_worst"] < 0.01
    monkeypatch.setattr(opened.model, "draw_z", deaf)
    assert evaluation.asked(subject, data)["asked"] == pytest.approx(1 / 3, abs=0.05)
    assert data.chance["asked"] == pytest.approx(1 / 3, abs=0.12) and data.real["asked"] > 0.99


def test_the_accuracy_of_a_model_that_knows_labels(data, new_model, monkeypatch):
    """Where samples cannot be asked for by a label, classify() is of the data's classes."""
    opened = runs.open_run(new_model(), "cpu")
    monkeypatch.setattr(opened.model, "draw_z", lambda n, config, device: torch.rand(n, 64))
    subject = evaluation.Subject(opened, None)
    third = (data.y_test == 1).double().mean().item()  # two of its three classes are swapped
    assert evaluation.classification(subject, data) == {"accuracy": pytest.approx(third)}
    classify = opened.model.classify
    monkeypatch.setattr(opened.model, "classify", lambda nets, x: classify(nets, x).flip(1))
    assert evaluation.classification(subject, data) == {"accuracy": 1}


def test_noise_is_uniform_on_the_square_of_the_data(data):
    assert data.noise["fid"] > 5 * data.real["fid"] and data.noise["entropy"] < data.real["entropy"]
    config = Namespace(dataset="grid", image_size=32, shape=[2])
    options = Namespace(n=2500, seed=0, data_dir="data", device=torch.device("cpu"), split="test")
    options.stages = ["modes"]
    found = evaluation.Data(runs.Run(Path("run"), "", None, config, 0, None, options.device), options).noise
    assert 20 <= found["modes"] <= 25 and 0.015 < found["high_quality"] < 0.035
    assert 0.05 < found["kl_modes"] < 0.5


# The classifier


def test_the_classifier_is_trained_once(bands, data_dir, monkeypatch):
    first, found = classifier.classifier_for(str(bands), data_dir, PIXELS, "cpu")
    monkeypatch.setattr(classifier, "trained", lambda *_: pytest.fail("it is trained again"))
    again, same = classifier.classifier_for(str(bands), data_dir, PIXELS, "cpu")
    assert found == same > 0.99 and not again.training
    x = torch.rand(5, 1, PIXELS, PIXELS)
    assert torch.equal(first(x), again(x)) and again.features(x).shape == (5, 64)
    assert not [file for file in (data_dir / "cache").iterdir() if file.name.startswith("tmp")]


def test_another_set_or_size_has_another_classifier(bands, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(classifier, "trained", lambda untrained, *_: untrained.eval())
    for size in (8, 12):
        classifier.classifier_for(str(bands), tmp_path, size, "cpu")
    assert len(list(folder.glob("classifier-*.pt"))) == 2


@pytest.mark.parametrize("name", ["VERSION", "EPOCHS", "BATCH", "LR"])
def test_what_was_trained_in_another_way_is_not_taken(name, bands, tmp_path, monkeypatch):
    """A classifier of one epoch in the cache would change every FID by a quarter, unseen."""
    monkeypatch.setattr(classifier, "trained", lambda untrained, *_: untrained.eval())
    classifier.classifier_for(str(bands), tmp_path, PIXELS, "cpu")
    monkeypatch.setattr(classifier, name, 2 * getattr(classifier, name))
    classifier.classifier_for(str(bands), tmp_path, PIXELS, "cpu")
    assert len(list((tmp_path / "cache").glob("classifier-*.pt"))) == 2


def test_a_classifier_that_cannot_be_kept(bands, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(classifier.torch, "save", full)
    monkeypatch.setattr(classifier, "trained", lambda untrained, *_: untrained.eval())
    _, found = classifier.classifier_for(str(bands), tmp_path, PIXELS, "cpu")
    assert 0 <= found <= 1 and "not cached" in capsys.readouterr().err
    assert list((tmp_path / "cache").glob("*.pt")) == list((tmp_path / "cache").glob("tmp*")) == []


def test_training_the_classifier_follows_from_nothing_else():
    x, y = torch.randint(256, (200, 1, 8, 8), dtype=torch.uint8), torch.arange(200) % 2
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = classifier.trained(classifier.Classifier((1, 8, 8), 2), x, y, "cpu")
        states.append(torch.cat([value.flatten().double() for value in net.state_dict().values()]))
    assert torch.equal(*states)


def test_a_classifier_on_each_channel():
    """Three digits a, b, c of the channels in this order are the class 100a + 10b + c."""
    one = classifier.Classifier((1, 16, 16), 10).eval()
    torch.nn.init.normal_(one.out.weight, 0, 30)
    three, x = classifier.PerChannel(one), torch.rand(40, 3, 16, 16) * torch.rand(40, 3, 1, 1)
    a, b, c = (one(channel).argmax(1) for channel in x.split(1, dim=1))
    assert (a != b).any() and (b != c).any()
    assert torch.equal(three(x).argmax(1), 100 * a + 10 * b + c)
    torch.testing.assert_close(three(x).exp().sum(1), torch.ones(40))
    assert three.features(x).shape == (40, 192)


@pytest.mark.parametrize("size", [4, 7, 8, 28, 32, 33, 64])
def test_the_classifier_takes_any_size(size):
    assert classifier.Classifier((3, size, size), 5)(torch.rand(2, 3, size, size)).shape == (2, 5)


# Along a run


def test_the_median_filter():
    """The WGAN paper's 101 rows where there are enough; outliers vanish, a constant and a slope stay."""
    assert [figures.window(n) for n in (1, 9, 30, 60, 1010, 9999)] == [1, 1, 3, 5, 101, 101]
    assert all(figures.window(n) % 2 == 1 for n in range(1, 1500))
    values = np.arange(100.0)
    values[50] = 1e6
    assert abs(figures.filtered(values) - np.arange(100)).max() <= 4
    assert figures.filtered(np.array([])).size == 0


def test_metrics_that_other_programs_have_written(tmp_path):
    """A mark at the beginning, other ends of lines, rows that are not whole or not numbers."""
    text = "\ufeffstep,W\r\n1,2.5\r\n2,oh\r\n3\r\n4,1.5,7\r\n5,0.5\r\n6"
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8", newline="")
    found = report.read_metrics(tmp_path)
    assert {name: list(column) for name, column in found.items()} == {"step": [1, 5], "W": [2.5, 0.5]}
    (tmp_path / "metrics.csv").write_text("")
    assert report.read_metrics(tmp_path)[""].size == 0
    assert report.read_metrics(tmp_path / "nowhere") == {}


# Tables


def evaluated(path, config, step=1, **measures):
    settings = {"critic": {"steps": 1, "batch": 2, "gp_weight": [3, 4]}}
    found = {"step": step, "metrics": measures, "settings": settings, "dataset": "mnist", "n": 9, "seed": 0}
    found["n_real"] = 9
    found["references"] = {"real data": {"fid": 0.5, "diversity": 0.6}, "chance": {"nmi": 0.1}}
    found["split"] = "test"
    return SimpleNamespace(path=Path(path), name="wgan", config=Namespace(**config), step=step), found


def test_the_caption_says_of_how_few_real_items_the_floor_is():
    (_, result) = evaluated("runs/a", {}, fid=3)
    assert "real items" not in tables.caption(result)
    result["n_real"] = 5
    assert "mnist, test split: 9 samples, seed 0; 5 real items; " in tables.caption(result)


def test_a_table():
    done = [
        evaluated("runs/a", {"seed": 0}, fid=3, diversity=0.5, inception_score=2),
        evaluated("runs/b", {"seed": 0, "lr": 1}, fid=1.25, diversity=0.9, label_kept=0.5),
    ]
    lines = tables.text(done).splitlines()
    assert lines[0].split() == [
        "run",
        "step",
        "digit-classifier",
        "FID",
        "digit-classifier",
        "IS",
        "diversity",
        "label",
        "kept",
    ]
    assert lines[1].split() == ["a", "1", "3.00", "2.00", "0.500", "*", "–"]
    assert lines[2].split() == ["b", "1", "1.25", "*", "–", "0.900", "50.0%"]
    assert lines[3].split() == ["real", "data", "0.50", "–", "0.600", "–"]
    assert lines[4].startswith("mnist, test split")  # there is no row that says nothing
    assert lines[1].index("3.00") == lines[2].index("1.25") == lines[3].index("0.50")
    assert "**1.25**" in tables.markdown(tables.rows(done)).splitlines()[3]


def test_a_table_wider_than_the_terminal_is_broken_between_columns(monkeypatch):
    table = [["run", "one", "two", "three"], ["a", "1", "22 *", "333"], ["bb", "4444", "5", "6"]]
    whole = ["run   one  two    three", "a       1   22 *    333", "bb   4444    5        6"]
    assert tables.aligned(table).split("\n") == tables.aligned(table, 23).split("\n") == whole
    blocks = [
        "run   one  two",
        "a       1   22 *",
        "bb   4444    5",
        "",
        "run  three",
        "a      333",
        "bb       6",
    ]
    assert tables.aligned(table, 22).split("\n") == tables.aligned(table, 16).split("\n") == blocks
    assert tables.aligned(table, 1).count("run") == 3  # a column at least in each
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "16")
    assert tables.aligned(table).split("\n") == blocks


def test_plain_fid_is_never_said():
    assert {tables.title("fid", name) for name in ("mnist", "glyphs", "stacked_mnist")} == {
        "digit-classifier FID"
    }
    assert tables.title("fid", "cifar10") == tables.title("fid", "some/folder") == "classifier FID"


def test_the_best():
    assert tables.best_of("fid", [2, 1, None, 1], None) == [1, 3]
    assert tables.best_of("inception_score", [2, 1, None], None) == [0]
    assert tables.best_of("diversity", [0.2, 0.5, 0.7], 0.55) == [1]
    assert tables.best_of("diversity", [0.2, 0.5], None) == []
    assert tables.best_of("fid", [1, None], None) == tables.best_of("fid", [1, 1], None) == []
    assert tables.best_of("nn_untrained", [0.1, 0.2], None) == []


def test_runs_that_differ_only_in_seed():
    """Mean and deviation (n − 1) over three seeds; flags without effect do not count, others and steps do."""
    configs = [{"seed": i, "lr": 1, "data_dir": str(i), "log_every": i} for i in range(3)]
    configs += [{"seed": 3, "lr": 2}, {"seed": 0, "lr": 1, "step": 2}]
    assert tables.seeds(configs) == [[0, 1, 2]]
    assert tables.seeds([configs[0], configs[0]]) == []
    done = [evaluated(f"runs/{i}", configs[i], fid=value) for i, value in enumerate((1, 2, 6))]
    (line,) = (line for line in tables.text(done).splitlines() if line.startswith("mean"))
    assert line.split() == ["mean", "of", "3:", "0", "…", "1", "3.00", "±", f"{math.sqrt(7):.2f}"]


# The command


def test_two_evaluations_are_equal(make_run, run, bands, quick):
    """And the order of the runs in the call changes nothing."""
    a = make_run(import_module("wbli"), (1, 8, 8), name="a", dataset=bands, classes=3)
    b = make_run(import_module("dcgan"), (1, 8, 8), name="b", dataset=bands, classes=3)
    assert run(a, b, "--n", 200) == 0
    first = result(a), result(b)
    torch.manual_seed(5)
    assert run(b, a, "--n", 200) == 0
    assert (result(a), result(b)) == first
    assert {"fid", "inception_score", "critic", "label_kept", "nn_z", "probe_features"} <= first[0][
        "metrics"
    ].keys()
    assert "label_kept" not in first[1]["metrics"] and first[0]["not_measured"] == []
    assert first[0]["references"].keys() == {"chance", "uniform noise", "real data", "raw pixels"}
    assert first[0]["settings"]["classifier"]["test_accuracy"] > 0.99
    assert run(a, "--n", 200, "--split", "validation") == 0
    other = json.loads((a / "evaluation-validation.json").read_text(encoding="utf-8"))
    assert result(a) == first[0] and other["split"] == "validation"
    assert other["metrics"]["label_kept"] != first[0]["metrics"]["label_kept"]


@pytest.mark.parametrize("name", having("classify") + ["cgan"])
def test_what_each_model_that_knows_labels_is_measured_by(name, make_run, run, bands, monkeypatch):
    measures = {"cgan": {"asked", "asked_worst"}, "semi_gan": {"accuracy"}}
    expected = measures.get(name, {"matching", "nmi", "least_used"})
    for stage in ("classifier scores", "diversity", "independent critic", "reconstruction", "representation"):
        monkeypatch.delitem(evaluation.STAGES, stage)
    flags = ["--labels", "6"] if name == "semi_gan" else []
    path = make_run(import_module(name), (1, 8, 8), *flags, dataset=bands, classes=3)
    assert run(path, "--n", 30) == 0
    assert result(path)["metrics"].keys() == expected


def test_a_report(new_model, make_run, run, bands, quick, tmp_path, capsys, monkeypatch):
    """Every figure that is named exists and is a picture; groups are not mixed."""
    monkeypatch.setattr(
        figures, "umap_plane", lambda z, seed: z[:, :2].numpy()
    )  # UMAP takes a minute to load
    monkeypatch.setattr(runs, "model_names", lambda: ["bands", "wgan", "dcgan"])
    new = new_model()
    image = make_run(import_module("wgan"), (1, 8, 8), name="a", dataset=bands, classes=3)
    points = make_run(import_module("wgan"), (2,), name="points")
    for path in (image, points):
        (path / "metrics.csv").write_text("step,W,generator_loss\n10,3,0\n20,1,1\n30,2,0\n")
    assert run(new, points, image, "--n", 200, "--report", tmp_path / "report") == 0
    printed = capsys.readouterr().out
    assert printed.count("* the best") == 2 and printed.strip().endswith("report.md")
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == 2
    named = {line.split("](")[1].split(")")[0] for line in text.split("![")[1:]}
    files = {file.name for file in (tmp_path / "report").glob("*.png")}
    assert named == files
    for kind in ("samples", "curves", "levels", "heat", "umap"):
        assert any(kind in name for name in files), kind
    for file in (tmp_path / "report").glob("*.png"):
        with Image.open(file) as picture:
            assert len(picture.convert("RGB").getcolors(100_000) or [0] * 9) > 1, file
    rows = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")}
    assert {"uniform noise", "chance", "real data", "raw pixels"} <= rows


def test_the_critic_whose_level_sets_are_drawn_sees_x_alone(make_run):
    names = {
        name: figures.score_of(runs.open_run(make_run(import_module(name), (2,), name=name), "cpu"))
        for name in ("wgan", "dcgan", "wbli")
    }
    assert names == {"wgan": "critic", "dcgan": "discriminator", "wbli": None}


# Mistakes


def test_the_other_runs_are_still_evaluated(make_run, run, tmp_path, quick, capsys):
    good, bad = make_run(import_module("wgan"), (2,)), tmp_path / "bad"
    bad.mkdir()
    (bad / "checkpoint.pt").write_bytes(b"no checkpoint")
    (tmp_path / "empty").mkdir()
    lost = make_run(import_module("wgan"), (1, 8, 8), name="lost", dataset=tmp_path / "nowhere")
    assert run(bad, tmp_path / "empty", lost, good) == 2
    lines = errors(capsys)
    assert len(lines) == 3 and result(good)["metrics"]["modes"] >= 0
    assert "damaged" in lines[0] and "holds no run" in lines[1] and "nowhere" in lines[2]


def test_a_full_memory_ends_one_run(make_run, run, quick, capsys, monkeypatch):
    def full(nets, z):
        if len(z) > 2:  # the trial on opening
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(len(z), 2)

    large, good = (make_run(import_module(name), (2,), name=name) for name in ("dcgan", "wgan"))
    monkeypatch.setattr(import_module("dcgan"), "generate", full)
    assert run(large, good) == 2
    (line,) = errors(capsys)
    assert "dcgan" in line and "--batch-size" in line and result(good)["metrics"]["modes"] >= 0


def test_a_missing_package_is_told_at_once(run, capsys, monkeypatch):
    monkeypatch.setattr(flags, "find_spec", lambda package: None if package == "torchmetrics" else package)
    assert run("nowhere") == 2
    (line,) = errors(capsys)
    assert "torchmetrics is missing" in line and "requirements-dev.txt" in line


def test_no_labels(make_run, run, bands, quick, tmp_path, capsys):
    """What needs none is measured; one line says what was not."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, file in enumerate(sorted(bands.rglob("*.png"))):
        shutil.copy(file, folder / f"{i}.png")
    path = make_run(import_module("wbli"), (1, 8, 8), dataset=folder, classes=0)
    assert run(path, "--n", 200) == 0
    found = result(path)
    assert {"diversity", "critic", "reconstruction"} <= found["metrics"].keys()
    assert not {"fid", "label_kept", "nn_z"} & found["metrics"].keys()
    assert len(found["not_measured"]) == 3 and all("no labels" in line for line in found["not_measured"])
    assert capsys.readouterr().err.count("not measured:") == 3


def test_fewer_samples_than_a_measure_needs(make_run, run, bands, quick, capsys):
    path = make_run(import_module("dcgan"), (1, 8, 8), dataset=bands, classes=3)
    assert run(path, "--n", 20) == 0
    missing = " ".join(result(path)["not_measured"])
    assert "more than 64 samples" in missing and "needs 128 samples" in missing
    assert {"diversity", "inception_score"} <= result(path)["metrics"].keys()
    assert capsys.readouterr().err.count("not measured:") == 2


@pytest.mark.parametrize("flags", [["--n", "1"], [], ["run", "--unknown"]])
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(flags)
    assert stopped.value.code == 2 and len(errors(capsys)) == 1


@pytest.mark.skipif(not MNIST.exists(), reason="needs MNIST in ../shared/data")
def test_the_halves_of_mnist_are_alike(monkeypatch):
    """Those of its test split as it is are not, being of other writers."""
    monkeypatch.setattr(evaluation, "classifier_for", lambda *_: (lambda x: x, 1.0))
    monkeypatch.setattr(evaluation.Data, "features", lambda self, x: None)
    config = Namespace(dataset="mnist", image_size=32, shape=[1, 32, 32])
    options = Namespace(n=10, seed=0, data_dir=str(MNIST), device=torch.device("cpu"), batch_size=250)
    options.stages, options.split = [*evaluation.STAGES], "test"
    data = evaluation.Data(runs.Run(Path("run"), "", None, config, 0, None, options.device), options)
    plain, _ = load_data("mnist", MNIST, "test", 32, "cpu")

    def difference(x):  # of the halves' mean ink, in its standard errors
        a, b = (half.float().mean((1, 2, 3)) for half in x.chunk(2))
        return abs(a.mean() - b.mean()) / (a.var() / len(a) + b.var() / len(b)).sqrt()

    assert difference(data.x_test) < 3 < 8 < difference(plain)
