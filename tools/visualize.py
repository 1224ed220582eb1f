"""Plot training runs, attention maps, saliency maps, receptive fields and neighborhood attention itself.

    python tools/visualize.py curves output/nat output/dinat --out curves.png
    python tools/visualize.py attention image.png ... --checkpoint output/nat/best.pth --out attention.png
    python tools/visualize.py token image.png --checkpoint output/dinat/best.pth --point 12,20 --out layers.png
    python tools/visualize.py token image.png --checkpoint output/dinat/best.pth --stage 1 --out heads.png
    python tools/visualize.py salient *.jpg --models vit_base_patch16_224 nat_base --pretrained --out salient.png
    python tools/visualize.py receptive-field --models nat_mini dinat_mini --out fields.png
    python tools/visualize.py neighborhood --out neighborhood.gif --theme both

With --theme both, two files are written: NAME_light and NAME_dark. For the options of a command, run
python tools/visualize.py COMMAND --help
"""

from __future__ import annotations

import argparse
from pathlib import Path

from figures import attention, curves, neighborhood, receptive_field, saliency, token
from figures.style import save, theme_paths, themed, to_png

from natzoo import command_line

COMMANDS = {
    "curves": curves,
    "attention": attention,
    "token": token,
    "salient": saliency,
    "receptive-field": receptive_field,
    "neighborhood": neighborhood,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_options(command)
        command.add_argument("--out", type=Path, required=True, metavar="FILE", help="output file")
        command.add_argument("--theme", choices=("light", "dark", "both"), default="light", help="color theme")
    args = parser.parse_args(argv)
    draw = COMMANDS[args.command].prepare(args)
    for name, path in theme_paths(args.out, args.theme).items():
        with themed(name) as theme:
            drawn = draw(theme)
            content = drawn if isinstance(drawn, bytes) else to_png(drawn)
        save(content, path)


if __name__ == "__main__":
    command_line.run(main)
