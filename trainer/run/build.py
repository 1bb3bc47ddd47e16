"""From flags to a run that is ready to train; whatever the user can get wrong is found before ranks meet."""

import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from trainer.arguments import PretrainArguments
from trainer.data.batching import epoch_batches
from trainer.data.collate import MaskSettings
from trainer.data.frames import FrameGeometry
from trainer.data.rows import DataError
from trainer.data.workers import signals_blocked
from trainer.errors import RunWentBad, UserError
from trainer.layout import METRICS_FILE, SKIPPED_FILE
from trainer.memory.demand import (
    Demand,
    card_bytes_here,
    demand_of,
    explaining_out_of_memory,
    warning_where_too_much,
)
from trainer.model.initial_weights import check_initial_weights, load_initial_weights
from trainer.model.optim import build_optimizer
from trainer.model.pretraining import PretrainingModel, build_model
from trainer.model.sizes import ModelConfig, load_model_config
from trainer.run.checkpoint import (
    TrainerState,
    list_checkpoints,
    read_state,
    set_aside,
    space_needed,
    verify_together,
)
from trainer.run.corpus import Corpus, batching_of, describe, fingerprint, open_corpus
from trainer.run.ds_config import ds_config_of, partitioning
from trainer.run.engine import Engine, build_engine, check_zero_section, is_main_process, launched_ranks
from trainer.run.launcher_settings import take_over_launcher_settings
from trainer.run.loop import EXIT_DONE, Run
from trainer.run.metrics import Totals, drop_lines_after
from trainer.run.progress import Progress
from trainer.run.run_folder import (
    Split,
    changed_settings,
    check_model_matches,
    check_run_folder,
    check_same_frozen,
    create_run_folder,
    lock_run_folder,
    needs_resharding,
    sees_settings,
    split_of,
    write_settings,
)
from trainer.run.self_check import check_gradient_scale
from trainer.run.signals import StopRequest
from trainer.run.skipped import SkippedLog
from trainer.run.storage import on_main_rank, scarce_room, too_little_room
from trainer.run.trackers import check_tracker, start_tracker
from trainer.run.watchdog import Watchdog, patience_seconds


def pretrain(arguments: PretrainArguments) -> int:
    """Train to `max_train_steps` or until asked to stop; returns the exit code.

    Raises:
        UserError, RunWentBad, OutOfMemory: what their names say.
    """
    run = build(arguments)
    if run is None:
        return EXIT_DONE
    try:
        with explaining_out_of_memory(run.demand):
            code = run.train()
    except RunWentBad:  # all ranks find out at the same update, so all of them get here
        run.close()
        raise
    except DataError as error:  # nothing decodes any more: that is not what was asked for at the start
        raise RunWentBad(str(error)) from error
    run.close()  # not after other errors: one rank alone would wait here for the others, its message unseen
    return code


