"""tools/sample.py: what it writes, that it follows from the seed, and one line for a user's mistake."""

import math
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tools import runs, sample

ROOT = Path(__file__).parents[1]
MODELS = runs.model_names()
ENCODERS = [name for name in MODELS if "def encode(" in (ROOT / f"{name}.py").read_text(encoding="utf-8")]
SOLO, SOLO_ENCODER = "dcgan", "wbli"

each = pytest.mark.parametrize("model", MODELS, indirect=True)
each_encoder = pytest.mark.parametrize("model", ENCODERS, indirect=True)

MIXTURE = '''
"""A model that this project does not know: two components, and G(z) = z."""
import torch
from torch import nn

def networks(config):
    return {"generator": nn.Identity()}

def draw_z(n, config, device, component=None):
    k = torch.randint(2, (n,), device=device) if component is None else component
    return (k * torch.ones(n, device=device))[:, None] + torch.zeros(n, 2, device=device)

def generate(nets, z):
    return nets["generator"](z)

def component_probabilities(nets, x):
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
    config = {"shape": [2], "prior": "mixture", "dataset": "grid", "data_dir": "data", "image_size": 32}
    saved = {"model": "mixture", "step": 0, "config": config | {"seed": 0}, "networks": {"generator": {}}}
    torch.save(saved | {"fixed_z": torch.zeros(1, 2)}, folder / "checkpoint.pt")
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


@each
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16)])
def test_a_grid_of_64(model, shape, make_run):
    path = make_run(model, shape)
    run(path)
    with Image.open(path / "samples.png") as grid:
        assert grid.size == (8 * shape[-1], 8 * shape[-1])
        assert grid.mode == ("L" if shape[0] == 1 else "RGB")


@each
def test_an_array(model, make_run, tmp_path):
    run(make_run(model, (3, 8, 8)), "--n", 10, "--out", tmp_path / "x.npz")
    x = array(tmp_path / "x.npz")
    assert x.shape == (10, 8, 8, 3) and x.dtype == np.uint8 and x.std() > 0
    assert not list(tmp_path.glob("*.tmp"))


@each
def test_points(model, make_run, tmp_path):
    path = make_run(model, (2,))
    run(path)
    with Image.open(path / "samples.png") as density:
        assert density.size == (256, 256)
    run(path, "--out", tmp_path / "x.npz")
    x = array(tmp_path / "x.npz")
    assert x.shape == (2500, 2) and x.dtype == np.float32


@pytest.mark.parametrize("model", [SOLO], indirect=True)
def test_single_pictures_are_those_of_the_array(model, make_run, tmp_path):
    path = make_run(model, (1, 8, 8))
    run(path, "--n", 5, "--out", tmp_path / "folder")
    run(path, "--n", 5, "--out", tmp_path / "x.npz")
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(5)]
    for file, x in zip(files, array(tmp_path / "x.npz"), strict=True):
        with Image.open(file) as picture:
            assert np.array_equal(np.asarray(picture), x[..., 0])


@each
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


@each_encoder
def test_reconstructions_are_pairs_of_test_items(model, make_run, pictures, tmp_path):
    path = make_run(model, (1, 8, 8), "--data-dir", tmp_path / "data", dataset=pictures)
    run(path, "--reconstruct", "--out", tmp_path / "x.npz")
    x = array(tmp_path / "x.npz")
    assert x.shape == (2, 2, 8, 8, 1)  # a tenth of the pictures is the test split
    opened = runs.open_run(path, "cpu")
    y = runs.as_float(torch.from_numpy(x[:, 0]).movedim(-1, 1))
    expected = model.generate(opened.nets, model.encode(opened.nets, y))
    torch.testing.assert_close(
        runs.as_float(torch.from_numpy(x[:, 1])).movedim(-1, 1), expected, atol=1 / 127, rtol=0
    )


@pytest.mark.parametrize("model", [SOLO_ENCODER], indirect=True)
def test_reconstructions_of_files(model, make_run, pictures):
    path = make_run(model, (1, 8, 8))
    run(path, "--reconstruct", pictures / "3.png", pictures / "4.png", pictures / "5.png")
    with Image.open(path / "reconstructions.png") as grid, Image.open(pictures / "4.png") as source:
        assert grid.size == (64, 8)
        assert np.array_equal(np.asarray(grid)[:, 16:24], np.asarray(source))


@pytest.mark.parametrize("model", [SOLO_ENCODER], indirect=True)
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


@pytest.mark.parametrize("model", [SOLO_ENCODER], indirect=True)
def test_reconstructions_of_points(model, make_run):
    path = make_run(model, (2,))
    run(path, "--reconstruct")
    with Image.open(path / "reconstructions.png") as densities:
        assert densities.size == (512, 256)


@each
def test_interpolation(model, make_run, tmp_path):
    """Eight to a row, and inside a row each picture is nearer to its neighbour than its ends are."""
    run(make_run(model, (1, 8, 8)), "--interpolate", "--out", tmp_path / "x.npz")
    rows = array(tmp_path / "x.npz").astype(float).reshape(8, 8, -1)
    steps = np.linalg.norm(np.diff(rows, axis=1), axis=2).max()
    assert steps < np.linalg.norm(rows[:, 0] - rows[:, -1], axis=1).mean()


@pytest.mark.parametrize("prior", ["normal", "uniform", "mixture"])
def test_between(prior):
    """Both ends exact; for a Gaussian of constant length on the way between two of one length."""
    a, b = torch.randn(2, 5, 30, dtype=torch.float64)
    b *= a.norm(dim=1, keepdim=True) / b.norm(dim=1, keepdim=True)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    z = sample.between(a, b, t, prior)
    torch.testing.assert_close(z[:, 0], a)
    torch.testing.assert_close(z[:, -1], b)
    if prior == "normal":
        torch.testing.assert_close(z.norm(dim=2), a.norm(dim=1, keepdim=True).expand(5, 5))
        steps = z.diff(dim=1).norm(dim=2)
        torch.testing.assert_close(steps, steps[:, :1].expand(5, 4))
    else:
        torch.testing.assert_close(z[:, 2], (a + b) / 2)


def test_between_the_same():
    a = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(
        sample.between(a, a, torch.tensor([0.0, 0.5, 1.0]), "normal"), a[:, None].expand(3, 3, 4)
    )


def test_between_a_quarter_of_a_circle():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    z = sample.between(a, b, torch.tensor([0.5]), "normal")
    torch.testing.assert_close(z, math.sqrt(0.5) * torch.tensor([[[1.0, 2.0]]]))


def test_a_component(mixture):
    for k in (0, 1):
        run(mixture, "--component", k, "--n", 10, "--out", mixture / f"{k}.npz")
        assert (array(mixture / f"{k}.npz") == k).all()
    run(mixture, "--component", 1)
    assert (mixture / "samples-1.png").exists()
    run(mixture, "--n", 100, "--out", mixture / "all.npz")
    assert set(array(mixture / "all.npz").flat) == {0, 1}


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


@pytest.mark.parametrize("name", ["os", "common", "tools.runs", "../wgan", "", "conftest", 3, ["wgan"]])
def test_only_model_files_are_imported(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    saved = {"model": name, "step": 0, "config": {}, "networks": {}, "fixed_z": torch.zeros(1)}
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert "is of a model called" in mistake(capsys, tmp_path)


def test_a_pickle_that_would_run_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Evil()}, tmp_path / "checkpoint.pt")
    mistake(capsys, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("model", [SOLO], indirect=True)
def test_networks_of_another_version(model, make_run, capsys):
    path = make_run(model, (1, 8, 8))
    saved = torch.load(path / "checkpoint.pt", weights_only=True)
    wider, less = saved["config"] | {"width": 5}, dict(saved["config"])
    del less["data_dir"]
    for change in ({"networks": {}}, {"config": wider}, {"config": less}, {"config": {}}, {"config": 3}):
        torch.save(saved | change, path / "checkpoint.pt")
        assert "does not fit dcgan.py" in mistake(capsys, path)


@pytest.mark.parametrize("model", [SOLO], indirect=True)
def test_what_this_run_cannot_do(model, make_run, capsys, tmp_path):
    path, points = make_run(model, (1, 8, 8)), make_run(model, (2,), name="points")
    before = sorted(tmp_path.rglob("*"))
    assert "no encoder" in mistake(capsys, path, "--reconstruct")
    assert "no components" in mistake(capsys, path, "--component", 1)
    assert "of points" in mistake(capsys, points, "--out", tmp_path / "folder")
    assert "is not empty" in mistake(capsys, path, "--out", path)
    assert ".png, an array" in mistake(capsys, path, "--out", tmp_path / "grid.jpg")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("model", [SOLO], indirect=True)
def test_a_full_memory(model, make_run, capsys, monkeypatch):
    def full(nets, z):
        raise torch.OutOfMemoryError("CUDA out of memory")

    path = make_run(model, (1, 8, 8))
    monkeypatch.setattr(model, "generate", full)
    assert "--batch-size" in mistake(capsys, path)


def test_a_component_that_is_not_there(mixture, capsys):
    assert "has 0 … 1" in mistake(capsys, mixture, "--component", 2)


@pytest.mark.parametrize("model", [SOLO_ENCODER], indirect=True)
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
        ["--component", "1", "--reconstruct"],
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
