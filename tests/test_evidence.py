"""experiments.quality, .mixture and .gradients: what they measure is what closed forms say, and they run."""

import re
from argparse import Namespace
from importlib import import_module
from math import inf
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments import gradients, mixture, quality, training
from gm_wae import classify
from tools import classifier, sync, timing
from tools.runs import open_run

# Quality over time


def test_the_commands_are_those_of_the_pages():
    """docs/models.md shows, for each model, the command of commands.txt whose figures it has."""
    page = (sync.ROOT / "docs/models.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^ {4}python (\w+)\.py (.*)$", page, re.MULTILINE))
    found = quality.commands()
    assert list(found) == list(shown) == sync.MODELS
    for name in sync.MODELS:
        model = import_module(name)
        asked, of_the_page = (
            model.parse_args([*flags, "--device", "cpu"]) for flags in (found[name], shown[name].split())
        )
        assert vars(asked) == vars(of_the_page), name


def test_the_quality_at_a_minute():
    """That of the last checkpoint before it; none before the first, none after the run's end."""
    minutes, fid = [0.6 * i for i in range(1, 6)], [50.0, 40.0, 30.0, 20.0, 10.0]
    assert quality.at_minutes(minutes, fid)[:4] == ["50.00", "30.00", "–", "–"]
    assert quality.at_minutes([4.0, 10.0], [2.0, 1.0])[:4] == ["–", "–", "2.00", "1.00"]
    assert quality.at_minutes([1.0], [2.0])[:2] == ["2.00", "–"]


def test_the_checkpoints_of_a_finished_run_are_thinned(tmp_path, monkeypatch):
    checked = []
    for step in range(0, 1001, 100):
        kept = tmp_path / f"checkpoints/{step:07d}"
        kept.mkdir(parents=True)
        (kept / "checkpoint.pt").touch()
    monkeypatch.setattr("experiments.training.check_flags", lambda *given: checked.append(given))
    found = quality.checkpoints("dcgan", ["--width", "2"], tmp_path, 1000, 5)
    assert checked == [("dcgan", ["--width", "2"], tmp_path)]
    assert [step for step, _ in found] == [100, 200, 500, 1000]
    assert all(kept == tmp_path / f"checkpoints/{step:07d}" for step, kept in found)


