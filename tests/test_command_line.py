"""The command line: a user's mistake is one line on stderr and exit code 2, and changes nothing."""

import argparse
import gzip
import pickle
import re
import shutil
from importlib import import_module
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
ALL = ("dcgan", "wgan", "wgan_gp", "bigan", "wbli", "gm_wae", "alpha_gan")
MODELS = [name for name in ALL if (ROOT / f"{name}.py").exists()]
COMMON = [
    "--dataset",
    "--data-dir",
    "--image-size",
    "--out",
    "--resume",
    "--steps",
    "--batch-size",
    "--z-dim",
]
COMMON += [
    "--width",
    "--network",
    "--lr",
    "--seed",
    "--device",
    "--log-every",
    "--sample-every",
    "--save-every",
]
OWN = {
    "wgan": ["--critic-steps", "--clip", "--generator", "--critic"],
    "wbli": ["--critic-steps", "--constraint", "--gp-weight", "--clip"],
}
SETS = ["glyphs", "mnist", "fashion_mnist", "cifar10", "celeba", "ring", "grid", "swissroll"]
TINY = ["--device", "cpu", "--width", "2", "--batch-size", "4", "--steps", "1"]
POINTS = ["--dataset", "ring", *TINY]
SOLO = MODELS[0]  # for what is the same in every file

each = pytest.mark.parametrize("model", MODELS)


def files(folder):
    """{path: bytes, or None for a folder} of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    getattr(tqdm, "_instances", set()).clear()  # bars that a stopped run left open


@pytest.fixture
def refused(here, capsys):
    """refused(model, *flags) → the one line on stderr with which the script ends, nothing being changed."""

    def refused(model, *flags):
        before = files(here)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            import_module(model).main([str(flag) for flag in flags])
        assert stopped.value.code == 2
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"{model}.py") and said.out == "", said
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
            import_module(model).main([*POINTS, "--out", str(made[model])])
        return made[model]

    return finished


@pytest.fixture
def copied(finished, here):
    """copied(model) → a finished run in the present folder."""
    return lambda model: shutil.copytree(finished(model), here / "run").relative_to(here)


def flags_of(model):
    """argparse's description of a model's flags, in the order of the help."""
    parsers, parse_args = [], argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            argparse.ArgumentParser,
            "parse_args",
            lambda self, *args: parsers.append(self) or parse_args(self, *args),
        )
        import_module(model).parse_args([])
    return [action for action in parsers[0]._actions if action.dest != "help"]


def picture(path, colour=(200, 100, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), colour).save(path)


# Data that are not there, or broken


@each
def test_an_unknown_data_set_lists_the_known_ones(model, refused):
    line = refused(model, "--dataset", "minst", *TINY)
    assert "minst" in line and all(name in line for name in SETS)


@each
def test_an_empty_folder(model, refused, here):
    (here / "nothing").mkdir()
    (here / "nothing" / "notes.txt").write_text("no picture")
    assert "nothing" in refused(model, "--dataset", "nothing", *TINY)


def test_a_broken_picture_among_good_ones_is_named_skipped_and_counted(here, capsys):
    for i in range(5):
        picture(here / "pictures" / f"{i}.png")
    (here / "pictures" / "broken.png").write_bytes(b"\x89PNG no more than that")
    import_module(SOLO).main(["--dataset", "pictures", "--image-size", "16", *TINY])
    text = capsys.readouterr().err
    assert "broken.png" in text and re.search(r"\b1 of 6\b", text) and "Traceback" not in text
    assert torch.load(f"runs/{SOLO}-pictures/checkpoint.pt", weights_only=True)["step"] == 1


def test_only_broken_pictures(here, capsys):
    """A line for each picture, and the one that ends the run."""
    for name in ("a.png", "b.jpg"):
        (here / name).write_text("<html>not a picture</html>")
    with pytest.raises(SystemExit) as stopped:
        import_module(SOLO).main(["--dataset", str(here), *TINY])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith(f"{SOLO}.py")]
    assert len(lines) == 1 and str(here) in lines[0] and "Traceback" not in text
    assert not (here / "runs").exists()


def idx(*shape):
    header = (0x800 + len(shape)).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in shape)
    return header + bytes(torch.Size(shape).numel())


def mnist(folder, **replaced):
    raw = folder / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in (("train", 20), ("t10k", 10)):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(n, 28, 28))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx(n))
    return raw


def test_whole_mnist_files_are_taken(here):
    mnist(here)
    import_module(SOLO).main(["--dataset", "mnist", *TINY])
    assert Path(f"runs/{SOLO}-mnist/checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", ["truncated", "html", "empty", "truncated gzip", "html gzip"])
def test_a_damaged_mnist_file_is_named(name, damage, refused, here):
    path = mnist(here) / name
    whole, html = path.read_bytes(), b"<!DOCTYPE html><html><body>Not here any more</body></html>"
    contents = {"truncated": whole[:-7], "html": html, "empty": b"", "html gzip": html}
    contents["truncated gzip"] = gzip.compress(whole)[:-9]
    if damage.endswith("gzip"):
        path.unlink()
        path = path.with_name(f"{name}.gz")
    path.write_bytes(contents[damage])
    assert path.name in refused(SOLO, "--dataset", "mnist", *TINY)


def test_no_network_says_what_to_put_where(refused, monkeypatch):
    import torchvision

    def download(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    line = refused(SOLO, "--dataset", "mnist", "--data-dir", "elsewhere", *TINY)
    assert "train-images-idx3-ubyte" in line and str(Path("elsewhere/MNIST/raw")) in line
    assert "--dataset glyphs" in line and "Name or service not known" in line


@pytest.mark.parametrize("size", ["1", "4", "20", "48", "100"])
@each
def test_an_image_size_the_conv_network_cannot_take_is_told_before_data_are_read(
    model, size, refused, monkeypatch
):
    def load_data(*args):
        raise AssertionError("data were read")

    monkeypatch.setattr(import_module(model), "load_data", load_data)
    line = refused(model, "--image-size", size, *TINY)
    assert re.search(rf"\b{size}\b", line) and "32" in line and "64" in line


@each
def test_a_conv_network_for_points(model, refused):
    refused(model, "--network", "conv", *POINTS)


# Flags


@each
def test_numbers_that_make_no_sense(model, refused):
    """Every flag that takes a number, so that a model's own are not forgotten."""
    for flag in flags_of(model):
        if flag.type in (int, float):
            bad = ["x", "", "-7", "nan", "inf"] + (["1.5", "1e3"] if flag.type is int else ["-inf"])
            for value in bad:
                line = refused(model, *POINTS, f"{flag.option_strings[0]}={value}")
                assert flag.option_strings[0] in line, (flag.option_strings, value)


