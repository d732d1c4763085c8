"""What a planted bug is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Mutation:
    """One planted bug: in ``module``, ``old`` becomes ``new``.

    Rare ones are looked for with ``faults`` only, on three brokers, and with other fields of the profile set
    to what ``profile`` says.
    """

    name: str
    module: str
    old: str
    new: str
    faults: tuple[str, ...] = ()
    profile: Mapping[str, Any] = field(default_factory=dict)
