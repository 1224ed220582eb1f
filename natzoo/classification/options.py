"""The options of train.py: defaults, overridden by a YAML file, overridden by the command line."""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from natzoo import command_line
from natzoo.checkpoints.record import (
    INTERPOLATIONS,
    MAX_CLASSES,
    MAX_IMAGE_SIZE,
    REFUSED_ARGUMENTS,
    is_plausible_argument,
)
from natzoo.schema import shown

# The processes of a machine share its cores. macOS does not report the cores this process may use.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = max(1, min(8, _CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
_MAX_BASES = 16
_MAX_RECIPE_BYTES, _MAX_RECIPE_VALUES = 2**20, 10_000


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of train.py and the YAML file of --config.

    Raises:
        ValueError: if the file has an unknown key (the message suggests the closest one) or an invalid value.
        FileNotFoundError: if the file or one of its bases does not exist.
    """
    parser = make_parser()
    config = parser.parse_known_args(argv)[0].config
    if config is not None:
        parser.set_defaults(**_check_config(read_config(Path(config)), parser, config))
    return parser.parse_args(argv)


def read_config(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file and its bases.

    The key `base` names another file in the folder of this one, whose keys this file overrides. Entries of
    `model_kwargs` are merged.

    Args:
        path: the file.
        derived: the files that lead to it through `base`.

    Raises:
        ValueError: if a file is not a mapping of keys to values in YAML, or is its own base.
        FileNotFoundError: if a file does not exist.
    """
    path = path.resolve()
    if path in derived:
        raise ValueError(f"{path} is its own base; remove one of the keys `base`.")
    remedy = f"check `base` in {derived[-1]}" if derived else "check --config (recipes are in configs/ of the checkout)"
    config = _load_yaml(command_line.read_text(path, remedy, limit=_MAX_RECIPE_BYTES), path)
    base = config.pop("base", None)
    if base is None:
        return config
    if not command_line.is_relative_name(base):
        raise ValueError(f"{path} has base = {shown(base)}; it must name a file in the same folder or below it.")
    if len(derived) == _MAX_BASES:
        raise ValueError(f"{derived[0]} has more than {_MAX_BASES} bases in a row; merge some of them.")
    inherited = read_config(path.parent / base, (*derived, path))
    merged = {**inherited, **config}
    if isinstance(config.get("model_kwargs"), dict) and isinstance(inherited.get("model_kwargs"), dict):
        merged["model_kwargs"] = {**inherited["model_kwargs"], **config["model_kwargs"]}
    return merged


