"""Hugging Face data sets: from the Hub, saved to disk, or as Parquet files.

`datasets` keeps a data set as Arrow files, where the bytes of an audio file lie in one piece. They are read from there
by offset and decoded by soundfile: neither `datasets` nor torchcodec is needed while training, and the order is free.
"""

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from trainer.data.rows import DataError, Listing, Request, Row, Source, Stamp, checked_row

_DEFAULT_SPLIT = "train"


class _Piece(NamedTuple):
    """Rows ``first`` to ``last`` of the Arrow files of one split, which are read one after the other."""

    files: list[str]
    first: int = 0
    last: int | None = None


def is_saved_dataset(folder: str) -> bool:
    """Whether ``save_to_disk`` wrote the folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def saved_source(request: Request) -> Source:
    """What ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote. Raises `DataError`."""
    folder = os.path.abspath(request.name)
    if request.config is not None:
        raise DataError(
            f"dataset_config_names ({request.config}) is for data sets of the Hub; {request.name} is one that was "
            "saved to disk; leave --dataset_config_names out."
        )
    splits = _saved_splits(folder)
    if splits is not None:
        folder = os.path.join(folder, _choose_split(request, splits))
    elif request.split is not None:
        raise DataError(f"dataset_split_names ({request.split}): {request.name} has no splits; leave the flag out.")
    try:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            files = [os.path.join(folder, each["filename"]) for each in json.load(file)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{request.flag} ({request.name}) cannot be read as a saved data set: {error}.") from error
    return _arrow_source(request, os.path.basename(folder), [_Piece(files)])


def _saved_splits(folder: str) -> list[str] | None:
    try:
        with open(os.path.join(folder, "dataset_dict.json"), encoding="utf-8") as file:
            return list(json.load(file)["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def parquet_source(request: Request, files: list[str]) -> Source:
    """Parquet files with a column of audio.

    Parquet compresses many rows together, so `datasets` first copies their bytes, still encoded, into an Arrow file in
    its cache.
    """
    paths = [os.path.abspath(file) for file in files]
    loaded = _load(request, "parquet", data_files=paths)
    return _arrow_source(request, os.path.splitext(os.path.basename(paths[0]))[0], _pieces(request, loaded))


def hub_source(request: Request) -> Source:
    """Whatever ``datasets.load_dataset(name, config)`` finds; the split may be a slice such as ``train[:10%]``."""
    loaded = _load(request, request.name, name=request.config)
    name = request.config or os.path.basename(os.path.abspath(request.name))
    label = f"{name}:{request.split}" if request.split else name
    return _arrow_source(request, label, _pieces(request, loaded))


def _load(request: Request, *words: str, **options: Any) -> Any:
    """All splits of the data set, as `datasets` has them in its cache. Raises `DataError`."""
    import datasets

    where = f"{request.flag} ({request.name})"
    try:
        return datasets.load_dataset(*words, cache_dir=request.cache_dir, **options)
    except FileNotFoundError as error:
        raise DataError(
            f"{where} is neither a file or folder here nor a data set of the Hub that can be reached: {_brief(error)}; "
            "check the name, the network and, for gated data, your token."
        ) from error
    except Exception as error:  # whatever its readers of CSV, zip, JSON and so on raise for files that are none
        said = _brief(error)
        if os.path.isdir(request.name) and ("torchcodec" in said or request.config is None):
            said = "" if "torchcodec" in said else f" (`datasets` says: {said})"
            raise DataError(
                f"dataset_split_names ({request.split}) must be a subfolder of {request.name} with audio files, or "
                f"{request.name} a data set with that split{said}; correct the name, or leave --dataset_split_names "
                "out."
            ) from error
        if "torchcodec" in said:
            raise DataError(
                f"{where} holds loose audio files, which `datasets` does not read without torchcodec; fetch them with "
                f"`hf download --repo-type dataset {request.name} --local-dir FOLDER` and give FOLDER."
            ) from error
        raise DataError(f"{where} cannot be loaded by `datasets`: {said}.") from error


def _brief(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:300].rstrip(".")


def _pieces(request: Request, loaded: Any) -> list[_Piece]:
    """Which rows of which files the split stands for; it may be several splits added up, or slices of them."""
    from datasets import ReadInstruction

    lengths = {split: data.num_rows for split, data in loaded.items()}
    split = request.split or _choose_split(request, list(lengths))
    try:
        wanted = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"dataset_split_names ({split}) must be a split of {request.name}, or a slice of one; there are "
            f"{', '.join(lengths)}."
        ) from error
    return [
        _Piece([file["filename"] for file in loaded[each.splitname].cache_files], each.from_ or 0, each.to)
        for each in wanted
    ]


def _choose_split(request: Request, splits: list[str]) -> str:
    split = request.split or (splits[0] if len(splits) == 1 else _DEFAULT_SPLIT)
    if split not in splits:
        raise DataError(
            f"dataset_split_names ({request.split or 'not set'}) must name a split of {request.name}; there are "
            f"{', '.join(splits)}."
        )
    return split


def _arrow_source(request: Request, label: str, pieces: list[_Piece]) -> Source:
    stamps = []
    for file in dict.fromkeys(file for piece in pieces for file in piece.files):
        try:
            status = os.stat(file)
        except OSError as error:
            raise DataError(f"{request.flag} ({request.name}) lacks its file {file}: {error.strerror}.") from error
        stamps.append(Stamp(file, status.st_size, status.st_mtime_ns))
    identity = ["arrow", request.audio_column, str(request.language_column)]
    identity += [f"{piece.files}[{piece.first}:{piece.last}]" for piece in pieces]
    root = os.path.dirname(stamps[0].path) if stamps else ""

    def read() -> Listing:
        containers = {stamp.path: number for number, stamp in enumerate(stamps)}
        rows = [row for piece in pieces for row in _piece_rows(request, piece, containers, stamps)]
        return Listing(rows, list(containers))

    return Source(request.name, label, root, " ".join(identity), stamps, read)


def _piece_rows(request: Request, piece: _Piece, containers: dict[str, int], stamps: list[Stamp]) -> Iterator[Row]:
    seen = 0
    for file in piece.files:
        number = containers[file]
        for row in _file_rows(request, file, number, stamps[number].mtime_ns):
            if seen >= piece.first and (piece.last is None or seen < piece.last):
                yield row
            seen += 1


def _file_rows(request: Request, file: str, container: int, mtime_ns: int) -> Iterator[Row]:
    """The rows of one Arrow stream file, each with the place of its bytes in the file."""
    try:
        whole = pa.memory_map(file)
        content = whole.read_buffer(whole.size())
        batches = pa.ipc.open_stream(content)
        for batch in batches:
            yield from _batch_rows(request, batch, content, container, mtime_ns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{request.flag} ({request.name}): {file} is not an Arrow file: {error}.") from error


def _batch_rows(
    request: Request, batch: pa.RecordBatch, content: pa.Buffer, container: int, mtime_ns: int
) -> Iterator[Row]:
    column = _column(request, batch, request.audio_column, "audio_column_name")
    languages = _languages(request, batch)
    encoded, paths = _encoded_and_paths(request, column)
    offsets = None if encoded is None else _offsets(request, encoded, content)  # [N + 1]
    for position in range(len(column)):
        path = paths[position].as_py() if paths is not None else None
        language = languages[position] if languages is not None else None
        if encoded is not None and offsets is not None and encoded[position].is_valid:
            start, stop = int(offsets[position]), int(offsets[position + 1])
            yield checked_row(Row(path or f"at {start}", container, start, stop - start, mtime_ns, language))
        elif path:
            yield checked_row(Row(path, language=language))
        else:
            yield Row("(no audio)", container, mtime_ns=mtime_ns, language=language, reason="no audio in the row")


def _column(request: Request, batch: pa.RecordBatch, name: str, flag: str) -> pa.Array:
    if name not in batch.schema.names:
        raise DataError(
            f"{flag} ({name}) must be a column of {request.name}; there are {', '.join(batch.schema.names)}."
        )
    return batch.column(name)


def _encoded_and_paths(request: Request, column: pa.Array) -> tuple[pa.Array | None, pa.Array | None]:
    """The bytes and the paths that a column of audio holds, whichever there are."""
    kind = column.type
    if pa.types.is_struct(kind):
        names = {field.name for field in kind}
        if "bytes" in names or "path" in names:
            return tuple(column.field(name) if name in names else None for name in ("bytes", "path"))  # type: ignore[return-value]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column, None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return None, column
    raise DataError(
        f"audio_column_name ({request.audio_column}) must be a column of audio, of encoded bytes or of paths; in "
        f"{request.name} it is {kind}."
    )


def _offsets(request: Request, encoded: pa.Array, content: pa.Buffer) -> Any:
    """Where each value starts in the file, and the end of the last, int64 [N + 1]; None where there are no bytes."""
    _, starts, data = encoded.buffers()
    if data is None or data.size == 0:
        return None
    wide = pa.types.is_large_binary(encoded.type) or pa.types.is_large_string(encoded.type)
    offsets = np.frombuffer(starts, np.int64 if wide else np.int32)[encoded.offset :][: len(encoded) + 1]
    position = data.address - content.address
    if not 0 <= position < content.size:
        raise DataError(f"{request.flag} ({request.name}) is a compressed Arrow file; save it without compression.")
    return offsets.astype(np.int64) + position


def _languages(request: Request, batch: pa.RecordBatch) -> list[str | None] | None:
    if request.language_column is None:
        return None
    values = _column(request, batch, request.language_column, "language_column_name").to_pylist()
    names = _class_names(batch.schema, request.language_column)
    return [None if value is None else str(names[value] if names else value) for value in values]


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Names behind the integers of a ``ClassLabel`` column, which `datasets` notes in the schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return list(features[column]["names"])
    except (TypeError, KeyError, ValueError):
        return None
