"""Loading data and drawing batches, saving picture grids; nothing else.

A data set is one tensor, indexed at random: bytes for pictures, floats for 2-D points. There are no
epochs, no workers and no augmentation. `load_data`, `as_float`, `sample_batch` and `save_grid` are
public.
"""

import contextlib
import gzip
import hashlib
import json
import math
import os
import struct
import sys
import tempfile
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def load_data(name, data_dir, split, image_size, device):
    """One split, "train", "validation" or "test", of a data set: x, and a label per item, y, or None.

    x is uint8 (N, C, image_size, image_size) for pictures, float32 (N, 2) for points; y is int64 (N,).
    `name` is one of `LOADERS` or a folder of pictures. Downloads and decoded pictures are kept in
    `data_dir`. x and y are on `device` if x fits into half of its free memory, else on the host.

    Validation is the last tenth, at most 5 000 items, of what the source calls its training items;
    "train" is always the rest. A user's mistake or a damaged file raises ValueError or OSError with
    one sentence that says what to do.
    """
    source = {"train": "train", "validation": "train", "test": "test"}[split]
    data_dir = expand(data_dir)
    if name in LOADERS:
        x, y = LOADERS[name](data_dir, source, image_size)
    elif name and expand(name).is_dir():
        x, y = load_folder(expand(name), data_dir, source, image_size)
    else:
        known = f"{', '.join(LOADERS)} and folders of pictures"
        raise ValueError(f"no data set or folder is called {name!r}; known are {known}")

    if source == "train":
        first = len(x) - min(5000, len(x) // 10)  # of the validation items
        if split == "validation" and first == len(x):
            raise ValueError(f"{name} has {len(x)} training items; a validation split needs 10")
        rows = slice(first) if split == "train" else slice(first, None)
        x, y = x[rows], None if y is None else y[rows]

    device = torch.device(device)
    room = math.inf
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] // 2
    elif device.type == "mps":
        room = 2**30  # Metal does not say how much is free
    if x.nbytes > room:
        size = f"{x.nbytes / 2**30:.1f} GiB"
        why = f"too large for {device}; each step copies its batch there"
        print(f"the data ({size}) stay on the host: {why}", file=sys.stderr)
        return x, y
    return x.to(device), None if y is None else y.to(device)


LOADERS = {  # name: a function of data_dir, "train" or "test", and image_size
    "glyphs": lambda data_dir, source, image_size: load_glyphs(source, image_size),
    "mnist": lambda *where: load_idx("MNIST", *where),
    "fashion_mnist": lambda *where: load_idx("FashionMNIST", *where),
    "cifar10": lambda *where: load_cifar10(*where),
    "celeba": lambda *where: load_celeba(*where),
    "color_mnist": lambda *where: load_color_mnist(*where),
    "stacked_mnist": lambda *where: load_stacked_mnist(*where),
    "ring": lambda data_dir, source, image_size: load_ring(source),
    "grid": lambda data_dir, source, image_size: load_grid(source),
    "swissroll": lambda data_dir, source, image_size: load_swissroll(source),
}


def as_float(x):
    """Bytes 0…255 as float32 −1…1, both ends exact; points, which are floats, as they are."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def sample_batch(x, n, device=None, y=None):
    """n items drawn uniformly with replacement: the expectation over the data in every objective.

    Pictures come as float32 in [−1, 1], on `device`, or on x's. With y, which must be on x's device, a
    pair: the items and their labels. The index is drawn on x's device from torch's default generator
    and without synchronising, so that a CUDA graph can hold it.
    """
    index = torch.randint(len(x), (n,), device=x.device)
    batch = as_float(copy_to(device, x[index]))
    return batch if y is None else (batch, copy_to(device, y[index]))


def save_grid(x, path, columns):
    """Write x as a PNG file, whole or not at all (OSError), and make the folder it lies in.

    Pictures (N, C, H, W), C 1 or 3, go row by row without gaps, `columns` to a row; a last row that is
    not full ends in black. The scale is fixed, −1 ↦ 0 and 1 ↦ 255, so that grids can be compared.
    Pairs (N, 2, C, H, W) stand side by side. Points (N, 2) become their density on [−2, 2]², pairs of
    points (N, 2, 2) two densities.
    """
    from PIL import Image

    x = x.detach().float().cpu()
    if x.ndim <= 3:
        sets = x.reshape(len(x), -1, 2).unbind(1)
        pixels = torch.cat([density(points) for points in sets], dim=1)
    else:
        x = x.flatten(0, 1) if x.ndim == 5 else x
        n, c, h, w = x.shape
        rows = math.ceil(n / columns)
        cells = torch.zeros(rows * columns, c, h, w, dtype=torch.uint8)
        cells[:n] = ((x + 1) * 127.5).round().clamp(0, 255).byte()
        cells = cells.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2)
        pixels = cells.reshape(rows * h, columns * w, c).squeeze(2)

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{path}.tmp")
    try:
        Image.fromarray(pixels.numpy()).save(unfinished, "PNG")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# Helpers


def expand(path):
    """A path, with ~ and ~user replaced by the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: no such user is known here; write the path without ~") from error


