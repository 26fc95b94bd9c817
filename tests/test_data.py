"""common.py: every data set and its failures, batches, and picture grids."""

import contextlib
import gzip
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision

import common

REAL_DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
PREFIXES = {"train": "train", "test": "t10k"}


def load(name, data_dir, split="train", image_size=32, device="cpu"):
    return common.load_data(str(name), data_dir, split, image_size, device)


def one_line(error):
    """The message of a failure, which the scripts print as it is."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


# as_float


def test_as_float_is_exact_at_both_ends_and_linear():
    x = torch.arange(256, dtype=torch.uint8)
    f = common.as_float(x)
    assert f.dtype == torch.float32
    assert f[0] == -1 and f[255] == 1
    torch.testing.assert_close(f, torch.linspace(-1, 1, 256, dtype=torch.float64).float(), rtol=0, atol=1e-6)


def test_as_float_leaves_points_alone():
    points = torch.randn(5, 2)
    assert common.as_float(points) is points


# sample_batch


def test_sample_batch_is_uniform_and_covers_both_ends():
    x = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    drawn = (common.sample_batch(x, 100_000) + 1) * 127.5
    counts = drawn.round().long().flatten().bincount(minlength=10)
    assert len(counts) == 10
    # Six standard deviations of a binomial count.
    assert (counts - 10_000).abs().max() < 6 * math.sqrt(100_000 * 0.1 * 0.9)


def test_sample_batch_draws_with_replacement_from_a_small_data_set():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    batch = common.sample_batch(x, 64)
    assert batch.shape == (64, 2)
    assert {tuple(row) for row in batch.tolist()} == {(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)}
    # Draws are independent of each other: a repetition right after a draw has probability 1/3.
    torch.manual_seed(0)
    batch = common.sample_batch(x, 30_000)[:, 0]
    assert abs((batch[1:] == batch[:-1]).float().mean().item() - 1 / 3) < 0.02


def test_sample_batch_keeps_the_shape_of_a_batch_of_one():
    assert common.sample_batch(torch.zeros(7, 3, 4, 4, dtype=torch.uint8), 1).shape == (1, 3, 4, 4)
    assert common.sample_batch(torch.zeros(1, 2), 1).shape == (1, 2)


def test_sample_batch_scales_pictures_and_not_points():
    pictures = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    batch = common.sample_batch(pictures, 50)
    assert batch.dtype == torch.float32 and batch.shape == (50, 3, 4, 4)
    assert set(batch.unique().tolist()) == {-1.0, 1.0}
    assert set(common.sample_batch(torch.full((2, 2), 7.0), 9).unique().tolist()) == {7.0}


def test_sample_batch_follows_the_seed():
    x = torch.randn(1000, 2)
    torch.manual_seed(3)
    first, second = common.sample_batch(x, 32), common.sample_batch(x, 32)
    torch.manual_seed(3)
    assert torch.equal(common.sample_batch(x, 32), first)
    assert torch.equal(common.sample_batch(x, 32), second)
    assert not torch.equal(first, second)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sample_batch_can_be_captured_and_its_replays_differ():
    x = torch.randint(256, (1000, 1, 8, 8), dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        common.sample_batch(x, 16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = common.sample_batch(x, 16)
    graph.replay()
    first = batch.clone()
    graph.replay()
    assert batch.shape == (16, 1, 8, 8) and not torch.equal(first, batch)
    rows = {tuple(row) for row in common.as_float(x).flatten(1).tolist()}
    assert all(tuple(row) in rows for row in batch.flatten(1).tolist())


# save_grid


def saved(x, columns, tmp_path):
    path = tmp_path / "a" / "b" / "grid.png"
    common.save_grid(x, path, columns)
    picture = PIL.Image.open(path)
    assert picture.format == "PNG"
    return picture.mode, np.asarray(picture)


def test_grid_maps_every_byte_back_to_itself(tmp_path):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    mode, pixels = saved(common.as_float(x), 1, tmp_path)
    assert mode == "L"
    assert np.array_equal(pixels, x[0, 0].numpy())


def test_grid_rounds_to_the_nearest_and_clamps(tmp_path):
    values = torch.tensor([-1.0, 1.0, -3.0, 3.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 254.4 / 127.5 - 1, 0.001])
    _, pixels = saved(values.view(1, 1, 1, 8), 1, tmp_path)
    assert pixels.tolist() == [[0, 255, 0, 255, 0, 1, 254, 128]]


@pytest.mark.parametrize(("value", "byte"), [(-1.0, 0), (-0.5, 64), (0.5, 191), (1.0, 255)])
def test_a_constant_picture_stays_constant(value, byte, tmp_path):
    _, pixels = saved(torch.full((4, 1, 8, 8), value), 2, tmp_path)
    assert pixels.shape == (16, 16) and (pixels == byte).all()


def test_grid_goes_row_by_row_and_ends_in_black(tmp_path):
    x = (
        common.as_float(torch.tensor([10, 20, 30, 40, 50], dtype=torch.uint8))
        .view(5, 1, 1, 1)
        .expand(5, 1, 2, 3)
    )
    _, pixels = saved(x, 3, tmp_path)
    assert pixels.shape == (4, 9)
    assert pixels[0].tolist() == pixels[1].tolist() == [10] * 3 + [20] * 3 + [30] * 3
    assert pixels[2].tolist() == pixels[3].tolist() == [40] * 3 + [50] * 3 + [0] * 3


def test_grid_keeps_pictures_upright_and_colours_in_order(tmp_path):
    x = torch.randint(256, (3, 3, 4, 5), dtype=torch.uint8)
    mode, pixels = saved(common.as_float(x), 2, tmp_path)
    assert mode == "RGB" and pixels.shape == (8, 10, 3)
    assert np.array_equal(pixels[:4, :5], x[0].permute(1, 2, 0))
    assert np.array_equal(pixels[:4, 5:], x[1].permute(1, 2, 0))
    assert np.array_equal(pixels[4:, :5], x[2].permute(1, 2, 0))
    assert not pixels[4:, 5:].any()


def test_grid_puts_pairs_side_by_side(tmp_path):
    first, second = torch.tensor([10, 20, 30, 40]), torch.tensor([110, 120, 130, 140])
    pairs = common.as_float(torch.stack([first, second], dim=1).byte()).view(4, 2, 1, 1, 1)
    _, pixels = saved(pairs, 4, tmp_path)
    assert pixels.tolist() == [[10, 110, 20, 120], [30, 130, 40, 140]]


def test_grid_takes_gradients_half_precision_and_other_layouts(tmp_path):
    x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    plain = saved(common.as_float(x), 2, tmp_path)[1]
    with_gradient = (common.as_float(x) * torch.ones(1, requires_grad=True)).contiguous(
        memory_format=torch.channels_last
    )
    assert np.array_equal(saved(with_gradient, 2, tmp_path)[1], plain)
    assert np.array_equal(saved(common.as_float(x).double(), 2, tmp_path)[1], plain)
    assert (saved(torch.full((1, 1, 2, 2), -1.0).bfloat16(), 1, tmp_path)[1] == 0).all()
    assert x.dtype == torch.uint8 and with_gradient.requires_grad


def test_points_become_a_density_with_the_y_axis_up(tmp_path):
    # A point in the middle of the cell in column 32 and, counted from the top, row 64.
    here = torch.tensor([[-2 + 32.5 / 64, 2 - 64.5 / 64]])
    mode, pixels = saved(here.repeat(10, 1), 8, tmp_path)
    assert mode == "L" and pixels.shape == (256, 256)
    assert pixels[64, 32] == 255 and pixels.astype(int).sum() == 255


def test_density_is_logarithmic_and_does_not_depend_on_the_columns(tmp_path):
    points = torch.tensor([[-1.0, 0.0]] * 3 + [[1.0, 0.0]] * 15 + [[5.0, 0.0], [0.0, -2.5], [2.0, 0.0]])
    _, pixels = saved(points, 1, tmp_path)
    assert sorted(pixels[pixels > 0].tolist()) == [round(255 * math.log(4) / math.log(16)), 255]
    assert np.array_equal(saved(points, 5, tmp_path)[1], pixels)


def test_points_outside_or_not_finite_leave_the_picture_black(tmp_path):
    points = torch.tensor([[3.0, 0.0], [math.nan, 0.0], [0.0, math.inf]])
    assert not saved(points, 1, tmp_path)[1].any()


def test_pairs_of_points_become_two_densities(tmp_path):
    left, right = torch.randn(500, 2) / 2, torch.randn(500, 2, requires_grad=True) / 3
    _, both = saved(torch.stack([left, right], dim=1), 1, tmp_path)
    assert both.shape == (256, 512)
    assert np.array_equal(both[:, :256], saved(left, 1, tmp_path)[1])
    assert np.array_equal(both[:, 256:], saved(right, 1, tmp_path)[1])


# load_data in general


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    for name in ("minst", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError) as error:
            load(name, tmp_path)
        message = one_line(error)
        assert name in message and "folder" in message
        for known in common.LOADERS:
            assert known in message


def test_the_known_names_are_those_of_the_documentation():
    assert set(common.LOADERS) == set(
        [
            "glyphs",
            "mnist",
            "fashion_mnist",
            "cifar10",
            "celeba",
            "color_mnist",
            "stacked_mnist",
            "ring",
            "grid",
            "swissroll",
        ]
    )


@pytest.mark.parametrize(
    "name", ["glyphs", "ring", "grid", "swissroll", "color_mnist", "stacked_mnist", "folder"]
)
def test_loading_leaves_the_global_generators_alone(name, tmp_path):
    write_mnist(tmp_path, 12)
    write_picture(tmp_path / "folder" / "a.png", (1, 2, 3))
    write_picture(tmp_path / "folder" / "b.png", (4, 5, 6))
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    load(tmp_path / "folder" if name == "folder" else name, tmp_path)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))  # noqa: NPY002
    assert random.getstate() == states[2]


@pytest.mark.parametrize("name", ["glyphs", "ring", "grid", "swissroll"])
def test_made_data_are_the_same_whatever_the_seed_and_differ_between_splits(name, tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    x, y = load(name, tmp_path, "test")
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    again, y_again = load(name, tmp_path, "test")
    assert torch.equal(x, again)
    assert y is None or torch.equal(y, y_again)
    train, _ = load(name, tmp_path, "train")
    known = {item.numpy().tobytes() for item in train}
    assert not any(item.numpy().tobytes() in known for item in x)


def test_the_device_may_be_a_string_or_a_device(tmp_path):
    for device in ("cpu", torch.device("cpu")):
        x, y = load("ring", tmp_path, "test", device=device)
        assert x.device.type == "cpu" and y.device.type == "cpu"


@pytest.mark.parametrize(("free", "moved"), [(160_000, True), (159_998, False)])
def test_data_go_to_the_gpu_if_they_fit_into_half_of_its_free_memory(
    free, moved, tmp_path, monkeypatch, capsys
):
    # No GPU is needed: 10 000 points of 8 bytes, and a .to() that only takes a note.
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: asked.append(device) or self)
    x, y = load("ring", tmp_path, "test", device="cuda")
    assert x.nbytes == 80_000
    stderr = capsys.readouterr().err
    if moved:
        assert asked == [torch.device("cuda")] * 2 and stderr == ""
    else:
        assert asked == [] and stderr.count("\n") == 1 and "host" in stderr


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_data_and_labels_lie_on_the_gpu(tmp_path):
    x, y = load("ring", tmp_path, "test", device="cuda")
    assert x.is_cuda and y.is_cuda


def test_importing_takes_no_more_than_torch_and_numpy():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import common; new = {*sys.modules} - before; "
        "sys.exit(', '.join({'torchvision', 'PIL', 'tqdm', 'torch._dynamo'} & new) or 0)"
    )
    root = Path(common.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Points


def test_ring(tmp_path):
    x, y = load("ring", tmp_path)
    assert x.shape == (100_000, 2) and x.dtype == torch.float32
    assert y.shape == (100_000,) and y.dtype == torch.int64
    assert load("ring", tmp_path, "test")[0].shape == (10_000, 2)
    assert y.bincount().tolist() == [12_500] * 8
    for k in range(8):
        mode = x[y == k].double()
        angle = 2 * math.pi * k / 8
        centre = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64) * 2 / 1.414
        torch.testing.assert_close(mode.mean(0), centre, rtol=0, atol=1e-3)
        std = torch.full((2,), 0.02 / 1.414, dtype=torch.float64)
        torch.testing.assert_close(mode.std(0), std, rtol=0.03, atol=0)
    assert not torch.equal(y, y.sort().values)


def test_grid(tmp_path):
    x, y = load("grid", tmp_path)
    assert x.shape == (100_000, 2) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert load("grid", tmp_path, "test")[0].shape == (10_000, 2)
    assert y.bincount().tolist() == [4_000] * 25
    for k in range(25):
        mode = x[y == k].double()
        centre = torch.tensor([2 * (k // 5) - 4, 2 * (k % 5) - 4], dtype=torch.float64) / 2.828
        torch.testing.assert_close(mode.mean(0), centre, rtol=0, atol=2e-3)
        std = torch.full((2,), 0.05 / 2.828, dtype=torch.float64)
        torch.testing.assert_close(mode.std(0), std, rtol=0.05, atol=0)


def test_swissroll(tmp_path):
    x, y = load("swissroll", tmp_path)
    assert x.shape == (100_000, 2) and x.dtype == torch.float32 and y is None
    assert load("swissroll", tmp_path, "test")[0].shape == (10_000, 2)
    # How far from the spiral: its turns lie 2π apart, so the radius tells the turn and the angle the rest.
    points = x.double() * 7.5
    radius, angle = points.norm(dim=1), torch.atan2(points[:, 1], points[:, 0])
    t = angle + 2 * math.pi * ((radius - angle) / (2 * math.pi)).round()
    inner = (t > 1.5 * math.pi + 1) & (t < 4.5 * math.pi - 1)
    assert abs((radius - t)[inner].mean().item()) < 0.02
    assert abs((radius - t)[inner].std().item() - 0.25) < 0.01
    # t is uniform on [1.5π, 4.5π].
    assert abs(t.mean().item() - 3 * math.pi) < 0.05
    assert abs(t.std().item() - 3 * math.pi / math.sqrt(12)) < 0.05


@pytest.mark.parametrize("name", ["ring", "grid", "swissroll"])
def test_splits_of_points_are_drawn_independently(name, tmp_path):
    train, test = (load(name, tmp_path, split)[0][:10_000] for split in ("train", "test"))
    for axis in (0, 1):
        assert torch.corrcoef(torch.stack([train[:, axis], test[:, axis]]))[0, 1].abs() < 0.05


@pytest.mark.parametrize("name", ["ring", "grid", "swissroll"])
def test_points_fit_their_picture_and_ignore_the_image_size(name, tmp_path):
    x, _ = load(name, tmp_path, "test")
    assert x.abs().max() < 2
    assert torch.equal(load(name, tmp_path, "test", image_size=64)[0], x)


# Glyphs


@pytest.fixture(scope="module")
def glyphs():
    return {split: load("glyphs", "unused", split) for split in ("train", "test")}


def test_glyphs_have_the_promised_shape_and_are_balanced(glyphs):
    for split, n in (("train", 10_000), ("test", 2_000)):
        x, y = glyphs[split]
        assert x.shape == (n, 1, 32, 32) and x.dtype == torch.uint8
        assert y.shape == (n,) and y.dtype == torch.int64
        assert y.bincount().tolist() == [n // 10] * 10
        assert len(set(y[:20].tolist())) > 3


def test_glyphs_are_white_on_black_and_fill_the_frame_but_for_a_margin(glyphs):
    x = glyphs["train"][0][:, 0]
    assert (x.flatten(1).amax(1) > 200).all()
    assert x[:, [0, -1]].max() < 16 and x[:, :, [0, -1]].max() < 16
    ink = x > 128
    height = ink.any(2).sum(1)
    assert height.min() >= 14 and height.max() <= 30 and 18 < height.float().mean() < 26
    assert 0.05 < ink.float().mean() < 0.25


def test_glyphs_vary_within_a_digit(glyphs):
    x, y = glyphs["train"]
    assert len({picture.numpy().tobytes() for picture in x}) == len(x)
    ticks = torch.arange(32.0)

    def measured(digit):
        """Ink, height, middle across and down, and lean (how far a pixel lies aside for being one lower)."""
        ink = x[y == digit, 0].float() / 255
        mass, height = ink.sum((1, 2)), (ink > 0.5).any(2).sum(1)
        across, down = (ink.sum(1) * ticks).sum(1) / mass, (ink.sum(2) * ticks).sum(1) / mass
        dx, dy = (ticks - across[:, None])[:, None, :], (ticks - down[:, None])[:, :, None]
        return mass, height.float(), across, down, (ink * dx * dy).sum((1, 2)) / (ink * dy**2).sum((1, 2))

    mass, height, across, down, _ = measured(0)
    assert height.std() > 1.5  # size
    assert (mass / height**2).std() / (mass / height**2).mean() > 0.12  # thickness; without it 0.08
    for middle in (across, down):  # position
        assert middle.std() > 0.5 and abs(middle.mean().item() - 15.5) < 0.5
    assert measured(1)[-1].std() > 0.14  # rotation and shear; one of them alone makes 0.11


def test_glyphs_are_legible(glyphs):
    # The nearest class mean, the simplest of classifiers, tells most of them; six and nine are not confused.
    (x, y), (x_test, y_test) = glyphs["train"], glyphs["test"]
    means = torch.stack([x[y == k].float().flatten(1).mean(0) for k in range(10)])
    guess = torch.cdist(x_test.float().flatten(1), means).argmin(1)
    assert (guess == y_test).float().mean() > 0.75
    assert (guess[y_test == 6] == 9).float().mean() < 0.05
    assert (guess[y_test == 9] == 6).float().mean() < 0.05


def test_glyphs_come_in_other_sizes(glyphs, tmp_path):
    x, y = load("glyphs", tmp_path, "test", image_size=64)
    assert x.shape == (2_000, 1, 64, 64)
    assert torch.equal(y, glyphs["test"][1])
    # The same pictures, drawn finer.
    small = torch.nn.functional.avg_pool2d(x.float(), 2)
    assert (small - glyphs["test"][0].float()).abs().mean() < 6


# MNIST and its likes


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(data_dir, n, dataset="MNIST", splits=("train", "test"), zipped=False):
    """A small data set in MNIST's files; returns its arrays."""
    rng = np.random.default_rng(0)
    raw = Path(data_dir) / dataset / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for i, split in enumerate(splits):
        images = rng.integers(1, 256, size=(n + i, 28, 28), dtype=np.uint8)
        labels = (np.arange(n + i) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = raw / f"{PREFIXES[split]}-{kind}-ubyte"
            if zipped:
                Path(f"{path}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))
        arrays[split] = torch.from_numpy(images), torch.from_numpy(labels).long()
    return arrays


@pytest.fixture
def no_network(monkeypatch):
    """Every data set of torchvision fails as it does without a network, and its chatter goes to stdout."""

    def fail(*args, **kwargs):
        print("Downloading http://example.org/file.gz")
        raise URLError("[Errno -3] Temporary failure in name resolution")

    for dataset in ("MNIST", "FashionMNIST", "CIFAR10", "CelebA"):
        monkeypatch.setattr(torchvision.datasets, dataset, fail)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("name", "dataset"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files_are_read_without_torchvision_and_padded(name, dataset, zipped, tmp_path, no_network):
    arrays = write_mnist(tmp_path, 12, dataset, zipped=zipped)
    for split in ("train", "test"):
        x, y = load(name, tmp_path, split)
        images, labels = arrays[split]
        assert x.dtype == torch.uint8 and x.shape == (len(images), 1, 32, 32)
        assert torch.equal(x[:, 0, 2:30, 2:30], images)
        assert int(x.long().sum()) == int(images.long().sum())
        assert y.dtype == torch.int64 and torch.equal(y, labels)


def test_one_split_does_not_need_the_other(tmp_path, no_network):
    write_mnist(tmp_path, 5, splits=["test"])
    assert len(load("mnist", tmp_path, "test")[0]) == 5


@pytest.mark.parametrize("image_size", [16, 28, 64])
def test_mnist_in_other_sizes(image_size, tmp_path):
    write_mnist(tmp_path, 3)
    raw = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images = np.stack([np.full((28, 28), value, np.uint8) for value in (0, 200, 255)])
    raw.write_bytes(idx(images))
    x, _ = load("mnist", tmp_path, image_size=image_size)
    assert x.shape == (3, 1, image_size, image_size) and x.dtype == torch.uint8
    middle = slice(image_size // 4, -image_size // 4)
    for picture, value in zip(x[:, 0], (0, 200, 255), strict=True):
        assert (picture[middle, middle] == value).all()
    assert x[2, 0, 0, 0] < 16


def test_resizing_averages_and_keeps_every_chunk(tmp_path):
    n = 1300
    write_mnist(tmp_path, n)
    images = np.repeat(np.arange(n) % 256, 28 * 28).reshape(n, 28, 28).astype(np.uint8)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(idx(images))
    x, _ = load("mnist", tmp_path, image_size=8)
    assert x.shape == (n, 1, 8, 8)
    assert torch.equal(x[:, 0, 4, 4], torch.arange(n).remainder(256).byte())
    # Stripes two pixels wide come out grey; without antialiasing only the white ones would be looked at.
    images[:] = 255 * (np.arange(2, 30) % 4 % 3 > 0)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(idx(images))
    grey = load("mnist", tmp_path, image_size=8)[0][0, 0, 2:6, 2:6].float()
    assert (grey - 127.5).abs().max() < 8


def damage(path, how):
    data = path.read_bytes()
    start = 16 if "images" in path.name else 8
    path.write_bytes(
        {
            "truncated": data[:-1],
            "half": data[: len(data) // 2],
            "too long": data + b"\0",
            "empty": b"",
            "header only": data[:start],
            "short header": data[:6],
            "web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 40,
            "the other file": idx(np.zeros((4, 4), np.uint8)),
            "another type": data[:2] + b"\x0d" + data[3:],
            "no items": data[:4] + b"\0\0\0\0" + data[8:start],
            "another size": idx(np.zeros((4, 14, 56), np.uint8))
            if start == 16
            else idx(np.zeros((4, 2), np.uint8)),
        }[how]
    )


@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize(
    "how",
    ["truncated", "half", "too long", "empty", "header only", "short header", "web page", "the other file"]
    + ["another type", "no items", "another size"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_mnist_file_is_named(kind, how, split, tmp_path, no_network):
    write_mnist(tmp_path, 12)
    path = tmp_path / "MNIST" / "raw" / f"{PREFIXES[split]}-{kind}-ubyte"
    damage(path, how)
    with pytest.raises(ValueError) as error:
        load("mnist", tmp_path, split)
    assert str(path) in one_line(error) and "delete it" in str(error.value)


@pytest.mark.parametrize("how", ["truncated", "half", "empty", "web page", "byte 10", "byte 5000"])
def test_a_damaged_gzipped_file_is_named(how, tmp_path, no_network):
    write_mnist(tmp_path, 12, zipped=True)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    if how.startswith("byte"):  # the head of the compressed stream, or its contents
        data = bytearray(path.read_bytes())
        data[int(how.split()[1])] ^= 255
        path.write_bytes(data)
    else:
        damage(path, how)
    with pytest.raises(ValueError) as error:
        load("mnist", tmp_path)
    assert str(path) in one_line(error) and "delete it" in str(error.value)


def test_labels_and_pictures_have_to_agree(tmp_path):
    write_mnist(tmp_path, 12)
    labels = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(11, np.uint8)))
    with pytest.raises(ValueError) as error:
        load("mnist", tmp_path)
    message = one_line(error)
    assert labels.name in message and "12" in message and "11" in message and "delete" in message


@pytest.mark.parametrize(
    "name", ["mnist", "fashion_mnist", "color_mnist", "stacked_mnist", "cifar10", "celeba"]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_without_network_the_message_says_what_to_put_where(name, split, tmp_path, no_network, capsys):
    with pytest.raises(OSError) as error:
        load(name, tmp_path, split)
    message = one_line(error)
    folder = {
        "fashion_mnist": tmp_path / "FashionMNIST" / "raw",
        "cifar10": tmp_path,
        "celeba": tmp_path / "celeba",
    }.get(name, tmp_path / "MNIST" / "raw")
    file = {"cifar10": "cifar-10-python.tar.gz", "celeba": "list_eval_partition.txt"}.get(
        name, f"{PREFIXES[split]}-labels-idx1-ubyte"
    )
    assert file in message and str(folder) in message
    assert "name resolution" in message and "--dataset glyphs" in message
    output = capsys.readouterr()
    assert output.out == "" and "Downloading" in output.err


def test_the_last_line_of_a_long_download_error_is_its_reason(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Error downloading a.gz:\nTried http://one, got:\nHTTP Error 404: Not Found\n")

    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    with pytest.raises(OSError) as error:
        load("mnist", tmp_path)
    assert "HTTP Error 404" in one_line(error)


def test_a_missing_torchvision_is_a_download_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(OSError) as error:
        load("mnist", tmp_path)
    assert "torchvision" in one_line(error)


def test_missing_files_are_downloaded_into_the_data_folder(tmp_path, monkeypatch):
    calls = []

    def fetch(root, download):
        calls.append((Path(root), download))
        write_mnist(root, 7)

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    assert len(load("mnist", tmp_path)[0]) == 7
    assert len(load("mnist", tmp_path, "test")[0]) == 8
    assert calls == [(tmp_path, True)]


def test_ctrl_c_in_a_download_is_not_an_error_message(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets, "MNIST", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("mnist", tmp_path)


def test_color_mnist_tints_each_digit_with_one_bright_colour(tmp_path):
    n = 600
    arrays = write_mnist(tmp_path, n)
    x, y = load("color_mnist", tmp_path)
    images, labels = arrays["train"]
    assert x.shape == (n, 3, 32, 32) and x.dtype == torch.uint8 and torch.equal(y, labels)
    inner = x[:, :, 2:30, 2:30]
    # Full value: the strongest channel is the digit itself. Full saturation: the weakest is black.
    assert torch.equal(inner.amax(1), images)
    assert (inner.amin(1) == 0).all()
    # One colour for a whole digit: all its pixels agree on it.
    brightest = images.flatten(1).argmax(1)
    colour = inner.flatten(2)[torch.arange(n), :, brightest].float() / images.flatten(1).amax(1)[:, None]
    expected = images[:, None].float() * colour[:, :, None, None]
    assert (inner.float() - expected).abs().max() <= 1.01
    # Hues spread over the circle: each channel is the strongest in a third, and colours in between occur.
    assert (colour.argmax(1).bincount(minlength=3) > n / 3 - 80).all()
    assert len(colour.mul(20).round().unique(dim=0)) > 50


def test_color_mnist_keeps_its_colours(tmp_path):
    write_mnist(tmp_path, 20)
    first, again = load("color_mnist", tmp_path)[0], load("color_mnist", tmp_path)[0]
    assert torch.equal(first, again)
    large = load("color_mnist", tmp_path, image_size=64)[0]
    assert large.shape == (20, 3, 64, 64)
    strongest = first.float().mean((2, 3)).argmax(1)
    assert torch.equal(large.float().mean((2, 3)).argmax(1), strongest)
    test = load("color_mnist", tmp_path, "test")[0]
    assert not torch.equal(test[:20].float().mean((2, 3)).argmax(1), strongest)


def test_stacked_mnist_labels_agree_with_its_channels(tmp_path):
    n = 300
    arrays = write_mnist(tmp_path, n)
    images, labels = arrays["train"]
    x, y = load("stacked_mnist", tmp_path)
    assert x.shape == (n, 3, 32, 32) and x.dtype == torch.uint8
    assert y.shape == (n,) and y.dtype == torch.int64
    which = {image.numpy().tobytes(): i for i, image in enumerate(images)}
    index = torch.tensor(
        [[which[channel[2:30, 2:30].contiguous().numpy().tobytes()] for channel in item] for item in x]
    )
    assert torch.equal(y, labels[index] @ torch.tensor([100, 10, 1]))
    # Three independent draws: hardly ever the same picture twice, nearly every picture somewhere.
    assert (index[:, 0] == index[:, 1]).sum() < 10 and (index[:, 1] == index[:, 2]).sum() < 10
    assert len(index.unique()) > 0.8 * n
    assert torch.equal(load("stacked_mnist", tmp_path)[0], x)


@pytest.mark.skipif(not (REAL_DATA / "MNIST" / "raw").is_dir(), reason=f"no MNIST in {REAL_DATA}")
def test_the_real_mnist():
    for split, n in (("train", 60_000), ("test", 10_000)):
        x, y = load("mnist", REAL_DATA, split)
        assert x.shape == (n, 1, 32, 32)
        assert y.bincount(minlength=10).min() > 800 * n / 10_000
        # The known mean of the 28×28 training pictures is 0.1307.
        assert abs(x.float().mean().item() / 255 * (32 / 28) ** 2 - 0.1307) < 0.003
    assert y[:5].tolist() == [7, 2, 1, 0, 4]


# CIFAR-10 and CelebA, with torchvision replaced


@pytest.mark.parametrize("image_size", [32, 64])
def test_cifar10_channels_come_first(image_size, tmp_path, monkeypatch):
    pictures = np.zeros((6, 32, 32, 3), np.uint8)
    pictures[..., 0], pictures[..., 2] = 10, 30
    pictures[:, 20:, :, 1] = 200

    def fetch(root, train, download):
        assert Path(root) == tmp_path and download
        return SimpleNamespace(
            data=pictures[: 6 if train else 2], targets=[3, 1, 4, 1, 5, 9][: 6 if train else 2]
        )

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fetch)
    x, y = load("cifar10", tmp_path, image_size=image_size)
    assert x.shape == (6, 3, image_size, image_size) and x.dtype == torch.uint8 and x.is_contiguous()
    assert (x[:, 0] == 10).all() and (x[:, 2] == 30).all()
    assert (x[:, 1, : image_size // 2] == 0).all() and (x[:, 1, -image_size // 4 :] == 200).all()
    assert y.dtype == torch.int64 and y.tolist() == [3, 1, 4, 1, 5, 9]
    assert load("cifar10", tmp_path, "test")[1].tolist() == [3, 1]


def write_celeba(data_dir):
    faces = Path(data_dir) / "celeba" / "img_align_celeba"
    for i in range(6):
        picture = np.zeros((218, 178, 3), np.uint8)
        picture[20:198] = (10 * i, 100, 50)
        faces.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture).save(faces / f"{i:06}.jpg", quality=100, subsampling=0)
    partition = "".join(f"{i:06}.jpg {part}\n" for i, part in enumerate([0, 0, 1, 0, 2, 2]))
    (faces.parent / "list_eval_partition.txt").write_text(partition)
    return faces


@pytest.mark.parametrize("image_size", [32, 64])
def test_celeba_takes_the_middle_square_of_its_partition(image_size, tmp_path, no_network):
    write_celeba(tmp_path)
    for split, expected in (("train", [0, 10, 30]), ("test", [40, 50])):
        x, y = load("celeba", tmp_path, split, image_size)
        assert x.shape == (len(expected), 3, image_size, image_size) and y is None
        # The black bars above and below the square are cut off.
        assert x[:, 1].min() > 90
        assert (x[:, 0].float().mean((1, 2)) - torch.tensor(expected)).abs().max() < 3
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_half_of_celeba_is_not_taken_for_the_whole(tmp_path, no_network):
    faces = write_celeba(tmp_path)
    (faces / "000003.jpg").unlink()
    with pytest.raises(ValueError) as error:
        load("celeba", tmp_path)
    assert str(faces) in one_line(error) and "1 of 3" in str(error.value) and "delete" in str(error.value)
    partition = faces.parent / "list_eval_partition.txt"
    partition.write_bytes(b"<html>\xff Too many users have viewed this file</html>")
    with pytest.raises(ValueError) as error:
        load("celeba", tmp_path)
    assert str(partition) in one_line(error) and "delete" in str(error.value)


# Folders


def write_picture(path, colour, size=(40, 40), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new(mode, size, colour).save(path, **options)


def write_folder(folder, n, classes=("ant", "bee")):
    """n plain pictures, in each class in turn; the red of picture i is 10·i, the green of class k is 50·k."""
    for i in range(n):
        k = i % len(classes)
        write_picture(folder / classes[k] / f"{i:02}.png", (10 * i, 50 * k, 7))


def reds(x):
    return x[:, 0, 0, 0].tolist()


def test_splits_of_a_folder_are_disjoint_and_cover_it(tmp_path):
    write_folder(tmp_path / "pictures", 21)
    x, y = load(tmp_path / "pictures", tmp_path / "data")
    x_test, y_test = load(tmp_path / "pictures", tmp_path / "data", "test")
    assert x.dtype == torch.uint8 and x.shape == (19, 3, 32, 32) and x_test.shape == (2, 3, 32, 32)
    assert sorted(reds(x) + reds(x_test)) == list(range(0, 210, 10))
    assert y.dtype == torch.int64 and y.shape == (19,) and y_test.shape == (2,)
    assert torch.equal(x[:, 1, 0, 0], (50 * y).byte()) and torch.equal(
        x_test[:, 1, 0, 0], (50 * y_test).byte()
    )
    # Shuffled before the tenth is taken, or the test split would be the end of the last class.
    assert y.tolist() != sorted(y.tolist())


def test_the_split_is_seeded_and_does_not_depend_on_the_size(tmp_path):
    write_folder(tmp_path / "pictures", 20)
    first = reds(load(tmp_path / "pictures", tmp_path / "one", "test")[0])
    assert reds(load(tmp_path / "pictures", tmp_path / "two", "test")[0]) == first
    assert reds(load(tmp_path / "pictures", tmp_path / "one", "test", image_size=64)[0]) == first


def test_two_pictures_are_one_each_and_a_single_one_is_both(tmp_path):
    write_folder(tmp_path / "pictures", 2)
    x, y = load(tmp_path / "pictures", tmp_path)
    x_test, y_test = load(tmp_path / "pictures", tmp_path, "test")
    assert len(x) == len(x_test) == len(y) == len(y_test) == 1 and reds(x) != reds(x_test)
    write_picture(tmp_path / "single" / "a.png", (90, 0, 0))
    assert reds(load(tmp_path / "single", tmp_path)[0]) == [90]
    assert reds(load(tmp_path / "single", tmp_path, "test")[0]) == [90]


def test_classes_are_the_top_level_folders_in_sorted_order(tmp_path):
    folder = tmp_path / "pictures"
    for k, name in enumerate(["Zebra", "ant", "bee/left", "bee/right"]):
        write_picture(folder / name / "x.png", (0, 50 * min(k, 2), 7))
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "read.txt").write_text("not a picture")
    splits = [load(folder, tmp_path, split) for split in ("train", "test")]
    x, y = (torch.cat(parts) for parts in zip(*splits, strict=True))
    assert sorted(y.tolist()) == [0, 1, 2, 2]
    assert torch.equal(x[:, 1, 0, 0], (50 * y).byte())


def test_no_labels_without_two_classes_or_with_pictures_outside_them(tmp_path):
    write_folder(tmp_path / "one", 4, classes=["ant"])
    assert load(tmp_path / "one", tmp_path)[1] is None
    write_folder(tmp_path / "flat", 4, classes=["."])
    assert load(tmp_path / "flat", tmp_path)[1] is None
    write_folder(tmp_path / "loose", 4)
    write_picture(tmp_path / "loose" / "a.png", (0, 0, 0))
    assert load(tmp_path / "loose", tmp_path)[1] is None


def test_all_usual_formats_are_found_whatever_their_case(tmp_path):
    suffixes = ["jpg", "JPEG", "png", "BMP", "gif", "webp", "tif", "TIFF", "ppm", "pgm", "Png"]
    for i, suffix in enumerate(suffixes):
        write_picture(tmp_path / "pictures" / "deep" / f"{i}" / f"a.{suffix}", 20 * i, mode="L")
    (tmp_path / "pictures" / "read.md").write_text("not a picture")
    write_picture(tmp_path / "pictures" / ".hidden.png", 255, mode="L")
    x = torch.cat([load(tmp_path / "pictures", tmp_path, split)[0] for split in ("train", "test")])
    assert len(x) == len(suffixes)
    assert all(abs(a - 20 * i) <= 2 for i, a in enumerate(sorted(reds(x))))


def test_a_folder_of_grey_pictures_has_one_channel(tmp_path):
    folder = tmp_path / "pictures"
    write_picture(folder / "a.png", 10, mode="L")
    write_picture(folder / "b.png", (20, 20, 20))
    write_picture(folder / "c.jpg", (30, 30, 30))
    x, _ = load(folder, tmp_path)
    assert x.shape == (2, 1, 32, 32)
    assert sorted(reds(x) + reds(load(folder, tmp_path, "test")[0])) == [10, 20, 30]
    write_picture(folder / "d.png", (20, 20, 21))
    x, _ = load(folder, tmp_path)
    assert x.shape == (3, 3, 32, 32)


def test_pictures_are_cropped_to_their_middle_square_and_resized(tmp_path):
    wide, tall = np.zeros((30, 90, 3), np.uint8), np.zeros((90, 30, 3), np.uint8)
    wide[:, 30:60] = tall[30:60] = (200, 100, 0)
    for name, pixels in (("wide", wide), ("tall", tall)):
        folder = tmp_path / name
        folder.mkdir()
        PIL.Image.fromarray(pixels).save(folder / "a.png")
        for image_size in (16, 30, 64):
            x, _ = load(folder, tmp_path, image_size=image_size)
            assert x.shape == (1, 3, image_size, image_size)
            # The filter looks a few pixels beyond the edge of the crop.
            inner = slice(image_size // 4, -image_size // 4)
            assert (x[0, :, inner, inner].flatten(1) == torch.tensor([[200], [100], [0]])).all()
            assert x[0, 0].min() > 100


def test_a_picture_of_the_right_size_comes_through_untouched(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    PIL.Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
    assert np.array_equal(load(tmp_path / "pictures", tmp_path)[0][0].permute(1, 2, 0), pixels)


def test_shrinking_averages(tmp_path):
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    (tmp_path / "pictures").mkdir()
    PIL.Image.fromarray(stripes).save(tmp_path / "pictures" / "a.png")
    x = load(tmp_path / "pictures", tmp_path)[0]
    assert (x.float() - 127.5).abs().max() < 6


def test_a_large_jpeg_decoded_at_a_fraction_looks_the_same(tmp_path):
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 77), axis=-1).astype(np.uint8)
    for name in ("a.jpg", "a.png"):
        path = tmp_path / name[-3:] / name
        path.parent.mkdir()
        PIL.Image.fromarray(pixels).save(path)
    jpeg, png = (load(tmp_path / kind, tmp_path)[0].float() for kind in ("jpg", "png"))
    assert (jpeg - png).abs().max() < 6


def test_the_camera_s_orientation_is_applied(tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° clockwise to see it upright
    (tmp_path / "pictures").mkdir()
    PIL.Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png", exif=exif)
    x = load(tmp_path / "pictures", tmp_path)[0][0, 0]
    assert (x[:, 18:] == 255).all() and (x[:, :14] == 0).all()


def test_sixteen_bits_of_grey_keep_their_scale(tmp_path):
    (tmp_path / "pictures").mkdir()
    PIL.Image.fromarray(np.full((32, 32), 257 * 100, np.uint16)).save(tmp_path / "pictures" / "a.png")
    x = load(tmp_path / "pictures", tmp_path)[0]
    assert x.shape == (1, 1, 32, 32) and (x == 100).all()


def test_what_is_transparent_becomes_white(tmp_path):
    write_picture(tmp_path / "pictures" / "a.png", (200, 0, 0, 0), mode="RGBA")
    assert (load(tmp_path / "pictures", tmp_path)[0] == 255).all()
    write_picture(tmp_path / "opaque" / "a.png", (200, 3, 5, 255), mode="RGBA")
    x = load(tmp_path / "opaque", tmp_path)[0]
    assert x[0, :, 9, 9].tolist() == [200, 3, 5]


# Broken pictures


def break_pictures(folder):
    """Three files that cannot be read, among what else lies in the folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jpg").write_text("<html>not found</html>")
    (folder / "empty.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(256, size=(60, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(folder / "half.jpg")
    data = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(data[: len(data) // 2])
    return [folder / name for name in ("text.jpg", "empty.png", "half.jpg")]


def test_broken_pictures_are_named_and_counted(tmp_path, capsys):
    folder = tmp_path / "pictures"
    write_folder(folder, 10)
    broken = break_pictures(folder / "bee")
    x, y = load(folder, tmp_path)
    output = capsys.readouterr()
    assert output.out == ""
    for path in broken:
        assert sum(str(path) in line and "skipped" in line for line in output.err.splitlines()) == 1
    assert "3 of 13" in output.err.splitlines()[-1] and "skipped" in output.err.splitlines()[-1]
    assert len(x) == 9 and torch.equal(x[:, 1, 0, 0], (50 * y).byte())
    # A later run does not decode, and still says so.
    x_test, y_test = load(folder, tmp_path, "test")
    assert torch.equal(x_test[:, 1, 0, 0], (50 * y_test).byte())
    assert sorted(reds(x) + reds(x_test)) == list(range(0, 100, 10))
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "3 of 13" in output.err
    listed = json.loads(Path(re.search(r"\S+skipped\.json", output.err)[0]).read_text())
    assert sorted(folder / name for name in listed) == sorted(broken)


def test_a_picture_too_large_to_be_meant_is_skipped(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "pictures", 3)
    write_picture(tmp_path / "pictures" / "ant" / "bomb.png", (0, 0, 0), size=(100, 100))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 2000)
    assert len(load(tmp_path / "pictures", tmp_path)[0]) == 2
    assert "bomb.png" in capsys.readouterr().err


@pytest.mark.parametrize("padding", [0, 12_000])
def test_pictures_beyond_one_chunk_stay_in_order(padding, tmp_path, monkeypatch):
    """Small files are read one after the other, large ones by several threads."""
    folder, threads, read_picture = tmp_path / "pictures", set(), common.read_picture
    monkeypatch.setattr(
        common, "read_picture", lambda *args: threads.add(threading.current_thread()) or read_picture(*args)
    )
    folder.mkdir()
    for i in range(600):
        pixels = bytes([i % 250, i // 250, i % 7]) * 4
        (folder / f"{i}.ppm").write_bytes(b"P6 2 2 255\n" + pixels + bytes(padding))
    (folder / "broken.ppm").write_bytes(b"P6 2 2 255\n")
    parts = [load(folder, tmp_path, split, image_size=2)[0] for split in ("train", "test")]
    x = torch.cat(parts).long()
    assert [len(part) for part in parts] == [540, 60]
    i = x[:, 0, 0, 0] + 250 * x[:, 1, 0, 0]
    assert sorted(i.tolist()) == list(range(600))
    assert torch.equal(x[:, 2, 1, 1], i % 7)
    assert (threading.main_thread() in threads) == (padding == 0)


def test_only_broken_pictures(tmp_path, capsys):
    break_pictures(tmp_path / "pictures")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "pictures", tmp_path)
    assert str(tmp_path / "pictures") in one_line(error) and "3" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_empty_folder(tmp_path):
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    (tmp_path / "pictures" / "read.txt").write_text("no picture")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "pictures", tmp_path)
    message = one_line(error)
    assert str(tmp_path / "pictures") in message and ".png" in message


def test_a_link_that_leads_nowhere_is_no_picture(tmp_path):
    write_folder(tmp_path / "pictures", 2)
    with contextlib.suppress(OSError, NotImplementedError):  # not every system lets us make links
        (tmp_path / "pictures" / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert len(load(tmp_path / "pictures", tmp_path)[0]) == 1


# The cache


@pytest.fixture
def decoding(monkeypatch):
    """The names of the files that Pillow is asked to open from here on."""
    opened, real, lock = [], PIL.Image.open, threading.Lock()

    def note(path, *args, **kwargs):
        with lock:
            opened.append(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(PIL.Image, "open", note)
    return opened


def test_a_folder_is_decoded_once(tmp_path, decoding):
    write_folder(tmp_path / "pictures", 6)
    first, y = load(tmp_path / "pictures", tmp_path)
    assert len(decoding) == 6
    again, y_again = load(tmp_path / "pictures", tmp_path)
    load(tmp_path / "pictures", tmp_path, "test")
    assert len(decoding) == 6
    assert torch.equal(first, again) and torch.equal(y, y_again)


def test_any_change_makes_a_new_cache(tmp_path, decoding):
    folder = tmp_path / "pictures"
    write_folder(folder, 4)

    def decoded_anew():
        decoding.clear()
        load(folder, tmp_path)
        return len(decoding)

    assert decoded_anew() == 4 and decoded_anew() == 0
    write_picture(folder / "ant" / "more.png", (1, 2, 3))
    assert decoded_anew() == 5 and decoded_anew() == 0
    (folder / "ant" / "more.png").rename(folder / "ant" / "other.png")
    assert decoded_anew() == 5
    os.utime(folder / "ant" / "other.png", ns=(1, 1))
    assert decoded_anew() == 5
    (folder / "ant" / "other.png").unlink()
    assert decoded_anew() == 0
    load(folder, tmp_path, image_size=64)
    assert len(decoding) == 4
    folder.rename(tmp_path / "moved")
    decoding.clear()
    load(tmp_path / "moved", tmp_path)
    assert len(decoding) == 4


def test_the_same_folder_by_another_path_is_the_same_cache(tmp_path, decoding, monkeypatch):
    write_folder(tmp_path / "pictures", 4)
    load(tmp_path / "pictures", tmp_path)
    monkeypatch.chdir(tmp_path)
    load("pictures", tmp_path)
    load("./pictures/../pictures", tmp_path)
    assert len(decoding) == 4


def test_the_array_is_mapped_and_writing_to_it_does_not_change_the_file(tmp_path):
    write_folder(tmp_path / "pictures", 4)
    x, _ = load(tmp_path / "pictures", tmp_path)
    before = x.clone()
    x.fill_(0)
    assert torch.equal(load(tmp_path / "pictures", tmp_path)[0], before)
    (cache,) = (tmp_path / "cache").iterdir()
    stored = np.load(cache / "images.npy")
    assert stored.shape == (4, 3, 32, 32) and np.array_equal(stored[:3], before)


def test_an_interrupted_decoding_leaves_no_cache(tmp_path, monkeypatch, decoding):
    write_folder(tmp_path / "pictures", 4)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path / "pictures", tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
    decoding.clear()
    assert len(load(tmp_path / "pictures", tmp_path)[0]) == 3 and len(decoding) == 4


def test_what_a_killed_run_leaves_is_not_taken_for_a_cache(tmp_path, monkeypatch, decoding):
    write_folder(tmp_path / "pictures", 4)
    renamed = []

    def kill(source, target):
        renamed.append(Path(target))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # Killed at the last moment, all written but not renamed, and nothing cleans up.
        patch.setattr(os, "replace", kill)
        patch.setattr(tempfile.TemporaryDirectory, "cleanup", lambda self: self._finalizer.detach())
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path / "pictures", tmp_path)
    (leftover,) = (tmp_path / "cache").iterdir()
    assert renamed != [leftover] and any(leftover.rglob("images.npy"))
    decoding.clear()
    assert len(load(tmp_path / "pictures", tmp_path)[0]) == 3 and len(decoding) == 4


def test_two_runs_at_once_share_the_faster_one_s_cache(tmp_path, monkeypatch):
    write_folder(tmp_path / "pictures", 4)
    real = common.decode

    def overtaken(folder, names, image_size, cache, **options):
        real(folder, names, image_size, cache, **options)
        real(folder, names, image_size, cache, **options)

    monkeypatch.setattr(common, "decode", overtaken)
    assert len(load(tmp_path / "pictures", tmp_path)[0]) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("file", ["images.npy", "skipped.json"])
@pytest.mark.parametrize("how", ["truncated", "empty", "missing"])
def test_a_damaged_cache_is_named(file, how, tmp_path):
    write_folder(tmp_path / "pictures", 4)
    load(tmp_path / "pictures", tmp_path)
    (cache,) = (tmp_path / "cache").iterdir()
    data = (cache / file).read_bytes()
    if how == "missing":
        (cache / file).unlink()
    else:
        (cache / file).write_bytes(data[:-1] if how == "truncated" else b"")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "pictures", tmp_path)
    assert str(cache) in one_line(error) and "delete" in str(error.value)


def test_no_room_for_the_cache(tmp_path, monkeypatch):
    write_folder(tmp_path / "pictures", 4)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError) as error:
            load(tmp_path / "pictures", tmp_path)
    message = one_line(error)
    assert str(tmp_path / "cache") in message and "No space left" in message and "--data-dir" in message
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError) as error:
        load(tmp_path / "pictures", tmp_path / "file")
    assert "--data-dir" in one_line(error)


def test_nothing_is_printed_when_all_goes_well(tmp_path, capsys):
    write_folder(tmp_path / "pictures", 4)
    load(tmp_path / "pictures", tmp_path)
    load("ring", tmp_path)
    output = capsys.readouterr()
    assert output.out == "" and output.err == ""
