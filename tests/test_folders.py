"""common.py: folders of pictures and CelebA, how pictures are decoded, and the cache."""

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest
import torch

import common

SPLITS = ("train", "validation", "test")


def load(name, data_dir, split="train", image_size=32):
    return common.load_data(str(name), data_dir, split, image_size, "cpu")


def everything(folder, data_dir, image_size=32):
    """x and y of the training and the test split; with fewer than ten pictures there is no other."""
    parts = [load(folder, data_dir, split, image_size) for split in ("train", "test")]
    return [None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def refusal(kind, *args):
    """The one line with which load(*args) fails."""
    with pytest.raises(kind) as error:
        load(*args)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def write(path, pixels, **options):
    """Make a picture of an array, or of one colour in 40×40."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, int | tuple):
        mode = "L" if isinstance(pixels, int) else ("RGB", "RGBA")[len(pixels) - 3]
        picture = PIL.Image.new(mode, (40, 40), pixels)
    else:
        picture = PIL.Image.fromarray(pixels)
    picture.save(path, **options)


def write_folder(folder, n, classes=("ant", "bee")):
    """n pictures, for each class in turn: picture i has 10·i in red, class k has 50·k in green."""
    for i in range(n):
        k = i % len(classes)
        write(folder / classes[k] / f"{i:02}.png", (10 * i, 50 * k, 7))
    return folder


def reds(x):
    return sorted(x[:, 0, 0, 0].tolist())


# Splits and classes


def test_the_splits_of_a_folder_are_disjoint_cover_it_and_stay_the_same(tmp_path):
    folder = write_folder(tmp_path / "pictures", 21)
    parts = {split: load(folder, tmp_path / "data", split) for split in SPLITS}
    assert [len(x) for x, _ in parts.values()] == [18, 1, 2]
    x, y = (torch.cat(tensors) for tensors in zip(*parts.values(), strict=True))
    assert x.dtype == torch.uint8 and x.shape == (21, 3, 32, 32) and reds(x) == list(range(0, 210, 10))
    assert y.dtype == torch.int64 and torch.equal(x[:, 1, 0, 0], (50 * y).byte())
    # Shuffled before the tenth is taken, or the test split would be the end of the last class.
    assert y.tolist() != sorted(y.tolist())
    assert reds(load(folder, tmp_path / "other", "test", 64)[0]) == reds(parts["test"][0])


def test_loading_a_folder_leaves_the_global_generator_alone(tmp_path):
    state = torch.get_rng_state()
    load(write_folder(tmp_path / "pictures", 20), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_picture_or_two_still_train(tmp_path):
    x, y = everything(write_folder(tmp_path / "two", 2), tmp_path)
    assert reds(x) == [0, 10] and len(y) == 2
    assert reds(everything(write_folder(tmp_path / "one", 1), tmp_path)[0]) == [0, 0]
    assert "validation" in refusal(ValueError, tmp_path / "one", tmp_path, "validation")


def test_classes_are_the_top_level_folders_in_sorted_order(tmp_path):
    for k, name in enumerate(["Zebra", "ant", "bee/left", "bee/right"]):
        write(tmp_path / "pictures" / name / "x.png", (0, 50 * min(k, 2), 7))
    (tmp_path / "pictures" / "notes").mkdir()
    (tmp_path / "pictures" / "notes" / "read.txt").write_text("not a picture")
    x, y = everything(tmp_path / "pictures", tmp_path)
    assert sorted(y.tolist()) == [0, 1, 2, 2] and torch.equal(x[:, 1, 0, 0], (50 * y).byte())
    # No labels without two classes, or with pictures outside them.
    assert load(write_folder(tmp_path / "one", 4, ["ant"]), tmp_path)[1] is None
    assert load(write_folder(tmp_path / "flat", 4, ["."]), tmp_path)[1] is None
    write(write_folder(tmp_path / "loose", 4) / "a.png", 0)
    assert load(tmp_path / "loose", tmp_path)[1] is None


def test_a_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_folder(tmp_path / "pictures", 2)
    load("~/pictures", "~/data")
    assert (tmp_path / "data" / "cache").is_dir()


def test_an_empty_folder(tmp_path):
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    (tmp_path / "pictures" / "read.txt").write_text("no picture")
    message = refusal(ValueError, tmp_path / "pictures", tmp_path)
    assert str(tmp_path / "pictures") in message and ".png" in message


# Links


def test_each_picture_counts_once_however_links_lead_to_it(tmp_path):
    folder = write_folder(tmp_path / "pictures", 8)
    expected = load(folder, tmp_path)[0]
    (folder / "ant" / "up").symlink_to("..")
    (folder / "bee" / "self").symlink_to(".")
    (folder / "aaa").symlink_to("bee")  # no class, although it comes first
    (folder / "zzz").symlink_to("ant")
    (folder / "ant" / "00 again.png").symlink_to("../bee/01.png")
    x, y = everything(folder, tmp_path)
    assert reds(x) == list(range(0, 80, 10)) and torch.equal(x[:, 1, 0, 0], (50 * y).byte())
    assert torch.equal(load(folder, tmp_path)[0], expected)


def test_links_to_elsewhere_are_followed(tmp_path):
    write_folder(tmp_path / "elsewhere", 8)
    (tmp_path / "pictures").mkdir()
    for link, target in (("one", "ant"), ("two", "bee"), ("two again", "bee")):
        (tmp_path / "pictures" / link).symlink_to(tmp_path / "elsewhere" / target)
    x, y = everything(tmp_path / "pictures", tmp_path)
    assert reds(x) == list(range(0, 80, 10)) and torch.equal(x[:, 1, 0, 0], (50 * y).byte())


def test_what_is_no_file_is_no_picture(tmp_path):
    folder = write_folder(tmp_path / "pictures", 2)
    (folder / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "ant" / "itself.png").symlink_to("itself.png")
    (folder / "ant" / "zero.png").symlink_to("/dev/zero")
    (folder / "ant" / "folder.png").mkdir()
    os.mkfifo(folder / "ant" / "pipe.png")
    assert len(everything(folder, tmp_path)[0]) == 2


# Decoding


def test_all_usual_formats_are_found_whatever_their_case(tmp_path):
    suffixes = ["jpg", "JPEG", "png", "BMP", "gif", "webp", "tif", "TIFF", "ppm", "pgm", "Png"]
    for i, suffix in enumerate(suffixes):
        write(tmp_path / "pictures" / "deep" / f"{i}" / f"a.{suffix}", 20 * i)
    (tmp_path / "pictures" / "read.md").write_text("not a picture")
    write(tmp_path / "pictures" / ".hidden.png", 255)
    x = everything(tmp_path / "pictures", tmp_path)[0]
    assert len(x) == len(suffixes) - 1  # a tenth of the ten that are not the test split is validation
    x = torch.cat([x, load(tmp_path / "pictures", tmp_path, "validation")[0]])
    assert all(abs(a - 20 * i) <= 2 for i, a in enumerate(reds(x)))


def test_a_folder_of_grey_pictures_has_one_channel(tmp_path):
    folder = tmp_path / "pictures"
    write(folder / "a.png", 10)
    write(folder / "b.png", (20, 20, 20))
    write(folder / "c.jpg", (30, 30, 30))
    x = everything(folder, tmp_path)[0]
    assert x.shape == (3, 1, 32, 32) and reds(x) == [10, 20, 30]
    write(folder / "d.png", (20, 20, 21))
    assert everything(folder, tmp_path)[0].shape == (4, 3, 32, 32)


def decoded(tmp_path, pixels, image_size=32, name="a.png", **options):
    """One picture as load_data gives it."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    write(folder / name, pixels, **options)
    return load(folder, tmp_path, "train", image_size)[0][0]


def test_pictures_are_cropped_to_their_middle_square_and_resized(tmp_path):
    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, 30:60] = (200, 100, 0)
    for pixels in (wide, wide.swapaxes(0, 1).copy()):
        for image_size in (16, 30, 64):
            x = decoded(tmp_path, pixels, image_size)
            # The filter looks a few pixels beyond the edge of the crop.
            inner = slice(image_size // 4, -image_size // 4)
            assert x.shape == (3, image_size, image_size) and x[0].min() > 100
            assert (x[:, inner, inner].flatten(1) == torch.tensor([[200], [100], [0]])).all()


def test_sizes_are_exact_averaged_and_the_same_from_a_large_jpeg(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    assert np.array_equal(decoded(tmp_path, pixels).permute(1, 2, 0), pixels)
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert (decoded(tmp_path, stripes).float() - 127.5).abs().max() < 6
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    ramps = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[:1]), axis=-1)
    jpeg, png = (decoded(tmp_path, ramps, name=name).float() for name in ("a.jpg", "a.png"))
    assert (jpeg - png).abs().max() < 6


