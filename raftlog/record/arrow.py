"""numpy and pyarrow for those who import them, and a word of what to install where they are missing."""

from __future__ import annotations

from typing import TypeAlias

from raftlog.errors import ConfigError

try:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
except ImportError as error:
    raise ConfigError(
        f"Arrow columns need pyarrow and numpy ({error}): pip install 'raftlog[data]'"
    ) from error

__all__ = ["Booleans", "Bytes", "Column", "Integers", "Unsigned", "np", "npt", "pa"]

Integers: TypeAlias = npt.NDArray[np.int64]
Unsigned: TypeAlias = npt.NDArray[np.uint64]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Booleans: TypeAlias = npt.NDArray[np.bool_]
Column: TypeAlias = pa.Array | pa.ChunkedArray | npt.NDArray[np.generic]
"""Keys or values of many records."""
