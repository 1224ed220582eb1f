"""tools/download.py, as one types it, with a server of this machine in place of the project's site."""

from __future__ import annotations

import importlib
import sys

import download
import huggingface_hub
import pytest
from file_server import CONTENT, SHA256, serve, status, truncated, web_page

from natzoo import command_line
from natzoo.checkpoints import find_entry, zoo_entries

zoo = importlib.import_module("natzoo.checkpoints.locate")  # the package exports a function of this name

SITE = zoo.ZOO_FILE.read_text().split("site: ")[1].split("\n")[0]


@pytest.fixture
def site(server, monkeypatch, tmp_path):
    """The server, which gives CONTENT for every published checkpoint; the Hugging Face hub is out of reach."""

    def offline(repository, name, revision=None, local_files_only=False):
        raise ConnectionError("no net")

    (tmp_path / "zoo.yaml").write_text(zoo.ZOO_FILE.read_text().replace(SITE, server.url("projects/")))
    monkeypatch.setattr(zoo, "ZOO_FILE", tmp_path / "zoo.yaml")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(zoo, "is_unreachable", lambda url: False)
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path / "cache"))
    zoo_entries.cache_clear()
    yield server
    zoo_entries.cache_clear()


@pytest.fixture
def cache(site, tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def run(site, monkeypatch, capsys):
    """Runs a command and returns its exit status, its output and what it complains of."""

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
    """Status 2 and one line that holds all parts."""
    code, out, err = result
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.endswith("trying again")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for part in parts:
        assert str(part) in lines[0]


def test_list(run, cache):
    code, out, _ = run("list")
    assert code == 0
    heading, *lines = out.splitlines()
    assert heading.split() == ["name", "task", "here", "published", "figures"]
    assert [line.split()[0] for line in lines[::2]] == list(zoo_entries())
    assert lines[0].endswith("20.0 M parameters, 2.7 G MACs, top1 81.8")
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


def test_get_goes_on_with_a_broken_download(run, cache, site):
    site.behaviours = [truncated] + [status(503)] * 3
    assert_refused(run("get", "nat_mini"), "503")
    assert run("get", "nat_mini")[0] == 0
    assert site.ranges[-1] == "bytes=100000-"
    assert (cache / "nat_mini.pth").read_bytes() == CONTENT


def test_get_from_the_hub_where_all_files_have_one_name(run, site, monkeypatch, tmp_path):
    def from_hub(repository, name, revision=None, local_files_only=False):
        path = tmp_path / "hub" / repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(repository)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_hub)
    site.behaviours = [status(404)] * 2
    code, _, _ = run("get", "nat_mini", "dinat_mini", "--out", tmp_path / "out")
    assert code == 0
    for name in ("nat_mini", "dinat_mini"):
        content = (tmp_path / "out" / f"{name}.safetensors").read_text()
        assert content == f"shi-labs/{name.replace('_', '-')}-in1k-224"


def test_a_wrong_name(run, site):
    assert_refused(run("get", "nat_mini", "nat_minni"), "'nat_minni'", "did you mean nat_mini")
    assert_refused(run("verify", "wibble"), "'wibble'", "tools/download.py list")
    assert site.ranges == []
    code, _, err = run("list", "--task", "wibble")
    assert code == 2
    assert "Traceback" not in err


def test_offline(run, cache, site):
    """The line says from where, how much, to where, and that one can do it by hand."""
    site.http.shutdown()
    site.http.server_close()
    address = find_entry("nat_mini").url
    parts = (f"by hand, download {address} (about 80 MB)", f"put it at {cache / 'nat_mini.pth'}", "refused", "no net")
    assert_refused(run("get", "nat_mini"), *parts)
    assert_refused(run("get", "maskrcnn_dinat_mini"), "(about 160 MB)", cache / "maskrcnn_dinat_mini.pth")


def test_a_sign_in_page_is_no_checkpoint(run, cache, site):
    site.behaviours = [web_page]
    assert_refused(run("get", "nat_mini"), "a web page instead of the file")
    assert not (cache / "nat_mini.pth").exists()


def test_verify(run, cache):
    assert run("verify") == (0, f"no checkpoint is in {cache}\n", "")
    assert_refused(run("verify", "nat_mini"), cache / "nat_mini.pth", "is not here", "get")
    run("get", "nat_mini", "nat_tiny")
    _, out, _ = run("verify")
    assert out == f"{SHA256}  {cache / 'nat_mini.pth'}\n{SHA256}  {cache / 'nat_tiny.pth'}\n"
    (cache / "nat_small.pth").write_bytes(CONTENT)
    assert run("verify", "nat_small")[1] == f"{SHA256}  {cache / 'nat_small.pth'}  (nothing to compare it with)\n"


def test_verify_finds_a_damaged_file(run, cache):
    run("get", "nat_mini", "nat_tiny")
    damaged = bytearray(CONTENT)
    damaged[1234] ^= 1
    (cache / "nat_mini.pth").write_bytes(damaged)
    assert_refused(run("verify"), cache / "nat_mini.pth", "damaged", SHA256, "delete it")
    assert run("verify", "nat_tiny")[0] == 0
    (cache / "nat_mini.pth").unlink()
    run("get", "nat_mini")
    assert run("verify")[0] == 0


def test_a_published_hash_is_what_counts(run, cache, site, tmp_path):
    text = zoo.ZOO_FILE.read_text().replace("nat_mini.pth,", f"nat_mini.pth, sha256: {SHA256},", 1)
    zoo.ZOO_FILE.write_text(text)
    zoo_entries.cache_clear()
    site.behaviours = [lambda handler: serve(handler, content=bytes(1000))]
    assert_refused(run("get", "nat_mini"), f"instead of {SHA256}")
    cache.joinpath("nat_mini.pth").write_bytes(bytes(1000))  # by hand
    assert_refused(run("verify", "nat_mini"), "damaged", SHA256)
    assert_refused(run("get", "nat_mini"), "damaged", SHA256)
