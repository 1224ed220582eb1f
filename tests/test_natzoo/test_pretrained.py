"""From a name to a model with weights; downloads are simulated."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from natzoo.checkpoints import (
    DownloadError,
    find_entry,
    locate,
    path_in_cache,
    sources,
    write_checkpoint,
    write_weights,
    zoo_entries,
)
from natzoo.checkpoints.keys import to_hf

SMALL = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3}


def small(name="nat_mini", seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


@pytest.fixture
def weights():
    return small().state_dict()


@pytest.fixture
def downloads(monkeypatch, tmp_path, weights):
    """Simulate downloads, which all contain the same weights; return the list of requested URLs."""
    requested = []

    def fetch(urls, path, sha256=None, size=0):
        requested.extend(urls)
        write_checkpoint(tmp_path / path.name, weights)
        return tmp_path / path.name

    monkeypatch.setattr(sources, "fetch", fetch)
    return requested


def assert_loaded(model, weights):
    own = model.state_dict()
    for name, value in weights.items():
        assert torch.equal(own[name], value), name


# ----- the list -----


def test_list_matches_registered_models():
    entries = {name: entry for name, entry in zoo_entries().items() if entry.task == "classification"}
    assert sorted(entries) == sorted(timm.list_models(["nat_*", "dinat_*", "vitrpb_*"]))
    for name, entry in entries.items():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.url == entry.url
        assert cfg.num_classes == entry.facts.get("classes", 1000)
        assert cfg.input_size[1] == entry.facts.get("size", 224)


def test_list_is_complete():
    tasks = [entry.task for entry in zoo_entries().values()]
    assert {task: tasks.count(task) for task in tasks} == {
        "classification": 25,
        "detection": 21,
        "segmentation": 13,
        "mask2former": 8,
    }
    content = yaml.safe_load(sources.ZOO_FILE.read_text())
    assert sum(len(rows) for rows in content.values() if isinstance(rows, dict)) == 67


# ----- locate -----


def test_locate(downloads, tmp_path, weights):
    write_checkpoint(tmp_path / "a.pth", weights)
    assert locate(tmp_path / "a.pth") == tmp_path / "a.pth"
    locate("https://example.org/some/b.pth?download=1")
    locate("nat_mini.in1k")
    locate("maskrcnn_dinat_mini")
    assert downloads == [
        "https://example.org/some/b.pth?download=1",
        "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth",
        "https://shi-labs.com/projects/dinat/checkpoints/coco/maskrcnn_dinat_mini.pth",
    ]


def test_locate_unknown():
    with pytest.raises(ValueError, match=r"nat_minni.*nat_mini\b"):
        locate("nat_minni")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        locate("weights/nowhere.pth")
    for url in ("https://example.org/", "https://example.org/a/..", "https://example.org/%2e%2e"):
        with pytest.raises(ValueError, match=url):
            locate(url)


def test_a_published_name_that_is_also_a_path(downloads, tmp_path, weights, monkeypatch):
    """is rejected as ambiguous; with a separator or a suffix it is a path."""
    monkeypatch.chdir(tmp_path)
    Path("nat_mini").mkdir()
    write_weights(Path("nat_mini/model.safetensors"), weights)
    with pytest.raises(ValueError, match="nat_mini"):
        locate("nat_mini")
    assert locate("./nat_mini") == locate(Path("nat_mini")) == Path("nat_mini/model.safetensors")
    write_checkpoint(Path("nat_tiny.pth"), weights)
    assert locate("nat_tiny.pth") == Path("nat_tiny.pth")
    locate("nat_tiny")
    assert downloads == [find_entry("nat_tiny").url]


def test_files_with_the_same_name_from_different_urls(server, monkeypatch, tmp_path):
    """They do not collide with each other or with a published file."""
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path))
    urls = [server.url("a/nat_mini.pth"), server.url("b/nat_mini.pth"), server.url("b/nat_mini.pth?version=2")]
    paths = {locate(url) for url in urls}
    assert len(paths | {path_in_cache(find_entry("nat_mini"))}) == 4
    assert {path.name for path in paths} == {"nat_mini.pth"}
    assert {locate(url) for url in urls} == paths
    assert len(server.ranges) == 3
    published = [path_in_cache(entry) for entry in zoo_entries().values()]
    assert len(set(published)) == len(published)


def test_url_of_a_published_file_equals_its_name(downloads):
    entry = find_entry("nat_mini")
    assert locate(entry.url) == locate("nat_mini")
    assert locate(entry.url).name == path_in_cache(entry).name
    assert set(downloads) == {entry.url}


def test_hub_repository_with_either_file(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import EntryNotFoundError

    class Missing(EntryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "no such file")

    def download(repository, name, revision=None, cache_dir=None, local_files_only=False):
        requested.append((repository, name, revision))
        if name not in available:
            raise Missing
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(sources, "is_unreachable", lambda url: False)
    requested, available = [], ["pytorch_model.bin"]
    assert locate("hf-hub:somebody/nat") == tmp_path / "pytorch_model.bin"
    assert requested == [("somebody/nat", name, None) for name in ("model.safetensors", "pytorch_model.bin")]
    assert locate("hf-hub:somebody/nat@v2") == tmp_path / "pytorch_model.bin"
    assert requested[-1] == ("somebody/nat", "pytorch_model.bin", "v2")
    available = []
    with pytest.raises(DownloadError, match=r"somebody/nat.*no such file"):
        locate("hf-hub:somebody/nat")


def test_hub_is_tried_after_the_site(monkeypatch, tmp_path, weights):
    import huggingface_hub

    def fetch(urls, path, sha256=None, size=0):
        raise DownloadError(f"{path.name} could not be downloaded.")

    def download(repository, name, revision=None, cache_dir=None, local_files_only=False):
        assert (repository, name) == ("shi-labs/nat-mini-in1k-224", "model.safetensors")
        save_file({name: value.contiguous() for name, value in to_hf(weights, "nat.").items()}, tmp_path / name)
        return str(tmp_path / name)

    monkeypatch.setattr(sources, "fetch", fetch)
    monkeypatch.setattr(sources, "is_unreachable", lambda url: False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_loaded(small(seed=1, pretrained=True), weights)

    def offline(repository, name, revision=None, cache_dir=None, local_files_only=False):
        raise ConnectionError("no net")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(DownloadError, match=r"nat_mini\.pth.*shi-labs/nat-mini-in1k-224.*no net"):
        small(pretrained=True)


def test_without_network_only_the_local_hub_cache_is_used(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import LocalEntryNotFoundError

    def nowhere(*_):
        raise socket.gaierror("name or service not known")

    def download(repository, name, revision=None, cache_dir=None, local_files_only=False):
        assert local_files_only
        if name not in available:
            raise LocalEntryNotFoundError("a long text")
        return str(tmp_path / name)

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(sources, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    available = ["pytorch_model.bin"]
    assert locate("hf-hub:somebody/nat") == tmp_path / "pytorch_model.bin"
    available = []
    with pytest.raises(DownloadError, match=r"somebody/nat.*huggingface\.co"):
        locate("hf-hub:somebody/nat")
    monkeypatch.setattr(sources, "getproxies", lambda: {"https": "proxy:3128"})
    assert not sources.is_unreachable("https://huggingface.co")


# ----- models -----


@pytest.mark.parametrize("name", ["nat_mini", "nat_mini.in1k"])
def test_pretrained(downloads, weights, name):
    assert_loaded(small(name, seed=1, pretrained=True), weights)
    assert downloads == [find_entry("nat_mini").url]


def test_pretrained_from_a_state_dict(downloads, weights):
    overlay = {"state_dict": to_hf(weights, "nat."), "num_classes": 1000}
    assert_loaded(small(seed=1, pretrained=True, pretrained_cfg_overlay=overlay), weights)
    assert downloads == []


def test_pretrained_from_a_file_and_a_url(downloads, tmp_path, weights):
    write_checkpoint(tmp_path / "mine.pth", {"model": weights})
    overlay = {"file": str(tmp_path / "mine.pth")}
    assert_loaded(small(seed=1, pretrained=True, pretrained_cfg_overlay=overlay), weights)
    assert downloads == []
    overlay = {"url": "https://example.org/other.pth"}
    assert_loaded(small(seed=1, pretrained=True, pretrained_cfg_overlay=overlay), weights)
    assert downloads == ["https://example.org/other.pth"]


def test_pretrained_for_other_classes_channels_and_windows(downloads, weights, caplog):
    model = small(seed=1, pretrained=True, num_classes=7, in_chans=1, kernel_size=5)
    assert_loaded(model, {name: value for name, value in weights.items() if "norm" in name})
    text = caplog.text
    for part in ("7 classes", "first convolution", "5x5", "9x9"):
        assert part in text


def test_pretrained_feature_extractor(downloads, weights):
    features = small(seed=1, pretrained=True, features_only=True, out_indices=(0,))
    assert torch.equal(features.model.patch_embed.norm.weight, weights["patch_embed.norm.weight"])
    assert [m.shape for m in features(torch.zeros(1, 3, 32, 32))] == [(1, 16, 8, 8)]


def test_no_download_without_pretrained(downloads):
    small()
    assert downloads == []


def test_cache_dir(monkeypatch, tmp_path, weights):
    """timm's argument selects the folder for downloads from all sources."""
    targets = []

    def fetch(urls, path, sha256=None, size=0):
        targets.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, weights)
        return path

    monkeypatch.setattr(sources, "fetch", fetch)
    timm.create_model("nat_mini", pretrained=True, cache_dir=str(tmp_path / "mine"), **SMALL)
    overlay = {"url": "https://example.com/other.pth"}
    timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "mine", **SMALL)
    assert targets[0] == path_in_cache(find_entry("nat_mini"), tmp_path / "mine")
    assert [path.is_relative_to(tmp_path / "mine") for path in targets] == [True, True]


