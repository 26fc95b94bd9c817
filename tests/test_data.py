"""common.py: batches, picture grids, and the data sets that are not folders of pictures."""

import gzip
import math
import random
import struct
import subprocess
import sys
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
SPLITS = ("train", "validation", "test")
POINTS = ("ring", "grid", "swissroll")
DOWNLOADED = ("mnist", "fashion_mnist", "cifar10", "celeba", "color_mnist", "stacked_mnist")


def load(name, data_dir, split="train", image_size=32, device="cpu"):
    return common.load_data(str(name), data_dir, split, image_size, device)


def refusal(kind, *args):
    """The one line with which load(*args) fails."""
    with pytest.raises(kind) as error:
        load(*args)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# as_float, sample_batch


def test_as_float_is_exact_at_both_ends_linear_and_leaves_points_alone():
    f = common.as_float(torch.arange(256, dtype=torch.uint8))
    assert f.dtype == torch.float32 and f[0] == -1 and f[255] == 1
    assert (f - torch.linspace(-1, 1, 256, dtype=torch.float64)).abs().max() < 1e-6
    points = torch.randn(5, 2)
    assert common.as_float(points) is points


def test_sample_batch_draws_uniformly_independently_and_with_replacement():
    x = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    drawn = ((common.sample_batch(x, 100_000) + 1) * 127.5).round().long().flatten()
    counts = drawn.bincount(minlength=10)
    # Six standard deviations of a binomial count.
    assert len(counts) == 10 and (counts - 10_000).abs().max() < 6 * math.sqrt(100_000 * 0.1 * 0.9)
    assert abs((drawn[1:] == drawn[:-1]).float().mean() - 0.1) < 0.01


def test_sample_batch_keeps_shapes_and_scales_pictures_only():
    pictures = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    batch = common.sample_batch(pictures, 50)
    assert batch.dtype == torch.float32 and batch.shape == (50, 3, 4, 4)
    assert set(batch.unique().tolist()) == {-1.0, 1.0}
    assert common.sample_batch(torch.full((2, 2), 7.0), 1).tolist() == [[7.0, 7.0]]