def copy_to(device, batch):
    """The batch on `device`, or as it is if that is None.

    A batch from the host goes to a GPU through pinned memory: neither side waits, and PyTorch does not
    reuse that memory before the copy is done.
    """
    device = torch.device(device or batch.device)
    if batch.is_cpu and device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=batch.is_pinned())


def density(points, size=256, limit=2):
    """How many points (N, 2) are where in [−limit, limit]²: uint8 (size, size), log scale, y upwards."""
    cells = ((points + limit) * size / (2 * limit)).floor()
    x, y = cells[((cells >= 0) & (cells < size)).all(dim=1)].long().unbind(1)
    counts = torch.bincount((size - 1 - y) * size + x, minlength=size * size).view(size, size)
    brightness = counts.float().log1p()
    return (255 * brightness / brightness.max().clamp(min=math.log(2))).round().byte()


def generator_for(*key):
    """A generator for one data set, the same in every run; the global ones are left alone."""
    return np.random.default_rng(list(repr(key).encode()))


def in_chunks(function, *tensors):
    """function(*tensors), 512 items at a time: as floats, all at once would take a lot of memory."""
    chunks = zip(*(tensor.split(512) for tensor in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])


def resize(x, image_size):
    """Pictures (N, C, H, W), uint8, in another size."""
    if x.shape[2:] == (image_size, image_size):
        return x
    resized = partial(F.interpolate, size=(image_size, image_size), mode="bilinear", antialias=True)
    return in_chunks(lambda x: resized(x.float()).round().byte(), x)


