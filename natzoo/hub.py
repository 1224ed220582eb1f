"""Share classifiers on the Hugging Face hub, in the form of timm or of transformers, with a generated model card.

Neither form needs `trust_remote_code`: the code of the models is in this package.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from natzoo.checkpoints import DownloadError, zoo_entries
from natzoo.checkpoints.sources import is_unreachable
from natzoo.classification.factory import TimmModel
from natzoo.classification.options import make_parser

FORMS = ("timm", "transformers")
_NAT = """@inproceedings{hassani2023neighborhood,
  title     = {Neighborhood Attention Transformer},
  author    = {Ali Hassani and Steven Walton and Jiachen Li and Shen Li and Humphrey Shi},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2023}
}"""
_DINAT = """@article{hassani2022dilated,
  title   = {Dilated Neighborhood Attention Transformer},
  author  = {Ali Hassani and Humphrey Shi},
  journal = {arXiv preprint arXiv:2209.15001},
  year    = {2022}
}"""
# Options of train.py that describe a machine or a run, not a recipe.
_NOT_RECIPE = {
    *("data", "config", "work_dir", "output", "experiment", "resume", "device", "threads", "workers", "pretrained"),
    *("log_interval", "save_interval", "keep_last", "skip_bad_images", "initial_checkpoint"),
}


class Facts(NamedTuple):
    """What a model card says about a model that its weights do not.

    Attributes:
        data: the training data, in words.
        recipe: the training recipe, as YAML.
        license: identifier of the license, as the hub lists them.
        results: rows (data set, top-1, top-5) in percent; top-5 may be None.
    """

    data: str = ""
    recipe: str = ""
    license: str = ""
    results: Sequence[tuple[str, float, float | None]] = ()


def read_results(paths: Sequence[Path]) -> list[tuple[str, float, float | None]]:
    """Read results of validate.py: CSV files with one model, named after their data set or with a column `dataset`.

    Raises:
        ValueError: if a file has no column top1, or several models.
        OSError: if a file cannot be read.
    """
    results: list[tuple[str, float, float | None]] = []
    for path in paths:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or "top1" not in rows[0]:
            raise ValueError(f"{path} has no column top1; use a file that validate.py --results-file wrote.")
        if len({row.get("model") for row in rows}) > 1:
            raise ValueError(f"{path} has several models; keep the rows of the model that is shared.")
        for row in rows:
            name = row.get("dataset") or re.sub("^results-", "", path.stem)
            results.append((name, float(row["top1"]), float(row["top5"]) if row.get("top5") else None))
    return results


def recipe_of(options: Mapping[str, Any]) -> str:
    """Return the options of a run of train.py that differ from their defaults, as YAML."""
    parser = make_parser()
    lines = []
    for name, value in sorted(options.items()):
        if name not in _NOT_RECIPE and value != parser.get_default(name) and isinstance(value, (str, int, float, list)):
            lines.append(f"{name}: {value}")
    return "\n".join(lines)


def make_card(repository: str, model: TimmModel, record: Mapping[str, Any], form: str, facts: Facts) -> ModelCard:
    """Generate the model card of a classifier.

    Args:
        repository: OWNER/NAME.
        model: the timm model.
        record: its record, as `restore` returns it.
        form: "timm" or "transformers".
        facts: what the weights do not say.

    Returns:
        Card with metadata, model, data, recipe, results, license and three ways to load it.
    """
    name, architecture = repository.rpartition("/")[2], record["model"]
    config = {**model.pretrained_cfg, **record.get("preprocessing", {})}
    evaluated = [
        EvalResult("image-classification", _slug(data), data, "accuracy", round(top1, 3), metric_name="top-1 (%)")
        for data, top1, _ in facts.results
    ]
    metadata = ModelCardData(
        library_name=form,
        license=facts.license or None,
        pipeline_tag="image-classification",
        tags=["image-classification", form, "neighborhood-attention", "natten"],
        model_name=name,
        eval_results=evaluated or None,
    )
    height, width = config["input_size"][1:]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    parts = [
        f"# {name}",
        f"Image classifier `{architecture}` with {model.num_classes} classes.",
        "## Model",
        f"- Architecture: `{architecture}`" + _arguments(record.get("model_kwargs", {})),
        f"- Parameters: {parameters:.1f} M",
        f"- Images: {height}x{width} pixels, crop fraction {config['crop_pct']:g}, {config['interpolation']}",
        "## Data",
        facts.data or "Not stated.",
        "## Recipe",
        f"```yaml\n{facts.recipe.strip()}\n```" if facts.recipe.strip() else "Not stated.",
        "## Results",
        _table(facts.results) if facts.results else "Not stated.",
        "## License",
        f"`{facts.license}`" if facts.license else "Not stated.",
        "## Load",
        _usage(repository, form),
        "## Citation",
        f"```bibtex\n{_DINAT if architecture.startswith('dinat') else _NAT}\n```",
    ]
    text = re.sub("(?m)^(- .*)\n\n(?=- )", "\\1\n", "\n\n".join(parts))
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n")


def push_to_hub(
    model: TimmModel,
    record: Mapping[str, Any],
    repository: str,
    form: str,
    facts: Facts,
    private: bool = False,
    new_card: bool = False,
) -> str:
    """Create a repository on the hub if necessary, and upload the card and the model.

    Args:
        model, record, repository, form, facts: as for `make_card`.
        private: create a private repository.
        new_card: replace a card that the repository already has.

    Returns:
        URL of the repository.

    Raises:
        ValueError: if the repository name is invalid, the model cannot be converted, or the hub refuses.
        DownloadError: if the hub cannot be reached.
    """
    api = HfApi(library_name="natzoo")
    if is_unreachable(api.endpoint):
        raise DownloadError(f"{api.endpoint} cannot be resolved; connect to the network, or use --card to preview.")
    if form == "transformers":  # before anything is uploaded
        from natzoo.hf import from_timm, image_processor

        exported, processor = from_timm(model), image_processor(model)
        _name_classes(exported.config, record)
    card = make_card(repository, model, record, form, facts)
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        # First, because timm writes a card of its own if there is none.
        if new_card or not api.file_exists(repository, "README.md"):
            card.push_to_hub(repository, commit_message="Add model card")
        if form == "transformers":
            exported.push_to_hub(repository, commit_message="Add model")
            processor.push_to_hub(repository, commit_message="Add preprocessing")
        else:
            _push_timm(model, record, repository)
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{repository} needs a token; run `hf auth login` first.") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"{repository} was not accepted by the hub: {str(error).splitlines()[0]}") from error
    return str(url)


def _push_timm(model: TimmModel, record: Mapping[str, Any], repository: str) -> None:
    config: dict[str, Any] = {"pretrained_cfg": dict(record.get("preprocessing", {}))}
    if record.get("classes"):
        config["label_names"] = list(record["classes"])
    arguments = {name: value for name, value in record.get("model_kwargs", {}).items() if value is not None}
    timm.models.push_to_hf_hub(model, repository, model_config=config, model_args=arguments, safe_serialization=True)


def _name_classes(config: Any, record: Mapping[str, Any]) -> None:
    if record.get("classes"):
        config.id2label = dict(enumerate(record["classes"]))
        config.label2id = {name: number for number, name in config.id2label.items()}


def published_facts(name: str) -> Facts:
    """Return what is published about a checkpoint of natzoo/zoo.yaml; empty facts for any other name."""
    entry = zoo_entries().get(name)
    if entry is None or entry.task != "classification":
        return Facts()
    top1 = entry.facts.get("top1")
    results = [("ImageNet-1K (published)", float(top1), None)] if top1 is not None else []
    is_large = "large" in name
    data = "ImageNet-22K" if name.endswith(("21k", "21k_11x11")) else "ImageNet-1K"
    data += ", after pretraining on ImageNet-22K" if is_large and data == "ImageNet-1K" else ""
    return Facts(data=f"{data} ({entry.url})", license="mit", results=results)


def _slug(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def _arguments(kwargs: Mapping[str, Any]) -> str:
    text = ", ".join(f"{name}={value}" for name, value in kwargs.items() if value is not None)
    return f" with `{text}`" if text else ""


def _table(results: Sequence[tuple[str, float, float | None]]) -> str:
    rows = [f"| {data} | {top1:.2f} | {'-' if top5 is None else f'{top5:.2f}'} |" for data, top1, top5 in results]
    return "\n".join(["| data | top-1 | top-5 |", "|---|---|---|", *rows])


_USAGE = {
    "timm": """With timm:

```python
import timm, natzoo

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
```

With transformers:

```python
import natzoo.hf, timm

model = natzoo.hf.from_timm(timm.create_model("hf-hub:{repository}", pretrained=True))
```""",
    "transformers": """With transformers:

```python
import natzoo.hf
from transformers import pipeline

classify = pipeline("image-classification", model="{repository}")
```

With timm:

```python
from natzoo.classification.inference import restore

model, record = restore("hf-hub:{repository}")  # a timm model; the record holds classes and preprocessing
```""",
}
_INSTALL = """First install the project "Neighborhood Attention Transformers" from its checkout, with `pip install .`:
it contains `natten` and `natzoo`. (`pip install natten` installs another package of that name.) `trust_remote_code` is
not needed: this repository contains weights and plain data only."""
_COMMAND = """On the command line:

```bash
natzoo-predict PICTURE --checkpoint hf-hub:{repository}
```"""


def _usage(repository: str, form: str) -> str:
    """Return three ways to load the model."""
    return "\n\n".join([_INSTALL, *(text.format(repository=repository) for text in (_USAGE[form], _COMMAND))])
