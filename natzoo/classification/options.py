"""The options of train.py: defaults here, overridden by a YAML file, overridden by the command line."""

from __future__ import annotations

import argparse
import ast
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

# More than cores only wait for each other; the processes of a machine share them. macOS does not tell those allowed.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = max(1, min(8, _CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
_RESAMPLING = ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line of train.py and the YAML file that it names.

    Raises:
        ValueError: on a key or a value in the file that no option has; names the nearest right key.
        FileNotFoundError: if the file, or one that it is based on, is missing.
    """
    parser = make_parser()
    config = parser.parse_known_args(argv)[0].config
    if config is not None:
        parser.set_defaults(**_checked(read_config(Path(config)), parser, config))
    return parser.parse_args(argv)


def read_config(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a YAML file over those of the file that its key `base` names, relative to its own folder.

    The entries of model_kwargs are merged one by one.
    """
    path = path.resolve()
    if path in above:
        raise ValueError(f"{path} is its own base: remove one of the keys `base`.")
    if not path.is_file():
        given = f"that {above[-1]} names as its base" if above else "given to --config"
        raise FileNotFoundError(f"there is no config {path}: check the path {given}.")
    try:
        config = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold lines `key: value`, but holds a {type(config).__name__}.")
    base = config.pop("base", None)
    if base is None:
        return config
    below = read_config(path.parent / str(base), (*above, path))
    merged = {**below, **config}
    if isinstance(config.get("model_kwargs"), dict):
        merged["model_kwargs"] = {**below.get("model_kwargs", {}), **config["model_kwargs"]}
    return merged


