"""The engine's own arithmetic and its plain checkpoints, without ranks; tests/integration has the real ones."""

import errno
import resource
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from trainer.model.batch_norm import BatchNorm
from trainer.run.engine import Engine, _Writes
from trainer.run.trackers import start_tracker


class OneProcess:
    """The part of an accelerator that one plain process needs."""

    process_index = 0
    num_processes = 1
    device = "cpu"

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def clip_grad_norm_(self, parameters: Any, limit: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)


def _engine(weight_decay: float = 0.01, max_grad_norm: float = 0.5) -> Engine:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=weight_decay, betas=(0.9, 0.98))
    accelerator = cast(Accelerator, OneProcess())
    return Engine(
        accelerator, model, optimizer, max_grad_norm, uses_deepspeed=False, num_parameters=4, checkpoint_bytes=48
    )


def _update(engine: Engine, scale: float = 1.0) -> None:
    loss = engine.model(torch.ones(4, 3)).pow(2).sum() * scale
    engine.backward(loss, num_targets=4)


def test_loss_sums_become_means_over_all_targets() -> None:
    engine = _engine()
    loss = engine.model(torch.ones(4, 3)).pow(2).sum()
    expected = torch.autograd.grad(loss / 4, list(engine.model.parameters()))
    _update(engine)
    for parameter, gradient in zip(engine.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_norm_before_clipping_is_reported() -> None:
    engine = _engine(max_grad_norm=1e-3)
    _update(engine)
    norm = torch.stack([p.grad.norm() for p in engine.model.parameters()]).norm().item()
    result = engine.step()
    assert result.grad_norm == pytest.approx(norm) and not result.skipped
    assert all(p.grad is None for p in engine.model.parameters())


def test_an_update_that_is_not_finite_is_left_out() -> None:
    engine = _engine()
    before = engine.model.weight.clone()
    _update(engine, scale=float("nan"))
    assert engine.step().skipped
    assert torch.equal(engine.model.weight, before)


def test_loading_keeps_the_settings_of_this_run(tmp_path: Path) -> None:
    first = _engine(weight_decay=0.01)
    _update(first)
    first.step()
    first.save(tmp_path)
    second = _engine(weight_decay=0.3)
    second.optimizer.param_groups[0]["betas"] = (0.8, 0.9)
    second.load(tmp_path)
    assert torch.equal(second.model.weight, first.model.weight)
    state = second.optimizer.state[second.model.weight]
    assert torch.equal(state["exp_avg"], first.optimizer.state[first.model.weight]["exp_avg"])
    group = second.optimizer.param_groups[0]
    assert group["weight_decay"] == 0.3 and group["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(("values", "same"), [([7, 7, 7], True), ([0, 1000, 2000], False), ([0, 0, 1], False)])
def test_ranks_notice_together_that_they_differ(values: list[int], same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine()
    monkeypatch.setattr(OneProcess, "num_processes", len(values))
    total = torch.tensor([sum(values), sum(v * v for v in values)], dtype=torch.float64)
    monkeypatch.setattr(Engine, "sum_over_ranks", lambda self, tensor: total)
    assert [engine.same_on_all_ranks(value) for value in values] == [same] * len(values)


def test_only_the_main_rank_opens_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneProcess, "process_index", 1)
    start_tracker(_engine(), "wandb", tmp_path, {}, resumed=False)
    assert list(tmp_path.iterdir()) == []  # another rank's run id would cut the curves in two on resume


def test_running_statistics_become_the_mean_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine()
    engine.model = torch.nn.Sequential(torch.nn.Linear(3, 3), BatchNorm(3), BatchNorm(3, affine=False))
    engine.model[1].running_mean.fill_(2.0)
    monkeypatch.setattr(OneProcess, "num_processes", 2)
    monkeypatch.setattr(Engine, "sum_over_ranks", lambda self, values: values + 4.0)  # the other rank has 4 everywhere
    engine.average_batch_norms()
    assert engine.model[1].running_mean.tolist() == [3.0] * 3
    assert engine.model[2].running_var.tolist() == [2.5] * 3  # (1 + 4) / 2


@pytest.mark.parametrize("fits", ["weights", "nothing"])
def test_a_file_that_cannot_grow_is_an_error_of_the_file_system(tmp_path: Path, fits: str) -> None:
    """torch and safetensors do not raise `OSError` for it; a limit on file sizes needs no root and no small disk."""
    engine = _engine()
    engine.model = torch.nn.Linear(300, 300)
    engine.optimizer = torch.optim.AdamW(engine.model.parameters())
    _ = engine.model(torch.ones(1, 300)).sum().backward()
    engine.optimizer.step()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000 if fits == "weights" else 100_000, before[1]))
        with pytest.raises(OSError, match="File too large"):
            engine.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "optimizer.pt").exists() == (fits == "weights")  # nothing more is written after a failure


def test_deepspeed_writes_to_the_end_whatever_fails() -> None:
    """Between its writes it waits for all ranks, so a call that raised would leave the others waiting."""

    class Writer:
        def makedirs(self, path: str) -> None:
            done.append("makedirs")

        def save(self, path: str) -> None:
            done.append(path)
            raise OSError(errno.EIO, "Input/output error")

    class Model:
        checkpoint_engine = Writer()

        def _copy_recovery_script(self, path: str) -> None:
            done.append("script")

    done: list[str] = []
    model, writes = Model(), _Writes(Path("unused"))
    with writes.kept_apart(model):
        model.checkpoint_engine.makedirs("folder")
        model.checkpoint_engine.save("weights")
        model.checkpoint_engine.save("optimizer")
        model._copy_recovery_script("folder")
    assert done == ["makedirs", "weights"]
    with pytest.raises(OSError, match="Input/output error"):
        writes.raise_failure()
    with pytest.raises(OSError, match="Input/output error"):
        model.checkpoint_engine.save("as before")
