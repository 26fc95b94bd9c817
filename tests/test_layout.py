"""How the files are made: limits, order, imports, what is the same in all of them, and what the pages say."""

import ast
import re
import shutil
import subprocess
import sys
import unicodedata
from importlib import import_module

import pytest
from conftest import MODELS

from tools import sync

ROOT = sync.ROOT
TEXT = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in [*MODELS, "common"]}
TREE = {name: ast.parse(text) for name, text in TEXT.items()}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = ["# Settings", "# Networks", "# Objective", "# Training", "# Running"]
MAY_IMPORT = {*sys.stdlib_module_names, "torch", "numpy", "tqdm", "common"}
COMMON = ["load_data", "as_float", "sample_batch", "save_grid"]  # the others in common.py serve these

# Limits: lines of a file, of the run part; characters of a line; lines over 100; the mean of those not empty.
LINES, RUN_PART, LONGEST, LONG_LINES, MEAN = 500, 290, 110, 20, 55
LARGER = dict.fromkeys(["bigan", "wbli", "gm_wae", "alpha_gan", "infogan", "semi_gan", "age"], 580)
WORDY = {"alpha_gan": 56, "gm_wae": 58}  # their formulas have long names
# Lines that `diff` marks, docstrings aside.
DIFF = {
    ("wgan", "wgan_gp"): 40,
    ("dcgan", "wgan"): 80,
    ("bigan", "wbli"): 160,  # two plain mlp classes, an own initialisation, one step for all
    ("dcgan", "cgan"): 60,
    ("dcgan", "loss_sensitive_gan"): 80,
    ("dcgan", "infogan"): 90,
}

each = pytest.mark.parametrize("model", MODELS)


