"""experiments.study and .along: gradients that are those of the step, chunks, tables, commands and words."""

import os
import re
import signal
import subprocess
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

from experiments import along, study, training
from tools import classifier, evaluation, figures, report, runs, sync

FLAGS = ["--dataset", "grid", "--width", "2", "--batch-size", "8", "--log-every", "1"]
SMALL = study.Study({"wbli": 3, "wgan_gp": 2}, FLAGS, ["modes", "reconstruction"], 50, (1e-3, 2e-3), 2)


@pytest.fixture
def small(monkeypatch):
    """A study of eight short runs, the only one there is."""
    monkeypatch.setattr(study, "STUDIES", {"small": SMALL})


def done(model, lr=1e-3, seed=0, step=9, **metrics):
    """A run of nine steps, stopped at `step`, and its evaluation."""
    config = Namespace(lr=lr, seed=seed, steps=9)
    run = SimpleNamespace(name=model, config=config, step=step, path=Path(f"{model}-{lr:g}-{seed}"))
    references = {"real data": {"diversity": 0.5}}
    return run, {"dataset": "mnist", "metrics": metrics, "references": references}


# Training


def test_the_logged_norms_are_those_of_the_gradients():
    """Steepest descent with a rate of 1 moves the weights by the gradient."""
    nets = {name: nn.Linear(3, 2) for name in ("generator", "encoder", "critic")}
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=1.0) for name, net in nets.items()}
    moved = {}

    def iteration():
        for name, net in nets.items():
            before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
            net(torch.randn(4, 3)).square().sum().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            moved[name] = (nn.utils.parameters_to_vector(net.parameters()).detach() - before).norm()
        return {"W": torch.ones(())}

    *parts, logged, pictures = training.logging_gradients(nets, optimizers, iteration, "pictures")
    assert parts == [nets, optimizers] and pictures == "pictures"
    for _ in range(2):
        found = logged()
        assert found.keys() == {"W", "gradient of generator", "gradient of encoder"}
        for name in ("generator", "encoder"):
            assert_close(found[f"gradient of {name}"], moved[name])


@pytest.mark.parametrize("model", ["wbli", "dcgan"])
def test_a_run_of_a_study_is_that_of_the_model_file(model, tmp_path):
    """Bit for bit: nothing that is logged besides changes it."""
    flags = [*FLAGS, "--seed", "3", "--steps", "3", "--device", "cpu"]
    import_module(model).main([*flags, "--out", str(tmp_path / "plain")])
    assert training.train(model, flags, tmp_path / "study", with_gradients=True)
    plain, own = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("plain", "study"))
    assert_close(own["networks"], plain["networks"], rtol=0, atol=0)
    columns, more = (report.read_metrics(tmp_path / name) for name in ("plain", "study"))
    names = {"gradient of generator", "gradient of encoder"} if "encoder" in own["networks"] else None
    assert more.keys() - columns.keys() == (names or {"gradient of generator"})
    assert all((more[name] == columns[name]).all() for name in columns) and len(more["step"]) == 3


def test_what_was_stopped_goes_on(tmp_path, monkeypatch):
    """By Ctrl-C in the midst of a run; it ends as if it had not been."""
    flags, model, calls = [*FLAGS, "--steps", "4", "--device", "cpu"], import_module("bigan"), count(1)
    training.train("bigan", flags, tmp_path / "whole", with_gradients=True)
    with monkeypatch.context() as patch:
        drawn = model.draw_z

        def stop_at_the_third(*given):
            if next(calls) == 3:  # the first is for the pictures
                os.kill(os.getpid(), signal.SIGINT)
            return drawn(*given)

        patch.setattr(model, "draw_z", stop_at_the_third)
        with pytest.raises(SystemExit) as stopped:
            training.train("bigan", flags, tmp_path / "parts", with_gradients=True)
    assert stopped.value.code == 128 + signal.SIGINT
    assert 0 < torch.load(tmp_path / "parts/checkpoint.pt")["step"] < 4
    assert training.train("bigan", flags, tmp_path / "parts", with_gradients=True)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert_close(parts["networks"], whole["networks"], rtol=0, atol=0)
    texts = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "parts")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 5


