"""tools.sample: what it writes, that it follows from the seed, and one line for a user's mistake."""

import contextlib
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODELS, having
from PIL import Image

from common import as_float
from tools import drawing, runs, sample

ROOT = Path(__file__).parents[1]
SOLO, SOLO_ENCODER = "dcgan", "wbli"
BY_LABEL = {"cgan": 10, "infogan": 10, "gm_wae": 4}  # labels of a run with z of four dimensions

each = pytest.mark.parametrize("model", MODELS, indirect=True)
solo = pytest.mark.parametrize("model", [SOLO], indirect=True)
solo_encoder = pytest.mark.parametrize("model", [SOLO_ENCODER], indirect=True)

MIXTURE = '''
"""A model that this project does not know: two components, and G(z) = z."""
import torch
from torch import nn

def networks(config):
    return {"generator": nn.Identity()}

def draw_z(n, config, device, label=None):
    k = torch.randint(2, (n,), device=device) if label is None else label
    return (k * torch.ones(n, device=device))[:, None] + torch.zeros(n, 2, device=device)

def generate(nets, z):
    return nets["generator"](z)

def classify(nets, x):
    return torch.full((len(x), 2), 0.5)
'''


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    """The folder of a run of MIXTURE, whose file is where the model files are."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mixture.py").write_text(MIXTURE, encoding="utf-8")
    monkeypatch.setattr(runs, "ROOT", folder)
    monkeypatch.syspath_prepend(folder)
    config = {"shape": [2], "dataset": "grid", "image_size": 32, "seed": 0, "z_dim": 2}
    saved = {"model": "mixture", "step": 0, "config": config, "networks": {"generator": {}}}
    torch.save(saved, folder / "checkpoint.pt")
    yield folder
    sys.modules.pop("mixture", None)


@pytest.fixture
def pictures(tmp_path):
    """A folder of twenty 8×8 pictures in grey, all different."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    values = np.random.default_rng(0).integers(256, size=(20, 8, 8), dtype=np.uint8)
    for i, value in enumerate(values):
        Image.fromarray(value).save(folder / f"{i}.png")
    return folder


def run(*argv):
    sample.main([str(word) for word in argv] + ["--device", "cpu"])


def mistake(capsys, *argv):
    """The one line that ends sample, with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tools.sample: error: ")
    return line


def array(path):
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


# What it writes


@solo
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16)])
def test_a_grid_of_64(model, shape, make_run):
    path = make_run(model, shape)
    run(path)
    with Image.open(path / "samples.png") as grid:
        assert grid.size == (8 * shape[-1], 8 * shape[-1])
        assert grid.mode == ("L" if shape[0] == 1 else "RGB")


@each
def test_arrays_of_pictures_and_points(model, make_run, tmp_path):
    run(make_run(model, (3, 8, 8)), "--n", 10, "--out", tmp_path / "x.npz")
    x = array(tmp_path / "x.npz")
    assert x.shape == (10, 8, 8, 3) and x.dtype == np.uint8 and x.std() > 0
    run(make_run(model, (2,), name="points"), "--out", tmp_path / "x.npz")
    x = array(tmp_path / "x.npz")
    assert x.shape == (2500, 2) and x.dtype == np.float32
    assert not list(tmp_path.glob("*.tmp"))


@solo
def test_the_density_of_points(model, make_run):
    path = make_run(model, (2,))
    run(path)
    with Image.open(path / "samples.png") as density:
        assert density.size == (256, 256)


@solo
def test_single_pictures_are_those_of_the_array(model, make_run, tmp_path):
    path = make_run(model, (1, 8, 8))
    run(path, "--n", 5, "--out", tmp_path / "folder")
    run(path, "--n", 5, "--out", tmp_path / "x.npz")
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(5)]
    for file, x in zip(files, array(tmp_path / "x.npz"), strict=True):
        with Image.open(file) as picture:
            assert np.array_equal(np.asarray(picture), x[..., 0])


@solo
def test_the_seed_alone_decides(model, make_run, tmp_path):
    """Not the batch size, not torch's generator; and a sample does not depend on the others (eval mode)."""
    path, found = make_run(model, (1, 8, 8)), []
    for i, flags in enumerate([(), ("--batch-size", 3), ("--batch-size", 1), ("--seed", 1)]):
        torch.manual_seed(i)
        before = torch.get_rng_state()
        run(path, "--n", 20, "--out", tmp_path / f"{i}.npz", *flags)
        assert torch.equal(before, torch.get_rng_state())
        found.append(array(tmp_path / f"{i}.npz").astype(int))
    same, *others, different = found
    assert all(abs(same - other).max() <= 1 for other in others)  # 1: sums in another order, then rounded
    assert abs(same - different).mean() > 10