@each
def test_zero(model, refused):
    numbers = {flag.option_strings[0] for flag in flags_of(model) if flag.type in (int, float)} & set(COMMON)
    for name in numbers - {"--seed"}:
        assert name in refused(model, *POINTS, name, "0")
    assert import_module(model).parse_args(["--seed", "0"]).seed == 0


def test_a_batch_of_one(refused):
    """Batch norm has no variance there."""
    assert "--batch-size" in refused(SOLO, *POINTS, "--batch-size", "1")


def test_a_seed_too_large_for_pytorch(refused):
    assert "--seed" in refused(SOLO, *POINTS, "--seed", str(2**64))


@each
def test_an_unknown_flag_or_choice(model, refused):
    assert "--no-such-flag" in refused(model, "--no-such-flag", "3")
    assert "stray" in refused(model, *POINTS, "stray")
    assert "--steps" in refused(model, "--dataset", "ring", "--steps")
    for flag in flags_of(model):
        if flag.choices:
            line = refused(model, *POINTS, flag.option_strings[0], "nosuch")
            assert "nosuch" in line and all(str(choice) in line for choice in flag.choices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu(refused):
    assert "--device" in refused(SOLO, *POINTS, "--device", "cuda")


@each
def test_help_lists_the_common_flags_first_and_all_defaults(model, capsys):
    with pytest.raises(SystemExit) as stopped:
        import_module(model).main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr()
    listed = re.findall(r"^  (--[a-z-]+)", said.out, re.MULTILINE)
    assert said.err == "" and listed[: len(COMMON)] == COMMON
    assert set(listed[len(COMMON) :]) >= set(OWN.get(model, [])) and len(set(listed)) == len(listed)
    for flag in flags_of(model):
        assert flag.help, flag.option_strings


@each
def test_no_flag_is_a_bool(model):
    """Pitfall 27: bool("False") is True."""
    for flag in flags_of(model):
        assert flag.type in (None, int, float), flag.option_strings
        assert not isinstance(flag.default, bool)


# Defaults


@each
def test_defaults(model):
    config = import_module(model).parse_args(["--device", "cpu"])
    assert (config.dataset, config.image_size, config.network) == ("glyphs", 32, "conv")
    assert (config.data_dir, config.out, config.resume) == ("data", f"runs/{model}-glyphs", None)
    assert (config.model, config.seed) == (model, 0)
    assert (config.log_every, config.sample_every, config.save_every) == (50, 500, 1000)
    assert all(value is not None for name, value in vars(config).items() if name in ("lr", "z_dim", "width"))


@each
def test_where_a_run_goes(model):
    parse_args = import_module(model).parse_args
    assert parse_args(["--dataset", "mnist"]).out == f"runs/{model}-mnist"
    assert parse_args(["--dataset", "some/where/pictures/"]).out == f"runs/{model}-pictures"
    assert parse_args(["--dataset", "mnist", "--out", "there"]).out == "there"


@pytest.mark.parametrize("dataset", ["ring", "grid", "swissroll"])
@each
def test_points_have_defaults_of_their_own(model, dataset):
    module = import_module(model)
    config = module.parse_args(["--dataset", dataset])
    assert (config.network, config.z_dim) == ("mlp", 2)
    assert config.batch_size == (64 if model == "wbli" else 256)
    chosen = module.parse_args(["--dataset", dataset, "--z-dim", "5", "--batch-size", "9"])
    assert (chosen.network, chosen.z_dim, chosen.batch_size) == ("mlp", 5, 9)


@pytest.mark.skipif("wbli" not in MODELS, reason="no wbli.py yet")
def test_clipping_in_wbli_brings_the_rate_of_wgan():
    parse_args = import_module("wbli").parse_args
    gp, clip = parse_args([]), parse_args(["--constraint", "clip"])
    assert (gp.constraint, gp.lr, gp.gp_weight) == ("gp", 5e-4, 10)
    assert (clip.lr, clip.clip) == (5e-5, 0.01)
    assert parse_args(["--constraint", "clip", "--lr", "0.1"]).lr == 0.1
    assert parse_args(["--constraint", "clip", "--dataset", "ring"]).lr == 5e-5  # on points, too


@pytest.mark.skipif("wgan" not in MODELS, reason="no wgan.py yet")
def test_wgan_has_the_settings_of_its_algorithm():
    config = import_module("wgan").parse_args([])
    assert (config.lr, config.clip, config.critic_steps, config.batch_size) == (5e-5, 0.01, 5, 64)


@each
def test_defaults_of_the_data_set_survive_resuming(model, copied):
    """--resume names no data set: the run's flags must not fall back to those for pictures."""
    run = copied(model)
    before = torch.load(run / "checkpoint.pt", weights_only=True)["config"]
    import_module(model).main(["--resume", str(run), "--steps", "2", "--device", "cpu"])
    after = torch.load(run / "checkpoint.pt", weights_only=True)["config"]
    assert after == before | {"steps": 2}
    assert (after["network"], after["z_dim"], after["batch_size"]) == ("mlp", 2, 4)


# Folders that cannot be used


@pytest.mark.parametrize("out", ["file", "file/run", "file/deeper/run"])
def test_an_output_path_that_cannot_be_written(out, refused, here):
    (here / "file").write_text("a file")
    assert "file" in refused(SOLO, *POINTS, "--out", out)


@each
def test_an_output_folder_that_holds_a_run(model, refused, copied):
    line = refused(model, *POINTS, "--out", copied(model))
    assert "--resume" in line and "--out" in line and "run" in line


@each
def test_resuming_what_is_no_run(model, refused, here):
    (here / "empty").mkdir()
    (here / "file").write_text("a file")
    for run in ("empty", "missing", "file"):
        assert run in refused(model, "--resume", run, "--device", "cpu")


@pytest.mark.parametrize("part", [0, 1, 100, 0.5, 0.99])
@each
def test_resuming_a_truncated_checkpoint(model, part, refused, copied):
    run = copied(model)
    whole = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(whole[: int(part if part >= 1 else part * len(whole))])
    assert "checkpoint.pt" in refused(model, "--resume", run, "--steps", "9", "--device", "cpu")


@pytest.mark.parametrize("content", [b"garbage", b"\x80\x02", b"PK\x03\x04" + bytes(200), bytes(5000)])
def test_resuming_garbage(content, refused, copied):
    run = copied(SOLO)
    (run / "checkpoint.pt").write_bytes(content)
    assert "checkpoint.pt" in refused(SOLO, "--resume", run, "--steps", "9", "--device", "cpu")


@pytest.mark.parametrize(
    "foreign", [torch.zeros(3), [1, 2], {}, {"model": None}, {"model": SOLO, "config": 3}]
)
def test_resuming_a_foreign_file(foreign, refused, copied):
    run = copied(SOLO)
    torch.save(foreign, run / "checkpoint.pt")
    assert "checkpoint.pt" in refused(SOLO, "--resume", run, "--steps", "9", "--device", "cpu")


@pytest.mark.parametrize("key", ["model", "step", "config", "networks", "optimizers", "rng", "fixed_z"])
def test_resuming_a_checkpoint_without(key, refused, copied):
    run = copied(SOLO)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    del saved[key]
    torch.save(saved, run / "checkpoint.pt")
    assert "checkpoint.pt" in refused(SOLO, "--resume", run, "--steps", "9", "--device", "cpu")


@pytest.mark.skipif(len(MODELS) < 2, reason="one model")
def test_resuming_the_run_of_another_model(refused, copied):
    run = copied(MODELS[1])
    assert str(run) in refused(MODELS[0], "--resume", run, "--steps", "9", "--device", "cpu")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("save", [torch.save, lambda evil, path: path.write_bytes(pickle.dumps(evil))])
def test_resuming_a_checkpoint_with_code_executes_nothing(save, refused, copied, here):
    run = copied(SOLO)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    saved["config"]["seed"] = Evil()
    save(saved, run / "checkpoint.pt")
    assert "checkpoint.pt" in refused(SOLO, "--resume", run, "--steps", "9", "--device", "cpu")
    assert not (here / "executed").exists()


@each
def test_resuming_with_a_flag_that_contradicts_the_run(model, refused, copied):
    """Every flag but those that design.md lets change, so that a model's own are not forgotten."""
    run = copied(model)
    config = torch.load(run / "checkpoint.pt", weights_only=True)["config"]
    free = {"resume", "steps", "device", "data_dir", "log_every", "sample_every", "save_every", "snapshots"}
    checked = set()
    for flag in flags_of(model):
        if flag.dest in free:
            continue
        name, now = flag.option_strings[0], config.get(flag.dest)
        if flag.choices:
            value = next(choice for choice in flag.choices if choice != now)
        else:
            others = {"dataset": "grid", "out": "elsewhere", "init": "elsewhere", "components": 2}
            value = others.get(flag.dest) or now * 2 + 1
        line = refused(model, "--resume", run, "--steps", "9", "--device", "cpu", name, value)
        assert name in line and str(value) in line
        checked.add(name)
    assert checked >= set(COMMON) - {"--" + name.replace("_", "-") for name in free}
    assert checked >= set(OWN.get(model, []))


@each
def test_resuming_with_fewer_steps(model, refused, copied):
    run = copied(model)
    import_module(model).main(["--resume", str(run), "--steps", "3", "--device", "cpu"])
    assert "--steps" in refused(model, "--resume", run, "--steps", "2", "--device", "cpu")


def test_resuming_with_the_flags_the_run_has(copied):
    """Repeating the command line, --out included, contradicts nothing, however the folder is written."""
    run = copied(SOLO)
    flags = [*POINTS, "--out", str(run), "--resume", f"{run}/", "--steps", "2"]
    import_module(SOLO).main(flags)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 2


@each
@pytest.mark.parametrize("when", ["load_data", "train"])
def test_ctrl_c_before_the_first_step(model, when, refused, monkeypatch):
    """While data are read or, in gm_wae.py, the encoder is trained beforehand: a line, no traceback."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(model), when, stopped)
    assert "stopped" in refused(model, *POINTS)
