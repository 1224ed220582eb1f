"""List, download and verify the published checkpoints.

    python tools/download.py list
    python tools/download.py list --task detection
    python tools/download.py get nat_mini dinat_tiny
    python tools/download.py get nat_mini --out weights
    python tools/download.py verify

Files are stored in NATZOO_CACHE_DIR, or else in natzoo in XDG_CACHE_HOME or ~/.cache, where `pretrained=True` finds
them. An interrupted download resumes when you run the command again.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from natzoo import command_line
from natzoo.checkpoints import cache_folder, find_entry, locate_entry, path_in_cache, write_atomically, zoo_entries
from natzoo.checkpoints.download import check, recorded_sha256


def show(args: argparse.Namespace) -> None:
    """Print the name of each checkpoint, whether it is downloaded, its published figures and its URL."""
    print(f"{'name':40} {'task':14} {'local':5} published figures")
    for entry in zoo_entries().values():
        if args.task in (None, entry.task):
            state = "yes" if path_in_cache(entry).exists() else "no"
            print(f"{entry.name:40} {entry.task:14} {state:5} {_figures(entry.facts)}\n{'':4}{entry.url}")


def _figures(facts: dict) -> str:
    figures = {key: value for key, value in facts.items() if not isinstance(value, str)}
    millions = figures.pop("params", None)
    exact = figures.pop("parameters", None)
    words = [f"{millions if exact is None else round(exact / 1e6, 1)} M parameters"] if millions or exact else []
    if "macs" in figures:
        words.append(f"{figures.pop('macs')} G MACs")
    return ", ".join([*words, *(f"{key} {value}" for key, value in figures.items())])


def get(args: argparse.Namespace) -> None:
    """Download checkpoints that are missing and, with --out, copy them."""
    for entry in [find_entry(name) for name in dict.fromkeys(args.names)]:
        path = locate_entry(entry)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            is_from_hub = path != path_in_cache(entry)  # whose files all have the same name
            target = args.out / (entry.name + path.suffix if is_from_hub else path.name)
            with path.open("rb") as source:
                write_atomically(target, lambda file, source=source: shutil.copyfileobj(source, file))
            path = target
        print(path)


def verify(args: argparse.Namespace) -> None:
    """Check the hash of every downloaded file.

    Raises:
        ValueError: if a file is damaged.
        FileNotFoundError: if a named checkpoint is not downloaded.
    """
    chosen = [find_entry(name) for name in args.names] or list(zoo_entries().values())
    local = [entry for entry in chosen if path_in_cache(entry).exists()]
    for entry in chosen if args.names else local:
        path = path_in_cache(entry)
        if entry not in local:
            raise FileNotFoundError(f"{path} does not exist; run `python tools/download.py get {entry.name}`.")
        known = entry.sha256 or recorded_sha256(path)
        print(f"{check(path, entry.sha256)}  {path}{'' if known else '  (no published or recorded hash)'}")
    if not local:
        print(f"no checkpoints in {cache_folder()}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="list the published checkpoints")
    listing.add_argument(
        "--task", choices=dict.fromkeys(entry.task for entry in zoo_entries().values()), help="list this task only"
    )
    listing.set_defaults(run=show)
    getting = commands.add_parser("get", help="download checkpoints")
    getting.add_argument("names", nargs="+", metavar="NAME", help="name as printed by `list`")
    getting.add_argument("--out", type=Path, metavar="DIR", help="folder to copy the files to")
    getting.set_defaults(run=get)
    verifying = commands.add_parser("verify", help="check the hashes of downloaded files")
    verifying.add_argument("names", nargs="*", metavar="NAME", help="checkpoints to check; all local ones by default")
    verifying.set_defaults(run=verify)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    args.run(args)


if __name__ == "__main__":
    command_line.run(main)
