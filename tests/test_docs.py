"""The pages: their links lead somewhere, their Python runs."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "classification"))
from models import create_model
from options import parse

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "classification").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("name", ["README.md", "NATTEN.md"])
def test_python_blocks_run(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {})


def test_configs_are_read():
    """Every YAML file has keys that train.py knows and names a model that can be built."""
    configs = sorted((ROOT / "configs").rglob("*.yml"))
    assert configs
    for config in configs:
        args = parse(["-c", str(config)])
        create_model(args.model, 10, **args.model_kwargs)