def test_orientation_sixteen_bits_and_transparency(tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° clockwise to see it upright
    x = decoded(tmp_path, pixels, exif=exif)[0]
    assert (x[:, 18:] == 255).all() and (x[:, :14] == 0).all()
    assert (decoded(tmp_path, np.full((32, 32), 257 * 100, np.uint16)) == 100).all()
    assert (decoded(tmp_path, np.full((32, 32), 10**6, np.int32), name="a.tif") == 255).all()
    assert (decoded(tmp_path, (200, 0, 0, 0)) == 255).all()  # transparent becomes white
    assert decoded(tmp_path, (200, 3, 5, 255))[:, 9, 9].tolist() == [200, 3, 5]


@pytest.mark.parametrize("padding", [0, 12_000])
def test_pictures_beyond_one_chunk_stay_in_order(padding, tmp_path, monkeypatch):
    """Small files are read one after the other, large ones by several threads."""
    folder, threads, read_picture = tmp_path / "pictures", set(), common.read_picture
    folder.mkdir()

    def noted(*args):
        threads.add(threading.current_thread())
        return read_picture(*args)

    monkeypatch.setattr(common, "read_picture", noted)
    for i in range(600):
        pixels = bytes([i % 250, i // 250, i % 7]) * 4
        (folder / f"{i}.ppm").write_bytes(b"P6 2 2 255\n" + pixels + bytes(padding))
    (folder / "broken.ppm").write_bytes(b"P6 2 2 255\n")
    parts = [load(folder, tmp_path, split, 2)[0] for split in SPLITS]
    assert [len(part) for part in parts] == [486, 54, 60]
    x = torch.cat(parts).long()
    i = x[:, 0, 0, 0] + 250 * x[:, 1, 0, 0]
    assert sorted(i.tolist()) == list(range(600)) and torch.equal(x[:, 2, 1, 1], i % 7)
    assert (threading.main_thread() in threads) == (padding == 0)


@pytest.mark.parametrize("image_size", [32, 64])
def test_celeba_takes_the_middle_square_of_its_partition(image_size, tmp_path):
    faces = tmp_path / "celeba" / "img_align_celeba"
    partition = faces.parent / "list_eval_partition.txt"
    for i in range(6):
        picture = np.zeros((218, 178, 3), np.uint8)
        picture[20:198] = (10 * i, 100, 50)
        write(faces / f"{i:06}.jpg", picture, quality=100, subsampling=0)
    partition.write_text("".join(f"{i:06}.jpg {part}\n" for i, part in enumerate([0, 0, 1, 0, 2, 2])))
    for split, expected in (("train", [0, 10, 30]), ("test", [40, 50])):
        x, y = load("celeba", tmp_path, split, image_size)
        assert x.shape == (len(expected), 3, image_size, image_size) and y is None
        # The black bars above and below the square are cut off.
        assert x[:, 1].min() > 90
        assert (x[:, 0].float().mean((1, 2)) - torch.tensor(expected)).abs().max() < 3
    # A part of it is not taken for the whole.
    (faces / "000003.jpg").unlink()
    message = refusal(ValueError, "celeba", tmp_path)
    assert str(faces) in message and "1 of 3" in message and "delete" in message
    partition.write_bytes(b"<html>\xff Too many users have viewed this file</html>")
    message = refusal(ValueError, "celeba", tmp_path)
    assert str(partition) in message and "delete" in message


# Broken pictures


def break_pictures(folder):
    """Four files that cannot be read, among what else is in the folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("text.jpg", "empty.png", "eps.png", "half.jpg")]
    paths[0].write_text("<html>not found</html>")
    paths[1].write_bytes(b"")
    paths[2].write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n")
    noise = np.random.default_rng(0).integers(256, size=(60, 60, 3), dtype=np.uint8)
    write(paths[3], noise)
    paths[3].write_bytes(paths[3].read_bytes()[:1500])
    return paths


def test_broken_pictures_are_named_and_counted(tmp_path, capsys, monkeypatch):
    ghostscript = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *args: ghostscript.append(args))
    broken = break_pictures(write_folder(tmp_path / "pictures", 9) / "bee")
    x, y = load(tmp_path / "pictures", tmp_path)
    output = capsys.readouterr()
    *lines, last = output.err.splitlines()
    assert output.out == "" and ghostscript == []
    for path in broken:
        assert sum(str(path) in line and "skipped" in line for line in lines) == 1
    assert "4 of 13" in last and "skipped" in last
    # A later run does not decode, and still says so.
    x, y = everything(tmp_path / "pictures", tmp_path)
    assert reds(x) == list(range(0, 90, 10)) and torch.equal(x[:, 1, 0, 0], (50 * y).byte())
    output = capsys.readouterr()
    assert output.err.count("\n") == 2 and output.err.count("4 of 13") == 2
    listed = json.loads(Path(re.search(r"\S+skipped\.json", output.err)[0]).read_text())
    assert sorted(tmp_path / "pictures" / name for name in listed) == sorted(broken)


ERRORS = [OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, KeyError, IndexError]
ERRORS += [OverflowError, ZeroDivisionError, zlib.error, struct.error, MemoryError, RecursionError]


def test_whatever_a_picture_raises_it_is_skipped_but_for_ctrl_c(tmp_path, capsys, monkeypatch):
    errors, read_picture = dict(enumerate(ERRORS)), common.read_picture
    folder = write_folder(tmp_path / "pictures", len(errors) + 2)

    def fail(path, image_size):
        if int(path.stem) in errors:
            raise errors[int(path.stem)]()
        warnings.warn("corrupt EXIF data", stacklevel=1)  # only a warning: the picture is used
        return read_picture(path, image_size)

    monkeypatch.setattr(common, "read_picture", fail)
    assert len(everything(folder, tmp_path)[0]) == 2
    *lines, first, second = capsys.readouterr().err.splitlines()
    assert len(lines) == len(errors) and all(line.startswith("skipped ") for line in lines)
    assert any(line.endswith("00.png: OSError") for line in lines)  # where the error has no words
    errors[3] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path / "other")
    assert list((tmp_path / "other" / "cache").iterdir()) == []


def test_pictures_of_absurd_size_are_skipped_whatever_is_done_about_warnings(tmp_path, monkeypatch, capsys):
    """Pillow warns of one that is too large, and refuses what is twice as large."""
    folder = write_folder(tmp_path / "pictures", 3)
    for side in (60, 100):
        write(folder / "ant" / f"{side}.png", np.zeros((side, side), np.uint8))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 2000)
    for action in ("error", "ignore", "always"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            assert len(load(folder, tmp_path / action)[0]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 3 and any("60.png" in line and "exceeds" in line for line in lines)


def mutated(data, rng):
    """A picture file with some bytes changed, most often in its EXIF or TIFF tags, if it has any."""
    data = bytearray(data)
    for position in rng.integers(len(data), size=rng.integers(3)):
        data[position] = rng.integers(256)
    start = max(data.find(b"II*\0"), data.find(b"MM\0*"))
    if start >= 0 and rng.random() < 0.9:
        order = ">" if data[start] == ord("M") else "<"
        tags = start + struct.unpack_from(f"{order}I", data, start + 4)[0]
        if tags + 2 < len(data):
            tag = tags + 2 + 12 * int(rng.integers(6))
            struct.pack_into(
                f"{order}HI", data, min(tag + 2, len(data) - 6), rng.integers(17), rng.integers(4)
            )
    return bytes(data)


def test_fuzzed_pictures_are_decoded_or_skipped(tmp_path, capfd):
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    pixels = rng.integers(256, size=(12, 10, 3), dtype=np.uint8)
    exif = PIL.Image.Exif()
    exif.update({0x0112: 6, 0x0132: "2020", 0x011A: 72.0})
    for suffix in ("jpg", "png", "webp", "tif", "gif", "bmp", "ppm"):
        path = folder / f"good.{suffix}"
        write(path, pixels, **({"exif": exif} if suffix in ("jpg", "png", "webp") else {}))
        for i in range(120):
            (folder / f"{i}.{suffix}").write_bytes(mutated(path.read_bytes(), rng))
    n = sum(len(load(folder, tmp_path, split, 8)[0]) for split in SPLITS)
    skipped = capfd.readouterr().err.count("skipped ")
    assert n + skipped == 7 * 121 and min(n, skipped) > 100


def test_only_broken_pictures(tmp_path):
    break_pictures(tmp_path / "pictures")
    message = refusal(ValueError, tmp_path / "pictures", tmp_path)
    assert str(tmp_path / "pictures") in message and "4" in message
    assert list((tmp_path / "cache").iterdir()) == []


# The cache


@pytest.fixture
def decoding(monkeypatch):
    """The names of the files that Pillow is asked to open from here on."""
    opened, real = [], PIL.Image.open

    def note(path, *args, **kwargs):
        opened.append(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(PIL.Image, "open", note)
    return opened


def test_a_folder_is_decoded_once_until_anything_changes(tmp_path, decoding, monkeypatch, capsys):
    folder = write_folder(tmp_path / "pictures", 4)
    more, other = folder / "ant" / "more.png", folder / "ant" / "other.png"

    def decoded_anew(name=folder, image_size=32):
        decoding.clear()
        everything(name, tmp_path, image_size)
        return len(decoding)

    assert decoded_anew() == 4 and decoded_anew() == 0
    monkeypatch.chdir(tmp_path)
    assert decoded_anew("pictures") == decoded_anew("./pictures/../pictures") == 0
    write(more, (1, 2, 3))
    assert decoded_anew() == 5 and decoded_anew() == 0
    more.rename(other)
    assert decoded_anew() == 5
    os.utime(other, ns=(1, 1))
    assert decoded_anew() == 5
    other.unlink()
    assert decoded_anew() == 0 and decoded_anew(image_size=64) == 4
    folder.rename(tmp_path / "moved")
    assert decoded_anew(tmp_path / "moved") == 4
    assert capsys.readouterr() == ("", "")  # all went well: nothing is printed


def test_the_array_is_mapped_and_writing_to_it_does_not_change_the_file(tmp_path):
    folder = write_folder(tmp_path / "pictures", 4)
    x = load(folder, tmp_path)[0]
    before = x.clone()
    x.fill_(0)
    assert torch.equal(load(folder, tmp_path)[0], before)
    (cache,) = (tmp_path / "cache").iterdir()
    stored = np.load(cache / "images.npy")
    assert stored.shape == (4, 3, 32, 32) and np.array_equal(stored[:3], before)


def test_what_a_killed_run_leaves_is_not_taken_for_a_cache(tmp_path, monkeypatch, decoding):
    folder = write_folder(tmp_path / "pictures", 4)

    def kill(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # Killed at the last moment, all written but not renamed, and nothing cleans up.
        patch.setattr(os, "replace", kill)
        patch.setattr(tempfile.TemporaryDirectory, "cleanup", lambda self: self._finalizer.detach())
        with pytest.raises(KeyboardInterrupt):
            load(folder, tmp_path)
    assert any((tmp_path / "cache").rglob("images.npy"))
    assert len(load(folder, tmp_path)[0]) == 3 and len(decoding) == 8


def test_two_processes_can_decode_the_same_folder_at_once(tmp_path):
    folder = write_folder(tmp_path / "pictures", 4)
    # Each waits, all decoded, until the other is as far.
    code = f"""if True:
        import os, pathlib, time, numpy, common
        save, folder = numpy.save, pathlib.Path({str(tmp_path)!r})
        def wait(*args):
            save(*args)
            (folder / f"{{os.getpid()}}.here").touch()
            while len(list(folder.glob("*.here"))) < 2:
                time.sleep(0.01)
        numpy.save = wait
        x, y = common.load_data({str(folder)!r}, folder, "train", 32, "cpu")
        print(len(x))"""
    command = [sys.executable, "-c", code]
    options = {"cwd": Path(common.__file__).parent, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["3\n", "3\n"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("file", ["images.npy", "skipped.json"])
@pytest.mark.parametrize("how", ["truncated", "empty", "missing"])
def test_a_damaged_cache_is_named(file, how, tmp_path):
    folder = write_folder(tmp_path / "pictures", 4)
    load(folder, tmp_path)
    (cache,) = (tmp_path / "cache").iterdir()
    data = (cache / file).read_bytes()
    (cache / file).write_bytes(data[:-1] if how == "truncated" else b"")
    if how == "missing":
        (cache / file).unlink()
    message = refusal(ValueError, folder, tmp_path)
    assert str(cache) in message and "delete" in message


def test_no_room_for_the_cache(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pictures", 4)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        message = refusal(OSError, folder, tmp_path)
    assert all(part in message for part in (str(tmp_path / "cache"), "No space left", "--data-dir"))
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("not a folder")
    assert "--data-dir" in refusal(OSError, folder, tmp_path / "file")
