"""What tools.sample draws: samples, ways between them, reconstructions; and how it is written."""

import math
import os

import numpy as np
import torch
from tqdm import tqdm

from common import FORMATS, SUFFIXES, as_float, read_picture, resize, save_grid
from tools.runs import draw_z, load_split, reconstructions, samples

COLUMNS = 8
PADDED = ("mnist", "fashion_mnist", "color_mnist", "stacked_mnist")  # from 28×28 to 32×32, then resized


# Models whose noise is not Gaussian and not on a sphere, but in a cube or round the means of a mixture.
STRAIGHT = {"bigan", "loss_sensitive_gan", "gm_wae"}


def between(a, b, t, circle):
    """From a (N, d), at t = 0, to b, at t = 1, for t of shape (T,): (N, T, d).

    The first `circle` dimensions go on a great circle: Gaussian z lie near a sphere, which a chord would
    leave. The others, and z in one direction, go on a straight line.
    """
    a, b, t = a[:, None], b[:, None], t[:, None]
    straight = (1 - t) * a + t * b
    a, b = a[..., :circle], b[..., :circle]
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1)[..., None]
    angle = cosine.arccos()
    bent = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    bent = torch.where(angle.sin() > 1e-4, bent, straight[..., :circle])
    return torch.cat([bent, straight[..., circle:]], dim=-1)


def sampled(run, options):
    """Samples, or those on the ways between pairs of z, a row each, in the form of runs.samples."""
    columns = COLUMNS if run.images else 50  # points: ways that are seen as lines
    rows = -(-options.n // columns)
    n = 2 * rows if options.interpolate else options.n
    enough_memory(run, options.n)
    z = draw_z(run, n, options.seed, options.label)
    if options.interpolate:
        circle = 0 if run.name in STRAIGHT else run.config.z_dim
        z = between(*z.chunk(2), torch.linspace(0, 1, columns), circle).flatten(0, 1)
    return samples(run, z, options.batch_size, "G")


def enough_memory(run, n):
    """MemoryError if n samples and their z are more than all memory; asking for it could end the process."""
    size = 4 * run.config.z_dim + 2 * math.prod(run.config.shape)
    if hasattr(os, "sysconf") and n * size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise MemoryError


def reconstructed(run, options):
    """Pairs x, G(E(x)) of the given files or else of test items: (N, 2, …) in the form of runs.samples."""
    if options.reconstruct:
        x = torch.stack([read_file(path, run.config) for path in options.reconstruct])
    else:
        x, _ = load_split(run, "test", options.data_dir)
        x = x[: options.n]
    return torch.stack([x, reconstructions(run, x, options.batch_size, "G(E(x))")], dim=1)


def read_file(path, config):
    """A picture file as bytes of the run's shape, (C, S, S); ValueError if it cannot be read.

    One of 28×28 is padded with black if the run's data set was.
    """
    from PIL import Image

    channels, size, _ = config.shape
    try:
        with Image.open(path, formats=FORMATS) as picture:
            padded = picture.size == (28, 28) and config.dataset in PADDED
        picture = read_picture(path, 28 if padded else size)
    except Exception as error:  # a broken picture can make Pillow raise anything
        raise ValueError(f"{path} cannot be read as a picture ({error})") from error
    if channels == 1:
        picture = np.asarray(Image.fromarray(picture.transpose(1, 2, 0)).convert("L"))[None]
    x = torch.from_numpy(picture.copy())[None]
    return resize(torch.nn.functional.pad(x, (2, 2, 2, 2)) if padded else x, size)[0]


def write(x, out):
    """Into a grid for a name in .png, an array for .npz, else one PNG for each item in the folder `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        save_grid(as_float(x), out, COLUMNS)
    elif out.suffix == ".npz":
        x = x.movedim(-3, -1) if x.dtype == torch.uint8 else x
        with open(f"{out}.tmp", "wb") as file:
            np.savez(file, x.numpy())
        os.replace(f"{out}.tmp", out)
    else:
        out.mkdir(exist_ok=True)
        for i, item in enumerate(tqdm(x, "writing", disable=None, leave=False)):
            save_grid(as_float(item[None]), out / f"{i:06d}.png", 2 if item.dim() == 4 else 1)


def refusal(run, options):
    """Why the flags do not fit the run, or None."""
    file = options.out.suffix in (".png", ".npz")
    if options.reconstruct is not None and not run.has("encode"):
        return f"{run.path} has no encoder: {run.name} does not reconstruct"
    if options.label is not None and not run.labels:
        return f"{run.path}: samples of {run.name} cannot be asked for by a label"
    if options.label is not None and options.label >= run.labels:
        return f"--label {options.label}: {run.path} has {run.labels}, 0 … {run.labels - 1}"
    if not run.images and options.reconstruct:
        return f"{run.path} is of points: it cannot reconstruct picture files"
    if options.out.suffix.lower() in SUFFIXES and not file:
        return f"--out {options.out}: a grid is a name in .png, an array in .npz; others are folders"
    if not run.images and not file:
        return f"{run.path} is of points: --out takes a name in .png, for their density, or in .npz"
    if not file and options.out.is_dir() and any(options.out.iterdir()):
        return f"{options.out} is not empty: choose another --out, as its files would count as samples"
    return None
