"""Export a classifier for another runtime, compare it with the original, and time both.

    python tools/export.py nat_mini --format onnx
    python tools/export.py output/nat/best.pth --format onnx --images data/digits/val
    python tools/export.py dinat_mini --format openvino --dynamic-size 224 384 --out dinat_mini.xml
    python tools/export.py output/nat/best.pth --format onnx --int8 data/digits/train --evaluate data/digits/val

The model is a registered name, with --pretrained for its published weights, or a checkpoint as predict.py takes it. The
programs take any batch size; --dynamic-size LEAST MOST also lets height and width vary, which costs speed. The exported
program runs on random images, and on those of --images; the largest difference of the logits and the time of both are
printed.

    onnx          for ONNX Runtime and others; standard operators only
    openvino      for OpenVINO (pip install openvino)
    torch-export  .pt2, for torch.export.load and AOTInductor; needs no natten to run
    torchscript   .pt, for torch.jit.load; needs natten to run, and the size of the images is fixed

--int8 FOLDER quantizes an ONNX program statically, with the images of a folder for calibration. --evaluate FOLDER
prints the accuracy of the original and of each program on a folder with one subfolder per class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from exporting import formats, measure
from exporting.formats import FORMATS, Shapes

from natzoo import command_line
from natzoo.classification.data.transforms import preprocessing
from natzoo.classification.factory import create_model
from natzoo.classification.inference import restore
from natzoo.classification.options import image_size, positive


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="registered model name, or a checkpoint")
    add("--format", choices=FORMATS, default="onnx", help="format to write (default: onnx)")
    add("--out", type=Path, metavar="FILE", help="file to write (default: output/export/NAME with the usual suffix)")
    add("--pretrained", action="store_true", help="load the published weights of a model given by name")
    add("--img-size", type=image_size, metavar="PIXELS", help="height and width (default: those of the model)")
    add("--batch-size", type=positive, default=1, metavar="N", help="batch size to time (default: 1)")
    text = "let height and width vary in this range; not for torchscript"
    add("--dynamic-size", type=image_size, nargs=2, metavar=("LEAST", "MOST"), help=text)
    add("--images", type=Path, metavar="FOLDER", help="images to compare the program with, besides random ones")
    add("--int8", type=Path, metavar="FOLDER", help="also quantize with the images of this folder (onnx only)")
    text = "images for calibration, spread evenly over the folder (default: 128)"
    add("--calibration-images", type=positive, default=128, metavar="N", help=text)
    add("--evaluate", type=Path, metavar="FOLDER", help="folder with one subfolder per class, or with val/")
    text = "CPU threads for timing (default: those of PyTorch)"
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help=text)
    add("--rounds", type=positive, default=10, metavar="N", help="timed calls (default: 10)")
    args = parser.parse_args(argv)
    suffix = FORMATS[args.format]
    if args.out and args.out.suffix != suffix:
        raise ValueError(f"--out {args.out} must end with {suffix}, the suffix of --format {args.format}.")
    for option in ("images", "int8", "evaluate"):
        folder = getattr(args, option)
        if folder and not folder.is_dir():
            raise FileNotFoundError(f"--{option} {folder} is not a folder; pass a folder of images.")
    if args.int8 and args.format != "onnx":
        raise ValueError("--int8 requires --format onnx.")
    if args.dynamic_size and args.format == "torchscript":
        raise ValueError("--dynamic-size does not work with --format torchscript; use torch-export or onnx.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    formats.require(args.format)
    torch.set_num_threads(args.threads)
    if Path(args.model).exists() or ":" in args.model or Path(args.model).suffix:
        model, record = restore(args.model)
        name = Path(args.model).parent.name if Path(args.model).is_file() else Path(args.model).name
    else:
        torch.manual_seed(0)
        model, record = create_model(args.model, {"pretrained": args.pretrained}).eval(), {"classes": None}
        name = args.model
    model = model.requires_grad_(False)
    config = preprocessing(argparse.Namespace(img_size=args.img_size), model, record)
    shapes = Shapes(*config["input_size"], *(args.dynamic_size or (None, None)))
    path = args.out or Path("output", "export", name).with_suffix(FORMATS[args.format])
    command_line.create_folder(path.parent, "--out")
    formats.write(model, args.format, path, shapes)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")

    programs = {args.format: formats.load(args.format, path, args.threads)}
    images = measure.read_images(args.images, config) if args.images else None
    for line in measure.compare(model, programs[args.format], shapes, images):
        print(line)
    if args.int8:
        target = path.with_name(f"{path.stem}_int8{path.suffix}")
        formats.quantize(path, target, measure.read_images(args.int8, config, args.calibration_images))
        print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
        programs["onnx int8"] = formats.load("onnx", target, args.threads)
    batch, threads = command_line.counted(args.batch_size, "image"), command_line.counted(args.threads, "thread")
    print(f"time of {batch}, {threads}, median of {command_line.counted(args.rounds, 'call')}:")
    print(measure.table(model, programs, shapes, args.batch_size, args.rounds, args.evaluate, config, record))


if __name__ == "__main__":
    command_line.run(main)
