"""Broken and malicious weight files: nothing of them runs, none fills the memory, each is named in one sentence.

Each comes by both roads: `read_weights`, and timm's `pretrained=True` with a file.
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

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save
from small_models import SMALL, assert_same, small

from natzoo.checkpoints import read_checkpoint, read_weights


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch payload-ran",)


WEIGHTS = small().state_dict()
FIRST = "patch_embed.proj.0.weight"
WEB_PAGE = b"\n<!DOCTYPE html><html>sign in</html>"
REFUSED, BROKEN, HARMFUL = "is refused", "is truncated or no checkpoint", "is damaged or made to harm"


# ----- makers of files -----


def torch_file(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def repacked(change) -> bytes:
    """A file of torch.save whose parts were changed by `change(name, content)`, and are compressed."""
    source, file = zipfile.ZipFile(io.BytesIO(torch_file(WEIGHTS))), io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return file.getvalue()


def with_lying_directory() -> bytes:
    """A file of torch.save that says of its first part that it would unpack to 4 GB."""
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
    """A list of two lists of two lists and so on, of which there are but 60."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    return value


class Disguise:
    """Unpickles as an OrderedDict that has plain text where its methods are looked for."""

    def __init__(self, content: dict):
        self.content = content

    def __reduce__(self):
        return OrderedDict, (), {"items": "x", "get": "x", "keys": "x"}, None, iter(self.content.items())


def beginning(content: bytes, share: float) -> bytes:
    return content[: int(share * len(content))]


GOOD_PTH, GOOD_SAFETENSORS = torch_file(WEIGHTS), save(WEIGHTS)

