"""Results as JSON: one file an op and device, rewritten after every row."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["Record", "device_name", "device_slug", "versions"]

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl", "cut-cross-entropy", "nvidia-cutlass-dsl")

Row = dict[str, Any]


def device_name(device: torch.device) -> str:
    """The device's name as its driver gives it, such as "NVIDIA H100 80GB HBM3"; "CPU" for a CPU."""
    return "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def device_slug(name: str) -> str:
    """A device's name for file names: "NVIDIA H100 80GB HBM3" becomes "h100", "CPU" "cpu"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return next((word for word in words if re.search(r"\d", word)), words[-1])


def versions() -> dict[str, str]:
    """Versions of the packages that are compared, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build, such as +cu130
    return found


def key(row: Row) -> tuple[Any, ...]:
    return row["provider"], row["dtype"], *sorted(row["shape"].items())


@dataclass
class Record:
    """A benchmark's rows on one device, and what they were measured with."""

    benchmark: str
    device: str
    versions: dict[str, str]
    copy_bandwidth_gb_s: float | None = None
    date: str = field(default_factory=lambda: date.today().isoformat())
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Record:
        return cls(**json.loads(path.read_text()))

    @classmethod
    def open(cls, folder: Path, benchmark: str, device: torch.device | str) -> tuple[Record, Path]:
        """The record to add rows to, and its path: a stored one if it has the same device and versions, else empty.

        ``device``: a device of this process, or the name of one, as :func:`device_name` gives it.
        """
        name = device if isinstance(device, str) else device_name(device)
        path = folder / f"{benchmark}_{device_slug(name)}.json"
        fresh = cls(benchmark, name, versions())
        if not path.exists():
            return fresh, path
        stored = cls.load(path)
        if (stored.device, stored.versions) != (fresh.device, fresh.versions):
            print(f"{path} has another device or other versions; its rows will be replaced", file=sys.stderr)
            return fresh, path
        stored.date = fresh.date
        return stored, path

    def add(self, row: Row) -> None:
        """Add a row, in the place of one of the same provider, dtype and shape."""
        for i, other in enumerate(self.rows):
            if key(other) == key(row):
                self.rows[i] = row
                return
        self.rows.append(row)

    def save(self, path: Path) -> None:
        """Write the file in one step: who reads it, or kills the run, never meets half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {name: value for name, value in vars(self).items() if name != "rows"}
        rows = ",\n    ".join(json.dumps(row) for row in self.rows)  # a line a row, for diffs
        text = json.dumps(head, indent=2)[:-2] + f',\n  "rows": [\n    {rows}\n  ]\n}}\n'
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)