def test_the_seconds_of_gm_wae_are_those_of_one_core_with_its_pretraining(monkeypatch):
    """The time of a step is a race on one thread; what build() takes comes before it."""
    seen, threads = [], torch.get_num_threads()

    def race(functions, seconds, device):
        seen.append((torch.get_num_threads(), device.type))
        return {"step": 7}

    monkeypatch.setattr(timing, "race", race)
    flags = ["--dataset", "glyphs", "--image-size", "8", "--width", "2", "--batch-size", "4"]
    torch.set_num_threads(2)
    try:
        long = quality.seconds_of("gm_wae", [*flags, "--pretrain-steps", "100"])
        short = quality.seconds_of("gm_wae", [*flags, "--pretrain-steps", "1"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert short[1] == long[1] == 7 and long[0] > 2 * short[0]
    assert seen == [(1, "cpu")] * 2


def test_quality_over_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "SECONDS", 0.1)
    monkeypatch.setattr(classifier, "trained", lambda untrained, *_: untrained.eval())
    flags = ["--points", "2", "--steps", "4", "--n", "100", "--device", "cpu"]
    small = "--dataset glyphs --image-size 8 --width 2 --batch-size 4 --log-every 1"
    quality.main(["dcgan", *flags, "--flags", small, "--out", str(tmp_path), "--data-dir", str(tmp_path)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1][0] == "dcgan" and float(rows[1][1]) > 0 and float(rows[1][-2]) > 0
    assert sorted(path.name for path in (tmp_path / "dcgan/checkpoints").iterdir()) == ["0000002", "0000004"]
    assert 5_000 < (tmp_path / "quality.png").stat().st_size < 200_000


# GM-WAE's codes and its prior


def test_the_scale_of_the_mmd():
    """Of equal mixtures 0; it grows with what is lost."""
    torch.manual_seed(0)
    found = mixture.scale(torch.eye(4), 0.2, 40, 12)
    same, one, two, half = found.values()
    assert abs(same[0]) < 4 * same[1] < one[0] < two[0] - one[1]
    assert half[0] > 10 * half[1] and list(found)[1] == "one component lost"


def test_codes_on_the_prior_have_none(monkeypatch):
    """A posterior that is the prior, whatever x: 0 in both modes; one component lost: as in the scale."""

    class Codes(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.register_buffer("mean", torch.eye(3)[k])

        def forward(self, x):
            return torch.cat([self.mean, torch.full((3,), 2 * torch.tensor(0.2).log())]).expand(len(x), 6)

    class Constant(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.register_buffer("logits", torch.tensor(logits))

        def forward(self, x):
            return self.logits.expand(len(x), 3)

    seen = []
    monkeypatch.setattr("gm_wae.classify", lambda nets, x: seen.append(nets.training) or classify(nets, x))
    torch.manual_seed(0)
    x, config = torch.zeros(480, 2), Namespace(z_dim=3, components=3, prior_std=0.2)
    expected = mixture.scale(torch.eye(3), 0.2, 40, 12)
    for logits, of in (([0.0, 0.0, 0.0], "the prior itself"), ([-99.0, 0.0, 0.0], "one component lost")):
        nets = nn.ModuleDict({"encoder": nn.ModuleList(map(Codes, range(3))), "classifier": Constant(logits)})
        run = SimpleNamespace(nets=nets, config=config)
        for mode in (True, False):
            nets.train()
            value, error = mixture.of_codes(run, x, 40, 12, training=mode)
            assert seen.pop() is mode and nets.training
            assert value == pytest.approx(expected[of][0], abs=4 * (error + expected[of][1]))


def test_batches_are_drawn_from_the_whole_split(make_run, tmp_path, monkeypatch):
    """MNIST's test split is ordered by its writers: in its order the MMD was six times as large."""
    x, seen = torch.arange(64).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8), []
    monkeypatch.setattr("tools.runs.load_split", lambda *_: (x, None))
    monkeypatch.setattr(mixture, "of_codes", lambda run, x, *_, **__: seen.append(x[:, 0, 0, 0]) or (0, 0))
    path = make_run(import_module("gm_wae"), (1, 8, 8))
    mixture.main([str(path), "--n", "2", "--batches", "2"])
    assert len(seen) == 2 and seen[0].sort().values.equal(x[:, 0, 0, 0]) and not seen[0].equal(x[:, 0, 0, 0])


def test_the_mixture_of_a_run(make_run, tmp_path, capsys):
    path = make_run(import_module("gm_wae"), (1, 8, 8))
    flags = ["--n", "20", "--batches", "3", "--data-dir", str(tmp_path)]
    mixture.main([str(path), *flags])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 8 and "eval mode" in rows[5] and "training mode" in rows[6]
    other = make_run(import_module("dcgan"), (1, 8, 8), name="other")
    with pytest.raises(SystemExit):
        mixture.main([str(other), *flags])
    assert "only gm_wae.py has a mixture" in capsys.readouterr().err


# Gradients


class Slope(nn.Module):
    """F(x, z) = a · x."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, x, z):
        return x @ self.a


def test_the_size_of_a_gradient(make_run):
    """Of −a·x it is ‖a‖; of log(1 − D) and −log D that times D and 1 − D, x being 0."""
    run = open_run(make_run(import_module("wbli"), (2,)), "cpu")
    run.nets["generator"].register_forward_hook(lambda net, args, x: 0 * x)
    slope = Slope()
    assert gradients.sizes(run, slope, 20) == {"−F": pytest.approx(5)}
    run.name = "bigan"
    found = gradients.sizes(run, lambda x, z: slope(x, z) - torch.tensor(3.0).log(), 20)
    assert found == {"log(1 − D)": pytest.approx(5 / 4), "−log D": pytest.approx(15 / 4)}


@pytest.mark.parametrize("name", gradients.STEPS)
def test_only_the_critic_is_trained(name, make_run):
    run = open_run(make_run(import_module(name), (2,)), "cpu")
    before = {key: value.clone() for key, value in run.nets.state_dict().items()}
    gradients.train_critic(run, torch.randn(64, 2), 3)
    assert not run.nets["generator"].training  # its batch norms keep their statistics
    changed = {
        key.split(".")[0] for key, value in run.nets.state_dict().items() if not value.equal(before[key])
    }
    assert changed == {"critic" if name == "wbli" else "discriminator"}


def test_the_critic_is_trained_to_tell_them_apart(make_run):
    """Its score of points far away rises above that of the fakes; after one step it has not yet."""
    apart = {}
    for steps in (1, 100):
        run = open_run(make_run(import_module("dcgan"), (2,), name=f"run-{steps}"), "cpu")
        run.config.batch_size, x = 64, torch.full((64, 2), 8.0)
        torch.manual_seed(0)
        score = gradients.train_critic(run, x, steps)
        z = run.model.draw_z(64, run.config, torch.device("cpu"))
        apart[steps] = (score(x, z).mean() - score(run.model.generate(run.nets, z), z).mean()).item()
    assert apart[1] < 1 < 4 < apart[100]


def test_the_verdict():
    assert gradients.verdict([0.1, 1, 10]) == "yes"
    for values in ([0.1, 1, 10.1], [0.0, 1], [0.0], [1, inf], [inf, inf]):
        assert gradients.verdict(values) == "no", values


def test_the_gradients_of_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gradients, "RATES", (1e-3,))
    monkeypatch.setattr(gradients, "FLAGS", ["--dataset", "grid", "--width", "2", "--batch-size", "4"])
    gradients.main(["bigan", "--steps", "6", "--optimal", "1", "--n", "10", "--out", str(tmp_path)])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and rows[1].startswith("bigan, log(1 − D)") and rows[2].startswith("bigan, −log D")
    assert len(list((tmp_path / "bigan-0.001/checkpoints").iterdir())) == 6
    assert 5_000 < (tmp_path / "claims-gradients.png").stat().st_size < 200_000


def test_a_run_that_diverges_has_exploded(tmp_path, monkeypatch, capsys):
    """The table has the others nevertheless."""
    monkeypatch.setattr(gradients, "RATES", (1e-3,))
    train = training.train
    monkeypatch.setattr(training, "train", lambda name, *of: name != "dcgan" and train(name, *of))
    monkeypatch.setattr(gradients, "FLAGS", ["--dataset", "grid", "--width", "2", "--batch-size", "4"])
    gradients.main(["dcgan", "wbli", "--steps", "6", "--optimal", "1", "--n", "10", "--out", str(tmp_path)])
    output = capsys.readouterr()
    rows = [line.split() for line in output.out.splitlines()]
    assert [row[-1] for row in rows[1:4]] == ["no", "no", "yes"] and rows[1][-2] == "inf"
    assert "dcgan-0.001 diverged before step 1" in output.err
