"""The pages: links resolve, Python blocks run, printed commands exist, and tables match natzoo/zoo.yaml."""

import os
import re
import subprocess
import sys

import pytest
import results_table
import timm
import torch

from natzoo.checkpoints import find_entry, path_in_cache, write_weights, zoo_entries
from natzoo.hf import save_folder
from natzoo.hf.export import make_config
from test_tools import programs
from test_tools.pages import PAGES, ROOT, anchors, blocks, commands, links, name_of, tracked

# ---------------------------------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_resolve(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_picture_has_both_themes(page):
    text = page.read_text()
    for light in re.findall(r'src="([^"]+)_light\.png"', text):
        assert f'srcset="{light}_dark.png"' in text, light


def test_page_names_are_unique():
    names = [page.name for page in PAGES if page.name != "README.md"]
    assert sorted(names) == sorted(set(names))


# ---------------------------------------------------------------------------------------------------------------------
# Python
# ---------------------------------------------------------------------------------------------------------------------


def write_random_weights(name):
    """Put random weights where the published ones are expected: in the cache, and as the hub's repository."""
    model = timm.create_model(name)
    path_in_cache(find_entry(name)).parent.mkdir(exist_ok=True)
    write_weights(path_in_cache(find_entry(name)), model.state_dict())
    if find_entry(name).hub:
        save_folder(model, find_entry(name).hub)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path / "cache"))
    code = "\n".join(blocks(page, "python"))
    for name, entry in zoo_entries().items():
        loaded = rf'"{name}", pretrained=True|locate\("{name}"\)' + (f'|"{entry.hub}"' if entry.hub else "")
        if re.search(loaded, code):
            write_random_weights(name)
    for block in blocks(page, "python"):
        exec(compile(block, name_of(page), "exec"), {})


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name_of)
def test_bash_blocks_parse(page):
    for block in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def example_commands():
    """The commands of the pages, and the examples in the docstrings of the tools."""
    found = {command: None for page in PAGES for command in commands(page)}
    for path in tracked("tools/*.py", "natten/*.py"):
        docstring = re.match(r'"""(.*?)"""', path.read_text(), re.DOTALL)
        lines = re.findall(r"^ *(python (?:-m |tools/).*)$", docstring[1] if docstring else "", re.MULTILINE)
        found |= {re.split(r" {2,}", line)[0]: None for line in lines}
    return list(found)


@pytest.mark.parametrize("command", example_commands())
def test_command_is_accepted(command, monkeypatch):
    if re.search("detection|segmentation|CONFIG", command):
        pytest.importorskip("mmdet", reason="the extra openmmlab is not installed")
    monkeypatch.chdir(ROOT)
    programs.check(command)


_TRAIN = "--epochs 1 --warmup-epochs 0 --workers 0"
_MM = "--cfg-options train_cfg.max_iters=2 train_cfg.val_interval=2 default_hooks.checkpoint.interval=2"
_SCRIPTS = (  # each in the order in which a reader would run them
    f"""
    python tools/make_data.py digits data/digits
    python classification/train.py data/digits --config configs/quickstart/nat.yml {_TRAIN}
    bash classification/dist_train.sh configs/quickstart/nat.yml 2 data/digits --work-dir output/dist {_TRAIN}
    python classification/validate.py data/digits --checkpoint output/nat/best.pth
    python classification/predict.py data/digits/val/3 --checkpoint output/nat/best.pth --topk 3
    python tools/convert.py output/nat/best.pth hf/nat
    python tools/visualize.py attention data/digits/val/3/00*.png --checkpoint output/nat/best.pth --out attention.png
    """,
    f"""
    python tools/make_data.py shapes data/shapes
    python detection/train.py configs/quickstart/mask_rcnn.py {_MM}
    python detection/test.py configs/quickstart/mask_rcnn.py output/mask_rcnn/iter_2.pth --show-dir output/detected
    bash segmentation/dist_train.sh configs/quickstart/upernet.py 2 {_MM}
    python segmentation/test.py configs/quickstart/upernet.py output/upernet/iter_2.pth
    python tools/convert.py output/upernet/iter_2.pth backbone.pth --backbone
    """,
)


@pytest.mark.slow
@pytest.mark.parametrize("script", _SCRIPTS, ids=["classification", "openmmlab"])
def test_commands_run(script, tmp_path):
    if "detection" in script:
        pytest.importorskip("mmdet", reason="the extra openmmlab is not installed")
    for name in ("classification", "configs", "detection", "segmentation", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def cells(row):
    return [cell.strip().split(" ")[0] for cell in row.split("|")]


@pytest.mark.parametrize("name", zoo_entries())
def test_rows_of_published_files_match_the_zoo(name):
    """Every table row that links a published file states its figures; the model cards have one row for each file."""
    entry = zoo_entries()[name]
    rows = [row for page in PAGES for row in re.findall(r"^\|.*\|$", page.read_text(), re.M) if f"({entry.url})" in row]
    assert rows
    keys = ("macs", "top1", "box_ap", "mask_ap", "pq", "ap", "miou", "miou_ms")
    for row in rows:
        assert not {str(entry.facts[key]) for key in keys if key in entry.facts} - set(cells(row)), row
    card = next(row for row in rows if f"`{name}` |" in row)
    assert entry.hub is None or f"(https://huggingface.co/{entry.hub})" in card
    if "parameters" in entry.facts:
        assert str(round(entry.facts["parameters"] / 1e6, 1)) in cells(card)


@pytest.mark.parametrize("page", ["NAT.md", "DiNAT.md"])
def test_architecture_tables_match_the_models(page):
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d, ]+) \| (\d+) \| ([\d, ]+) \| (\d) \| (\S+) \| (\S+) \|$", (ROOT / page).read_text(), re.M
    )
    assert rows
    for name, depths, channels, heads, mlp_ratio, layer_scale, drop_path in rows:
        with torch.device("meta"):
            config = make_config(timm.create_model(name))
        assert (config.depths, config.num_heads) == tuple([int(x) for x in cell.split(",")] for cell in (depths, heads))
        assert (config.embed_dim, config.mlp_ratio) == (int(channels), int(mlp_ratio))
        assert config.drop_path_rate == pytest.approx(float(drop_path))
        assert config.layer_scale_init_value == (0 if layer_scale == "-" else float(layer_scale))


def test_table_of_classifiers_is_current():
    """README.md has the rows that tools/results_table.py writes, one per classifier."""
    text = results_table.README.read_text()
    assert results_table.update(text) == text
    assert sum(f"| `{name}` |" in text for name in zoo_entries()) == 25


def test_results_of_the_readme_match_the_zoo():
    rows = re.findall(r"^\| \[(NAT|DiNAT|DiNAT_s)-(\w+)\](.*)$", (ROOT / "README.md").read_text(), re.M)
    assert rows
    for family, size, row in rows:
        name = f"{family}_{size}".lower()
        of_tasks = [f"cascadedmaskrcnn_{name}", f"{name}_cascademaskrcnn", f"upernet_{name}", f"{name}_upernet"]
        facts = [zoo_entries()[task].facts for task in of_tasks if task in zoo_entries()]
        keys = ("box_ap", "mask_ap", "miou")
        assert re.findall(r"\d+\.\d", row) == [str(found[key]) for found in facts for key in keys if key in found], name
