"""tools.compare: what the page holds, and, in a headless Chromium, what it shows and how it is used."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tools import compare

ROOT = Path(__file__).parents[1]
TEXTS = compare.model_files(ROOT)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)

# A small model file, and one that differs from it in known lines.
ONE = '''"""ONE — Ada & Bob, "On one", 2001, https://example.org/one

What is minimised:

    min_G  E_x F(x)
        over all G

Differs from the paper:
    batch norm   none
    size         small, and on a
                 second line; --width 3

    python one.py
"""

import math

# Settings

DEFAULTS = {
    "width": 3,
    "shared": 1,
}


# Networks


def networks(config):
    """A docstring."""
    return {"generator": config.width}


# Objective


def loss(x):
    """E x."""
    return x.mean()


# Training


def build(config):
    nets = networks(config)

    def step():
        return loss(nets)

    return step


# Running: the same

def main():
    # Training
    print("</script><script>document.title = 'broken'</script><!--")
'''
OTHER = (
    ONE.replace("ONE — Ada", "OTHER — Ada")
    .replace('"width": 3', '"width": 4')
    .replace("A docstring.", "Another docstring.")
    .replace("def loss(x):", "def bound(x):\n    return abs(x)\n\n\ndef loss(x):")
    .replace("        return loss(nets)", "        return loss(nets) + 1")
)

# Here bound() is what loss() is in ONE, and loss() is something else.
NAMED = ONE.replace("def loss(x)", "def bound(x)").replace(
    "# Training\n\n\n", 'def loss(*args):\n    print("nothing of the kind")\n\n\n# Training\n\n\n'
)


def embedded(html):
    """What the page's script reads, the numbers of lines replaced by the lines."""
    data = json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]
    )
    for model in data["models"]:
        for chunk in itertools.chain(*model["sections"].values()):
            chunk["lines"] = [data["lines"][number] for number in chunk["lines"]]
    return data


