"""Reads the code blocks of the documentation, and how the tests are to run them.

A block is run unless an HTML comment before it says otherwise:

    <!-- test: skip, REASON -->        it cannot be run
    <!-- test: flags only, REASON -->  commands that take too long: only their flags
    <!-- test: installed, REASON -->   only what follows the installation
    <!-- test: file NAME -->           a program, for the commands after it
    <!-- test: quick -->               commands for the default tests, not the slow ones
    <!-- test: worker N -->            commands of one worker, beside the others'
"""

import pathlib
import re
from typing import NamedTuple

import markdown_it
from markdown.extensions import toc

ROOT = pathlib.Path(__file__).resolve().parents[1]
# In which there is nothing to run.
OUTPUTS = ("", "text")

_NOTE = re.compile(r"<!-- test: (\w+)( only)?,? ?(.*?) -->")
_EXTERNAL = re.compile(r"[a-z]+:|#?$")


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        page: The path of its page.
        line: Where it begins, from 1.
        language: What stands behind its fence.
        text: What is in it.
        note: What a comment says of it: "skip", "flags", "installed", "file", "quick",
            "worker", or "" without one.
        detail: What follows there: the reason, the name, or the number.
    """

    page: pathlib.Path
    line: int
    language: str
    text: str
    note: str
    detail: str

    @property
    def place(self):
        """Returns where it is, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages():
    """Returns the paths of all pages."""
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(ROOT.glob("docs/**/*.md")),
    ]


def read(page):
    """Returns the blocks of a page."""
    blocks, notes = [], []
    for token in markdown_it.MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            notes += _NOTE.findall(token.content)
            continue
        if token.type in ("fence", "code_block"):
            note, _, detail = notes[-1] if notes else ("", "", "")
            line = token.map[0] + 1
            blocks.append(
                Block(page, line, token.info.strip(), token.content, note, detail)
            )
        elif notes:
            raise ValueError(f"{page}: a comment on a test stands before no block.")
        notes = []
    return blocks


def commands_in_text(page):
    """Returns the Python commands in the sentences of a page.

    Those that only name a flag, which has no value there, are left out.
    """
    found = [token.content for token in _inline(page) if token.type == "code_inline"]
    return [
        text
        for text in found
        if text.startswith("python -m ") and not re.search(r" --\w+(?![\w=])", text)
    ]


def links(page):
    """Returns the links of a page to files of the project, as (path, anchor)."""
    targets = [
        token.attrs.get("href") or token.attrs.get("src")
        for token in _inline(page)
        if token.type in ("link_open", "image")
    ]
    found = [target for target in targets if not _EXTERNAL.match(target)]
    return [tuple(target.partition("#")[::2]) for target in found]


def anchors(page):
    """Returns the anchors of a page's headings."""
    tokens = markdown_it.MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return {
        toc.slugify("".join(child.content for child in inline.children), "-")
        for heading, inline in zip(tokens, tokens[1:])
        if heading.type == "heading_open"
    }


def _inline(page):
    parser = markdown_it.MarkdownIt().enable("table")
    for token in parser.parse(page.read_text(encoding="utf-8")):
        yield from token.children or ()