def test_labels_come_by_the_same_index_and_the_same_single_draw():
    x, y = torch.randn(1000, 2), torch.arange(1000)
    torch.manual_seed(3)
    index, after = torch.randint(1000, (32,)), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(common.sample_batch(x, 32), x[index]) and torch.rand(1) == after
    torch.manual_seed(3)
    x_batch, y_batch = common.sample_batch(x, 32, "cpu", y)
    assert torch.equal(x_batch, x[index]) and torch.equal(y_batch, index) and torch.rand(1) == after


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_captured_or_come_from_the_host_and_data_go_to_the_gpu(tmp_path):
    assert all(tensor.is_cuda for tensor in load("ring", tmp_path, "test", device="cuda"))
    x, y = torch.randint(256, (1000, 1, 8, 8), dtype=torch.uint8), torch.arange(1000)
    batch, labels = common.sample_batch(x, 16, "cuda", y)
    assert batch.is_cuda and torch.equal(batch.cpu(), common.as_float(x[labels.cpu()]))
    x, y = x.cuda(), y.cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        common.sample_batch(x, 16, "cuda", y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch, labels = common.sample_batch(x, 16, "cuda", y)
    graph.replay()
    first = labels.clone()
    graph.replay()
    assert not torch.equal(first, labels) and torch.equal(batch, common.as_float(x[labels]))


# save_grid


def saved(x, columns, tmp_path):
    path = tmp_path / "a" / "b" / "grid.png"
    common.save_grid(x, path, columns)
    picture = PIL.Image.open(path)
    assert picture.format == "PNG" and list(path.parent.iterdir()) == [path]
    return picture.mode, np.asarray(picture)


def grey(*values):
    """Pictures of one pixel each, in [−1, 1], that a grid shows as these bytes."""
    return common.as_float(torch.tensor(values, dtype=torch.uint8)).view(-1, 1, 1, 1)


def test_grid_maps_every_byte_back_to_itself_rounds_and_clamps(tmp_path):
    mode, pixels = saved(grey(*range(256)), 16, tmp_path)
    assert mode == "L" and pixels.flatten().tolist() == list(range(256))
    fractions = [0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 254.4 / 127.5 - 1, 0.001]
    values = torch.tensor([-1.0, 1.0, -3.0, 3.0, *fractions])
    assert saved(values.view(8, 1, 1, 1), 8, tmp_path)[1].tolist() == [[0, 255, 0, 255, 0, 1, 254, 128]]
    for value, byte in ((-0.5, 64), (0.5, 191)):  # the scale is fixed: nothing is stretched
        assert (saved(torch.full((4, 1, 8, 8), value), 2, tmp_path)[1] == byte).all()


def test_grid_goes_row_by_row_upright_in_colour_and_ends_in_black(tmp_path):
    x = torch.randint(256, (3, 3, 4, 5), dtype=torch.uint8)
    mode, pixels = saved(common.as_float(x), 2, tmp_path)
    assert mode == "RGB" and pixels.shape == (8, 10, 3) and not pixels[4:, 5:].any()
    cells = pixels[:4, :5], pixels[:4, 5:], pixels[4:, :5]
    assert np.array_equal(np.stack(cells), x.permute(0, 2, 3, 1))
    pairs = torch.stack([grey(10, 20, 30, 40), grey(110, 120, 130, 140)], dim=1)
    assert saved(pairs, 4, tmp_path)[1].tolist() == [[10, 110, 20, 120], [30, 130, 40, 140]]


def test_grid_takes_gradients_half_precision_and_other_layouts(tmp_path):
    x = common.as_float(torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8))
    plain = saved(x, 2, tmp_path)[1]
    other = (x * torch.ones(1, requires_grad=True)).contiguous(memory_format=torch.channels_last)
    assert np.array_equal(saved(other, 2, tmp_path)[1], plain) and other.requires_grad
    assert np.array_equal(saved(x.double(), 2, tmp_path)[1], plain)
    assert (saved(torch.full((1, 1, 2, 2), -1.0).bfloat16(), 1, tmp_path)[1] == 0).all()


