"""What `accelerate launch` sets beside our flags."""

import pytest

from trainer.errors import UserError
from trainer.run.launcher_settings import take_over_launcher_settings


def test_settings_with_another_owner_are_refused_with_their_names() -> None:
    environ = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5", "ACCELERATE_MIXED_PRECISION": "fp16",
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        take_over_launcher_settings(environ, bf16=True)
    assert [line.split(" in ")[0] for line in str(error.value).splitlines()] == [
        "deepspeed_config_file (ds.json)", "zero_stage (3)", "gradient_clipping (0.5)", "mixed_precision (fp16)",
    ]  # fmt: skip
    assert "belongs to --max_grad_norm" in str(error.value)


@pytest.mark.parametrize(("precision", "bf16"), [("no", False), ("no", True), ("bf16", True)])
def test_a_precision_that_is_ours_or_none_is_left_out(precision: str, bf16: bool) -> None:
    fields = "deepspeed_multinode_launcher,mixed_precision"
    environ = {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_CONFIG_DS_FIELDS": fields}
    take_over_launcher_settings(environ, bf16=bf16)
    assert environ["ACCELERATE_CONFIG_DS_FIELDS"] == "deepspeed_multinode_launcher"


def test_bf16_asked_of_the_launcher_alone_is_refused() -> None:
    with pytest.raises(UserError, match=r"mixed_precision \(bf16\) .* --bf16 \(False\)"):
        take_over_launcher_settings({"ACCELERATE_MIXED_PRECISION": "bf16"}, bf16=False)


def test_without_a_launcher_nothing_is_set() -> None:
    environ: dict[str, str] = {}
    take_over_launcher_settings(environ, bf16=False)
    assert environ == {}
