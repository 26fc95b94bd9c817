"""What a run promises: exact resuming, whole checkpoints, honest stops.

One test for each promise, on one model, as the run part is the same in every file; and one test of all that
for each model, as the rest of a file can break exact resuming, too.
"""

import errno
import gc
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
from conftest import MODELS, SOLO, checkpoint, differences, files, having, rows, run_main, run_stops
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
VARIANTS = {  # flags that make another run of a model
    "wbli": [["--constraint", "gp"], ["--constraint", "clip"]],
    "gm_wae": [["--pretrain-steps", 3]],
    "semi_gan": [["--labels", 16], ["--labels", 16, "--supervised"]],
}
CASES = [(model, flags) for model in MODELS for flags in VARIANTS.get(model, [[]])]
TINY = ["--device", "cpu", "--width", 2, "--batch-size", 4]
POINTS = ["--dataset", "ring", *TINY]


def errors(text, model=SOLO):
    """The lines of the script itself on stderr, between those of its log."""
    return [line for line in text.splitlines() if line.startswith(f"{model}.py: ")]


def meddle(monkeypatch, change, model=SOLO):
    """change(step, metrics, nets, optimizers) after each iteration; what it returns replaces the metrics."""
    module = import_module(model)
    build = module.build

    def meddled(*args):
        nets, optimizers, iteration, pictures = build(*args)
        steps = count(1)

        def changed():
            metrics = iteration()
            return change(next(steps), metrics, nets, optimizers) or metrics

        return nets, optimizers, changed, pictures

    monkeypatch.setattr(module, "build", meddled)


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
    """Flags for tiny pictures of two classes."""
    folder, random_bytes = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(40):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random_bytes.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    data_dir = tmp_path_factory.mktemp("data")
    return ["--dataset", folder, "--data-dir", data_dir, "--image-size", 8, "--z-dim", 3, *TINY]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a finished run of 4 steps on points, which nobody may change."""
    out = tmp_path_factory.mktemp("done") / "run"
    run_main(SOLO, *POINTS, "--steps", 4, "--log-every", 2, "--save-every", 2, "--out", out)
    return out


@pytest.fixture
def copied(done, tmp_path):
    """A copy of `done` that a test may change."""
    return Path(shutil.copytree(done, tmp_path / "copied"))


def go_on(out, *flags):
    run_main(SOLO, "--resume", out, "--device", "cpu", *flags)


# Every model


@pytest.mark.parametrize("kind", ["images", "points"])
@pytest.mark.parametrize("model, extra", CASES)
def test_a_run_in_parts_is_the_whole_run(model, extra, kind, images, tmp_path, capsys):
    """N steps and N more are 2N steps to the bit, while the rate falls; pictures disturb nothing.

    And what is in a run's folder. The whole run draws more pictures, which must move neither random state
    nor statistics.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*(images if kind == "images" else POINTS), *extra, "--log-every", 1]
    flags += ["--decay-start", 1, "--decay-end", 5]
    run_main(model, *flags, "--steps", 6, "--sample-every", 2, "--save-every", 4, "--out", whole)
    run_main(model, *flags, "--steps", 3, "--out", parts)
    torch.rand(7)  # another process would not have the random state of this one
    run_main(model, "--resume", parts, "--steps", 6, "--device", "cpu")
    run_main(model, *flags, "--steps", 1, "--seed", 1, "--out", tmp_path / "other")
    assert "Traceback" not in capsys.readouterr().err

    a, b = checkpoint(whole), checkpoint(parts)
    config = a.pop("config")
    assert config == b.pop("config") | {"sample_every": 2, "save_every": 4}
    assert differences(a, b) == []
    assert a["model"] == model and a["step"] == 6
    assert config["shape"] == ([3, 8, 8] if kind == "images" else [2])
    assert config["classes"] == (2 if kind == "images" else 8)

    a, b = files(whole), files(parts)
    pictures = {name for name in a if name.endswith(".png")}
    folders = {Path(name).parent.name for name in pictures}
    expected = {"reconstructions"} if model in having("encode") else set()
    if "--supervised" not in extra:
        expected.add("samples")
    assert expected <= folders
    assert pictures == {f"{folder}/{step:07d}.png" for folder in folders for step in (2, 4, 6)}
    assert a.keys() == {"checkpoint.pt", "config.json", "metrics.csv", f"{model}.py"} | folders | pictures
    assert a["metrics.csv"] == b["metrics.csv"] != files(tmp_path / "other")["metrics.csv"]
    assert all(a[name] == b[name] for name in pictures if "0006" in name)
    assert a[f"{model}.py"] == (ROOT / f"{model}.py").read_bytes()
    assert json.loads(a["config.json"]) == config
    header, *lines = a["metrics.csv"].decode().splitlines()
    assert header.startswith("step,") and [line.split(",")[0] for line in lines] == list("123456")
    for line in lines:
        numbers = [float(value) for value in line.split(",")]
        assert len(numbers) == 1 + header.count(",") and all(map(math.isfinite, numbers))


