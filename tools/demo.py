"""A page in the browser that says what a picture shows, and what its tokens attend to.

    python tools/demo.py --checkpoint output/nat/best.pth
    python tools/demo.py --model dinat_tiny --pretrained --port 7861
    python tools/demo.py --export my-space    # a folder to push to a Hugging Face Space

Needs gradio: pip install gradio
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from natzoo import command_line
from natzoo.checkpoints.write import write_folder
from natzoo.classification.data.transforms import evaluation_transform, preprocessing
from natzoo.classification.device import pick_device
from natzoo.classification.inference import add_model_options, class_names, requested_model

ROOT = Path(__file__).resolve().parents[1]


def export(folder: Path) -> None:
    """Writes a folder that runs as a Space: tools/space and the packages that it needs.

    Raises:
        FileExistsError: if there is such a folder.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: name a folder that is not.")
    without = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib")

    def write(whole: Path) -> None:
        shutil.copytree(ROOT / "tools" / "space", whole, ignore=without, dirs_exist_ok=True)
        for package in ("natten", "natzoo"):
            shutil.copytree(ROOT / package, whole / package, ignore=without)
        shutil.copy(ROOT / "LICENSE", whole)

    write_folder(folder, write)
    print(f"wrote {folder}")


def make_page(args: argparse.Namespace):
    """The page of the model that the options ask for.

    Raises:
        ModuleNotFoundError: without gradio.
        ValueError, FileNotFoundError: as `requested_model`, or if the model has no attention to look at.
    """
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs gradio: pip install gradio.") from error
    from space import app

    model, record = requested_model(args, pick_device(args.device))
    config = preprocessing(args, model, record)
    names = class_names(record, model.num_classes)
    looker = app.Looker(model, evaluation_transform(config), config["mean"], config["std"], names)
    return app.make_page(looker, args.model or record["model"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--port", type=int, default=7860, help="where the page is served: http://localhost:PORT")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write a Space's folder, and serve nothing")
    args = parser.parse_args(argv)
    if args.export:
        export(args.export)
    else:
        make_page(args).launch(server_port=args.port)


if __name__ == "__main__":
    command_line.run(main, "the page is gone")
