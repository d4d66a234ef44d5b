"""What was replaced, what was left alone, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LeftAlone", "Replaced", "Report", "dtype_names"]


@dataclass(frozen=True)
class Replaced:
    """One part that was replaced.

    Attributes:
        kind: the option that governs it, as ``"rms_norm"``.
        path: its name in ``model.named_modules()``.
        class_name: its class.
        kernel: what serves instead: a kernel, and in brackets which of its formulas.
        checked: the dtypes in which kernel and original were compared; empty where they were not.
        saves: how many bytes less are kept for the backward pass, or None where no batch was given.
    """

    kind: str
    path: str
    class_name: str
    kernel: str
    checked: tuple[str, ...] = ()
    saves: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class LeftAlone:
    """One part that resembles a known one and was left alone; ``reason`` says why."""

    kind: str
    path: str
    class_name: str
    reason: str


HEADER = ("part", "class", "count", "recognised as", "replaced by", "checked", "saves")


@dataclass(frozen=True)
class Report:
    """The result of :func:`liger_trainer.apply_liger_kernel` and :func:`liger_trainer.plan`.

    ``str(report)`` is a table, ``rich.print(report)`` one for the terminal, :meth:`line` a summary, :meth:`as_dict`
    ready for JSON.

    Attributes:
        replaced: the parts that are replaced.
        skipped: the parts that are left alone.
        batch, length: rows and tokens a row of the step that ``saves`` is about; None where none was given.
    """

    replaced: tuple[Replaced, ...] = field(default=())
    skipped: tuple[LeftAlone, ...] = field(default=())
    batch: int | None = field(default=None, compare=False)
    length: int | None = field(default=None, compare=False)

    def counts(self) -> dict[str, int]:
        """The number of replaced parts by kind."""
        return dict(Counter(entry.kind for entry in self.replaced))

    @property
    def saves(self) -> int | None:
        """How many bytes less a step keeps for its backward pass, over all parts; None where no batch was given.

        Without gradient checkpointing, which keeps the activations of one layer at a time.
        """
        known = [entry.saves for entry in self.replaced if entry.saves is not None]
        return sum(known) if known else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "replaced": [asdict(entry) for entry in self.replaced],
            "skipped": [asdict(entry) for entry in self.skipped],
            "batch": self.batch,
            "length": self.length,
            "saves": self.saves,
        }

    def line(self) -> str:
        """One line: the number of replaced parts by kind, then what was left alone and why."""
        replaced = ", ".join(f"{count} {kind}" for kind, count in self.counts().items()) or "nothing"
        skipped = Counter((entry.kind, entry.class_name, entry.reason) for entry in self.skipped)
        reasons = "; ".join(
            f"{count} {kind} ({class_name}: {reason})" for (kind, class_name, reason), count in skipped.items()
        )
        return f"liger_trainer replaced {replaced}" + (f"; left alone {reasons}" if reasons else "")

    def rows(self) -> list[tuple[str, ...]]:
        """The table's rows under :data:`HEADER`; parts that differ in nothing but their place share one."""
        grouped: dict[tuple[Any, ...], list[Replaced]] = {}
        for entry in self.replaced:
            grouped.setdefault((entry.kind, entry.class_name, entry.kernel, entry.checked), []).append(entry)
        rows: list[tuple[str, ...]] = []
        for (kind, name, kernel, checked), entries in grouped.items():
            saved = [entry.saves for entry in entries if entry.saves is not None]
            rows.append((kind, name, str(len(entries)), _formula(kernel), kernel.partition("(")[0],
                         ", ".join(checked) or "no", _bytes(sum(saved)) if saved else ""))  # fmt: skip
        skipped = Counter((entry.kind, entry.class_name, entry.reason) for entry in self.skipped)
        rows += [
            (kind, name, str(count), f"left alone: {reason}", "", "", "")
            for (kind, name, reason), count in skipped.items()
        ]
        return rows

    def _header(self) -> tuple[str, ...]:
        at = f" at {self.batch} x {self.length}" if self.batch is not None else ""
        return (*HEADER[:-1], HEADER[-1] + at)

    def __str__(self) -> str:
        columns = len(HEADER) - (self.saves is None)
        rows = [row[:columns] for row in (self._header(), *self.rows())]
        if self.saves is not None:
            rows.append(("", "", "", "", "", "together", _bytes(self.saves)))
        # What is left alone has a sentence where the others have columns.
        widths = [max(len(row[i]) for row in rows if row[4] or i < 3) for i in range(columns)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        columns = len(HEADER) - (self.saves is None)
        for name in self._header()[:columns]:
            table.add_column(name, justify="right" if name.startswith(("count", "saves")) else "left", overflow="fold")
        for row in self.rows():
            table.add_row(*row[:columns], style=None if row[4] else "dim")
        if self.saves is not None:
            table.add_row(*[""] * (columns - 2), "together", _bytes(self.saves), style="bold")
        return table


def _formula(kernel: str) -> str:
    name, _, details = kernel.partition("(")
    words = {
        "rms_norm": "RMS norm",
        "add_rms_norm": "residual and RMS norm",
        "layer_norm": "layer norm",
        "swiglu": "silu(gate) * up",
        "geglu": "gelu(gate) * up",
        "gelu": "GELU",
        "rotary": "rotary embedding",
        "linear_cross_entropy": "LM head and loss",
        "cross_entropy": "loss on logits",
    }.get(name, name)
    return words + (f" ({details}" if details else "")


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def dtype_names(dtypes: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
