"""Published checkpoints: which there are, getting them, checking them.

    python tools/download.py list
    python tools/download.py list --task detection
    python tools/download.py get nat_mini dinat_tiny
    python tools/download.py get nat_mini --out weights
    python tools/download.py verify

Files go to NATZOO_CACHE_DIR, or natzoo in XDG_CACHE_HOME or ~/.cache, from where `pretrained=True` takes them. A broken
download is continued by the next one.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from natzoo import command_line
from natzoo.checkpoints import cache_folder, find_entry, locate_entry, path_in_cache, write_atomically, zoo_entries
from natzoo.checkpoints.download import check, recorded_sha256


def show(args: argparse.Namespace) -> None:
    """Of each checkpoint its name, whether it is here, what was published of it; below, where it is."""
    print(f"{'name':40} {'task':14} {'here':5} published figures")
    for entry in zoo_entries().values():
        if args.task in (None, entry.task):
            state = "yes" if path_in_cache(entry).exists() else "no"
            print(f"{entry.name:40} {entry.task:14} {state:5} {_told(entry.facts)}\n{'':4}{entry.url}")


def _told(facts: dict) -> str:
    figures = {key: value for key, value in facts.items() if not isinstance(value, str)}
    millions = figures.pop("params", None)
    exact = figures.pop("parameters", None)
    words = [f"{millions if exact is None else round(exact / 1e6, 1)} M parameters"] if millions or exact else []
    if "macs" in figures:
        words.append(f"{figures.pop('macs')} G MACs")
    return ", ".join([*words, *(f"{key} {value}" for key, value in figures.items())])


def get(args: argparse.Namespace) -> None:
    """Downloads what is not here yet; with --out copies it."""
    for entry in [find_entry(name) for name in dict.fromkeys(args.names)]:
        path = locate_entry(entry)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            is_from_hub = path != path_in_cache(entry)  # where each file has the same name
            target = args.out / (entry.name + path.suffix if is_from_hub else path.name)
            with path.open("rb") as source:
                write_atomically(target, lambda file, source=source: shutil.copyfileobj(source, file))
            path = target
        print(path)


def verify(args: argparse.Namespace) -> None:
    """Checks the hash of every file that is here.

    Raises:
        ValueError: naming the first that is damaged.
    """
    chosen = [find_entry(name) for name in args.names] or list(zoo_entries().values())
    here = [entry for entry in chosen if path_in_cache(entry).exists()]
    for entry in chosen if args.names else here:
        path = path_in_cache(entry)
        if entry not in here:
            raise FileNotFoundError(f"{path} is not here: `python tools/download.py get {entry.name}` downloads it.")
        known = entry.sha256 or recorded_sha256(path)
        print(f"{check(path, entry.sha256)}  {path}{'' if known else '  (nothing to compare it with)'}")
    if not here:
        print(f"no checkpoint is in {cache_folder()}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="all published checkpoints")
    listing.add_argument(
        "--task", choices=dict.fromkeys(entry.task for entry in zoo_entries().values()), help="only those of one task"
    )
    listing.set_defaults(run=show)
    getting = commands.add_parser("get", help="download some")
    getting.add_argument("names", nargs="+", metavar="NAME", help="as `list` shows them")
    getting.add_argument("--out", type=Path, metavar="DIR", help="also copy them there")
    getting.set_defaults(run=get)
    verifying = commands.add_parser("verify", help="check what is here")
    verifying.add_argument("names", nargs="*", metavar="NAME", help="all that are here unless given")
    verifying.set_defaults(run=verify)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    args.run(args)


if __name__ == "__main__":
    command_line.run(main)
