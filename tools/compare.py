"""Train several recipes with several seeds and compare their accuracy in a table and a plot.

    python tools/compare.py SIGN_DIGITS --configs configs/classification/sign_digits_*.yml --seeds 1 2 3
    python tools/compare.py DATA --configs a.yml b.yml --seeds 1 2 3 --output output/compare -- --epochs 10

Complete runs are skipped and interrupted ones resume. Options after `--` are passed to train.py. Two files are written:

- compare.csv: the best top-1 accuracy of each recipe over the seeds (mean, lowest and highest);
- compare.png: the mean accuracy per epoch, and its range over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from figures.curves import read_summary
from figures.style import save, to_png
from matplotlib.ticker import MaxNLocator

from natzoo import command_line
from natzoo.checkpoints import read_checkpoint, weights_of, write_table
from natzoo.classification.options import read_config

TRAIN = Path(__file__).resolve().parents[1] / "classification" / "train.py"
COLUMNS = ("recipe", "model", "parameters", "seeds", "top1_mean", "top1_least", "top1_most", "minutes")


def train(data: str, config: Path, seed: int, output: Path, more: list[str]) -> Path:
    """Train a recipe with a seed, or resume its run, and return the folder of the run.

    Raises:
        ValueError: if train.py failed.
    """
    folder = output / f"{config.stem}-{seed}"
    words = [sys.executable, str(TRAIN), data, "--config", str(config), "--seed", str(seed), "--resume"]
    done = subprocess.run([*words, "--work-dir", str(folder), *more])
    if done.returncode != 0:
        raise ValueError(f"{folder} is incomplete: train.py failed with the message above.")
    return folder


def summarize(config: Path, folders: list[Path]) -> dict[str, str]:
    """Return the row of a recipe."""
    runs = [read_summary(folder) for folder in folders]
    best = [max(run["top1"]) for run in runs]
    checkpoint = read_checkpoint(folders[0] / "best.pth")
    parameters = sum(value.numel() for value in weights_of(checkpoint, folders[0]).values())
    return {
        "recipe": config.stem,
        "model": checkpoint["record"]["model"],
        "parameters": str(parameters),
        "seeds": str(len(runs)),
        "top1_mean": f"{statistics.mean(best):.2f}",
        "top1_least": f"{min(best):.2f}",
        "top1_most": f"{max(best):.2f}",
        "minutes": f"{statistics.mean(sum(run['seconds']) for run in runs) / 60:.1f}",
    }


def draw(runs: dict[str, list[Path]]) -> plt.Figure:
    """Draw the mean top-1 accuracy per epoch of each recipe, and its range over the seeds."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, (name, folders) in enumerate(runs.items()):
        curves = [read_summary(folder)["top1"] for folder in folders]
        epochs = range(1, min(map(len, curves)) + 1)
        points = list(zip(*curves, strict=False))
        axes.plot(epochs, [statistics.mean(point) for point in points], color=f"C{index}", label=name)
        axes.fill_between(epochs, list(map(min, points)), list(map(max, points)), color=f"C{index}", alpha=0.2, lw=0)
    axes.set(xlabel="epoch", ylabel="top-1 accuracy (%)", title="Validation accuracy, mean and range over the seeds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with train/ and val/")
    parser.add_argument("--configs", type=Path, nargs="+", required=True, help="recipes (YAML files)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default: 1 2 3)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/compare"),
        help="folder for runs, table and plot (default: output/compare)",
    )
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args, more = parser.parse_args(words[:end]), words[end + 1 :]

    configs = [
        config for config in args.configs if "model" in read_config(config)
    ]  # files without a model are bases of others
    runs: dict[str, list[Path]] = {config.stem: [] for config in configs}
    rows: dict[str, dict[str, str]] = {}
    for seed in args.seeds:  # all recipes have a result early
        for config in configs:
            runs[config.stem].append(train(args.data, config, seed, args.output, more))
            rows[config.stem] = summarize(config, runs[config.stem])
        write_table(args.output / "compare.csv", COLUMNS, rows.values())
        save(to_png(draw(runs)), args.output / "compare.png")
    for row in (dict(zip(COLUMNS, COLUMNS, strict=True)), *rows.values()):
        print("  ".join(f"{row[name]:<{22 if name in ('recipe', 'model') else 11}}" for name in COLUMNS).rstrip())


if __name__ == "__main__":
    command_line.run(main)
