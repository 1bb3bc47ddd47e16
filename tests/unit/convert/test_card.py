"""The model card: facts of the run, and code that runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from trainer.convert.card import RunRecord, _training, read_run
from trainer.convert.conversion import convert


def fill_run_folder(folder: Path) -> None:
    (folder / "config.yaml").write_text(
        "dataset_name: /data/of/mine/speech\nlearning_rate: 0.003\nmax_grad_norm: null\nseed: 42\noutput_dir: /secret\n"
    )
    lines: list[dict[str, Any]] = [
        {"step": 1, "split": "train", "loss": 4.0, "audio_seconds": 1800.0},
        {"step": 1, "split": "validation", "contrastive_loss": 4.5, "accuracy": 0.01, "audio_seconds": 60.0},
        {"step": 2, "split": "train", "loss": 3.9, "audio_seconds": 7200.0},
        {"step": 2, "split": "validation", "contrastive_loss": 4.25, "accuracy": None, "code_perplexity": 31.5},
        {"step": 3, "split": "train", "loss": 3.8, "audio_seconds": 7200.0},
        {"step": 3, "split": "validation", "contrastive_loss": 1.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 4, "spl')


def test_what_the_run_folder_tells_up_to_the_checkpoint(plain_run: Any, tmp_path: Path) -> None:
    fill_run_folder(plain_run.folder)
    convert(plain_run.step_folder, tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained on 2.50 hours of audio of `speech`, repetitions counted." in card
    assert "| `learning_rate` | 0.003 |\n| `seed` | 42 |\n" in card
    validation = card.partition("After 2 updates:\n\n| Metric | Value |\n|---|---|\n")[2]
    assert validation.startswith("| `contrastive_loss` | 4.25 |\n| `code_perplexity` | 31.5 |\n\n")
    for left_out in ("secret", "/data", "accuracy", "max_grad_norm", "None"):
        assert left_out not in card, left_out


def test_several_sources_are_named() -> None:
    run = RunRecord({"dataset_name": ["/data/one.tsv", "owner/two"]}, 2.5, {})
    assert "2.50 hours of audio of `one.tsv`, `two`, repetitions" in "".join(_training(run))


def test_what_is_unknown_is_left_out(plain_run: Any, tmp_path: Path) -> None:
    assert read_run(plain_run.step_folder, 2) == RunRecord({}, None, {})
    shutil.copytree(plain_run.step_folder, tmp_path / "alone" / "step-00000002")
    convert(tmp_path / "alone" / "step-00000002", tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.findall("^## .*", card, re.MULTILINE) == ["## Loading", "## Fine-tuning"]
    (plain_run.folder / "config.yaml").write_text("- not\n- a mapping\n")
    (plain_run.folder / "metrics.jsonl").write_bytes(b"\xff\n")
    assert read_run(plain_run.step_folder, 2) == RunRecord({}, None, {})


def test_the_code_of_the_card_runs(plain_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Also: the converted folder fine-tunes with the stock CTC class for a few steps, and its loss falls."""
    monkeypatch.chdir(tmp_path)
    convert(plain_run.folder, tmp_path / "out", dtype="bf16")
    blocks = re.findall("```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    losses: list[float] = []

    class Batches:
        def __iter__(self) -> Any:
            generator = torch.Generator().manual_seed(0)
            waveforms = [torch.randn(size, generator=generator).numpy() for size in (1600, 1200)]
            for _ in range(5):
                yield waveforms, ["a cat", "don't"]
                losses.append(names["loss"].item())

    for block in blocks:
        names: dict[str, Any] = {"batches": Batches()}
        exec(block.replace("path/to/this/folder", str(tmp_path / "out")).replace("lr=3e-5", "lr=1e-2"), names)
    assert type(names["model"]).__name__ == "Wav2Vec2ForCTC"
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert (tmp_path / "fine-tuned" / "model.safetensors").is_file()
