"""tools.study: the same networks in every model, gradients that are those of the step, tables and words."""

import re
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tools import history, study

ROOT = Path(__file__).parents[1]
SHARED = [name for name, its in study.STUDIES.items() if its.shared]
FLAGS = ["--dataset", "grid", "--width", "2", "--batch-size", "8", "--log-every", "1"]
SMALL = study.Study({"wbli": 3, "wgan_gp": 2}, FLAGS, ["modes", "reconstruction"], 50, (1e-3, 2e-3), 2)


@pytest.fixture
def small(monkeypatch):
    """A study of eight short runs, the only one there is."""
    monkeypatch.setattr(study, "STUDIES", {"small": SMALL})


def done(model, lr=1e-3, seed=0, **metrics):
    """A run and its evaluation."""
    config = Namespace(model=model, lr=lr, seed=seed)
    run = SimpleNamespace(config=config, path=Path(f"{model}-{lr:g}-{seed}"))
    references = {"real data": {"diversity": 0.5}}
    return run, {"dataset": "mnist", "metrics": metrics, "references": references}


# Training


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_all_models_have_the_same_networks(name, network):
    """With the same initial weights; WGAN-GP's critic is of the layers that WBLI's has."""
    with study.prepared(study.STUDIES[name]):
        found = {}
        for model in study.STUDIES[name].models:
            module = import_module(model)
            flags = ["--width", "4", "--z-dim", "5", "--network", network, "--device", "cpu"]
            config = module.parse_args(flags)
            config.shape = [1, 16, 16] if name != "points" else [2]
            if config.shape == [2] and network == "conv":
                pytest.skip("points have no conv network")
            torch.manual_seed(0)
            found[model] = module.networks(config)
            x, z = torch.randn(3, *config.shape), torch.randn(3, 5)
            assert module.generate(found[model], z).shape == x.shape
            if model != "wgan_gp":
                assert module.encode(found[model], x).shape == z.shape
                assert len(module.features(found[model], x)) == 3
    wbli, bigan, wgan_gp = found["wbli"], found["bigan"], found["wgan_gp"]
    pairs = [(nets["generator"], wbli["generator"]) for nets in (bigan, wgan_gp)]
    pairs += [(bigan["encoder"][0], wbli["encoder"]), (bigan["discriminator"], wbli["critic"])]
    for net, of_wbli in pairs:
        assert str(net) == str(of_wbli)
        assert_close(dict(net.named_parameters()), dict(of_wbli.named_parameters()), rtol=0, atol=0)
    assert bigan["encoder"](100 * x).abs().max() <= 1
    assert wgan_gp["critic"](x).shape == (3,) and wgan_gp.keys() == {"generator", "critic"}
    kinds = {type(layer) for layer in wgan_gp["critic"].modules()}
    assert kinds <= {type(layer) for layer in wbli["critic"].modules()} and nn.LeakyReLU in kinds


def test_models_are_as_before_outside():
    modules = [import_module(name) for name in study.STUDIES["points"].models]
    before = [(module.networks, module.run) for module in modules]
    with study.prepared(study.STUDIES["points"]):
        assert all(module.networks is not its[0] for module, its in zip(modules, before, strict=True))
    assert [(module.networks, module.run) for module in modules] == before


def test_the_logged_norms_are_those_of_the_gradients():
    """Steepest descent with a rate of 1 moves the weights by the gradient."""
    nets = {name: nn.Linear(3, 2) for name in ("generator", "encoder", "critic")}
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=1.0) for name, net in nets.items()}
    moved, caught = {}, []

    def iteration():
        for name, net in nets.items():
            before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
            net(torch.randn(4, 3)).square().sum().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            moved[name] = (nn.utils.parameters_to_vector(net.parameters()).detach() - before).norm()
        return {"W": torch.ones(())}

    study.with_gradients(lambda *given: caught.append(given))("config", nets, optimizers, iteration, "more")
    config, _, _, logged, more = caught[0]
    assert (config, more) == ("config", "more")
    for _ in range(2):
        found = logged()
        assert found.keys() == {"W", "gradient of generator", "gradient of encoder"}
        for name in ("generator", "encoder"):
            assert_close(found[f"gradient of {name}"], moved[name])


def test_a_run_of_a_study_is_that_of_the_model_file(tmp_path):
    """Bit for bit: nothing that is logged besides changes it."""
    flags = [*FLAGS, "--seed", "3", "--steps", "3", "--device", "cpu"]
    import_module("wbli").main([*flags, "--out", str(tmp_path / "plain")])
    with study.prepared(SMALL):
        assert study.train("wbli", flags, tmp_path / "study")
    plain, own = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("plain", "study"))
    assert_close(own["networks"], plain["networks"], rtol=0, atol=0)
    columns, more = (history.read_metrics(tmp_path / name) for name in ("plain", "study"))
    assert more.keys() - columns.keys() == {"gradient of generator", "gradient of encoder"}
    assert all((more[name] == columns[name]).all() for name in columns) and len(more["step"]) == 3


