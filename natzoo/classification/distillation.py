"""Knowledge distillation with timm's tasks: from the logits or the features of a teacher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import unwrap_model
from torch import nn

from natzoo.checkpoints.adapt import check_fit
from natzoo.classification.data.transforms import preprocessing
from natzoo.classification.distributed import World
from natzoo.classification.factory import SOURCES, TimmModel, check_input_size, create_model
from natzoo.classification.inference import restore


def create_teacher(
    args: argparse.Namespace, record: dict[str, Any], world: World, device: torch.device
) -> tuple[TimmModel, dict[str, Any]]:
    """Create the teacher that --teacher names, in eval mode.

    Args:
        args: the options.
        record: record of the student.
        world: the processes.
        device: device of the teacher.

    Returns:
        the teacher, and its preprocessing.

    Raises:
        ValueError: if it is unknown, its weights cannot be loaded, or it has other classes or another input.
        FileNotFoundError: if the checkpoint does not exist.
    """
    channels = record["preprocessing"]["input_size"][0]
    if timm.is_model(args.teacher) or args.teacher.startswith(SOURCES):
        kwargs = {"pretrained": True, "in_chans": channels}
        teacher = world.local_main_first(lambda: create_model(args.teacher, kwargs))
        teacher_record: dict[str, Any] = {"classes": None, "preprocessing": {}}
    else:
        teacher, teacher_record = restore(args.teacher)
    classes = teacher_record["classes"]
    if teacher.num_classes != record["num_classes"] or (classes and list(classes) != record["classes"]):
        raise ValueError(
            f"--teacher {args.teacher} has other classes ({teacher.num_classes}) than this run "
            f"({record['num_classes']}); train a teacher on the same data."
        )
    config = preprocessing(argparse.Namespace(in_chans=channels), teacher, teacher_record)
    check_input_size(teacher, {**config, "input_size": record["preprocessing"]["input_size"]})
    return teacher.requires_grad_(False).to(device).eval(), config


def create_distillation(
    args: argparse.Namespace,
    model: TimmModel,
    criterion: nn.Module,
    record: dict[str, Any],
    world: World,
    device: torch.device,
) -> Any:
    """Create timm's distillation task for a student.

    Its `trainable_module` is the student, for features with a projection to the teacher's; call the task with images
    and targets for a dictionary with the `loss`.

    Raises:
        ValueError: as in `create_teacher`; or if this timm has no tasks, or a model has no features.
    """
    try:
        from timm.task import FeatureDistillationTask, LogitDistillationTask
    except ImportError as error:
        raise ValueError("--teacher requires a newer version of the package timm; install timm>=1.0.31.") from error
    teacher, config = create_teacher(args, record, world, device)
    options: dict[str, Any] = {
        "criterion": criterion,
        "distill_loss_weight": args.distill_weight,
        "task_loss_weight": args.task_weight,
        "device": device,
        "verbose": False,
    }
    task: Any
    if args.distill == "logit":
        task = LogitDistillationTask(model, teacher, temperature=args.distill_temperature, **options)
    else:
        torch.manual_seed(args.seed)  # of the projection
        task = FeatureDistillationTask(model, teacher, **options)
    # timm takes them from the models; the options and the number of channels may change them.
    for owner, name, values in ((task, "student", record["preprocessing"]), (task.teacher, "kd", config)):
        for key in ("mean", "std"):
            buffer = f"student_{key}" if name == "student" else f"{key}_kd"
            setattr(owner, buffer, torch.tensor(values[key], device=device).view(1, -1, 1, 1))
    return task


def load_projection(task: Any, state: dict[str, Any], path: Path) -> None:
    """Load the projection of feature distillation from the state of a run.

    Raises:
        ValueError: naming the file, if it has none or another one.
    """
    own = task.get_task_state()
    if not own:
        return
    saved = state.get("distillation")
    projection = saved.get("projection") if isinstance(saved, dict) else None
    if not isinstance(projection, dict):
        raise ValueError(f"{path} has no projection of feature distillation; resume with the original --distill.")
    module = unwrap_model(task.trainable_module).projection
    check_fit(module, projection, path)
    module.load_state_dict(projection)
