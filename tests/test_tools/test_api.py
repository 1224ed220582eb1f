"""tools/api.py builds an API reference that contains every public name."""

import importlib
import importlib.util
import warnings
from pathlib import Path

import pytest

pytest.importorskip("pdoc")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The built folder, and the documented modules."""
    path = Path(__file__).parents[2] / "tools" / "api.py"
    spec = importlib.util.spec_from_file_location("api", path)
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    folder = tmp_path_factory.mktemp("api")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        modules = api.build(folder)
    return folder, modules


def test_each_module_has_a_page_with_its_public_names(reference):
    folder, modules = reference
    for name in modules:
        page = (folder / name.replace(".", "/")).with_suffix(".html").read_text()
        public = getattr(importlib.import_module(name), "__all__", ())
        missing = [public_name for public_name in public if f'id="{public_name}"' not in page]
        assert not missing or _are_modules(name, missing), f"{name}: {missing}"


def _are_modules(package, names):
    return all(importlib.util.find_spec(f"{package}.{name}") for name in names)


def test_the_index_links_the_packages(reference):
    index = (reference[0] / "index.html").read_text()
    assert 'href="natten.html"' in index
    assert 'href="natzoo.html"' in index


def test_a_page_shows_signature_and_arguments(reference):
    page = (reference[0] / "natten" / "functional.html").read_text()
    assert page.count("kernel_size") > 10
    assert "Arguments" in page
