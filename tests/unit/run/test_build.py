"""Which configuration and which weights a run starts from, and what a resumed one no longer needs."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ConformerConfig, Wav2Vec2ForPreTraining

from trainer.arguments import PretrainArguments
from trainer.data.audio import SAMPLE_RATE
from trainer.data.index import AudioIndex
from trainer.errors import UserError
from trainer.model.sizes import SIZES
from trainer.run.build import _build_model, _continue_state, _demand, _max_train_steps, _model_config, _note_corpus
from trainer.run.checkpoint import TrainerState
from trainer.run.corpus import Corpus
from trainer.run.run_folder import Split, check_same_frozen

SMALL: dict[str, Any] = {**SIZES["demo"], "hidden_size": 64, "num_hidden_layers": 1}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A model folder to start from; its configuration is none of the shipped ones."""
    torch.manual_seed(99)
    Wav2Vec2ForPreTraining(Wav2Vec2Config(**SMALL)).save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def _arguments(**values: Any) -> PretrainArguments:
    return PretrainArguments(dataset_name=["speech"], output_dir="run", **values)


def test_the_configuration_comes_from_the_weights_unless_one_is_named(start: Path) -> None:
    arguments = _arguments(init_from=str(start))
    config = _model_config(arguments, None)
    assert config.hidden_size == 64 and config.mask_time_prob == 0.5
    model = _build_model(arguments, config, resumed=False)
    expected = Wav2Vec2ForPreTraining.from_pretrained(start).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    other = dataclasses.replace(arguments, model_name_or_path="demo")
    with pytest.raises(UserError, match=r"hidden_size \(64 there, 128 here\)"):
        _model_config(other, None)


def test_a_resumed_run_does_not_read_what_it_started_from(start: Path, tmp_path: Path) -> None:
    arguments = _arguments(init_from=str(start), mask_time_prob=0.4)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    _model_config(arguments, None).save_pretrained(checkpoint)
    shutil.rmtree(start)
    config = _model_config(arguments, checkpoint)
    assert config.hidden_size == 64 and config.mask_time_prob == 0.4
    _build_model(arguments, config, resumed=True)
    with pytest.raises(UserError, match=r"init_from .* does not exist"):
        _model_config(arguments, None)


def test_a_checkpoint_of_the_other_family_is_refused(tmp_path: Path) -> None:
    values = {name: value for name, value in SMALL.items() if name != "do_stable_layer_norm"}
    Wav2Vec2ConformerConfig(**values).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model_type \(wav2vec2-conformer there, wav2vec2 here\)"):
        _model_config(_arguments(model_name_or_path="demo"), tmp_path)


def test_what_is_frozen_cannot_change_on_resume() -> None:
    state = TrainerState(freeze_feature_encoder=True)
    check_same_frozen(state, Path("c"), True)
    with pytest.raises(UserError, match=r"freeze_feature_encoder \(False\) must be True .* --init_from"):
        check_same_frozen(state, Path("c"), False)


def test_epochs_end_where_their_data_does_however_it_was_split() -> None:
    """40 micro-batches of one utterance, twice: 40 updates of 2, or 10 of them and 60 of 1, or 10, 20 and 20."""
    index = AudioIndex("", (), np.full(40, 16_000), np.arange(40), np.zeros(40, np.int16), ["speech"], [0])
    corpus = Corpus(index, index, [], 0)
    arguments = _arguments(num_train_epochs=2, per_device_train_batch_size=1)

    def last_update(world_size: int, **state: Any) -> int:
        return _max_train_steps(arguments, corpus, world_size, TrainerState(**state))

    assert last_update(2) == last_update(2, step=10, num_micro_batches=20) == 40
    assert last_update(1, step=10, num_micro_batches=20) == 70
    assert last_update(2, step=30, num_micro_batches=40) == 50
    assert last_update(2, step=60, num_micro_batches=90) == 60
    assert last_update(3) == 27


def test_a_checkpoint_that_does_not_tell_its_micro_batches_had_this_split() -> None:
    state = TrainerState(step=10, world_size=2)
    _continue_state(state, Split("plain", 1, None), _arguments(gradient_accumulation_steps=3))
    assert state.num_micro_batches == 60
    assert (state.engine, state.world_size, state.partitioning) == ("plain", 1, None)


def test_a_run_that_its_card_will_not_hold_is_warned_with_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = _arguments(model_name_or_path="demo", per_device_train_batch_size=500, max_duration_in_seconds=4.0)
    tags = np.zeros(600, np.int16)
    index = AudioIndex("", (), np.full(600, 3 * SAMPLE_RATE), np.arange(600), tags, ["speech"], [0])
    corpus = Corpus(index, index, [], 0)
    config = _model_config(arguments, None)
    for card_bytes, warned in ((None, False), (80 * 10**9, False), (4 * 10**9, True)):
        demand = _demand(arguments, config, None, corpus, card_bytes)
        assert (demand.batch_seconds, demand.num_ranks) == (1500.0, 1)
        assert ("lower --per_device_train_batch_size (500)" in capsys.readouterr().err) == warned


def test_audio_that_changed_since_the_checkpoint_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    state = TrainerState(step=5)  # of an older program, or at the start
    for corpus in (3, 3):
        _note_corpus(state, corpus)
    assert capsys.readouterr().err == "" and state.corpus == 3
    _note_corpus(state, 4)
    assert "is not what it was" in capsys.readouterr().err and state.corpus == 4
