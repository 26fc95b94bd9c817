"""tools.study: the same networks in every model, gradients that are those of the step, tables and words."""

import os
import re
import signal
import sys
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tools import history, study

FLAGS = ["--dataset", "grid", "--width", "2", "--batch-size", "8", "--log-every", "1"]
SMALL = study.Study({"wbli": 3, "wgan_gp": 2}, FLAGS, ["modes", "reconstruction"], 50, (1e-3, 2e-3), 2)


@pytest.fixture
def small(monkeypatch):
    """A study of eight short runs, the only one there is."""
    monkeypatch.setattr(study, "STUDIES", {"small": SMALL})


def done(model, lr=1e-3, seed=0, step=9, **metrics):
    """A run of nine steps, stopped at `step`, and its evaluation."""
    config = Namespace(model=model, lr=lr, seed=seed, steps=9)
    run = SimpleNamespace(config=config, step=step, path=Path(f"{model}-{lr:g}-{seed}"))
    references = {"real data": {"diversity": 0.5}}
    return run, {"dataset": "mnist", "metrics": metrics, "references": references}


# Training


@pytest.mark.parametrize("shape, network", [([1, 16, 16], "conv"), ([1, 16, 16], "mlp"), ([2], "mlp")])
def test_all_models_have_the_same_networks(shape, network):
    """With the same initial weights; WGAN-GP's critic has the layers of WBLI's encoder and one score."""
    found, x, z = {}, torch.randn(3, *shape), torch.randn(3, 5)
    with study.prepared(study.STUDIES["points"]):
        for model in ("wbli", "bigan", "wgan_gp"):
            module = import_module(model)
            flags = ["--width", "4", "--z-dim", "5", "--network", network, "--device", "cpu"]
            config = module.parse_args(flags)
            config.shape = shape
            torch.manual_seed(0)
            nets = found[model] = module.networks(config)
            assert module.generate(nets, z).shape == x.shape
            if model != "wgan_gp":
                assert module.encode(nets, x).shape == z.shape and len(module.features(nets, x)) == 3
    wbli, bigan, wgan_gp = found["wbli"], found["bigan"], found["wgan_gp"]
    pairs = [(nets["generator"], wbli["generator"]) for nets in (bigan, wgan_gp)]
    pairs += [(bigan["encoder"][0], wbli["encoder"]), (bigan["discriminator"], wbli["critic"])]
    for net, of_wbli in pairs:
        assert str(net) == str(of_wbli)
        assert_close(dict(net.named_parameters()), dict(of_wbli.named_parameters()), rtol=0, atol=0)
    assert bigan["encoder"](100 * x).abs().max() <= 1
    assert wgan_gp["critic"](x).shape == (3,) and wgan_gp.keys() == {"generator", "critic"}
    encoder = str(wbli["encoder"]).splitlines()[1:-2]  # but for its last layer, to z
    critic = [line[2:] for line in str(wgan_gp["critic"]).splitlines()[2 : 2 + len(encoder)]]
    assert len(encoder) > 4 and critic == encoder


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


@pytest.mark.parametrize("model", ["wbli", "bigan", "wgan_gp", "alpha_gan", "dcgan"])
def test_a_run_of_a_study_is_that_of_the_model_file(model, tmp_path):
    """Bit for bit: nothing that is logged besides changes it."""
    flags = [*FLAGS, "--seed", "3", "--steps", "3", "--device", "cpu"]
    import_module(model).main([*flags, "--out", str(tmp_path / "plain")])
    with study.prepared(replace(SMALL, models={model: 3}, shared=False)):
        assert study.train(model, flags, tmp_path / "study")
    plain, own = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("plain", "study"))
    assert_close(own["networks"], plain["networks"], rtol=0, atol=0)
    columns, more = (history.read_metrics(tmp_path / name) for name in ("plain", "study"))
    names = {"gradient of generator", "gradient of encoder"} if "encoder" in own["networks"] else None
    assert more.keys() - columns.keys() == (names or {"gradient of generator"})
    assert all((more[name] == columns[name]).all() for name in columns) and len(more["step"]) == 3


def test_what_was_stopped_goes_on(tmp_path, monkeypatch):
    """By Ctrl-C in the midst of a run; it ends as if it had not been."""
    flags, model, calls = [*FLAGS, "--steps", "4", "--device", "cpu"], import_module("bigan"), count(1)
    points = replace(SMALL, models={"bigan": 4})
    with study.prepared(points):
        study.train("bigan", flags, tmp_path / "whole")
        with monkeypatch.context() as patch:
            drawn = model.draw_z

            def stop_at_the_third(*given):
                if next(calls) == 3:  # the first is for the pictures
                    os.kill(os.getpid(), signal.SIGINT)
                return drawn(*given)

            patch.setattr(model, "draw_z", stop_at_the_third)
            with pytest.raises(SystemExit) as stopped:
                study.train("bigan", flags, tmp_path / "parts")
        assert stopped.value.code == 128 + signal.SIGINT
        assert torch.load(tmp_path / "parts/checkpoint.pt")["step"] == 2
        assert study.train("bigan", flags, tmp_path / "parts")
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert_close(parts["networks"], whole["networks"], rtol=0, atol=0)
    texts = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "parts")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 5


