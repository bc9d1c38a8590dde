"""The README is true: its commands parse, its names exist, its targets are those there are."""

import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcc.compiler import cli
from qcc.targets import list_targets

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.M | re.S)
    return found


def commands() -> Iterator[list[str]]:
    """The words of each command in the shell blocks, those behind `&&` apart."""
    for line in "".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            at = words.index("&&")
            yield words[:at]
            words = words[at + 1 :]
        yield words


def test_ci_runs_two_blocks_of_the_readme() -> None:
    """The markers that .ci/run looks for stand right above a one-line block."""
    marked = re.findall(r"^<!-- ci: (\w+) -->\n```sh\n(.*)\n```$", TEXT, flags=re.M)
    assert dict(marked) == {
        "quickstart": "pip install . && qcc quickstart",
        "test": "pip install -c constraints.txt -e '.[test]' && pytest",
    }
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"from_readme (\w+)$", script, flags=re.M) == [name for name, _ in marked]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    """Every verb and flag exists; every module can be found."""
    if words[0] == "qcc":
        assert words[1] in cli.verbs()
        cli.verb_parser(words[1])[0].parse_all(words[2:])
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    else:
        assert words[0] in ("pip", "pytest")


def test_verbs_and_folders_in_the_text() -> None:
    """`qcc VERB ...` in running text, and the folders of the house."""
    inline = re.findall(r"`qcc ([a-z]+)([^`]*)`", TEXT)
    assert inline
    for verb, rest in inline:
        cli.verb_parser(verb)[0].parse_all(shlex.split(rest))
    house = re.search(r"^## The house\n\n```\n(.*?)^```", TEXT, flags=re.M | re.S)
    assert house
    for line in house[1].splitlines():
        assert (ROOT / line.split()[0]).is_dir(), line


def test_python_names_exist() -> None:
    """What the Python block imports is there."""
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} lacks {missing}"


def test_the_table_names_the_targets_that_exist() -> None:
    """A target with a folder is in the first column by name; the others say "not yet"."""
    table = re.search(r"^\| target \| compile \| run \|\n(?:\|.*\n)+", TEXT, flags=re.M)
    assert table
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", table[0], flags=re.M)
    named = {name for cell, *_ in rows for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(list_targets())
    assert ("CUDA, Metal, iOS", "not yet", "not yet") in rows
