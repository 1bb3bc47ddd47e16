"""Every flag of `trainer pretrain`: its name, default, help and rule; recipes; all problems reported together.

Flags that `run_wav2vec2_pretraining_no_trainer.py` has keep their name and meaning. A recipe is a YAML file whose keys
are these flags; the command line wins over it. Nothing of ours is imported here, and nothing heavy, so `--help` is
quick.
"""

import argparse
import dataclasses
import difflib
import itertools
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError

RECIPES_FOLDER = Path(__file__).parent / "recipes"

LR_SCHEDULER_TYPES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = ("wandb", "tensorboard", "none")


class ArgumentsError(UserError):
    """One or more values the user gave are wrong; the message lists all of them."""


class HelpRequested(Exception):
    """`--help` was asked for; carries the text to print."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A check of one value and the words that complete 'FIELD (VALUE) must be ...'."""

    holds: Callable[[Any], bool]
    text: str


POSITIVE = Rule(lambda value: value > 0, "greater than 0")
AT_LEAST_ZERO = Rule(lambda value: value >= 0, "0 or more")
A_FEW_FRAMES = Rule(lambda value: value >= 0.1, "at least 0.1, or there are no frames to tell apart")
FRACTION = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
DECAY = Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")
PERCENTAGE = Rule(lambda value: 0 <= value < 100, "a percentage from 0 to 99")


def flag(
    default: Any, help_text: str, *, group: str, rule: Rule | None = None, choices: Sequence[str] | None = None
) -> Any:
    """A dataclass field that is also a command-line flag."""
    return dataclasses.field(
        default=default, metadata={"help": help_text, "group": group, "rule": rule, "choices": choices}
    )


