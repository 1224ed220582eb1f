"""What the pages hold: their commands, their Python, their links and anchors."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Words that begin a command where it stands between backticks in a sentence.
_BEGINS = r"(?:python3?|bash|pip|torchrun|apt|\.) "


class Command(NamedTuple):
    """A command as a page prints it, and where."""

    text: str
    where: str


def tracked(*patterns: str) -> list[Path]:
    """Files of the checkout, those not yet committed included."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return sorted(ROOT / name for name in set(names) - {""} if (ROOT / name).is_file())


PAGES = tracked("*.md")
# Programs whose docstrings print commands.
PROGRAMS = [
    path for path in tracked("tools/*.py", "natten/*.py") if path.parent.name in ("tools", "natten", "geometry")
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [text for found, text in _FENCE.findall(page.read_text()) if found == language]


def commands() -> list[Command]:
    """Every command of the pages, fenced or between backticks, and of the programs' docstrings."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            found += [Command(text, name_of(page)) for text in _commands_of_block(block)]
        prose = _FENCE.sub("", page.read_text())
        found += [Command(" ".join(text.split()), name_of(page)) for text in re.findall(rf"`({_BEGINS}[^`]+)`", prose)]
    for program in PROGRAMS:
        docstring = re.match(r'"""(.*?)"""', program.read_text(), re.DOTALL)
        lines = re.findall(r"^ *(python (?:-m |tools/).*)$", docstring[1] if docstring else "", re.MULTILINE)
        # What it does stands behind two spaces or more.
        found += [Command(re.split(r" {2,}", line)[0], name_of(program)) for line in lines]
    return [command for command in found if not command.text.startswith(". ") or command.text.endswith("/activate")]


def _commands_of_block(block: str) -> list[str]:
    """One a line, a backslash joining lines; a block that begins as a script is one."""
    if block.startswith("#!"):
        return [block]
    lines = (re.sub(r"\s+#.*$", "", line).strip() for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines())
    return [line for line in lines if line]


def links(page: Path) -> list[str]:
    """Where a page's links and pictures lead, but for those to other sites."""
    text = _FENCE.sub("", page.read_text())
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    return [link for link in found if not re.match(r"https?:", link)]


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}
