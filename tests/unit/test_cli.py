"""Exit codes and messages of what a person gets wrong, through the real entry point."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.cli import main

REPOSITORY = Path(__file__).parents[2]
SPEECH = REPOSITORY / "tests" / "corpus" / "validation"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _pretrain(*flags: str, data: Path = SPEECH, out: str) -> int:
    return main(["pretrain", "--config=demo", f"--dataset_name={data}", f"--output_dir={out}", *flags])


def _complaint(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("trainer: error: ")]
    assert lines, text
    return "\n".join(lines)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "unknown command 'train'" in _complaint(capsys)


def test_unknown_flag_and_recipe_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("batch_size: 3\n")
    assert main(["pretrain", f"--config={recipe}", "--learning_rte=1"]) == 2
    complaint = _complaint(capsys)
    assert "batch_size" in complaint and "--learning_rte; did you mean --learning_rate?" in complaint


def test_mistakes_in_a_deepspeed_file_show_before_torch_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text('{"zero_optimization": {"stage": 2,\n "overlap_com": false}, "gradient_clipping": 5}')
    flags = ["pretrain", "--config=demo", "--dataset_name=speech", "--output_dir=run", f"--deepspeed={path}"]
    code = "import sys; from trainer.cli import main; sys.exit(main(sys.argv[1:]) + 10 * ('torch' in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "zero_optimization.overlap_com is not a key that DeepSpeed reads; did you mean overlap_comm?" in ended.stderr
    assert "gradient_clipping is 5, but --max_grad_norm sets it to 1.0" in ended.stderr
    path.write_text('{"zero_optimization":\n {"stage": 2,}}')
    ended = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and f"{path}, line 2, column " in ended.stderr


def test_nvme_without_deepspeed_and_where_its_extension_cannot_be_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvme = f"--nvme_path={tmp_path}"
    assert _pretrain(nvme, out=str(tmp_path / "run")) == 2
    assert "add --deepspeed zero3_nvme, or leave --nvme_path out" in _complaint(capsys)
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    assert _pretrain(nvme, "--deepspeed=zero3_nvme", out=str(tmp_path / "run")) == 2
    assert "needs DeepSpeed's extension async_io" in _complaint(capsys)


def test_no_audio_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("no sound")
    assert _pretrain(data=tmp_path, out=str(tmp_path / "run")) == 2
    assert "none was found" in _complaint(capsys)
    assert _pretrain(data=tmp_path / "missing", out=str(tmp_path / "run")) == 2
    assert "existing folder" in _complaint(capsys)
    assert _pretrain("--validation_dataset_name=/no/such", out=str(tmp_path / "run")) == 2
    assert "validation_dataset_name (/no/such)" in _complaint(capsys)
    assert not (tmp_path / "run").exists()


def test_nothing_long_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--min_duration_in_seconds=60", "--max_duration_in_seconds=60", "--max_batch_seconds=60")
    assert _pretrain(*flags, out=str(tmp_path / "run")) == 2
    assert "longest utterance" in _complaint(capsys)


def test_a_folder_that_holds_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert _pretrain(out=str(tmp_path)) == 2
    assert "holds another run" in _complaint(capsys)


def test_a_deepspeed_file_that_sets_what_flags_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.json"
    config.write_text(
        json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 5.0, "train_micro_batch_size_per_gpu": 99})
    )
    assert _pretrain(f"--deepspeed={config}", out=str(tmp_path / "run")) == 2
    complaint = _complaint(capsys)
    assert "gradient_clipping" in complaint and "max_grad_norm" in complaint
    assert "train_micro_batch_size_per_gpu" in complaint  # both together


def test_a_nested_key_that_deepspeed_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_com": True}}))
    assert _pretrain(f"--deepspeed={config}", out=str(tmp_path / "run")) == 2
    assert "zero_optimization.overlap_com" in _complaint(capsys)


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / ".lock").mkdir(parents=True)  # root may write anywhere, but not to a folder as to a file
    assert _pretrain(out=str(tmp_path / "run")) == 2
    assert "cannot be written" in _complaint(capsys)


def test_an_unknown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert _pretrain("--model_name_or_path=huge", out=str(tmp_path / "run")) == 2
    assert "huge" in _complaint(capsys)
    assert _pretrain("--model_name_or_path=lage", out=str(tmp_path / "run")) == 2
    assert "did you mean large?" in _complaint(capsys)


def test_a_start_from_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for field in ("--model_name_or_path=demo", "--config_name=demo"):
        assert _pretrain(field, f"--init_from={tmp_path / 'missing'}", out=str(tmp_path / "run")) == 2
        assert f"init_from ({tmp_path / 'missing'}) does not exist" in _complaint(capsys)
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert _pretrain(f"--init_from={tmp_path}", out=str(tmp_path / "run")) == 2
    assert f"python -m trainer convert {tmp_path} OUT" in _complaint(capsys)
    assert not (tmp_path / "run").exists()


def test_resume_from_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _pretrain(f"--resume={tmp_path}", out=str(tmp_path / "run")) == 2
    assert "complete checkpoint" in _complaint(capsys)


def test_convert_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "missing"), str(tmp_path / "out")]) == 2
    assert "missing" in _complaint(capsys)
    assert main(["convert"]) == 2
    assert "RUN_OR_CHECKPOINT" in _complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_preprocessing_only_builds_the_index_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(SPEECH, data)
    (data / "bad.wav").write_text("not audio")
    flags = ["--preprocessing_only", "--max_skipped_fraction=0.1", f"--cache_dir={tmp_path / 'c'}"]
    assert _pretrain(*flags, data=data, out=str(tmp_path / "run")) == 0
    assert "1 files skipped (unreadable: 1)" in capsys.readouterr().err
    assert list((tmp_path / "c" / "audio-index").glob("*.arrow"))
    assert not (tmp_path / "run").exists()


def test_each_machine_complains_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["pretrain", "--nonsense=1"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["pretrain", "--nonsense=1"]) == 2
    assert "error on rank 9: unknown flag --nonsense" in capsys.readouterr().err


def test_exit_code_reaches_the_shell() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "trainer", "pretrain", "--config=nosuch"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "demo" in result.stderr and "large" in result.stderr
