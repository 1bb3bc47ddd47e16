from trainer.doctor.gradients import _reason


def test_the_error_of_a_rank_is_found_among_what_launchers_write() -> None:
    stderr = "Traceback (most recent call last):\n[rank0]: RuntimeError: CUDA out of memory\n" + "=" * 60 + "\nfailed\n"
    assert _reason(stderr) == ("RuntimeError: CUDA out of memory", "")


def test_a_wrong_scale_has_its_own_remedy() -> None:
    reason, remedy = _reason(
        "W1122 noise\nDeepSpeed 0.18.3 gets gradients wrong by a factor of 0.25\nSomeError: later\n"
    )
    assert reason.startswith("DeepSpeed 0.18.3") and "constraints.txt" in remedy


def test_silence_is_said() -> None:
    assert _reason("")[0] == "it ended without saying why"
