"""The tensors of a checkpoint folder, memory-mapped: nothing is read from disk before it is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.weights.headers import TensorInfo, read_checkpoint_headers

Range = tuple[int, int]


class CheckpointReader:
    """Gives the tensors of a checkpoint folder by their checkpoint names.

    Opening reads and checks the headers only (`read_checkpoint_headers` says what is refused, and how). Shards are
    mapped at their first use. Use it as a context manager; tensors stay valid after `close`.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.format, tensors = read_checkpoint_headers(self.folder)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self._open_files: dict[Path, Any] = {}

    @property
    def files(self) -> set[Path]:
        """The files that hold tensors."""
        return {info.file for info in self.tensors.values()}

    def read(self, name: str, axis: int = 0, span: Range | None = None) -> Tensor:
        """A tensor as it is stored, or its part [begin, end) along `axis`. It aliases the mapped file: never write.

        name: must be in `tensors`.
        Raises CheckpointError naming the file if it has become unreadable since it was opened.
        """
        info = self.tensors[name]
        try:
            file = self._file(info)
            if span is None:
                return file.get_tensor(name)
            return file.get_slice(name)[(*(slice(None) for _ in range(axis)), slice(*span))]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {error}", field=name) from error

    def close(self) -> None:
        """Let go of the files. Tensors that alias a mapping keep it alive by themselves."""
        self._open_files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, info: TensorInfo) -> Any:
        if info.file not in self._open_files:
            self._open_files[info.file] = safe_open(os.fspath(info.file), framework="pt")
        return self._open_files[info.file]
