"""`trainer prepare`: build the index of the audio, and say what is in it."""

import sys

from trainer.arguments import PretrainArguments
from trainer.data.frames import WAV2VEC2_GEOMETRY
from trainer.data.stats import describe_index
from trainer.run.corpus import describe, list_skipped, open_corpus, open_sources

_EXIT_DONE = 0


def prepare(arguments: PretrainArguments) -> int:
    """Index the audio that the flags name; with `--stats` print hours, lengths and languages. Raises `UserError`."""
    flags = ["dataset_name"] + ["validation_dataset_name"] * (arguments.validation_dataset_name is not None)
    for flag in flags:
        index, skipped = open_sources(arguments, flag, progress=True)
        if skipped:
            print(f"files of {flag} that cannot be used: {list_skipped(arguments, flag, skipped)}", file=sys.stderr)
        if arguments.stats:
            print(f"{flag}: {' '.join(getattr(arguments, flag))}\n{describe_index(index)}")
    corpus = open_corpus(arguments, WAV2VEC2_GEOMETRY, progress=True)
    print(describe(corpus), file=sys.stderr)
    for flag in ("train_cache_file_name", "validation_cache_file_name"):
        if getattr(arguments, flag) is not None:
            print(f"{flag} is not used: audio is not cached, and its index is in --cache_dir", file=sys.stderr)
    return _EXIT_DONE