def reason(error):
    """What an error says, in one line: the last, where downloaders put the cause."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def download(dataset, data_dir, by_hand, **options):
    """A data set of torchvision, downloaded if missing; what torchvision prints goes to stderr."""
    try:
        import torchvision

        with contextlib.redirect_stdout(sys.stderr):
            return getattr(torchvision.datasets, dataset)(data_dir, download=True, **options)
    except Exception as error:  # URLError, RuntimeError, BadZipFile, gdown's own …
        advice = f"{by_hand}, or use --dataset glyphs, which needs no download"
        raise OSError(f"{dataset} could not be downloaded ({reason(error)}); {advice}") from error


# Points: the toy distributions of WGAN-GP's gan_toy.py, in its scaling

POINTS = {"train": 100_000, "test": 10_000}


def load_ring(source):
    """Eight Gaussians; mode k lies at the angle 2πk/8."""
    angles = 2 * np.pi * np.arange(8) / 8
    return gaussians(2 * np.stack([np.cos(angles), np.sin(angles)], axis=1), 0.02, 1.414, source)


def load_grid(source):
    """25 Gaussians; mode 5i + j lies in column i and row j."""
    return gaussians(2.0 * np.stack(np.divmod(np.arange(25), 5), axis=1) - 4, 0.05, 2.828, source)


def gaussians(centres, std, scale, source):
    """Equally many points round each centre, in random order; the label says which."""
    rng = generator_for("gaussians", len(centres), source)
    modes = rng.permutation(POINTS[source]) % len(centres)
    points = (centres[modes] + std * rng.standard_normal((len(modes), 2))) / scale
    return torch.from_numpy(points).float(), torch.from_numpy(modes)


def load_swissroll(source):
    """A noisy spiral, (t cos t, t sin t); no labels."""
    rng = generator_for("swissroll", source)
    t = 1.5 * np.pi * (1 + 2 * rng.random(POINTS[source]))
    spiral = np.stack([t * np.cos(t), t * np.sin(t)], axis=1)
    points = (spiral + 0.25 * rng.standard_normal((len(t), 2))) / 7.5
    return torch.from_numpy(points).float(), None


# Digits


def load_glyphs(source, image_size):
    """Digits in Pillow's own font in random size, rotation, shear, thickness and position; balanced."""
    from PIL import Image, ImageDraw, ImageFont

    # Each digit is drawn once per thickness, as large as the frame; samples are distorted copies.
    templates = []
    thicknesses = 5
    large = 4 * image_size
    font = ImageFont.load_default(1.2 * large)
    for digit in "0123456789":
        for thickness in range(thicknesses):
            template = Image.new("L", (large, large))
            draw = ImageDraw.Draw(template)
            stroke = round(thickness * large / 80)
            left, top, right, bottom = draw.textbbox((0, 0), digit, font=font, stroke_width=stroke)
            centred = (large - left - right) / 2, (large - top - bottom) / 2
            draw.text(centred, digit, fill=255, font=font, stroke_width=stroke)
            templates.append(template.reduce(4))

    rng = generator_for("glyphs", source)
    y = rng.permutation({"train": 10_000, "test": 2_000}[source]) % 10
    n = len(y)
    drawn = y * thicknesses + rng.integers(thicknesses, size=n)
    width, height = rng.uniform(0.6, 0.8, n) * rng.uniform(0.93, 1.07, (2, n))
    angle, shear = np.radians(rng.uniform(-12, 12, n)), rng.uniform(-0.2, 0.2, n)
    middle = rng.uniform(0.45, 0.55, (n, 2, 1))

    # Scale, shear, rotate. Pillow wants the inverse: where in the template a sample's pixel comes from.
    cos, sin = np.cos(angle), np.sin(angle)
    across = [width * cos, height * (shear * cos - sin)]
    down = [width * sin, height * (shear * sin + cos)]
    bend = np.array([*across, *down])
    inverse = np.linalg.inv(bend.T.reshape(n, 2, 2))
    offset = image_size * (0.5 - inverse @ middle)
    affine = np.concatenate([inverse, offset], axis=2).reshape(n, 6).tolist()

    size = (image_size, image_size)
    x = np.empty((n, 1, *size), dtype=np.uint8)
    for i in range(n):
        x[i, 0] = templates[drawn[i]].transform(size, Image.AFFINE, affine[i], Image.BICUBIC)
    return torch.from_numpy(x), torch.from_numpy(y)


def load_idx(dataset, data_dir, source, image_size):
    """MNIST, or a data set in the same files: pictures of 28×28, padded with black to 32×32."""
    raw = data_dir / dataset / "raw"
    prefix = {"train": "train", "test": "t10k"}[source]
    images = raw / f"{prefix}-images-idx3-ubyte"
    labels = raw / f"{prefix}-labels-idx1-ubyte"
    if not all(path.exists() or Path(f"{path}.gz").exists() for path in (images, labels)):
        by_hand = f"put {images.name} and {labels.name}, or both as .gz, into {raw}"
        download(dataset, data_dir, by_hand)
    x, y = read_idx(images, (28, 28)), read_idx(labels, ())
    if len(x) != len(y):
        counts = f"{images} has {len(x)} items, {labels.name} {len(y)}"
        raise ValueError(f"{counts}; delete both and run again")
    return resize(F.pad(x[:, None], (2, 2, 2, 2)), image_size), y.long()


def read_idx(path, shape):
    """The items of this shape, uint8, in an IDX file or, if only that is there, in its gzipped form."""
    path = path if path.exists() else Path(f"{path}.gz")
    data = path.read_bytes()
    if path.suffix == ".gz":
        with contextlib.suppress(OSError, EOFError, zlib.error):  # the check below finds what is not gzip
            data = gzip.decompress(data)
    start = 4 * (2 + len(shape))
    magic, n, *sizes = struct.unpack_from(f">{start // 4}I", data.ljust(start, b"\0"))
    # The length is compared too: half a download, or a web page in its place, is not the data.
    header_fits = (magic, *sizes) == (0x801 + len(shape), *shape)
    if not header_fits or n == 0 or len(data) != start + n * math.prod(shape):
        raise ValueError(f"{path} is damaged; delete it and run again, or replace it by a good one")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(n, *shape)