def make_parser() -> argparse.ArgumentParser:
    """All options of train.py; each is a key of the YAML files too, with _ for -."""
    parser = argparse.ArgumentParser(
        description="Train an image classifier.",
        usage="%(prog)s [DATA] [--config YAML] [options; --help lists them]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = {"action": argparse.BooleanOptionalAction}
    parser.add_argument("data", nargs="?", help="folder that holds train/ and val/, each with one folder a class")
    parser.add_argument("-c", "--config", metavar="YAML", help="file of options; the command line overrides it")

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="", help="folder, tar, hfds/NAME or wds; by what DATA holds unless given")
    add_column_options(group)
    group.add_argument("--train-split", default="train", help="folder or tar file of the training images under DATA")
    group.add_argument("--val-split", default="val", help="folder or tar file of the validation images under DATA")
    group.add_argument("--class-map", metavar="FILE", help="text file of the classes in order, one a line")
    group.add_argument("--synthetic", type=positive, metavar="N", help="N images of noise instead of DATA, for speed")
    group.add_argument("--workers", type=non_negative, default=WORKERS, help="processes that load images, a GPU")
    group.add_argument("--skip-bad-images", default=False, **flag, help="train on where an image cannot be read")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="nat_tiny", help="a name that timm.create_model knows")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, help="KEY=VALUE for the model")
    group.add_argument("--num-classes", type=positive, help="classes of the head; as many as the data has unless given")
    group.add_argument("--img-size", type=positive, help="side of the image in pixels; the model's own unless given")
    group.add_argument("--drop-path", type=float, help="rate of stochastic depth; the model's own unless given")
    group.add_argument("--pretrained", default=False, **flag, help="start from the published weights")
    group.add_argument("--initial-checkpoint", metavar="FILE", help="start from these weights: a file or a name")

    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="adamw", help="a name that timm.optim knows")
    group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate; only scaled by --lr-base-size")
    group.add_argument("--lr-base-size", type=positive, help="scale --lr by the images of an update over this number")
    group.add_argument("--weight-decay", type=float, default=0.05, help="weight decay; none on norms, biases and rpb")
    group.add_argument("--decay-rpb", default=False, **flag, help="decay the relative position biases too")
    group.add_argument("--momentum", type=float, default=0.9, help="momentum, for optimizers that have one")
    group.add_argument("--opt-eps", type=float, help="epsilon of the optimizer")
    group.add_argument("--opt-betas", type=float, nargs="+", help="betas of the optimizer")
    group.add_argument("--layer-decay", type=float, help="factor on the learning rate, a layer to the one before")
    group.add_argument("--clip-grad", type=float, default=5.0, help="largest norm of the gradient; 0 for no limit")
    group.add_argument("--batch-size", type=positive, default=128, help="images of a step, a GPU")
    group.add_argument("--grad-accum", type=positive, default=1, help="steps whose gradients make one update")
    group.add_argument("--skip-nonfinite", type=non_negative, default=3, help="updates without a finite loss to skip")

    group = parser.add_argument_group("schedule")
    group.add_argument("--epochs", type=positive, default=300, help="epochs of the schedule, warm-up included")
    group.add_argument("--sched", default="cosine", help="a name that timm.scheduler knows, or none")
    group.add_argument("--warmup-epochs", type=non_negative, default=20, help="epochs of linear warm-up")
    group.add_argument("--warmup-lr", type=float, default=1e-6, help="learning rate that warm-up starts from")
    group.add_argument("--min-lr", type=float, default=5e-6, help="learning rate at the end")
    group.add_argument("--cooldown-epochs", type=non_negative, default=10, help="epochs at --min-lr after the schedule")
    group.add_argument("--decay-epochs", type=positive, help="epochs between the decays of step, 90 unless given")
    group.add_argument("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], help="epochs of multistep's")
    group.add_argument("--decay-rate", type=float, help="factor of a decay, 0.1 unless given; poly: its power, or 1")

    group = parser.add_argument_group("augmentation")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect of the random crop")
    group.add_argument("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    group.add_argument("--vflip", type=float, default=0.0, help="probability of a vertical flip")
    group.add_argument("--color-jitter", type=float, default=0.4, help="strength, where --aa is none")
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy in timm's notation, or none")
    group.add_argument("--train-interpolation", default="random", choices=["random", *_RESAMPLING], help="resampling")
    group.add_argument("--reprob", type=float, default=0.25, help="probability of random erasing")
    group.add_argument("--remode", default="pixel", choices=["const", "rand", "pixel"], help="filling of erased areas")
    group.add_argument("--recount", type=positive, default=1, help="areas that random erasing erases")
    group.add_argument("--mixup", type=float, default=0.8, help="mixup alpha; 0 for no mixup")
    group.add_argument("--cutmix", type=float, default=1.0, help="cutmix alpha; 0 for no cutmix")
    group.add_argument("--mixup-prob", type=float, default=1.0, help="share of batches mixed")
    group.add_argument("--mixup-switch-prob", type=float, default=0.5, help="share of mixed batches that are cutmix")
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    group.add_argument("--bce-loss", default=False, **flag, help="binary cross entropy, each class apart")
    group.add_argument("--bce-target-thresh", type=float, help="targets above it become 1, the rest 0")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--crop-pct", type=float, help="share of the image that evaluation keeps; the model's own")
    group.add_argument("--interpolation", choices=_RESAMPLING, help="resampling in evaluation")
    group.add_argument("--mean", type=float, nargs=3, help="mean of the three colours; the model's own unless given")
    group.add_argument("--std", type=float, nargs=3, help="deviation of the colours; the model's own unless given")
    group.add_argument("--val-batch-size", type=positive, help="images at a time; --batch-size unless given")
    group.add_argument("--model-ema", default=False, **flag, help="keep an average of the weights, and evaluate that")
    group.add_argument("--model-ema-decay", type=float, default=0.9998, help="decay of that average")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--work-dir", metavar="DIR", action=_WorkDir, help="folder of the run (default: output/<config or model name>)"
    )
    group.add_argument(
        "--output", default="output", action=_WorkDir, help="alias: --output DIR --experiment NAME is DIR/NAME"
    )
    group.add_argument("--experiment", metavar="NAME", action=_WorkDir, help="alias: see --output")
    group.add_argument("--resume", nargs="?", const="auto", metavar="FILE", help="go on from the run's last checkpoint")
    group.add_argument("--save-interval", type=non_negative, default=0, help="updates between saves; 0: every epoch")
    group.add_argument("--keep-last", type=non_negative, default=0, help="last epochs whose checkpoints are kept too")
    group.add_argument("--seed", type=int, default=42, help="everything random follows from it")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is the GPU if there is one")
    group.add_argument("--threads", type=int, help="threads of the CPU; torch's choice unless given")
    group.add_argument("--amp", choices=["none", "bf16", "fp16"], default="none", help="mixed precision")
    group.add_argument("--channels-last", default=False, **flag, help="memory format of convolutions")
    group.add_argument("--grad-checkpointing", default=False, **flag, help="compute activations again to save memory")
    group.add_argument("--compile", default=False, **flag, help="torch.compile the model")
    group.add_argument("--log-interval", type=positive, default=10, help="updates between figures shown and logged")
    return parser


def add_column_options(parser: argparse._ActionsContainer) -> None:
    """The names of a Hugging Face dataset's columns, as `HubReader` takes them."""
    parser.add_argument("--input-key", default="image", metavar="NAME", help="column of the images, with hfds/NAME")
    parser.add_argument("--target-key", default="label", metavar="NAME", help="column of the labels, with hfds/NAME")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(text, 1)


def non_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    number = int(text)
    if number < least:
        raise ValueError(f"it must be at least {least}")
    return number


class _WorkDir(argparse.Action):
    """Store an option that names the run folder; --output and --experiment override a --work-dir given earlier."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        if self.dest != "work_dir":
            namespace.work_dir = None


class KeyValues(argparse.Action):
    """KEY=VALUE pairs into a dict, over those of the YAML file; values are Python literals, else strings."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = dict(getattr(namespace, self.dest) or {})
        for pair in values:
            key, equals, text = pair.partition("=")
            if not equals:
                parser.error(f"{option_string} takes KEY=VALUE, but was given {pair!r}")
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pairs[key] = text
        setattr(namespace, self.dest, pairs)


def _checked(config: dict[str, Any], parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """The file's values converted as the command line's would be."""
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    checked = {}
    for key, value in config.items():
        if key not in actions:
            nearest = difflib.get_close_matches(str(key), actions, n=1, cutoff=0.75)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "train.py --help lists all keys."
            raise ValueError(f"{path} has the unknown key {key!r}: {hint}")
        try:
            checked[key] = _convert(actions[key], value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} gives {key} the value {value!r}: {error}.") from error
    return checked


def _convert(action: argparse.Action, value: Any) -> Any:
    if value is None:
        if action.default is not None:
            raise ValueError("it must have a value")
        return None
    if action.dest == "resume":
        raise ValueError("it belongs on the command line")
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError("it must be true or false")
        return value
    if isinstance(action, KeyValues):
        if not isinstance(value, dict):
            raise ValueError("it must be lines `key: value`, indented")
        return value
    if action.nargs in (2, 3, "+"):
        if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
            raise ValueError(f"it must be a list of {action.nargs if action.nargs != '+' else 'one or more'} numbers")
        return [action.type(item) for item in value]
    if isinstance(value, (list, dict)):
        raise ValueError("it must be one value")
    value = str(value) if action.type is None else action.type(str(value))
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"it must be one of {', '.join(action.choices)}")
    return value
