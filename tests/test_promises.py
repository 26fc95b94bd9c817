"""What a run promises: exact resuming, whole checkpoints, honest stops. One test for each promise."""

import csv
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from importlib import import_module
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
ALL = ("dcgan", "wgan", "wgan_gp", "bigan", "wbli", "gm_wae", "alpha_gan")
MODELS = [name for name in ALL if (ROOT / f"{name}.py").exists()]
EXTRA = {"wbli": [["--constraint", "gp"], ["--constraint", "clip"]]}  # what makes another run of a model
EXTRA |= {"gm_wae": [["--pretrain-steps", 3]]}
CASES = [(name, flags) for name in MODELS for flags in EXTRA.get(name, [[]])]
TINY = ["--device", "cpu", "--width", 2, "--batch-size", 4]
POINTS = ["--dataset", "ring", *TINY]
SOLO = MODELS[0]  # for what only the run part does, which is the same everywhere

each = pytest.mark.parametrize("model", MODELS)


def train(model, *flags):
    """`python model.py flags`, in this process."""
    return import_module(model).main([str(flag) for flag in flags])


def stops(code, model, *flags):
    """train, which has to end with this exit code."""
    with pytest.raises(SystemExit) as stopped:
        train(model, *flags)
    assert stopped.value.code == code


