"""A checkpoint is complete or absent, and what is wrong with one is said."""

import errno
import json
import os
import shutil
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from trainer.errors import CannotWrite, UserError
from trainer.layout import CHECKPOINTS_FOLDER, MANIFEST_FILE
from trainer.run.checkpoint import (
    TrainerState,
    find_checkpoint,
    list_checkpoints,
    prune,
    read_state,
    save_checkpoint,
    set_aside,
    space_needed,
    verify_together,
)
from trainer.run.engine import Engine
from trainer.run.manifest import share_of
from trainer.run.storage import free_bytes, scarce_room, too_little_room


class Rank:
    """The part of an engine that saving needs, writing one small file; ranks are threads that meet at `meeting`."""

    checkpoint_bytes = 100

    def __init__(self, rank: int = 0, meeting: threading.Barrier | None = None, said: list[Any] | None = None) -> None:
        self.rank = rank
        self.is_main = rank == 0
        self.meeting = meeting or threading.Barrier(1)
        self.world_size = self.meeting.parties
        self.said = [None] * self.world_size if said is None else said
        self.failure: OSError | None = None
        self.num_bytes = 7

    def barrier(self) -> None:
        self.meeting.wait(10)

    def gather(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        self.meeting.wait(10)
        everything = list(self.said)
        self.meeting.wait(10)
        return everything

    def save(self, folder: Path) -> None:
        (folder / "deepspeed").mkdir(exist_ok=True)
        (folder / "deepspeed" / f"weights{self.rank}.bin").write_bytes(b"w" * self.num_bytes)
        if self.failure is not None:
            raise self.failure


def _ranks(number: int) -> list[Rank]:
    meeting = threading.Barrier(number)
    said: list[Any] = [None] * number
    return [Rank(rank, meeting, said) for rank in range(number)]


def _save(run: Path, step: int, keep: int | None = None, rank: Rank | None = None) -> Path:
    state = TrainerState(step=step, epoch=2, batch=5, world_size=1, totals=[1.5, 2.0])
    return save_checkpoint(run, state, cast(Engine, rank or Rank()), _write_config, keep)


def _write_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / CHECKPOINTS_FOLDER).iterdir())


def _latest(run: Path) -> Path:
    found, _ = find_checkpoint(run, "latest")
    assert found is not None
    return found


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    folder = _save(tmp_path, 7)
    assert folder.name == "step-00000007" and _latest(tmp_path) == folder
    state = read_state(folder)
    assert (state.step, state.epoch, state.batch, state.totals) == (7, 2, 5, [1.5, 2.0])
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert set(manifest["files"]) == {"deepspeed/weights0.bin", "config.json", "trainer_state.json"}
    assert manifest["files"]["deepspeed/weights0.bin"]["bytes"] == 7
    assert verify_together(folder, cast(Engine, Rank())) is None


def test_ranks_share_the_files(tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 6, "c": 5, "d": 0}
    assert [share_of(sizes, rank, 2) for rank in (0, 1)] == [["a", "d"], ["b", "c"]]
    ranks = _ranks(3)
    with ThreadPoolExecutor(3) as pool:
        folder, *_ = pool.map(lambda rank: _save(tmp_path, 1, rank=rank), ranks)
        assert len(json.loads((folder / MANIFEST_FILE).read_text())["files"]) == 5
        (folder / "deepspeed" / "weights2.bin").write_bytes(b"wwwwwwx")
        found = list(pool.map(lambda rank: verify_together(folder, cast(Engine, rank)), ranks))
    assert found == ["deepspeed/weights2.bin does not have the checksum in manifest.json"] * 3


def test_a_failed_save_leaves_the_previous_checkpoint_and_is_known_to_all(tmp_path: Path) -> None:
    ranks = _ranks(2)

    def outcome(rank: Rank) -> str:
        try:
            return _save(tmp_path, 2, keep=1, rank=rank).name
        except CannotWrite as error:
            return str(error)

    _save(tmp_path, 1)
    ranks[1].failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with ThreadPoolExecutor(2) as pool:
        messages = list(pool.map(outcome, ranks))
        assert messages[0] == messages[1]
        assert "step-00000002: No space left on device (rank 1); step-00000001 is whole" in messages[0]
        assert _names(tmp_path) == ["step-00000001"]
        ranks[1].failure = None
        assert list(pool.map(outcome, ranks)) == ["step-00000002"] * 2


