"""tools.sync: what the model files share is copied from the first that has it; the rest is left alone."""

import pytest

from tools import sync

FIRST = f'''"""The first."""


class Generator(list):
    """As here."""

    size = 1


@decorated
def clip_weights(critic, c):
    """Clip."""
    return c


def critic_loss(f_real, f_fake):
    """What this paper says."""
    return f_fake.mean() - f_real.mean()


def own(x):
    return 1


def build(config):
    def update(loss):
        loss.backward()  # all

    return update


{sync.RUN_PART}
def main():
    run()
'''
SECOND = f'''"""The second."""


class Generator(list):
    size = 2

    def more(self):
        pass


def clip_weights(critic):
    return critic


def critic_loss(f_real, f_fake, weight):
    """What the other paper says,

    in more lines.
    """
    return -weight


def own(x):
    return 2


def build(config):
    print("its own")

    def update(loss, more):
        pass

    return update, 2


{sync.RUN_PART}
def main():
    other()
'''


def lines_of(text, name, with_docstring=True):
    node = sync.definitions(text)[name]
    return text.splitlines()[sync.span(node, with_docstring)]


def test_the_first_file_has_it_and_the_others_get_it():
    after, changed = sync.synced({"one": FIRST, "two": SECOND})
    assert after["one"] == FIRST
    parts = ["Generator", "clip_weights", "update", "critic_loss", "the run part"]
    assert changed == [("two", part) for part in parts]
    for name in ("Generator", "clip_weights", "update", "main"):
        assert lines_of(after["two"], name) == lines_of(FIRST, name)
    assert lines_of(after["two"], "clip_weights")[0] == "@decorated"
    assert lines_of(after["two"], "update")[-1] == "        loss.backward()  # all"
    assert after["two"].endswith("    run()\n") and after["two"].startswith('"""The second."""')
    assert lines_of(after["two"], "own") == ["def own(x):", "    return 2"]
    assert '    print("its own")' in after["two"] and "    return update, 2" in after["two"]
    assert sync.synced(after) == (after, [])


def test_a_docstring_may_differ_where_the_papers_do():
    """The statements below it are the same; its own signature stays, too."""
    after, _ = sync.synced({"one": FIRST, "two": SECOND})
    text = "\n".join(lines_of(after["two"], "critic_loss"))
    assert "in more lines." in text and text.endswith("    return f_fake.mean() - f_real.mean()")
    assert lines_of(after["two"], "critic_loss", with_docstring=False) == [
        "    return f_fake.mean() - f_real.mean()"
    ]


@pytest.mark.parametrize("name", ["generate", "discriminator_loss"])
def test_a_name_that_means_something_else_is_left_alone(name):
    (other,) = (sync.SHARED | sync.SHARED_CODE)[name]
    texts = {
        model: f"def {name}(x):\n    return {i}\n\n\n{sync.RUN_PART}"
        for i, model in enumerate(["one", other, "two"])
    }
    after, changed = sync.synced(texts)
    assert changed == [("two", name)] and after[other] == texts[other]


def test_the_first_file_may_lack_it():
    texts = {"one": f"{sync.RUN_PART}", "two": FIRST, "three": SECOND}
    after, changed = sync.synced(texts)
    assert lines_of(after["three"], "Generator") == lines_of(FIRST, "Generator")
    assert ("two", "the run part") in changed and after["two"].endswith(sync.RUN_PART)


@pytest.mark.parametrize("broken, said", [("def broken(:\n", "invalid syntax"), ("broken = 1\n", "two.py")])
def test_a_file_that_cannot_be_synced_is_an_error(broken, said, tree):
    (tree / "two.py").write_text(broken)
    with pytest.raises(SystemExit) as stopped:
        sync.main([])
    assert said in stopped.value.code
    assert (tree / "one.py").read_text() == FIRST and (tree / "two.py").read_text() == broken


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with two of three model files; the third is still to come."""
    (tmp_path / "one.py").write_text(FIRST)
    (tmp_path / "two.py").write_text(SECOND)
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    monkeypatch.setattr(sync, "MODELS", ["one", "two", "three"])
    return tmp_path


def test_check_writes_nothing_and_fails(tree, capsys):
    with pytest.raises(SystemExit) as stopped:
        sync.main(["--check"])
    assert stopped.value.code == 1 and "two.py: Generator differs" in capsys.readouterr().out
    assert (tree / "two.py").read_text() == SECOND


def test_sync_and_check_again(tree, capsys):
    sync.main([])
    assert "two.py: the run part was copied" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        sync.main(["--check"])
    assert stopped.value.code == 0 and capsys.readouterr().out == ""
    assert {path.name for path in tree.iterdir()} == {"one.py", "two.py"}