def test_chunks_are_the_whole_run(tmp_path, monkeypatch):
    """Each leaves the checkpoint that a run of so many steps has; a second call trains nothing."""
    flags = [*FLAGS, "--device", "cpu"]
    found = list(training.chunks("dcgan", flags, tmp_path / "run", steps=5, every=2))
    assert [step for step, _ in found] == [2, 4, 5]
    training.train("dcgan", [*flags, "--steps", "5"], tmp_path / "whole")
    whole = torch.load(tmp_path / "whole/checkpoint.pt")
    saved = [torch.load(kept / "checkpoint.pt") for _, kept in found]
    assert [content["step"] for content in saved] == [2, 4, 5]
    assert_close(saved[-1]["networks"], whole["networks"], rtol=0, atol=0)
    texts = [(tmp_path / name / "metrics.csv").read_text() for name in ("run", "whole")]
    assert texts[0] == texts[1]
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("it is trained again"))
    assert list(training.chunks("dcgan", flags, tmp_path / "run", steps=5, every=2)) == found
    whole = training.chunks("dcgan", flags, tmp_path / "run", steps=4, every=2)
    assert [step for step, _ in whole] == [2, 4]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is at step 5 and has left no checkpoint at 3"):
        list(training.chunks("dcgan", flags, tmp_path / "run", steps=5, every=3))
    with pytest.raises(ValueError, match="--batch-size: .* has 8"):
        next(training.chunks("dcgan", [*flags, "--batch-size", "9"], tmp_path / "run", steps=5, every=2))


def test_runs_differ_in_rates_and_seeds_alone():
    runs = SMALL.runs()
    assert len(runs) == 8
    flags = [*FLAGS, "--lr", "0.002", "--seed", "1", "--steps", "3"]
    assert runs["wbli-0.002-1"] == ("wbli", flags)
    assert runs["wgan_gp-0.001-0"][1][-6:] == ["--lr", "0.001", "--seed", "0", "--steps", "2"]
    falling = replace(SMALL, falling=True).runs()["wgan_gp-0.001-0"][1]
    assert falling == [*runs["wgan_gp-0.001-0"][1], "--decay-start", "1", "--decay-end", "2"]
    own, flags = replace(SMALL, rates=(None,), seeds=1), [*FLAGS, "--seed", "0", "--steps", "7"]
    assert own.runs(steps=7) == {"wbli-0": ("wbli", flags), "wgan_gp-0": ("wgan_gp", flags)}
    (_, changed), (_, same) = replace(own, own={"wbli": ["--width", "3"]}).runs(steps=7).values()
    assert changed == [*FLAGS, "--width", "3", *flags[len(FLAGS) :]] and same == flags


@pytest.mark.parametrize("name", study.STUDIES)
def test_the_studies_take_flags_that_the_models_have(name):
    for model, flags in study.STUDIES[name].runs().values():
        config = import_module(model).parse_args(flags)
        assert config.lr in study.STUDIES[name].rates or study.STUDIES[name].rates == (None,)
    assert {*study.STUDIES[name].stages} <= evaluation.STAGES.keys()


# Results


def test_the_spread_of_each_model():
    """The median in the order from best to worst; what diverged is counted, not measured."""
    pairs = [done("wbli", fid=fid, label_kept=kept) for fid, kept in ((3, 0.5), (1, 0.9), (8, 0.6))]
    pairs += [done("wbli", seed=3, fid=0, label_kept=1)]
    diverged = [pairs[-1][0].path]
    pairs += [done("dcgan", fid=2, diversity=d, reconstruction_random=1) for d in (0.9, 0.1, 0.45, 0.7)]
    assert study.spread(pairs, diverged) == [
        ["best / median / worst", "runs", "digit-classifier FID", "diversity", "label kept"],
        ["wbli", "3 of 4", "1.00 / 3.00 / 8.00", "–", "90.0% / 60.0% / 50.0%"],
        ["dcgan", "4 of 4", "2.00 / 2.00 / 2.00", "0.450 / 0.700 / 0.100", "–"],
    ]
    for _, result in pairs:
        result["references"] = {}
    assert [row[2:] for row in study.spread(pairs, diverged)][0] == ["digit-classifier FID", "label kept"]


