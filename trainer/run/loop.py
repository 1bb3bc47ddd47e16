"""One run from flags to the last checkpoint: build, resume, train, close."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor

from trainer.arguments import PretrainArguments, dump_recipe
from trainer.data.audio import SAMPLE_RATE
from trainer.data.batching import Cursor, epoch_batches
from trainer.data.collate import MaskSettings
from trainer.data.frames import FrameGeometry
from trainer.data.loader import Window
from trainer.errors import UserError
from trainer.layout import CONFIG_FILE, METRICS_FILE, SKIPPED_FILE
from trainer.model.optim import build_optimizer
from trainer.model.pretraining import build_model
from trainer.model.schedules import gumbel_temperature, learning_rate
from trainer.model.sizes import load_model_config
from trainer.run.checkpoint import TrainerState, read_state, save_checkpoint, set_aside
from trainer.run.corpus import (
    Corpus,
    SkippedLog,
    batching_of,
    describe,
    open_corpus,
    training_stream,
    validation_stream,
)
from trainer.run.ds_config import load_ds_config, resolve_ds_config
from trainer.run.engine import Engine, StepResult, build_engine, is_main_process, launched_ranks
from trainer.run.evaluation import evaluate
from trainer.run.guard import Guard
from trainer.run.metrics import Totals, append_line, drop_lines_after, means
from trainer.run.progress import Progress
from trainer.run.run_folder import (
    changed_settings,
    check_model_matches,
    check_resumable,
    lock_run_folder,
    open_run_folder,
)
from trainer.run.signals import StopRequest
from trainer.run.steps import audio_seconds, dropped_layers, forward, seed_micro_batch
from trainer.run.trackers import check_tracker, start_tracker, track

EXIT_DONE = 0
EXIT_STOPPED = 4


def pretrain(arguments: PretrainArguments) -> int:
    """Train to `max_train_steps` or until asked to stop; returns the exit code. Raises `UserError`, `RunWentBad`."""
    run = build(arguments)
    if run is None:
        return EXIT_DONE
    try:
        return run.train()
    finally:
        run.close()


@dataclasses.dataclass
class Run:
    """Everything one run needs, put together by `build`."""

    arguments: PretrainArguments
    folder: Path
    config: Wav2Vec2Config
    geometry: FrameGeometry
    masks: MaskSettings
    corpus: Corpus
    engine: Engine
    state: TrainerState
    totals: Totals
    progress: Progress
    skipped: SkippedLog
    stop: StopRequest
    max_train_steps: int
    lock: TextIO | None
    interval_start: float = dataclasses.field(default_factory=time.monotonic)

    def train(self) -> int:
        """The loop. Each update takes one window; log, validation and checkpoint follow when they are due."""
        guard = Guard()
        if self.state.step >= self.max_train_steps:
            self._say(f"nothing left to do: the checkpoint is at update {self.state.step}, --max_train_steps says "
                      f"{self.max_train_steps}")  # fmt: skip
            return EXIT_DONE
        cursor = Cursor(self.state.epoch, self.state.batch)
        windows = training_stream(
            self.arguments, self.corpus.train, self.geometry, self.masks, cursor,
            self.engine.rank, self.engine.world_size, self._pin_memory,
        )  # fmt: skip
        for window in windows:
            stop, result, rate, temperature = self.update(window)
            self.state.step += 1
            self.state.epoch, self.state.batch = window.next_cursor
            self.state.skipped_steps += int(result.skipped)
            self.progress.advance()
            guard.watch(self.state.step, result.skipped)
            last = self.state.step >= self.max_train_steps
            if last or self.state.step % self.arguments.logging_steps == 0:
                self.log(result, rate, temperature)
            if last or self.state.step % (self.arguments.eval_steps or self.arguments.saving_steps) == 0:
                self.validate()
            if last or stop or self.state.step % self.arguments.saving_steps == 0:
                self.save()
            if last:
                return EXIT_DONE
            if stop:
                self._say(f"stopped on request after update {self.state.step}; go on with --resume latest")
                return EXIT_STOPPED
        raise AssertionError("the stream of windows is endless")

    def update(self, window: Window) -> tuple[bool, StepResult, float, float]:
        """One update: agree on the count, add up gradients of the window, step (see the page on one update)."""
        arguments, engine, step = self.arguments, self.engine, self.state.step
        agreed = engine.agree(sum(batch.num_targets for batch in window.batches), self.stop.requested)
        rate = learning_rate(
            step,
            peak=arguments.learning_rate,
            num_warmup_steps=arguments.num_warmup_steps,
            max_train_steps=self.max_train_steps,
            kind=arguments.lr_scheduler_type,
        )
        temperature = gumbel_temperature(
            step,
            maximum=arguments.max_gumbel_temperature,
            minimum=arguments.min_gumbel_temperature,
            decay=arguments.gumbel_temperature_decay,
        )
        engine.set_learning_rate(rate)
        for number, batch in enumerate(window.batches):
            seed_micro_batch(arguments.seed, step, number * engine.world_size + engine.rank)
            dropped = dropped_layers(arguments.seed, step, number, self.config.num_hidden_layers, self.config.layerdrop)
            with engine.micro_batch(last=number == len(window.batches) - 1):
                terms = forward(engine, batch, temperature, dropped)
                engine.backward(terms.loss, agreed.num_targets)
            self.totals.add(terms, audio_seconds(batch))
            self.skipped.add(batch.skipped)
        return agreed.stop, engine.step(), rate, temperature

    def log(self, result: StepResult, rate: float, temperature: float) -> None:
        """Write the means since the last log over all ranks."""
        line: dict[str, Any] = {"step": self.state.step, "split": "train"}
        line |= means(self.engine.sum_over_ranks(self.totals.values))
        seconds = time.monotonic() - self.interval_start
        line |= {
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "gumbel_temperature": temperature,
            "audio_seconds_per_second": line["audio_seconds"] / seconds,
            "skipped_steps": self.state.skipped_steps,
            "peak_memory_bytes": self.engine.peak_memory_bytes(),
        }
        self.state.audio_seconds_seen += line["audio_seconds"]
        self._write(line)
        self.totals.reset()
        self.interval_start = time.monotonic()

    def validate(self) -> None:
        """Write the means over the validation data; the time it takes does not count as training time."""
        if len(self.corpus.validation) == 0:
            return
        start = time.monotonic()
        batches = validation_stream(
            self.arguments, self.corpus.validation, self.geometry, self.masks,
            self.engine.rank, self.engine.world_size, self._pin_memory,
        )  # fmt: skip
        line: dict[str, Any] = {"step": self.state.step, "split": "validation"}
        line |= evaluate(self.engine, batches)
        line["audio_seconds_per_second"] = line["audio_seconds"] / (time.monotonic() - start)
        self._write(line)
        self.interval_start += time.monotonic() - start

    def save(self) -> None:
        """Write a checkpoint that holds the sums of the running interval too."""
        start = time.monotonic()
        self.state.totals = self.engine.sum_over_ranks(self.totals.values).tolist()
        folder = save_checkpoint(
            self.folder, self.state, self.engine, self._write_model_files, self.arguments.save_total_limit
        )
        self._say(f"saved {folder}")
        self.interval_start += time.monotonic() - start

    def close(self) -> None:
        """End the bar, the trackers and the process group, and let go of the run folder."""
        self.progress.close()
        self.engine.close()
        if self.lock is not None:
            self.lock.close()

    @property
    def _pin_memory(self) -> bool:
        return self.engine.device.type == "cuda"

    def _write(self, line: dict[str, Any]) -> None:
        if self.engine.is_main:
            append_line(self.folder / METRICS_FILE, line)
        track(self.engine, line)
        self.progress.show(line)

    def _write_model_files(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        feature_extractor(self.config).save_pretrained(folder)

    def _say(self, text: str) -> None:
        if self.engine.is_main:
            print(text, file=sys.stderr, flush=True)


def build(arguments: PretrainArguments) -> Run | None:
    """Put a run together, resumed where asked; None when `--preprocessing_only` is done.

    Whatever the user can get wrong is found before the process group starts, alike on every rank.
    """
    say: Callable[[str], None] = (
        (lambda text: print(text, file=sys.stderr, flush=True)) if is_main_process() else _quiet
    )
    check_tracker(arguments.report_to)
    config = _model_config(arguments)
    geometry = FrameGeometry(tuple(config.conv_kernel), tuple(config.conv_stride))
    ds_config = _ds_config(arguments)
    corpus = open_corpus(arguments, geometry, progress=is_main_process())
    say(describe(corpus))
    if arguments.preprocessing_only:
        return None

    folder, checkpoint = open_run_folder(arguments)
    lock = lock_run_folder(folder) if is_main_process() else None
    state = TrainerState() if checkpoint is None else read_state(checkpoint)
    if checkpoint is not None:
        check_model_matches(checkpoint, config)
        check_resumable(state, checkpoint, launched_ranks(), "plain" if ds_config is None else "deepspeed")
    model = build_model(
        config,
        seed=arguments.seed,
        feature_penalty_weight=arguments.feature_penalty_weight,
        feature_grad_mult=arguments.feature_grad_mult,
    )
    if arguments.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = build_optimizer(
        model,
        learning_rate=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        epsilon=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = build_engine(
        model,
        optimizer,
        ds_config=ds_config,
        bf16=arguments.bf16,
        max_grad_norm=arguments.max_grad_norm,
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_folder=folder,
    )
    totals = Totals(engine.device)
    _check_same_checkpoint(engine, state, folder)
    if checkpoint is not None:
        engine.load(checkpoint)
        if engine.is_main and state.totals:
            totals.values.copy_(torch.tensor(state.totals, dtype=totals.values.dtype))
    if engine.is_main:
        if checkpoint is not None and (changes := changed_settings(folder, arguments)):
            say("settings changed since the last start: " + "; ".join(changes))
        set_aside(folder, state.step)
        (folder / CONFIG_FILE).write_text(dump_recipe(arguments), encoding="utf-8")
        drop_lines_after(folder / METRICS_FILE, state.step)
    engine.barrier()
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    state.world_size, state.engine = engine.world_size, engine.name
    state.gradient_accumulation_steps = arguments.gradient_accumulation_steps
    skipped = SkippedLog(folder / SKIPPED_FILE)
    if engine.is_main:
        skipped.add(corpus.skipped)
    start_tracker(engine, arguments.report_to, folder, dataclasses.asdict(arguments), resumed=checkpoint is not None)
    max_train_steps = _max_train_steps(arguments, corpus, engine.world_size)
    say(
        f"training {num_parameters / 1e6:.1f} M parameters on {engine.world_size} rank(s) of {engine.device.type}, "
        f"{'bf16' if arguments.bf16 else 'fp32'}, "
        f"{'DeepSpeed ' + str(arguments.deepspeed) if ds_config is not None else 'plain PyTorch'}, "
        f"to update {max_train_steps:,}; run folder {folder}"
    )
    stop = StopRequest()
    stop.install()
    masks = MaskSettings(config.mask_time_prob, config.mask_time_length, config.num_negatives)
    progress = Progress(state.step, max_train_steps, visible=engine.is_main)
    return Run(
        arguments, folder, config, geometry, masks, corpus, engine, state, totals, progress, skipped, stop,
        max_train_steps, lock,
    )  # fmt: skip


def feature_extractor(config: Wav2Vec2Config) -> Wav2Vec2FeatureExtractor:
    """The feature extractor that prepares audio as training did: 16 kHz, zero mean, unit variance."""
    return Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=SAMPLE_RATE,
        padding_value=0.0,
        do_normalize=True,
        return_attention_mask=config.feat_extract_norm == "layer",
    )


def _model_config(arguments: PretrainArguments) -> Wav2Vec2Config:
    return load_model_config(
        arguments.config_name or arguments.model_name_or_path or "base",
        cache_dir=arguments.cache_dir,
        mask_time_prob=arguments.mask_time_prob,
        mask_time_length=arguments.mask_time_length,
    )


def _ds_config(arguments: PretrainArguments) -> dict[str, Any] | None:
    if arguments.deepspeed is None:
        return None
    return resolve_ds_config(
        load_ds_config(arguments.deepspeed),
        source=arguments.deepspeed,
        bf16=arguments.bf16,
        max_grad_norm=arguments.max_grad_norm,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        micro_batch_size=arguments.per_device_train_batch_size,
        world_size=launched_ranks(),
    )


def _check_same_checkpoint(engine: Engine, state: TrainerState, folder: Path) -> None:
    """Raise `UserError` where ranks found different checkpoints, as they do when machines do not share the folder."""
    steps = engine.sum_over_ranks(torch.tensor([state.step], dtype=torch.float64, device=engine.device)).item()
    if steps != state.step * engine.world_size:
        raise UserError(
            f"output_dir ({folder}) does not look the same to all ranks: rank {engine.rank} found a checkpoint of "
            f"update {state.step}, another rank did not; put it on a file system that all machines share."
        )


def _max_train_steps(arguments: PretrainArguments, corpus: Corpus, world_size: int) -> int:
    if arguments.max_train_steps is not None:
        return arguments.max_train_steps
    num_batches = len(epoch_batches(batching_of(arguments, corpus.train), 0)) * arguments.num_train_epochs
    return -(-num_batches // (arguments.gradient_accumulation_steps * world_size))


def _quiet(text: str) -> None:
    """Other ranks than the first say nothing."""
