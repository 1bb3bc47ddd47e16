"""The loop: each update takes one window of micro-batches; log, validation and checkpoint follow when due."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any, TextIO

from transformers import Wav2Vec2FeatureExtractor

from trainer.arguments import PretrainArguments
from trainer.data.audio import SAMPLE_RATE
from trainer.data.batching import Cursor
from trainer.data.collate import MaskSettings
from trainer.data.frames import FrameGeometry
from trainer.data.loader import Window
from trainer.layout import METRICS_FILE, SKIPPED_FILE
from trainer.memory.demand import Demand
from trainer.model.schedules import gumbel_temperature, learning_rate
from trainer.model.sizes import ModelConfig
from trainer.run.checkpoint import TrainerState, save_checkpoint
from trainer.run.corpus import Corpus, training_stream, validation_stream
from trainer.run.engine import Engine, StepResult
from trainer.run.evaluation import evaluate
from trainer.run.guard import Guard, check_collapse, has_collapsed
from trainer.run.metrics import Totals, append_line, means
from trainer.run.progress import Progress
from trainer.run.signals import StopRequest
from trainer.run.skipped import SkippedLog
from trainer.run.steps import audio_seconds, dropped_layers, forward, seed_micro_batch
from trainer.run.storage import on_all_ranks
from trainer.run.trackers import track
from trainer.run.watchdog import Watchdog, patience_seconds

EXIT_DONE = 0
EXIT_STOPPED = 4


@dataclasses.dataclass
class Run:
    """Everything one run needs, put together by `build`."""

    arguments: PretrainArguments
    folder: Path
    config: ModelConfig
    geometry: FrameGeometry
    masks: MaskSettings
    corpus: Corpus
    demand: Demand
    engine: Engine
    state: TrainerState
    totals: Totals
    progress: Progress
    skipped: SkippedLog
    stop: StopRequest
    watchdog: Watchdog
    max_train_steps: int
    lock: TextIO | None
    interval_start: float

    def train(self) -> int:
        """Train until the last update or a request to stop; returns the exit code."""
        if self.state.validation_due:
            self.validate()
        guard = Guard()
        cursor = Cursor(self.state.epoch, self.state.batch)
        windows = training_stream(
            self.arguments, self.corpus.train, self.geometry, self.masks, cursor,
            self.engine.rank, self.engine.world_size, self._pin_memory,
        )  # fmt: skip
        self.watchdog.expect("the first update", self._patience_seconds)
        with contextlib.closing(windows):  # ends the worker processes
            for window in windows:
                stop, result, rate, temperature = self.update(window)
                self.state.step += 1
                self.state.epoch, self.state.batch = window.next_cursor
                self.state.num_micro_batches += len(window.batches) * self.engine.world_size
                self.state.skipped_steps += int(result.skipped)
                self.progress.advance()
                guard.watch(self.state.step, result.skipped)
                last = self.state.step >= self.max_train_steps
                if last or self._due(self.arguments.logging_steps):
                    self.log(result, rate, temperature)
                if last or self._due(self.arguments.eval_steps or self.arguments.saving_steps):
                    self.state.validation_due = stop and not last  # launchers wait seconds: save first
                    if not self.state.validation_due:
                        self.validate()
                if last or stop or self._due(self.arguments.saving_steps):
                    self.save()
                if last:
                    return EXIT_DONE
                if stop:
                    self._say(f"stopped on request after update {self.state.step}; go on with --resume latest")
                    return EXIT_STOPPED
                self.watchdog.expect(f"update {self.state.step + 1}", self.arguments.hang_timeout_seconds)
        raise AssertionError("the stream of windows is endless")

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0

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
        dropped = dropped_layers(arguments.seed, step, self.config.num_hidden_layers, self.config.layerdrop)
        for number, batch in enumerate(window.batches):
            seed_micro_batch(arguments.seed, step, number * engine.world_size + engine.rank)
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
        self._write(line)
        self.totals.reset()
        self.interval_start = time.monotonic()
        self._check_codebooks(line["code_perplexity"])

    def _check_codebooks(self, code_perplexity: float) -> None:
        state = self.state
        if state.sound_step is None or not has_collapsed(code_perplexity, self.config.num_codevector_groups):
            state.sound_step = state.step
        check_collapse(state.step, state.sound_step, self.arguments.collapse_patience, code_perplexity)

    def validate(self) -> None:
        """Write the means over the validation data; the time it takes does not count as training time."""
        if len(self.corpus.validation) == 0:
            return
        start = time.monotonic()
        stream = validation_stream(
            self.arguments, self.corpus.validation, self.geometry, self.masks,
            self.engine.rank, self.engine.world_size, self._pin_memory,
        )  # fmt: skip
        batches = self.watchdog.expect_each("validation", stream, self.arguments.hang_timeout_seconds)
        line: dict[str, Any] = {"step": self.state.step, "split": "validation"}
        self.engine.average_batch_norms()
        line |= evaluate(self.engine, batches, self.skipped)
        self.state.validation_due = False
        line["audio_seconds_per_second"] = line["audio_seconds"] / (time.monotonic() - start)
        self._write(line)
        self.interval_start += time.monotonic() - start

    def save(self) -> None:
        """Write a checkpoint that holds the sums of the running interval too."""
        self.watchdog.expect("saving", self._patience_seconds)
        start = time.monotonic()
        self.state.interval_seconds = start - self.interval_start
        self.state.totals = self.engine.sum_over_ranks(self.totals.values).tolist()
        self.engine.average_batch_norms()
        folder = save_checkpoint(
            self.folder, self.state, self.engine, self._write_model_files, self.arguments.save_total_limit
        )
        self._say(f"saved {folder}")
        self.interval_start += time.monotonic() - start

    def close(self) -> None:
        """End the bar, the trackers and the process group, and let go of the run folder."""
        self.watchdog.expect("the end", self._patience_seconds)
        self.progress.close()
        self.engine.close()
        if self.lock is not None:
            self.lock.close()

    @property
    def _patience_seconds(self) -> float:
        return patience_seconds(self.arguments.hang_timeout_seconds)

    @property
    def _pin_memory(self) -> bool:
        return self.engine.device.type == "cuda"

    def _write(self, line: dict[str, Any]) -> None:
        """Append to the metrics, and end the run where a rank could not write its lines since the last time."""
        path = self.folder / METRICS_FILE

        def append() -> list[str]:
            if self.engine.is_main:
                append_line(path, line)
            return self.skipped.take_unshared()

        what = f"{path.name} or {SKIPPED_FILE} in {self.folder}"
        skipped = on_all_ranks(self.engine, what, append, "mend that, then go on with --resume latest.")
        track(self.engine, line)
        self.progress.show(line)
        self.skipped.share(skipped)

    def _write_model_files(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        feature_extractor(self.config).save_pretrained(folder)

    def _say(self, text: str) -> None:
        self.progress.say(text)


def feature_extractor(config: ModelConfig) -> Wav2Vec2FeatureExtractor:
    """The feature extractor that prepares audio as training did: 16 kHz, zero mean, unit variance."""
    return Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=SAMPLE_RATE,
        padding_value=0.0,
        do_normalize=True,
        return_attention_mask=config.feat_extract_norm == "layer",
    )
