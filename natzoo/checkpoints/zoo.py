"""The published checkpoints, as natzoo/zoo.yaml lists them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

LIST = Path(__file__).parents[1] / "zoo.yaml"


class Entry(NamedTuple):
    """A published checkpoint.

    Attributes:
        name: registered name of a classifier, else the name of its file.
        task: classification, detection, segmentation or mask2former.
        url: on the project's site.
        hub: repository on the Hugging Face hub that has the same weights, or None.
        sha256: of the file at url, or None where nobody published it.
        facts: what else the list says: parameters, MACs, published results.
    """

    name: str
    task: str
    url: str
    hub: str | None
    sha256: str | None
    facts: Mapping[str, Any]

    @property
    def size(self) -> int:
        """About how many bytes the file has: four a parameter."""
        return 4 * self.facts.get("parameters", round(1e6 * self.facts.get("params", 0)))


@cache
def entries() -> dict[str, Entry]:
    """All published checkpoints by name, in the order of the list."""
    # LibYAML, where PyYAML has it, reads the same eight times faster: this is part of `import natzoo`.
    content = yaml.load(LIST.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    site = content.pop("site")
    return {name: _entry(name, task, site, facts) for task, rows in content.items() for name, facts in rows.items()}


def _entry(name: str, task: str, site: str, facts: dict[str, Any]) -> Entry:
    facts = dict(facts)
    return Entry(name, task, site + facts.pop("file"), facts.pop("hub", None), facts.pop("sha256", None), facts)


def find(name: str) -> Entry:
    """The checkpoint of that name; timm's tag behind a dot may be there or not.

    Raises:
        ValueError: if there is none, naming those that are like it.
    """
    known = entries()
    found = known.get(name) or known.get(name.split(".")[0])
    if found is None:
        like = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(like)}?" if like else "`python tools/download.py list` shows all."
        raise ValueError(f"{name!r} is neither a file nor a published checkpoint: {hint}")
    return found
