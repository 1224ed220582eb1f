"""Checkpoints that load but are not those of a run, or describe more than they hold: one sentence, nothing built."""

import argparse
import copy
import io
import itertools
import zipfile

import pytest
import torch
from mutations import check_reader, damaged_bytes, damaged_values, limited
from small_models import SMALL, assert_same, small

from natzoo.checkpoints import read_checkpoint, read_weights, record_of, write_checkpoint, write_weights
from natzoo.classification import train
from natzoo.classification.data.transforms import evaluation_transform, preprocessing
from natzoo.classification.inference import restore

RECORD = {
    "model": "nat_mini",
    "model_kwargs": {name: value for name, value in SMALL["nat_mini"].items() if name != "num_classes"},
    "num_classes": 5,
    "classes": ["a", "b", "c", "d", "e"],
    "preprocessing": {
        "input_size": [3, 32, 32],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
}
HUGE = (10**9, 10**30, -1, 0, 2.5, "3", None, True, [], {}, [10**9], torch.tensor(3), float("nan"), float("inf"))


def changed(record, *keys, value):
    """Return a copy of a record with one value replaced."""
    record = copy.deepcopy(record)
    target = record
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    return record


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.fixture(scope="module")
def weights():
    return small().state_dict()


# ----- records -----

IMPLAUSIBLE = {
    "model": [*HUGE, "wibble", "hf-hub:some/body", "\x1b[31m"],
    "model_kwargs": [*(value for value in HUGE if value != {}), {1: 2}],
    "num_classes": [*HUGE, torch.tensor([3, 4]), 5.0],
    "classes": [10**9, "abcde", [1, 2], ["a"] * 6, [["a"]], ["a" * 10**6], torch.zeros(5)],
    "preprocessing": [value for value in HUGE if value != {}],
    "model_kwargs.depths": [[10**9, 1], [1001], [-1, 1], 10**9, "1", [nested(5)], {"x": 10**9}],
    "model_kwargs.embed_dim": [10**9, 0, -16, "16", 50_000, [16], 2**70],
    "model_kwargs.num_heads": [[0, 0], [10**6, 1], "x", None, [[1], [2]]],
    "model_kwargs.kernel_size": [10**9, 99_999, -3, "3"],
    "model_kwargs.dilations": [[[5 * 10**9], [1]], [[0], [1]], [["a"], [1]], "x", 7],
    "model_kwargs.pretrained": [True],
    "model_kwargs.checkpoint_path": ["/etc/passwd"],
    "model_kwargs.wibble": [1],
    "preprocessing.input_size": [
        *HUGE,
        32,
        "32",
        32.0,
        [32, 32],
        [1, 32, 32],
        [3, 10**6, 10**6],
        [3, 0, 32],
        [3, "a", 1],
    ],
    "preprocessing.crop_pct": [*HUGE, 1.5, "0.9", [0.9], 1e-9],
    "preprocessing.interpolation": [*HUGE, "cubic", "\x1b[2J", "random"],
    "preprocessing.mean": [*HUGE, [1, 2, "3"], [float("nan")] * 3, [1e9] * 3, "abc"],
    "preprocessing.std": [*HUGE, [0, 0, 0], [-1, 1, 1]],
}


@pytest.mark.parametrize("place", IMPLAUSIBLE)
def test_implausible_records(weights, tmp_path, place):
    path = tmp_path / "a.pth"
    for value in IMPLAUSIBLE[place]:
        write_checkpoint(path, {"state_dict": weights, "record": changed(RECORD, *place.split("."), value=value)})
        with limited(5), pytest.raises(ValueError, match=r"a\.pth") as error:
            restore(str(path))
        assert "\n" not in str(error.value) and str(error.value).isprintable(), value
        assert len(str(error.value)) < 900, value


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, {"model": "nat_mini"}, torch.zeros(2)])
def test_record_of_another_type(value):
    with pytest.raises(ValueError, match=r"a\.pth"):
        record_of({"record": value}, "a.pth")


def test_plausible_records(weights, tmp_path):
    """Those of earlier versions and other tools: fewer names, no preprocessing, other keys, tuples."""
    for record in (
        RECORD,
        changed(RECORD, "classes", value=None),
        changed(RECORD, "classes", value=["a", "b"]),
        changed(RECORD, "preprocessing", value={}),
        changed(RECORD, "preprocessing", "mean", value=(0.0, 0.0, 0.0)),
        changed(RECORD, "comment", value={"any": ["thing"]}),
        {key: value for key, value in RECORD.items() if key != "classes"},
    ):
        write_checkpoint(tmp_path / "a.pth", {"state_dict": weights, "record": record})
        model, found = restore(str(tmp_path / "a.pth"))
        assert model.num_classes == 5
        assert found["model"] == "nat_mini"