def command(*args, cwd=ROOT):
    """python -m tools.compare, never with a browser."""
    line = [sys.executable, "-m", "tools.compare", *args, "--no-open"]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copied folder: the model files, two small ones, and of the tools this one alone."""
    folder = tmp_path_factory.mktemp("copied")
    (folder / "tools").mkdir()
    for name in ("__init__.py", "compare.py", "compare.html"):
        shutil.copy(ROOT / "tools" / name, folder / "tools")
    for name, text in (
        TEXTS.items() | {"one": ONE, "other": OTHER, "named": NAMED, "common": "def networks(): ..."}.items()
    ):
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    (folder / "notes.py").write_text("import this\n")
    done = command(cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "compare.html\n", "")
    return folder


# The page's data


def test_the_docstring_is_taken_apart():
    model = compare.read_model("one", ONE, str)
    assert model["name"] == "ONE" and model["authors"] == "Ada & Bob" and model["paper"] == "On one"
    assert model["year"] == "2001" and model["url"] == "https://example.org/one"
    assert model["objective"] == [
        ("text", "What is minimised:"),
        ("formula", "min_G  E_x F(x)\n    over all G"),
    ]
    assert model["heading"] == "Differs from the paper"
    assert model["differences"] == [
        ("batch norm", "none"),
        ("size", "small, and on a second line; --width 3"),
    ]


@pytest.mark.parametrize(
    "head",
    [
        'X — A & B, "A title\nin two lines", 2001, https://example.org/x; as\nthe others',
        'X — A & B, "A title in two lines", 2001\nhttps://example.org/x: as the others',
        'X — A & B, "A title in two lines", 2001, https://example.org/x\nAs the others',
        'X — A & B, 2001\n"A title in two lines", https://example.org/x, as the others',
    ],
)
def test_what_follows_a_headline_of_several_lines_is_kept(head):
    parts, rest = compare.headline(f"{head}\n\nMore.\n")
    found = {"name": "X", "authors": "A & B", "paper": "A title in two lines", "year": "2001"}
    assert parts == found | {"url": "https://example.org/x"}
    assert compare.objective(rest) == [("text", "As the others"), ("text", "More.")]


def test_a_docstring_of_another_form_is_shown_as_it_is():
    model = compare.read_model("odd", '"""Just this."""\n\n\ndef networks(config): ...\n', str)
    assert model["name"] == "Just this." and model["objective"] == [] and model["differences"] == []
    assert compare.read_model("odd", "def networks(config): ...\n", str)["name"] == "odd"


def test_the_code_is_cut_at_sections_and_definitions():
    found = compare.read_model("one", ONE, str)["sections"]
    names = {title: [chunk["name"] for chunk in chunks] for title, chunks in found.items()}
    assert names == {
        "Imports": [""],
        "Settings": [""],
        "Networks": ["networks"],
        "Objective": ["loss"],
        "Training": ["build", "build.step", "build…"],
        "Running": ["main"],
    }
    assert found["Objective"][0]["doc"] == [1, 1]


@pytest.mark.parametrize("name", TEXTS)
def test_every_line_of_code_is_there_once_with_its_number(name):
    lines = TEXTS[name].split("\n")
    model = embedded(compare.page({name: TEXTS[name]}, [name, name]))["models"][0]
    assert list(model["sections"]) == ["Imports", "Settings", "Networks", "Objective", "Training", "Running"]
    shown = {}
    for chunk in itertools.chain(*model["sections"].values()):
        numbered = dict(enumerate(chunk["lines"], chunk["first"]))
        assert not shown.keys() & numbered.keys()
        shown |= numbered
    assert shown == {number: lines[number - 1] for number in shown}
    start = compare.sections(TEXTS[name])[0][1]
    left_out = {line for number, line in enumerate(lines, 1) if number > start and number not in shown} - {""}
    assert all(compare.TITLE.fullmatch(line) for line in left_out)


@pytest.mark.parametrize("name", TEXTS)
def test_every_docstring_is_understood(name):
    model = compare.read_model(name, TEXTS[name], str)
    assert all(model[part] for part in ("name", "authors", "paper", "year", "url"))
    assert any(kind == "formula" for kind, _ in model["objective"])
    assert model["differences"] and all(key and text for key, text in model["differences"])


def test_twelve_long_files_fit():
    """Of 500 lines of 50 characters, half of them the run part, which is the same in all."""
    head, running = ONE.split("# Running")
    texts = {}
    for i in range(12):
        own = "".join(f"x_{i}_{j} = '{i * j:036}'\n" for j in range(230))
        shared = "".join(f"y_{j} = '{j:043}'\n" for j in range(230))
        texts[f"model_{i}"] = f"{head}{own}\n\n# Running{running}{shared}"
    html = compare.page(texts, ["model_0", "model_1"])
    assert len(html.encode()) < 400_000
    assert len(compare.page(TEXTS, list(TEXTS)[:2]).encode()) < 400_000


def test_nothing_in_a_model_file_ends_the_script():
    html = compare.page({"one": ONE}, ["one", "one"])
    assert html.count("<script") == html.count("</script>") == 2 and "<!--" not in html
    assert ONE.split("\n")[-2] in embedded(html)["lines"]


# The command


def test_a_copied_folder_is_compared(folder):
    data = embedded((folder / "compare.html").read_text(encoding="utf-8"))
    assert [model["file"] for model in data["models"]] == sorted([*TEXTS, "named", "one", "other"])
    assert data["chosen"] == ["wgan", "wgan_gp"]


def test_names_with_and_without_py(folder, tmp_path):
    done = command("one.py", "./other", "--out", str(tmp_path / "page.html"), cwd=folder)
    assert done.stdout == f"{tmp_path / 'page.html'}\n"
    assert embedded((tmp_path / "page.html").read_text(encoding="utf-8"))["chosen"] == ["one", "other"]


def test_the_page_is_opened_unless_told_otherwise(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(compare.webbrowser, "open", opened.append)
    compare.main(["--out", str(tmp_path / "a page.html"), "--no-open"])
    assert opened == []
    compare.main(["--out", str(tmp_path / "a page.html")])
    assert opened == [f"file://{tmp_path}/a%20page.html"]


@pytest.mark.parametrize(
    "args, words",
    [
        (["wgan", "gan"], "gan is no model file; known are"),
        (["wgan"], "name two model files"),
        (["wgan", "wgan", "wgan"], "name two model files"),
        (["--out", "no/such/page.html"], "no/such/page.html"),
        (["--out", "tools/compare.html"], "template"),
        (["--color"], "--color"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(args, words, folder):
    before = (folder / "tools/compare.html").read_bytes()
    done = command(*args, cwd=folder)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"tools\.compare: error: .*\n", done.stderr) and words in done.stderr
    assert (folder / "tools/compare.html").read_bytes() == before


def test_a_broken_model_file_and_an_empty_folder_are_named(folder, tmp_path):
    shutil.copytree(folder / "tools", tmp_path / "tools")
    done = command(cwd=tmp_path)
    assert done.returncode == 2 and "holds no model file" in done.stderr
    (tmp_path / "broken.py").write_text("x = 1\ndef networks(:\n")
    done = command(cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"tools\.compare: error: broken\.py, line 2: .*\n", done.stderr)
    assert not (tmp_path / "compare.html").exists()


def test_help_is_narrow_and_loads_nothing_heavy():
    done = command("--help")
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 100
    heavy = "import sys, tools.compare; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", heavy], cwd=ROOT, text=True) == "[]\n"


# The page's looks


def palettes():
    """The colours of the light page and of the dark one: {variable: (r, g, b)}."""
    blocks = re.findall(r":root \{(.*?)\}", compare.TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        found = re.findall(r"--([\w-]+): #(\w\w)(\w\w)(\w\w);", block)
        yield {name: tuple(int(part, 16) for part in parts) for name, *parts in found}


def luminance(colour):
    """WCAG's relative luminance."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", list(palettes()), ids=["light", "dark"])
