"""Broken and malicious weight files never run code or exhaust the memory, and raise an error that names the file.

Every file is loaded with `read_weights` and with timm's `pretrained=True`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save
from small_models import SMALL, assert_same, small

from natzoo.checkpoints import read_checkpoint, read_weights


class Payload:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.system, ("touch payload-ran",)


WEIGHTS = small().state_dict()
FIRST = "patch_embed.proj.0.weight"
WEB_PAGE = b"\n<!DOCTYPE html><html>sign in</html>"


class Refusal(NamedTuple):
    """How a file is refused.

    Attributes:
        cause: type of the exception that caused the ValueError; None if there is none. Exception excludes
            UnpicklingError, BaseException does not.
        names: pattern for the offending part of the file, which the message must contain.
    """

    cause: type[Exception] | None
    names: str | None = None


CODE = Refusal(pickle.UnpicklingError)  # requests a function or class
COMMAND = Refusal(pickle.UnpicklingError, "posix.system")
BROKEN = Refusal(Exception)  # not readable: truncated, damaged, inconsistent, or in another format
BROKEN_OR_CODE = Refusal(BaseException)  # depends on the version of torch
UNSUITABLE = Refusal(None)  # readable, but not a dict of dense tensors
ODD_FIRST = Refusal(None, FIRST)


# ----- file contents -----


def torch_file(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def repacked(change) -> bytes:
    """Return a file of torch.save with all members changed by `change(name, content)` and compressed."""
    source, file = zipfile.ZipFile(io.BytesIO(torch_file(WEIGHTS))), io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return file.getvalue()


def with_lying_directory() -> bytes:
    """Return a file of torch.save whose directory claims that the first member unpacks to 4 GB."""
    content = bytearray(torch_file(WEIGHTS))
    place = content.index(b"PK\x01\x02")
    content[place + 20 : place + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    return bytes(content)


def safetensors(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def odd(value: torch.Tensor) -> bytes:
    return torch_file({**WEIGHTS, FIRST: value})


def nested_lists() -> list:
    """Return nested lists, 60 levels deep, each of which contains the next one twice."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    return value


class Disguise:
    """Unpickles as an OrderedDict whose attributes replace its methods with strings."""

    def __init__(self, content: dict):
        self.content = content

    def __reduce__(self):
        return OrderedDict, (), {"items": "x", "get": "x", "keys": "x"}, None, iter(self.content.items())


def beginning(content: bytes, share: float) -> bytes:
    return content[: int(share * len(content))]


GOOD_PTH, GOOD_SAFETENSORS = torch_file(WEIGHTS), save(WEIGHTS)

