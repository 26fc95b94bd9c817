"""The command line: a user's mistake is one line on stderr and exit code 2, and changes nothing.

What is the same in every file is tested on one; a model's own flags and networks on each.
"""

import argparse
import os
import pickle
import re
import shutil
import signal
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import MODELS, NEED_LABELS, SOLO, checkpoint, files, run_main, run_stops
from PIL import Image
from tqdm import tqdm

COMMON = ["--dataset", "--data-dir", "--image-size", "--out", "--resume", "--steps", "--batch-size"]
COMMON += ["--z-dim", "--width", "--network", "--lr", "--decay-start", "--decay-end", "--seed", "--device"]
COMMON += ["--log-every", "--sample-every", "--save-every"]
MAY_CHANGE = ["--steps", "--device", "--data-dir", "--log-every", "--sample-every", "--save-every"]
PATHS = ["--dataset", "--data-dir", "--out", "--resume"]
SETS = ["glyphs", "mnist", "fashion_mnist", "cifar10", "celeba", "ring", "grid", "swissroll"]
TINY = ["--device", "cpu", "--width", 2, "--batch-size", 4, "--steps", 1]
POINTS = ["--dataset", "ring", *TINY]

each = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own, which is home, too."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    yield tmp_path / "here"
    getattr(tqdm, "_instances", set()).clear()  # bars that a stopped run left open


@pytest.fixture
def refused(here, capsys):
    """refused(model, *flags) → the one line on stderr with which the script ends, nothing being changed."""

    def refused(model, *flags, code=2):
        before = files(here)
        capsys.readouterr()
        run_stops(code, model, *flags)
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if not line.startswith("no GPU")]
        assert len(lines) == 1 and lines[0].startswith(f"{model}.py: ") and said.out == "", said
        assert files(here) == before
        return lines[0]

    return refused


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(model) → the folder of a finished run; copy it to change it."""
    made = {}

    def finished(model):
        if model not in made:
            made[model] = tmp_path_factory.mktemp(model) / "run"
            run_main(model, *POINTS, "--out", made[model])
        return made[model]

    return finished


@pytest.fixture
def copied(finished, here):
    """copied(model) → a finished run in the present folder."""
    return lambda model: Path(shutil.copytree(finished(model), here / "run")).relative_to(here)


@pytest.fixture
def resume_refused(refused):
    """resume_refused(*flags) → the line with which SOLO refuses to go on with the run in this folder."""
    return lambda *flags: refused(SOLO, "--resume", "run", "--steps", 9, "--device", "cpu", *flags)


def flags_of(model):
    """argparse's description of a model's flags, in the order of the help."""
    parsers, parse_args = [], argparse.ArgumentParser.parse_args

    def noted(self, *args):
        parsers.append(self)
        return parse_args(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", noted)
        import_module(model).parse_args([])
    return [action for action in parsers[0]._actions if action.dest != "help"]


def own_flags(model):
    return [flag for flag in flags_of(model) if flag.option_strings[0] not in COMMON]


# Data that are not there, or broken


def test_an_unknown_data_set_lists_the_known_ones(refused):
    line = refused(SOLO, "--dataset", "minst", *TINY)
    assert "minst" in line and all(name in line for name in SETS)


def test_an_empty_folder(refused, here):
    (here / "nothing").mkdir()
    (here / "nothing" / "notes.txt").write_text("no picture")
    assert "nothing" in refused(SOLO, "--dataset", "nothing", *TINY)


def test_a_broken_picture_among_good_ones_is_named_skipped_and_counted(here, capsys):
    (here / "pictures").mkdir()
    for i in range(5):
        Image.new("RGB", (20, 20), (200, 100, 50)).save(here / "pictures" / f"{i}.png")
    (here / "pictures" / "broken.png").write_bytes(b"\x89PNG no more than that")
    run_main(SOLO, "--dataset", "pictures", "--image-size", 8, *TINY)
    text = capsys.readouterr().err
    assert "broken.png" in text and re.search(r"\b1 of 6\b", text) and "Traceback" not in text
    assert checkpoint(f"runs/{SOLO}-pictures")["step"] == 1


def test_only_broken_pictures(here, capsys):
    """A line for each picture, and the one that ends the run."""
    for name in ("a.png", "b.jpg"):
        (here / name).write_text("<html>not a picture</html>")
    run_stops(2, SOLO, "--dataset", here, *TINY)
    text = capsys.readouterr().err
    (line,) = [line for line in text.splitlines() if line.startswith(f"{SOLO}.py: ")]
    assert str(here) in line and "Traceback" not in text
    assert not (here / "runs").exists()


def test_a_damaged_file_of_a_data_set_is_named(refused, here):
    raw = here / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for kind in ("images-idx3", "labels-idx1"):
        (raw / f"train-{kind}-ubyte").write_bytes(b"<!DOCTYPE html><html>Not here any more</html>")
    assert "train-images-idx3-ubyte" in refused(SOLO, "--dataset", "mnist", *TINY)


@pytest.mark.parametrize("model", NEED_LABELS)
def test_a_model_that_needs_labels_says_so(model, refused):
    assert "swissroll" in (line := refused(model, *TINY, "--dataset", "swissroll")) and "labels" in line


# Sizes


def no_data(*args):
    raise AssertionError("data were read")


@pytest.mark.parametrize("size", [1, 4, 20, 30, 48, 100])
def test_an_image_size_that_a_conv_network_cannot_take(size, refused, monkeypatch):
    """It is found before the data are read, which takes minutes for some."""
    monkeypatch.setattr(import_module(SOLO), "load_data", no_data)
    line = refused(SOLO, "--image-size", size, *TINY)
    assert f"--image-size {size}:" in line and "32" in line and "64" in line and "mlp" in line


@each
def test_sizes_that_a_models_networks_cannot_take(model, refused, monkeypatch):
    monkeypatch.setattr(import_module(model), "load_data", no_data)
    assert "--image-size 30:" in refused(model, "--image-size", 30, *TINY)
    refused(model, "--network", "conv", *POINTS)


# Flags


def values_that_make_no_sense(flag):
    bad = ["x", "", "-7", "nan", "inf", str(2**64)]
    return bad + (["1.5", "1e3"] if flag.type is int else ["-inf"])


@each
def test_numbers_that_make_no_sense(model, refused):
    """Every flag that takes a number, so that a model's own are not forgotten."""
    for flag in flags_of(SOLO) if model == SOLO else own_flags(model):
        if flag.type in (int, float):
            name = flag.option_strings[0]
            for value in values_that_make_no_sense(flag):
                assert name in refused(model, *POINTS, f"{name}={value}"), (name, value)
            least = import_module(model).LEAST.get(flag.dest)
            if least != 0:
                assert name in refused(model, *POINTS, name, 0)
            if least not in (None, 0):
                assert name in refused(model, *POINTS, name, least - 1)


