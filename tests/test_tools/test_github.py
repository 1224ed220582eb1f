"""The files of .github: workflows and issue forms follow GitHub's schemas, and name what exists."""

import re
import subprocess

import pytest
import yaml

from test_tools.pages import ROOT, name_of, tracked

WORKFLOWS = tracked(".github/workflows/*.yml")
SCHEMAS = {
    ".github/workflows": "vendor.github-workflows",
    ".github/ISSUE_TEMPLATE": "vendor.github-issue-forms",
}


def steps(path):
    """Return all steps of a workflow."""
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", tracked(".github/*/*.yml"), ids=name_of)
def test_schema(path):
    main = pytest.importorskip("check_jsonschema", reason="the extra dev is not installed").main
    schema = "vendor.github-issue-config" if path.name == "config.yml" else SCHEMAS[name_of(path.parent)]
    with pytest.raises(SystemExit) as stop:
        main(["--builtin-schema", schema, str(path)], prog_name="check-jsonschema")
    assert not stop.value.code


def test_a_mistake_is_found(tmp_path):
    main = pytest.importorskip("check_jsonschema", reason="the extra dev is not installed").main
    path = tmp_path / "workflow.yml"
    path.write_text(WORKFLOWS[0].read_text().replace("runs-on", "runs-at"))
    with pytest.raises(SystemExit) as stop:
        main(["--builtin-schema", SCHEMAS[".github/workflows"], str(path)], prog_name="check-jsonschema")
    assert stop.value.code == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_actions_are_pinned_and_scripts_exist(path):
    for step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
        else:
            subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True)
            for name in re.findall(r"\S+\.(?:py|sh)\b|\.ci/run", step["run"]):
                assert (ROOT / name).is_file(), name