def test_text_has_contrast(palette):
    lines = ["paper", "sheet", "left-line", "right-line"]
    pairs = [*itertools.product(["ink", "soft", "comment", "string"], lines)]
    pairs += [("ink", "left-mark"), ("ink", "right-mark"), ("left", "left-line"), ("right", "right-line")]
    for text, ground in pairs:
        dark, light = sorted([luminance(palette[text]), luminance(palette[ground])])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


# In a browser


class Browser:
    """A headless Chromium, spoken to in the DevTools protocol through a pair of pipes."""

    FLAGS = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--remote-debugging-pipe",
        "--window-size=1400,1000",
    ]

    def __init__(self, profile):
        # It reads commands from file 3 and writes answers to file 4.
        shell = ["sh", "-c", 'exec "$@" 3<&0 4>&1 >/dev/null 2>&1', "sh", CHROMIUM, *self.FLAGS]
        line = [*shell, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.timer = threading.Timer(300, self.process.kill)  # a browser that hangs must not hang the tests
        self.timer.start()
        self.number, self.session, self.events = 0, {}, []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = {
            "sessionId": self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        }
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def close(self):
        self.timer.cancel()
        self.process.kill()
        self.process.communicate()

    def read(self):
        """The next message, an answer or an event."""
        message = bytearray()
        while (byte := self.process.stdout.read(1)) != b"\0":
            assert byte, "the browser is gone"
            message += byte
        return json.loads(message)

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url):
        self.call("Page.navigate", url="about:blank")  # else another hash of the same page does not load it
        self.events.clear()
        self.call("Page.navigate", url=url)
        loaded = "document.readyState === 'complete' ? done() : addEventListener('load', done)"
        self.run(f"new Promise((done) => {loaded})")

    def run(self, script):
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key):
        code = {"Tab": 9, "Enter": 13, "ArrowDown": 40}.get(key, ord(key[0].upper()))
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)
        self.wait(50)

    def wait(self, milliseconds):
        self.run(f"new Promise((done) => setTimeout(done, {milliseconds}))")

    def errors(self):
        """What the console has shown in red."""
        self.run("0")
        bad = []
        for event in self.events:
            params = event.get("params", {})
            kind = params.get("entry", {}).get("level") or params.get("type")
            if event["method"] == "Runtime.exceptionThrown" or kind in ("error", "warning"):
                bad.append(params)
        return bad

    def cells(self, side, kind=""):
        """The lines that stand on this side, folded ones too."""
        return self.run(
            f"[...document.querySelectorAll('.cell.{side}{kind}')].map((cell) => cell.textContent)"
        )


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome on PATH")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium, folder):
    """A browser with the page open as the command opens it. The console stays clean whatever is done."""
    chromium.call("Emulation.clearDeviceMetricsOverride")
    chromium.call("Emulation.setEmulatedMedia", features=[])
    chromium.address = (folder / "compare.html").as_uri()
    chromium.open(chromium.address)
    yield chromium
    assert chromium.errors() == []


