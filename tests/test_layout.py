"""How the files are made: limits, order, imports, and what is the same to the letter in all of them."""

import ast
import re
import sys
import unicodedata
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL = ("dcgan", "wgan", "wgan_gp", "bigan", "wbli", "gm_wae", "alpha_gan")
MODELS = [name for name in ALL if (ROOT / f"{name}.py").exists()]
TEXT = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in MODELS}
TREE = {name: ast.parse(text) for name, text in TEXT.items()}
LINES = {"gm_wae": 460, "alpha_gan": 460}  # the others 400
SECTIONS = ["# Networks", "# Objective", "# Training", "# Running"]
MAY_IMPORT = {*sys.stdlib_module_names, "torch", "numpy", "tqdm", "common"}

# What is the same wherever a file has it, and the files in which the name stands for something else.
SAME = {"conv_widths": (), "Generator": (), "Encoder": (), "Critic": (), "mlp": (), "init_weights": ()}
SAME |= {"clip_weights": (), "update": (), "save": (), "run": (), "parse_args": (), "main": ()}
SAME_STATEMENTS = {"critic_loss": (), "discriminator_loss": ("alpha_gan",)}  # their docstrings may differ
DIFF = {("wgan", "wgan_gp"): 40, ("dcgan", "wgan"): 80, ("bigan", "wbli"): 115}
COMMON = ["load_data", "sample_batch", "save_grid", "as_float"]  # the others in common.py serve these
EVERYWHERE = ["networks", "draw_z", "generate", "train", "add_flags", "run", "parse_args", "main"]

each = pytest.mark.parametrize("model", MODELS)


def definitions(model):
    """{name: node} of a file's functions and classes, and of the functions inside train()."""
    found = {}
    for node in TREE[model].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
            if node.name == "train":
                found |= {inner.name: inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def source(model, node):
    """The lines of a function or class, its decorators and comments included."""
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(TEXT[model].splitlines()[start - 1 : node.end_lineno])


def docstring_lines(tree):
    """The numbers of the lines that docstrings take."""
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def changed_lines(a, b):
    """The number of lines that a smallest `diff` of two texts marks with < or >."""
    longest = [0] * (len(b) + 1)  # of the common subsequences of what was seen of a, and b up to here
    for line in a:
        before = longest
        longest = [0]
        for j, other in enumerate(b):
            longest.append(before[j] + 1 if line == other else max(before[j + 1], longest[j]))
    return len(a) + len(b) - 2 * longest[-1]


def code(model):
    """A file's lines without its docstrings."""
    skipped = docstring_lines(TREE[model])
    return [line for i, line in enumerate(TEXT[model].splitlines(), start=1) if i not in skipped]


def own_files():
    """Every text file that belongs to the project."""
    names = [
        *ROOT.glob("*.py"),
        *ROOT.glob("*.md"),
        *ROOT.glob("*.txt"),
        *ROOT.glob("*.toml"),
        ROOT / ".ci/run",
    ]
    for folder in ("tools", "tests", "docs"):
        names += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh", ".md")]
    return [path for path in names if path.exists()]


# Each file


@each
def test_no_more_lines_than_agreed(model):
    lines = TEXT[model].splitlines()
    running = next(i for i, line in enumerate(lines) if line.startswith("# Running"))
    assert len(lines) <= LINES.get(model, 400)
    assert len(lines) - running <= 200


@each
def test_sections_in_order(model):
    """A section's title is a comment of its own, at the left edge, between two empty lines."""
    lines = ["", *TEXT[model].splitlines(), ""]
    titles = [
        line
        for before, line, after in zip(lines, lines[1:], lines[2:], strict=False)
        if line.startswith("# ") and before == after == ""
    ]
    assert [re.match(r"# \w+", title)[0] for title in titles] == SECTIONS


@each
def test_what_stands_in_which_section(model):
    starts = [next(i for i, x in enumerate(TEXT[model].splitlines(), 1) if x.startswith(s)) for s in SECTIONS]

    def section(node):
        return SECTIONS[sum(node.lineno > start for start in starts) - 1]

    found = {name: section(node) for name, node in definitions(model).items()}
    for name in (
        "critic_loss",
        "generator_loss",
        "generator_encoder_loss",
        "discriminator_loss",
        "clip_weights",
    ):
        assert found.get(name, "# Objective") == "# Objective"
    assert {name: found[name] for name in ("networks", "draw_z", "generate", "train")} == dict.fromkeys(
        ("networks", "draw_z", "generate", "train"), "# Training"
    )
    assert all(found[name] == "# Running" for name in ("run", "save", "parse_args", "main"))
    assert all(section(node) == "# Networks" for node in TREE[model].body if isinstance(node, ast.ClassDef))


@each
def test_imports(model):
    """The standard library, torch, numpy, tqdm; one line from common with at most four names."""
    modules, common = set(), []
    for node in ast.walk(TREE[model]):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
            assert "common" not in modules
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.split(".")[0])
            common += [node] if node.module == "common" else []
    assert modules <= MAY_IMPORT
    (line,) = common
    assert line in TREE[model].body and line.lineno == line.end_lineno
    assert 1 <= len(line.names) <= 4 and all(alias.asname is None for alias in line.names)


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
    found = definitions(model)
    assert [name for name in EVERYWHERE if name not in found] == []
    assert ("encode" in found) == ("features" in found)
    if model == "gm_wae":
        assert "component_probabilities" in found