def functions(body):
    return [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def code(model):
    """A file's lines without its docstrings."""
    skipped = set()
    for node in ast.walk(TREE[model]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            skipped |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return [line for i, line in enumerate(TEXT[model].splitlines(), start=1) if i not in skipped]


def width(line):
    """Characters as ruff counts them: the hat of x̂ has no width, and comments to ruff do not count."""
    return sum(not unicodedata.combining(c) for c in line.split("  # noqa")[0])


def own_files():
    """Every text file that belongs to the project."""
    patterns = ["*.py", "*.md", "*.txt", "*.toml", "*.yaml", ".ci/run", ".gitignore"]
    for folder in ("tools", "experiments", "tests", "docs"):
        patterns += [f"{folder}/**/*.{suffix}" for suffix in ("py", "sh", "md", "txt", "html")]
    return [path for pattern in patterns for path in ROOT.glob(pattern)]


# Each model file


@each
def test_no_more_lines_than_agreed(model):
    lines = TEXT[model].splitlines()
    assert len(lines) <= LARGER.get(model, LINES)
    assert len(lines) - lines.index(sync.RUN_PART.strip()) <= RUN_PART


@pytest.mark.parametrize("name", TEXT)
def test_lines_that_fit_side_by_side(name):
    """They are short on the whole, few are long; names and comments pay for it, not a second statement."""
    widths = [width(line) for line in TEXT[name].splitlines() if line.strip()]
    assert sum(number > 100 for number in widths) <= LONG_LINES
    assert sum(widths) / len(widths) <= WORDY.get(name, MEAN)
    assert not re.search(r";$|; \w", "\n".join(line.split("#")[0] for line in code(name) if '"' not in line))


@each
def test_sections_in_order(model):
    """A section's title is a comment of its own, at the left edge, between two empty lines."""
    lines = ["", *TEXT[model].splitlines(), ""]
    around = zip(lines, lines[1:], lines[2:], strict=False)
    titles = [line for before, line, after in around if line.startswith("# ") and before == after == ""]
    assert [re.match(r"# \w+", title)[0] for title in titles] == SECTIONS


@each
def test_what_stands_in_which_section(model):
    lines = TEXT[model].splitlines()
    starts = [next(i for i, line in enumerate(lines, 1) if line.startswith(title)) for title in SECTIONS]

    def section(node):
        return SECTIONS[sum(node.lineno > start for start in starts) - 1]

    assigned = {node.targets[0].id: node for node in TREE[model].body if isinstance(node, ast.Assign)}
    for name in ("DEFAULTS", "ON_POINTS", "LEAST"):
        assert section(assigned[name]) == "# Settings"
    found = {node.name: section(node) for node in functions(TREE[model].body)}
    expected = {"add_flags": "# Settings"}
    expected |= dict.fromkeys(["networks", "draw_z", "generate", "build"], "# Training")
    expected |= dict.fromkeys(["train", "save", "parse_args", "main"], "# Running")
    assert {name: found.get(name) for name in expected} == expected
    for node in TREE[model].body:
        if isinstance(node, ast.ClassDef):
            assert section(node) == "# Networks"
    losses = [name for name in found if name.endswith(("_loss", "_penalty"))]
    assert losses and {found[name] for name in losses} == {"# Objective"}


@each
def test_an_objective_knows_no_device_no_settings_and_no_state(model):
    """Functions of tensors, and of a critic where a gradient is needed."""
    objective = TEXT[model].partition("\n# Objective\n")[2].partition("\n# Training\n")[0]
    assert not re.search(r"\bconfig\b|\bself\b|\.cuda\(|\.to\(|\bglobal\b", objective)


@each
def test_imports(model):
    """The standard library, torch, numpy, tqdm; one line from common with at most four names."""
    modules, common = set(), []
    for node in ast.walk(TREE[model]):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            assert "common" not in names
            modules |= names
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.split(".")[0])
            common += [node] if node.module == "common" else []
    assert modules <= MAY_IMPORT
    (line,) = common
    assert line in TREE[model].body and line.lineno == line.end_lineno
    assert 1 <= len(line.names) <= 4 and all(alias.asname is None for alias in line.names)
    assert {alias.name for alias in line.names} <= {*COMMON}


@each
def test_nothing_runs_on_import(model):
    """Docstring, imports, constants, functions, classes, and the one `if` at the end."""
    first, *body, last = TREE[model].body
    assert isinstance(first, ast.Expr) and ast.get_docstring(TREE[model])
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main()"
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            assert not any(isinstance(inner, ast.Call) for inner in ast.walk(node)), ast.unparse(node)
        else:
            assert isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


@each
def test_the_names_that_others_use(model):
    found = {node.name: node for node in functions(TREE[model].body)}
    arguments = {
        "networks": ["config"],
        "draw_z": ["n", "config", "device"],
        "generate": ["nets", "z"],
        "encode": ["nets", "x"],
        "features": ["nets", "x"],
        "classify": ["nets", "x"],
        "build": ["config", "train_set", "test_set"],
        "train": ["config", "nets", "optimizers", "iteration", "pictures", "saved", "capture"],
        "add_flags": ["flag"],
        "parse_args": ["argv"],
        "main": ["argv"],
    }
    for name, expected in arguments.items():
        if name in found:
            assert [arg.arg for arg in found[name].args.args][: len(expected)] == expected
        else:
            assert name in ("encode", "features", "classify"), f"{model}.py has no {name}"
    assert ("encode" in found) <= ("features" in found)
    if len(found["draw_z"].args.args) > 3:
        assert found["draw_z"].args.args[3].arg == "label"


@pytest.mark.parametrize("name", TEXT)
def test_every_public_name_is_explained(name):
    assert ast.get_docstring(TREE[name])
    for node in functions(TREE[name].body):
        if name != "common" or node.name in COMMON:
            assert ast.get_docstring(node), node.name


@each
def test_a_docstring_names_the_paper_and_its_differences(model):
    text = ast.get_docstring(TREE[model])
    assert "https://" in text and "Differs from the paper" in text
    assert re.search(rf"^    python {model}\.py ", text, re.MULTILINE)


# The files side by side


def test_what_is_shared_is_the_same_to_the_letter(capsys):
    with pytest.raises(SystemExit) as stopped:
        sync.main(["--check"])
    assert stopped.value.code == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", sync.SHARED_CODE)
def test_functions_with_docstrings_of_their_own_take_the_same_arguments(name):
    definitions = {model: sync.definitions(TEXT[model]).get(name) for model in MODELS}
    others = sync.SHARED_CODE[name]
    found = {ast.dump(node.args) for model, node in definitions.items() if node and model not in others}
    assert len(found) == 1


@pytest.mark.skipif(shutil.which("diff") is None, reason="no diff here")
@pytest.mark.parametrize("pair, limit", DIFF.items(), ids=["-".join(pair) for pair in DIFF])
def test_a_diff_shows_what_the_papers_differ_in(pair, limit, tmp_path):
    for name in pair:
        if name not in MODELS:
            pytest.skip(f"no {name}.py yet")
        (tmp_path / name).write_text("\n".join([*code(name), ""]), encoding="utf-8")
    found = subprocess.run(["diff", *pair], cwd=tmp_path, capture_output=True, text=True)
    assert len(re.findall(r"^[<>]", found.stdout, re.MULTILINE)) <= limit


# The project


def test_common_offers_what_design_says():
    """Public functions first, and nothing that makes a model file's --help wait; it knows no tool."""
    names = [node.name for node in functions(TREE["common"].body)]
    assert [name for name in names if name in COMMON] == names[: len(COMMON)]
    imported = set()
    for node in TREE["common"].body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & {"torchvision", "PIL", "tools", *MODELS}
    assert not re.search(r"\b(tools|experiments)\b", TEXT["common"])


def test_requirements():
    """Pillow comes with torchvision; it may be named for the version that common.py needs."""
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    names = {re.match(r"[\w-]+", line)[0] for line in lines if line}
    assert names - {"pillow"} == {"torch", "torchvision", "numpy", "tqdm"}
    dev = (ROOT / "requirements-dev.txt").read_text()
    assert "-r requirements.txt" in dev and "pytest" in dev and "ruff" in dev


def test_no_line_is_too_long():
    for path in own_files():
        if path.suffix == ".py":
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                assert width(line) <= LONGEST, f"{path}:{i}"


def test_no_path_of_one_machine():
    places = ["/" + name + "/" for name in ("work", "tmp", "home", "root", "Users")]
    for path in own_files():
        text = path.read_text(encoding="utf-8")
        assert [place for place in places if place in text] == [], path


def test_ci_and_the_hooks_run_the_commands_of_the_pages():
    ci, hooks = (ROOT / ".ci/run").read_text(), (ROOT / ".pre-commit-config.yaml").read_text()
    command = "pip install -r requirements-dev.txt && python -m pytest"
    assert command in PAGES[0].read_text(encoding="utf-8") and command in ci
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    for command in ("ruff check", "ruff format --check", "python -m tools.sync --check"):
        assert command in ci and f"entry: {command}\n" in hooks


# The pages: README.md and docs/


def prose():
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def test_the_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 160
    assert "pip install -r requirements.txt && python " in PAGES[0].read_text(encoding="utf-8")


def flags_of(path):
    return re.findall(r'(?:flag|add_argument)\(\s*"(--[a-z-]+)"', path.read_text(encoding="utf-8"))


def unnamed(flags, text):
    """Those that are not there, or only as the beginning of another."""
    return [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)]