def test_what_is_one_papers_is_on_its_side_alone(browser):
    left, right = browser.cells("left"), browser.cells("right")
    assert any("def gradient_penalty(" in line for line in right)
    assert not any("gradient_penalty" in line for line in left)
    assert any("def clip_weights(" in line for line in left)
    assert not any("clip_weights" in line for line in right)
    assert browser.run("document.title") == "wgan.py ↔ wgan_gp.py"
    running = browser.run("document.querySelector('#section-Running').innerText")
    assert re.fullmatch(r"Running\nthe same in both, \d+ lines", running)  # and nothing of it is unfolded


def test_lines_that_differ_are_coloured_and_counted(browser):
    browser.open(f"{browser.address}#one,other")
    assert browser.cells("left", ".own") == [
        '    "width": 3,',
        '    """A docstring."""',
        "        return loss(nets)",
    ]
    assert browser.cells("right", ".own") == [
        '    "width": 4,',
        '    """Another docstring."""',
        "def bound(x):",
        "    return abs(x)",
        "        return loss(nets) + 1",
    ]
    marked = "[...document.querySelectorAll('.cell mark')].map((mark) => mark.textContent)"
    assert browser.run(marked) == ["3", "4", "A", "Another", "+ 1"]
    expected = "6 lines differ: 2 in one.py, 4 in other.py"
    assert browser.run("document.getElementById('summary').textContent") == expected
    chips = browser.run("[...document.querySelectorAll('nav button')].map((button) => button.textContent)")
    assert chips == ["Settings2", "Networks", "Objective2", "Training2"]  # of Networks only a docstring


def test_functions_of_one_name_stand_side_by_side(browser):
    browser.open(f"{browser.address}#one,named")
    beside = """
        (side, start) => {
            const lines = [...document.querySelectorAll(`.cell.${side}`)];
            const line = lines.find((cell) => cell.textContent.startsWith(start));
            return (side === "left" ? line.nextSibling : line.previousSibling).textContent;
        }
    """
    assert browser.run(f"({beside})('left', 'def loss')") == "def loss(*args):"
    assert browser.run(f"({beside})('right', 'def bound')") == ""


def test_text_of_a_model_file_stays_text(browser):
    browser.open(f"{browser.address}#one,other")
    assert ONE.split("\n")[-2] in browser.cells("left")
    assert browser.run("document.title") == "one.py ↔ other.py"


def test_a_run_part_that_differs_is_shown(browser):
    browser.open(f"{browser.address}#one,wgan")
    assert browser.run("document.querySelectorAll('#section-Running .hunk').length") > 0
    assert browser.run("document.querySelector('#section-Running h2').textContent").startswith("Running")


