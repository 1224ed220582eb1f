"""Pictures of a run: its learning curve, and what the network attends to.

python tools/visualize.py curves output/nat output/dinat --out curves.png
python tools/visualize.py attention picture.png ... --checkpoint output/nat/best.pth --out attention.png
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification.images import read_image
from classification.models import class_names, evaluation_transform, restore
from natten import NeighborhoodAttention2D, na2d_av
from natzoo import command_line
from natzoo.checkpoints import write_atomically

# ---------------------------------------------------------------------------------------------------------------------
# Learning curves
# ---------------------------------------------------------------------------------------------------------------------


def read_summary(folder: Path) -> dict[str, list[float]]:
    """The columns of a run's summary.csv.

    Raises:
        FileNotFoundError: if the folder has none.
    """
    path = folder / "summary.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no summary.csv: name the folder of a run of train.py.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows yet: let the run finish an epoch.")
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def draw_curves(folders: list[Path]) -> plt.Figure:
    """Loss and top-1 accuracy over the epochs, of one or several runs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, folder in enumerate(folders):
        run = read_summary(folder)
        epochs = [epoch + 1 for epoch in run["epoch"]]
        left.plot(epochs, run["train_loss"], color=f"C{index}", linestyle=":", label=f"{folder.name}, training")
        left.plot(epochs, run["val_loss"], color=f"C{index}", label=f"{folder.name}, validation")
        right.plot(epochs, run["top1"], color=f"C{index}", label=f"{folder.name}, best {max(run['top1']):.2f}%")
    left.set(xlabel="epoch", ylabel="loss", title="Loss")
    right.set(xlabel="epoch", ylabel="top-1 accuracy (%)", title="Validation accuracy")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def evidence_and_window(model: nn.Module, x_1CHW: Tensor) -> tuple[int, Tensor, tuple[int, int], Tensor]:
    """What a prediction rests on, at the first stage.

    Returns:
        The class; the evidence for it of each token [H, W], which is feature times gradient where positive (HiResCAM,
        arXiv:2011.08891); the token with the most; and how that token weighs the others [H, W], mean over heads.

    Raises:
        ValueError: if the model has no stages with neighborhood attention.
    """
    levels = getattr(model, "levels", None)
    if not levels or not isinstance(levels[0].blocks[-1].attn, NeighborhoodAttention2D):
        raise ValueError(f"{type(model).__name__} has no stages with neighborhood attention to look at.")
    block = levels[0].blocks[-1]
    seen: dict[str, Tensor] = {}
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0].detach())),
        block.register_forward_hook(lambda _, __, output: seen.update(features=output)),
    ]
    logits = model(x_1CHW.requires_grad_())
    for hook in hooks:
        hook.remove()
    number = int(logits.argmax())
    (gradient,) = torch.autograd.grad(logits[0, number], seen["features"])
    evidence = (seen["features"] * gradient).sum(-1)[0].relu().detach()
    row, column = divmod(int(evidence.argmax()), evidence.shape[1])
    weights = token_weights(block.attn, seen["tokens"], row, column)
    return number, evidence, (row, column), weights[: evidence.shape[0], : evidence.shape[1]]


def token_weights(attention: NeighborhoodAttention2D, tokens_1HWC: Tensor, row: int, column: int) -> Tensor:
    """The weight that one token gives to each token of the padded map [H, W], mean over heads."""
    with torch.no_grad():
        weights = attention.attention_weights(tokens_1HWC)
    value = weights.new_zeros(*weights.shape[:-1], 1, requires_grad=True)
    # The output is linear in the values, so its gradient holds the weights, each at its key.
    out = na2d_av(weights, value, attention.kernel_size, attention.dilation)
    (received,) = torch.autograd.grad(out[0, :, row, column].mean(0).sum(), value)
    return received[0, ..., 0].sum(0)


def draw_attention(model: nn.Module, record: dict, paths: list[Path]) -> plt.Figure:
    """A row for each picture: itself, the evidence for its class, the window of the token with the most of it."""
    transform = evaluation_transform(record["preprocessing"])
    names = class_names(record, model.num_classes)
    figure, table = plt.subplots(
        len(paths),
        3,
        figsize=(7.5, 2.6 * len(paths)),
        layout="constrained",
        squeeze=False,
        subplot_kw={"xticks": [], "yticks": []},
    )
    for row, path in zip(table, paths, strict=True):
        x_1CHW = transform(read_image(path)).unsqueeze(0)
        number, evidence, token, weights = evidence_and_window(model, x_1CHW)
        picture = to_picture(x_1CHW[0], record["preprocessing"])
        row[0].imshow(picture.numpy())
        row[0].set_title(f"{path.parent.name}/{path.name}", fontsize=8)
        overlay(row[1], picture, evidence, f"evidence for {names[number]}")
        overlay(row[2], picture, weights, "window of the marked token")
        mark(row[2], token, weights.shape, picture.shape)
    return figure


def to_picture(x_CHW: Tensor, config: dict) -> Tensor:
    """The network's input as a picture [H, W, 3] again."""
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    return (x_CHW.detach() * std + mean).clamp(0, 1).permute(1, 2, 0)


def overlay(axes: plt.Axes, picture: Tensor, heat_HW: Tensor, title: str) -> None:
    """Draws a map of tokens over a picture, each token as the square of pixels that it stands for."""
    height, width = picture.shape[:2]
    heat = F.interpolate(heat_HW[None, None], size=(height, width), mode="nearest")[0, 0]
    axes.imshow(picture.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.imshow(heat.numpy(), cmap="inferno", alpha=0.65)
    axes.set_title(title, fontsize=8)


def mark(axes: plt.Axes, token: tuple[int, int], grid, picture) -> None:
    """Draws a frame around a token."""
    height, width = picture[0] / grid[0], picture[1] / grid[1]
    corner = (token[1] * width - 0.5, token[0] * height - 0.5)
    axes.add_patch(plt.Rectangle(corner, width, height, fill=False, edgecolor="cyan", linewidth=1.5))


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def save(figure: plt.Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content.getvalue()))
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw pictures of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    curves = commands.add_parser("curves", help="loss and accuracy over the epochs")
    curves.add_argument("runs", type=Path, nargs="+", help="folders that train.py wrote")
    attention = commands.add_parser("attention", help="what a prediction rests on")
    attention.add_argument("pictures", type=Path, nargs="+", help="images to look at")
    attention.add_argument("--checkpoint", required=True, help="checkpoint of train.py")
    for command in (curves, attention):
        command.add_argument("--out", type=Path, required=True, help="PNG to write")
    args = parser.parse_args(argv)
    if args.command == "curves":
        figure = draw_curves(args.runs)
    else:
        figure = draw_attention(*restore(args.checkpoint), args.pictures)
    save(figure, args.out)


if __name__ == "__main__":
    command_line.run(main)
