"""python -m tools.sync: what the model files share stands in all of them to the letter.

Each shared definition is copied from the first file that has it, in the order of MODELS, into the others;
so is the run part. Change it once, there, and run this. With --check nothing is written: differences are
listed, and the exit code is 1.
"""

import ast
import sys
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = [
    "dcgan",
    "wgan",
    "wgan_gp",
    "bigan",
    "wbli",
    "gm_wae",
    "alpha_gan",
    "cgan",
    "infogan",
    "semi_gan",
    "loss_sensitive_gan",
    "age",
]

# What is the same wherever a file has it, and the files in which the name means something else.
SHARED = {
    "conv_widths": [],
    "Generator": [],
    "Encoder": [],
    "Critic": [],
    "Discriminator": [],
    "Joint": [],
    "mlp": [],
    "init_weights": [],
    "clip_weights": [],
    "generate": ["gm_wae"],
    "encode": ["gm_wae"],
    "update": [],
}
# The same but for the docstring, which says what each paper says.
SHARED_CODE = {
    "critic_loss": ["loss_sensitive_gan"],
    "discriminator_loss": ["alpha_gan"],
}
RUN_PART = "# Running: the loop and the command line, the same in every file\n"


def definitions(text):
    """{name: node} of a file's functions and classes, and of the functions inside build()."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
            if node.name == "build":
                found |= {inner.name: inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def span(node, with_docstring=True):
    """The lines of a definition, decorators included, as a slice; or only those behind its docstring."""
    if with_docstring or ast.get_docstring(node) is None:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        return slice(first - 1, node.end_lineno)
    return slice(node.body[0].end_lineno, node.end_lineno)


def synced(texts):
    """{model: text} with every shared part as its first file has it, and what was changed: (model, part)."""
    texts, changed = dict(texts), []
    for name, others in (SHARED | SHARED_CODE).items():
        first = None
        for model in texts:
            node = definitions(texts[model]).get(name)
            if node is None or model in others:
                continue
            lines = texts[model].splitlines(keepends=True)
            part = span(node, with_docstring=name in SHARED)
            if first is None:
                first = lines[part]
            elif lines[part] != first:
                lines[part] = first
                texts[model] = "".join(lines)
                changed.append((model, name))
    run_parts = {model: text.partition(RUN_PART) for model, text in texts.items()}
    missing = [model for model, (_, title, _) in run_parts.items() if not title]
    if missing:
        raise ValueError(f"{missing[0]}.py has no line {RUN_PART.strip()!r}")
    first = next(iter(run_parts.values()))[2]
    for model, (head, title, part) in run_parts.items():
        if part != first:
            texts[model] = head + title + first
            changed.append((model, "the run part"))
    return texts, changed


def main(argv=None):
    """Copy, or with --check only look."""
    parser = ArgumentParser(prog="python -m tools.sync", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if anything differs")
    check = parser.parse_args(argv).check
    paths = {model: ROOT / f"{model}.py" for model in MODELS if (ROOT / f"{model}.py").exists()}
    texts = {model: path.read_text(encoding="utf-8") for model, path in paths.items()}
    try:
        after, changed = synced(texts)
    except (SyntaxError, ValueError) as error:
        sys.exit(f"tools.sync: error: {error}")
    for model, part in changed:
        print(f"{model}.py: {part} {'differs' if check else 'was copied'}")
    if check:
        sys.exit(1 if changed else 0)
    for model, path in paths.items():
        if after[model] != texts[model]:
            path.write_text(after[model], encoding="utf-8")


if __name__ == "__main__":
    main()