# File name -> (content, how it is refused)
FILES = {
    # code
    "payload.pth": (torch_file(Payload()), COMMAND),
    "payload_next_to_weights.pth": (torch_file({"model": WEIGHTS, "args": Payload()}), COMMAND),
    "payload_as_weight.bin": (torch_file({**WEIGHTS, FIRST: Payload()}), COMMAND),
    "payload_of_old_torch.pth": (torch_file(Payload(), _use_new_zipfile_serialization=False), COMMAND),
    "payload_pickled.pth": (pickle.dumps(Payload(), 2), COMMAND),
    "payload_pickled.bin": (pickle.dumps({"model": Payload()}, 4), CODE),  # torch only reads protocol 2
    "payload.pkl": (pickle.dumps({"model": {"a": Payload()}}), COMMAND),
    "payload_in_array.pkl": (pickle.dumps({"a": np.array([Payload()], dtype=object)}), CODE),
    "tensor.pkl": (pickle.dumps({"a": torch.zeros(2)}), CODE),
    "text.pkl": (pickle.dumps({"a": np.array(["text"])}), CODE),
    "records.pkl": (pickle.dumps({"a": np.zeros(2, dtype=[("a", "f4")])}), CODE),
    "class.pkl": (pickle.dumps({"a": pickle.Unpickler}), CODE._replace(names="Unpickler")),
    "array_class.pkl": (pickle.dumps({"a": np.ndarray}), CODE._replace(names="type")),
    # other formats
    "page.pth": (WEB_PAGE, UNSUITABLE),
    "page.bin": (WEB_PAGE, UNSUITABLE),
    "page.pkl": (WEB_PAGE, UNSUITABLE),
    "page.safetensors": (WEB_PAGE, UNSUITABLE),
    "safetensors.pth": (GOOD_SAFETENSORS, BROKEN),
    "pth.safetensors": (GOOD_PTH, BROKEN),
    "zeros.pth": (bytes(200), BROKEN),
    "list.pth": (torch_file([1, 2]), UNSUITABLE._replace(names="list")),
    "no_weights.pth": (torch_file({"epoch": 3}), UNSUITABLE._replace(names="epoch")),
    # truncated
    "empty.pth": (b"", BROKEN),
    "empty.pkl": (b"", BROKEN),
    "empty.bin": (b"", BROKEN),
    "empty.safetensors": (b"", BROKEN),
    "one_byte.pth": (GOOD_PTH[:1], BROKEN_OR_CODE),
    "one_byte.safetensors": (GOOD_SAFETENSORS[:1], BROKEN),
    **{f"cut_{n}.pth": (beginning(GOOD_PTH, n), BROKEN) for n in (0.01, 0.5, 0.99)},
    **{f"cut_{n}.safetensors": (beginning(GOOD_SAFETENSORS, n), BROKEN) for n in (0.01, 0.5, 0.99)},
    # inconsistent headers
    "header_beyond_the_file.safetensors": (safetensors({}, length=10**7), BROKEN),
    "huge_header.safetensors": (safetensors({}, length=2**62), BROKEN),
    "no_json.safetensors": (safetensors(b"{wibble"), BROKEN),
    "json_list.safetensors": (safetensors([1]), BROKEN),
    "offsets_beyond.safetensors": (safetensors({"a": entry(0, 10**12, [25 * 10**10])}, bytes(16)), BROKEN),
    "offsets_before.safetensors": (safetensors({"a": entry(-8, 8, [4])}, bytes(16)), BROKEN),
    "overlap.safetensors": (safetensors({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, bytes(24)), BROKEN),
    "hole.safetensors": (safetensors({"a": entry(0, 8, [2]), "b": entry(16, 24, [2])}, bytes(24)), BROKEN),
    "other_shape.safetensors": (safetensors({"a": entry(0, 16, [5])}, bytes(16)), BROKEN),
    "huge_shape.safetensors": (safetensors({"a": entry(0, 16, [2**62, 8])}, bytes(16)), BROKEN),
    "unknown_dtype.safetensors": (safetensors({"a": entry(0, 16, [4], "F31")}, bytes(16)), BROKEN),
    # small files that describe large contents
    "bomb.pth": (
        repacked(lambda name, content: bytes(10**7) if name.endswith("/data/0") else content),
        BROKEN._replace(names="compressed"),
    ),
    "bomb_of_code.pth": (
        repacked(lambda name, content: bytes(10**7) if name.endswith(".pkl") else content),
        BROKEN._replace(names="compressed"),
    ),
    "lying_directory.pth": (with_lying_directory(), BROKEN),
    "repeated.pth": (odd(torch.zeros(1).expand(10**6, 10**6)), ODD_FIRST),
    "repeated_bias.pth": (
        torch_file({**WEIGHTS, "levels.0.blocks.0.attn.rpb": torch.zeros(1).expand(1, 10**6, 10**6)}),
        UNSUITABLE._replace(names="levels.0.blocks.0.attn.rpb"),
    ),
    "lists.pkl": (pickle.dumps({"a": nested_lists()}), BROKEN._replace(names="nested")),
    # not dense real numbers
    "sparse.pth": (odd(torch.zeros(2, 2).to_sparse()), ODD_FIRST),
    "no_numbers.pth": (odd(torch.zeros(2, device="meta")), ODD_FIRST),
    "quantized.safetensors": (save({FIRST: torch.zeros(2, dtype=torch.float8_e4m3fn)}), ODD_FIRST),
    "complex.pth": (odd(torch.zeros(2, dtype=torch.complex64)), ODD_FIRST),
    # no names
    "numbered.pth": (torch_file({1: torch.zeros(2)}), UNSUITABLE._replace(names=r"\b1\b")),
    "nothing.safetensors": (safetensors({}), UNSUITABLE),
}
# File name -> (weights, pattern for the offending weight)
ODD_WEIGHTS = {
    "foreign.pth": ({"a": torch.zeros(2)}, r"missing.*levels\.0\..*unexpected.*\ba\b"),
    "other_depth.pth": (small(depths=(2, 1)).state_dict(), r"unexpected.*levels\.0\.blocks\.1\."),
    "other_width.pth": (small(embed_dim=32).state_dict(), r"shape.*levels\.0\."),
    "other_family.pth": (small("dinat_s_tiny").state_dict(), r"missing.*levels\..*unexpected.*layers\."),
    "twice.pth": ({**WEIGHTS, f"module.{FIRST}": WEIGHTS[FIRST]}, r"module\."),
    "hf_of_another_kind.pth": (
        {"nat.embeddings.patch_embeddings.projection.weight": torch.zeros(2), "nat.pooler.weight": torch.zeros(2)},
        r"pooler\.weight",
    ),
    "hf_query_alone.pth": (
        {
            "nat.embeddings.patch_embeddings.projection.bias": torch.zeros(2),
            "nat.encoder.levels.0.layers.0.attention.self.query.bias": torch.zeros(2),
        },
        r"query\.bias",
    ),
    "hf_one_scale.pth": (
        {
            "nat.embeddings.patch_embeddings.projection.weight": torch.tensor(0.0),
            "nat.encoder.levels.0.layers.0.layer_scale_parameters": torch.zeros(16),
        },
        r"layer_scale_parameters.*\(16,\)",
    ),
}


def through_timm(path, **kwargs):
    """Return the weights of a small model that was created from a file."""
    arguments = {**SMALL["nat_mini"], **kwargs}
    model = timm.create_model("nat_mini", **arguments, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    return model.state_dict()


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "payload-ran").exists()


def assert_refused(load, path, names, cause=BaseException):
    """Check for one short line that starts with the file and matches `names`, and for the cause as in `Refusal`."""
    with warnings.catch_warnings(), pytest.raises(ValueError, match=names) as error:
        warnings.simplefilter("ignore")  # torch warns about files of other programs
        load(path)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < 900
    found = error.value.__cause__
    if cause is None:
        assert found is None
    else:
        assert isinstance(found, cause)
        assert not (cause is Exception and isinstance(found, pickle.UnpicklingError))


# ----- tests -----


@pytest.mark.parametrize("load", [read_weights, through_timm])
@pytest.mark.parametrize("name", FILES)
def test_broken_and_malicious_files(tmp_path, load, name):
    content, refusal = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(load, path, refusal.names, refusal.cause)


@pytest.mark.parametrize("name", ODD_WEIGHTS)
def test_weights_of_another_model(tmp_path, name):
    weights, names = ODD_WEIGHTS[name]
    torch.save(weights, tmp_path / name)
    read_weights(tmp_path / name)
    is_layout_error = name.startswith(("twice", "hf_"))
    assert_refused(through_timm, tmp_path / name, names, ValueError if is_layout_error else None)


def test_payload_runs_when_unpickled(tmp_path):
    """Otherwise the tests above could not fail."""
    pickle.loads(pickle.dumps(Payload()))
    (tmp_path / "payload-ran").unlink()


@pytest.mark.parametrize("load", [read_weights, through_timm])
def test_folder_and_missing_file(tmp_path, load):
    (tmp_path / "folder.pth").mkdir()
    for name in ("folder.pth", "missing.pth"):
        with pytest.raises(FileNotFoundError, match=name):
            load(tmp_path / name)


def test_pickle_that_hides_methods_of_a_dict(tmp_path):
    """Such a file is harmless and readable."""
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Disguise(arrays)))
    assert_same(read_weights(tmp_path / "a.pkl"), WEIGHTS)
    (tmp_path / "a.pth").write_bytes(torch_file(Disguise({"state_dict": Disguise(WEIGHTS)})))
    assert_same(read_weights(tmp_path / "a.pth"), WEIGHTS)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"\x80\x02}r" + struct.pack("<I", 10**8) + b".", None),  # writes entry 10**8 of the memo
        (b"\x80\x05\x96" + struct.pack("<Q", 10**9) + b".", Exception),
        (b"\x80\x04\x8e" + struct.pack("<Q", 10**9) + b".", Exception),
    ],
    ids=["memo", "bytearray", "bytes"],
)
def test_memory_is_not_allocated_for_announced_content(tmp_path, content, cause):
    (tmp_path / "a.pkl").write_bytes(content)
    tracemalloc.start()
    try:
        assert_refused(read_weights, tmp_path / "a.pkl", None, cause)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10**7