def test_the_least_of_batch_and_seed(refused):
    """Batch norm has no variance in a batch of one."""
    assert "--batch-size 1 is too small" in refused(SOLO, *POINTS, "--batch-size", 1)
    assert import_module(SOLO).parse_args(["--batch-size", "2", "--seed", "0"]).seed == 0


@each
def test_an_unknown_choice(model, refused):
    for flag in flags_of(SOLO) if model == SOLO else own_flags(model):
        if flag.choices:
            line = refused(model, *POINTS, flag.option_strings[0], "nosuch")
            assert "nosuch" in line and all(str(choice) in line for choice in flag.choices)


def test_an_unknown_flag(refused):
    assert "--no-such-flag" in refused(SOLO, "--no-such-flag", 3)
    assert "stray" in refused(SOLO, *POINTS, "stray")
    assert "--steps" in refused(SOLO, "--dataset", "ring", "--steps")


@pytest.mark.parametrize(
    "model, name", [*((SOLO, name) for name in PATHS), ("gm_wae", "--init"), (SOLO, "--steps")]
)
@pytest.mark.parametrize("value", ["=", "=--", "=~nosuchuser/x"])
def test_a_flag_without_a_value(model, name, value, refused):
    """As an unset shell variable gives it: neither a new run starts nor is the working directory read."""
    assert name in refused(model, *POINTS, name + value)


def test_home_may_be_written_as_a_tilde(here):
    run_main(SOLO, *POINTS, "--out", "~/deep/run", "--data-dir", "~/data")
    config = checkpoint(here / "deep" / "run")["config"]
    assert config["data_dir"] == str(here / "data")
    run_main(SOLO, "--resume", "~/deep/run", "--steps", 2, "--device", "cpu")
    assert checkpoint(here / "deep" / "run")["step"] == 2
    assert import_module(SOLO).parse_args(["--dataset", "~/x"]).dataset == str(here / "x")
    assert import_module("gm_wae").parse_args(["--init", "~/x"]).init == str(here / "x")
    assert not (here / "~").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu(refused):
    assert "--device" in refused(SOLO, *POINTS, "--device", "cuda")