def load_color_mnist(data_dir, source, image_size):
    """MNIST with each digit in one bright colour of random hue."""
    x, y = load_idx("MNIST", data_dir, source, image_size)
    hue = torch.from_numpy(6 * generator_for("color_mnist", source).random(len(x))).float()
    channels = [(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()]
    colour = torch.stack(channels, dim=1).clamp(0, 1).view(-1, 3, 1, 1)
    return in_chunks(lambda x, colour: (x * colour).round().byte(), x, colour), y


def load_stacked_mnist(data_dir, source, image_size):
    """Three random digits a, b, c of MNIST in the three channels; the label is 100a + 10b + c."""
    x, y = load_idx("MNIST", data_dir, source, image_size)
    rng = generator_for("stacked_mnist", source)
    index = torch.from_numpy(rng.integers(len(x), size=(len(x), 3)))
    return x[index].squeeze(2), y[index] @ torch.tensor([100, 10, 1])


# Photographs


def load_cifar10(data_dir, source, image_size):
    """Objects of ten classes, 32×32 in colour."""
    by_hand = f"put cifar-10-python.tar.gz into {data_dir}"
    data = download("CIFAR10", data_dir, by_hand, train=source == "train")
    x = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return resize(x, image_size), torch.tensor(data.targets)


def load_celeba(data_dir, source, image_size):
    """The aligned faces without labels; their middle square, 178×178, is resized."""
    folder = data_dir / "celeba" / "img_align_celeba"
    partition = folder.with_name("list_eval_partition.txt")
    if not (folder.is_dir() and partition.is_file()):
        by_hand = f"put {partition.name} and the folder {folder.name} into {folder.parent}"
        download("CelebA", data_dir, by_hand)
    rows = [line.split() for line in partition.read_text(errors="replace").splitlines()]
    names = [row[0] for row in rows if row[1:] == [{"train": "0", "test": "2"}[source]]]
    if not names:
        raise ValueError(f"{partition} names no {source} pictures; delete it and run again")
    missing = sum(not os.path.isfile(os.path.join(folder, name)) for name in names)
    if missing:
        lack = f"{folder} lacks {missing} of {len(names)} pictures"
        raise ValueError(f"{lack}; delete it and run again")
    return decoded(folder, names, image_size, data_dir)[0], None


# Folders of pictures

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow goes by a file's contents, not its name: it would start Ghostscript for an EPS named .png.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def load_folder(folder, data_dir, source, image_size):
    """Any pictures below a folder; the label is the top-level sub-folder, if there are two or more.

    There are no labels if some pictures lie outside the sub-folders. A tenth of the pictures, the same
    one in every run, is the test split; a single picture is in both.
    """
    names = pictures_below(folder)
    if not names:
        kinds = " ".join(SUFFIXES)
        raise ValueError(f"{folder} holds no pictures ({kinds}); name a folder that has some")
    generator_for("folder").shuffle(names)
    parent = {name: "/".join(Path(name).parts[:-1][:1]) for name in names}
    classes = sorted(set(parent.values()))

    x, names = decoded(folder, names, image_size, data_dir)
    labelled = len(classes) > 1 and "" not in classes
    y = torch.tensor([classes.index(parent[name]) for name in names]) if labelled else None
    if len(x) > 1:
        tenth = max(1, len(x) // 10)
        rows = slice(-tenth) if source == "train" else slice(-tenth, None)
        x, y = x[rows], y[rows] if labelled else None
    return x, y


def pictures_below(folder):
    """The names of all pictures below a folder, sorted; each once, however many links lead to it."""
    names = []
    seen = set()
    waiting = deque([("", os.path.realpath(folder))])
    while waiting:
        name, path = waiting.popleft()
        if path in seen:
            continue
        seen.add(path)
        if os.path.isdir(path):
            for entry in sorted(os.listdir(path)):
                inner = os.path.join(path, entry)
                if entry.startswith("."):
                    continue
                # Links come last: the class of a picture is the folder that it really lies in.
                if os.path.islink(inner):
                    waiting.append((os.path.join(name, entry), os.path.realpath(inner)))
                else:
                    waiting.appendleft((os.path.join(name, entry), inner))
        elif name.lower().endswith(SUFFIXES) and os.path.isfile(path):  # a pipe would block for ever
            names.append(name)
    return sorted(names)


def decoded(folder, names, image_size, data_dir):
    """The pictures in one memory-mapped array, decoded if no earlier run did that, and their names."""
    stats = [os.stat(os.path.join(folder, name)) for name in names]
    versions = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    key = [str(folder.resolve()), image_size, names, versions]
    cache = data_dir / "cache" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    if not cache.exists():
        try:
            # Pillow frees Python's lock only while it decodes: threads do not help small pictures.
            small = sum(stat.st_size for stat in stats) < 10_000 * len(stats)
            decode(folder, names, image_size, cache, threaded=not small)
        except OSError as error:
            advice = "make room there or choose another --data-dir"
            raise OSError(f"decoding into {cache.parent} failed ({error}); {advice}") from error
    try:
        x = torch.from_numpy(np.load(cache / "images.npy", mmap_mode="c"))
        skipped = set(json.loads((cache / "skipped.json").read_text()))
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{cache} is damaged ({error}); delete it and run again") from error
    if skipped:
        listed = f"listed in {cache / 'skipped.json'}"
        print(f"{len(skipped)} of {len(names)} pictures were skipped, {listed}", file=sys.stderr)
    return x, [name for name in names if name not in skipped]


def decode(folder, names, image_size, cache, threaded):
    """Make the cache: images.npy, uint8 (N, C, H, W) with C = 1 if all are grey, and skipped.json."""
    from PIL import Image
    from tqdm import tqdm

    def attempt(name):
        try:
            return read_picture(folder / name, image_size)
        except Exception as error:  # a broken picture can make Pillow raise anything
            return error

    cache.parent.mkdir(parents=True, exist_ok=True)
    with (
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory(dir=cache.parent) as scratch,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        # Which pictures are skipped must not depend on Python's -W: only absurd sizes are errors.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        skipped = []
        grey = True
        together = 256
        bar = tqdm(total=len(names), desc=f"decoding {folder}", disable=None)
        # Into a plain file: a full disk raises OSError there, but kills the writer of a memory map.
        with open(f"{scratch}/rgb", "wb") as file, bar:
            for start in range(0, len(names), together):
                chunk = names[start : start + together]
                pictures = pool.map(attempt, chunk) if threaded else map(attempt, chunk)
                for name, picture in zip(chunk, pictures, strict=True):
                    bar.update()
                    if isinstance(picture, Exception):
                        skipped.append(name)
                        bar.write(f"skipped {folder / name}: {reason(picture)}", file=sys.stderr)
                    else:
                        grey = grey and (picture == picture[:1]).all()
                        file.write(picture.tobytes())
        n = len(names) - len(skipped)
        if n == 0:
            everything = f"all {len(names)} pictures in {folder} are broken"
            raise ValueError(f"{everything}; name a folder with good ones")
        rgb = np.memmap(f"{scratch}/rgb", np.uint8, "r", shape=(n, 3, image_size, image_size))
        whole = Path(scratch, "whole")
        whole.mkdir()
        np.save(whole / "images.npy", rgb[:, : 1 if grey else 3])
        (whole / "skipped.json").write_text(json.dumps(skipped, indent=0))
        try:
            os.replace(whole, cache)
        except OSError:
            if not cache.exists():  # if it does, another process was faster
                raise


def read_picture(path, image_size):
    """The middle square of a picture, upright, as uint8 (3, image_size, image_size)."""
    from PIL import Image, ImageOps

    with Image.open(path, formats=FORMATS) as picture:
        # A large JPEG can be decoded at a fraction of its size, which is many times faster.
        picture.draft("RGB", (2 * image_size, 2 * image_size))
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
            grey = (np.asarray(picture) / 257).round().clip(0, 255)
            picture = Image.fromarray(grey.astype(np.uint8))
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        square = ImageOps.fit(picture.convert("RGB"), (image_size, image_size))
        return np.asarray(square).transpose(2, 0, 1)
