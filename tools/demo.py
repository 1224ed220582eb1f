"""Serve a web page that classifies an image and shows the attention of its tokens.

    python tools/demo.py --checkpoint output/nat/best.pth
    python tools/demo.py --model dinat_tiny --pretrained --port 7861
    python tools/demo.py --export my-space    # write a folder for a Hugging Face Space

Requires gradio: pip install gradio
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from natzoo import command_line
from natzoo.checkpoints.write import write_folder
from natzoo.classification.data.transforms import evaluation_transform, preprocessing
from natzoo.classification.inference import add_model_options, class_names, requested_model
from natzoo.device import pick_device

ROOT = Path(__file__).resolve().parents[1]


def export(folder: Path) -> None:
    """Write a folder that runs as a Hugging Face Space: tools/space, natten and natzoo.

    Raises:
        FileExistsError: the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} already exists; choose a new folder.")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib")

    def write(target: Path) -> None:
        shutil.copytree(ROOT / "tools" / "space", target, ignore=ignored, dirs_exist_ok=True)
        for package in ("natten", "natzoo"):
            shutil.copytree(ROOT / package, target / package, ignore=ignored)
        shutil.copy(ROOT / "LICENSE", target)

    write_folder(folder, write)
    print(f"wrote {folder}")


def serve(args: argparse.Namespace) -> None:
    """Serve the gradio page for the model given by the options.

    Raises:
        ModuleNotFoundError: gradio is not installed.
        ValueError: no model is given, or it has no neighborhood attention.
        FileNotFoundError: missing checkpoint.
    """
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("gradio is required for the demo; run: pip install gradio") from error
    from space import app

    model, record = requested_model(args, pick_device(args.device))
    config = preprocessing(args, model, record)
    classes = class_names(record, model.num_classes)
    viewer = app.AttentionViewer(model, evaluation_transform(config), config["mean"], config["std"], classes)
    page = app.create_page(viewer, args.model or record["model"])
    page.launch(server_port=args.port, max_file_size=app.MAX_FILE_SIZE)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--port", type=int, default=7860, help="port of the web page (default: 7860)")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write a folder for a Space instead of serving")
    args = parser.parse_args(argv)
    if args.export:
        export(args.export)
    else:
        serve(args)


if __name__ == "__main__":
    command_line.run(main, "the page is no longer served")