@each
def test_help_lists_the_common_flags_first(model, capsys):
    run_stops(0, model, "--help")
    said = capsys.readouterr()
    listed = re.findall(r"^  (--[a-z-]+)", said.out, re.MULTILINE)
    assert said.err == "" and listed[: len(COMMON)] == COMMON and len(set(listed)) == len(listed)
    for flag in flags_of(model):
        assert flag.help, flag.option_strings
        assert flag.type is not bool, "pitfall 27: bool('False') is True"


# Defaults


@each
def test_defaults(model):
    module = import_module(model)
    config = module.parse_args(["--device", "cpu"])
    assert (config.dataset, config.image_size, config.network) == ("glyphs", 32, "conv")
    assert (config.data_dir, config.out, config.resume) == ("data", f"runs/{model}-glyphs", None)
    assert (config.seed, config.log_every, config.sample_every, config.save_every) == (0, 50, 500, 1000)
    assert None not in (config.lr, config.z_dim, config.width, config.batch_size)
    assert vars(config).keys() >= module.DEFAULTS.keys() | module.LEAST.keys()
    points = vars(module.parse_args(["--dataset", "grid"]))
    assert points["network"] == "mlp" and points == points | module.ON_POINTS


def test_where_a_run_goes():
    parse_args = import_module(SOLO).parse_args
    assert parse_args(["--dataset", "mnist"]).out == f"runs/{SOLO}-mnist"
    assert parse_args(["--dataset", "some/where/pictures/"]).out == f"runs/{SOLO}-pictures"
    assert parse_args(["--dataset", "mnist", "--out", "there"]).out == "there"


@pytest.mark.parametrize("dataset", ["ring", "grid", "swissroll"])
def test_points_have_defaults_of_their_own(dataset):
    parse_args = import_module(SOLO).parse_args
    config = parse_args(["--dataset", dataset])
    assert (config.network, config.z_dim, config.batch_size) == ("mlp", 2, 256)
    chosen = parse_args(["--dataset", dataset, "--z-dim", "5", "--batch-size", "9"])
    assert (chosen.network, chosen.z_dim, chosen.batch_size) == ("mlp", 5, 9)


def test_wgan_has_the_settings_of_its_algorithm():
    config = import_module("wgan").parse_args([])
    assert (config.lr, config.clip, config.critic_steps, config.batch_size) == (5e-5, 0.01, 5, 64)


def test_defaults_of_the_data_set_survive_resuming(copied):
    """--resume names no data set: the run's flags must not fall back to those for pictures."""
    run = copied(SOLO)
    before = checkpoint(run)["config"]
    run_main(SOLO, "--resume", run, "--steps", 2, "--device", "cpu")
    after = checkpoint(run)["config"]
    assert after == before | {"steps": 2}
    assert (after["network"], after["z_dim"], after["batch_size"]) == ("mlp", 2, 4)


# Folders that cannot be used


@pytest.mark.parametrize("out", ["file", "file/run", "file/deeper/run"])
def test_an_output_path_that_cannot_be_written(out, refused, here):
    (here / "file").write_text("a file")
    assert "file" in refused(SOLO, *POINTS, "--out", out)


@pytest.mark.parametrize("file", ["config.json", f"{SOLO}.py", ".hidden", "folder/"])
def test_a_folder_that_is_no_run_and_not_empty(file, refused, here):
    """`--out .` must not replace somebody's files."""
    (here / file).mkdir() if file.endswith("/") else (here / file).write_text("{}")
    line = refused(SOLO, *POINTS, "--out", ".")
    assert "not empty" in line and "--out" in line


def test_an_empty_folder_may_be_written_into(here):
    (here / "there").mkdir()
    run_main(SOLO, *POINTS, "--out", "there")
    assert checkpoint("there")["step"] == 1


def test_an_output_folder_that_holds_a_run(refused, copied):
    line = refused(SOLO, *POINTS, "--out", copied(SOLO))
    assert "--resume" in line and "--out" in line and "run" in line


# Checkpoints that cannot be resumed