def build(arguments: PretrainArguments) -> Run | None:
    """Put a run together, resumed where asked; None where nothing is left to do. Raises `UserError`."""
    check_tracker(arguments.report_to)
    ds_config = _ds_config(arguments)
    place = _find_place(arguments, ds_config)
    config = _model_config(arguments, place.checkpoint)
    geometry = FrameGeometry(tuple(config.conv_kernel), tuple(config.conv_stride))
    corpus = open_corpus(arguments, geometry, progress=is_main_process())
    _say(describe(corpus))
    # the main process alone, for counting takes seconds; the others wait for it in the process group
    demand = _demand(arguments, config, ds_config, corpus, card_bytes_here() if is_main_process() else None)
    create_run_folder(place.folder)
    place.lock = lock_run_folder(place.folder) if is_main_process() else None
    stop = StopRequest()
    stop.install()
    watchdog = Watchdog(rank=int(os.environ.get("RANK", "0")))
    watchdog.start()
    watchdog.expect("the start", patience_seconds(arguments.hang_timeout_seconds))
    with explaining_out_of_memory(demand):
        engine = _build_engine(arguments, config, ds_config, place)
    if ds_config is not None:
        check_gradient_scale(engine, ds_config)
    if not engine.same_on_all_ranks(fingerprint(corpus)):
        raise UserError(
            f"dataset_name ({corpus.train.root}) does not hold the same audio for all ranks: rank {engine.rank} has "
            f"{len(corpus.train):,} utterances to train on; give all machines the same data, or --overwrite_cache."
        )
    place = _verify(engine, place, arguments, ds_config, config)
    max_train_steps = _max_train_steps(arguments, corpus, engine.world_size, place.state)
    if place.checkpoint is not None and place.state.step >= max_train_steps:
        _say(
            f"nothing left to do: {place.checkpoint} is at update {place.state.step}, and this run ends at "
            f"{max_train_steps} (max_train_steps, num_train_epochs)"
        )
        engine.close()
        return None
    with explaining_out_of_memory(demand):
        totals = _restore(engine, place, arguments)
    _note_corpus(place.state, fingerprint(corpus))
    skipped = SkippedLog(place.folder / SKIPPED_FILE, int(arguments.max_skipped_fraction * corpus.num_files))
    if engine.is_main:
        skipped.add(corpus.skipped)
    resumed = place.checkpoint is not None
    with signals_blocked():  # a tracker's own process is needed until the last line, as the loader's are
        start_tracker(engine, arguments.report_to, place.folder, dataclasses.asdict(arguments), resumed)
    _check_room(engine, place, arguments, max_train_steps)
    _say(
        f"training {engine.num_parameters / 1e6:.1f} M parameters on {engine.world_size} rank(s) of "
        f"{engine.device.type}, {'bf16' if arguments.bf16 else 'fp32'}, "
        f"{'plain PyTorch' if ds_config is None else f'DeepSpeed {arguments.deepspeed}'}, "
        f"to update {max_train_steps:,}; run folder {place.folder}"
    )
    return Run(
        arguments=arguments,
        folder=place.folder,
        config=config,
        geometry=geometry,
        masks=MaskSettings(config.mask_time_prob, config.mask_time_length, config.num_negatives),
        corpus=corpus,
        demand=demand,
        engine=engine,
        state=place.state,
        totals=totals,
        progress=Progress(place.state.step, max_train_steps, visible=engine.is_main),
        skipped=skipped,
        stop=stop,
        watchdog=watchdog,
        max_train_steps=max_train_steps,
        lock=place.lock,
        interval_start=time.monotonic() - place.state.interval_seconds,
    )


@dataclasses.dataclass
class _Place:
    """Where a run lives and where it goes on from."""

    folder: Path
    checkpoint: Path | None
    state: TrainerState
    split: Split
    resharded: bool = False
    lock: TextIO | None = None
    passed_over: list[str] = dataclasses.field(default_factory=list)


def _find_place(
    arguments: PretrainArguments, ds_config: dict[str, Any] | None, known_damage: Mapping[Path, str] | None = None
) -> _Place:
    """The run folder and the checkpoint to resume from, checked against this launch; nothing is created yet."""
    folder, checkpoint, passed_over = check_run_folder(arguments, known_damage)
    if ds_config is None:
        split = Split("plain", launched_ranks(), None)
    else:
        split = Split("deepspeed", launched_ranks(), partitioning(ds_config))
    if checkpoint is None:
        return _Place(folder, None, TrainerState(), split, passed_over=passed_over)
    state = read_state(checkpoint)
    check_same_frozen(state, checkpoint, arguments.freeze_feature_encoder)
    resharded = needs_resharding(split_of(state), split, checkpoint)
    return _Place(folder, checkpoint, state, split, resharded, passed_over=passed_over)


def _verify(
    engine: Engine,
    place: _Place,
    arguments: PretrainArguments,
    ds_config: dict[str, Any] | None,
    config: ModelConfig,
) -> _Place:
    """Read every byte of the checkpoint before it is loaded; for `latest` a damaged one gives way to an older one."""
    damage: dict[Path, str] = {}
    # looked for anew, now that the folder is locked: another run may have saved into it since
    place = dataclasses.replace(_find_place(arguments, ds_config), lock=place.lock)
    _check_same_checkpoint(engine, place)
    while place.checkpoint is not None and (problem := verify_together(place.checkpoint, engine)) is not None:
        damage[place.checkpoint] = problem
        place = dataclasses.replace(_find_place(arguments, ds_config, damage), lock=place.lock)
        _check_same_checkpoint(engine, place)
        if place.checkpoint is not None:
            check_model_matches(place.checkpoint, config)
    for passed_over in place.passed_over:
        _say(f"passed over {passed_over}")
    if place.checkpoint is None and arguments.resume is not None:
        _say(f"no checkpoint in {place.folder} yet; starting at update 0")
    return place