@dataclasses.dataclass(frozen=True)
class PretrainArguments:
    """The resolved settings of one run. `None` means: not set, the help says what follows from that."""

    # --- data
    dataset_name: list[str] | None = flag(
        None, "What to train on, one or more of: a folder of audio files (any depth, any format libsndfile reads), a "
        "fairseq manifest (.tsv), tar shards (.tar, a pattern in quotes or a folder of them), Parquet files, what "
        "save_to_disk wrote, a Hub id. NAME:CONFIG:SPLIT names the parts of a data set in one word.",
        group="data",
    )  # fmt: skip
    dataset_config_names: list[str] | None = flag(
        None, "Configurations of a Hub data set, each with the split in the same place of --dataset_split_names.",
        group="data",
    )  # fmt: skip
    dataset_split_names: list[str] | None = flag(
        None, "Splits of a data set, which may be slices such as train[:10%]. Not set: train, or the only one.",
        group="data",
    )  # fmt: skip
    audio_column_name: str = flag("audio", "Column of a data set that holds the audio.", group="data")
    language_column_name: str | None = flag(
        None, "Column of a data set that names the language of each utterance. A manifest has it as its third column.",
        group="data",
    )  # fmt: skip
    validation_dataset_name: list[str] | None = flag(
        None, "What to validate on, as --dataset_name. Not set: a share of the training data.", group="data"
    )
    validation_split_percentage: int = flag(
        1, "Percentage of the utterances kept for validation when no validation data is named.",
        group="data", rule=PERCENTAGE,
    )  # fmt: skip
    max_duration_in_seconds: float = flag(
        5.0, "Longer utterances are cropped to this length, at a random place.", group="data", rule=A_FEW_FRAMES
    )
    min_duration_in_seconds: float = flag(3.0, "Shorter utterances are left out.", group="data", rule=AT_LEAST_ZERO)
    per_device_train_batch_size: int = flag(
        8, "Most utterances in a micro-batch of one device.", group="data", rule=POSITIVE
    )
    per_device_eval_batch_size: int = flag(
        8, "Most utterances in a validation micro-batch of one device.", group="data", rule=POSITIVE
    )
    max_batch_seconds: float | None = flag(
        None, "Most seconds of audio in a micro-batch of one device. Not set: the batch size decides alone.",
        group="data", rule=A_FEW_FRAMES,
    )  # fmt: skip
    no_crop: bool = flag(
        False, "Pad utterances to the longest of the batch instead of cropping them to the shortest; those beyond "
        "max_duration_in_seconds are cropped to it all the same. max_batch_seconds counts padding.",
        group="data",
    )  # fmt: skip
    pad_to_multiple_of: int | None = flag(
        None, "With --no_crop: pad batches to a multiple of this many samples.", group="data", rule=POSITIVE
    )
    one_crop_per_utterance: bool = flag(
        False, "An epoch takes one crop of every utterance, as in fairseq. Not set: as many as make up its length.",
        group="data",
    )  # fmt: skip
    sampling_alpha: float = flag(
        1.0, "An epoch takes language l in proportion to (its hours / all hours)^alpha: 1 is the data as it is, 0 all "
        "languages equally (XLS-R: 0.5). Corpora are balanced in the same way.",
        group="data", rule=Rule(lambda value: 0 <= value <= 1, "from 0 to 1"),
    )  # fmt: skip
    num_workers: int = flag(2, "Processes per device that decode audio; 0 decodes in the training process.",
                            group="data", rule=AT_LEAST_ZERO)  # fmt: skip
    max_skipped_fraction: float = flag(
        0.01, "Largest share of files that may be unusable; beyond it the run stops. skipped.tsv lists them.",
        group="data", rule=Rule(lambda value: 0 <= value <= 1, "from 0 to 1"),
    )  # fmt: skip
    preprocessing_only: bool = flag(
        False, "Build the index of the audio and stop, as `trainer prepare` does.", group="data"
    )
    preprocessing_num_workers: int | None = flag(
        None, "Processes that read the headers of the audio for the index. Not set: one per core.",
        group="data", rule=POSITIVE,
    )  # fmt: skip
    stats: bool = flag(False, "With --preprocessing_only: print hours, lengths and languages.", group="data")
    train_cache_file_name: str | None = flag(
        None, "Taken so that command lines of the stock recipe work; no audio is cached, its index is in --cache_dir.",
        group="data",
    )  # fmt: skip
    validation_cache_file_name: str | None = flag(None, "As --train_cache_file_name.", group="data")
    overwrite_cache: bool = flag(False, "Build the index of the audio anew.", group="data")
    cache_dir: str | None = flag(
        None, "Folder of the audio indexes and of models fetched from the Hub. Not set: the user's cache folder.",
        group="data",
    )  # fmt: skip

    # --- model
    model_name_or_path: str | None = flag(
        None, "Shipped size (demo, base, large, conformer_large), a folder with a config.json, or a Hub id; weights "
        "start fresh unless --init_from is given.", group="model",
    )  # fmt: skip
    config_name: str | None = flag(None, "Model configuration to use instead of --model_name_or_path's.", group="model")
    init_from: str | None = flag(
        None, "Model folder or Hub id whose weights are the start; the optimizer starts fresh. Its configuration is "
        "used unless model_name_or_path or config_name is set, as the shipped recipes do: give the same folder there. "
        "Not read when a checkpoint is resumed.",
        group="model",
    )  # fmt: skip
    allow_missing_head: bool = flag(
        False, "Start quantizer, projections and mask vector fresh where --init_from has none.", group="model"
    )
    freeze_feature_encoder: bool = flag(
        False, "Leave the convolutional front end as it is (under --bf16 and DeepSpeed: rounded to bfloat16 once).",
        group="model",
    )  # fmt: skip
    mask_time_prob: float | None = flag(
        None, "Share of frames that start the masked spans, times the span length. Not set: the model's.",
        group="model", rule=Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    )  # fmt: skip
    mask_time_length: int | None = flag(
        None, "Length of a masked span in frames. Not set: the model's.", group="model", rule=POSITIVE
    )
    gradient_checkpointing: bool = flag(False, "Recompute activations in backward to save memory.", group="model")
    feature_penalty_weight: float = flag(
        0.0, "Weight of the mean square of the convolutional features (fairseq: 10 for base, 0 for large).",
        group="model", rule=AT_LEAST_ZERO,
    )  # fmt: skip
    feature_grad_mult: float = flag(
        1.0, "Factor on the gradient of the convolutional front end (fairseq: 0.1 for base, 1 for large).",
        group="model", rule=POSITIVE,
    )  # fmt: skip
    global_diversity: bool = flag(
        True, "Diversity loss and perplexities over the micro-batches of all ranks together, not of each alone.",
        group="model",
    )  # fmt: skip
    max_gumbel_temperature: float = flag(2.0, "First temperature of the quantizer.", group="model", rule=POSITIVE)
    min_gumbel_temperature: float = flag(0.5, "Lowest temperature of the quantizer.", group="model", rule=POSITIVE)
    gumbel_temperature_decay: float = flag(0.999995, "Factor on the temperature per update.", group="model", rule=DECAY)

    # --- optimization
    learning_rate: float = flag(
        5e-5, "Peak learning rate, reached after the warm-up.", group="optimization", rule=POSITIVE
    )
    lr_scheduler_type: str = flag(
        "linear", "Course of the learning rate after the warm-up.", group="optimization", choices=LR_SCHEDULER_TYPES
    )
    num_warmup_steps: int = flag(
        0, "Updates over which the learning rate rises.", group="optimization", rule=AT_LEAST_ZERO
    )
    max_train_steps: int | None = flag(
        None, "Updates to make. Not set: --num_train_epochs decides.", group="optimization", rule=POSITIVE
    )
    num_train_epochs: int = flag(3, "Passes over the data when --max_train_steps is not set.", group="optimization",
                                 rule=POSITIVE)  # fmt: skip
    gradient_accumulation_steps: int = flag(
        1, "Micro-batches per device and update.", group="optimization", rule=POSITIVE
    )
    weight_decay: float = flag(0.0, "AdamW's weight decay, on matrices only.", group="optimization", rule=AT_LEAST_ZERO)
    adam_beta1: float = flag(0.9, "AdamW's first beta.", group="optimization", rule=FRACTION)
    adam_beta2: float = flag(0.999, "AdamW's second beta.", group="optimization", rule=FRACTION)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.", group="optimization", rule=POSITIVE)
    max_grad_norm: float = flag(
        1.0, "Gradients are clipped to this norm; 0 turns clipping off.", group="optimization", rule=AT_LEAST_ZERO
    )
    collapse_patience: int = flag(
        2000, "End the run (exit code 3) when hardly more than one codeword per codebook was in use for so many "
        "updates; 0 never does.", group="optimization", rule=AT_LEAST_ZERO,
    )  # fmt: skip
    seed: int = flag(0, "Seed of weights, data order, masks and dropout.", group="optimization", rule=AT_LEAST_ZERO)

    # --- run
    output_dir: str | None = flag(None, "Run folder: settings, metrics, checkpoints.", group="run")
    resume: str | None = flag(
        None, "'latest' continues the newest complete checkpoint of the run folder; or the path of a checkpoint. The "
        "number of ranks, the ZeRO stage, offload and --deepspeed itself may differ from those that wrote it. Data "
        "goes on with the next micro-batch that no rank has had; as long as ranks x --gradient_accumulation_steps is "
        "the same, updates consist of the same utterances.", group="run",
    )  # fmt: skip
    deepspeed: str | None = flag(
        None, "Shipped DeepSpeed configuration (zero2, zero2_offload, zero3, zero3_offload, zero3_nvme) or the path "
        "of a JSON file. Not set: plain PyTorch.", group="run",
    )  # fmt: skip
    nvme_path: str | None = flag(
        None, "Folder on a local NVMe drive of each machine, for the optimizer state of --deepspeed zero3_nvme.",
        group="run",
    )  # fmt: skip
    bf16: bool = flag(False, "Train in bfloat16; the optimizer keeps fp32 weights.", group="run")
    logging_steps: int = flag(500, "Updates between two lines of metrics.", group="run", rule=POSITIVE)
    saving_steps: int = flag(500, "Updates between two checkpoints; the last update is always saved.", group="run",
                             rule=POSITIVE)  # fmt: skip
    eval_steps: int | None = flag(
        None, "Updates between two validations. Not set: as often as checkpoints.", group="run", rule=POSITIVE
    )
    save_total_limit: int | None = flag(
        None, "Checkpoints to keep, the newest ones. Not set: all.", group="run", rule=POSITIVE
    )
    hang_timeout_seconds: float = flag(
        600.0, "A rank that makes no progress for this long ends the run with code 1. Until the first update is done, "
        "and for a save, it is 30 minutes, if that is longer.", group="run", rule=POSITIVE,
    )  # fmt: skip
    report_to: str = flag("none", "Where metrics go besides metrics.jsonl.", group="run", choices=TRACKERS)
    config: str | None = flag(None, "Recipe: a shipped name or a YAML file whose keys are these flags.", group="run")


FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(PretrainArguments)}
_TYPES: dict[str, Any] = typing.get_type_hints(PretrainArguments)


def value_type(name: str) -> type:
    """The plain type of a flag, or of each value of one that takes several: `int | None` and `list[int]` -> int."""
    hint = _plain_hint(name)
    return typing.cast(type, typing.get_args(hint)[0] if takes_several(name) else hint)


def takes_several(name: str) -> bool:
    """Whether the flag takes a list of values."""
    return typing.get_origin(_plain_hint(name)) is list


def _plain_hint(name: str) -> Any:
    hint = _TYPES[name]
    if isinstance(hint, types.UnionType):
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
    return hint


_DESCRIPTIONS = {
    "pretrain": "Pre-train a wav2vec 2.0 model on unlabelled speech.",
    "prepare": "Read the headers of the audio and keep their index, which trainer pretrain would do first: the data "
    "flags count, the others are taken and ignored, so that the command line of a run can be given.",
}


class RaisingParser(argparse.ArgumentParser):
    """argparse whose complaints are raised instead of printed."""

    def error(self, message: str) -> typing.NoReturn:
        raise ArgumentsError(message)


def build_parser(command: str = "pretrain") -> argparse.ArgumentParser:
    """A parser in which a flag that is not given leaves no trace, so a recipe's value can stand."""
    parser = RaisingParser(
        prog=f"trainer {command}",
        description=_DESCRIPTIONS[command],
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="Show this text.")
    groups = {name: parser.add_argument_group(name) for name in ("data", "model", "optimization", "run")}
    for name, field in FIELDS.items():
        group = groups[field.metadata["group"]]
        kind = value_type(name)
        default = "" if field.default is None else f" (default: {field.default})"
        shipped = f" Shipped: {', '.join(shipped_recipes())}." if name == "config" else ""
        help_text = (field.metadata["help"] + shipped + default).replace("%", "%%")
        if kind is bool:
            group.add_argument(f"--{name}", help=help_text, nargs="?", const=True, type=_parse_bool, metavar="BOOL")
        else:
            group.add_argument(
                f"--{name}", help=help_text, type=kind, choices=field.metadata["choices"], metavar=_metavar(name, kind),
                nargs="+" if takes_several(name) else None,
            )  # fmt: skip
    # launchers pass the local rank before the user's arguments; the environment holds the same number
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def _metavar(name: str, kind: type) -> str | None:
    if FIELDS[name].metadata["choices"]:
        return None
    return {int: "N", float: "X", str: "TEXT"}[kind]


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parse_arguments(command_line: Sequence[str], command: str = "pretrain") -> PretrainArguments:
    """Flags over recipe over defaults. Raises `ArgumentsError` naming every problem, `HelpRequested` on --help.

    `prepare` is `pretrain --preprocessing_only`.
    """
    parser = build_parser(command)
    given, unknown = parser.parse_known_args(list(command_line))
    from_flags = vars(given)
    if from_flags.pop("help", False):
        raise HelpRequested(parser.format_help())
    from_flags.pop("local_rank", None)
    # a word after an unknown flag is its value
    problems = [
        _unknown_flag(word) for before, word in itertools.pairwise(["", *unknown]) if not _is_value(before, word)
    ]
    from_recipe: dict[str, Any] = {}
    if "config" in from_flags:
        from_recipe, recipe_problems = read_recipe(from_flags["config"])
        problems += recipe_problems
    if command == "prepare":
        from_flags["preprocessing_only"] = True
    arguments = PretrainArguments(**{**from_recipe, **from_flags})
    problems += check(arguments)
    if problems:
        raise ArgumentsError("\n".join(problems))
    return arguments


