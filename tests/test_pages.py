"""The pages: links lead somewhere, commands have flags that exist, examples are Python."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from kvasir.cluster.cli import _normal, _parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / folder / "README.md" for folder in ("", "cluster", "engine", "deploy", "benchmarks")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
SCRIPT = re.compile(r"python ((?:benchmarks|deploy)/\S+\.py)([^`\n]*)")


def examples(page, language):
    return re.findall(rf"(?s)```{language}\n(.*?)\n```", page.read_text())


def anchors(page):
    """GitHub's names of headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)


@each_page
def test_links(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@each_page
def test_commands(page):
    for line in "\n".join(examples(page, "sh")).splitlines():
        if line.startswith("kvasir "):
            _, unknown = _parser().parse_known_args(_normal(shlex.split(line, comments=True)[1:]))
            assert not unknown, line
    for script, arguments in SCRIPT.findall(page.read_text()):
        source = (ROOT / script).read_text()
        for flag in re.findall(r"--[a-z-]+", arguments.partition("#")[0]):
            assert f'"{flag}"' in source, f"{script} {flag}"


@each_page
def test_examples_are_python(page):
    for example in examples(page, "python"):
        ast.parse(example)
