"""The pages: their links lead somewhere, their Python runs."""

import re
from pathlib import Path

import pytest
import timm
import torch

from natzoo.checkpoints import write_weights
from natzoo.checkpoints.sources import path_in_cache
from natzoo.checkpoints.zoo import entries, find
from natzoo.hf import save_folder
from natzoo.hf.export import make_config

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page for folder in ("", "classification", "detection", "segmentation") for page in (ROOT / folder).glob("*.md")
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


# Page, and the published weights that its Python loads.
PYTHON = {
    "README.md": (),
    "NATTEN.md": (),
    "NAT.md": ("nat_mini",),
    "DiNAT.md": ("dinat_mini", "dinat_tiny", "dinat_s_tiny"),
}


@pytest.mark.parametrize("page", PYTHON)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """With random weights where the published ones would be: in the cache, and in place of the hub's repositories."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    for name in PYTHON[page]:
        model = timm.create_model(name)
        write_weights(path_in_cache(find(name)), model.state_dict())
        if find(name).hub:
            save_folder(model, find(name).hub)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize("name", entries())
def test_published_figures(name):
    """One row of NAT.md or DiNAT.md, with the file and every figure."""
    entry = entries()[name]
    text = (ROOT / "NAT.md").read_text() + (ROOT / "DiNAT.md").read_text()
    (row,) = re.findall(rf"^\| `{name}` \|.*\.pth.*$", text, re.MULTILINE)
    assert f"({entry.url})" in row
    assert entry.hub is None or f"(https://huggingface.co/{entry.hub})" in row
    columns = [cell.strip().split(" ")[0] for cell in row.split("|")]
    exact = entry.facts.get("parameters")
    shown = dict(entry.facts) | ({"params": round(exact / 1e6, 1)} if exact else {})
    order = ("size", "params", "macs", "top1", "box_ap", "mask_ap", "pq", "ap", "miou", "miou_ms")
    figures = [str(shown[key]) for key in order if key in shown]
    assert figures == [cell for cell in columns if cell in figures]


@pytest.mark.parametrize("page", ["NAT.md", "DiNAT.md"])
def test_architecture_tables(page):
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d, ]+) \| (\d+) \| ([\d, ]+) \| (\d) \| (\S+) \| (\S+) \|$", (ROOT / page).read_text(), re.M
    )
    assert len(rows) == {"NAT.md": 4, "DiNAT.md": 9}[page]
    for name, depths, channels, heads, mlp_ratio, layer_scale, drop_path in rows:
        with torch.device("meta"):
            config = make_config(timm.create_model(name))
        assert (config.depths, config.num_heads) == tuple([int(x) for x in cell.split(",")] for cell in (depths, heads))
        assert (config.embed_dim, config.mlp_ratio) == (int(channels), int(mlp_ratio))
        assert config.drop_path_rate == pytest.approx(float(drop_path))
        assert config.layer_scale_init_value == (0 if layer_scale == "-" else float(layer_scale))
