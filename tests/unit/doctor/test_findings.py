"""What each check of the doctor says, from the right and the wrong sides of its rules."""

import os
import resource
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.cli import main
from trainer.doctor import accounts, cluster, command, compilers, gpus, storage, versions
from trainer.doctor.findings import Finding, note

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
server:/export /shared\\040data nfs4 rw 0 0
/dev/nvme0n1 /shared\\040data/fast xfs rw 0 0
"""


def test_the_verdict_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fine, odd, bad = Finding("a", "1"), note("b", "2", "look"), Finding("c", "3", "mend")
    for findings, code in (([fine], 0), ([fine, odd], 0), ([odd, bad, fine], 2)):
        monkeypatch.setattr(command, "_all_findings", lambda _, findings=findings: iter(findings))
        assert main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split() for line in lines] == [["note", "b", "2"], ["->", "look"], ["WRONG", "c", "3"], ["->", "mend"],
                                                ["ok", "a", "1"]]  # fmt: skip
    assert main(["doctor", "--nonsense"]) == 2


@pytest.mark.parametrize(
    ("path", "folder", "kind"),
    [("/home/me", "/", "ext4"), ("/dev/shm", "/dev/shm", "tmpfs"), ("/dev/shmem", "/", "ext4"),
     ("/shared data/runs", "/shared data", "nfs4"), ("/shared data/fast/x", "/shared data/fast", "xfs")],
)  # fmt: skip
def test_the_file_system_of_a_path_is_the_innermost_mount(path: str, folder: str, kind: str) -> None:
    assert storage.mount_of(Path(path), MOUNTS) == (folder, kind)


def _on(monkeypatch: pytest.MonkeyPatch, kind: str, free_bytes: int = 10**12) -> None:
    told = SimpleNamespace(f_bavail=free_bytes, f_frsize=1, f_blocks=1)
    monkeypatch.setattr(storage, "_mount", lambda _: storage.Mount("/", kind))
    monkeypatch.setattr(os, "statvfs", lambda _: told)
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)


@pytest.mark.parametrize(
    ("kind", "free_bytes", "nodes", "verdict"),
    [("nfs4", 10**12, "2", "ok"), ("ext4", 10**12, "1", "ok"), ("ext4", 10**12, "2", "WRONG"),
     ("tmpfs", 10**12, "1", "note"), ("overlay", 10**12, "1", "note"), ("nfs4", 10**10, "1", "note")],
)  # fmt: skip
def test_output_folder(
    kind: str, free_bytes: int, nodes: str, verdict: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _on(monkeypatch, kind, free_bytes)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", nodes)
    (finding,) = storage.output_folder(tmp_path / "not" / "yet")
    assert finding.verdict == verdict and str(tmp_path) in finding.found


def test_a_folder_that_cannot_be_written_is_wrong() -> None:
    (finding,) = storage.output_folder(Path("/proc/self"))
    assert finding.verdict == "WRONG" and "cannot be written" in finding.found


@pytest.mark.parametrize(
    ("kind", "rotates", "verdict"),
    [("xfs", False, "ok"), ("xfs", True, "note"), ("nfs4", False, "note"), ("tmpfs", False, "note")],
)
def test_nvme_folder(kind: str, rotates: bool, verdict: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _on(monkeypatch, kind)
    monkeypatch.setattr(storage, "_rotates", lambda _: rotates)
    monkeypatch.setattr(storage, "_no_direct_writes", lambda _: "")
    (finding,) = storage.nvme_folder(tmp_path)
    assert finding.verdict == verdict
    assert ("it turns" in finding.found) == rotates and ("it is memory" in finding.found) == (kind == "tmpfs")
    monkeypatch.setattr(storage, "_no_direct_writes", lambda _: "takes no direct writes")
    assert [finding.verdict for finding in storage.nvme_folder(tmp_path)] == ["WRONG"]


def test_little_shared_memory_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    _on(monkeypatch, "tmpfs", 64_000_000)
    (finding,) = storage.shared_memory()
    assert finding.verdict == "note" and "64 MB" in finding.found and "--shm-size" in finding.remedy


@pytest.mark.parametrize(
    ("value", "verdict"),
    [("eth0", "ok"), ("eth", "ok"), ("ib,eth", "ok"), ("=eth", "WRONG"), ("=eth0", "ok"), ("ib0", "WRONG"),
     ("^lo", "ok"), ("^eth,lo", "WRONG")],
)  # fmt: skip
def test_interfaces_are_chosen_in_nccls_notation(value: str, verdict: str) -> None:
    findings = list(cluster.variables({"NCCL_SOCKET_IFNAME": value}, ["lo", "eth0"]))
    assert findings[0].found == f"NCCL_SOCKET_IFNAME={value}"
    assert [finding.verdict for finding in findings[1:]] == (["WRONG"] if verdict == "WRONG" else [])


def test_what_slows_ranks_down_is_noted() -> None:
    findings = list(cluster.variables({"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "0"}, ["lo"]))
    assert [(finding.subject, finding.verdict) for finding in findings[1:]] == [("NCCL_P2P_DISABLE", "note")]


def test_a_job_needs_a_task_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_ON_NODE": "8"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    (finding,) = cluster.slurm()
    assert finding == ("SLURM", "job 7: 2 node(s), 8 task(s) and 8 GPUs on each", "", True)
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1(x2)")
    assert [finding.verdict for finding in cluster.slurm()] == ["note"]


def test_few_open_files_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert "open files" in {finding.subject for finding in cluster.network() if finding.verdict == "note"}


@pytest.mark.parametrize(
    ("name", "version", "bad"),
    [("deepspeed", "0.18.2", False), ("deepspeed", "0.18.3", True), ("deepspeed", "0.19.6", True),
     ("deepspeed", "0.19.8", False), ("transformers", "5.23.0", False), ("torch", "2.13.0", False)],
)  # fmt: skip
def test_known_bad_versions_are_told_with_what_they_do(name: str, version: str, bad: bool) -> None:
    assert bool(versions.known_bad(name, version)) is bad


def test_a_shared_folder_of_extensions_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/shared/extensions")
    assert [finding.verdict for finding in versions._shared_extensions_folder()] == ["note"]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", f"/mine/{metadata.version('torch')}-{metadata.version('deepspeed')}")
    assert list(versions._shared_extensions_folder()) == []


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [((8, 6), ["sm_80", "sm_90"], True), ((7, 5), ["sm_80"], False), ((9, 0), ["sm_80"], False),
     ((12, 0), ["sm_90", "compute_90"], True), ((9, 0), ["sm_90a"], True)],
)  # fmt: skip
def test_a_device_needs_a_build_for_it(capability: tuple[int, int], built_for: list[str], runs: bool) -> None:
    assert gpus._runs_on(capability, built_for) is runs


@pytest.mark.parametrize(
    ("capability", "free", "verdict"),
    [((9, 0), 78, "ok"), ((9, 0), 20, "note"), ((7, 0), 78, "note"), ((6, 1), 78, "WRONG")],
)
def test_gpus(capability: tuple[int, int], free: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of devices, which a machine without any cannot."""
    device = SimpleNamespace(name="Card", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free << 30, 80 << 30))
    assert [finding.verdict for finding in gpus.gpus()] == [verdict]