def test_a_missing_a_damaged_a_foreign_and_another_models_checkpoint(refused, copied, resume_refused):
    """Four sentences."""
    path = copied(SOLO) / "checkpoint.pt"
    whole, said = path.read_bytes(), []
    path.write_bytes(whole[:-100])
    said.append(resume_refused())
    torch.save({"weights": torch.zeros(3)}, path)
    said.append(resume_refused())
    path.write_bytes(whole)
    torch.save(checkpoint("run") | {"model": "wgan"}, path)
    said.append(resume_refused())
    path.unlink()
    said.append(resume_refused())
    assert all("run/checkpoint.pt" in line for line in said)
    words = ["damaged", f"not written by {SOLO}.py", "by wgan.py", "No such file"]
    assert [[word in line for word in words] for line in said] == torch.eye(4, dtype=bool).tolist()


@pytest.mark.parametrize("run", ["empty", "missing", "file"])
def test_resuming_what_is_no_run(run, refused, here):
    (here / "empty").mkdir()
    (here / "file").write_text("a file")
    assert run in refused(SOLO, "--resume", run, "--device", "cpu")


@pytest.mark.parametrize("part", [0, 1, 100, 0.5, 0.99])
def test_resuming_a_truncated_checkpoint(part, resume_refused, copied):
    path = copied(SOLO) / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part if part >= 1 else part * len(whole))])
    assert "checkpoint.pt is damaged" in resume_refused()


@pytest.mark.parametrize("content", [b"garbage", b"\x80\x02", b"PK\x03\x04" + bytes(200), bytes(5000)])
def test_resuming_garbage(content, resume_refused, copied):
    (copied(SOLO) / "checkpoint.pt").write_bytes(content)
    assert "checkpoint.pt is damaged" in resume_refused()


@pytest.mark.parametrize("foreign", [torch.zeros(3), [1, 2], {}, {"model": None}, {"config": 3}])
def test_resuming_a_foreign_file(foreign, resume_refused, copied):
    torch.save(foreign, copied(SOLO) / "checkpoint.pt")
    assert f"not written by {SOLO}.py" in resume_refused()


@pytest.mark.parametrize("key", ["model", "step", "config", "networks", "optimizers", "rng", "fixed_z"])
def test_resuming_a_checkpoint_without(key, resume_refused, copied):
    saved = checkpoint(copied(SOLO))
    del saved[key]
    torch.save(saved, "run/checkpoint.pt")
    assert f"not written by {SOLO}.py" in resume_refused()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("save", [torch.save, lambda evil, path: Path(path).write_bytes(pickle.dumps(evil))])
def test_resuming_a_checkpoint_with_code_executes_nothing(save, resume_refused, copied, here):
    saved = checkpoint(copied(SOLO))
    saved["config"]["seed"] = Evil()
    save(saved, "run/checkpoint.pt")
    assert "checkpoint.pt is damaged" in resume_refused()
    assert not (here / "executed").exists()


def test_resuming_with_a_flag_that_contradicts_the_run(refused, copied):
    """Every flag but those that may change, of a model that has flags of its own."""
    run, checked = copied("wbli"), set()
    config = checkpoint(run)["config"]
    for flag in flags_of("wbli"):
        name, now = flag.option_strings[0], config.get(flag.dest)
        if name in (*MAY_CHANGE, "--resume"):
            continue
        if flag.choices:
            value = next(choice for choice in flag.choices if choice != now)
        else:
            value = {"dataset": "grid", "out": "elsewhere"}.get(flag.dest) or now * 2 + 1
        line = refused("wbli", "--resume", run, "--steps", 9, "--device", "cpu", name, value)
        assert f"{name}: run has " in line and str(now or run) in line
        checked.add(name)
    assert len(checked) == len(flags_of("wbli")) - len(MAY_CHANGE) - 1


def test_resuming_with_the_flags_the_run_has(copied):
    """Repeating the command line, --out included, contradicts nothing, however the folder is written."""
    run = copied(SOLO)
    run_main(SOLO, *POINTS[:-2], "--out", run, "--resume", f"{run}/", "--steps", 2)
    assert checkpoint(run)["step"] == 2


# Ctrl-C before the first step


@pytest.mark.parametrize("model, when", [(SOLO, "load_data"), (SOLO, "build"), ("gm_wae", "moment_loss")])
def test_ctrl_c_while_data_are_read_or_networks_built(model, when, refused, monkeypatch):
    """Or, in gm_wae.py, while the encoder is trained beforehand: a line, no traceback, exit code 130."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(import_module(model), when, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert "stopped" in refused(model, *POINTS, code=130)
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C came out of main()")
    finally:
        signal.signal(signal.SIGINT, before)