@each
def test_the_pages_know_every_model_and_flag(model):
    flags = flags_of(ROOT / f"{model}.py")
    assert len(flags) > 15 and unnamed(flags, prose()) == []
    assert f"`{model}.py`" in PAGES[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["tools", "experiments"])
def test_the_pages_know_every_tool_and_flag(folder):
    text = prose() + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / folder).glob("*.py")):
        if "__main__" in path.read_text(encoding="utf-8"):
            assert re.search(rf"\b{folder}\.{path.stem}\b", text), path
        assert unnamed(flags_of(path), text) == [], path


@pytest.mark.parametrize("case", [*MODELS, "gm_wae --objective vae", "semi_gan --supervised"])
def test_the_pages_explain_every_number_that_is_logged(case, start):
    name, *flags = case.split()
    flags += ["--labels", "50"] if name == "semi_gan" else []
    page = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"\*\*(\S+?)\*\*", page.split("## Reading the numbers")[1]))
    run = start(import_module(name), [1, 16, 16], *flags)
    assert "…_loss" in explained
    assert {number for number in run.iteration() if not number.endswith("_loss")} <= explained


def commands():
    """[(model, flags)] of every command that the pages and docstrings show."""
    texts = [prose(), *(TEXT[model] for model in MODELS)]
    found = re.findall(r"^ {4}(?:\S.* )?(\w+)\.py( --.*)?$", "\n".join(texts), re.MULTILINE)
    return sorted({(model, flags) for model, flags in found if model in MODELS})


def test_every_command_shown_can_be_parsed():
    assert len(commands()) > 2 * len(MODELS)
    for model, flags in commands():
        words = [word for word in re.sub(r"(&&|[#>|;]).*", "", flags).split() if word != "…"]
        import_module(model).parse_args([*words, "--device", "cpu"])


def slugs(page):
    """The anchors of a page's titles, as they are made where it is shown."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://", link):
            place, _, anchor = link.partition("#")
            target = (page.parent / place).resolve() if place else page
            assert target.exists(), link
            assert not anchor or anchor in slugs(target), link


def test_pictures_of_the_documentation():
    """Each is small, shown somewhere, and there."""
    pictures = [*(ROOT / "docs").glob("*.png")]
    sizes = [path.stat().st_size for path in pictures]
    assert sizes and max(sizes) < 150_000 and sum(sizes) < 2_000_000
    shown = set()
    for page in PAGES:
        links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        shown |= {(page.parent / link).resolve() for link in links}
    assert shown == {path.resolve() for path in pictures}


def test_the_diff_in_the_readme_is_that_of_the_two_files():
    """Line by line and in order: what it takes away stands in wgan.py, what it adds in wgan_gp.py."""
    (block,) = re.findall(
        r"^```diff\n(.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    lines = [line for line in block.splitlines() if line]
    for name, mark in (("wgan", "-"), ("wgan_gp", "+")):
        rest = iter(code(name))
        shown = [line[1:] for line in lines if line[0] in (mark, " ")]
        assert len(shown) > 8 and [line for line in shown if line not in rest] == []
    assert {line[0] for line in lines} == {"-", "+", " "}
