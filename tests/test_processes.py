"""Several processes under torchrun, two on this machine's CPU: one run, with larger batches.

torchrun and its processes take seconds to import PyTorch: the three jobs of this file are started together.
"""

import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import SOLO, checkpoint, differences, files, rows, run_main
from torch.testing import assert_close

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and os.path.exists("/dev/full")),
    reason="needs gloo and /dev/full",
)

ROOT = Path(__file__).parents[1]
POINTS = ["--dataset", "ring", "--device", "cpu", "--width", 2, "--log-every", 1]
SAME_STEP = [  # networks without batch norm: one convolutional in channels_last, one with z in its critic
    ("wgan_gp", [1, 16, 16], "--generator", "conv-plain", "--width", "3"),
    ("wbli", [2], "--width", "2"),
    ("alpha_gan", [2], "--width", "2"),
]


def take_steps(folder, batch_size, cases):
    """Three steps of each model, in float64, by this process or, under torchrun, by all of them.

    Batches, codes and other random numbers are rows of what one process of 64 would draw.
    """
    rank, rand = dist.get_rank() if dist.is_initialized() else 0, torch.rand
    torch.set_default_dtype(torch.float64)
    for name, shape, *flags in cases:
        module, numbers = import_module(name), count()
        flags += ["--batch-size", batch_size, "--z-dim", 3, "--steps", 3, "--log-every", 1, "--device", "cpu"]
        flags += ["--dataset", "ring" if shape == [2] else "glyphs", "--out", f"{folder}/{name}"]
        config = module.parse_args([str(flag) for flag in flags])
        config.shape, config.classes = shape, 8
        data = 2 * torch.rand(100, *shape, generator=torch.Generator().manual_seed(0)) - 1

        def mine(draw, *shape, numbers=numbers):
            drawn = draw(64, *shape, generator=torch.Generator().manual_seed(next(numbers)))
            return drawn[rank * batch_size : (rank + 1) * batch_size]

        def sample_batch(*_, data=data, mine=mine):
            return data[(mine(rand) * len(data)).long()]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "sample_batch", sample_batch)
            patch.setattr(module, "draw_z", lambda n, config, device, mine=mine: mine(torch.randn, 3))
            patch.setattr(torch, "rand", lambda n, *shape, mine=mine, **_: mine(rand, *shape))
            torch.manual_seed(0)
            module.train(config, *module.build(config, (data, None), (data, None)), None, False)
    torch.set_default_dtype(torch.float32)


def job(folder):
    """What each of two processes does in one of the jobs below, all in one process group."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    module, kept = import_module(SOLO), {}
    build = module.build

    def noted_build(*args):
        kept["parts"] = build(*args)
        return kept["parts"]

    # A whole run, in a working directory that only this process has.
    here = Path(folder, f"process-{rank}")
    here.mkdir()
    os.chdir(here)
    module.build = noted_build
    flags = [str(flag) for flag in (*POINTS, "--batch-size", 4)]
    module.main([*flags, "--steps", "20", "--out", "run"])
    weights = [weight.detach() for weight in kept["parts"][0].parameters()]
    torch.save({"weights": weights, "random": torch.rand(5)}, Path(folder, f"{rank}.pt"))

    take_steps(folder, 32, SAME_STEP)

    # The disk of the first process fills up: /dev/full stands in for its metrics.csv.
    dist.init_process_group = lambda: None
    full = here / "full" / "metrics.csv"
    module.save = lambda *_: full.symlink_to("/dev/full")
    module.main([*flags, "--steps", "100000", "--save-every", "100000", "--out", "full"])


def torchrun(*command):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": env}
    return subprocess.Popen([str(part) for part in command], **options)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """{name: (torchrun, its folder)}: our job; a run to stop; another's run that two processes go on with."""
    folder = tmp_path_factory.mktemp("jobs")
    long = [ROOT / f"{SOLO}.py", *POINTS, "--batch-size", 4, "--steps", 10**6, "--save-every", 10**6]
    run_main(SOLO, *long[1:-4], "--steps", 3, "--save-every", 10**6, "--out", folder / "resumed")
    (folder / "job").mkdir()
    started = {
        "job": torchrun(__file__, folder / "job"),
        "begun": torchrun(*long, "--out", folder / "begun"),
        "resumed": torchrun(long[0], "--resume", folder / "resumed", "--steps", 10**6, "--device", "cpu"),
    }
    yield {name: (process, folder / name) for name, process in started.items()}
    for process in started.values():
        process.kill()
        process.communicate()


def stopped(process, out, number, step):
    """Once the run has come beyond this step, send a signal to torchrun; returns the step that is saved."""
    deadline = time.monotonic() + 120
    while not (out / "metrics.csv").exists() or len(rows(out)) <= step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, text = process.communicate(timeout=120)
    assert process.returncode != 0
    saved = checkpoint(out)["step"]
    assert text.count(f"{SOLO}.py: stopped after step {saved}; --resume") == 1
    assert [int(row["step"]) for row in rows(out)] == [*range(1, saved + 1)]
    return saved


def test_ctrl_c_saves_and_two_processes_can_resume_the_run_of_one(jobs):
    process, out = jobs["resumed"]
    assert stopped(process, out, signal.SIGINT, step=3) > 3


def test_sigterm_saves_and_one_process_can_resume_the_run_of_two(jobs):
    process, out = jobs["begun"]
    step = stopped(process, out, signal.SIGTERM, step=0)
    run_main(SOLO, "--resume", out, "--steps", step + 2, "--device", "cpu")
    assert checkpoint(out)["step"] == step + 2 and len(rows(out)) == step + 2


def test_an_error_of_one_process_ends_all(jobs):
    """With its one line, among those of torchrun."""
    process, folder = jobs["job"]
    _, text = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(re.findall(rf"{SOLO}\.py: .*No space left on device", text)) == 1


@pytest.mark.parametrize("case", SAME_STEP, ids=[name for name, *_ in SAME_STEP])
def test_two_batches_of_32_take_the_step_of_one_of_64(case, jobs, tmp_path):
    """On the same x and z: weights, moments and logged numbers, in float64."""
    process, folder = jobs["job"]
    process.wait(timeout=120)
    take_steps(tmp_path, 64, [case])
    one, two = tmp_path / case[0], folder / case[0]
    for part in ("networks", "optimizers"):
        assert_close(checkpoint(two)[part], checkpoint(one)[part], rtol=1e-9, atol=1e-12)
    assert checkpoint(two)["step"] == 3 and len(rows(two)) == 3
    for a, b in zip(rows(one), rows(two), strict=True):
        numbers = {name: float(value) for name, value in b.items()}
        assert {name: float(value) for name, value in a.items()} == pytest.approx(numbers, rel=1e-5, abs=1e-9)


def test_weights_stay_equal_and_batches_do_not(jobs):
    process, folder = jobs["job"]
    process.wait(timeout=120)
    zero, one = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert differences(zero["weights"], one["weights"]) == []
    assert not torch.equal(zero["random"], one["random"])
    saved = checkpoint(folder / "process-0" / "run")
    assert saved["step"] == 20


def test_process_0_alone_writes(jobs):
    process, folder = jobs["job"]
    process.wait(timeout=120)
    assert files(folder / "process-1") == {}
    found = files(folder / "process-0" / "run")
    assert {
        "checkpoint.pt",
        "config.json",
        "metrics.csv",
        f"{SOLO}.py",
        "samples/0000020.png",
    } <= found.keys()
    assert len(rows(folder / "process-0" / "run")) == 20


if __name__ == "__main__":
    job(sys.argv[1])