# Name of the file -> (its content, what is said of it)
FILES = {
    # programs instead of weights
    "payload.pth": (torch_file(Payload()), f"{REFUSED}.*it asks for posix.system"),
    "payload_beside_weights.pth": (torch_file({"model": WEIGHTS, "args": Payload()}), f"{REFUSED}.*posix.system"),
    "payload_as_weight.bin": (torch_file({**WEIGHTS, FIRST: Payload()}), f"{REFUSED}.*posix.system"),
    "payload_of_old_torch.pth": (torch_file(Payload(), _use_new_zipfile_serialization=False), f"{REFUSED}.*posix"),
    "payload_pickled.pth": (pickle.dumps(Payload(), 2), f"{REFUSED}.*posix.system"),
    "payload_pickled.bin": (pickle.dumps({"model": Payload()}, 4), REFUSED),  # torch knows protocol 2
    "payload.pkl": (pickle.dumps({"model": {"a": Payload()}}), f"{REFUSED}.*posix.system"),
    "payload_in_array.pkl": (pickle.dumps({"a": np.array([Payload()], dtype=object)}), REFUSED),
    "tensor.pkl": (pickle.dumps({"a": torch.zeros(2)}), REFUSED),
    "text.pkl": (pickle.dumps({"a": np.array(["text"])}), REFUSED),
    "records.pkl": (pickle.dumps({"a": np.zeros(2, dtype=[("a", "f4")])}), REFUSED),
    "class.pkl": (pickle.dumps({"a": pickle.Unpickler}), f"{REFUSED}.*Unpickler"),
    "array_class.pkl": (pickle.dumps({"a": np.ndarray}), "it holds a type"),
    # other kinds of files
    "page.pth": (WEB_PAGE, "is a web page"),
    "page.bin": (WEB_PAGE, "is a web page"),
    "page.pkl": (WEB_PAGE, "is a web page"),
    "page.safetensors": (WEB_PAGE, "is a web page"),
    "safetensors.pth": (GOOD_SAFETENSORS, REFUSED),
    "pth.safetensors": (GOOD_PTH, BROKEN),
    "zeros.pth": (bytes(200), REFUSED),
    "list.pth": (torch_file([1, 2]), "holds a list"),
    "no_weights.pth": (torch_file({"epoch": 3}), "holds no weights; its entries: epoch"),
    # cut off
    "empty.pth": (b"", BROKEN),
    "empty.pkl": (b"", BROKEN),
    "empty.bin": (b"", BROKEN),
    "empty.safetensors": (b"", BROKEN),
    "one_byte.pth": (GOOD_PTH[:1], f"{BROKEN}|{REFUSED}"),
    "one_byte.safetensors": (GOOD_SAFETENSORS[:1], BROKEN),
    **{f"cut_{n}.pth": (beginning(GOOD_PTH, n), BROKEN) for n in (0.01, 0.5, 0.99)},
    **{f"cut_{n}.safetensors": (beginning(GOOD_SAFETENSORS, n), BROKEN) for n in (0.01, 0.5, 0.99)},
    # a header that lies
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
    # small files that would fill the memory
    "bomb.pth": (
        repacked(lambda name, content: bytes(10**7) if name.endswith("/data/0") else content),
        f"{BROKEN}.*compressed",
    ),
    "bomb_of_code.pth": (
        repacked(lambda name, content: bytes(10**7) if name.endswith(".pkl") else content),
        f"{BROKEN}.*compressed",
    ),
    "lying_directory.pth": (with_lying_directory(), BROKEN),
    "repeated.pth": (odd(torch.zeros(1).expand(10**6, 10**6)), HARMFUL),
    "repeated_bias.pth": (
        torch_file({**WEIGHTS, "levels.0.blocks.0.attn.rpb": torch.zeros(1).expand(1, 10**6, 10**6)}),
        HARMFUL,
    ),
    "lists.pkl": (pickle.dumps({"a": nested_lists()}), "holds no weights"),
    # numbers that are none
    "sparse.pth": (odd(torch.zeros(2, 2).to_sparse()), HARMFUL),
    "no_numbers.pth": (odd(torch.zeros(2, device="meta")), HARMFUL),
    "quantised.safetensors": (save({FIRST: torch.zeros(2, dtype=torch.float8_e4m3fn)}), HARMFUL),
    "complex.pth": (odd(torch.zeros(2, dtype=torch.complex64)), HARMFUL),
    # names that are none
    "numbered.pth": (torch_file({1: torch.zeros(2)}), "holds no weights; its entries: 1"),
    "nothing.safetensors": (safetensors({}), "holds no weights; its entries: none"),
}
ODD_WEIGHTS = {
    "foreign.pth": ({"a": torch.zeros(2)}, r"another model.*missing.*unexpected: a"),
    "other_depth.pth": (small(depths=(2, 1)).state_dict(), r"another model.*unexpected: levels\.0\.blocks\.1\."),
    "other_width.pth": (small(embed_dim=32).state_dict(), r"another model.*of another shape"),
    "other_family.pth": (small("dinat_s_tiny").state_dict(), r"another model.*missing.*unexpected"),
    "twice.pth": ({**WEIGHTS, f"module.{FIRST}": WEIGHTS[FIRST]}, "the same weights twice"),
    "hf_of_another_kind.pth": (
        {"nat.embeddings.patch_embeddings.projection.weight": torch.zeros(2), "nat.pooler.weight": torch.zeros(2)},
        "pooler.weight is no weight",
    ),
    "hf_query_alone.pth": (
        {
            "nat.embeddings.patch_embeddings.projection.bias": torch.zeros(2),
            "nat.encoder.levels.0.layers.0.attention.self.query.bias": torch.zeros(2),
        },
        "query.bias comes without a key and a value",
    ),
    "hf_one_scale.pth": (
        {
            "nat.embeddings.patch_embeddings.projection.weight": torch.tensor(0.0),
            "nat.encoder.levels.0.layers.0.layer_scale_parameters": torch.zeros(16),
        },
        r"layer_scale_parameters has shape \(16,\)",
    ),
}


def through_timm(path, **kwargs):
    """Weights of the small model after it took those of a file."""
    arguments = {**SMALL["nat_mini"], **kwargs}
    model = timm.create_model("nat_mini", **arguments, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    return model.state_dict()


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "payload-ran").exists()