def test_mean_and_deviation_over_seeds():
    """Of each model and rate alone; what diverged is left out, one seed has no deviation."""
    pairs = [done("wbli", seed=seed, fid=fid) for seed, fid in enumerate((3, 1, 8))]
    pairs += [done("wbli", 2e-3, fid=5, label_kept=0.5), done("wbli", 5e-3, fid=0)]
    assert study.over_seeds(pairs, [pairs[2][0].path, pairs[-1][0].path]) == [
        ["mean ± standard deviation", "runs", "digit-classifier FID", "label kept"],
        ["wbli, learning rate 0.001", "2", "2.00 ± 1.41", "–"],
        ["wbli, learning rate 0.002", "1", "5.00", "50.0%"],
    ]


def test_what_the_critic_itself_varies_by(monkeypatch):
    """Of each model's best run, other samples and another critic with each seed."""
    pairs = [done("wbli", seed=seed, critic=w) for seed, w in enumerate((0.3, 0.1))] + [done("dcgan", fid=1)]
    data = SimpleNamespace(options=Namespace(n=4, batch_size=2))
    monkeypatch.setattr(runs, "draw_z", lambda run, n, seed: torch.full((n,), seed))
    monkeypatch.setattr(runs, "samples", lambda run, z, batch_size: z + 10 * run.config.seed)

    def critic(subject, data):
        return {"critic": subject.x[0].item() + torch.rand(()).item()}

    monkeypatch.setattr(evaluation, "critic", critic)
    noise = [torch.rand((), generator=torch.Generator().manual_seed(seed)).item() for seed in range(3)]
    expected = [10 + seed + part for seed, part in enumerate(noise)]
    title, row = study.critic_rows(pairs, data)
    assert title == ["W of independent critics", "run", "0", "1", "2", "standard deviation"]
    assert row == ["wbli", "wbli-0.001-1", *(f"{w:.3f}" for w in (*expected, np.std(expected, ddof=1)))]


