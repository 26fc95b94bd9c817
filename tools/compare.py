"""python -m tools.compare: any two model files side by side, in the browser.

One page of HTML holds all model files beside common.py; two lists choose which are shown. On top stand their
objectives, as in the docstrings. Below, the sections are aligned definition by definition and line by line:
what differs is coloured, what is equal is folded.

compare.html is the page without the files. Here they are read and cut up; all comparing is done there.
"""

import ast
import json
import re
import sys
import webbrowser
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).with_name("compare.html")
TITLE = re.compile(r"# (Settings|Networks|Objective|Training|Running)\b.*")
# NAME — authors, "paper", year, address; the year can stand before the paper, too.
HEADLINE = re.compile(
    r'(?P<name>.+?) — (?P<authors>.+?),( (?P<early>\d{4}))? "(?P<paper>[^"]+)"(, (?P<late>\d{4}))?'
    r"(,? (?P<url>https?://\S*[^\s.,;:]))?[.,;:]? *"
)
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


# Reading a model file


def model_files(folder):
    """{name: text} of the model files in this folder: those that define networks()."""
    paths = [path for path in sorted(folder.glob("*.py")) if path.name != "common.py"]
    texts = {path.stem: path.read_text(encoding="utf-8", errors="replace") for path in paths}
    return {name: text for name, text in texts.items() if re.search(r"^def networks\(", text, re.MULTILINE)}


def headline(docstring):
    """Name, authors, paper, year and url, which stand first in a docstring, and the rest of it.

    A first line of another form is the name. Where no address follows the year, the first one counts.
    """
    first, blank, rest = docstring.partition("\n\n")
    match = HEADLINE.match(" ".join(first.split("\n")))
    if match:
        parts = {key: match[key] for key in ("name", "authors", "paper", "url") if match[key]}
        parts["year"] = match["early"] or match["late"] or ""
        remark = match.string[match.end() :]
        rest = remark[:1].upper() + remark[1:] + blank + rest
    else:
        name, _, rest = docstring.partition("\n")
        parts = {"name": name.strip()}
    url = re.search(r"https?://\S*[^\s.,;:]", docstring)
    if url:
        parts.setdefault("url", url[0])
    return parts, rest


def objective(text):
    """What follows the headline, up to the differences: [(kind, text)], of kind "text" or "formula"."""
    blocks = []
    for line in text.split("\n"):
        if line.startswith("Differs from the paper"):
            break
        kind = "formula" if line.startswith("    ") else "text"
        if not line:
            blocks.append(("", []))  # whatever follows is a new block
        elif blocks and blocks[-1][0] == kind:
            blocks[-1][1].append(line)
        else:
            blocks.append((kind, [line]))
    return [
        (kind, "\n".join(line[4:] for line in lines) if kind == "formula" else " ".join(lines))
        for kind, lines in blocks
        if lines
    ]


def differences(docstring):
    """The heading and the entries, [(key, text)], of the list "Differs from the paper:"."""
    found = re.search(r"^(Differs from the paper.*)\n((?: {4}.*(?:\n|$))*)", docstring, re.MULTILINE)
    if not found:
        return "", []
    lines = found[2].splitlines()
    # The texts stand below each other; the key before the first of them has two spaces or more behind it.
    column = next((m.end() for line in lines if (m := re.match(r" {4}\S.*?  +(?=\S)", line))), 4)
    entries = []
    for line in lines:
        key, text = line[4:column].strip(), line[column:].strip()
        if key or not entries:
            entries.append((key, text))
        else:
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {text}")
    return found[1].rstrip(":"), entries


def sections(text):
    """[(title, first line, line after the last)] of a file's code, from 0; what comes first are imports."""
    lines, body = text.split("\n"), ast.parse(text).body
    start = body[0].end_lineno if body and is_docstring(body[0]) else 0
    starts = [("Imports", start, start)]
    for i in range(start + 1, len(lines) - 1):
        title = TITLE.fullmatch(lines[i])
        if title and not lines[i - 1] and not lines[i + 1] and starts[-1][0] != "Running":
            starts.append((title[1], i, i + 1))
    ends = [i for _, i, _ in starts[1:]] + [len(lines)]
    return [(title, first, end) for (title, _, first), end in zip(starts, ends, strict=True)]


