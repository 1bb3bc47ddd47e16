"""What `accelerate launch` and its YAML file say about DeepSpeed, which `--deepspeed` and other flags own."""

from collections.abc import MutableMapping

from trainer.errors import UserError

# The launcher hands its settings to the ranks in these variables (accelerate 1.15). Where it is not asked for one, it
# leaves the variable out; but precision, of which it says `no`.
_OWNERS = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "--deepspeed",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "--deepspeed",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "--deepspeed",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "--deepspeed",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "--deepspeed",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "--deepspeed",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "--max_grad_norm",
}
_PRECISION = "ACCELERATE_MIXED_PRECISION"
_FIELDS = "ACCELERATE_CONFIG_DS_FIELDS"


def take_over_launcher_settings(environ: MutableMapping[str, str], *, bf16: bool) -> None:
    """Refuse what the launcher sets besides us; a precision that is ours, or none, is no longer mentioned.

    accelerate would take no notice of most of these and of a precision in its YAML file raise a ValueError, `no`
    included, which is what `accelerate config` writes there.

    Raises:
        UserError: naming each setting and the flag that owns it.
    """
    problems = [
        f"{_setting(name)} ({environ[name]}) in accelerate's configuration or command line belongs to {owner} of "
        "`trainer pretrain`; take it out there."
        for name, owner in _OWNERS.items()
        if name in environ
    ]
    precision = environ.get(_PRECISION, "no")
    if precision not in ("no", "bf16" if bf16 else "no"):
        problems.append(
            f"mixed_precision ({precision}) in accelerate's configuration or command line belongs to --bf16 ({bf16}) "
            "of `trainer pretrain`; take it out there."
        )
    if problems:
        raise UserError("\n".join(problems))
    if _FIELDS in environ:
        environ[_FIELDS] = ",".join(field for field in environ[_FIELDS].split(",") if field != "mixed_precision")


def _setting(variable: str) -> str:
    """Its name in the YAML file: `ACCELERATE_DEEPSPEED_ZERO_STAGE` is `zero_stage`."""
    special = {"CONFIG_FILE": "deepspeed_config_file", "ZERO3_INIT": "zero3_init_flag"}
    name = variable.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_")
    return special.get(name, name.lower())
