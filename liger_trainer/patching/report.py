"""What was replaced, what was left alone, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LeftAlone", "Replaced", "Report"]


@dataclass(frozen=True)
class Replaced:
    """One part that was replaced.

    Attributes:
        kind: the option that governs it, as ``"rms_norm"``.
        path: its name in ``model.named_modules()``.
        class_name: its class.
        kernel: what serves instead.
    """

    kind: str
    path: str
    class_name: str
    kernel: str


@dataclass(frozen=True)
class LeftAlone:
    """One part that resembles a known one and was left alone; ``reason`` says why."""

    kind: str
    path: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The result of :func:`liger_trainer.apply_liger_kernel` and :func:`liger_trainer.plan`.

    ``str(report)`` is a table, :meth:`line` a summary, :meth:`as_dict` ready for JSON.
    """

    replaced: tuple[Replaced, ...] = field(default=())
    skipped: tuple[LeftAlone, ...] = field(default=())

    def counts(self) -> dict[str, int]:
        """The number of replaced parts by kind."""
        return dict(Counter(entry.kind for entry in self.replaced))

    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        return {
            "replaced": [asdict(entry) for entry in self.replaced],
            "skipped": [asdict(entry) for entry in self.skipped],
        }

    def line(self) -> str:
        """One line: the number of replaced parts by kind, then what was left alone and why."""
        replaced = ", ".join(f"{count} {kind}" for kind, count in self.counts().items()) or "nothing"
        skipped = Counter((entry.kind, entry.class_name, entry.reason) for entry in self.skipped)
        reasons = "; ".join(
            f"{count} {kind} ({class_name}: {reason})" for (kind, class_name, reason), count in skipped.items()
        )
        return f"liger_trainer replaced {replaced}" + (f"; left alone {reasons}" if reasons else "")

    def __str__(self) -> str:
        rows = [("part", "class", "count", "result")]
        replaced = Counter((entry.kind, entry.class_name, entry.kernel) for entry in self.replaced)
        skipped = Counter((entry.kind, entry.class_name, entry.reason) for entry in self.skipped)
        rows += [(kind, name, str(count), f"replaced by {kernel}") for (kind, name, kernel), count in replaced.items()]
        rows += [(kind, name, str(count), f"left alone: {reason}") for (kind, name, reason), count in skipped.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)