# ----- without a network -----


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Let no host name be resolved, and let waiting be an error."""

    def fail(*arguments, **named):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    def wait(seconds):
        raise AssertionError(f"waited for {seconds} s")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("time.sleep", wait)
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "what", ["nat_mini", "hf-hub:shi-labs/nat-mini-in1k-224", "hf-hub:nat-mini", "https://example.com/a.pth"]
)
def test_sources_without_a_network(offline, what):
    with pytest.raises(DownloadError, match=what.removeprefix("https://")):
        locate(what)


@pytest.mark.parametrize("what", ["nat_mni", "shi-labs/nat-mini-in1k-244", "nat-mini", "nat_mini.pt"])
def test_misspelled_names_without_a_network(offline, what):
    with pytest.raises((ValueError, FileNotFoundError), match=what):
        locate(what)


def test_hub_models_of_timm_without_a_network(offline):
    factory = pytest.importorskip("natzoo.classification.factory")
    with pytest.raises(ValueError, match=r"^--model hf-hub:timm/resnet18\.a1_in1k"):
        factory.create_model("hf-hub:timm/resnet18.a1_in1k", {"pretrained": True})


def test_transformers_without_a_network(offline):
    hf = pytest.importorskip("natzoo.hf")
    with pytest.raises(OSError, match="connect"):
        hf.NatForImageClassification.from_pretrained("shi-labs/nat-mini-in1k-224")