def test_runs_differ_in_rates_and_seeds_alone():
    runs = SMALL.runs()
    assert len(runs) == 8
    flags = [*FLAGS, "--lr", "0.002", "--seed", "1", "--steps", "3"]
    assert runs["wbli-0.002-1"] == ("wbli", flags)
    assert runs["wgan_gp-0.001-0"][1][-6:] == ["--lr", "0.001", "--seed", "0", "--steps", "2"]
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
    """The median in the order from best to worst; what diverged is counted, not measured."""
    pairs = [done("wbli", fid=fid, label_kept=kept) for fid, kept in ((3, 0.5), (1, 0.9), (8, 0.6))]
    pairs += [done("wbli", step=3, fid=0, label_kept=1)]
    pairs += [done("dcgan", fid=2, diversity=d, reconstruction_random=1) for d in (0.9, 0.1, 0.45, 0.7)]
    assert study.spread(pairs) == [
        ["best / median / worst", "runs", "digit-classifier FID", "diversity", "label kept"],
        ["wbli", "3 of 4", "1.00 / 3.00 / 8.00", "–", "90.0% / 60.0% / 50.0%"],
        ["dcgan", "4 of 4", "2.00 / 2.00 / 2.00", "0.450 / 0.700 / 0.100", "–"],
    ]
    for _, result in pairs:
        result["references"] = {}
    assert [row[2:] for row in study.spread(pairs)][0] == ["digit-classifier FID", "label kept"]


def test_the_gradients_of_each_model(monkeypatch):
    logged = {"wbli-0.001-0": np.arange(1.0, 31), "wbli-0.001-1": np.full(9, 5.0)}
    logged |= {"wbli-0.002-0": np.ones(9), "wbli-0.002-1": np.ones(0)}

    def columns(path):
        return {"step": np.arange(len(logged[path.name])), "W": [], "gradient of encoder": logged[path.name]}

    monkeypatch.setattr(history, "read_metrics", columns)
    pairs = [done("wbli", *given) for given in ((1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1))]
    for order in (pairs, [pairs[1], pairs[0], *pairs[:1:-1]]):
        assert study.gradient_rows(order)[1:] == [
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
    assert again == out
    assert times == {path: path.stat().st_mtime_ns for path in times}
    study.main(["small", "--device", "cpu", "--steps", "4", "--n", "20"])
    assert "20 samples" in capsys.readouterr().out
    assert len(history.read_metrics(Path("study/small/wgan_gp-0.001-0"))["step"]) == 4


def test_a_run_that_diverges(small, tmp_path, monkeypatch, capsys):
    """It is named, the others are still evaluated, the exit code tells, and Ctrl-C works as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(study.STUDIES, "small", replace(SMALL, rates=(1e-3, 1e18), seeds=1))
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with pytest.raises(SystemExit) as stopped:
        study.main(["--device", "cpu", "--steps", "5"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and "wbli-1e+18-0 diverged" in err.replace("\\", "/")
    assert re.search(r"^wgan_gp-0.001-0 +5 ", out, re.MULTILINE) and "1 of 2" in out
    assert re.search(r"^wbli-1e\+18-0 +0 ", out, re.MULTILINE)
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before
    assert not torch.backends.cudnn.benchmark


def test_a_run_that_cannot_be_read(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "train", lambda *_: True)
    with pytest.raises(SystemExit) as stopped:
        study.main(["--device", "cpu"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("holds no run") == 8


@pytest.mark.parametrize("code", [2, 130])
def test_a_mistake_or_ctrl_c_in_a_run_ends_the_study(code, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(import_module("wbli"), "main", lambda flags: sys.exit(code))
    with pytest.raises(SystemExit) as stopped:
        study.main(["--device", "cpu"])
    assert stopped.value.code == code and not Path("study").exists()


def test_ctrl_c_in_an_evaluation_is_one_line(small, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "check", stopped)
    with pytest.raises(SystemExit):
        study.main(["--device", "cpu"])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags", [["nothing"], ["--steps", "0"], ["--n", "1"], ["--data-dir"]], ids=str)
def test_a_mistake_is_one_line(small, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        study.main(flags)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