@pytest.mark.parametrize("model", having("encode"), indirect=True)
def test_reconstructions_are_pairs_of_test_items(model, make_run, pictures, tmp_path):
    """Read from this command's --data-dir: what a checkpoint names is not written to."""
    path = make_run(model, (1, 8, 8), "--data-dir", tmp_path / "named", dataset=pictures)
    run(path, "--reconstruct", "--out", tmp_path / "x.npz", "--data-dir", tmp_path / "data")
    assert (tmp_path / "data/cache").is_dir() and not (tmp_path / "named").exists()
    x = array(tmp_path / "x.npz")
    assert x.shape == (2, 2, 8, 8, 1)  # a tenth of the pictures is the test split
    opened = runs.open_run(path, "cpu")
    y = as_float(torch.from_numpy(x[:, 0]).movedim(-1, 1))
    expected = model.generate(opened.nets, model.encode(opened.nets, y))
    torch.testing.assert_close(
        as_float(torch.from_numpy(x[:, 1])).movedim(-1, 1), expected, atol=1 / 127, rtol=0
    )


@solo_encoder
def test_reconstructions_of_files(model, make_run, pictures):
    path = make_run(model, (1, 8, 8))
    run(path, "--reconstruct", pictures / "3.png", pictures / "4.png", pictures / "5.png")
    with Image.open(path / "reconstructions.png") as grid, Image.open(pictures / "4.png") as source:
        assert grid.size == (64, 8)
        assert np.array_equal(np.asarray(grid)[:, 16:24], np.asarray(source))


@solo_encoder
@pytest.mark.parametrize("size", [16, 32])
def test_a_digit_of_28_pixels_is_padded_as_its_data_set_is(model, size, make_run, tmp_path):
    """A black frame of two pixels in 32; where another data set is read, the picture fills the frame."""
    Image.new("L", (28, 28), 255).save(tmp_path / "white.png")
    for dataset, framed in (("mnist", True), ("glyphs", False)):
        path = make_run(model, (1, size, size), name=dataset, dataset=dataset)
        run(path, "--reconstruct", tmp_path / "white.png", "--out", tmp_path / "x.npz")
        x = array(tmp_path / "x.npz")[0, 0, ..., 0]
        assert (x[2:-2, 2:-2] == 255).all()
        assert x.mean() == pytest.approx(255 * (28 / 32) ** 2 if framed else 255, abs=1)
        assert (x[0].max() < 128) == framed


@solo_encoder
def test_reconstructions_of_points(model, make_run):
    path = make_run(model, (2,))
    run(path, "--reconstruct")
    with Image.open(path / "reconstructions.png") as densities:
        assert densities.size == (512, 256)


@solo
def test_interpolation(model, make_run, tmp_path):
    """Eight to a row, and inside a row each picture is nearer to its neighbour than its ends are."""
    run(make_run(model, (1, 8, 8)), "--interpolate", "--out", tmp_path / "x.npz")
    rows = array(tmp_path / "x.npz").astype(float).reshape(8, 8, -1)
    steps = np.linalg.norm(np.diff(rows, axis=1), axis=2).max()
    assert steps < np.linalg.norm(rows[:, 0] - rows[:, -1], axis=1).mean()


@pytest.mark.parametrize("circle", [0, 20, 30])
def test_between(circle):
    """Both ends exact; of constant length on the way on a circle, between two of one length."""
    a, b = torch.randn(2, 5, 30, dtype=torch.float64)
    b *= a[:, :circle].norm(dim=1, keepdim=True) / b[:, :circle].norm(dim=1, keepdim=True) if circle else 1
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    z = drawing.between(a, b, t, circle)
    torch.testing.assert_close(z[:, 0], a)
    torch.testing.assert_close(z[:, -1], b)
    torch.testing.assert_close(z[:, 2, circle:], ((a + b) / 2)[:, circle:])
    on_circle = z[..., :circle]
    torch.testing.assert_close(on_circle.norm(dim=2), a[:, :circle].norm(dim=1, keepdim=True).expand(5, 5))
    steps = on_circle.diff(dim=1).norm(dim=2)
    torch.testing.assert_close(steps, steps[:, :1].expand(5, 4))


