"""Build the wheels for Linux, macOS and Windows, on one Linux machine.

    pip install ziglang
    python tools/build_wheels.py                                           # all of them, into dist
    python tools/build_wheels.py --platform win_amd64 --platform any --out wheels

Each platform wheel contains the compiled CPU kernels, one library per CPU level. They depend only on the system's
C library, so they serve every version of Python and PyTorch. The wheel for `any` platform compiles on first use.
The package ziglang contains a C++ compiler for all platforms. It compiles its C++ library once per platform, which
takes some minutes, and keeps it in ~/.cache/zig.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from natten.backends import cache
from natten.backends.cpu.build import LEVELS_OF, SOURCES
from natten.backends.cpu.compiler import CompileError, compile_library, query, ziglang
from natten.checks import CommandParser

ROOT = Path(__file__).parents[1]
CONTENT = ("pyproject.toml", "README.md", "LICENSE", "natten", "natzoo", "natzoo_commands.py")
_X86 = {level: f"-march={level}" for level in LEVELS_OF["x86_64"]}


class Platform(NamedTuple):
    """A platform for which there is a wheel.

    Attributes:
        target: its name for `zig c++ -target`, with the oldest version of the system or its C library.
        suffix: of libraries.
        cpus: the flag that selects the CPU, by level; the names are those of `LEVELS_OF`.
    """

    target: str
    suffix: str
    cpus: Mapping[str, str]


PLATFORMS = {  # by the tag of the wheel
    "manylinux_2_28_x86_64": Platform("x86_64-linux-gnu.2.28", ".so", _X86),
    "manylinux_2_28_aarch64": Platform("aarch64-linux-gnu.2.28", ".so", {"armv8-a": "-march=armv8-a"}),
    "macosx_11_0_arm64": Platform("aarch64-macos.11.0", ".dylib", {"armv8-a": "-mcpu=apple_m1"}),
    "macosx_11_0_x86_64": Platform("x86_64-macos.11.0", ".dylib", _X86),
    "win_amd64": Platform("x86_64-windows-gnu", ".dll", _X86),
}
PURE = "any"


def build_libraries(platform: Platform, out: Path) -> None:
    """Compile the CPU kernels for all levels of a platform into a folder, named as `natten.backends.cpu.build` expects.

    Raises:
        CompileError: if the compiler fails.
    """
    compiler = query(ziglang(platform.target))
    for level, cpu in platform.cpus.items():
        with cache.scratch() as folder:
            library = folder / f"libnatten_cpu-{level}{platform.suffix}"
            compile_library(compiler, SOURCES, library, cpu)
            shutil.copy2(library, out)


def build_wheel(tag: str, copy: Path, out: Path) -> Path:
    """Build a wheel and return its path.

    Args:
        tag: a key of `PLATFORMS`, or "any".
        copy: an empty folder, for a clean copy of the sources. setuptools would pack leftovers of earlier builds.
        out: the folder of the wheel.

    Raises:
        CompileError: if the compiler fails.
        subprocess.CalledProcessError: if pip fails.
    """
    for name in CONTENT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, copy)
    libraries = copy / "natten" / "lib"
    shutil.rmtree(libraries, ignore_errors=True)
    options = []
    if tag != PURE:
        libraries.mkdir()
        build_libraries(PLATFORMS[tag], libraries)
        options = [f"--config-settings=--build-option=--plat-name={tag}"]
    wheels = copy / "dist"
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *options, "--wheel-dir", wheels, copy]
    subprocess.run(pip, check=True)
    (wheel,) = wheels.iterdir()
    return Path(shutil.copy2(wheel, out))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, by default those of the command line."""
    parser = CommandParser(prog="python tools/build_wheels.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--platform",
        action="append",
        choices=(*PLATFORMS, PURE),
        metavar="TAG",
        help=f"build only the wheel with this platform tag: {', '.join(PLATFORMS)}, or {PURE}; can be repeated",
    )
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder of the wheels; default: dist")
    args = parser.parse_args(argv)
    tags = list(dict.fromkeys(args.platform or (*PLATFORMS, PURE)))
    if tags != [PURE] and not ziglang():
        parser.error("ziglang, which cross-compiles, is not installed; run `pip install ziglang`.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for tag in tqdm(tags, unit="wheel"):
            with cache.scratch() as copy:
                wheel = build_wheel(tag, copy, args.out)
            tqdm.write(f"{wheel} ({wheel.stat().st_size / 1e6:.2f} MB)")
    except CompileError as error:
        parser.error(f"{tag} does not compile: {error}")
    except subprocess.CalledProcessError:
        parser.error(f"the wheel for {tag} cannot be built; see the messages of pip above.")
    except OSError as error:
        parser.error(f"{error.filename or args.out}: {error.strerror or error}")


if __name__ == "__main__":
    main()