def _load_yaml(text: str, path: Path) -> dict[str, Any]:
    """Parse a YAML file, without expanding more aliases than anyone would write out.

    Raises:
        ValueError: naming the file, if it is not valid, not a mapping of keys to values, or too large.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        pending, count = [root] if root else [], 0
        while pending:
            node, count = pending.pop(), count + 1
            if count > _MAX_RECIPE_VALUES:
                raise ValueError(f"it has more than {_MAX_RECIPE_VALUES} values")
            for item in () if isinstance(node, yaml.ScalarNode) else node.value:
                pending += item if isinstance(item, tuple) else [item]
        config = {} if root is None else loader.construct_document(root)
    except Exception as error:  # malformed values of the built-in tags raise errors of many kinds
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is a {type(config).__name__}; it must consist of lines `key: value`.")
    return config


class RangeError(argparse.ArgumentTypeError, ValueError):
    """A number outside its range; argparse prints the message."""


class Number:
    """The type of an option: a number within a range.

    Args:
        kind: int or float.
        low, high: the range, which includes both.
        above: exclude `low`.
    """

    def __init__(self, kind: type[int] | type[float], low: float, high: float, above: bool = False):
        self.kind, self.low, self.high, self.above = kind, low, high, above

    def __call__(self, text: str) -> Any:
        """Parse a number.

        Raises:
            RangeError: if it is not one, or outside the range.
        """
        with contextlib.suppress(ValueError, OverflowError):
            value = self.kind(text)
            if self.low <= value <= self.high and not (self.above and value == self.low):
                return value
        name = "an integer" if self.kind is int else "a number"
        low = f"above {self.low:g} and up to" if self.above else f"from {self.low:g} to"
        raise RangeError(f"{text!r:.50} is not {name} {low} {self.high:.10g}")


positive, non_negative = Number(int, 1, 10**9), Number(int, 0, 10**9)
fraction, amount = Number(float, 0, 1), Number(float, 0, 1e38)
image_size, batch_size = Number(int, 1, MAX_IMAGE_SIZE), Number(int, 1, 2**16)
num_classes, workers = Number(int, 1, MAX_CLASSES), Number(int, 0, 128)
crop_pct = Number(float, 0.1, 1)


def class_weight(text: str) -> float | str:
    """Parse a value of --class-weights: a number, or "balanced"."""
    return text if text == "balanced" else amount(text)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all options of train.py; each is also a key of the YAML files, with _ instead of -."""
    parser = command_line.Parser(
        description="Train an image classifier.",
        usage="%(prog)s [DATA] [--config YAML] [options]",
        formatter_class=HelpFormatter,
    )
    flag: dict[str, Any] = {"default": False, "action": argparse.BooleanOptionalAction}
    number: dict[str, Any] = {"type": amount, "metavar": "X"}
    share: dict[str, Any] = {"type": fraction, "metavar": "X"}
    count: dict[str, Any] = {"type": positive, "metavar": "N"}
    count_or_0: dict[str, Any] = {"type": non_negative, "metavar": "N"}
    channels: dict[str, Any] = {"nargs": 3, "metavar": ("R", "G", "B")}
    bounds: dict[str, Any] = {"nargs": 2, "metavar": ("MIN", "MAX"), "action": _Bounds}
    parser.add_argument(
        "data", nargs="?", metavar="DATA", help="folder with train/ and val/, each with one subfolder per class"
    )
    parser.add_argument("-c", "--config", metavar="YAML", help="YAML file with options; the command line overrides it")

    group = parser.add_argument_group("data")
    add_dataset_options(group)
    group.add_argument("--train-split", default="train", metavar="NAME", help="name of the training split")
    group.add_argument("--val-split", default="val", metavar="NAME", help="name of the validation split")
    group.add_argument("--class-map", metavar="FILE", help="text file with one class name per line, in class order")
    group.add_argument(
        "--synthetic",
        type=Number(int, 1, 10**8),
        metavar="N",
        help="train on N images of noise instead of DATA, to measure speed",
    )
    group.add_argument(
        "--aug-repeats",
        type=Number(int, 1, 100),
        default=1,
        metavar="N",
        help="repeated augmentation: N views per image; an epoch keeps its number of images",
    )
    group.add_argument("--workers", type=workers, metavar="N", default=WORKERS, help="data-loading workers per GPU")
    group.add_argument("--skip-bad-images", **flag, help="ignore images that cannot be read, instead of stopping")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="nat_tiny", metavar="NAME", help="timm model name")
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="arguments of the model",
    )
    group.add_argument(
        "--num-classes", type=num_classes, metavar="N", help="number of classes (default: from the data)"
    )
    add_input_options(group)
    group.add_argument("--drop-path", **share, help="stochastic depth rate (default: from the model)")
    group.add_argument("--pretrained", **flag, help="start from the published weights")
    group.add_argument(
        "--initial-checkpoint", metavar="FILE", help="start from these weights: a file, or the name of published ones"
    )
    group.add_argument(
        "--freeze",
        type=non_negative,
        metavar="N",
        help="do not train the patch embedding and the first N stages; 0 freezes the patch embedding only",
    )
    group.add_argument("--linear-probe", **flag, help="train only the classifier")
    group.add_argument("--sync-bn", **flag, help="batch norm over all GPUs, for models that have batch norm")

    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--teacher", metavar="NAME", help="teacher: timm model name with published weights, or a checkpoint of train.py"
    )
    group.add_argument(
        "--distill", choices=["logit", "feature"], default="logit", help="what the model learns from the teacher"
    )
    group.add_argument("--distill-weight", **number, default=1.0, help="weight of the distillation loss")
    group.add_argument("--task-weight", **number, default=1.0, help="weight of the loss of the labels")
    group.add_argument(
        "--distill-temperature",
        type=Number(float, 0, 100, above=True),
        metavar="X",
        default=1.0,
        help="softmax temperature of the logits",
    )

    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="adamw", metavar="NAME", help="timm optimizer name")
    group.add_argument("--lr", **number, default=1e-3, help="peak learning rate")
    group.add_argument("--lr-base-size", **count, help="multiply --lr by (images per update) / N")
    group.add_argument(
        "--weight-decay", **number, default=0.05, help="weight decay; does not apply to norms and biases"
    )
    group.add_argument("--decay-rpb", **flag, help="apply weight decay to relative position biases, too")
    group.add_argument("--momentum", **share, default=0.9, help="momentum, for optimizers that have one")
    group.add_argument("--opt-eps", **share, help="optimizer epsilon (default: from the optimizer)")
    group.add_argument("--opt-betas", **share, nargs="+", help="optimizer betas (default: from the optimizer)")
    group.add_argument("--layer-decay", **share, help="layer-wise learning-rate decay factor")
    group.add_argument("--clip-grad", **number, default=5.0, help="limit of --clip-mode; 0 disables clipping")
    group.add_argument(
        "--clip-mode",
        choices=["norm", "value", "agc"],
        default="norm",
        help="clip the norm of all gradients, their values, or their norms relative to the weights (AGC)",
    )
    group.add_argument("--batch-size", type=batch_size, metavar="N", default=128, help="batch size per GPU")
    group.add_argument("--grad-accum", **count, default=1, help="gradient accumulation: batches per update")
    group.add_argument(
        "--skip-nonfinite",
        **count_or_0,
        default=3,
        help="skip at most N updates in a row with a non-finite loss or gradient, then stop",
    )

    group = parser.add_argument_group("schedule")
    group.add_argument("--epochs", **count, default=300, help="number of epochs, including warm-up but not cooldown")
    group.add_argument(
        "--sched",
        default="cosine",
        metavar="NAME",
        help="learning-rate schedule: cosine, poly, step, multistep or none",
    )
    group.add_argument("--warmup-epochs", **count_or_0, default=20, help="epochs of linear warm-up")
    group.add_argument("--warmup-lr", **number, default=1e-6, help="initial learning rate of warm-up")
    group.add_argument("--min-lr", **number, default=5e-6, help="final learning rate")
    group.add_argument("--cooldown-epochs", **count_or_0, default=10, help="additional epochs at --min-lr")
    group.add_argument("--decay-epochs", **count, help="step: epochs between decays (default: 90)")
    group.add_argument(
        "--decay-milestones",
        type=non_negative,
        nargs="+",
        default=[90, 180, 270],
        metavar="EPOCH",
        help="multistep: epochs of the decays",
    )
    group.add_argument(
        "--decay-rate", **number, help="step and multistep: factor (default: 0.1); poly: power (default: 1)"
    )
    group.add_argument(
        "--lr-noise", type=fraction, nargs="+", metavar="X", help="add noise to the rate from X on, or between two X"
    )
    group.add_argument("--lr-noise-pct", **share, default=0.67, help="limit of the noise, relative to the rate")
    group.add_argument("--lr-noise-std", **number, default=1.0, help="standard deviation of the noise")
    group.add_argument("--lr-cycle-limit", **count, default=1, help="number of cycles of cosine and poly")
    group.add_argument("--lr-cycle-mul", **number, default=1.0, help="length of a cycle relative to the one before")
    group.add_argument("--lr-cycle-decay", **share, default=0.1, help="peak of a cycle relative to the one before")
    group.add_argument("--lr-k-decay", **number, default=1.0, help="k-decay of cosine and poly")
    group.add_argument("--early-stop", **count, help="stop after N epochs without a better top-1 accuracy")

    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--img-size-start", type=image_size, metavar="PIXELS", help="start with smaller images, which grow to full size"
    )
    group.add_argument(
        "--img-size-epochs", **count, help="epochs until the images have full size (default: 60%% of --epochs)"
    )
    group.add_argument(
        "--scale",
        type=Number(float, 0, 1, above=True),
        **bounds,
        default=[0.08, 1.0],
        help="area range of the random crop",
    )
    group.add_argument(
        "--ratio",
        type=Number(float, 0.01, 100),
        **bounds,
        default=[3 / 4, 4 / 3],
        help="aspect ratio range of the random crop",
    )
    group.add_argument("--hflip", **share, default=0.5, help="probability of a horizontal flip")
    group.add_argument("--vflip", **share, default=0.0, help="probability of a vertical flip")
    group.add_argument("--color-jitter", **number, default=0.4, help="color jitter strength, used with --aa none")
    group.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm AutoAugment policy, or none"
    )
    group.add_argument(
        "--train-interpolation", default="random", choices=["random", *INTERPOLATIONS], help="resize interpolation"
    )
    group.add_argument("--reprob", **share, default=0.25, help="random erasing: probability")
    group.add_argument("--remode", default="pixel", choices=["const", "rand", "pixel"], help="random erasing: fill")
    group.add_argument(
        "--recount", type=Number(int, 1, 100), metavar="N", default=1, help="random erasing: number of areas"
    )
    group.add_argument("--mixup", **number, default=0.8, help="mixup alpha; 0 disables mixup")
    group.add_argument("--cutmix", **number, default=1.0, help="cutmix alpha; 0 disables cutmix")
    group.add_argument("--mixup-prob", **share, default=1.0, help="probability of mixup or cutmix per batch")
    group.add_argument("--mixup-switch-prob", **share, default=0.5, help="probability of cutmix if both are enabled")
    group.add_argument("--smoothing", **share, default=0.1, help="label smoothing")
    group.add_argument(
        "--class-weights",
        nargs="+",
        type=class_weight,
        metavar="W",
        help="weights of the classes in the loss: balanced, or one number per class in class order",
    )
    group.add_argument("--bce-loss", **flag, help="binary cross entropy instead of cross entropy")
    group.add_argument("--bce-target-thresh", **share, help="binary cross entropy: threshold that makes targets 0 or 1")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--crop-pct", type=crop_pct, metavar="X", help="center crop fraction (default: from the model)")
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="resize interpolation (default: from the model)")
    group.add_argument("--mean", type=fraction, **channels, help="mean of the color channels (default: from the model)")
    group.add_argument(
        "--std",
        type=Number(float, 0, 1, above=True),
        **channels,
        help="standard deviation of the channels (default: from the model)",
    )
    group.add_argument(
        "--val-batch-size", type=batch_size, metavar="N", help="batch size of validation (default: --batch-size)"
    )
    group.add_argument("--model-ema", **flag, help="evaluate an exponential moving average (EMA) of the weights")
    group.add_argument("--model-ema-decay", **share, default=0.9998, help="decay of the EMA")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--work-dir", metavar="DIR", action=_WorkDir, help="folder of the run (default: output/<config or model name>)"
    )
    group.add_argument(
        "--output",
        default="output",
        metavar="DIR",
        action=_WorkDir,
        help="replaced by --work-dir: parent folder of the run",
    )
    group.add_argument(
        "--experiment", metavar="NAME", action=_WorkDir, help="replaced by --work-dir: name of the folder in --output"
    )
    group.add_argument(
        "--resume", nargs="?", const="auto", metavar="FILE", help="resume from the last checkpoint of the run, or FILE"
    )
    group.add_argument(
        "--save-interval", **count_or_0, default=0, help="also save every N updates; 0 saves only after each epoch"
    )
    group.add_argument("--keep-last", **count_or_0, default=0, help="also keep the checkpoints of the last N epochs")
    group.add_argument("--seed", type=Number(int, 0, 2**63 - 1), default=42, metavar="N", help="random seed")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto uses the GPU if there is one")
    group.add_argument("--threads", type=Number(int, 1, 1024), metavar="N", help="CPU threads (default: PyTorch's)")
    group.add_argument("--amp", choices=["none", "bf16", "fp16"], default="none", help="mixed-precision data type")
    group.add_argument("--channels-last", **flag, help="use the channels-last memory format")
    group.add_argument("--grad-checkpointing", **flag, help="recompute activations to save memory")
    group.add_argument("--compile", **flag, help="compile the model with torch.compile")
    group.add_argument(
        "--torchcompile",
        choices=["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        metavar="MODE",
        help="compile the model in this mode of torch.compile: default, reduce-overhead, max-autotune, "
        "max-autotune-no-cudagraphs",
    )
    group.add_argument("--fsdp", **flag, help="shard weights and optimizer over the processes (FSDP2)")
    group.add_argument(
        "--log",
        nargs="+",
        choices=["tensorboard", "wandb", "trackio"],
        default=["tensorboard"],
        metavar="TRACKER",
        help="where the metrics go besides summary.csv: tensorboard, wandb, trackio",
    )
    group.add_argument(
        "--log-interval", **count, default=10, help="update the trackers and the progress bar every N updates"
    )
    return parser


def add_input_options(parser: argparse._ActionsContainer) -> None:
    """Add the options for the size of the model's input."""
    default = "(default: from the model)"
    parser.add_argument("--img-size", type=image_size, metavar="PIXELS", help=f"image height and width {default}")
    parser.add_argument(
        "--input-size",
        nargs=3,
        type=image_size,
        metavar=("C", "H", "W"),
        help=f"image channels, height and width {default}",
    )
    parser.add_argument(
        "--in-chans", type=image_size, metavar="N", help="image channels: 3, or 1 for gray images (default: 3)"
    )


def add_dataset_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that select the kind of dataset."""
    parser.add_argument(
        "--dataset",
        default="",
        metavar="KIND",
        help="format of DATA: folder or tar (detected), hfds/NAME (Hugging Face) or wds (webdataset shards)",
    )
    parser.add_argument(
        "--allow-remote-shards",
        nargs="+",
        metavar="SCHEME",
        help="wds: schemes of shards that are not files in DATA, such as https; pipe runs any command that DATA names",
    )
    parser.add_argument("--input-key", default="image", metavar="NAME", help="hfds: name of the image column")
    parser.add_argument("--target-key", default="label", metavar="NAME", help="hfds: name of the label column")


class HelpFormatter(argparse.HelpFormatter):
    """Show the default of an option, unless it is empty or the help text mentions one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        is_empty = default is None or default is False or default in ("", {}, argparse.SUPPRESS)
        if is_empty or not action.option_strings or "default:" in text:
            return text
        values = default if isinstance(default, list) else [default]
        shown = " ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
        return f"{text} (default: {shown})"


class _WorkDir(argparse.Action):
    """Store an option that names the folder of the run; --output and --experiment reset --work-dir."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        if self.dest != "work_dir":
            namespace.work_dir = None


class _Bounds(argparse.Action):
    """Store a range of two numbers."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            setattr(namespace, self.dest, self.check(values))
        except ValueError as error:
            parser.error(f"{option_string} {values[0]} {values[1]}: {error}")

    @staticmethod
    def check(values: list[float]) -> list[float]:
        """Return the numbers.

        Raises:
            ValueError: if the first one is larger.
        """
        if values[0] > values[1]:
            raise ValueError("the smaller number comes first")
        return values


class KeyValues(argparse.Action):
    """Merge KEY=VALUE pairs into the dict of the YAML file; values are Python literals or strings."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = dict(getattr(namespace, self.dest) or {})
        for pair in values:
            key, equals, text = pair.partition("=")
            if not equals:
                parser.error(f"{option_string} {pair!r} is not of the form KEY=VALUE")
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pairs[key] = text
        try:
            setattr(namespace, self.dest, _check_model_kwargs(pairs))
        except ValueError as error:
            parser.error(f"{option_string}: {error}")


def _check_model_kwargs(value: Any) -> dict[str, Any]:
    """Return the arguments of a model, unless they name files: those of other people may run code.

    Raises:
        ValueError: saying what is wrong.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("it must consist of indented lines `key: value`")
    refused = sorted(REFUSED_ARGUMENTS & value.keys())
    if refused:
        raise ValueError(f"{', '.join(refused)} cannot be set; use --pretrained or --initial-checkpoint")
    for key, argument in value.items():
        if not is_plausible_argument(key, argument):
            raise ValueError(f"{shown(key)} = {shown(argument)} is implausible")
    return value


def _check_config(config: dict[str, Any], parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Convert the values of a YAML file as the command line would."""
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    checked = {}
    for key, value in config.items():
        if key not in actions:
            names = command_line.closest(str(key)[:100], actions)
            hint = "train.py --help lists all keys, and arguments of the model go below model_kwargs."
            if names:
                hint = f"did you mean {' or '.join(map(repr, names))}?"
            raise ValueError(f"{path} has the unknown key {shown(key)}; {hint}")
        try:
            checked[key] = _convert(actions[key], value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} has {key} = {shown(value)}; {error}.") from error
    return checked


def _convert(action: argparse.Action, value: Any) -> Any:
    convert: Any = action.type
    if value is None:
        if action.default is not None:
            raise ValueError("a value is required")
        return None
    if action.dest in ("resume", "allow_remote_shards"):
        raise ValueError("pass it on the command line")
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError("it must be true or false")
        return value
    if isinstance(action, KeyValues):
        return _check_model_kwargs(value)
    if action.nargs in (2, 3, "+"):
        if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
            raise ValueError(f"it must be a list of {action.nargs if action.nargs != '+' else 'one or more'} values")
        values: list[Any] = [str(item) if convert is None else convert(str(item)) for item in value]
        if action.choices is not None and not set(values) <= set(action.choices):
            raise ValueError(f"it must be a list of {', '.join(action.choices)}")
        return action.check(values) if isinstance(action, _Bounds) else values
    if isinstance(value, (list, dict)):
        raise ValueError("it must be a single value")
    value = str(value) if convert is None else convert(str(value))
    if "\0" in str(value):
        raise ValueError("it has a null character")
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"it must be one of {', '.join(action.choices)}")
    return value
