"""The folder of compiled extensions."""

import os
import time
from importlib.metadata import version
from pathlib import Path

from trainer.run.extensions import extensions_folder, use_extensions_folder


def test_the_folder_names_the_versions_that_must_not_mix() -> None:
    folder = extensions_folder({"XDG_CACHE_HOME": "/cache"})
    assert folder.startswith("/cache/speech-pretrainer/torch_extensions/")
    assert f"torch-{version('torch')}" in folder
    assert f"deepspeed-{version('deepspeed')}" in folder


def test_the_users_own_folder_stays() -> None:
    environ = {"TORCH_EXTENSIONS_DIR": "/mine", "XDG_CACHE_HOME": "/cache"}
    use_extensions_folder(environ)
    assert environ["TORCH_EXTENSIONS_DIR"] == "/mine"


def test_using_the_folder_sets_the_variable_torch_reads() -> None:
    environ = {"XDG_CACHE_HOME": "/cache"}
    use_extensions_folder(environ)
    assert environ["TORCH_EXTENSIONS_DIR"] == extensions_folder({"XDG_CACHE_HOME": "/cache"})


def test_a_lock_that_a_killed_process_left_goes_and_a_fresh_one_stays(tmp_path: Path) -> None:
    for name, age in (("cpu_adam", 3600), ("async_io", 60)):
        (tmp_path / name).mkdir()
        lock = tmp_path / name / "lock"
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    use_extensions_folder({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert [path.parent.name for path in tmp_path.glob("*/lock")] == ["async_io"]