@pytest.mark.parametrize("size", [8, 256])  # less and more than a write buffer holds
def test_a_full_disk_leaves_the_old_grid_whole_and_nothing_half_written(size, tmp_path):
    before = saved(grey(1, 2), 2, tmp_path)[1]
    path = tmp_path / "a" / "b" / "grid.png"
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
    try:
        for target in (path, path.with_name("new.png")):
            with pytest.raises(OSError):
                common.save_grid(torch.rand(1, 1, size, size), target, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(path.parent.iterdir()) == [path]
    assert np.array_equal(np.asarray(PIL.Image.open(path)), before)


def test_points_become_a_logarithmic_density_with_the_y_axis_up(tmp_path):
    # A point in the middle of the cell in column 32 and, counted from the top, row 64.
    here = torch.tensor([[-2 + 32.5 / 64, 2 - 64.5 / 64]])
    mode, pixels = saved(here.repeat(10, 1), 8, tmp_path)
    assert mode == "L" and pixels.shape == (256, 256)
    assert pixels[64, 32] == 255 and pixels.astype(int).sum() == 255

    outside = [[5.0, 0.0], [0.0, -2.5], [2.0, 0.0], [math.nan, 0.0], [0.0, math.inf]]
    points = torch.tensor([[-1.0, 0.0]] * 3 + [[1.0, 0.0]] * 15 + outside)
    pixels = saved(points, 1, tmp_path)[1]
    assert sorted(pixels[pixels > 0].tolist()) == [round(255 * math.log(4) / math.log(16)), 255]
    assert np.array_equal(saved(points, 5, tmp_path)[1], pixels)
    assert not saved(torch.tensor(outside), 1, tmp_path)[1].any()

    left, right = torch.randn(500, 2) / 2, torch.randn(500, 2, requires_grad=True) / 3
    both = saved(torch.stack([left, right], dim=1), 1, tmp_path)[1]
    halves = [saved(points, 1, tmp_path)[1] for points in (left, right)]
    assert np.array_equal(both, np.concatenate(halves, axis=1))


# load_data in general


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    assert set(common.LOADERS) == {"glyphs", *POINTS, *DOWNLOADED}
    for name in ("minst", str(tmp_path / "nowhere"), ""):
        message = refusal(ValueError, name, tmp_path)
        assert repr(name) in message and "folder" in message
        assert all(known in message for known in common.LOADERS)
    # A user who does not exist, too, is no RuntimeError.
    assert "~nosuchuser" in refusal(ValueError, "~nosuchuser/pictures", tmp_path)
    assert "~nosuchuser" in refusal(ValueError, "ring", "~nosuchuser/data")


@pytest.mark.parametrize("name", ["ring", "swissroll", "mnist"])
def test_validation_is_the_end_of_the_training_items_and_train_leaves_it_out(name, tmp_path):
    n, held_out = (60, 6) if name == "mnist" else (100_000, 5_000)
    write_mnist(tmp_path, 60)
    whole = common.LOADERS[name](tmp_path, "train", 32)
    parts = load(name, tmp_path), load(name, tmp_path, "validation")
    assert len(whole[0]) == n and len(parts[1][0]) == held_out
    for tensor, train, validation in zip(whole, *parts, strict=True):
        if tensor is None:
            assert train is None and validation is None
        else:
            assert torch.equal(tensor[:-held_out], train)
            assert torch.equal(tensor[-held_out:], validation)


def test_too_few_items_for_validation_still_train(tmp_path):
    write_mnist(tmp_path, 9)
    assert len(load("mnist", tmp_path)[0]) == 9
    message = refusal(ValueError, "mnist", tmp_path, "validation")
    assert "mnist" in message and "9" in message and "validation" in message


@pytest.mark.parametrize("name", ["glyphs", *POINTS, "color_mnist", "stacked_mnist"])
def test_loading_neither_moves_nor_follows_the_global_generators(name, tmp_path):
    write_mnist(tmp_path, 12)
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    x, y = load(name, tmp_path, "test")
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    again, y_again = load(name, tmp_path, "test")
    assert torch.equal(x, again) and (y is None or torch.equal(y, y_again))


@pytest.mark.parametrize("name", ["glyphs", *POINTS])
def test_no_item_is_in_two_splits(name, tmp_path):
    items = [item.numpy().tobytes() for split in SPLITS for item in load(name, tmp_path, split)[0]]
    assert len(items) == len(set(items)) == (12_000 if name == "glyphs" else 110_000)


@pytest.mark.parametrize(("free", "moved"), [(160_000, True), (159_998, False)])
def test_data_go_to_the_gpu_if_they_fit_into_half_its_memory(free, moved, tmp_path, monkeypatch, capsys):
    # No GPU is needed: 10 000 points of 8 bytes, and a .to() that only takes a note.
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: asked.append(device) or self)
    load("ring", tmp_path, "test", device="cuda")
    output = capsys.readouterr()
    assert output.out == "" and asked == [torch.device("cuda")] * (2 if moved else 0)
    assert output.err == "" if moved else output.err.count("\n") == 1 and "host" in output.err