def assert_refused(road, path, message):
    """One sentence that begins with the file's name."""
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message) as error:
        warnings.simplefilter("ignore")  # torch's, of files that it never wrote
        road(path)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < 900


# ----- tests -----


@pytest.mark.parametrize("road", [read_weights, through_timm])
@pytest.mark.parametrize("name", FILES)
def test_broken_and_malicious_files(tmp_path, road, name):
    content, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(road, path, message)


@pytest.mark.parametrize("name", ODD_WEIGHTS)
def test_weights_of_other_models(tmp_path, name):
    weights, message = ODD_WEIGHTS[name]
    torch.save(weights, tmp_path / name)
    read_weights(tmp_path / name)
    assert_refused(through_timm, tmp_path / name, message)


def test_payloads_would_have_run(tmp_path):
    """So that the tests above are none that cannot fail."""
    pickle.loads(pickle.dumps(Payload()))
    (tmp_path / "payload-ran").unlink()


@pytest.mark.parametrize("road", [read_weights, through_timm])
def test_a_folder_and_nothing(tmp_path, road):
    (tmp_path / "folder.pth").mkdir()
    for name, text in (("folder.pth", "a folder|no checkpoint"), ("nowhere.pth", "no checkpoint")):
        with pytest.raises(FileNotFoundError, match=text):
            road(tmp_path / name)


def test_methods_hidden_by_a_pickle(tmp_path):
    """Such a file is harmless, so it is read."""
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Disguise(arrays)))
    assert_same(read_weights(tmp_path / "a.pkl"), WEIGHTS)
    (tmp_path / "a.pth").write_bytes(torch_file(Disguise({"state_dict": Disguise(WEIGHTS)})))
    assert_same(read_weights(tmp_path / "a.pth"), WEIGHTS)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x02}r" + struct.pack("<I", 10**8) + b".", "holds no weights"),  # the memo's hundred millionth entry
        (b"\x80\x05\x96" + struct.pack("<Q", 10**9) + b".", "holds a bytearray"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 10**9) + b".", "is truncated"),
    ],
    ids=["memo", "bytearray", "bytes"],
)
def test_room_for_what_a_pickle_only_announces(tmp_path, content, reason):
    (tmp_path / "a.pkl").write_bytes(content)
    tracemalloc.start()
    try:
        assert_refused(read_weights, tmp_path / "a.pkl", f"{reason}|truncated")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10**7


@pytest.mark.parametrize("name", ["scalar", "_reconstruct"])
def test_a_pickle_cannot_change_its_reader(tmp_path, name):
    """BUILD with a state for attributes, on one of the functions that a pickle may ask for."""
    function = b"cnumpy.core.multiarray\n" + name.encode() + b"\n"
    (tmp_path / "a.pkl").write_bytes(
        b"\x80\x02}X\x01\x00\x00\x00a" + function + b"N}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86bs."
    )
    assert_refused(read_weights, tmp_path / "a.pkl", "it sets attributes of a function")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02}X\x01\x00\x00\x00a" + function + b"s.")
    assert_refused(read_weights, tmp_path / "a.pkl", "it holds a function")


def test_weights_that_are_not_finite_are_told_and_loaded(tmp_path):
    weights = {name: value.clone() for name, value in WEIGHTS.items()}
    weights["norm.weight"][3] = float("nan")
    weights["norm.bias"][0] = float("inf")
    torch.save(weights, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=r"a\.pth is damaged.*2 not finite: norm\.bias, norm\.weight"):
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
def test_an_array_that_lies_about_itself(tmp_path, old, new):
    content = pickle.dumps({"a": np.zeros((2, 3), "f4")}, 4)
    assert old in content
    (tmp_path / "a.pkl").write_bytes(content.replace(old, new))
    assert_refused(read_weights, tmp_path / "a.pkl", f"{REFUSED}|{BROKEN}")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_damaged_bytes_never_raise_anything_else(tmp_path, suffix):
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