def test_runs_differ_in_rates_and_seeds_alone():
    runs = SMALL.runs()
    assert len(runs) == 8 and runs["wbli-0.002-1"] == (
        "wbli", [*FLAGS, "--seed", "1", "--steps", "3", "--lr", "0.002"]
    )  # fmt: skip
    assert runs["wgan_gp-0.001-0"][1][-5:] == ["0", "--steps", "2", "--lr", "0.001"]
    own, flags = replace(SMALL, rates=(None,), seeds=1), [*FLAGS, "--seed", "0", "--steps", "7"]
    assert own.runs(steps=7) == {"wbli-0": ("wbli", flags), "wgan_gp-0": ("wgan_gp", flags)}


@pytest.mark.parametrize("name", study.STUDIES)
def test_the_studies_take_flags_that_the_models_have(name):
    for model, flags in study.STUDIES[name].runs().values():
        config = import_module(model).parse_args(flags)
        assert config.lr in study.STUDIES[name].rates or study.STUDIES[name].rates == (None,)
    assert {*study.STUDIES[name].stages} <= study.evaluate.STAGES.keys()


# Results


def test_the_spread_of_each_model():
    pairs = [done("wbli", fid=fid, label_kept=kept) for fid, kept in ((3, 0.5), (1, 0.9), (8, 0.6))]
    pairs += [done("dcgan", fid=2, diversity=d, reconstruction_random=1) for d in (0.9, 0.4, 0.55, 0.6)]
    assert study.spread(pairs) == [
        ["best / median / worst", "runs", "digit-classifier FID", "diversity", "label kept"],
        ["wbli", "3", "1.00 / 3.00 / 8.00", "–", "90.0% / 60.0% / 50.0%"],
        ["dcgan", "4", "2.00 / 2.00 / 2.00", "0.550 / 0.575 / 0.900", "–"],
    ]


def test_the_gradients_of_each_model(monkeypatch):
    logged = {"wbli-0.001-0": np.arange(1.0, 31), "wbli-0.001-1": np.full(30, 5.0)}
    logged["wbli-0.002-0"] = np.ones(9)

    def columns(path):
        return {"step": [], "W": [], "gradient of encoder": logged[path.name]}

    monkeypatch.setattr(history, "read_metrics", columns)
    rows = study.gradient_rows([done("wbli"), done("wbli", seed=1), done("wbli", lr=2e-3)])
    assert rows[1:] == [
        ["encoder, wbli, learning rate 0.001", "3.5", "17", "1", "30"],
        ["encoder, wbli, learning rate 0.002", "1", "1", "1", "1"],
    ]


# The command


def test_the_command(small, tmp_path, monkeypatch, capsys):
    """It trains, evaluates, prints and draws; once more, it trains nothing; with more steps, the rest."""
    monkeypatch.chdir(tmp_path)
    study.main(["--device", "cpu"])
    out, err = capsys.readouterr()
    assert "small, run 8 of 8: wgan_gp-0.002-1" in err and "mean of 2: wbli-0.001-0 …" in out
    assert re.search(r"^wbli +4 ", out, re.MULTILINE) and "generator, wgan_gp, learning rate 0.002" in out
    assert "critic W" not in out and "label kept" in out and "torch" in out
    assert 5_000 < Path("study/study-small.png").stat().st_size < 150_000
    times = {path: path.stat().st_mtime_ns for path in Path("study").rglob("checkpoint.pt")}
    assert len(times) == 8
    study.main(["small", "--device", "cpu"])
    again, _ = capsys.readouterr()
    assert again.split("\n\n")[1:] == [*out.split("\n\n")[1:]]  # but for what is finished
    assert times == {path: path.stat().st_mtime_ns for path in times}
    study.main(["small", "--device", "cpu", "--steps", "4", "--n", "20"])
    assert "20 samples" in capsys.readouterr().out
    assert len(history.read_metrics(Path("study/small/wgan_gp-0.001-0"))["step"]) == 4


def test_a_run_that_diverges(small, tmp_path, monkeypatch, capsys):
    """It is named, the others are still evaluated, and the exit code tells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(study.STUDIES, "small", replace(SMALL, rates=(1e-3, 1e18), seeds=1))
    with pytest.raises(SystemExit) as stopped:
        study.main(["--device", "cpu", "--steps", "5"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and "wbli-1e+18-0 diverged" in err.replace("\\", "/")
    assert re.search(r"^wgan_gp-0.001-0 +5 ", out, re.MULTILINE)


def test_ctrl_c_ends_the_study(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(import_module("wbli"), "main", lambda flags: (_ for _ in ()).throw(SystemExit(130)))
    with pytest.raises(SystemExit) as stopped:
        study.main(["--device", "cpu"])
    assert stopped.value.code == 130 and not Path("study").exists()


@pytest.mark.parametrize("flags", [["nothing"], ["--steps", "0"], ["--n", "1"], ["--device", "mps"]], ids=str)
def test_a_mistake_is_one_line(small, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        study.main(flags)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_documents():
    """docs/claims.md names every study's command and shows its figure; the README names the flags."""
    document = (ROOT / "docs/claims.md").read_text(encoding="utf-8")
    for name in study.STUDIES:
        assert f"python -m tools.study {name}" in document and f"(study-{name}.png)" in document
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    flags = re.findall(r'flag\("(--[a-z-]+)"', (ROOT / "tools/study.py").read_text(encoding="utf-8"))
    assert flags and [flag for flag in [*flags, "python -m tools.study"] if flag not in readme] == []