def _check_room(engine: Engine, place: _Place, arguments: PretrainArguments, max_train_steps: int) -> None:
    """Raise `UserError` where no checkpoint fits into the run folder; warn where not all that are to come do."""
    num_to_come = -(-max(max_train_steps - place.state.step, 0) // arguments.saving_steps)
    if num_to_come == 0:
        return
    if arguments.save_total_limit is not None:  # one more while it is being written
        num_kept = len(list_checkpoints(place.folder))
        num_to_come = min(num_to_come, max(arguments.save_total_limit + 1 - num_kept, 1))
    needed = space_needed(place.folder, engine)
    if problem := engine.gather(too_little_room(place.folder, needed))[0]:
        raise UserError(problem)
    if warning := scarce_room(place.folder, needed, num_to_come):
        _say(warning)


def _demand(
    arguments: PretrainArguments,
    config: ModelConfig,
    ds_config: dict[str, Any] | None,
    corpus: Corpus,
    card_bytes: int | None,
) -> Demand:
    """What the run takes of memory; warns where a card of `card_bytes` (None: not asked) will not hold it."""
    batching = batching_of(arguments, corpus.train)
    cuda = torch.cuda.is_available()
    demand = demand_of(arguments, config, ds_config, batching, num_ranks=launched_ranks(), cuda=cuda)
    if card_bytes is not None and (warning := warning_where_too_much(demand, card_bytes)):
        _say(warning)
    return demand


def _build_engine(
    arguments: PretrainArguments, config: ModelConfig, ds_config: dict[str, Any] | None, place: _Place
) -> Engine:
    """Model and optimizer on the CPU, then the process group, then both handed over."""
    model = _build_model(arguments, config, resumed=place.checkpoint is not None)
    if arguments.freeze_feature_encoder:
        model.freeze_feature_encoder()
    if arguments.gradient_checkpointing:
        model.checkpoint_activations()
    optimizer = build_optimizer(
        model,
        learning_rate=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        epsilon=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )
    return build_engine(
        model,
        optimizer,
        ds_config=ds_config,
        bf16=arguments.bf16,
        max_grad_norm=arguments.max_grad_norm,
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_folder=place.folder,
        # a shorter one would end what a longer --hang_timeout_seconds allows
        collective_timeout=datetime.timedelta(seconds=patience_seconds(arguments.hang_timeout_seconds)),
    )


def _build_model(arguments: PretrainArguments, config: ModelConfig, *, resumed: bool) -> PretrainingModel:
    """With fresh weights, or those of `--init_from`, which is not needed where a checkpoint is loaded afterwards."""
    options: dict[str, Any] = {
        "feature_penalty_weight": arguments.feature_penalty_weight,
        "feature_grad_mult": arguments.feature_grad_mult,
        "global_diversity": arguments.global_diversity,
    }
    if resumed and arguments.init_from is not None:
        _say(f"init_from ({arguments.init_from}) is not read: the run goes on from its checkpoint")
    if arguments.init_from is None or resumed:
        return build_model(config, seed=arguments.seed, **options)
    _say(f"starting from the weights of {arguments.init_from}")
    return load_initial_weights(
        arguments.init_from,
        config,
        seed=arguments.seed,
        cache_dir=arguments.cache_dir,
        allow_missing_head=arguments.allow_missing_head,
        say=_say,
        **options,
    )


def _restore(engine: Engine, place: _Place, arguments: PretrainArguments) -> Totals:
    """Load the checkpoint, clear away what came after it and write the settings; the sums of the running interval."""
    totals = Totals(engine.device)
    if place.checkpoint is not None:
        _load(engine, place, place.checkpoint)
        if engine.is_main and place.state.totals:
            totals.values.copy_(torch.tensor(place.state.totals, dtype=totals.values.dtype))
    changes = [] if place.checkpoint is None else changed_settings(place.folder, arguments)

    def tidy() -> None:
        set_aside(place.folder, place.state.step)
        write_settings(place.folder, arguments)
        drop_lines_after(place.folder / METRICS_FILE, place.state.step)

    on_main_rank(engine, f"the run folder {place.folder}", tidy)
    if changes:
        _say("settings changed since the last start: " + "; ".join(changes))
    if not engine.same_on_all_ranks(int(sees_settings(place.folder))):
        raise UserError(
            f"output_dir ({place.folder}) is not the same folder on all machines, which would leave a part of every "
            "checkpoint on each; put it on a file system that they share."
        )
    if place.checkpoint is not None:
        written_by = f", written by {split_of(place.state)}, on {place.split}" if place.resharded else ""
        _say(f"resuming from {place.checkpoint}{written_by}")
    _continue_state(place.state, place.split, arguments)
    return totals


def _load(engine: Engine, place: _Place, checkpoint: Path) -> None:
    if not place.resharded:
        engine.load(checkpoint)
        return
    saved = split_of(place.state)
    engine.load_resharded(
        checkpoint,
        engine=saved.engine,
        world_size=saved.world_size,
        num_updates=place.state.step,
        num_skipped_updates=place.state.skipped_steps,
    )


def _note_corpus(state: TrainerState, corpus: int) -> None:
    """Say where the audio is not that of the checkpoint: its place in the order of samples then means little."""
    if state.corpus not in (None, corpus):
        _say(
            "the audio to train or validate on is not what it was when the checkpoint was written (other utterances, "
            f"lengths or split): epoch {state.epoch} goes on in another order, so some may come twice in it or not "
            "at all, and validation may differ"
        )
    state.corpus = corpus


def _continue_state(state: TrainerState, split: Split, arguments: PretrainArguments) -> None:
    """Note how this run goes on, for its checkpoints; what the loop counts stays."""
    state.num_micro_batches = _num_micro_batches(state, arguments)
    state.engine, state.world_size, state.partitioning = split
    state.freeze_feature_encoder = arguments.freeze_feature_encoder
    if state.sound_step is None:
        state.sound_step = state.step


def _check_same_checkpoint(engine: Engine, place: _Place) -> None:
    """Raise `UserError` where ranks found different checkpoints, as they do when machines do not share the folder."""
    if not engine.same_on_all_ranks(place.state.step):
        raise UserError(
            f"output_dir ({place.folder}) does not look the same to all ranks: rank {engine.rank} found a checkpoint "
            f"of update {place.state.step} (0: none); put it on a file system that all machines share."
        )


def _model_config(arguments: PretrainArguments, checkpoint: Path | None) -> ModelConfig:
    """The configuration that was asked for, checked against what is resumed or started from. Raises `UserError`."""
    source, field = arguments.config_name or arguments.model_name_or_path or "base", "model_name_or_path"
    if arguments.config_name is not None:
        field = "config_name"
    elif arguments.model_name_or_path is None and checkpoint is not None:
        source, field = str(checkpoint), "resume"  # what --init_from names may be gone by now
    elif arguments.model_name_or_path is None and arguments.init_from is not None:
        source, field = arguments.init_from, "init_from"
    config = load_model_config(
        source,
        cache_dir=arguments.cache_dir,
        mask_time_prob=arguments.mask_time_prob,
        mask_time_length=arguments.mask_time_length,
        say=_say,
        field=field,
    )
    if checkpoint is not None:
        check_model_matches(checkpoint, config)
    elif arguments.init_from is not None:
        check_initial_weights(arguments.init_from, config, cache_dir=arguments.cache_dir)
    return config


def _ds_config(arguments: PretrainArguments) -> dict[str, Any] | None:
    config = ds_config_of(arguments, launched_ranks())
    if config is not None:
        take_over_launcher_settings(os.environ, bf16=arguments.bf16)
        check_zero_section(config)
    return config


def _max_train_steps(arguments: PretrainArguments, corpus: Corpus, world_size: int, state: TrainerState) -> int:
    """The last update; without `--max_train_steps` what is left of the epochs decides, however it was split so far."""
    if arguments.max_train_steps is not None:
        return arguments.max_train_steps
    num_batches = len(epoch_batches(batching_of(arguments, corpus.train), 0)) * arguments.num_train_epochs
    num_left = max(num_batches - _num_micro_batches(state, arguments), 0)
    return state.step - (-num_left // (arguments.gradient_accumulation_steps * world_size))


def _num_micro_batches(state: TrainerState, arguments: PretrainArguments) -> int:
    """Those of all ranks since the start; a checkpoint from before they were counted does not say."""
    return state.num_micro_batches or state.step * state.world_size * arguments.gradient_accumulation_steps


def _say(text: str) -> None:
    """Tell the user, once and not once per rank."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)