@pytest.mark.parametrize("name", ["scalar", "_reconstruct"])
def test_pickle_cannot_modify_the_reader(tmp_path, name):
    """BUILD sets attributes; here those of a function that pickles may call."""
    function = b"cnumpy.core.multiarray\n" + name.encode() + b"\n"
    (tmp_path / "a.pkl").write_bytes(
        b"\x80\x02}X\x01\x00\x00\x00a" + function + b"N}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86bs."
    )
    assert_refused(read_weights, tmp_path / "a.pkl", "function", pickle.UnpicklingError)
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02}X\x01\x00\x00\x00a" + function + b"s.")
    assert_refused(read_weights, tmp_path / "a.pkl", "function", pickle.UnpicklingError)


def test_weights_that_are_not_finite_are_loaded_with_a_warning(tmp_path):
    weights = {name: value.clone() for name, value in WEIGHTS.items()}
    weights["norm.weight"][3] = float("nan")
    weights["norm.bias"][0] = float("inf")
    torch.save(weights, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=r"a\.pth.*norm\.bias, norm\.weight"):
        loaded = through_timm(tmp_path / "a.pth")
    assert loaded["norm.weight"].isnan().sum() == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x02K\x03\x86", b"K\x02K\x7f\x86"),
        (b"K\x02K\x03\x86", b"K\x02J\xff\xff\xff\xff\x86"),
        (b"f4", b"O4"),
        (b"f4", b"f9"),
    ],
)
def test_array_with_inconsistent_description(tmp_path, old, new):
    content = pickle.dumps({"a": np.zeros((2, 3), "f4")}, 4)
    assert old in content
    (tmp_path / "a.pkl").write_bytes(content.replace(old, new))
    assert_refused(read_weights, tmp_path / "a.pkl", None)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_damaged_bytes_raise_only_value_errors(tmp_path, suffix):
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    content = {".pth": GOOD_PTH, ".safetensors": GOOD_SAFETENSORS, ".pkl": pickle.dumps({"model": arrays})}[suffix]
    path = tmp_path / f"a{suffix}"
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for place in random.integers(0, 2000, 8):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_checkpoint(path)
                read_weights(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 30