def test_model_larger_than_its_weights_is_not_built(weights, tmp_path):
    record = changed(RECORD, "model_kwargs", "embed_dim", value=16_384)  # 100 GB
    write_checkpoint(tmp_path / "a.pth", {"state_dict": weights, "record": record})
    with limited(5, 2**28), pytest.raises(ValueError, match=r"a\.pth.*embed_dim"):
        restore(str(tmp_path / "a.pth"))


# ----- files that describe more than they hold -----


def raw_pth(code):
    """Return a .pth file with this pickle and without numbers."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


TEXT = b"X\x40\x42\x0f\x00" + b"a" * 1_000_000  # a string of 10**6 characters
MANY_BYTES = (
    b"\x80\x02]q\x00(" + TEXT + b"q\x01" + b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R" * 5000 + b"e."
)
ALLOCATION = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R."  # bytearray(10**10)
MANY_COPIES = (
    b"\x80\x02](]q\x01(" + b"K\x01K\x02\x86" * 100_000 + b"e" + b"ccollections\nOrderedDict\nh\x01\x85R" * 5000 + b"e."
)
FILES = {
    "many_bytes.pth": raw_pth(MANY_BYTES),
    "allocation.pth": raw_pth(ALLOCATION),
    "copies.pth": raw_pth(MANY_COPIES),
    "legacy_bytes.pth": MANY_BYTES,
    "many_bytes.pkl": MANY_BYTES,
}


@pytest.mark.parametrize("name", FILES)
def test_pickles_that_multiply_their_content(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    with limited(5, 2**28), pytest.raises(ValueError, match=name):
        read_weights(tmp_path / name)


def test_weights_that_share_memory(tmp_path):
    """5000 tensors of one storage would grow to 20 GB when they are written."""
    one = torch.zeros(1_000_000)
    torch.save({f"weight{number}": one.view(1000, 1000) for number in range(5000)}, tmp_path / "a.pth")
    with limited(), pytest.raises(ValueError, match=r"a\.pth.*20000000000"):
        read_weights(tmp_path / "a.pth")
    torch.save({f"weight{number}": one for number in range(7)}, tmp_path / "tied.pth")  # as heads of a detector
    assert len(read_weights(tmp_path / "tied.pth")) == 7


def test_nested_content(tmp_path):
    twice = []
    for _ in range(60):
        twice = [twice, twice]
    write_checkpoint(tmp_path / "twice.pth", {"options": twice, "weight": torch.zeros(2)})
    (tmp_path / "deep.pth").write_bytes(
        raw_pth(b"\x80\x02}X\x01\x00\x00\x00a" + b"](" * 100_000 + b"e" * 100_000 + b"s.")
    )
    (tmp_path / "integer.pth").write_bytes(raw_pth(b"\x80\x02}X\x01\x00\x00\x00a\x8a\xff" + b"\x7f" * 255 + b"s."))
    for name in ("twice.pth", "deep.pth", "integer.pth"):
        with limited(), pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / name)


# ----- damaged files -----


def test_flipped_bits_are_noticed(weights, tmp_path):
    """In all of a .pth file that torch.load uses, and in the numbers and the record of our .safetensors files."""
    write_weights(tmp_path / "a.pth", weights, RECORD)
    write_weights(tmp_path / "a.safetensors", weights, RECORD)
    for name in ("a.pth", "a.safetensors"):
        content = bytearray((tmp_path / name).read_bytes())
        expected = read_checkpoint(tmp_path / name)
        noticed = 0
        for place in range(0, len(content), len(content) // 300):
            content[place] ^= 16
            (tmp_path / name).write_bytes(content)
            content[place] ^= 16
            try:
                found = read_checkpoint(tmp_path / name)
            except ValueError as error:
                assert name in str(error)
                noticed += 1
            else:  # in the padding, or in a field that nobody reads
                assert found["record"] == expected["record"]
                assert_same(found["state_dict"], expected["state_dict"])
        assert noticed > 200


def test_file_without_checksums_is_read(weights, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(tmp_path / "a.pth").keys() == weights.keys()


# ----- states -----


@pytest.fixture
def stopped(tiny, stop_after, run_folder):
    """Return the command line that resumes a stopped run, and the content of its last.pth."""
    stop_after(2, tiny("--model-ema", "--model-ema-decay", "0.5", epochs=1))
    return tiny("--model-ema", "--model-ema-decay", "0.5", "--resume", epochs=1), read_checkpoint(
        run_folder / "last.pth"
    )


def plain_changes(state):
    """Yield changed states: each value missing or replaced, at all places where a run has plain data."""
    places = [(key,) for key in state]
    places += [(key, name) for key in ("totals", "scaler", "images") for name in state[key]]
    places += [("options", name) for name in ("grad_accum", "seed", "amp", "opt", "batch_size")]
    places += [("record", name) for name in ("model", "num_classes", "classes", "preprocessing")]
    places += [("optimizer", "state"), ("optimizer", "param_groups"), ("optimizer", "param_groups", 0, "params")]
    entry = ("optimizer", "state", 0)
    places += [entry, (*entry, "step"), (*entry, "exp_avg"), (*entry, "exp_avg_sq"), ("model", "head.weight")]
    places += [("model_ema", "head.weight")]
    for *outer, key in places:
        for value in (
            *HUGE,
            -3,
            {"a": 1},
            [torch.zeros(3)],
            torch.zeros(3),
            torch.zeros(1).expand(9, 9),
            nested(20),
            "\x1b[2J",
        ):
            yield (*outer, key), value
        yield (*outer, key), KeyError


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_states_of_another_run(stopped, run_folder, step):
    """One sentence, or a run that continues: some values do not matter, or are replaced by those of the run."""
    options, state = stopped
    refused = 0
    for (*outer, key), value in itertools.islice(plain_changes(state), 0, None, step):
        damaged = copy.deepcopy(state)
        target = damaged
        for name in outer:
            target = target[name]
        if value is KeyError:
            del target[key]
        else:
            target[key] = value
        write_checkpoint(run_folder / "last.pth", damaged)
        try:
            trainer = train.Trainer(train.parse(options))
            trainer.log.close()
            batch = torch.zeros(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)
            trainer.backward(*batch, step=0)
            trainer.update_weights(1.0)
            trainer.ema.update(trainer.model, step=trainer.total_updates)
        except ValueError as error:
            text = str(error)
            assert "last.pth" in text and "\n" not in text and text.isprintable() and len(text) < 900, (
                outer,
                key,
                value,
            )
            refused += 1
        except Exception as error:
            raise AssertionError(f"{(*outer, key)} = {value!r:.100}") from error
    assert refused > 500 // step


def test_options_that_no_longer_fit(stopped, run_folder, capsys):
    options, state = stopped
    write_checkpoint(run_folder / "last.pth", {**state, "update": 10})
    with pytest.raises(ValueError, match=r"last\.pth has update = 10"):
        train.main(options)
    write_checkpoint(run_folder / "last.pth", {**state, "model_ema": None})
    with pytest.raises(ValueError, match=r"last\.pth.*model-ema"):
        train.main(options)


# ----- random damage -----


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_damaged_weight_files(weights, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_weights(path, weights, None if suffix == ".pkl" else RECORD)
    content = path.read_bytes()

    def read(damaged):
        path.write_bytes(damaged)
        restore(str(path), "nat_mini", SMALL["nat_mini"])

    outcomes = check_reader(read, damaged_bytes(content, 2000), path)
    assert outcomes["refused"] > 1000


@pytest.mark.slow
def test_damaged_pickles_with_valid_checksums(weights, tmp_path):
    """The damage that a person makes, not a disk: only what is inside of the zip file changes."""
    path = tmp_path / "a.pth"
    write_weights(path, weights, RECORD)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (code,) = [name for name in members if name.endswith("data.pkl")]

    def read(damaged):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {**members, code: damaged}.items():
                archive.writestr(name, content)
        restore(str(path), "nat_mini", SMALL["nat_mini"])

    outcomes = check_reader(read, damaged_bytes(members[code], 2000), path)
    assert outcomes["refused"] > 1000


@pytest.mark.slow
def test_damaged_records(weights, tmp_path):
    path = tmp_path / "a.pth"

    def read(record):
        write_checkpoint(path, {"state_dict": weights, "record": record})
        model, found = restore(str(path))
        evaluation_transform(preprocessing(argparse.Namespace(), model, found))

    outcomes = check_reader(read, damaged_values(RECORD, 2000), path)
    assert outcomes["refused"] > 1000


@pytest.mark.slow
def test_damaged_states(stopped, run_folder):
    options, state = stopped

    def read(damaged):
        write_checkpoint(run_folder / "last.pth", damaged)
        trainer = train.Trainer(train.parse(options))
        trainer.log.close()
        trainer.backward(torch.zeros(8, 3, 16, 16), torch.zeros(8, dtype=torch.long), step=0)
        trainer.update_weights(1.0)

    outcomes = check_reader(read, damaged_values(state, 2000), "last.pth")
    assert outcomes["refused"] > 500
