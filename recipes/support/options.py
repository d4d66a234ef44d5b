"""Options from a YAML file and the command line: the command line wins."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, what it takes, and its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {action.metavar or _kind(action)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.nargs != 0 and action.default not in (None, "", argparse.SUPPRESS):
            text += f" [{str(action.default).replace('%', '%%')}]"
        return text


def _kind(action: argparse.Action) -> str:
    if action.choices is not None:
        names = [str(choice) for choice in action.choices]
        return "{" + ",".join(names) + "}" if len(names) <= 6 else "NAME"
    return {int: "N", float: "X"}.get(action.type, "true|false" if isinstance(action.default, bool) else "TEXT")  # type: ignore[call-overload]


def parse_options(
    option_types: Sequence[type],
    default_config: Path,
    argv: Sequence[str] | None = None,
    *,
    description: str,
    examples: str,
    shown: Collection[str],
    defaults: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Make one object of each dataclass from the command line, over a YAML file, over the dataclass's defaults.

    Args:
        option_types: dataclasses as `transformers.HfArgumentParser` takes them. Those with ``_argument_group_name``
            are shown under that heading.
        default_config: the file that serves when ``--config`` names no other.
        argv: the command line without the program's name, ``None`` for ``sys.argv``.
        description: what ``--help`` says first.
        examples: what ``--help`` says last.
        shown: of the options outside any named group, those that ``--help`` shows, in that order; ``--help_all``
            shows all.
        defaults: values between the file and the dataclass's own defaults.

    Raises:
        SystemExit: a file that isn't there or isn't a mapping, an unknown option on the command line or in the file:
            with a message that names it, and the nearest known name.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        option_types,
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        description=description,
        epilog=examples,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", default=str(default_config), help="YAML file of options, by the names below."
    )
    parser.add_argument("--help_all", action="help", help="Show every option of the training arguments as well.")
    _arrange_help(parser, shown, hide_others="--help_all" not in argv)
    known = {action.dest for action in parser._actions}

    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--config", default=str(default_config))
    config = Path(chooser.parse_known_args(argv)[0].config)
    values = _read_config(parser, config)
    for name in values:
        if name not in known:
            parser.error(f"{config}: unknown option {name!r}{_nearest(name, known)}")
    parser.set_defaults(**{**(defaults or {}), **values})

    *objects, _, remaining = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if remaining:
        name = remaining[0].partition("=")[0].lstrip("-").replace("-", "_")
        parser.error(f"unknown option {remaining[0]}{_nearest(name, known)}")
    return tuple(objects)


def _read_config(parser: argparse.ArgumentParser, config: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    except OSError as error:
        parser.error(f"--config {config}: {error.strerror}")
    except yaml.YAMLError as error:
        parser.error(f"--config {config} is not YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {config} must hold `option: value` lines, not a {type(values).__name__}")
    return values


def _nearest(name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _arrange_help(parser: argparse.ArgumentParser, shown: Collection[str], hide_others: bool) -> None:
    """Move the training arguments behind the recipe's own groups, those in `shown` first."""
    order = {name: place for place, name in enumerate(shown)}
    general = parser._optionals._group_actions
    training = [action for action in general if action.dest not in ("help", "help_all", "config")]
    general[:] = [action for action in general if action not in training]
    group = parser.add_argument_group("training")
    group._group_actions.extend(sorted(training, key=lambda action: order.get(action.dest, len(order))))
    for action in parser._actions:
        negation = action.option_strings and action.option_strings[0].startswith("--no_")
        if negation or (hide_others and action in training and action.dest not in order):
            action.help = argparse.SUPPRESS
