"""Start from the weights of another model: any `save_pretrained` folder or Hub id of the two families."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging

from trainer.errors import UserError
from trainer.model.pretraining import PretrainingModel, freeze_unused, model_class
from trainer.model.sizes import ModelConfig, read_config

# What a model that was not pre-trained with this loss, or was fine-tuned since, comes without.
_HEAD = ("quantizer.", "project_hid.", "project_q.")
_MASK_VECTOR = "masked_spec_embed"
# Layers that fine-tuning adds in the middle of the model and pre-training leaves out.
_ADAPTERS = (".adapter.", ".adapter_layer.")
# The size, which says more than the shapes that follow from it, and settings that change what the weights compute.
_MEANING = (
    *("hidden_size", "num_hidden_layers", "intermediate_size"),
    *("do_stable_layer_norm", "feat_extract_norm", "feat_extract_activation", "hidden_act", "layer_norm_eps"),
    *("num_attention_heads", "conv_stride", "num_conv_pos_embedding_groups", "position_embeddings_type"),
    "rotary_embedding_base",
)
_NUM_NAMED = 5


def check_initial_weights(source: str, config: ModelConfig, *, cache_dir: str | None) -> None:
    """Refuse what the configuration at `source` tells: another family, or weights that mean something else under ours.

    Raises:
        UserError: there is no model at `source`, or it does not fit `config`.
    """
    theirs = read_config(source, cache_dir, "init_from")
    if theirs.model_type != config.model_type:
        raise UserError(
            f"init_from ({source}) is a {theirs.model_type} model, the configuration of this run is "
            f"{config.model_type}; {_remedy(source)}"
        )
    different = [
        f"{name} ({getattr(theirs, name)} there, {getattr(config, name)} here)"
        for name in _MEANING
        if _comparable(getattr(theirs, name, None)) != _comparable(getattr(config, name, None))
    ]
    if different:
        raise UserError(
            f"init_from ({source}) does not fit the configuration of this run: {'; '.join(different)}; "
            f"{_remedy(source)}"
        )


def _remedy(source: str) -> str:
    return f"use its own configuration (--model_name_or_path {source}) or start from another model."


def _comparable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def load_initial_weights(
    source: str,
    config: ModelConfig,
    *,
    seed: int,
    cache_dir: str | None,
    allow_missing_head: bool,
    say: Callable[[str], None],
    **options: Any,
) -> PretrainingModel:
    """A model of `config` with the weights at `source` (a folder or a Hub id), on the CPU in fp32.

    Quantizer, projections and mask vector may be missing with `allow_missing_head`; they are then drawn as those of a
    fresh model, the same on every rank for the same seed. `say` takes notes for the user; `options` go to the model.
    Like `build_model`, call it before an `Accelerator` exists; `check_initial_weights` comes first.

    Raises:
        UserError: the weights cannot be read, are of other shapes, incomplete or not finite.
    """
    torch.manual_seed(seed)
    model, found = _load(source, config, cache_dir, options)
    model.train()
    freeze_unused(model)  # transformers asks for gradients of all that it loads
    _check_shapes(source, sorted(found["mismatched_keys"]))
    unexpected = sorted(found["unexpected_keys"])
    backbone = model.base_model_prefix + "."
    _check_places(source, [name for name in unexpected if _is_of(name, backbone) and not _is_adapter(name)])
    _check_missing(source, sorted(found["missing_keys"]), allow_missing_head, say)
    _check_finite(source, model.state_dict())
    if unexpected:
        say(f"left out of {source}, no part of pre-training: {_listed(unexpected)}")
    return model


def _load(
    source: str, config: ModelConfig, cache_dir: str | None, options: dict[str, Any]
) -> tuple[PretrainingModel, dict[str, Any]]:
    """The model and what transformers says of the names.

    There is no second copy: the weights of a safetensors file are mapped into memory until something writes to them.
    """
    try:
        with _silent_transformers():
            # with `output_loading_info` it returns a pair, which its annotation does not say
            loaded = cast(Any, model_class(config)).from_pretrained(
                source,
                config=config,
                cache_dir=cache_dir,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # reported, and refused by us with all names
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = _damaged_file(source) or str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"init_from ({source}) must be a folder that save_pretrained wrote, or a Hub id that can be reached, with "
            f"readable weights: {reason}"
        ) from error
    return cast(tuple[PretrainingModel, dict[str, Any]], loaded)


def _damaged_file(source: str) -> str | None:
    """Which safetensors file of a folder cannot be read, and why; the libraries do not tell."""
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name}: {error}; copy it again"
    return None


@contextlib.contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without transformers' own progress bar and table of names, once per rank; ours are refusals and notes."""
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


def _check_shapes(source: str, mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    if mismatched:
        shapes = [f"{name} ({list(theirs)} there, {list(ours)} here)" for name, theirs, ours in mismatched]
        raise UserError(
            f"init_from ({source}) has weights of other shapes than the configuration of this run: {_listed(shapes)}; "
            f"{_remedy(source)}"
        )


def _check_places(source: str, homeless: Sequence[str]) -> None:
    if homeless:
        raise UserError(
            f"init_from ({source}) has weights that the configuration of this run has no place for: "
            f"{_listed(homeless)}; {_remedy(source)}"
        )


def _check_missing(source: str, missing: Sequence[str], allow_head: bool, say: Callable[[str], None]) -> None:
    head = [name for name in missing if name.startswith(_HEAD) or name.endswith(_MASK_VECTOR)]
    others = [name for name in missing if name not in head]
    if others:
        raise UserError(
            f"init_from ({source}) lacks weights that a start cannot do without: {_listed(others)}; {_remedy(source)}"
        )
    if head and not allow_head:
        raise UserError(
            f"init_from ({source}) lacks weights of the pre-training head: {', '.join(head)}; pass "
            "--allow_missing_head to start these fresh, or start from a model that was saved with them."
        )
    if head:
        say(f"not in {source} and started fresh: {', '.join(head)}")


def _check_finite(source: str, state: dict[str, Tensor]) -> None:
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not _all_finite(tensor)]
    if bad:
        raise UserError(f"init_from ({source}) has weights that are not finite: {_listed(bad)}; use an earlier save.")


def _all_finite(tensor: Tensor) -> bool:
    least, most = tensor.aminmax()  # NaN and infinities reach the extremes
    return math.isfinite(least) and math.isfinite(most)


def _is_of(name: str, prefix: str) -> bool:
    """Whether an unexpected weight belongs to the backbone; that of a bare `Wav2Vec2Model` has no prefix."""
    return name.startswith((prefix, "encoder.", "feature_extractor.", "feature_projection."))


def _is_adapter(name: str) -> bool:
    return any(part in f".{name}" for part in _ADAPTERS)


def _listed(names: Sequence[str]) -> str:
    """The first few names and how many more."""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