@pytest.mark.parametrize("step", ["manifest", "rename", "model files"])
def test_a_failure_of_the_main_rank_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    _save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    where = {
        "manifest": "trainer.run.checkpoint.write_manifest",
        "rename": "os.rename",
        "model files": "trainer.run.checkpoint.write_json",
    }
    with monkeypatch.context() as patch:
        patch.setattr(where[step], fail)
        with pytest.raises(CannotWrite, match=r"Read-only file system \(rank 0\)"):
            _save(tmp_path, 2)
    assert _names(tmp_path) == ["step-00000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own, of a given size; the same again changes the size or makes it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        action = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", action + options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
        return folder

    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    yield mount
    subprocess.run(["umount", str(folder)], check=False)


def test_a_full_disk(small_disk: Callable[[str], Path]) -> None:
    run, rank = small_disk("size=200k"), Rank()
    _save(run, 1)
    rank.num_bytes = 300_000
    with pytest.raises(CannotWrite, match="No space left on device"):
        _save(run, 2, rank=rank)  # one that is larger than the last
    assert _names(run) == ["step-00000001"] and verify_together(_latest(run), cast(Engine, rank)) is None
    small_disk("size=2m")
    _save(run, 2, rank=rank)
    small_disk("size=400k")
    with pytest.raises(CannotWrite, match=r"step-00000003: it takes 0.3 MB and 0.\d MB are free \(rank 0\)"):
        _save(run, 3, rank=rank)  # noticed before anything is written
    assert _names(run) == ["step-00000001", "step-00000002"]


def test_a_disk_that_turned_read_only(small_disk: Callable[[str], Path]) -> None:
    run = small_disk("size=1m")
    _save(run, 1)
    small_disk("ro")
    with pytest.raises(CannotWrite, match=r"step-00000002: Read-only file system \(rank 0\)"):
        _save(run, 2)
    assert verify_together(_latest(run), cast(Engine, Rank())) is None


def test_room_is_measured_before_the_first_update(tmp_path: Path) -> None:
    assert space_needed(tmp_path, cast(Engine, Rank())) == 100
    folder = _save(tmp_path, 1)
    listed = json.loads((folder / MANIFEST_FILE).read_text())["files"].values()
    assert space_needed(tmp_path, cast(Engine, Rank())) == sum(facts["bytes"] for facts in listed) > 100
    assert too_little_room(tmp_path / "new" / "run", 1000) is None
    assert "a checkpoint takes about 1000000000.0 GB" in str(too_little_room(tmp_path / "new", 10**18))
    free = free_bytes(tmp_path)
    assert free is not None and scarce_room(tmp_path, 1000, 3) is None
    assert "5 checkpoints" in str(scarce_room(tmp_path, free // 4, 5))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        _save(tmp_path, step, keep=2)
    assert _names(tmp_path) == ["step-00000010", "step-00000011"]
    prune(tmp_path, 5)
    assert len(_names(tmp_path)) == 2


def test_a_checkpoint_that_is_being_removed_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of it, the run leaves no half a `step-N`."""
    _save(tmp_path, 1)
    removed: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: removed.append(Path(path).name))
        _save(tmp_path, 2, keep=1)
    assert ".removed-step-00000001" in removed and not any(name.startswith("step-") for name in removed)
    assert _names(tmp_path) == [".removed-step-00000001", "step-00000002"]
    set_aside(tmp_path, 2)
    assert _names(tmp_path) == ["step-00000002"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def _list_as_it_is(folder: Path, name: str) -> None:
    """Let the manifest say what the file is now: damage that no checksum shows."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def _cut_state(folder: Path) -> None:
    _truncate(folder / "trainer_state.json")
    _list_as_it_is(folder, "trainer_state.json")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "short": (
        lambda folder: _truncate(folder / "deepspeed" / "weights0.bin"),
        "deepspeed/weights0.bin is 4 bytes long, not 7",
    ),
    "missing": (
        lambda folder: (folder / "deepspeed" / "weights0.bin").unlink(),
        "deepspeed/weights0.bin is missing",
    ),
    "manifest cut": (lambda folder: _truncate(folder / MANIFEST_FILE), "manifest.json is not readable"),
    "manifest empty": (lambda folder: (folder / MANIFEST_FILE).write_text("{}"), "manifest.json is not readable"),
    "manifest a list": (lambda folder: (folder / MANIFEST_FILE).write_text("[1]"), "manifest.json is not readable"),
    "manifest of bytes": (
        lambda folder: (folder / MANIFEST_FILE).write_bytes(bytes(range(128, 256))),
        "manifest.json is not readable",
    ),
    "state cut": (_cut_state, "trainer_state.json is not readable"),
    "configuration": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "config.json does not have the checksum in manifest.json",  # read before the large files are
    ),
    "no manifest": (lambda folder: (folder / MANIFEST_FILE).unlink(), "it holds no manifest.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_latest_and_refused_by_name(tmp_path: Path, name: str) -> None:
    damage, said = DAMAGES[name]
    older, newer = _save(tmp_path, 1), _save(tmp_path, 2)
    damage(newer)
    assert find_checkpoint(tmp_path, "latest") == (older, [f"step-00000002: {said}"])
    with pytest.raises(UserError, match=said):
        find_checkpoint(tmp_path, str(newer))
    set_aside(tmp_path, 1)
    assert _names(tmp_path) == ["step-00000001", "superseded-step-00000002"]
    damage(older)
    with pytest.raises(UserError, match=f"no usable checkpoint.*step-00000001: {said}"):
        find_checkpoint(tmp_path, "latest")  # a run with checkpoints does not start again from nothing


def test_a_changed_bit_is_found(tmp_path: Path) -> None:
    large = Rank()
    large.num_bytes = 2_000_000
    older, newer = _save(tmp_path, 1), _save(tmp_path, 2, rank=large)
    _flip_a_bit(newer / "deepspeed" / "weights0.bin")
    assert find_checkpoint(tmp_path, "latest") == (newer, [])  # too large to be read by every rank before they meet
    problem = verify_together(newer, cast(Engine, Rank()))
    assert problem == "deepspeed/weights0.bin does not have the checksum in manifest.json"
    assert find_checkpoint(tmp_path, "latest", {newer: problem}) == (older, [f"step-00000002: {problem}"])
    with pytest.raises(UserError, match="does not have the checksum"):
        find_checkpoint(tmp_path, str(newer), {newer: problem})


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "new", "latest") == (None, [])
    (tmp_path / CHECKPOINTS_FOLDER / ".unfinished-step-00000004").mkdir(parents=True)
    assert find_checkpoint(tmp_path, "latest") == (None, [])


def test_a_save_that_was_cut_short_is_named(tmp_path: Path) -> None:
    found = _save(tmp_path, 2)
    for step in (1, 4):
        (tmp_path / CHECKPOINTS_FOLDER / f".unfinished-step-{step:08d}").mkdir()
    said = ["step-00000004: it was being written when the run ended"]
    assert find_checkpoint(tmp_path, "latest") == (found, said)


def test_another_version_is_not_passed_over(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    folder = _save(tmp_path, 2)
    state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**state, "version": 9}))
    _list_as_it_is(folder, "trainer_state.json")
    assert _latest(tmp_path) == folder
    with pytest.raises(UserError, match="version 9"):
        read_state(folder)


