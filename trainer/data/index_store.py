"""The index of one source as a file: columns that are mapped into memory, not read."""

import json
import mmap
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.data.audio import ByteRange, Place

SCHEMA = pa.schema(
    [
        pa.field("name", pa.large_string()),
        pa.field("container", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("num_samples", pa.int64()),
        pa.field("language", pa.int16()),
        pa.field("reason", pa.string()),
    ]
)
"""A row for each utterance, 50 bytes beside its name: see `rows.Row`.

`num_samples` counts at 16 kHz and is 0 for rows that cannot be used, which have a `reason`; `language` is a number in
the list of names, or -1.
"""


class IndexFile:
    """One index, mapped into memory: what is not looked at costs nothing, and processes share what is."""

    def __init__(self, path: str) -> None:
        """Raises `OSError` or `pa.ArrowException` where there is no such index or it is damaged."""
        self._file = open(path, "rb")  # noqa: SIM115 (lives as long as the mapping, see __reduce__)
        self._mapped = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        self.table = pa.ipc.open_file(pa.py_buffer(self._mapped)).read_all()
        if self.table.schema.remove_metadata() != SCHEMA or self.table.column(0).num_chunks > 1:
            raise pa.ArrowInvalid("not an index of this version")
        self.header: dict[str, Any] = json.loads(self.table.schema.metadata[b"index"])
        self.num_samples: npt.NDArray[np.int64] = self._column("num_samples")
        self.languages: npt.NDArray[np.int16] = self._column("language")
        self.usable = np.flatnonzero(self.num_samples)

    def __reduce__(self) -> tuple[type["IndexFile"], tuple[str]]:
        # Another run may replace the file. Loader processes get the one that this process has open.
        return IndexFile, (f"/proc/{os.getpid()}/fd/{self._file.fileno()}",)

    def __len__(self) -> int:
        return len(self.num_samples)

    def _column(self, name: str) -> npt.NDArray[Any]:
        column: npt.NDArray[Any] = self.table[name].to_numpy()
        return column

    def place(self, row: int) -> Place:
        """Where the bytes of one row are."""
        container = self.table["container"][row].as_py()
        root: str = self.header["root"]
        if container < 0:
            return os.path.join(root, self.table["name"][row].as_py())
        path = os.path.join(root, self.header["containers"][container])
        return ByteRange(path, self.table["offset"][row].as_py(), self.table["length"][row].as_py())

    def shown(self, row: int) -> str:
        """The row for a person: its path, or container and name."""
        place, name = self.place(row), self.table["name"][row].as_py()
        return place if isinstance(place, str) else f"{place.path}:{name}"

    def reasons(self) -> list[tuple[int, str]]:
        """The rows that cannot be used, each with why."""
        reason = self.table["reason"].combine_chunks()
        rows = np.flatnonzero(self.num_samples == 0).tolist()
        return [(row, reason[row].as_py()) for row in rows]


def write_index(path: Path, columns: dict[str, pa.Array], header: dict[str, Any]) -> None:
    """Write an index that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = SCHEMA.with_metadata({"index": json.dumps(header)})
    # Where a file system cannot lock, processes of several machines may be at it.
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    batch = pa.record_batch([columns[field.name] for field in SCHEMA], schema=schema)
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(batch)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