def test_a_copy_of_common_py_needs_torch_and_numpy_alone():
    assert "tools." not in Path(common.__file__).read_text(encoding="utf-8")
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import common; "
        "new = {*sys.modules} - before; "
        "sys.exit(', '.join({'torchvision', 'PIL', 'tqdm', 'torch._dynamo'} & new) or 0)"
    )
    root = Path(common.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Points


@pytest.mark.parametrize(("name", "modes", "std"), [("ring", 8, 0.02 / 1.414), ("grid", 25, 0.05 / 2.828)])
def test_gaussians(name, modes, std, tmp_path):
    parts = [load(name, tmp_path, split) for split in ("train", "validation")]
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert x.shape == (100_000, 2) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert y.bincount().tolist() == [100_000 // modes] * modes
    assert parts[1][1].bincount().min() > 0.75 * 5_000 / modes  # in random order
    for k in range(modes):
        mode, angle = x[y == k].double(), 2 * math.pi * k / 8
        centre = [2 * math.cos(angle) / 1.414, 2 * math.sin(angle) / 1.414]
        if name == "grid":
            centre = [(2 * (k // 5) - 4) / 2.828, (2 * (k % 5) - 4) / 2.828]
        assert (mode.mean(0) - torch.tensor(centre)).abs().max() < 2e-3
        assert (mode.std(0) / std - 1).abs().max() < 0.05


def test_swissroll(tmp_path):
    x, y = load("swissroll", tmp_path)
    assert x.shape == (95_000, 2) and x.dtype == torch.float32 and y is None
    # How far from the spiral: its turns are 2π apart, so the radius tells the turn, the angle the rest.
    points = x.double() * 7.5
    radius, angle = points.norm(dim=1), torch.atan2(points[:, 1], points[:, 0])
    t = angle + 2 * math.pi * ((radius - angle) / (2 * math.pi)).round()
    off = (radius - t)[(t > 1.5 * math.pi + 1) & (t < 4.5 * math.pi - 1)]
    assert abs(off.mean()) < 0.02 and abs(off.std() - 0.25) < 0.01
    # t is uniform on [1.5π, 4.5π].
    assert abs(t.mean() - 3 * math.pi) < 0.05 and abs(t.std() - 3 * math.pi / math.sqrt(12)) < 0.05


@pytest.mark.parametrize("name", POINTS)
def test_points_fit_their_picture_ignore_its_size_and_are_drawn_anew_for_each_split(name, tmp_path):
    train, test = load(name, tmp_path)[0], load(name, tmp_path, "test")[0]
    assert test.shape == (10_000, 2) and test.abs().max() < 2
    assert torch.equal(load(name, tmp_path, "test", image_size=64)[0], test)
    for axis in (0, 1):
        pairs = torch.stack([train[:10_000, axis], test[:, axis]])
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.05


# Glyphs


@pytest.fixture(scope="module")
def glyphs():
    return {split: load("glyphs", "unused", split) for split in SPLITS}


def test_glyphs_are_balanced_white_on_black_and_fill_the_frame_but_for_a_margin(glyphs):
    for split, n in zip(SPLITS, (9_000, 1_000, 2_000), strict=True):
        x, y = glyphs[split]
        assert x.shape == (n, 1, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
        assert len(y) == n and y.bincount().min() > 0.07 * n and len(set(y[:20].tolist())) > 3
    x = glyphs["train"][0][:, 0]
    assert (x.flatten(1).amax(1) > 200).all()
    assert x[:, [0, -1]].max() < 16 and x[:, :, [0, -1]].max() < 16
    height = (x > 128).any(2).sum(1)
    assert height.min() >= 14 and height.max() <= 30 and 18 < height.float().mean() < 26
    assert 0.05 < (x > 128).float().mean() < 0.25


def test_glyphs_vary_within_a_digit(glyphs):
    x, y = glyphs["train"]
    ticks = torch.arange(32.0)

    def measured(digit):
        """Ink, height, middle across and down, and lean (how far aside a pixel is for being one lower)."""
        ink = x[y == digit, 0].float() / 255
        mass, height = ink.sum((1, 2)), (ink > 0.5).any(2).sum(1)
        across, down = (ink.sum(1) * ticks).sum(1) / mass, (ink.sum(2) * ticks).sum(1) / mass
        dx, dy = (ticks - across[:, None])[:, None, :], (ticks - down[:, None])[:, :, None]
        lean = (ink * dx * dy).sum((1, 2)) / (ink * dy**2).sum((1, 2))
        return mass, height.float(), across, down, lean

    mass, height, across, down, _ = measured(0)
    assert height.std() > 1.5  # size
    assert (mass / height**2).std() / (mass / height**2).mean() > 0.12  # thickness; without it 0.08
    for middle in (across, down):  # position
        assert middle.std() > 0.5 and abs(middle.mean() - 15.5) < 0.5
    assert measured(1)[-1].std() > 0.14  # rotation and shear; one of them alone makes 0.11


def test_glyphs_are_legible_and_the_same_in_other_sizes(glyphs, tmp_path):
    # The nearest class mean, the simplest of classifiers, tells most; six and nine are not confused.
    (x, y), (x_test, y_test) = glyphs["train"], glyphs["test"]
    means = torch.stack([x[y == k].float().flatten(1).mean(0) for k in range(10)])
    guess = torch.cdist(x_test.float().flatten(1), means).argmin(1)
    assert (guess == y_test).float().mean() > 0.75
    assert (guess[y_test == 6] == 9).float().mean() < 0.05
    assert (guess[y_test == 9] == 6).float().mean() < 0.05
    large, y = load("glyphs", tmp_path, "test", image_size=64)
    assert large.shape == (2_000, 1, 64, 64) and torch.equal(y, y_test)
    small = torch.nn.functional.avg_pool2d(large.float(), 2)
    assert (small - x_test.float()).abs().mean() < 6


# MNIST and its likes


def idx(array):
    sizes = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return sizes + array.tobytes()


def write_mnist(data_dir, n, dataset="MNIST", sources=("train", "test"), zipped=False):
    """A small data set in MNIST's files, one item more in the second source; returns its arrays."""
    rng = np.random.default_rng(0)
    raw = Path(data_dir) / dataset / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for i, source in enumerate(sources):
        images = rng.integers(1, 256, size=(n + i, 28, 28), dtype=np.uint8)
        labels = (np.arange(n + i) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = raw / f"{PREFIXES[source]}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
        arrays[source] = torch.from_numpy(images), torch.from_numpy(labels).long()
    return arrays


def replace_images(data_dir, images):
    (data_dir / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(idx(images))


@pytest.fixture
def no_network(monkeypatch):
    """Every data set of torchvision fails as it does without a network, and chatters on stdout."""

    def fail(*args, **kwargs):
        print("Downloading http://example.org/file.gz")
        raise URLError("[Errno -3] Temporary failure in name resolution")

    for dataset in ("MNIST", "FashionMNIST", "CIFAR10", "CelebA"):
        monkeypatch.setattr(torchvision.datasets, dataset, fail)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("name", "dataset"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files_are_read_without_torchvision_and_padded(name, dataset, zipped, tmp_path, no_network):
    arrays = write_mnist(tmp_path, 8, dataset, zipped=zipped)
    for split in ("train", "test"):
        x, y = load(name, tmp_path, split)
        images, labels = arrays[split]
        assert x.dtype == torch.uint8 and x.shape == (len(images), 1, 32, 32)
        assert torch.equal(x[:, 0, 2:30, 2:30], images) and x.long().sum() == images.long().sum()
        assert y.dtype == torch.int64 and torch.equal(y, labels)
    write_mnist(tmp_path / "half", 5, dataset, sources=["test"], zipped=zipped)
    assert len(load(name, tmp_path / "half", "test")[0]) == 5


@pytest.mark.parametrize("image_size", [8, 16, 28, 64])
def test_mnist_in_other_sizes(image_size, tmp_path):
    n = 1300  # three chunks of 512
    write_mnist(tmp_path, n)
    images = np.repeat(np.arange(n) % 256, 28 * 28).reshape(n, 28, 28).astype(np.uint8)
    replace_images(tmp_path, images)
    x = torch.cat([load("mnist", tmp_path, split, image_size)[0] for split in SPLITS[:2]])
    assert x.shape == (n, 1, image_size, image_size) and x.dtype == torch.uint8
    middle = image_size // 2
    assert torch.equal(x[:, 0, middle, middle], torch.arange(n).remainder(256).byte())
    assert x[:, 0, 0, 0].max() < 16 or image_size == 8
    # Stripes two pixels wide come out grey; without antialiasing only the white ones would count.
    images[:] = 255 * (np.arange(2, 30) % 4 % 3 > 0)
    replace_images(tmp_path, images)
    stripes = load("mnist", tmp_path, image_size=8)[0][0, 0, 2:6, 2:6].float()
    assert (stripes - 127.5).abs().max() < 8


DAMAGES = {  # how: what it makes of a file's bytes, the first `start` of which are the header
    "truncated": lambda data, start: data[:-1],
    "half": lambda data, start: data[: len(data) // 2],
    "empty": lambda data, start: b"",
    "web page": lambda data, start: b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 40,
    "byte 10": lambda data, start: data[:10] + bytes([data[10] ^ 255]) + data[11:],
    "byte 5000": lambda data, start: data[:5000] + bytes([data[5000] ^ 255]) + data[5001:],
    "too long": lambda data, start: data + b"\0",
    "header only": lambda data, start: data[:start],
    "short header": lambda data, start: data[:6],
    "the other file": lambda data, start: idx(np.zeros((4, 4), np.uint8)),
    "another type": lambda data, start: data[:2] + b"\x0d" + data[3:],
    "no items": lambda data, start: data[:4] + b"\0\0\0\0" + data[8:start],
    "another size": lambda data, start: idx(np.zeros((4, 14, 56) if start == 16 else (4, 2), np.uint8)),
}
GZIPPED = [("images-idx3", how, ".gz") for how in list(DAMAGES)[:6]]
PLAIN = [(kind, how, "") for how in DAMAGES if "byte" not in how for kind in ("images-idx3", "labels-idx1")]


@pytest.mark.parametrize(("kind", "how", "suffix"), GZIPPED + PLAIN)
def test_a_damaged_mnist_file_is_named(kind, how, suffix, tmp_path, no_network):
    write_mnist(tmp_path, 12, zipped=bool(suffix))
    for split in ("train", "test"):
        path = tmp_path / "MNIST" / "raw" / f"{PREFIXES[split]}-{kind}-ubyte{suffix}"
        path.write_bytes(DAMAGES[how](path.read_bytes(), 16 if "images" in kind else 8))
        message = refusal(ValueError, "mnist", tmp_path, split)
        assert str(path) in message and "delete it" in message


def test_labels_and_pictures_have_to_agree(tmp_path):
    write_mnist(tmp_path, 12)
    labels = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(11, np.uint8)))
    message = refusal(ValueError, "mnist", tmp_path)
    assert all(part in message for part in (labels.name, "12", "11", "delete"))


@pytest.mark.parametrize("name", DOWNLOADED)
def test_without_network_the_message_says_what_to_put_where(name, tmp_path, no_network, capsys):
    folder, file = {
        "fashion_mnist": (tmp_path / "FashionMNIST" / "raw", "train-labels-idx1-ubyte"),
        "cifar10": (tmp_path, "cifar-10-python.tar.gz"),
        "celeba": (tmp_path / "celeba", "list_eval_partition.txt"),
    }.get(name, (tmp_path / "MNIST" / "raw", "train-labels-idx1-ubyte"))
    message = refusal(OSError, name, tmp_path)
    assert all(part in message for part in (str(folder), file, "name resolution", "--dataset glyphs"))
    output = capsys.readouterr()
    assert output.out == "" and "Downloading" in output.err


def test_missing_files_are_downloaded_and_what_fails_there_is_one_line(tmp_path, monkeypatch):
    calls = []

    def fetch(root, download):
        calls.append((Path(root), download))
        write_mnist(root, 7)

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    assert len(load("mnist", tmp_path)[0]) == 7 and len(load("mnist", tmp_path, "test")[0]) == 8
    assert calls == [(tmp_path, True)]
    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    failure = RuntimeError("Error downloading a.gz:\nTried http://one:\nHTTP Error 404: Not Found\n")
    assert "HTTP Error 404" in refusal(OSError, "mnist", tmp_path / "new")
    failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        load("mnist", tmp_path / "new")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "torchvision" in refusal(OSError, "mnist", tmp_path / "new")


def test_color_mnist_tints_each_digit_with_one_bright_colour_and_keeps_it(tmp_path):
    n = 540
    images, labels = write_mnist(tmp_path, 600)["train"]
    x, y = load("color_mnist", tmp_path)
    assert x.shape == (n, 3, 32, 32) and x.dtype == torch.uint8 and torch.equal(y, labels[:n])
    inner = x[:, :, 2:30, 2:30]
    # Full value: the strongest channel is the digit itself. Full saturation: the weakest is black.
    assert torch.equal(inner.amax(1), images[:n]) and (inner.amin(1) == 0).all()
    # One colour for a whole digit: all its pixels agree on it.
    brightness, where = images[:n].flatten(1).max(1)
    colour = inner.flatten(2)[torch.arange(n), :, where].float() / brightness[:, None]
    expected = images[:n, None].float() * colour[:, :, None, None]
    assert (inner.float() - expected).abs().max() <= 1.01
    # Each channel is the strongest in a third, and colours in between occur.
    assert (colour.argmax(1).bincount(minlength=3) > n / 3 - 80).all()
    assert len(colour.mul(20).round().unique(dim=0)) > 50
    # The same in another size, others in the test split.
    strongest = x.float().mean((2, 3)).argmax(1)
    large, test = load("color_mnist", tmp_path, "train", 64)[0], load("color_mnist", tmp_path, "test")[0]
    assert torch.equal(large.float().mean((2, 3)).argmax(1), strongest)
    assert not torch.equal(test[:n].float().mean((2, 3)).argmax(1), strongest)


def test_stacked_mnist_labels_agree_with_its_channels(tmp_path):
    images, labels = write_mnist(tmp_path, 300)["train"]
    x, y = load("stacked_mnist", tmp_path)
    assert x.shape == (270, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    which = {image.numpy().tobytes(): i for i, image in enumerate(images)}
    inner = x[..., 2:30, 2:30].contiguous().numpy()
    index = torch.tensor([[which[channel.tobytes()] for channel in item] for item in inner])
    assert torch.equal(y, labels[index] @ torch.tensor([100, 10, 1]))
    # Three independent draws: hardly ever the same picture twice, nearly every picture somewhere.
    assert (index[:, 0] == index[:, 1]).sum() < 10 and (index[:, 1] == index[:, 2]).sum() < 10
    assert len(index.unique()) > 0.8 * 300


@pytest.mark.skipif(not (REAL_DATA / "MNIST" / "raw").is_dir(), reason=f"no MNIST in {REAL_DATA}")
def test_the_real_mnist():
    for split, n in zip(SPLITS, (55_000, 5_000, 10_000), strict=True):
        x, y = load("mnist", REAL_DATA, split)
        assert x.shape == (n, 1, 32, 32) and y.bincount(minlength=10).min() > 0.08 * n
        # The known mean of the 28×28 training pictures is 0.1307.
        assert abs(x.float().mean() / 255 * (32 / 28) ** 2 - 0.1307) < 0.004
    assert y[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize("image_size", [32, 64])
def test_cifar10_channels_come_first(image_size, tmp_path, monkeypatch):
    pictures = np.zeros((6, 32, 32, 3), np.uint8)
    pictures[..., 0], pictures[..., 2] = 10, 30
    pictures[:, 20:, :, 1] = 200

    def fetch(root, train, download):
        assert Path(root) == tmp_path and download
        n = 6 if train else 2
        return SimpleNamespace(data=pictures[:n], targets=[3, 1, 4, 1, 5, 9][:n])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fetch)
    x, y = load("cifar10", tmp_path, image_size=image_size)
    assert x.shape == (6, 3, image_size, image_size) and x.dtype == torch.uint8 and x.is_contiguous()
    assert (x[:, 0] == 10).all() and (x[:, 2] == 30).all()
    assert (x[:, 1, : image_size // 2] == 0).all() and (x[:, 1, -image_size // 4 :] == 200).all()
    assert y.dtype == torch.int64 and y.tolist() == [3, 1, 4, 1, 5, 9]
    assert load("cifar10", tmp_path, "test")[1].tolist() == [3, 1]
