"""Recognising the parts of a model, replacing them by kernels, checking the replacement, and undoing it."""

from .apply import apply_liger_kernel, is_patched, plan, revert
from .options import Options
from .report import LeftAlone, Replaced, Report

__all__ = ["LeftAlone", "Options", "Replaced", "Report", "apply_liger_kernel", "is_patched", "plan", "revert"]
