"""Read the Markdown pages: their links, anchors, code blocks and commands."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = r"(?:python3?|bash|pip|torchrun|natzoo-[\w-]+)"


def tracked(*patterns: str) -> list[Path]:
    """Return the files of the checkout that match, including files not committed yet."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return sorted(ROOT / name for name in set(names) - {""} if (ROOT / name).is_file())


PAGES = tracked("*.md")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks in one language."""
    return [text for found, text in _FENCE.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[str]:
    """Return the commands of a page, from bash blocks and from inline code. Shell scripts are left out."""
    lines = []
    for block in blocks(page, "bash"):
        if not block.startswith("#!"):
            lines += [re.sub(r"\s+#.*$", "", line).strip() for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    prose = _FENCE.sub("", page.read_text())
    lines += [" ".join(text.split()) for text in re.findall(rf"`({_COMMAND} [^`]+)`", prose)]
    return [line for line in lines if line]


def links(page: Path) -> list[str]:
    """Return the targets of links and pictures, except those on other sites."""
    text = _FENCE.sub("", page.read_text())
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    return [link for link in found if not re.match(r"https?:", link)]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub derives from the headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}