COPIED = """
import json, os, runpy, sys
here = os.getcwd()
for model, first in json.loads(sys.argv[1]).items():
    os.chdir(f"{here}/{model}")
    sys.path[0] = os.getcwd()
    sys.modules.pop("common", None)
    more = f"--resume runs/{model}-ring --steps 3 --device cpu".split()
    for flags in (["--help"], first, more):
        sys.argv = [f"{model}.py", *flags]
        try:
            runpy.run_path(f"{model}.py", run_name="__main__")
        except SystemExit as stopped:
            assert flags == ["--help"] and stopped.code == 0 or exit(f"{flags}: {stopped}")
    common = os.path.dirname(sys.modules["common"].__file__)
    common == os.getcwd() or exit(f"{model}.py took common.py from {common}")
"""


def test_a_copied_file_trains_and_resumes(tmp_path):
    """Under python -OO, without docstrings; another process, with other hashes, gives this one's bytes."""
    for model in MODELS:
        (tmp_path / model).mkdir()
        for name in (f"{model}.py", "common.py"):
            shutil.copy(ROOT / name, tmp_path / model / name)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    first = {model: [*POINTS, "--log-every", 1] for model in MODELS}
    first["gm_wae"] += ["--pretrain-steps", 3]
    commands = {model: [str(part) for part in (*flags, "--steps", 2)] for model, flags in first.items()}
    script = [sys.executable, "-OO", "-c", COPIED, json.dumps(commands)]
    options = {"capture_output": True, "text": True, "timeout": 600, "cwd": tmp_path}
    ended = subprocess.run(script, env=env | {"OMP_NUM_THREADS": "1"}, **options)
    assert ended.returncode == 0, ended.stderr
    for model in MODELS:
        here = tmp_path / f"{model}-here"
        run_main(model, *first[model], "--steps", 3, "--out", here)
        found = {path.name for path in (tmp_path / model).iterdir()}
        assert found - {"__pycache__", "data"} == {f"{model}.py", "common.py", "runs"}
        assert differences(checkpoint(tmp_path / model / "runs" / f"{model}-ring"), checkpoint(here)) == []


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
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(tmp_path / "cache")}
    garbage = [sys.executable, "-c", script, "--no-such-flag", "--steps", "many"]
    (tmp_path / "empty").mkdir()
    options = {"capture_output": True, "text": True, "timeout": 600, "cwd": tmp_path / "empty"}
    ended = subprocess.run(garbage, env=env, **options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "" and ended.stdout.startswith("usage:")
    assert list((tmp_path / "empty").iterdir()) == []


# The same run again


def test_the_same_command_twice_gives_the_same_bytes(tmp_path):
    for out in ("one", "two"):
        run_main(SOLO, *POINTS, "--steps", 3, "--log-every", 1, "--out", tmp_path / out)
        torch.rand(7)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one == two and "metrics.csv" in one


def test_a_run_on_data_without_labels_resumes(tmp_path):
    """It has no number of classes; 0 would be refused, as 0 is for other numbers."""
    flags = [*POINTS, "--dataset", "swissroll", "--out", tmp_path / "run"]
    run_main(SOLO, *flags, "--steps", 1)
    go_on(tmp_path / "run", "--steps", 2)
    saved = checkpoint(tmp_path / "run")
    assert saved["step"] == 2 and saved["config"]["classes"] is None


def test_the_copy_in_a_runs_folder_goes_on_with_that_run(copied):
    """There the model file is its own copy: it is neither refused nor emptied."""
    out = copied
    shutil.copy(ROOT / "common.py", out)
    flags = ["--resume", ".", "--steps", "5", "--device", "cpu"]
    ended = subprocess.run([sys.executable, f"{SOLO}.py", *flags], cwd=out, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert checkpoint(out)["step"] == 5
    assert (out / f"{SOLO}.py").read_bytes() == (ROOT / f"{SOLO}.py").read_bytes()


def test_the_pictures_go_on_with_the_z_of_the_checkpoint(copied):
    """Drawn anew from the same seed they would be the same, but on another device they are not."""
    saved = checkpoint(copied)
    saved["fixed_z"] += 1
    torch.save(saved, copied / "checkpoint.pt")
    go_on(copied, "--steps", 5)
    assert torch.equal(checkpoint(copied)["fixed_z"], saved["fixed_z"])


def test_critic_steps_are_counted_alike_across_a_resume(tmp_path, monkeypatch):
    """Pitfall 23: always critic-steps of the critic first, then one of the generator."""
    module, steps = import_module("wgan"), []
    for name, letter in (("critic_loss", "c"), ("generator_loss", "g")):
        loss = getattr(module, name)

        def noted(*args, loss=loss, letter=letter):
            steps.append(letter)
            return loss(*args)

        monkeypatch.setattr(module, name, noted)
    run_main("wgan", *POINTS, "--critic-steps", 3, "--steps", 2, "--out", tmp_path / "run")
    run_main("wgan", "--resume", tmp_path / "run", "--steps", 5, "--device", "cpu")
    assert "".join(steps) == "cccg" * 5


def test_what_may_change_when_a_run_goes_on(copied, tmp_path):
    flags = ["--steps", 6, "--log-every", 3, "--sample-every", 4, "--save-every", 5]
    go_on(copied, *flags, "--data-dir", tmp_path / "elsewhere")
    config = checkpoint(copied)["config"]
    changed = [config[name] for name in ("steps", "log_every", "sample_every", "save_every")]
    assert changed == [6, 3, 4, 5]
    assert config["data_dir"] == str(tmp_path / "elsewhere") and checkpoint(copied)["step"] == 6
    assert [row["step"] for row in rows(copied)] == ["2", "4", "6"]
    assert json.loads((copied / "config.json").read_text()) == config


def test_a_finished_run_says_so_and_changes_nothing(done, capsys):
    before = files(done)
    for steps in ([], ["--steps", 4], ["--steps", 3]):
        run_stops(0, SOLO, "--resume", done, "--device", "cpu", *steps)
        (line,) = errors(capsys.readouterr().err)
        assert f"{done} is finished, at step 4" in line
    assert files(done) == before


# The falling rate


@pytest.mark.parametrize("start, end", [(100, 300), (0, 4), (7, 7)])
def test_the_rate_falls_to_a_hundredth(start, end):
    """Constant, then lr · 0.01^((step − start)/(end − start)), then constant; each optimiser from its own."""
    module, config = import_module(SOLO), Namespace(decay_start=start, decay_end=end, device="cpu")
    for step in (1, start, (start + end) // 2, end, end + 1, 10**6):
        optimizers = {lr: torch.optim.Adam([torch.zeros(1)], lr) for lr in (0.1, 3e-4)}
        module.set_rate(optimizers, config, step)
        late = (step - start) / max(1, end - start)
        for lr, optimizer in optimizers.items():
            (group,) = optimizer.param_groups
            expected = lr if step <= start else lr / 100 if step >= end + (start == end) else lr * 0.01**late
            assert type(group["lr"]) is float and group["lr"] == pytest.approx(expected, rel=1e-12)


def test_a_graph_reads_the_rate_from_one_tensor():
    """Which therefore stays the same tensor."""
    module, config = import_module(SOLO), Namespace(decay_start=0, decay_end=10, device="cpu")
    optimizer = torch.optim.Adam([torch.zeros(1)], 0.1, capturable=True)
    module.set_rate({"net": optimizer}, config, 5)
    rate = optimizer.param_groups[0]["lr"]
    assert rate.item() == pytest.approx(0.01)
    module.set_rate({"net": optimizer}, config, 10)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.001)


def test_rates_are_those_of_absolute_steps(tmp_path, monkeypatch):
    """Whatever --steps was and however often the run was resumed; without the flags a rate is constant."""
    seen = []

    def note(step, metrics, nets, optimizers):
        seen.append(optimizers["generator"].param_groups[0]["lr"])

    meddle(monkeypatch, note)
    flags = [*POINTS, "--lr", 0.1, "--decay-start", 2, "--decay-end", 6]
    run_main(SOLO, *flags, "--steps", 4, "--out", tmp_path / "run")
    go_on(tmp_path / "run", "--steps", 5)
    go_on(tmp_path / "run", "--steps", 8)
    assert seen == pytest.approx([0.1, 0.1, *(0.1 * 0.01 ** (i / 4) for i in (1, 2, 3, 4, 4, 4))], rel=1e-12)
    seen.clear()
    run_main(SOLO, *POINTS, "--lr", 0.1, "--steps", 2, "--out", tmp_path / "constant")
    assert seen == [0.1, 0.1]


# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_resumes(number, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    flags = [*POINTS, "--steps", 8, "--log-every", 2]
    run_main(SOLO, *flags, "--out", whole)
    with monkeypatch.context() as patch:
        meddle(patch, lambda step, *_: os.kill(os.getpid(), number) if step == 5 else None)
        run_stops(128 + number, SOLO, *flags, "--out", out)
    assert checkpoint(out)["step"] == 5
    (line,) = errors(capsys.readouterr().err)
    assert f"--resume {out}" in line
    go_on(out)
    assert differences(checkpoint(whole), checkpoint(out)) == []
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
    run_stops(143, SOLO, *POINTS, "--steps", 9, "--sample-every", 4, "--out", tmp_path / "run")
    step = checkpoint(tmp_path / "run")["step"]
    assert step in (4, 5)
    assert f"stopped after step {step};" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["done", "diverged", "stopped", "bug"])
def test_signal_handlers_are_put_back(end, tmp_path, monkeypatch):
    """However a run ends: in a notebook Ctrl-C has to work afterwards."""

    def the_end(step, metrics, *_):
        if end == "diverged":
            next(iter(metrics.values())).fill_(math.nan)
        if end == "stopped":
            os.kill(os.getpid(), signal.SIGINT)
        if end == "bug":
            raise RuntimeError("a bug")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    meddle(monkeypatch, the_end)
    with nullcontext() if end == "done" else pytest.raises((SystemExit, RuntimeError)):
        run_main(SOLO, *POINTS, "--steps", 1, "--out", tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
def test_a_bug_keeps_its_traceback(error, tmp_path, monkeypatch):
    """And the checkpoint of step 0 is there by then, of plain values that make the same networks."""

    def bug(*_):
        raise error("a bug")

    meddle(monkeypatch, bug)
    with pytest.raises(error, match="a bug"):
        run_main(SOLO, *POINTS, "--out", tmp_path / "run")
    saved = checkpoint(tmp_path / "run")
    assert set(saved) == {"model", "step", "config", "networks", "optimizers", "rng", "fixed_z"}
    assert saved["step"] == 0 and not {"out", "resume"} & set(saved["config"])
    for name, net in import_module(SOLO).networks(Namespace(**saved["config"])).items():
        net.load_state_dict(saved["networks"][name])


# Processes of their own, started together, as each takes seconds to import PyTorch


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """{name: (process, its folder)} of real commands, with the thread count of this one."""
    folder = tmp_path_factory.mktemp("processes")
    reader, writer = os.pipe()
    os.close(reader)
    stderr = {
        "ctrl-c": os.open(folder / "ctrl-c.err", os.O_WRONLY | os.O_CREAT),
        "broken pipe": writer,
        "full": os.open("/dev/full", os.O_WRONLY),
        "closed": os.open(os.devnull, os.O_WRONLY),
    }
    env, started = {**os.environ, "OMP_NUM_THREADS": "1"}, {}
    for name, target in stderr.items():
        steps = 5 if name in ("full", "closed") else 10**6
        command = [sys.executable, ROOT / f"{SOLO}.py", *POINTS, "--steps", steps, "--out", folder / name]
        command += ["--log-every", 1, "--save-every", 10**6, "--sample-every", 10**6]
        if name == "closed":
            command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
        command = [str(part) for part in command]
        started[name] = subprocess.Popen(command, env=env, stderr=target), folder / name
        os.close(target)
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


def wait_for(path, process):
    """Until there is a file, with something in it."""
    deadline = time.monotonic() + 300
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)


# A refused process ends; this one, to which SystemExit is an exception, keeps its file for a while.
leaves_a_lock = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


@needs_full
def test_a_run_survives_the_reader_of_its_log(processes):
    """As in `2>&1 | head`: it trains on, and SIGTERM still finds it and has it save."""
    process, out = processes["broken pipe"]
    wait_for(out / "metrics.csv", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    assert checkpoint(out)["step"] == int(rows(out)[-1]["step"]) > 0


@needs_full
@leaves_a_lock
def test_one_process_writes_into_a_folder_and_ctrl_c_ends_it(processes, capsys):
    process, out = processes["ctrl-c"]
    wait_for(out / "metrics.csv", process)
    run_stops(2, SOLO, "--resume", out, "--device", "cpu")
    (line,) = errors(capsys.readouterr().err)
    assert "another process" in line and str(out) in line
    run_stops(2, SOLO, *POINTS, "--out", out)
    gc.collect()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    text = Path(f"{out}.err").read_text()
    assert len(errors(text)) == 1 and "Traceback" not in text
    step = checkpoint(out)["step"]
    assert 0 < step < 10**6 and [int(row["step"]) for row in rows(out)] == [*range(1, step + 1)]


@needs_full
@pytest.mark.parametrize("stderr", ["closed", "full"])
def test_a_run_needs_no_stderr(stderr, processes):
    process, out = processes[stderr]
    assert process.wait(timeout=300) == 0
    assert checkpoint(out)["step"] == 5 and len(rows(out)) == 5


KILLED = """
import contextlib, os, random, shutil, signal, sys, time
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
            try:
                module.main(flags)
                code = 0
            except SystemExit as stopped:  # a finished run says so and leaves with 0
                code = stopped.code
        os._exit(code)
    return pid

def step_of(run):
    path = f"{run}/checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if os.path.exists(path) else None

def go_on(run):
    if step_of(run) is not None:
        return fork(["--resume", run, "--device", "cpu"])
    shutil.rmtree(run, ignore_errors=True)  # killed before its first checkpoint
    return fork([*flags, "--out", run])

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
    """And the run, killed again and again, ends where an uninterrupted one does, its metrics.csv too.

    A killed process also leaves the folder to the next one.
    """
    flags = [*POINTS, "--steps", 60, "--log-every", 1, "--sample-every", 7, "--save-every", 1]
    script = [sys.executable, "-c", KILLED, ROOT, SOLO, tmp_path / "killed", *flags]
    ended = subprocess.run([str(part) for part in script], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    run_main(SOLO, *flags, "--out", tmp_path / "whole")
    whole = files(tmp_path / "whole")
    for out in (tmp_path / "killed").iterdir():
        assert differences(checkpoint(out), checkpoint(tmp_path / "whole")) == []
        found = files(out)
        assert found.keys() == whole.keys()
        assert [name for name in whole if found[name] != whole[name] and name != "checkpoint.pt"] == []


# Folders


@leaves_a_lock
@pytest.mark.parametrize("end", ["resume", "same command"])
def test_the_second_process_is_refused_while_the_first_lives(end, copied, tmp_path, monkeypatch, capsys):
    """Of two that start together, too: when both have found the folder empty."""
    module, before = import_module(SOLO), files(copied)
    with module.claim(copied, 4):
        if end == "resume":
            run_stops(2, SOLO, "--resume", copied, "--steps", 9, "--device", "cpu")
        else:
            monkeypatch.setattr(module, "any", lambda found: False, raising=False)
            run_stops(2, SOLO, *POINTS, "--out", copied)
    (line,) = errors(capsys.readouterr().err)
    assert "another process" in line and str(copied) in line and files(copied) == before
    gc.collect()
    go_on(copied, "--steps", 5)


@pytest.mark.parametrize("left", ["", "half a checkpo"])
def test_what_a_killed_process_left_half_written_is_whole_again(left, copied):
    whole = files(copied)
    (copied / "checkpoint.pt.tmp").write_text(left)
    for name in (f"{SOLO}.py", "config.json"):
        (copied / name).write_bytes(whole[name][: len(left)])
    go_on(copied, "--steps", 5)
    assert checkpoint(copied)["step"] == 5
    assert (copied / f"{SOLO}.py").read_bytes() == whole[f"{SOLO}.py"]
    assert json.loads((copied / "config.json").read_text()) == checkpoint(copied)["config"]
    assert not (copied / "checkpoint.pt.tmp").exists()


@pytest.mark.parametrize("beyond", ["5{0}\n6{0}\n", "5{0}\n6,0.1", "4", "5{0}\n6", ""])
def test_metrics_beyond_the_checkpoint_are_cut_off(beyond, copied):
    """A killed run logged more than it saved, the last line perhaps in part."""
    before = (copied / "metrics.csv").read_text()
    values = ",0.5" * before.split("\n")[0].count(",")
    (copied / "metrics.csv").write_text(before + beyond.format(values))
    go_on(copied, "--steps", 6)
    assert (copied / "metrics.csv").read_text().startswith(before)
    assert [row["step"] for row in rows(copied)] == ["2", "4", "6"]
    assert all(None not in row and None not in row.values() for row in rows(copied))


@pytest.mark.parametrize("left", ["", "st", None])
def test_metrics_killed_in_their_first_line_start_anew(left, tmp_path):
    """A file is there, empty, before its first line is."""
    whole, out, flags = tmp_path / "whole", tmp_path / "run", [*POINTS, "--log-every", 4]
    run_main(SOLO, *flags, "--steps", 3, "--out", out)
    if left is not None:
        (out / "metrics.csv").write_text(left)
    go_on(out, "--steps", 8)
    run_main(SOLO, *flags, "--steps", 8, "--out", whole)
    assert files(out)["metrics.csv"] == files(whole)["metrics.csv"]


@pytest.mark.parametrize("end", ["\r\n", ""])
def test_metrics_that_excel_has_saved_keep_their_rows(end, copied):
    """With a byte order mark, other ends of lines, and perhaps no end of the last one."""
    path = copied / "metrics.csv"
    text = path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + text.rstrip("\n").replace("\n", "\r\n").encode() + end.encode())
    go_on(copied, "--steps", 6)
    assert path.read_text().startswith(text) and [row["step"] for row in rows(copied)] == ["2", "4", "6"]


@pytest.mark.parametrize(
    "foreign", ["a note\n", "a note,\n\n", "step;D(x)\n2;0.5\n", "{0}\n2{1}\n", "{0}"], ids=range(5)
)
@pytest.mark.parametrize("first", [True, False])
def test_metrics_with_foreign_lines_still_go_on(foreign, first, copied):
    """No row of the run's is lost, none is fused with what somebody has written."""
    path = copied / "metrics.csv"
    header, *lines = path.read_text().splitlines()
    foreign = foreign.format(header, ",0.5" * header.count(","))
    ours = "\n".join([header, *lines, ""])
    path.write_text(foreign + ours if first and foreign.endswith("\n") else ours + foreign)
    go_on(copied, "--steps", 6)
    found = path.read_text().splitlines()
    assert [line for line in found if line in lines] == lines
    assert found[-1].startswith("6,") and found[-1].count(",") == header.count(",")


# Disks that fill up


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
    run_main(SOLO, *POINTS, "--steps", 2, "--save-every", 1, "--out", tmp_path / "run")
    saves = [sizes for name, *sizes in named if name == "checkpoint.pt"]
    assert len(saves) == 3 and all(at_fsync == size for at_fsync, size in saves)


def full_disk(path):
    """Writing to /dev/full fails as it does on a full disk."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


def full_after(out):
    """A limit for files that only the last bytes of a checkpoint exceed; it is larger than any buffer."""
    import resource

    size = (out / "checkpoint.pt").stat().st_size
    assert size > 4 * io.DEFAULT_BUFFER_SIZE
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@needs_full
@pytest.mark.parametrize("full", ["checkpoint.pt", "metrics.csv", "config.json", "samples/0000006.png.tmp"])
def test_a_full_disk_leaves_the_last_checkpoint(full, copied, monkeypatch, capsys):
    """One line, nothing half-written, and the run can go on when there is room again."""
    resource = pytest.importorskip("resource")
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = (copied / "checkpoint.pt").read_bytes()

    def fill(step, *_):
        if step == 2:
            full_after(copied) if full == "checkpoint.pt" else full_disk(copied / full)

    flags = ["--steps", 9, "--log-every", 3, "--sample-every", 2, "--save-every", 3, "--device", "cpu"]
    with monkeypatch.context() as patch:
        meddle(patch, fill)
        capsys.readouterr()
        try:
            run_stops(2, SOLO, "--resume", copied, *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
    (line,) = errors(capsys.readouterr().err)
    assert "No space left" in line or "File too large" in line
    assert (copied / "checkpoint.pt").read_bytes() == before
    assert [name for name in files(copied) if name.endswith(".tmp")] == []
    (copied / "metrics.csv").is_symlink() and (copied / "metrics.csv").unlink()
    (copied / "config.json").is_symlink() and (copied / "config.json").unlink()
    go_on(copied, "--steps", 9)
    assert checkpoint(copied)["step"] == 9


def test_a_failing_rename_leaves_the_last_checkpoint(copied, monkeypatch, capsys):
    before = (copied / "checkpoint.pt").read_bytes()

    def replace(source, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    monkeypatch.setattr(os, "replace", replace)
    run_stops(2, SOLO, "--resume", copied, "--steps", 9, "--save-every", 3, "--device", "cpu")
    assert len(errors(capsys.readouterr().err)) == 1
    assert (copied / "checkpoint.pt").read_bytes() == before


# Numbers that are not finite


def finite(out):
    """Whether all of a checkpoint's weights, statistics and moments are."""
    saved = checkpoint(out)
    nets = [*saved["networks"].values()]
    moments = [part for optimizer in saved["optimizers"].values() for part in optimizer["state"].values()]
    return all(value.isfinite().all() for part in nets + moments for value in part.values())


def test_a_run_that_diverges_stops_and_keeps_what_was_finite(images, tmp_path, capsys):
    """This one's numbers, which are from before each update, do not show it in time."""
    out, flags = tmp_path / "run", ["--network", "conv", "--batch-size", 8, "--lr", 1e18, "--save-every", 1]
    run_stops(1, SOLO, *images, *flags, "--log-every", 1, "--out", out)
    (line,) = errors(capsys.readouterr().err)
    step = checkpoint(out)["step"]
    assert finite(out) and re.search(rf"\w+ was not finite (at|after) step {step + 1}\b", line)


def poison(nets, optimizers, what):
    """Let the update that has just been made have broken this."""
    if what == "weights":
        next(nets["generator"].parameters()).data.view(-1)[0] = math.nan
    if what == "statistics":
        nets["generator"].register_buffer("running_mean", torch.tensor([0, -math.inf]))
    if what == "moments":
        optimizers["generator"].state[next(nets["generator"].parameters())]["exp_avg_sq"].fill_(math.inf)


@pytest.mark.parametrize("what", ["weights", "statistics", "moments"])
def test_what_an_update_broke_is_never_saved(what, tmp_path, monkeypatch, capsys):
    """At step 4 all the numbers are finite still."""
    meddle(monkeypatch, lambda step, metrics, *parts: poison(*parts, what) if step == 4 else None)
    flags = ["--save-every", 2, "--log-every", 1, "--steps", 50]
    run_stops(1, SOLO, *POINTS, *flags, "--out", tmp_path / "run")
    (line,) = errors(capsys.readouterr().err)
    assert "generator" in line and re.search(r"step 4\b", line)
    assert checkpoint(tmp_path / "run")["step"] == 2 and finite(tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 4


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    """A single one, at a step that saves, is found before; at another, by the numbers that follow."""
    module = import_module(SOLO)
    build = module.build
    for spoiled in (3, 4):
        steps, out = count(1), tmp_path / str(spoiled)

        def spoil(optimizer, *_, spoiled=spoiled, steps=steps):
            if next(steps) == spoiled:
                optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = math.nan

        def built(*args, spoil=spoil):
            parts = build(*args)
            parts[1]["generator"].register_step_pre_hook(spoil)
            return parts

        monkeypatch.setattr(module, "build", built)
        run_stops(1, SOLO, *POINTS, "--save-every", 2, "--steps", 50, "--out", out)
        assert checkpoint(out)["step"] == 2 and finite(out)


@pytest.mark.parametrize("seen", ["--log-every", "--sample-every", "--save-every"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_step_that_is_not_finite_is_named(value, seen, tmp_path, monkeypatch, capsys):
    """Though nobody looks before step 5, when another number has broken too, and this one is finite again."""
    names = []

    def spoil(step, metrics, *_):
        names[:] = metrics
        broken = {3: names[-1:], 4: names}.get(step, [])
        return metrics | {name: metrics[name] * 0 + value for name in broken}

    meddle(monkeypatch, spoil)
    every = {"--log-every": 100, "--sample-every": 100, "--save-every": 100} | {seen: 5}
    flags = [part for pair in every.items() for part in pair]
    run_stops(1, SOLO, *POINTS, *flags, "--steps", 50, "--out", tmp_path / "run")
    (line,) = errors(capsys.readouterr().err)
    assert re.search(r"step 3\b", line) and names[-1] in line
    assert files(tmp_path / "run").keys() == {"checkpoint.pt", "config.json", f"{SOLO}.py"}
    assert checkpoint(tmp_path / "run")["step"] == 0


def test_a_signal_does_not_save_what_is_not_finite(tmp_path, monkeypatch):
    def spoil(step, metrics, *_):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            return {name: value * math.nan for name, value in metrics.items()}

    meddle(monkeypatch, spoil)
    run_stops(1, SOLO, *POINTS, "--steps", 50, "--out", tmp_path / "run")
    assert checkpoint(tmp_path / "run")["step"] == 0


# What is said


def test_the_line_of_an_error_begins_behind_the_bar(tmp_path, monkeypatch):
    """On a terminal the bar stands in an unfinished line."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    meddle(monkeypatch, lambda step, metrics, *_: {name: value / 0 for name, value in metrics.items()})
    run_stops(1, SOLO, *POINTS, "--log-every", 1, "--out", tmp_path / "run")
    assert re.search(rf"[\r\n]{SOLO}\.py: .* step 1\b.*\n", terminal.getvalue())


def test_without_a_terminal_a_log_is_one_line(tmp_path, capsys):
    """The last one too, although the bar is closed after it."""
    run_main(SOLO, *POINTS, "--steps", 3, "--log-every", 1, "--out", tmp_path / "run")
    lines = re.findall(r"^step (\d), \S+ [-\d]", capsys.readouterr().err, re.MULTILINE)
    assert lines == ["1", "2", "3"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is here")
def test_without_a_gpu_smaller_settings_are_named(tmp_path, capsys):
    run_main(SOLO, *POINTS, "--steps", 1, "--out", tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "GPU" in line]
    assert "--width" in line and "--steps" in line
