"""The pages: their links lead somewhere, their Python runs, their commands are taken by the programs, and run.

Every command that is printed must have a rule in rules.py. All of them are read by the parser of the program that they
call, in every test run; slow tests then run them in a copy of the checkout, on small drawn data, with random weights in
place of the published ones.
"""

import importlib.util
import re

import pytest
import timm
import torch

from natzoo.checkpoints import zoo_entries
from natzoo.hf.export import make_config
from test_tools import pages, programs, rules, sandbox
from test_tools.pages import PAGES, ROOT, name_of

COMMANDS = pages.commands()
TEXTS = list(dict.fromkeys(command.text for command in COMMANDS))
needs_openmmlab = pytest.mark.skipif(
    importlib.util.find_spec("mmdet") is None, reason="the extra openmmlab is not installed"
)


def parametrize(texts):
    """A test for each command."""
    marks = lambda text: needs_openmmlab if re.search("detection|segmentation|CONFIG", text) else ()  # noqa: E731
    return pytest.mark.parametrize("text", [pytest.param(text, id=text, marks=marks(text)) for text in texts])


@pytest.fixture
def counted(record_property):
    """Counts things, whose numbers conftest.py prints after all tests."""
    return lambda what, number=1: record_property("pages", (what, number))


# ---------------------------------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------------------------------


def test_links_and_anchors(counted):
    number = 0
    for page in PAGES:
        for link in pages.links(page):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{name_of(page)}: {link}"
            if anchor:
                assert anchor in pages.anchors(target), f"{name_of(page)}: {link}"
            number += 1
    assert number > 200
    counted("links checked", number)


def test_every_picture_has_both_themes():
    for page in PAGES:
        for light in re.findall(r'src="([^"]+)_light\.png"', page.read_text()):
            assert f'srcset="{light}_dark.png"' in page.read_text(), f"{name_of(page)}: {light}"


# ---------------------------------------------------------------------------------------------------------------------
# Python
# ---------------------------------------------------------------------------------------------------------------------

# Published weights that the Python of a page loads.
WEIGHTS = {
    "README.md": ("dinat_mini",),
    "NAT.md": ("nat_mini",),
    "DiNAT.md": ("dinat_mini", "dinat_tiny", "dinat_s_tiny"),
}


@pytest.mark.parametrize("page", [page for page in PAGES if pages.blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch, counted):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path / "cache"))
    for name in WEIGHTS.get(name_of(page), ()):
        sandbox.classifier(name)
    for block in pages.blocks(page, "python"):
        exec(compile(block, name_of(page), "exec"), {})
        counted("blocks of Python run")


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def test_every_command_has_a_rule(counted):
    missing = [command for command in COMMANDS if rules.find(command.text) is None]
    assert not missing, "give each a rule in tests/test_tools/rules.py: " + "; ".join(map(str, missing))
    used = {rules.find(text).pattern for text in TEXTS}
    assert not [rule.pattern for rule in rules.RULES if rule.pattern not in used], "rules for no command"
    for rule in rules.RULES:
        for path in re.findall(r"tests/\S+?\.py", rule.elsewhere):
            assert (ROOT / path).is_file(), path
    counted("commands printed", len(COMMANDS))
    counted("different ones", len(TEXTS))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return programs.checkout_of_links(tmp_path_factory.mktemp("links"))


@parametrize(TEXTS)
def test_command_is_taken(text, checkout, monkeypatch, counted):
    monkeypatch.chdir(checkout)
    programs.check(text, checkout)
    counted("commands read by their programs")


@parametrize(text for text in TEXTS if rules.find(text) and rules.find(text).quick)
def test_quick_command_runs(text, checkout, monkeypatch, counted, tmp_path):
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path))
    ((_, *words),) = programs.calls(text, checkout)
    try:
        programs.call(words)
    except SystemExit as left:
        assert not left.code
    counted("commands run")


def in_order(text: str) -> int:
    """What later commands need is made by earlier rules."""
    return next(number for number, rule in enumerate(rules.RULES) if rule is rules.find(text))


RUN = [text for text in TEXTS if rules.find(text) and not rules.find(text).elsewhere]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the checkout with drawn data, and stand-ins for published weights."""
    folder = tmp_path_factory.mktemp("copy")
    sandbox.copy_checkout(folder)
    sandbox.draw_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NATZOO_CACHE_DIR", str(folder / "cache"))
        sandbox.all_weights()
    return folder


@pytest.mark.slow
@parametrize(sorted(RUN, key=in_order))
def test_command_runs(text, copy, counted):
    done = sandbox.run(rules.made_small(text, rules.find(text)), copy)
    assert done.returncode == 0, f"{done.args[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    counted("commands run")


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo_entries())
def test_published_figures(name):
    """One row of NAT.md or DiNAT.md, with the config, the file and every figure."""
    entry = zoo_entries()[name]
    text = (ROOT / "NAT.md").read_text() + (ROOT / "DiNAT.md").read_text()
    (row,) = re.findall(rf"^\| `{name}` \|.*\.pth.*$", text, re.MULTILINE)
    assert f"({entry.url})" in row
    assert "[config](configs/" in row or "21k" in name
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