def test_resuming_from_an_older_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    (tmp_path / CHECKPOINTS_FOLDER / ".unfinished-step-00000004").mkdir()
    set_aside(tmp_path, 1)
    assert _names(tmp_path) == ["step-00000001", "superseded-step-00000002", "superseded-step-00000003"]
    assert _latest(tmp_path).name == "step-00000001"
    assert len(list_checkpoints(tmp_path)) == 1


def test_what_was_set_aside_goes_once_its_update_was_made_again(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    set_aside(tmp_path, 1)
    _save(tmp_path, 2)
    prune(tmp_path, 5)
    assert _names(tmp_path) == ["step-00000001", "step-00000002", "superseded-step-00000003"]
    _save(tmp_path, 4)
    prune(tmp_path, 1)
    assert _names(tmp_path) == ["step-00000004"]


def test_the_last_checkpoint_from_before_a_collapse_is_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        _save(tmp_path, step)
    prune(tmp_path, 1, sound_step=5)
    assert _names(tmp_path) == ["step-00000004", "step-00000008"]
    prune(tmp_path, 1, sound_step=8)  # it has recovered
    assert _names(tmp_path) == ["step-00000008"]


def test_copies_beside_the_runs_own_checkpoints_are_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    parent = tmp_path / CHECKPOINTS_FOLDER
    for copy in ("step-00000001-keep", "step-best"):
        shutil.copytree(parent / "step-00000001", parent / copy)
    prune(tmp_path, 1)
    set_aside(tmp_path, 3)
    assert _names(tmp_path) == ["step-00000001-keep", "step-00000003", "step-best"]
    assert _latest(tmp_path).name == "step-00000003"


def test_what_was_set_aside_is_not_resumed_under_that_name(tmp_path: Path) -> None:
    for step in (1, 2):
        _save(tmp_path, step)
    set_aside(tmp_path, 1)
    with pytest.raises(UserError, match=r"was set aside .* rename it to step-00000002"):
        find_checkpoint(tmp_path, str(tmp_path / CHECKPOINTS_FOLDER / "superseded-step-00000002"))


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_a_shard_that_would_run_code_is_found_before_deepspeed_loads_it(tmp_path: Path) -> None:
    folder = _save(tmp_path, 2)
    torch.save({"module": Hostile(f"touch {tmp_path / 'ran'}")}, folder / "deepspeed" / "mp_rank_00_model_states.pt")
    _list_as_it_is(folder, "deepspeed/mp_rank_00_model_states.pt")
    assert find_checkpoint(tmp_path, "latest") == (folder, [])
    problem = verify_together(folder, cast(Engine, Rank()))
    assert problem is not None and "posix.system" in problem and not (tmp_path / "ran").exists()


def test_a_manifest_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    folder = _save(tmp_path, 2)
    (folder / MANIFEST_FILE).write_text(json.dumps({"version": 1, "files": {"../x": {"bytes": 1, "crc32": 1}}}))
    with pytest.raises(UserError, match="not readable"):
        find_checkpoint(tmp_path, str(folder))


def test_a_checkpoint_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    _save(tmp_path, 2)
    with pytest.raises(UserError, match=r"there is no such folder.*there are step-00000002 .*save_total_limit"):
        find_checkpoint(tmp_path, str(tmp_path / CHECKPOINTS_FOLDER / "step-00000001"))
