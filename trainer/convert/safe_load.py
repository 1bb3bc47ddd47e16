"""Loads a DeepSpeed checkpoint file without DeepSpeed and without running anything that is pickled in it."""

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from trainer.convert.errors import ConversionError


class FragmentAddress:
    """Stand-in for DeepSpeed's class of this name: where one parameter's share lies in a rank's flat partition."""

    numel: int
    start: int


class Ignored:
    """Stand-in for a DeepSpeed object that a conversion does not look at."""

    def __init__(self, *_: object) -> None:
        pass


def _enum_member(*_: object) -> Ignored:
    """Stand-in for `getattr`, by which Python 3.11 up to 3.11.3 pickles an enum member; nothing is looked up."""
    return Ignored()


# Everything beyond tensors and plain containers that ZeRO-1, 2 and 3 save with DeepSpeed 0.19.8.
STAND_INS = [
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Ignored, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_enum_member, "builtins.getattr"),
    (Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


def safe_load(path: Path) -> dict[str, Any]:
    """The dict saved in `path`; its tensors are mapped from the file and come into memory only where they are read.

    Raises:
        ConversionError: the file is unreadable, not a dict, or refers to a class or function outside `STAND_INS`.
    """
    try:
        with torch.serialization.safe_globals(STAND_INS):  # type: ignore[arg-type]
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise ConversionError(_refusal(path, error)) from error
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: missing; copy the whole checkpoint folder.") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConversionError(
            f"{path}: not a readable torch file ({reason}); copy the checkpoint again or take another one."
        ) from error
    if not isinstance(state, dict):
        raise ConversionError(
            f"{path}: holds a {type(state).__name__}, not a dict; this is not a DeepSpeed checkpoint."
        )
    return state


def _refusal(path: Path, error: UnpicklingError) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is None:
        reason = str(error).partition("\n")[0]
        return f"{path}: damaged, or not written by torch ({reason}); copy the checkpoint again or take another one."
    return (
        f"{path}: refers to {found.group(1)}, which no ZeRO checkpoint needs and which could run code; "
        "nothing was run. Convert only checkpoints of DeepSpeed 0.19 that you know the origin of."
    )
