"""What a run asks for: ``liger_config`` in its several spellings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .patching.options import Options

__all__ = ["reject_liger_kernel", "resolve_liger_config"]


def resolve_liger_config(value: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    """Read and check a ``liger_config``.

    Args:
        value: a mapping from option to value, a JSON object as a string, the path of a JSON or YAML file that holds
            one, or None for the defaults.

    Returns:
        The options given, in a dict of their own; options left out keep ``apply_liger_kernel``'s defaults.

    Raises:
        TypeError: not a mapping, an unknown option, or a value of the wrong type.
        ValueError: text that does not parse, a path that is not a file, or options that exclude each other.
    """
    config = _read(os.fspath(value)) if isinstance(value, str | os.PathLike) else value
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        raise TypeError(
            f"liger_config: expected a mapping from option to value, got {config!r} ({type(config).__name__})"
        )
    config = dict(config)
    try:
        Options.parse(config)
    except (TypeError, ValueError) as error:
        raise type(error)(f"liger_config={config!r}: {error}") from None
    return config


def reject_liger_kernel(args: Any) -> None:
    """Raise ValueError if `args` switches transformers' Liger-Kernel integration on: it replaces the same modules."""
    if getattr(args, "use_liger_kernel", False):
        raise ValueError(
            "use_liger_kernel=True has transformers patch the model with the package liger-kernel, and liger_trainer "
            "is asked to patch the same modules: set use_liger_kernel=False, or leave out use_liger and LigerCallback"
        )


def _read(text: str) -> Any:
    if text.lstrip().startswith("{"):
        source, is_json = text, True
    else:
        path = Path(text).expanduser()
        if not path.is_file():
            raise ValueError(
                f"liger_config={text!r} is neither a JSON object, such as '{{\"rope\": false}}', nor the path of a "
                "JSON or YAML file"
            )
        source, is_json = path.read_text(encoding="utf-8"), path.suffix.lower() == ".json"
    try:
        return json.loads(source) if is_json else yaml.safe_load(source)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"liger_config={text!r} does not parse: {error}") from error