def test_the_gradients_of_each_model(monkeypatch):
    logged = {"wbli-0.001-0": np.arange(1.0, 31), "wbli-0.001-1": np.full(9, 5.0)}
    logged |= {"wbli-0.002-0": np.ones(9), "wbli-0.002-1": np.ones(0)}

    def columns(path):
        return {"step": np.arange(len(logged[path.name])), "W": [], "gradient of encoder": logged[path.name]}

    monkeypatch.setattr(report, "read_metrics", columns)
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
    assert len(report.read_metrics(Path("study/small/wgan_gp-0.001-0"))["step"]) == 4


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
    monkeypatch.setattr(training, "train", lambda *_, **__: True)
    with pytest.raises(SystemExit) as stopped:
        study.main(["--device", "cpu"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("holds no run") == 8


@pytest.mark.parametrize("code", [2, 130])
def test_a_mistake_or_ctrl_c_in_a_run_ends_the_study(code, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(import_module("wbli"), "train", lambda *_, **__: sys.exit(code))
    with pytest.raises(SystemExit) as stopped:
        study.main(["--device", "cpu"])
    assert stopped.value.code == code and not Path("study").exists()


def test_ctrl_c_in_an_evaluation_is_one_line(small, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "check", stopped)
    with pytest.raises(SystemExit) as left:
        study.main(["--device", "cpu"])
    assert left.value.code == 130 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags", [["nothing"], ["--steps", "0"], ["--n", "1"], ["--data-dir"]], ids=str)
def test_a_mistake_is_one_line(small, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        study.main(flags)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# Along a run


def test_what_only_falls_is_not_correlated():
    """Two falling lines with noise of their own; and one that follows the other's noise."""
    line, rng = np.linspace(9, 0, 80), np.random.default_rng(0)
    noise = rng.standard_normal(80)
    whole, second_half = along.correlations(line + noise, line + rng.standard_normal(80))
    assert whole > 0.8 and abs(second_half) < 0.35
    assert along.correlations(line + noise, 2 * line + noise**3)[1] > 0.95
    assert along.correlations(line + noise, 2 * line - noise)[1] < -0.95
    assert along.correlations(line, -(line**3))[0] == -1
    early = np.where(np.arange(80) < 40, 100 * noise, noise)
    assert along.correlations(early, noise)[1] > 0.99  # the first half does not count


def test_along_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "trained", lambda untrained, *_: untrained.eval())
    flags = ["--dataset", "glyphs", "--steps", "6", "--every", "1", "--seeds", "1", "--n", "100"]
    more = ["--flags", "--width 2 --batch-size 4 --image-size 8 --log-every 1", "--device", "cpu"]
    places = ["--out", str(tmp_path / "along"), "--data-dir", str(tmp_path / "data")]
    along.main(["wgan", *flags, *more, *places])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (rows[1][0], rows[1][1], rows[1][3]) == ("wgan-0", "6", "W")
    assert all(-1 <= float(number) <= 1 for number in rows[1][4:]) and len(rows[1]) == 6
    with pytest.raises(SystemExit):
        along.main(["wgann", *flags, *more, *places])
    assert "wgann is no model" in capsys.readouterr().err
    assert 5_000 < (tmp_path / "along/along.png").stat().st_size < 150_000


def test_what_is_measured_along_a_run(tmp_path, monkeypatch):
    """FID is that of tools.evaluate, the estimate that of metrics.csv at the step."""
    monkeypatch.setattr(classifier, "trained", lambda untrained, *_: untrained.eval())
    flags = [
        "--dataset",
        "glyphs",
        "--width",
        "2",
        "--batch-size",
        "4",
        "--image-size",
        "8",
        "--log-every",
        "1",
    ]
    places = {"data_dir": str(tmp_path / "data"), "device": torch.device("cpu")}
    flags += ["--data-dir", places["data_dir"], "--device", "cpu"]
    pieces = list(training.chunks("wgan", flags, tmp_path / "run", steps=4, every=2))
    found = along.measured(pieces, tmp_path / "run", Namespace(n=100, **places))
    asked = Namespace(n=100, split="test", stages=["classifier scores"], batch_size=250, seed=0, **places)
    asked.runs = [kept for _, kept in pieces]
    (runs,) = evaluation.opened(asked, pytest.fail).values()
    _, evaluated = evaluation.evaluate_group(runs, asked, pytest.fail)
    assert found["fid"] == pytest.approx([result["metrics"]["fid"] for _, result in evaluated], rel=1e-4)
    logged = report.read_metrics(tmp_path / "run")
    assert found["step"] == [2, 4] and logged["step"].tolist() == [1, 2, 3, 4]
    assert found["W"] == figures.filtered(logged["W"])[[1, 3]].tolist()


# Reproducing


def commands():
    """[(model, flags, what --quick adds)] of commands.txt."""
    lines = (sync.ROOT / "experiments/commands.txt").read_text(encoding="utf-8").splitlines()
    parts = [line.partition("|") for line in lines if not line.startswith("#")]
    return [(full.split()[0], full.split()[1:], quick.split()) for full, _, quick in parts]


def test_every_model_has_a_command_with_flags_that_it_takes():
    assert [model for model, _, _ in commands()] == sync.MODELS
    for model, full, quick in commands():
        module = import_module(model)
        config, small = (module.parse_args([*flags, "--device", "cpu"]) for flags in (full, full + quick))
        assert config.dataset == small.dataset == "mnist"
        assert small.width < config.width and small.batch_size <= config.batch_size


@pytest.mark.parametrize("mode", [[], ["--quick"]], ids=str)
def test_reproduce_runs_the_commands(mode, tmp_path):
    """With a stand-in for Python; what was begun is resumed, and all is evaluated at the end."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "out/wgan").mkdir(parents=True)
    (tmp_path / "out/wgan/checkpoint.pt").touch()
    places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out"), "DATA": "d"}
    script = [str(sync.ROOT / "experiments/reproduce.sh"), *mode]
    done = subprocess.run(script, env=os.environ | places, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    expected = []
    for model, full, quick in commands():
        out = f"{tmp_path}/out/{model}"
        flags = [*full, *(quick if mode else []), "--data-dir", "d", "--out", out]
        expected.append(" ".join([f"{model}.py", *flags]))
    expected[1] = f"wgan.py --resume {tmp_path}/out/wgan --data-dir d"
    assert lines == expected
    assert last.startswith(f"-m tools.evaluate {tmp_path}/out/dcgan ") and f"{tmp_path}/out/age " in last


def test_reproduce_takes_no_other_flag():
    script = [str(sync.ROOT / "experiments/reproduce.sh"), "--fast"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage:")
