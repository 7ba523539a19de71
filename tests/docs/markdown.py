"""Reads the Markdown and the Makefile of the repository."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHELL = ("sh", "bash", "shell", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string ("python", "sh", ...), text and first line in the file."""

    info: str
    text: str
    line: int


def blocks(markdown: str) -> list[Block]:
    """All fenced blocks, in order; an indented fence is dedented."""
    found = []
    info, lines, start, fence, indent = "", [], 0, "", 0
    for number, line in enumerate(markdown.splitlines(), 1):
        opening = re.match(r"( *)(```+)(.*)", line)
        if not fence and opening:
            indent, fence, info = len(opening[1]), opening[2], opening[3].strip()
            lines, start = [], number + 1
        elif fence and line.strip() == fence:
            found.append(Block(info, "\n".join(lines) + "\n", start))
            fence = ""
        elif fence:
            lines.append(line[min(indent, len(line) - len(line.lstrip())) :])
    if fence:
        raise ValueError(f"The block that begins in line {start - 1} is never closed.")
    return found


def commands(markdown: str) -> Iterator[list[str]]:
    """The words of every command: lines of shell blocks, and code spans that begin with one of ours."""
    lines = []
    for block in blocks(markdown):
        if block.info.split(" ")[0] in SHELL:
            lines += block.text.replace("\\\n", " ").splitlines()
    prose = re.sub(r"(?ms)^ *```.*?^ *```$", "", markdown)
    lines += re.findall(r"`((?:make|python|torchrun) [^`\n]+)`", prose)
    for line in lines:
        text = line.strip().removeprefix("$ ")
        if not text or text.startswith("#"):
            continue
        for part in re.split(r"&&|\|\||[;|]", text):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def make_targets(makefile: str) -> set[str]:
    """The targets that are meant to be called by name."""
    return set(re.findall(r"(?m)^([a-z][a-z-]*):(?!=)", makefile))


def table(markdown: str, header: str) -> list[list[str]]:
    """Cells of the table whose first header cell is `header`, without header and rule."""
    lines = markdown.splitlines()
    for number, line in enumerate(lines):
        if line.replace(" ", "").startswith(f"|{header.replace(' ', '')}|"):
            rows = []
            for row in lines[number + 2 :]:
                if not row.startswith("|"):
                    break
                rows.append([cell.strip() for cell in row.strip().strip("|").split("|")])
            return rows
    raise ValueError(f"There is no table with the header {header!r}.")
