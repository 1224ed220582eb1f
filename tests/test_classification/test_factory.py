"""The effect of options on the model, the loss, the optimizer and the schedule."""

import errno
import functools
import os
import signal

import pytest
import torch
import torch.nn.functional as F

from natzoo.classification import train
from natzoo.classification.data import datasets
from natzoo.classification.factory import create_loss, create_model, create_scheduler
from natzoo.device import enable_tf32, explain_memory_errors

STEPS = ("--opt", "momentum", "--lr", "1.0", "--weight-decay", "0", "--sched", "none")


@pytest.fixture
def trainer(tiny):
    def make(*more):
        return train.Trainer(train.parse(tiny(*more)))

    return make


def batch(size=8):
    return torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(size) % 3


def moved(trainer):
    """Return how far one update moves the weights, and the gradient norm it reports."""
    before = [p.detach().clone() for p in trainer.model.parameters()]
    norm = trainer.update_weights(trainer.backward(*batch(), step=0).item())
    steps = [(p - old).flatten() for p, old in zip(trainer.model.parameters(), before, strict=True)]
    return torch.cat(steps).norm().item(), norm


@pytest.mark.parametrize(
    ("model", "argument", "hint"),
    [("nat_mini", "kernel_sizes", "did you mean kernel_size"), ("dinat_mini", "zzz", "embed_dim")],
)
def test_unknown_argument_of_a_model(model, argument, hint):
    with pytest.raises(ValueError, match=f"{model} has no argument {argument}; .*{hint}"):
        create_model(model, {argument: 3})


def test_gradients_are_clipped(trainer):
    distance, norm = moved(trainer(*STEPS, "--clip-grad", "0.01"))
    assert distance == pytest.approx(0.01, rel=1e-3)
    assert norm > 0.1
    distance, norm = moved(trainer(*STEPS, "--clip-grad", "0"))
    assert distance == pytest.approx(norm, rel=1e-3)


def test_learning_rate_is_scaled_only_with_lr_base_size(trainer, capsys):
    for more, wanted in (((), 2e-3), (("--lr-base-size", "64", "--grad-accum", "2"), 2e-3 * 16 / 64)):
        made = trainer("--sched", "none", *more)
        assert [group["lr"] for group in made.optimizer.param_groups] == pytest.approx([wanted, wanted])
        assert f"lr {wanted:.3g}\n" in made.describe()


def test_channels_last(trainer):
    made = trainer("--channels-last")
    seen = []
    made.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    made.backward(*batch(), step=0)
    filters = [p for p in made.model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[-1] > 1]
    for tensor in (*seen, *filters):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert len(seen) == 1 and filters


def test_compiled_and_checkpointed_gradients_are_the_same(trainer, monkeypatch):
    calls = []

    def compiled(model, mode=None):
        calls.append(model)
        return original(model)

    original = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiled)
    plain, *others = (trainer("--drop-path", "0", *more) for more in ((), ("--compile",), ("--grad-checkpointing",)))
    assert calls == [others[0].model]
    assert [any(level.grad_checkpointing for level in made.model.levels) for made in others] == [False, True]
    for made in (plain, *others):
        made.backward(*batch(), step=0)
    for made in others:
        for one, other in zip(plain.model.parameters(), made.model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def test_validation_batch_size(trainer):
    assert trainer().val_loader.batch_size == 8
    assert trainer("--val-batch-size", "3").val_loader.batch_size == 3


def test_smoothing_with_and_without_mixup(tiny):
    x, target = batch()
    mixup, _ = create_loss(train.parse(tiny("--mixup", "0.8", "--mixup-prob", "0", "--smoothing", "0.3")), 3)
    torch.testing.assert_close(mixup(x, target)[1], 0.7 * F.one_hot(target, 3) + 0.1)
    mixup, loss = create_loss(train.parse(tiny("--smoothing", "0.3")), 3)
    assert mixup is None
    logits = x[:, :, 0, 0]
    torch.testing.assert_close(loss(logits, target), F.cross_entropy(logits, target, label_smoothing=0.3))


def test_binary_cross_entropy_with_a_threshold(tiny):
    _, loss = create_loss(train.parse(tiny("--bce-loss", "--cutmix", "1.0", "--bce-target-thresh", "0.2")), 3)
    logits, mixed = batch()[0][:2, :, 0, 0], torch.tensor([[0.7, 0.3, 0.0], [0.9, 0.1, 0.0]])
    wanted = F.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(loss(logits, mixed), wanted)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["poly"], [1.0, 0.8, 0.6, 0.4, 0.2]),
        (["poly", "--decay-rate", "2"], [1.0, 0.64, 0.36, 0.16, 0.04]),
        (["step", "--decay-epochs", "4", "--decay-rate", "0.5"], [1.0, 1.0, 0.5, 0.5, 0.25]),
        (["multistep", "--decay-milestones", "2", "6"], [1.0, 0.1, 0.1, 0.01, 0.01]),
        (["none"], [1.0] * 5),
    ],
    ids=lambda value: "-".join(value) if isinstance(value[0], str) else "",
)
def test_schedules(tiny, more, wanted):
    args = train.parse(tiny("--lr", "1", "--min-lr", "0", "--sched", *more, epochs=10))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, epochs = create_scheduler(args, optimizer, updates_per_epoch=5)
    found = []
    for epoch in (0, 2, 4, 6, 8):
        if scheduler is not None:
            scheduler.step_update(5 * epoch)
        found.append(optimizer.param_groups[0]["lr"])
    assert epochs == 10
    assert found == pytest.approx(wanted)


def test_schedule_that_timm_ignores_silently_is_refused(tiny, monkeypatch):
    monkeypatch.setattr("natzoo.classification.factory.create_scheduler_v2", lambda *args, **kwargs: (None, 2))
    with pytest.raises(ValueError, match="--sched cosin"):
        train.main(tiny("--sched", "cosin"))


# ----- devices -----


def test_tf32_is_enabled_on_gpus_only(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.get_float32_matmul_precision()
    try:
        enable_tf32(torch.device("cpu"))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == (before, False)
        enable_tf32(torch.device("cuda"))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of PyTorch's unfinished iterator
def test_workers_that_cannot_be_started_are_a_user_error(tiny, monkeypatch):
    """As in a container whose /dev/shm only root can write."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", refuse)
    with pytest.raises(ValueError, match=r"--workers.*Permission denied.*/dev/shm"):
        train.main(tiny("--workers", "1"))


def test_killed_worker_is_a_user_error(tiny, monkeypatch):
    main = os.getpid()

    def killed(*args):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(datasets, "read_image", killed)
    with pytest.raises(ValueError, match=r"--workers.*DataLoader worker"):
        train.main(tiny("--workers", "1"))
    full = "unable to allocate shared memory(shm) for file </torch_12_3>: No space left on device (28)"
    with pytest.raises(ValueError, match="--shm-size"), explain_memory_errors("nothing"):
        raise RuntimeError(full)
    with pytest.raises(RuntimeError, match="another"), explain_memory_errors("nothing"):
        raise RuntimeError("another")
