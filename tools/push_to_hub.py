"""Share a classifier on the Hugging Face hub, with a generated model card.

    python tools/push_to_hub.py output/nat/best.pth OWNER/NAME --license mit --data "1797 scans of digits"
    python tools/push_to_hub.py output/nat/best.pth OWNER/NAME --license mit --form transformers
    python tools/push_to_hub.py output/nat/best.pth OWNER/NAME --license mit --card card.md

Run `hf auth login` once before. The last command only writes the card to a file, without a network.

Everyone loads the result without `trust_remote_code`, as its card shows: `timm.create_model("hf-hub:OWNER/NAME",
pretrained=True)` after `import natzoo`, transformers after `import natzoo.hf`, or predict.py --checkpoint
hf-hub:OWNER/NAME. The weights are uploaded as model.safetensors.

The recipe on the card consists of the options in last.pth next to the checkpoint, unless --recipe names a file. The
results are those of the CSV files of validate.py --results-file, else the best accuracy of the run. A card that the
repository already has is kept, unless --new-card is given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from natzoo import command_line, hub
from natzoo.checkpoints import read_checkpoint, write_atomically, zoo_entries
from natzoo.classification.factory import create_model
from natzoo.classification.inference import restore

CONFIGS = Path(__file__).parents[1] / "configs" / "classification"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", help="published name, checkpoint of train.py, or folder or hf-hub:OWNER/NAME of timm or transformers")
    add("repository", metavar="OWNER/NAME", help="repository to create or update")
    add("--form", choices=hub.FORMS, default="timm", help="library that the files are for (default: timm)")
    add(
        "--license",
        metavar="ID",
        help="identifier of the license, such as mit; required unless the weights are published",
    )
    add("--data", metavar="TEXT", help="the training data, in words")
    add("--recipe", type=Path, metavar="FILE", help="recipe to print on the card")
    add(
        "--results", type=Path, nargs="+", default=[], metavar="CSV", help="results of validate.py to print on the card"
    )
    add("--private", action="store_true", help="create a private repository")
    add("--new-card", action="store_true", help="replace a card that the repository already has")
    add("--card", type=Path, metavar="FILE", help="only write the card to this file")
    return parser.parse_args(argv)


def facts_of(args: argparse.Namespace) -> hub.Facts:
    """Return what the card says, from the options and from what is known about the source.

    Raises:
        ValueError: if the license is unknown.
    """
    facts = hub.published_facts(args.source)
    recipe = args.recipe or (CONFIGS / f"{args.source}.yml" if facts.license else None)
    if recipe:
        facts = facts._replace(recipe=command_line.read_text(recipe, "pass a text file", "--recipe"))
    elif (Path(args.source).parent / "last.pth").is_file():
        last = read_checkpoint(Path(args.source).parent / "last.pth")
        facts = facts._replace(recipe=hub.recipe_of(last.get("options", {})))
        if Path(args.source).name == "best.pth" and isinstance(last.get("best"), float):
            facts = facts._replace(results=[("validation images of the training run", last["best"], None)])
    given = {"data": args.data, "license": args.license, "results": hub.read_results(args.results) or None}
    facts = facts._replace(**{name: value for name, value in given.items() if value is not None})
    if not facts.license:
        raise ValueError("--license is required for weights that are not published here; pass for example mit.")
    return facts


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        validate_repo_id(args.repository)
    except HFValidationError as error:
        raise ValueError(f"{args.repository} is not of the form OWNER/NAME: {str(error).splitlines()[0]}") from error
    if "/" not in args.repository:
        raise ValueError(f"{args.repository} lacks the owner; write OWNER/{args.repository}.")
    facts = facts_of(args)
    if args.source in zoo_entries():
        model, record = create_model(args.source, {"pretrained": True}).eval(), {"model": args.source}
    else:
        model, record = restore(args.source)
    if args.card:
        card = str(hub.make_card(args.repository, model, record, args.form, facts))
        write_atomically(args.card, lambda file: file.write(card.encode()))
        print(f"wrote {args.card}")
    else:
        print(hub.push_to_hub(model, record, args.repository, args.form, facts, args.private, args.new_card))


if __name__ == "__main__":
    command_line.run(main)
