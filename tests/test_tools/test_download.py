"""tools/download.py, with a local server in place of the project's site."""

from __future__ import annotations

import sys

import download
import huggingface_hub
import pytest
from file_server import CONTENT, SHA256, serve, status, truncated, web_page

from natzoo import command_line
from natzoo.checkpoints import find_entry, sources, zoo_entries

SITE = sources.ZOO_FILE.read_text().split("site: ")[1].split("\n")[0]


@pytest.fixture
def site(server, monkeypatch, tmp_path):
    """Serve CONTENT for every published checkpoint; the Hugging Face hub is unreachable."""

    def offline(repository, name, revision=None, cache_dir=None, local_files_only=False):
        raise ConnectionError("no net")

    (tmp_path / "zoo.yaml").write_text(sources.ZOO_FILE.read_text().replace(SITE, server.url("projects/")))
    monkeypatch.setattr(sources, "ZOO_FILE", tmp_path / "zoo.yaml")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(sources, "is_unreachable", lambda url: False)
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path / "cache"))
    zoo_entries.cache_clear()
    yield server
    zoo_entries.cache_clear()


@pytest.fixture
def cache(site, tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def run(site, monkeypatch, capsys):
    """Return a function that runs a command and returns its exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["download.py", *map(str, arguments)])
        code = 0
        try:
            command_line.run(download.main)
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def assert_refused(result, *parts):
    """Status 2 and one error that contains all parts."""
    code, out, err = result
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert str(part) in line


def test_list(run, cache):
    code, out, _ = run("list")
    assert code == 0
    heading, *lines = out.splitlines()
    assert heading.split()[:2] == ["name", "task"]
    assert [line.split()[0] for line in lines[::2]] == list(zoo_entries())
    for figure in ("20.0 M", "2.7 G", "81.8"):
        assert figure in lines[0]
    assert [line.strip() for line in lines[1::2]] == [entry.url for entry in zoo_entries().values()]
    _, out, _ = run("list", "--task", "mask2former")
    assert len(out.splitlines()) == 1 + 2 * 8
    run("get", "dinat_mini")
    _, out, _ = run("list", "--task", "classification")
    assert [line.split()[0] for line in out.splitlines() if " yes " in line] == ["dinat_mini"]


def test_get(run, cache, site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nat_mini").write_text("a file of the user's")
    code, out, _ = run("get", "nat_mini", "dinat_mini.in1k", "nat_mini")
    assert code == 0
    assert out.split() == [str(cache / "nat_mini.pth"), str(cache / "dinat_mini_in1k_224.pth")]
    assert (cache / "nat_mini.pth").read_bytes() == CONTENT
    code, out, _ = run("get", "nat_mini", "--out", tmp_path / "new" / "folder")
    assert out.strip() == str(tmp_path / "new" / "folder" / "nat_mini.pth")
    assert (tmp_path / "new" / "folder" / "nat_mini.pth").read_bytes() == CONTENT
    assert len(site.ranges) == 2


def test_get_resumes_an_interrupted_download(run, cache, site):
    site.behaviors = [truncated] + [status(503)] * 3
    assert_refused(run("get", "nat_mini"), "503")
    assert run("get", "nat_mini")[0] == 0
    assert site.ranges[-1] == "bytes=100000-"
    assert (cache / "nat_mini.pth").read_bytes() == CONTENT


def test_files_from_the_hub_get_the_names_of_their_checkpoints(run, site, monkeypatch, tmp_path):
    def from_hub(repository, name, revision=None, cache_dir=None, local_files_only=False):
        path = tmp_path / "hub" / repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(repository)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_hub)
    site.behaviors = [status(404)] * 2
    code, _, _ = run("get", "nat_mini", "dinat_mini", "--out", tmp_path / "out")
    assert code == 0
    for name in ("nat_mini", "dinat_mini"):
        content = (tmp_path / "out" / f"{name}.safetensors").read_text()
        assert content == f"shi-labs/{name.replace('_', '-')}-in1k-224"


def test_unknown_names(run, site):
    assert_refused(run("get", "nat_mini", "nat_minni"), "nat_minni", "nat_mini")
    assert_refused(run("verify", "wibble"), "wibble")
    assert site.ranges == []
    code, _, err = run("list", "--task", "wibble")
    assert code == 2
    assert "Traceback" not in err


def test_offline(run, cache, site):
    """The error contains what a manual download needs: the URL, the size and the path; and why it failed."""
    site.http.shutdown()
    site.http.server_close()
    address = find_entry("nat_mini").url
    parts = (address, "80 MB", cache / "nat_mini.pth", "refused", "no net")
    assert_refused(run("get", "nat_mini"), *parts)
    assert_refused(run("get", "maskrcnn_dinat_mini"), "160 MB", cache / "maskrcnn_dinat_mini.pth")


def test_a_web_page_is_refused(run, cache, site):
    site.behaviors = [web_page]
    assert_refused(run("get", "nat_mini"), "nat_mini.pth", "web page")
    assert not (cache / "nat_mini.pth").exists()


def test_verify(run, cache):
    code, out, _ = run("verify")
    assert code == 0
    assert str(cache) in out
    assert_refused(run("verify", "nat_mini"), cache / "nat_mini.pth")
    run("get", "nat_mini", "nat_tiny")
    _, out, _ = run("verify")
    assert out == f"{SHA256}  {cache / 'nat_mini.pth'}\n{SHA256}  {cache / 'nat_tiny.pth'}\n"
    (cache / "nat_small.pth").write_bytes(CONTENT)
    _, out, _ = run("verify", "nat_small")
    assert out.startswith(f"{SHA256}  {cache / 'nat_small.pth'}  (")  # has no hash to compare with


def test_verify_finds_a_damaged_file(run, cache):
    run("get", "nat_mini", "nat_tiny")
    damaged = bytearray(CONTENT)
    damaged[1234] ^= 1
    (cache / "nat_mini.pth").write_bytes(damaged)
    assert_refused(run("verify"), cache / "nat_mini.pth", SHA256)
    assert run("verify", "nat_tiny")[0] == 0
    (cache / "nat_mini.pth").unlink()
    run("get", "nat_mini")
    assert run("verify")[0] == 0


def test_a_published_hash_is_checked(run, cache, site, tmp_path):
    text = sources.ZOO_FILE.read_text().replace("nat_mini.pth,", f"nat_mini.pth, sha256: {SHA256},", 1)
    sources.ZOO_FILE.write_text(text)
    zoo_entries.cache_clear()
    site.behaviors = [lambda handler: serve(handler, content=bytes(1000))]
    assert_refused(run("get", "nat_mini"), SHA256)
    cache.joinpath("nat_mini.pth").write_bytes(bytes(1000))  # downloaded manually
    for command in ("verify", "get"):
        assert_refused(run(command, "nat_mini"), cache / "nat_mini.pth", SHA256)