def _is_value(before: str, word: str) -> bool:
    return before.startswith("--") and "=" not in before and not word.startswith("--")


def _unknown_flag(argument: str) -> str:
    if not argument.startswith("--"):
        return f"unexpected argument {argument!r}; every value needs its flag (see --help)."
    return f"unknown flag {argument.split('=')[0]}{_nearest(argument.split('=')[0][2:], prefix='--')}"


def _nearest(name: str, prefix: str = "") -> str:
    near = difflib.get_close_matches(name, FIELDS, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; see --help for all {len(FIELDS)}."


def shipped_recipes() -> list[str]:
    """Names that `--config` takes."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """The file of a shipped recipe or of a path. Raises `ArgumentsError`."""
    shipped = RECIPES_FOLDER / f"{name_or_path}.yaml"
    for path in (shipped, Path(name_or_path)):
        if path.is_file():
            return path
    raise ArgumentsError(
        f"config ({name_or_path}) is neither a shipped recipe ({', '.join(shipped_recipes())}) nor a file."
    )


def read_recipe(name_or_path: str) -> tuple[dict[str, Any], list[str]]:
    """Values of a recipe and the problems found in it. Raises `ArgumentsError` when it cannot be read at all."""
    path = find_recipe(name_or_path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ArgumentsError(f"config ({path}) cannot be read: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ArgumentsError(f"config ({path}) must hold `flag: value` lines.")
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in content.items():
        if key not in FIELDS or key == "config":
            problems.append(f"unknown key {key!r} in recipe {path}{_nearest(str(key))}")
            continue
        converted = _convert(key, value)
        if converted is _WRONG_TYPE:
            problems.append(
                f"{key} ({value!r}) in recipe {path} must be of type {value_type(key).__name__}"
                f"{' or a list of them' if takes_several(key) else ''}; correct the value."
            )
        else:
            values[key] = converted
    return values, problems


_WRONG_TYPE = object()


def _convert(name: str, value: Any) -> Any:
    """A YAML value as the flag's type, or `_WRONG_TYPE`. YAML reads 3e-4 as text, so numbers may come as text."""
    if value is None:
        return None if FIELDS[name].default is None else _WRONG_TYPE
    if takes_several(name):
        values = [_convert_one(name, each) for each in (value if isinstance(value, list) else [value])]
        return _WRONG_TYPE if _WRONG_TYPE in values or not values else values
    return _convert_one(name, value)


def _convert_one(name: str, value: Any) -> Any:
    kind = value_type(name)
    if kind is bool or kind is str or isinstance(value, bool):
        return value if isinstance(value, kind) else _WRONG_TYPE
    if kind is int and isinstance(value, float):
        return _WRONG_TYPE
    try:
        return kind(value)
    except (TypeError, ValueError):
        return _WRONG_TYPE


def check(arguments: PretrainArguments) -> list[str]:
    """Every broken rule of one set of arguments, each as field, value, rule and remedy."""
    problems = []
    for name, field in FIELDS.items():
        value = getattr(arguments, name)
        rule: Rule | None = field.metadata["rule"]
        choices = field.metadata["choices"]
        if value is None:
            continue
        if value == "" or (isinstance(value, list) and "" in value):
            problems.append(f"{name} is empty; give --{name} a value or leave it out.")
            continue
        if rule is not None and not rule.holds(value):
            problems.append(f"{name} ({value}) must be {rule.text}; change --{name}.")
        if choices is not None and value not in choices:
            problems.append(f"{name} ({value}) must be one of {', '.join(choices)}; change --{name}.")
    return problems + _conflicts(arguments)


def _conflicts(arguments: PretrainArguments) -> list[str]:
    """Values that are each fine and do not go together, and values that every run needs."""
    problems = _data_conflicts(arguments)
    for name in ("dataset_name", "output_dir", "model_name_or_path"):
        needed = name == "dataset_name" or not arguments.preprocessing_only
        if name == "model_name_or_path" and (arguments.config_name or arguments.init_from) is not None:
            needed = False
        if needed and getattr(arguments, name) is None:
            problems.append(f"{name} is not set; give --{name} or name it in a recipe.")
    if arguments.allow_missing_head and arguments.init_from is None:
        problems.append(
            "allow_missing_head (True) is about the weights of init_from, which is not set; give --init_from or leave "
            "--allow_missing_head out."
        )
    if arguments.freeze_feature_encoder and arguments.init_from is None and arguments.resume is None:
        problems.append(
            "freeze_feature_encoder (True) would leave a random front end as it is; give --init_from to start from a "
            "trained one, or leave --freeze_feature_encoder out."
        )
    if arguments.nvme_path is not None and arguments.deepspeed is None:
        problems.append(
            f"nvme_path ({arguments.nvme_path}) is for DeepSpeed's optimizer state; add --deepspeed zero3_nvme, or "
            "leave --nvme_path out."
        )
    if arguments.max_duration_in_seconds < arguments.min_duration_in_seconds:
        problems.append(
            f"max_duration_in_seconds ({arguments.max_duration_in_seconds}) must be at least min_duration_in_seconds "
            f"({arguments.min_duration_in_seconds}); raise it or lower the minimum."
        )
    if arguments.max_batch_seconds is not None and arguments.max_batch_seconds < arguments.min_duration_in_seconds:
        problems.append(
            f"max_batch_seconds ({arguments.max_batch_seconds}) must be at least min_duration_in_seconds "
            f"({arguments.min_duration_in_seconds}), or no utterance fits; raise it or lower the minimum."
        )
    if arguments.pad_to_multiple_of is not None and not arguments.no_crop:
        problems.append(
            f"pad_to_multiple_of ({arguments.pad_to_multiple_of}) needs no_crop: batches that are cropped to one "
            "length have no padding; add --no_crop or leave --pad_to_multiple_of out."
        )
    seconds = arguments.max_batch_seconds or arguments.per_device_train_batch_size * arguments.max_duration_in_seconds
    if arguments.no_crop and (arguments.pad_to_multiple_of or 1) > seconds * 16_000:
        problems.append(
            f"pad_to_multiple_of ({arguments.pad_to_multiple_of}) must be at most a whole micro-batch ({seconds:g} "
            "s of 16,000 samples); lower it."
        )
    if arguments.max_gumbel_temperature < arguments.min_gumbel_temperature:
        problems.append(
            f"max_gumbel_temperature ({arguments.max_gumbel_temperature}) must be at least min_gumbel_temperature "
            f"({arguments.min_gumbel_temperature}); raise it or lower the minimum."
        )
    steps = arguments.max_train_steps
    if steps is not None and arguments.num_warmup_steps > steps:
        problems.append(
            f"num_warmup_steps ({arguments.num_warmup_steps}) must be at most max_train_steps ({steps}), or the peak "
            "learning rate is never reached; lower it or train longer."
        )
    return problems


def _data_conflicts(arguments: PretrainArguments) -> list[str]:
    problems = []
    configs, splits = arguments.dataset_config_names, arguments.dataset_split_names
    if configs is not None and splits is not None and len(configs) != len(splits):
        problems.append(
            f"dataset_config_names ({' '.join(configs)}) must be as many as dataset_split_names ({' '.join(splits)}): "
            "each configuration goes with the split in its place."
        )
    if (configs or splits) and arguments.dataset_name is not None and len(arguments.dataset_name) > 1:
        problems.append(
            f"dataset_config_names and dataset_split_names are for one data set, not {len(arguments.dataset_name)}; "
            "write --dataset_name NAME:CONFIG:SPLIT NAME:CONFIG:SPLIT instead."
        )
    if arguments.stats and not arguments.preprocessing_only:
        problems.append("stats (True) is for preparation; use trainer prepare --stats, or add --preprocessing_only.")
    return problems


def dump_recipe(arguments: PretrainArguments) -> str:
    """The resolved settings as a recipe that can be passed back with --config."""
    values = {
        name: value
        for name, value in dataclasses.asdict(arguments).items()
        if name not in ("config", "resume") and value is not None
    }
    return yaml.safe_dump(values, sort_keys=False)
