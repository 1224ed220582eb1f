"""tools/push_to_hub.py and hubconf.py: cards of runs and published models, and loading with torch.hub."""

from __future__ import annotations

import push_to_hub
import pytest
import torch
from hub_server import hub  # noqa: F401  a fixture
from small_models import SMALL, small

import hubconf
from natzoo.checkpoints import find_entry, path_in_cache, write_checkpoint, write_weights, zoo_entries
from natzoo.classification.options import make_parser
from test_tools.pages import ROOT


@pytest.fixture
def run_folder(tmp_path):
    """A run of train.py: best.pth, and last.pth with its options."""
    record = {
        "model": "nat_mini",
        "model_kwargs": SMALL["nat_mini"],
        "num_classes": 5,
        "classes": ["a", "b", "c", "d", "e"],
        "preprocessing": {"input_size": [3, 32, 32]},
    }
    best = {"model": small("nat_mini").state_dict(), "record": record}
    options = vars(make_parser().parse_args(["data/digits", "--lr", "0.00321", "--workers", "3"]))
    write_checkpoint(tmp_path / "best.pth", best)
    write_checkpoint(tmp_path / "last.pth", {**best, "options": options, "best": 96.25})
    (tmp_path / "results-digits.csv").write_text("model,top1,top5\nnat_mini,97.5,100\n")
    return tmp_path


def test_card_of_a_run(run_folder):
    words = ["--license", "mit", "--data", "Digits.", "--results", str(run_folder / "results-digits.csv")]
    push_to_hub.main([str(run_folder / "best.pth"), "someone/nat", *words, "--card", str(run_folder / "card.md")])
    text = (run_folder / "card.md").read_text()
    for part in ("license: mit", "Digits.", "lr: 0.00321", "| digits | 97.50 | 100.00 |", "someone/nat", "32x32"):
        assert part in text
    assert "workers" not in text and "data/digits" not in text and "96.25" not in text
    push_to_hub.main(
        [*map(str, (run_folder / "best.pth", "someone/nat", "--card", run_folder / "card.md")), *words[:2]]
    )
    assert "| validation images of the training run | 96.25 | - |" in (run_folder / "card.md").read_text()


def test_card_of_a_published_model(tmp_path, monkeypatch):
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path))
    import timm

    write_weights(path_in_cache(find_entry("nat_mini")), timm.create_model("nat_mini").state_dict())
    push_to_hub.main(["nat_mini", "someone/nat", "--form", "transformers", "--card", str(tmp_path / "card.md")])
    text = (tmp_path / "card.md").read_text()
    assert "81.80" in text and "model: nat_mini" in text and "license: mit" in text


def test_push(run_folder, hub, capsys):  # noqa: F811
    push_to_hub.main([str(run_folder / "best.pth"), "someone/nat", "--license", "mit"])
    assert capsys.readouterr().out.strip() == f"{hub.url}/someone/nat"
    model = torch.hub.load(str(ROOT), "checkpoint", "hf-hub:someone/nat", source="local")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), small("nat_mini")(x))


def test_license_is_required(run_folder):
    with pytest.raises(ValueError, match="--license"):
        push_to_hub.main([str(run_folder / "best.pth"), "someone/nat"])


@pytest.mark.parametrize("name", ["hands", "not valid/hands", "a/b/c"])
def test_names_of_repositories(run_folder, name):
    with pytest.raises(ValueError, match=f"^{name} .*OWNER/"):
        push_to_hub.main([str(run_folder / "best.pth"), name, "--card", str(run_folder / "card.md")])
    assert not (run_folder / "card.md").exists()


def test_torch_hub():
    model = torch.hub.load(str(ROOT), "dinat_mini", source="local", **SMALL["dinat_mini"])
    assert model.num_classes == 5
    with pytest.raises(RuntimeError, match="wibble"):
        torch.hub.load(str(ROOT), "wibble", source="local")


def test_entry_points_are_the_classifiers():
    entries = {name for name in vars(hubconf) if not name.startswith("_") and callable(getattr(hubconf, name))}
    assert entries == {name for name, entry in zoo_entries().items() if entry.task == "classification"} | {"checkpoint"}
