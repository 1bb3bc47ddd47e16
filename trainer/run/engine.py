"""The only place that knows accelerate and DeepSpeed: prepare, agree, backward, step, save, load."""

import contextlib
import dataclasses
import datetime
import difflib
import logging
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedOptimizerWrapper,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.convert.training_state import read_training_state
from trainer.errors import UserError
from trainer.layout import (
    DEEPSPEED_FOLDER,
    OPTIMIZER_NAMES_KEY,
    PLAIN_MODEL_FILE,
    PLAIN_OPTIMIZER_FILE,
    SWAPPED_KEY,
    swapped_folder,
)
from trainer.model.batch_norm import running_statistics
from trainer.run.extensions import use_extensions_folder
from trainer.run.nvme import remove_files, uses_nvme
from trainer.run.reshard import load_plain, load_zero, swapped_groups

_GROUP_SETTINGS = ("weight_decay", "betas", "eps")
_SHAPES_GRADIENTS = (
    *("bf16", "fp16", "torch_autocast", "data_types", "communication_data_type", "prescale_gradients"),
    *("gradient_predivide_factor", "gradient_allreduce_op", "gradient_clipping", "gradient_accumulation_steps"),
    *("managed_gradient_accumulation", "train_micro_batch_size_per_gpu", "train_batch_size"),
)

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)

_PROBE_BYTES = 1 << 20


class StepResult(NamedTuple):
    """What one optimizer step did: gradient norm before clipping, and whether it was left out as not finite."""

    grad_norm: float
    skipped: bool


class Agreement(NamedTuple):
    """What all ranks agreed on before an update."""

    num_targets: float
    stop: bool


