"""Build the API reference from the docstrings, as HTML pages.

    python tools/api.py                 # into output/api; open output/api/index.html
    python tools/api.py --out site

Needs pdoc: pip install pdoc
"""

import argparse
import warnings
from importlib.util import find_spec
from pathlib import Path

MODULES = (
    "natten",
    "natten.functional",
    "natten.modules",
    "natten.flops",
    "natten.profiler",
    "natten.geometry",
    "natten.backends",
    "natzoo",
    "natzoo.models",
    "natzoo.checkpoints",
    "natzoo.attention",
    "natzoo.hf",  # needs transformers
    "natzoo.openmmlab",  # needs mmdet and mmsegmentation
)
REQUIRES = {"natzoo.hf": "transformers", "natzoo.openmmlab": "mmdet"}


def build(folder: Path) -> list[str]:
    """Write one page per module into `folder`, and return the documented modules.

    Modules whose optional dependency is not installed are left out.
    """
    import pdoc

    modules = [name for name in MODULES if name not in REQUIRES or find_spec(REQUIRES[name])]
    pdoc.render.configure(docformat="google", show_source=True)
    with warnings.catch_warnings():
        # A package brings submodules along, and pdoc cannot resolve the annotations of named tuples.
        warnings.filterwarnings("ignore", message=".*has already been added|Error parsing type annotation")
        pdoc.pdoc(*modules, rf"!(?!({'|'.join(modules)})$)", output_directory=folder)
    return modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/api"), help="folder to write (default: output/api)")
    args = parser.parse_args()
    modules = build(args.out)
    print(f"{args.out / 'index.html'}: {len(modules)} modules")


if __name__ == "__main__":
    main()