def test_between_the_same():
    a = torch.randn(3, 4, dtype=torch.float64)
    z = drawing.between(a, a, torch.tensor([0.0, 0.5, 1.0]), 4)
    torch.testing.assert_close(z, a[:, None].expand(3, 3, 4))


def test_between_a_quarter_of_a_circle():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    z = drawing.between(a, b, torch.tensor([0.5]), 2)
    torch.testing.assert_close(z, math.sqrt(0.5) * torch.tensor([[[1.0, 2.0]]]))


@each
def test_only_noise_near_a_sphere_goes_on_circles(model, configure):
    """Normal numbers and those of a sphere in 20 dimensions have a kurtosis near 3, uniform ones 1.8."""
    config = configure(model, (1, 8, 8), "--z-dim", 20)
    z = model.draw_z(20_000, config, torch.device("cpu"))[:, :20]
    kurtosis = (z.pow(4).mean(0) / z.square().mean(0).square()).mean()
    near = bool(2.5 < kurtosis < 3.2)
    assert near == (model.__name__ not in drawing.STRAIGHT)


def test_a_label(mixture):
    for k in (0, 1):
        run(mixture, "--label", k, "--n", 10, "--out", mixture / f"{k}.npz")
        assert (array(mixture / f"{k}.npz") == k).all()
    run(mixture, "--label", 1)
    assert (mixture / "samples-1.png").exists()
    run(mixture, "--n", 100, "--out", mixture / "all.npz")
    assert set(array(mixture / "all.npz").flat) == {0, 1}


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_how_many_labels_there_are(model, make_run):
    opened = runs.open_run(make_run(model, (1, 8, 8)), "cpu")
    assert opened.labels == BY_LABEL.get(opened.name, 0)
    assert opened.conditional == (opened.name == "cgan")
    if opened.labels:
        z = [runs.draw_z(opened, 3, 0, label) for label in (0, opened.labels - 1)]
        assert z[0].shape == z[1].shape and not torch.equal(*z)


# Flags and files


def test_help_comes_before_anything_heavy_is_imported():
    """In a process of its own, for all tools at once."""
    tools = ("tools.sample", "tools.evaluate", "tools.bench")
    code = "import sys; from importlib import import_module"
    experiments = ("claims", "study", "along", "gradients", "mixture", "quality", "pictures")
    for tool in (*tools, *(f"experiments.{name}" for name in experiments)):
        code += f"\ntry: import_module('{tool}').main(['--help'])\nexcept SystemExit: pass"
    code += "\nheavy = {'torch', 'numpy', 'sklearn', 'matplotlib', 'torchmetrics', 'umap', 'scipy'}"
    code += "\nprint('heavy:', heavy & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("show this help") == 10 and done.stdout.endswith("heavy: set()\n"), done.stderr