def test_a_torch_that_cannot_use_the_gpus_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus._why_none(None).verdict == "ok"
    monkeypatch.setattr(Path, "glob", lambda *_: iter(["/dev/nvidia0"]))
    assert "CPU build" in gpus._why_none(None).found and gpus._why_none(None).verdict == "WRONG"
    assert "driver" in gpus._why_none("13.0").remedy


def test_missing_compilers_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert [(finding.subject, finding.verdict) for finding in compilers.compilers()] == [
        ("c++", "note"), ("ninja", "note"), ("nvcc", "note"),
    ]  # fmt: skip


def test_another_cuda_than_torchs_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.131\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for cuda, verdict in (("13.0", "note"), ("12.8", "ok")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert [finding.verdict for finding in compilers.compilers() if finding.subject == "nvcc"] == [verdict]


def test_an_extension_is_compiled_or_not_or_locked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(compilers, "_HEADERS", ())
    assert [finding.verdict for finding in compilers.ops()] == ["note", "note"]
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    cpu_adam, async_io = compilers.ops()
    assert cpu_adam.verdict == "ok" and str(tmp_path) in cpu_adam.found and "libaio-dev" in async_io.remedy
    (tmp_path / "cpu_adam" / "lock").touch()
    locked, _ = compilers.ops()
    assert locked.verdict == "note" and f"rm {tmp_path}/cpu_adam/lock" in locked.remedy


def test_an_extension_that_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a compiler that fails."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(compilers, "_HEADERS", ())
    monkeypatch.setenv("CXX", "/bin/false")
    built, *_ = compilers.build_ops()
    assert built.subject == "cpu_adam" and built.verdict == "WRONG" and "rror" in built.found


def test_logins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    wandb, hub = accounts.accounts()
    assert wandb.found == "WANDB_MODE is offline" and hub.verdict == "note" and "hf auth login" in hub.remedy
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr("trainer.run.trackers.wandb_has_login", lambda: False)
    wandb, hub = accounts.accounts()
    assert wandb.verdict == "note" and "wandb login" in wandb.remedy and hub.verdict == "ok"
