"""Sharing models on a stub of the Hugging Face hub: what is pushed in each form loads again everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from hub_server import hub  # noqa: F401  a fixture
from huggingface_hub import ModelCard
from small_models import SMALL, small
from transformers import pipeline

import natzoo.hf
from natzoo.checkpoints import write_weights
from natzoo.classification import predict
from natzoo.classification.inference import restore
from natzoo.hub import Facts, make_card, push_to_hub, read_results

NAME = "dinat_mini"
CLASSES = ["cat", "dog", "bird", "fish", "cow"]
PREPROCESSING = {
    "input_size": [3, 32, 32],
    "crop_pct": 0.9,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}
FACTS = Facts(
    data="Pictures of animals.",
    recipe="lr: 0.001",
    license="mit",
    results=[("animals", 93.25, 99.5), ("zoo", 80.0, None)],
)


@pytest.fixture
def model():
    model = small(NAME)
    model.pretrained_cfg = {**model.pretrained_cfg, **PREPROCESSING}
    return model


@pytest.fixture
def record():
    return {
        "model": NAME,
        "model_kwargs": SMALL[NAME],
        "num_classes": 5,
        "classes": CLASSES,
        "preprocessing": PREPROCESSING,
    }


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def assert_restored(found, record, model) -> None:
    torch.testing.assert_close(found(images()), model(images()))
    assert record["classes"] == CLASSES
    preprocessing = record["preprocessing"]
    assert list(preprocessing["input_size"]) == [3, 32, 32] and preprocessing["interpolation"] == "bilinear"
    assert list(preprocessing["mean"]) == PREPROCESSING["mean"]
    assert preprocessing["crop_pct"] == pytest.approx(0.9, abs=0.02)


def test_timm_form(hub, model, record):  # noqa: F811
    url = push_to_hub(model, record, "someone/animals", "timm", FACTS)
    assert url == f"{hub.url}/someone/animals"
    assert hub.files["someone/animals"].keys() == {"README.md", "config.json", "model.safetensors"}
    loaded = timm.create_model("hf-hub:someone/animals", pretrained=True).eval()
    torch.testing.assert_close(loaded(images()), model(images()))
    assert loaded.pretrained_cfg["label_names"] == CLASSES
    torch.testing.assert_close(natzoo.hf.from_timm(loaded)(images()).logits, model(images()))
    assert_restored(*restore("hf-hub:someone/animals"), model)


def test_transformers_form(hub, model, record, monkeypatch):  # noqa: F811
    push_to_hub(model, record, "someone/animals", "transformers", FACTS)
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= hub.files[
        "someone/animals"
    ].keys()
    assert "auto_map" not in json.loads(hub.files["someone/animals"]["config.json"])  # no code of the repository
    classify = pipeline("image-classification", model="someone/animals")
    torch.testing.assert_close(classify.model(images()).logits, model(images()))
    assert classify.model.config.id2label == dict(enumerate(CLASSES))
    assert_restored(*restore("hf-hub:someone/animals"), model)


def test_predict_with_a_repository(hub, model, record, tmp_path, capsys):  # noqa: F811
    from PIL import Image

    push_to_hub(model, record, "someone/animals", "timm", FACTS)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    predict.main(
        [str(tmp_path / "red.png"), "--checkpoint", "hf-hub:someone/animals", "--json", str(tmp_path / "out.json")]
    )
    assert any(name in (tmp_path / "out.json").read_text() for name in CLASSES)


def test_private_repository_and_existing_card(hub, model, record):  # noqa: F811
    push_to_hub(model, record, "someone/animals", "timm", FACTS, private=True)
    assert hub.private == {"someone/animals"}
    hub.files["someone/animals"]["README.md"] = b"written by hand"
    push_to_hub(model, record, "someone/animals", "timm", FACTS)
    assert hub.files["someone/animals"]["README.md"] == b"written by hand"
    push_to_hub(model, record, "someone/animals", "timm", FACTS, new_card=True)
    assert b"Pictures of animals" in hub.files["someone/animals"]["README.md"]


def test_refusals(hub, record):  # noqa: F811
    with pytest.raises(ValueError, match="not a name"):
        push_to_hub(small(NAME), record, "not a name", "timm", FACTS)
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1,), num_heads=(1,), embed_dim=16)
    with pytest.raises(ValueError, match=r"^model "):
        push_to_hub(swin, {**record, "model": "swin_tiny_patch4_window7_224"}, "someone/swin", "transformers", FACTS)
    assert "someone/swin" not in hub.files


@pytest.mark.parametrize("form", ["timm", "transformers"])
def test_card(form, model, record):
    card = make_card("someone/animals", model, record, form, FACTS)
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("mit", form, "image-classification")
    assert [result.metric_value for result in card.data.eval_results] == [93.25, 80.0]
    text = str(card)
    for part in (
        "Pictures of animals.",
        "lr: 0.001",
        "| animals | 93.25 | 99.50 |",
        "| zoo | 80.00 | - |",
        "32x32",
        "bibtex",
    ):
        assert part in text
    assert text.count("someone/animals") == 3  # ways to load
    assert str(ModelCard(text).data.to_yaml()) == str(card.data.to_yaml())


def test_timm_folder_with_hostile_config(tmp_path, model):
    write_weights(tmp_path / "model.safetensors", model.state_dict())
    good = {"architecture": NAME, "num_classes": 5, "model_args": SMALL[NAME], "pretrained_cfg": PREPROCESSING}
    for change in (
        {"num_classes": "5"},
        {"model_args": [1]},
        {"model_args": {**SMALL[NAME], "pretrained_cfg": {"url": "http://localhost"}}},
        {"model_args": {**SMALL[NAME], "checkpoint_path": "/etc/passwd"}},
        {"architecture": "hf-hub:someone/else"},
        {"pretrained_cfg": {"input_size": [3, 10**9, 1]}},
        {"label_names": [1, 2]},
    ):
        Path(tmp_path / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=str(tmp_path)):
            restore(str(tmp_path))
    Path(tmp_path / "config.json").write_text(json.dumps(good))
    torch.testing.assert_close(restore(str(tmp_path))[0](images()), model(images()))


def test_results_of_validate(tmp_path):
    (tmp_path / "results-imagenet-a.csv").write_text("model,top1,top5\nnat_mini,12.5,40.25\n")
    (tmp_path / "all.csv").write_text("model,dataset,top1,top5\nnat_mini,imagenet,81.8,\n")
    found = read_results([tmp_path / "results-imagenet-a.csv", tmp_path / "all.csv"])
    assert found == [("imagenet-a", 12.5, 40.25), ("imagenet", 81.8, None)]
    (tmp_path / "two.csv").write_text("model,top1\nnat_mini,1\nnat_tiny,2\n")
    with pytest.raises(ValueError, match=r"two\.csv"):
        read_results([tmp_path / "two.csv"])