@pytest.mark.parametrize("name", [*MODELS, "common"])
def test_every_public_name_is_explained(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (name != "common" or node.name in COMMON):
            assert ast.get_docstring(node), node.name


@each
def test_a_file_names_its_paper_its_differences_and_commands(model):
    text = ast.get_docstring(TREE[model])
    assert "https://" in text and "Differs from the paper" in text
    assert re.search(rf"^    python {model}\.py ", text, re.MULTILINE)


# The files side by side


def groups(same, of):
    """{what of() says of a name: the files in which it says so}, for a name and those files that have it."""
    found = {}
    for model in MODELS:
        node = definitions(model).get(same)
        if node is not None:
            found.setdefault(of(model, node), []).append(model)
    return list(found.values())


def test_the_run_part_is_the_same_to_the_letter():
    rest = {}
    for model in MODELS:
        (start,) = re.finditer(r"^def run\(", TEXT[model], re.MULTILINE)
        rest.setdefault(TEXT[model][start.start() :], []).append(model)
    assert len(rest) == 1, list(rest.values())


@pytest.mark.parametrize("name, other", SAME.items())
def test_the_same_to_the_letter(name, other):
    found = [[model for model in group if model not in other] for group in groups(name, source)]
    assert len([group for group in found if group]) <= 1, found


@pytest.mark.parametrize("name, other", SAME_STATEMENTS.items())
def test_the_same_statements(name, other):
    def statements(model, node):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        return ast.dump(node.args) + "".join(ast.dump(statement) for statement in body)

    found = [[model for model in group if model not in other] for group in groups(name, statements)]
    assert len([group for group in found if group]) <= 1, found


@pytest.mark.parametrize("pair, limit", DIFF.items())
def test_a_diff_shows_what_the_papers_differ_in(pair, limit):
    missing = [name for name in pair if name not in MODELS]
    if missing:
        pytest.skip(f"no {missing[0]}.py yet")
    assert changed_lines(*map(code, pair)) <= limit


def test_changed_lines_counts_as_diff_does():
    assert changed_lines(list("abcd"), list("abcd")) == 0
    assert changed_lines(list("abcd"), list("axcd")) == 2
    assert changed_lines(list("abcd"), list("bcde")) == 2
    assert changed_lines([], list("abc")) == 3


# The project


def test_common_offers_what_design_says():
    tree = ast.parse((ROOT / "common.py").read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(COMMON) <= names
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & {"torchvision", "PIL", *ALL}  # a model file's --help waits for its imports
    for model in MODELS:
        (line,) = (n for n in TREE[model].body if isinstance(n, ast.ImportFrom) and n.module == "common")
        assert {alias.name for alias in line.names} <= set(COMMON)


def test_requirements():
    """Pillow comes with torchvision; it may be named for the version that common.py needs."""
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    names = {re.match(r"[\w-]+", line)[0] for line in lines if line}
    assert names - {"pillow"} == {"torch", "torchvision", "numpy", "tqdm"}
    dev = (ROOT / "requirements-dev.txt").read_text()
    assert "-r requirements.txt" in dev and "pytest" in dev and "ruff" in dev


def test_no_line_is_longer_than_110():
    """As ruff counts: the hat of x̂ is a character without a width, and its own comments do not count."""
    for path in own_files():
        if path.suffix == ".py":
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                width = sum(not unicodedata.combining(c) for c in line.split("  # noqa")[0])
                assert width <= 110, f"{path}:{i}"


def test_no_path_of_one_machine():
    places = ["/" + name + "/" for name in ("work", "tmp", "home", "root", "Users")]
    for path in own_files():
        text = path.read_text(encoding="utf-8")
        assert [place for place in places if place in text] == [], path


@pytest.mark.skipif(not (ROOT / ".ci/run").exists(), reason="no .ci/run yet")
def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        (ROOT / ".ci/run").read_text(encoding="utf-8"),
    )
    command = "pip install -r requirements-dev.txt && python -m pytest"
    assert command in readme and command in ci
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_readme_knows_every_file_and_flag():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for model in MODELS:
        assert f"`{model}.py`" in readme
        flags = re.findall(r'flag\("(--[a-z-]+)"', TEXT[model])
        assert flags and [flag for flag in flags if not named(flag, readme)] == []
    assert "pip install -r requirements.txt && python " in readme


@pytest.mark.parametrize("tool", ["bench", "evaluate", "sample"])
def test_the_readme_knows_every_tool_and_flag(tool):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"python -m tools.{tool}" in readme
    for name in (tool, "runs"):
        text = (ROOT / f"tools/{name}.py").read_text(encoding="utf-8")
        flags = re.findall(r'(?:flag|add_argument)\(\s*"(--[a-z-]+)"', text)
        assert flags and [flag for flag in flags if not named(flag, readme)] == []


def named(flag, text):
    """Whether a flag stands there, not only one that begins like it."""
    return re.search(rf"(?<![\w-]){flag}(?![\w-])", text)


def test_reproduce_runs_the_readmes_commands():
    """All seven, full and quick; every command of the script stands in the README and can be parsed."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / "tools/reproduce.sh").read_text(encoding="utf-8")
    commands = re.findall(r"^ +train (\w+) (\w+)\.py (.*)$", script, re.MULTILINE)
    assert [name for name, *_ in commands] == 2 * [*ALL]
    for name, model, flags in commands:
        assert name == model and re.search(
            rf"( {{4}}|`)python {model}\.py {re.escape(flags)}(`|$)", readme, re.M
        )
        config = import_module(model).parse_args([*flags.split(), "--device", "cpu"])
        assert config.dataset == "mnist"
    assert "tools/reproduce.sh --quick" in readme


def test_pictures_of_the_documentation():
    """Each is small, shown somewhere, and there."""
    pictures = list((ROOT / "docs").glob("*.png"))
    sizes = [path.stat().st_size for path in pictures]
    assert sizes and max(sizes) < 150_000 and sum(sizes) < 2_000_000
    shown = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        shown |= {(page.parent / link).resolve() for link in links}
    assert shown == {path.resolve() for path in pictures}