@solo
def test_only_files_of_this_checkout_are_imported(model, make_run, tmp_path):
    """Not those of the working directory, nor of the run's folder, which here are the same."""
    path = make_run(model, (1, 8, 8))
    for name in (SOLO, "common", "wgan_gp"):
        (path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    command = [sys.executable, "-m", "tools.sample", ".", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (path / "samples.png").exists() and not (tmp_path / "ran").exists()


# Mistakes


def test_no_run(tmp_path, capsys):
    assert "holds no run" in mistake(capsys, tmp_path)
    assert "holds no run" in mistake(capsys, tmp_path / "missing")


def test_a_damaged_checkpoint(tmp_path, capsys):
    file = tmp_path / "checkpoint.pt"
    for content in (b"", b"no checkpoint", b"PK\3\4"):
        file.write_bytes(content)
        assert "damaged" in mistake(capsys, tmp_path)
    torch.save([1, 2], file)
    assert "not the checkpoint of a run" in mistake(capsys, tmp_path)


@pytest.mark.parametrize("name", ["os", "common", "tools.runs", "../wgan", "", "conftest"])
def test_only_model_files_are_imported(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    torch.save({"model": name, "step": 0, "config": {}, "networks": {}}, tmp_path / "checkpoint.pt")
    assert "is of a model called" in mistake(capsys, tmp_path)


def test_a_pickle_that_would_run_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Evil()}, tmp_path / "checkpoint.pt")
    mistake(capsys, tmp_path)
    assert not (tmp_path / "ran").exists()


@solo
def test_wrong_contents(model, make_run, capsys):
    """One sentence each, for whatever stands in the place of whatever."""
    path = make_run(model, (1, 8, 8))
    saved = torch.load(path / "checkpoint.pt", weights_only=True)
    for change in ({"networks": {}}, {"config": saved["config"] | {"width": 5}}, {"config": {}}):
        torch.save(saved | change, path / "checkpoint.pt")
        assert "does not fit dcgan.py" in mistake(capsys, path)
    for key in saved:
        for value in (None, 3, "x", [], {}, torch.zeros(2)):
            torch.save(saved | {key: value}, path / "checkpoint.pt")
            with contextlib.suppress(ValueError):
                runs.open_run(path, "cpu")
    refused = set()
    for key in saved["config"]:
        for value in (None, -1, 1.5, "x", [], [1, 2, 3], {}):
            torch.save(saved | {"config": saved["config"] | {key: value}}, path / "checkpoint.pt")
            try:
                runs.open_run(path, "cpu")
            except ValueError:
                refused.add(key)
    assert refused >= {"shape", "z_dim", "width", "dataset", "image_size", "seed"}


@solo_encoder
def test_data_of_another_shape(model, make_run, pictures, capsys, tmp_path):
    """The folder has pictures in grey; the run has learnt from others in colour."""
    path = make_run(model, (3, 8, 8), dataset=pictures)
    line = mistake(capsys, path, "--reconstruct", "--data-dir", tmp_path / "data")
    assert "items of 1×8×8" in line and "has learnt 3×8×8" in line


@solo
def test_what_this_run_cannot_do(model, make_run, capsys, tmp_path):
    path, points = make_run(model, (1, 8, 8)), make_run(model, (2,), name="points")
    before = sorted(tmp_path.rglob("*"))
    assert "no encoder" in mistake(capsys, path, "--reconstruct")
    assert "cannot be asked for by a label" in mistake(capsys, path, "--label", 1)
    assert "of points" in mistake(capsys, points, "--out", tmp_path / "folder")
    assert "is not empty" in mistake(capsys, path, "--out", path)
    assert ".png, an array" in mistake(capsys, path, "--out", tmp_path / "grid.jpg")
    assert sorted(tmp_path.rglob("*")) == before


@solo
def test_a_full_memory(model, make_run, capsys, monkeypatch):
    """On a GPU; on a CPU, where only the words tell; and what no memory could hold is not asked for."""
    path = make_run(model, (1, 8, 8))
    assert "memory is full" in mistake(capsys, path, "--n", 10**15)
    with monkeypatch.context() as patch:
        patch.setattr(drawing.os, "sysconf", lambda name: 100)  # in bytes, 10 000
        patch.setattr(drawing, "draw_z", lambda *_: pytest.fail("it was asked for"))
        assert "memory is full" in mistake(capsys, path, "--n", 80)
    on_cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), on_cpu, MemoryError()):

        def full(nets, z, error=error):
            raise error

        monkeypatch.setattr(model, "generate", full)
        assert "--batch-size" in mistake(capsys, path)


def test_a_label_that_is_not_there(mixture, capsys):
    assert "has 2, 0 … 1" in mistake(capsys, mixture, "--label", 2)


@solo_encoder
def test_files_that_are_no_pictures(model, make_run, capsys, tmp_path):
    path, text = make_run(model, (1, 8, 8)), tmp_path / "text.png"
    text.write_text("no picture")
    assert "text.png" in mistake(capsys, path, "--reconstruct", text)
    assert "missing.png" in mistake(capsys, path, "--reconstruct", tmp_path / "missing.png")
    points = make_run(model, (2,), name="points")
    assert "is of points" in mistake(capsys, points, "--reconstruct", text)


@pytest.mark.parametrize(
    "flags",
    [
        ["--n", "0"],
        ["--n", "many"],
        ["--batch-size", "0"],
        ["--seed", "-1"],
        ["--interpolate", "--reconstruct"],
        ["--label", "1", "--reconstruct"],
        ["--label", "-1"],
        ["--device", "tpu"],
        ["--unknown"],
    ],
)
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["run", *flags])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flags[0] in line or flags[-1] in line


def test_it_runs_as_a_module(capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--help"])
    assert stopped.value.code == 0
    assert "RUN" in capsys.readouterr().out
    assert import_module("tools.sample").__doc__.count("python -m tools.sample") == 6