def load(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def files(folder):
    """{path: bytes} of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def rows(out):
    path = Path(out) / "metrics.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def differences(a, b, where=""):
    """The places at which two checkpoints are not the same to the bit."""
    if type(a) is not type(b):
        return [f"{where}: {type(a)} {type(b)}"]
    if isinstance(a, dict):
        keys = [f"{where}: {list(a)} {list(b)}"] if list(a) != list(b) else []
        return keys + [
            d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{where}/{key}")
        ]
    if isinstance(a, list | tuple) and len(a) == len(b):
        return [
            d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{where}/{i}")
        ]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    return [] if a == b else [f"{where}: {a} {b}"]


def errors(text, model):
    """The lines of the script itself on stderr, between those of the progress bar."""
    return [line for line in text.splitlines() if line.startswith(f"{model}.py")]


def meddle(monkeypatch, model, change):
    """change(step, metrics) is called after each iteration; what it returns replaces the metrics."""
    module = import_module(model)
    run = module.run

    def meddled(config, nets, optimizers, iteration, *others):
        steps = count(1)

        def changed():
            metrics = iteration()
            return change(next(steps), metrics) or metrics

        return run(config, nets, optimizers, changed, *others)

    monkeypatch.setattr(module, "run", meddled)


@pytest.fixture(autouse=True)
def after_a_stop():
    """A signal that a run does not handle fails the test, not pytest; a stopped run leaves nothing behind."""

    def unhandled(number, frame):
        raise AssertionError(f"signal {number} was not handled")

    before = {number: signal.signal(number, unhandled) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    getattr(tqdm, "_instances", set()).clear()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Flags for tiny pictures."""
    folder, random_bytes = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(30):
        pixels = random_bytes.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    data_dir = tmp_path_factory.mktemp("data")
    return ["--dataset", folder, "--data-dir", data_dir, "--image-size", 16, "--z-dim", 3, *TINY]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """done(model) → the folder of a finished run of 4 steps on points; copy it to change it."""
    made = {}

    def done(model):
        if model not in made:
            made[model] = tmp_path_factory.mktemp(model) / "run"
            train(model, *POINTS, "--steps", 4, "--log-every", 2, "--save-every", 2, "--out", made[model])
        return made[model]

    return done


@pytest.fixture
def copied(done, tmp_path):
    """copied(model) → a copy of done(model) that a test may change."""
    return lambda model: Path(shutil.copytree(done(model), tmp_path / f"{model}-copy"))


# The same run again


@pytest.mark.parametrize("kind", ["images", "points"])
@pytest.mark.parametrize("model, extra", CASES)
def test_n_steps_and_n_more_are_2n_steps(model, extra, kind, images, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*(images if kind == "images" else POINTS), *extra]
    flags += ["--log-every", 2, "--sample-every", 3, "--save-every", 4]
    train(model, *flags, "--steps", 10, "--out", whole)
    train(model, *flags, "--steps", 5, "--out", parts)
    torch.rand(7)  # another process would not have the random state of this one
    train(model, "--resume", parts, "--steps", 10, "--device", "cpu")
    assert differences(load(whole), load(parts)) == []
    whole, parts = files(whole), files(parts)
    assert whole.keys() <= parts.keys()
    for name in whole.keys() - {"checkpoint.pt", "config.json"}:
        assert whole[name] == parts[name], name


def test_the_pictures_go_on_with_the_z_of_the_checkpoint(copied):
    """Drawn anew from the same seed they would be the same, but on another device they are not."""
    out = copied(SOLO)
    saved = load(out)
    saved["fixed_z"] += 1
    torch.save(saved, out / "checkpoint.pt")
    train(SOLO, "--resume", out, "--steps", 5, "--device", "cpu")
    assert torch.equal(load(out)["fixed_z"], saved["fixed_z"])


@pytest.mark.parametrize("kind", ["images", "points"])
@pytest.mark.parametrize("model, extra", CASES)
def test_the_same_command_twice_gives_the_same_bytes(model, extra, kind, images, tmp_path):
    flags = [*(images if kind == "images" else POINTS), *extra, "--steps", 3, "--log-every", 1]
    for out in ("one", "two"):
        train(model, *flags, "--out", tmp_path / out)
        torch.rand(7)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    del one["config.json"], two["config.json"]  # they name their folders
    assert one == two
    train(model, *flags, "--seed", 1, "--out", tmp_path / "three")
    assert files(tmp_path / "three")["metrics.csv"] != one["metrics.csv"]


@each
def test_pictures_disturb_nothing(model, images, tmp_path):
    """Pitfall 21: neither random state nor statistics; a picture is the same if it is the only one."""
    for every in (1, 1000):
        flags = [*images, "--steps", 3, "--sample-every", every]
        train(model, *flags, "--out", tmp_path / str(every))
    often, rarely = load(tmp_path / "1"), load(tmp_path / "1000")
    for part in ("networks", "optimizers", "rng", "fixed_z"):
        assert differences(often[part], rarely[part], part) == []
    often, rarely = files(tmp_path / "1"), files(tmp_path / "1000")
    pictures = [name for name in rarely if name.endswith(".png")]
    assert pictures and all(often[name] == rarely[name] for name in pictures)


@pytest.mark.parametrize("model", [name for name in MODELS if hasattr(import_module(name), "critic_loss")])
def test_critic_steps_are_counted_alike_across_a_resume(model, tmp_path, monkeypatch):
    """Pitfall 23: always critic-steps of the critic first, then one of the generator."""
    module, steps = import_module(model), []
    g_loss = "generator_encoder_loss" if hasattr(module, "generator_encoder_loss") else "generator_loss"
    for name, letter in (("critic_loss", "c"), (g_loss, "g")):
        loss = getattr(module, name)

        def noted(*args, loss=loss, letter=letter):
            steps.append(letter)
            return loss(*args)

        monkeypatch.setattr(module, name, noted)
    train(model, *POINTS, "--critic-steps", 3, "--steps", 2, "--out", tmp_path / "run")
    train(model, "--resume", tmp_path / "run", "--steps", 5, "--device", "cpu")
    assert "".join(steps) == "cccg" * 5


# What is in a run's folder


@each
def test_the_checkpoint_holds_plain_values_from_step_0_on(model, tmp_path, monkeypatch):
    def bug(step, metrics):
        raise RuntimeError("in the first step")

    meddle(monkeypatch, model, bug)
    with pytest.raises(RuntimeError):
        train(model, *POINTS, "--out", tmp_path / "run")
    saved = load(tmp_path / "run")
    assert set(saved) == {"model", "step", "config", "networks", "optimizers", "rng", "fixed_z"}
    assert saved["model"] == model and saved["step"] == 0
    config = saved["config"]
    assert type(config) is dict and config["model"] == model and config["prior"]
    assert config["shape"] == [2] and config["dataset"] == "ring" and config["width"] == 2
    assert not {"out", "resume"} & set(config)
    nets = import_module(model).networks(Namespace(**config))
    assert saved["networks"].keys() == nets.keys()
    for name, net in nets.items():
        net.load_state_dict(saved["networks"][name])


@pytest.mark.parametrize("kind", ["images", "points"])
@each
def test_the_contents_of_a_run(model, kind, images, tmp_path):
    out, encoder = tmp_path / "run", hasattr(import_module(model), "encode")
    flags = [*(images if kind == "images" else POINTS), "--out", out]
    train(model, *flags, "--steps", 7, "--log-every", 3, "--sample-every", 2, "--save-every", 4)
    found = files(out)
    folders = ["samples", "reconstructions"] if encoder else ["samples"]
    folders += ["components", "components-half"] if model == "gm_wae" else []
    pictures = {f"{folder}/{step:07d}.png" for folder in folders for step in (2, 4, 6, 7)}
    assert found.keys() == {"checkpoint.pt", "config.json", "metrics.csv", f"{model}.py"} | pictures
    assert found[f"{model}.py"] == (ROOT / f"{model}.py").read_bytes()

    saved, config = load(out), json.loads(found["config.json"])
    assert saved["step"] == 7
    assert config.pop("out") == str(out) and config.pop("resume") is None
    assert config == saved["config"]
    assert config["shape"] == ([3, 16, 16] if kind == "images" else [2])

    assert [row["step"] for row in rows(out)] == ["3", "6"]
    header, *lines = found["metrics.csv"].decode().splitlines()
    assert header.startswith("step,") and all(line.count(",") == header.count(",") for line in lines)
    assert all(np.isfinite(float(value)) for row in rows(out) for value in row.values())
    for name in pictures:
        with Image.open(out / name) as picture:
            picture.load()


# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@each
def test_a_signal_ends_the_step_saves_and_resumes(model, number, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    flags = [*POINTS, "--steps", 8, "--log-every", 2]
    train(model, *flags, "--out", whole)
    with monkeypatch.context() as patch:
        meddle(patch, model, lambda step, metrics: os.kill(os.getpid(), number) if step == 5 else None)
        stops(128 + number, model, *flags, "--out", out)
    assert load(out)["step"] == 5
    assert "--resume" in capsys.readouterr().err
    train(model, "--resume", out, "--device", "cpu")
    assert differences(load(whole), load(out)) == []
    assert files(whole)["metrics.csv"] == files(out)["metrics.csv"]


def test_a_signal_while_a_picture_is_drawn_saves_the_step_it_names(tmp_path, monkeypatch, capsys):
    """The signal comes after the loop has looked for one: it must not lead out past the save."""
    module = import_module(SOLO)
    save_grid = module.save_grid

    def signalled(x, path, columns):
        save_grid(x, path, columns)
        if Path(path).name == "0000004.png":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "save_grid", signalled)
    stops(143, SOLO, *POINTS, "--steps", 9, "--sample-every", 4, "--out", tmp_path / "run")
    step = load(tmp_path / "run")["step"]
    assert step in (4, 5)
    assert f"stopped after step {step};" in capsys.readouterr().err


def start(model, *flags, **options):
    """A process of its own, with the thread count of this one."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / f"{model}.py", *flags]
    return subprocess.Popen([str(part) for part in command], env=env, text=True, **options)


def test_signals_to_real_processes(tmp_path):
    flags = [*POINTS, "--steps", 400, "--log-every", 1]
    cases = {signal.SIGINT: MODELS[0], signal.SIGTERM: MODELS[-1]}
    runs = {}
    for number, model in cases.items():
        runs[number] = start(model, *flags, "--out", tmp_path / str(number), stderr=subprocess.PIPE)
    try:
        for number, process in runs.items():
            metrics, deadline = tmp_path / str(number) / "metrics.csv", time.monotonic() + 300
            while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(number)
        texts = {number: process.communicate(timeout=300)[1] for number, process in runs.items()}
    finally:
        for process in runs.values():
            process.kill()
            process.wait()
    for number, model in cases.items():
        out = tmp_path / str(number)
        assert runs[number].returncode == 128 + number, texts[number]
        assert "Traceback" not in texts[number]
        step = load(out)["step"]
        assert 0 < step < 400 and int(rows(out)[-1]["step"]) == step
        # Up to here, this process gets the same; it is told to stop at the same step.
        with pytest.MonkeyPatch.context() as patch:
            here = tmp_path / f"{number}-here"
            meddle(patch, model, lambda n, m, step=step: os.kill(os.getpid(), 15) if n == step else None)
            stops(143, model, *flags, "--out", here)
        assert differences(load(here), load(out)) == []
        assert files(here)["metrics.csv"] == files(out)["metrics.csv"]


KILLED = """
import contextlib, os, random, signal, sys, time
import torch, torch._dynamo
sys.path.insert(0, sys.argv[1])
from importlib import import_module
module, out, flags = import_module(sys.argv[2]), sys.argv[3], sys.argv[4:]
torch.set_num_threads(1)

def fork(flags):
    pid = os.fork()
    if pid == 0:
        code = 99
        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            module.main(flags)
            code = 0
        os._exit(code)
    return pid

def step_of(run):
    path = f"{run}/checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if os.path.exists(path) else None

def go_on(run):
    known = os.path.exists(f"{run}/checkpoint.pt")
    return fork(["--resume", run, "--device", "cpu"] if known else [*flags, "--out", run])

begun, pid = time.monotonic(), go_on(f"{out}/0")
while (step_of(f"{out}/0") or 0) < 5:
    time.sleep(0.01)
moments, longest = random.Random(0), 2 * (time.monotonic() - begun)
kills, amid, runs = 0, 0, 1
while kills < 20:
    before = step_of(f"{out}/{runs - 1}") or 0
    if kills:
        pid = go_on(f"{out}/{runs - 1}")
        time.sleep(moments.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    step = step_of(f"{out}/{runs - 1}")
    if os.WIFSIGNALED(status):
        kills, amid = kills + 1, amid + ((step or 0) > before)
    else:
        assert status == 0, f"exit status {status}"
        runs += 1  # this one was done already
assert amid >= 3, f"only {amid} kills were in the middle of training"
for i in range(runs):
    assert os.waitpid(go_on(f"{out}/{i}"), 0)[1] == 0, "the last part of a run failed"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kill_9_at_twenty_moments_leaves_a_whole_checkpoint(tmp_path):
    """And the run, killed again and again, ends where an uninterrupted one does, its metrics.csv too."""
    flags = [*POINTS, "--steps", 60, "--log-every", 1, "--sample-every", 7, "--save-every", 1]
    script = [sys.executable, "-c", KILLED, ROOT, SOLO, tmp_path / "killed", *flags]
    ended = subprocess.run([str(part) for part in script], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    train(SOLO, *flags, "--out", tmp_path / "whole")
    whole = files(tmp_path / "whole")
    for out in (tmp_path / "killed").iterdir():
        assert differences(load(out), load(tmp_path / "whole")) == []
        found = files(out)
        assert found.keys() == whole.keys()
        for name in whole.keys() - {"checkpoint.pt", "config.json"}:
            assert found[name] == whole[name], name


@pytest.mark.parametrize("left", ["", "half a checkpo"])
def test_what_a_killed_save_leaves_is_not_mistaken(left, copied, tmp_path):
    out = copied(SOLO)
    (out / "checkpoint.pt.tmp").write_text(left)
    train(SOLO, "--resume", out, "--steps", 5, "--device", "cpu")
    assert load(out)["step"] == 5
    first = tmp_path / "killed-in-its-first-save"
    first.mkdir()
    (first / "checkpoint.pt.tmp").write_text(left)
    train(SOLO, *POINTS, "--steps", 1, "--out", first)
    assert load(first)["step"] == 1


def test_a_checkpoint_is_flushed_to_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed, named, fsync, replace = {}, [], os.fsync, os.replace

    def noted_fsync(fd):
        fsync(fd)
        flushed[os.fstat(fd).st_ino] = os.fstat(fd).st_size

    def noted_replace(source, target):
        named.append((Path(target).name, flushed.get(os.stat(source).st_ino), os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    train(SOLO, *POINTS, "--steps", 2, "--save-every", 1, "--out", tmp_path / "run")
    assert [name for name, _, _ in named].count("checkpoint.pt") == 3
    assert all(at_fsync == size for _, at_fsync, size in named)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("full", ["checkpoint.pt.tmp", "metrics.csv", "samples/0000006.png"])
@each
def test_a_full_disk_leaves_the_last_checkpoint(model, full, copied, monkeypatch, capsys):
    """Writing to /dev/full fails as it does on a full disk."""
    out = copied(model)
    before = (out / "checkpoint.pt").read_bytes()

    def fill(step, metrics):
        if step == 2:
            (out / full).unlink(missing_ok=True)
            (out / full).symlink_to("/dev/full")

    meddle(monkeypatch, model, fill)
    capsys.readouterr()
    flags = ["--steps", 9, "--log-every", 3, "--sample-every", 2, "--save-every", 3, "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        train(model, "--resume", out, *flags)
    assert stopped.value.code not in (0, None)
    text = capsys.readouterr().err
    assert "Traceback" not in text and len(errors(text, model)) == 1
    assert "No space left" in errors(text, model)[0]
    assert (out / "checkpoint.pt").read_bytes() == before and load(out)["step"] == 4
    (out / full).unlink(missing_ok=True)
    if full != "metrics.csv":
        monkeypatch.undo()
        train(model, "--resume", out, "--steps", 9, "--device", "cpu")
        assert load(out)["step"] == 9


@each
def test_a_failing_rename_leaves_the_last_checkpoint(model, copied, monkeypatch, capsys):
    out = copied(model)
    before = (out / "checkpoint.pt").read_bytes()

    def replace(source, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SystemExit) as stopped:
        train(model, "--resume", out, "--steps", 9, "--save-every", 3, "--device", "cpu")
    assert stopped.value.code not in (0, None)
    assert len(errors(capsys.readouterr().err, model)) == 1
    assert (out / "checkpoint.pt").read_bytes() == before


# Numbers that are not finite


@pytest.mark.parametrize("model, extra", CASES)
def test_a_run_that_diverges_stops_and_keeps_what_was_finite(model, extra, tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "run", []
    meddle(monkeypatch, model, lambda step, metrics: seen.append(metrics))
    stops(1, model, *POINTS, *extra, "--lr", 1e18, "--save-every", 1, "--log-every", 1, "--out", out)
    (line,) = errors(capsys.readouterr().err, model)
    finite = [all(value.isfinite() for value in metrics.values()) for metrics in seen]
    assert all(finite[:-1]) and not finite[-1] and load(out)["step"] == len(seen) - 1
    assert len(rows(out)) == len(seen) - 1
    assert re.search(rf"step {len(seen)}\b", line)
    first = next(name for name, value in seen[-1].items() if not value.isfinite())
    assert first in line


@pytest.mark.parametrize("seen", ["--log-every", "--sample-every", "--save-every"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_step_that_is_not_finite_is_named(value, seen, tmp_path, monkeypatch, capsys):
    """Though nobody looks before step 5, when another number has broken too, and this one is finite again."""
    names = []

    def spoil(step, metrics):
        names[:] = metrics
        broken = {3: names[-1:], 4: names}.get(step, [])
        return metrics | {name: metrics[name] * 0 + value for name in broken}

    meddle(monkeypatch, SOLO, spoil)
    every = {"--log-every": 100, "--sample-every": 100, "--save-every": 100} | {seen: 5}
    flags = [part for pair in every.items() for part in pair]
    stops(1, SOLO, *POINTS, *flags, "--steps", 50, "--out", tmp_path / "run")
    (line,) = errors(capsys.readouterr().err, SOLO)
    assert re.search(r"step 3\b", line) and names[-1] in line and str(tmp_path / "run") in line
    assert set(files(tmp_path / "run")) == {"checkpoint.pt", "config.json", f"{SOLO}.py"}
    assert load(tmp_path / "run")["step"] == 0


@each
def test_no_checkpoint_is_written_from_a_step_on_that_is_not_finite(model, tmp_path, monkeypatch, capsys):
    def spoil(step, metrics):
        first = next(iter(metrics))
        if step == 5:
            return metrics | {first: metrics[first] * float("nan")}

    meddle(monkeypatch, model, spoil)
    stops(1, model, *POINTS, "--save-every", 2, "--log-every", 50, "--steps", 50, "--out", tmp_path / "run")
    (line,) = errors(capsys.readouterr().err, model)
    assert re.search(r"step 5\b", line)
    assert load(tmp_path / "run")["step"] == 4


def test_a_signal_does_not_save_what_is_not_finite(tmp_path, monkeypatch):
    def spoil(step, metrics):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            return {name: value * float("nan") for name, value in metrics.items()}

    meddle(monkeypatch, SOLO, spoil)
    stops(1, SOLO, *POINTS, "--steps", 50, "--out", tmp_path / "run")
    assert load(tmp_path / "run")["step"] == 0


def test_the_line_of_an_error_begins_behind_the_bar(tmp_path, monkeypatch):
    """On a terminal the bar stands in an unfinished line."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    meddle(monkeypatch, SOLO, lambda step, metrics: {name: value / 0 for name, value in metrics.items()})
    stops(1, SOLO, *POINTS, "--log-every", 1, "--out", tmp_path / "run")
    assert re.search(rf"[\r\n]{SOLO}\.py: error: .*\n", terminal.getvalue())


def test_without_a_terminal_a_log_is_one_line(tmp_path, capsys):
    """The last one too, although the bar is closed after it."""
    import_module(SOLO).main(
        [*map(str, POINTS), "--steps", "3", "--log-every", "1", "--out", str(tmp_path / "run")]
    )
    lines = re.findall(r"step (\d) of 3 .*, (\w+)=", capsys.readouterr().err)
    assert [step for step, _ in lines] == ["1", "2", "3"]


# Folders that hold a run


@each
def test_a_run_is_never_overwritten(model, done, capsys):
    out = done(model)
    before = files(out)
    capsys.readouterr()
    stops(2, model, *POINTS, "--steps", 1, "--out", out)
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1 and str(out) in text and "--resume" in text and "--out" in text
    assert files(out) == before


@pytest.mark.parametrize("beyond", ["5{0}\n6{0}\n", "5{0}\n6,0.1", "4", "4{0}", "5{0}\n6", ""])
def test_metrics_beyond_the_checkpoint_are_cut_off(beyond, copied):
    """A killed run logged more than it saved, the last line perhaps in part."""
    out = copied(SOLO)
    before = (out / "metrics.csv").read_text()
    values = ",0.5" * before.split("\n")[0].count(",")
    (out / "metrics.csv").write_text(before + beyond.format(values))
    train(SOLO, "--resume", out, "--steps", 6, "--device", "cpu")
    assert (out / "metrics.csv").read_text().startswith(before)
    assert [row["step"] for row in rows(out)] == ["2", "4", "6"]
    assert all(None not in row and None not in row.values() for row in rows(out))


@pytest.mark.parametrize("left", ["", "st", None])
def test_metrics_killed_in_their_first_line_start_anew(left, tmp_path):
    """A file is there, empty, before its first line is."""
    whole, out, flags = tmp_path / "whole", tmp_path / "run", [*POINTS, "--log-every", 4]
    train(SOLO, *flags, "--steps", 3, "--out", out)
    if left is not None:
        (out / "metrics.csv").write_text(left)
    train(SOLO, "--resume", out, "--steps", 8, "--device", "cpu")
    train(SOLO, *flags, "--steps", 8, "--out", whole)
    assert files(out)["metrics.csv"] == files(whole)["metrics.csv"]


@each
def test_a_finished_run_says_so_and_changes_nothing(model, done, capsys):
    before = files(done(model))
    capsys.readouterr()
    train(model, "--resume", done(model), "--device", "cpu")
    train(model, "--resume", done(model), "--steps", 4, "--device", "cpu")
    said = capsys.readouterr()
    assert (said.out + said.err).count("finished") == 2 and str(done(model)) in said.out + said.err
    assert files(done(model)) == before


@each
def test_what_may_change_when_a_run_goes_on(model, copied, tmp_path):
    out = copied(model)
    free = ["--log-every", 3, "--sample-every", 4, "--save-every", 5, "--data-dir", tmp_path / "elsewhere"]
    train(model, "--resume", out, "--steps", 6, "--device", "cpu", *free)
    config = load(out)["config"]
    assert (config["steps"], config["log_every"], config["sample_every"], config["save_every"]) == (
        6,
        3,
        4,
        5,
    )
    assert config["data_dir"] == str(tmp_path / "elsewhere") and load(out)["step"] == 6
    assert [row["step"] for row in rows(out)] == ["2", "4", "6"]
    assert json.loads((out / "config.json").read_text())["steps"] == 6


# The script itself


@pytest.mark.parametrize("end", ["done", "diverged", "stopped", "bug"])
def test_signal_handlers_are_put_back(end, tmp_path, monkeypatch):
    """However a run ends: in a notebook Ctrl-C has to work afterwards."""

    def the_end(step, metrics):
        if end == "diverged":
            next(iter(metrics.values())).fill_(math.nan)
        if end == "stopped":
            os.kill(os.getpid(), signal.SIGINT)
        if end == "bug":
            raise RuntimeError("a bug")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    meddle(monkeypatch, SOLO, the_end)
    with nullcontext() if end == "done" else pytest.raises((SystemExit, RuntimeError)):
        train(SOLO, *POINTS, "--steps", 1, "--out", tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
@each
def test_a_bug_keeps_its_traceback(model, error, tmp_path, monkeypatch):
    def bug(step, metrics):
        raise error("a bug")

    meddle(monkeypatch, model, bug)
    with pytest.raises(error, match="a bug"):
        train(model, *POINTS, "--steps", 1, "--out", tmp_path / "run")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is here")
@each
def test_without_a_gpu_smaller_settings_are_named(model, tmp_path, capsys):
    train(model, *POINTS, "--steps", 1, "--out", tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "GPU" in line]
    assert "--width" in line and "--steps" in line


COPIED = """
import os, runpy, sys
here, MODELS, FLAGS = os.getcwd(), sys.argv[1].split(), sys.argv[2:]
for model in MODELS:
    os.chdir(f"{here}/{model}")
    sys.path[0] = os.getcwd()
    sys.modules.pop("common", None)
    more = f"--resume runs/{model}-ring --steps 5 --device cpu".split()
    for flags in ([*FLAGS, "--steps", "3"], more):
        sys.argv = [f"{model}.py", *flags]
        runpy.run_path(f"{model}.py", run_name="__main__")
    assert os.path.dirname(sys.modules["common"].__file__) == os.getcwd()
"""


def test_a_copied_file_trains_and_resumes(tmp_path):
    """And another process, with other hashes, gives the bytes that this one gives."""
    for model in MODELS:
        (tmp_path / model).mkdir()
        for name in (f"{model}.py", "common.py"):
            shutil.copy(ROOT / name, tmp_path / model / name)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = [sys.executable, "-c", COPIED, " ".join(MODELS), *POINTS, "--log-every", 1]
    script, options = [str(part) for part in script], {"capture_output": True, "text": True, "timeout": 600}
    ended = subprocess.run(script, cwd=tmp_path, env=env | {"OMP_NUM_THREADS": "1"}, **options)
    assert ended.returncode == 0, ended.stderr
    for model in MODELS:
        out = tmp_path / model / "runs" / f"{model}-ring"
        whole = ["--pretrain-steps", 1000] if model == "gm_wae" else []  # conftest.py shortens it here alone
        train(model, *POINTS, *whole, "--log-every", 1, "--steps", 5, "--out", tmp_path / f"{model}-here")
        assert differences(load(out), load(tmp_path / f"{model}-here")) == []
        assert {p.name for p in (tmp_path / model).iterdir()} - {"__pycache__", "data"} == {
            f"{model}.py",
            "common.py",
            "runs",
        }


def test_import_does_nothing(tmp_path):
    """No file, no arguments, no output, no random number; --help then needs no library of pictures."""
    script = f"""
import sys, torch
state = torch.get_rng_state()
modules = [__import__(name) for name in {MODELS}]
assert torch.equal(torch.get_rng_state(), state)
for module in modules:
    try:
        module.main(["--help"])
    except SystemExit as stopped:
        assert stopped.code == 0
heavy = {{"torchvision", "PIL", "matplotlib", "sklearn", "torch._dynamo"}} & set(sys.modules)
assert not heavy, heavy
"""
    before = sorted(path for path in ROOT.iterdir() if path.name != "__pycache__")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(tmp_path / "cache")}
    garbage = [sys.executable, "-c", script, "--no-such-flag", "--steps", "many"]
    (tmp_path / "empty").mkdir()
    options = {"capture_output": True, "text": True, "timeout": 600, "cwd": tmp_path / "empty"}
    ended = subprocess.run(garbage, env=env, **options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "" and ended.stdout.startswith("usage:")
    assert list((tmp_path / "empty").iterdir()) == []
    assert sorted(path for path in ROOT.iterdir() if path.name != "__pycache__") == before


@each
@pytest.mark.parametrize("snapshots", [0, 1, 2, 5])
def test_snapshots_of_the_generator_evenly_over_the_run(model, snapshots, tmp_path):
    """N of them in 9 steps, the last at the end, each as the checkpoint of that step has it."""
    train(model, *POINTS, "--snapshots", snapshots, "--steps", 9, "--out", tmp_path / "run")
    found = sorted(path.name for path in (tmp_path / "run").glob("snapshots/*"))
    assert found == [f"{math.ceil(9 * i / snapshots):07d}.pt" for i in range(1, snapshots + 1)]
    if snapshots:
        thin = torch.load(tmp_path / "run/snapshots" / found[0], weights_only=True)
        train(model, *POINTS, "--steps", thin["step"], "--out", tmp_path / "short")
        assert thin["model"] == model and f"{thin['step']:07d}.pt" == found[0]
        generator = load(tmp_path / "short")["networks"]["generator"]
        assert not differences(thin["networks"], {"generator": generator})