def test_another_pair_is_chosen_with_the_keyboard(browser):
    names = sorted([*TEXTS, "named", "one", "other"])
    after = names[names.index("wgan") - 1]  # what the arrow passes on its way from the first name
    browser.open(f"{browser.address}#{after},wgan_gp")
    browser.press("Tab")
    assert browser.run("document.activeElement.id") == "left"
    assert browser.run("document.activeElement.matches(':focus-visible')")
    before = browser.run("document.querySelector('main').innerText")
    browser.press("ArrowDown")
    assert browser.run("location.hash") == "#wgan,wgan_gp"
    assert browser.run("document.title") == "wgan.py ↔ wgan_gp.py"
    assert browser.run("document.querySelector('main').innerText") != before
    browser.run("history.back()")
    browser.wait(300)
    assert browser.run("document.title") == f"{after}.py ↔ wgan_gp.py"
    assert browser.run("document.getElementById('left').value") == after


def test_what_is_equal_unfolds_with_the_keyboard(browser):
    for _ in range(60):
        browser.press("Tab")
        if browser.run("document.activeElement.matches('#section-Objective summary')"):
            break
    fold = "document.activeElement.closest('details')"
    assert "equal lines" in browser.run(f"{fold}.innerText")
    visible = f"{fold}.querySelector('.cell').checkVisibility()"
    assert not browser.run(f"{fold}.open")
    browser.press("Enter")
    assert browser.run(f"{fold}.open") and browser.run(visible)
    browser.press("Enter")
    assert not browser.run(f"{fold}.open")


def test_n_and_p_go_from_difference_to_difference(browser):
    place = "[...document.querySelectorAll('.hunk')].indexOf(document.activeElement)"
    found = []
    for key in "nnnp":
        browser.press(key)
        found.append(browser.run(place))
    assert found == [0, 1, 2, 1]


def test_swapping(browser):
    browser.run("document.getElementById('swap').click()")
    browser.wait(100)
    assert browser.run("location.hash") == "#wgan_gp,wgan"
    assert any("gradient_penalty" in line for line in browser.cells("left"))


def test_an_unknown_address_shows_the_first_pair(browser):
    for address in ("#gan,wgan", "#wgan", "#%"):
        browser.open(browser.address + address)
        assert browser.run("document.title") == "wgan.py ↔ wgan_gp.py"


def test_every_pair_is_drawn(browser):
    """With all lines of both files, in their order."""
    numbers = {}
    for name, text in TEXTS.items():
        chunks = itertools.chain(*compare.read_model(name, text, str)["sections"].values())
        numbers[name] = [chunk["first"] + k for chunk in chunks for k in range(len(chunk["lines"]))]
    shown = """
        ["left", "right"].map((side) => {
            const cells = [...document.querySelectorAll(`.cell.${side}[data-line]`)];
            return cells.map((cell) => Number(cell.dataset.line));
        })
    """
    for pair in itertools.combinations_with_replacement(TEXTS, 2):
        assert browser.run(f"draw({json.dumps(pair)}), {shown}") == [numbers[name] for name in pair]
        assert browser.run("document.title") == f"{pair[0]}.py ↔ {pair[1]}.py"


def test_narrow_windows_have_one_column(browser):
    boxes = """
        [...document.querySelector('#section-Objective .hunk').querySelectorAll('[data-line]')]
            .sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top)
            .map((cell) => cell.classList.contains('left') ? 'left' : 'right').join(' ')
    """
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=480, height=900, deviceScaleFactor=1, mobile=False
    )
    assert re.fullmatch(r"(left )+(right ?)+", browser.run(boxes))
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run(
        "[...document.querySelectorAll('.equal .right')].every((cell) => !cell.checkVisibility())"
    )


def test_dark_and_light(browser):
    def ground(scheme):
        browser.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        return sum(
            map(int, re.findall(r"\d+", browser.run("getComputedStyle(document.body).backgroundColor")))
        )

    assert ground("dark") < 150 and ground("light") > 700