def is_docstring(node):
    """Whether this statement is a bare string."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def chunks(node, name, first, end):
    """(name, first, end) of every function and class among these lines, and of what stands between them."""
    key = name
    for inner in node.body:
        if not isinstance(inner, DEFINITION):
            continue
        begin = min(part.lineno for part in [inner, *inner.decorator_list]) - 1
        if not first <= begin < end:
            continue
        yield key, first, begin
        yield from chunks(inner, f"{name}.{inner.name}".lstrip("."), begin, inner.end_lineno)
        key, first = f"{name}…", inner.end_lineno
    yield key, first, end


def read_model(name, text, number):
    """A model file as the page wants it; `number` gives a line's number in the table of all lines."""
    lines, tree = text.split("\n"), ast.parse(text)
    owners = [node for node in ast.walk(tree) if isinstance(node, DEFINITION) and is_docstring(node.body[0])]
    in_docstring = {i for node in owners for i in range(node.body[0].lineno - 1, node.body[0].end_lineno)}
    found = {}
    for title, start, stop in sections(text):
        found[title] = []
        for key, first, end in chunks(tree, "", start, stop):
            while first < end and not lines[first].strip():
                first += 1
            while first < end and not lines[end - 1].strip():
                end -= 1
            if first == end:
                continue
            doc = [i - first for i in range(first, end) if i in in_docstring]
            chunk = {"name": key, "first": first + 1, "lines": [number(line) for line in lines[first:end]]}
            found[title].append(chunk | ({"doc": [doc[0], doc[-1]]} if doc else {}))
    docstring = ast.get_docstring(tree) or name
    parts, rest = headline(docstring)
    heading, entries = differences(docstring)
    return parts | {
        "file": name,
        "objective": objective(rest),
        "heading": heading,
        "differences": entries,
        "sections": found,
    }


# The page


def page(texts, chosen):
    """The HTML for these files, {name: text}, that shows the two chosen first.

    What several files have to the letter is embedded once: each line is a number in a table of all lines.
    """
    table = {}
    models = []
    for name, text in texts.items():
        try:
            models.append(read_model(name, text, lambda line: table.setdefault(line, len(table))))
        except SyntaxError as error:
            raise ValueError(f"{name}.py, line {error.lineno}: {error.msg}") from error
    data = {"chosen": chosen, "models": models, "lines": list(table)}
    # Without a "<", nothing in a model file can end the script element that holds it.
    embedded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split("{{data}}")
    return before + embedded + after


class Parser(ArgumentParser):
    """A mistake is one line on stderr and exit code 2."""

    def error(self, message):
        print(f"tools.compare: error: {message}", file=sys.stderr)
        sys.exit(2)


def parse_args(argv, known):
    """The flags; `models` are two names of `known`."""
    parser = Parser(
        prog="python -m tools.compare",
        usage="%(prog)s [A B] [--out FILE] [--no-open]",
        description="Any two model files side by side, in the browser: what one paper changed.",
        epilog=f"Model files here: {', '.join(known)}.",
    )
    parser.add_argument(
        "models", nargs="*", metavar="A B", help="shown first, with or without .py (default: wgan wgan_gp)"
    )
    parser.add_argument(
        "--out", metavar="FILE", default="compare.html", help="the page (default: compare.html, here)"
    )
    parser.add_argument("--no-open", action="store_true", help="only write it")
    options = parser.parse_args(argv)
    if not known:
        parser.error(f"{ROOT} holds no model file: none there defines networks()")
    names = [Path(name).name.removesuffix(".py") for name in options.models]
    for name in names:
        if name not in known:
            parser.error(f"{name} is no model file; known are {', '.join(known)}")
    if len(names) not in (0, 2):
        parser.error("name two model files, or none; the page has lists to choose from")
    if not names:
        names = ["wgan", "wgan_gp"] if {"wgan", "wgan_gp"} <= {*known} else [known[0], known[-1]]
    if Path(options.out).resolve() == TEMPLATE:
        parser.error(f"--out {options.out} is the template of the page")
    options.models, options.parser = names, parser
    return options


def main(argv=None):
    texts = model_files(ROOT)
    options = parse_args(argv, list(texts))
    out = Path(options.out)
    try:
        out.write_text(page(texts, options.models), encoding="utf-8")
    except (OSError, ValueError) as error:
        options.parser.error(error)
    print(out)
    if not options.no_open:
        webbrowser.open(out.resolve().as_uri())


if __name__ == "__main__":
    main()