@dataclasses.dataclass
class Engine:
    """A prepared model and optimizer, under DeepSpeed or plain PyTorch, on one or many ranks."""

    accelerator: Accelerator
    model: Any
    optimizer: Any
    max_grad_norm: float
    uses_deepspeed: bool
    num_parameters: int
    checkpoint_bytes: int  # what `save` writes at least

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device(self.accelerator.device)

    def agree(self, num_targets: int, stop: bool) -> Agreement:
        """The one all-reduce per update: targets of the window on all ranks, and whether any wants to stop."""
        told = self.sum_over_ranks(torch.tensor([num_targets, int(stop)], dtype=torch.float64, device=self.device))
        total, stops = told.tolist()
        return Agreement(num_targets=total, stop=stops > 0)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, on all ranks."""
        total = values.clone()
        if self.world_size > 1:
            # not accelerate's `reduce`, which returns its input where it does not recognise the process group
            torch.distributed.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """What each rank brought (something small that can be pickled), in their order, on all ranks."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def average_batch_norms(self) -> None:
        """Give every rank the mean of all ranks' running statistics of batch norms, which each keeps for itself.

        Training does not read them. Before a validation or a save, so that neither depends on which rank's are taken.
        """
        for statistic in running_statistics(self.model):
            statistic.copy_(self.sum_over_ranks(statistic) / self.world_size)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Write the learning rate of the coming update into every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Encloses forward and backward of one micro-batch; the last of a window completes the gradient."""
        if self.uses_deepspeed:
            self.model.set_gradient_accumulation_boundary(last)
            yield
        else:
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                yield

    def backward(self, loss_sum: Tensor, num_targets: float) -> None:
        """Gradients of `loss_sum` divided by the targets of the whole window on all ranks.

        Both DeepSpeed and DistributedDataParallel average over ranks, so the sum is multiplied by the world size; the
        division by accumulation steps that DeepSpeed would add is turned off. What arrives at the optimizer is
        d(sum of all losses) / num_targets, however the window was split.
        """
        scaled = loss_sum * (self.world_size / max(num_targets, 1.0))
        if self.uses_deepspeed:
            self.model.backward(scaled, scale_wrt_gas=False)  # what accelerate's backward does, but for the step
        else:
            self.accelerator.backward(scaled)

    def step(self) -> StepResult:
        """Clip and apply the gradients of the window, or leave the update out when their norm is not finite."""
        if self.uses_deepspeed:
            self.model.step()  # clips and zeroes too
            grad_norm = float(self.model.get_global_grad_norm())
            return StepResult(grad_norm, bool(self.optimizer.step_was_skipped))
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        grad_norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), limit))
        skipped = not torch.isfinite(torch.tensor(grad_norm)).item()
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(grad_norm, skipped)

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state below `folder`; every rank calls it.

        Raises:
            OSError: this rank could not write; the others' calls return nevertheless.
        """
        writes = _Writes(folder)
        if self.uses_deepspeed:
            noted = {SWAPPED_KEY: swapped_groups(self.model.optimizer)}
            with writes.kept_apart(self.model):
                self.model.save_checkpoint(str(folder), tag=DEEPSPEED_FOLDER, client_state=noted, save_latest=False)
            if swapper := self._swapper():
                target = folder / DEEPSPEED_FOLDER / swapped_folder(self.rank)
                gradients = shutil.ignore_patterns("*gradient*")
                writes.attempt(shutil.copytree)(swapper.swap_folder, target, ignore=gradients)
        elif self.is_main:
            model: nn.Module = self.accelerator.unwrap_model(self.model)
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
            writes.attempt(save_file)(state, folder / PLAIN_MODEL_FILE, metadata={"format": "pt"})
            names = {parameter: name for name, parameter in model.named_parameters()}
            ordered = [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
            optimizer = {**self.optimizer.state_dict(), OPTIMIZER_NAMES_KEY: ordered}
            writes.attempt(torch.save)(optimizer, folder / PLAIN_OPTIMIZER_FILE)
        writes.raise_failure()

    def _swapper(self) -> Any:
        """What keeps the optimizer's state on NVMe; None where it is in memory."""
        return self.model.optimizer.optimizer_swapper if self.model.zero_nvme_offload_optimizer() else None

    def same_on_all_ranks(self, value: int) -> bool:
        """Whether every rank brought the same value (0 <= value < 10^7); the answer is the same on every rank."""
        sums = self.sum_over_ranks(torch.tensor([value, value * value], dtype=torch.float64, device=self.device))
        return bool(self.world_size * sums[1] == sums[0] ** 2)  # no variance

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote in a run that cuts its state as this one does (see `load_resharded`).

        Not with state on NVMe: DeepSpeed 0.19.8 would restore the moments, but neither weights nor step counts.

        Weight decay, betas and epsilon stay those of this run, which loading would set back.
        """
        settings = [{name: group[name] for name in _GROUP_SETTINGS} for group in self.optimizer.param_groups]
        self._load(folder)
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)

    def _load(self, folder: Path) -> None:
        if self.uses_deepspeed:
            self.model.load_checkpoint(str(folder), tag=DEEPSPEED_FOLDER)
        else:
            self.accelerator.unwrap_model(self.model).load_state_dict(load_file(folder / PLAIN_MODEL_FILE))
            state = torch.load(folder / PLAIN_OPTIMIZER_FILE, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state)

    def load_resharded(
        self, folder: Path, *, engine: str, world_size: int, num_updates: int, num_skipped_updates: int
    ) -> None:
        """Restore what `save` wrote in a run of another `engine`, `world_size`, ZeRO stage or offload.

        Every rank calls it. Raises `UserError`.
        """
        source = read_training_state(folder, engine=engine, world_size=world_size)
        if not self.uses_deepspeed:
            load_plain(self.accelerator.unwrap_model(self.model), self.optimizer.optimizer, source)
            return
        load_zero(self.model, source, rank=self.rank)
        self.model.global_steps = num_updates  # what DeepSpeed's own checkpoints restore besides
        self.model.global_samples = num_updates * self.model.train_batch_size()
        self.model.skipped_steps = num_skipped_updates

    def peak_memory_bytes(self) -> int:
        """Most memory held at once on this rank: the device's, or the resident set of the process on a CPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """End trackers and the process group, all ranks together; what this rank put on NVMe goes."""
        if self.uses_deepspeed and (swapper := self._swapper()):
            remove_files(Path(swapper.swap_folder))
        for tracker in self.accelerator.trackers:
            tracker.finish()
        # W&B may upload for minutes, and launchers end a rank seconds after another one has gone
        self.barrier()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class _Writes:
    """Calls that write below a folder; the first failure is kept until all ranks are through.

    Between its writes DeepSpeed waits for all ranks; with one that had left, the others would wait until a timeout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failure: Exception | None = None

    def attempt(self, write: Callable[..., Any]) -> Callable[..., None]:
        """`write`, but a failure is kept, and after one nothing more is written."""

        def attempted(*args: Any, **kwargs: Any) -> None:
            if self.failure is None:
                try:
                    write(*args, **kwargs)
                # torch and safetensors tell of a full disk in their own words
                except (OSError, RuntimeError, SafetensorError) as error:
                    self.failure = error

        return attempted

    @contextlib.contextmanager
    def kept_apart(self, model: Any) -> Iterator[None]:
        """Let the DeepSpeed engine `model` write through `attempt` (0.19.8: these three calls are all that write).

        It would copy files on NVMe too, and a rank that could not would leave the others waiting: `Engine.save` does.
        """
        writer = model.checkpoint_engine
        methods = ((writer, "save"), (writer, "makedirs"), (model, "_copy_recovery_script"))
        for owner, name in methods:
            setattr(owner, name, self.attempt(getattr(owner, name)))
        model.zero_nvme_offload_optimizer = lambda: False
        try:
            yield
        finally:
            for owner, name in (*methods, (model, "zero_nvme_offload_optimizer")):
                delattr(owner, name)  # uncovers the class's own

    def raise_failure(self) -> None:
        """Raise what was kept as an `OSError` that says what the file system has to say about it."""
        if self.failure is None:
            return
        if isinstance(self.failure, OSError):
            raise self.failure
        with tempfile.TemporaryFile(dir=self.folder) as probe:  # raises what torch did not tell
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
        raise OSError(str(self.failure).splitlines()[0]) from self.failure


def check_zero_section(ds_config: dict[str, Any]) -> None:
    """Raise `UserError` naming what DeepSpeed would not take in `zero_optimization`, before anything is loaded."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**{k: v for k, v in ds_config["zero_optimization"].items() if v != "auto"})
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = ".".join(str(part) for part in ("zero_optimization", *problem["loc"]))
            near = difflib.get_close_matches(str(problem["loc"][-1]), DeepSpeedZeroConfig.model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near and problem["type"] == "extra_forbidden" else "."
            lines.append(f"{path} ({problem['input']}): {problem['msg']}{hint}")
        raise UserError("\n".join(lines)) from error
    if uses_nvme(ds_config):
        _check_async_io()


def _check_async_io() -> None:
    """Raise `UserError` where the extension that writes to NVMe could not be compiled (seen in DeepSpeed 0.19.8)."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "zero_optimization.offload_optimizer.device (nvme) needs DeepSpeed's extension async_io, for which libaio "
            "or a C++ compiler is missing here; install libaio with its headers (Debian: libaio-dev, g++), or offload "
            "to cpu (--deepspeed zero3_offload)."
        )


def launched_ranks() -> int:
    """World size that the launcher announced; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is rank 0, known before any process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    ds_config: dict[str, Any] | None,
    bf16: bool,
    max_grad_norm: float,
    log_with: str | None,
    project_folder: Path,
    collective_timeout: datetime.timedelta = COLLECTIVE_TIMEOUT,
) -> Engine:
    """Start the process group and prepare model and optimizer; `ds_config` is resolved, None means plain PyTorch.

    The model is complete on the CPU before this is called: transformers cannot be built under `zero.Init`.
    """
    _quieten()
    _complete_environment()
    if ds_config is not None:
        use_extensions_folder(os.environ)
        _leave_out_shared_memory_op()
    backend = "nccl" if torch.cuda.is_available() else "gloo"  # accelerate finds no backend for DeepSpeed on CPUs
    accelerator = Accelerator(
        # accelerate would divide plain losses by this number; DeepSpeed's own division is turned off in `backward`. As
        # a plugin, because an environment variable of accelerate's wins over the plain argument
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1 if ds_config is None else ds_config["gradient_accumulation_steps"]
        ),
        mixed_precision="bf16" if bf16 else "no",
        # on CPUs accelerate finds plain ranks only with `cpu`, and DeepSpeed only without
        cpu=ds_config is None and not torch.cuda.is_available(),
        deepspeed_plugin=None if ds_config is None else DeepSpeedPlugin(hf_ds_config=ds_config),
        kwargs_handlers=[
            InitProcessGroupKwargs(backend=backend, timeout=collective_timeout),
            # with every forward pass it would send rank 0's, which are either constant or averaged when they are read
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
        log_with=log_with,
        project_dir=str(project_folder),
    )
    _check_distributed_type(accelerator, wants_deepspeed=ds_config is not None)
    # now, because ZeRO-3 leaves empty ones behind
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    checkpoint_bytes = _checkpoint_bytes(model, ds_config, bf16)
    model.train()
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    return Engine(
        accelerator,
        prepared_model,
        prepared_optimizer,
        max_grad_norm,
        uses_deepspeed=ds_config is not None,
        num_parameters=num_parameters,
        checkpoint_bytes=checkpoint_bytes,
    )


def _checkpoint_bytes(model: nn.Module, ds_config: dict[str, Any] | None, bf16: bool) -> int:
    """What a checkpoint holds at least: AdamW's two moments in fp32, and the weights in each layout that is kept."""
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    num_frozen = sum(parameter.numel() for parameter in model.parameters()) - num_trained
    if ds_config is None:
        return 8 * num_trained + 4 * (num_trained + num_frozen)
    width = 2 if bf16 else 4
    weights = num_frozen if ds_config["zero_optimization"].get("stage") == 3 else num_trained + num_frozen
    return 12 * num_trained + width * weights  # fp32 weights lie beside the moments


def probe_engine(engine: Engine, model: nn.Module, ds_config: dict[str, Any]) -> Engine:
    """`model` under DeepSpeed on the ranks of `engine`, with those of its settings that shape gradients."""
    import deepspeed

    zero = {
        # what accelerate derives from the model, and buffers that would be as large as those of the run
        **ds_config["zero_optimization"],
        "reduce_bucket_size": 1024,
        "allgather_bucket_size": 1024,
        "stage3_prefetch_bucket_size": 1024,
        "stage3_param_persistence_threshold": 0,
    }
    for section in ("offload_param", "offload_optimizer"):
        if zero.get(section, {}).get("device") == "nvme":
            del zero[section]  # no files for a probe
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    # monitors and profilers would write to the user's folders, and the compiled optimizer is not what is checked
    config = {key: value for key, value in ds_config.items() if key in _SHAPES_GRADIENTS}
    config |= {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    prepared, zero_optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return dataclasses.replace(engine, model=prepared, optimizer=DeepSpeedOptimizerWrapper(zero_optimizer))


def _check_distributed_type(accelerator: Accelerator, *, wants_deepspeed: bool) -> None:
    """Refuse what accelerate's own configuration, read from its environment variables, makes of the launch."""
    kind = accelerator.distributed_type
    if wants_deepspeed and kind != DistributedType.DEEPSPEED:
        raise UserError(f"accelerate set up {kind.value} although --deepspeed is given; check `accelerate env`.")
    plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if not wants_deepspeed and kind not in plain:
        raise UserError(
            f"accelerate's configuration asks for {kind.value}; give --deepspeed NAME, or launch without it "
            "(see `accelerate env`)."
        )
    if launched_ranks() > 1 and kind == DistributedType.NO:
        raise RuntimeError(f"accelerate did not join the {launched_ranks()} launched ranks into a process group")


def _complete_environment() -> None:
    """Give a process started without a launcher the variables that DeepSpeed's process group needs."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(defaults)


def _leave_out_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling an extension for CPU ranks that only its inference uses (seen in 0.19.8).

    It takes a minute, needs Python's headers, and a rank that dies meanwhile leaves a lock that later runs wait for.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _quieten() -> None:
    """Keep DeepSpeed's start-up log, dozens of lines per rank, from burying the run's own."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what it would find, without a warning per rank
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")  # once per epoch
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|accelerate|torch\.distributed)\..*")
