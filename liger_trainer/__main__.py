"""The command line.

``python -m liger_trainer plan MODEL``
    what would be replaced in a model, and what it saves; needs no weights.
``python -m liger_trainer env``
    versions, devices, what serves each op, and a self-test of every op on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    from .patching.options import Options

    parser = argparse.ArgumentParser(
        prog="python -m liger_trainer", description="Fused kernels for Hugging Face Trainer and TRL."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser(
        "env",
        help="versions, devices, what serves each op, and a self-test of every op",
        description="Print what a bug report needs to say of this machine, and test every op on it.",
    )
    env.add_argument("--no-test", action="store_true", help="leave out the self-test")
    command = commands.add_parser(
        "plan",
        help="what would be replaced in a model, and what that saves",
        description="Build a model without its weights and say what would be replaced in it, and what that saves.",
    )
    command.add_argument("model", help="a folder with a config.json, such a file, a model on the hub, or a model type")
    command.add_argument("--batch", type=int, default=1, help="rows of a training step (default: 1)")
    command.add_argument("--length", type=int, default=4096, help="tokens of a row (default: 4096)")
    command.add_argument("--dtype", default="bfloat16", help="dtype of the weights (default: bfloat16)")
    command.add_argument("--json", action="store_true", help="print JSON in place of a table")
    command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    for option in fields(Options):
        if option.type in ("bool", bool):
            name = f"--{option.name.replace('_', '-')}"
            command.add_argument(
                name, action=argparse.BooleanOptionalAction, default=option.default, dest=f"option_{option.name}"
            )
    return parser


def _config(name: str, trust_remote_code: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(name)
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        model_type = content.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"{name}: model_type must be one that transformers has, got {model_type!r}")
        return CONFIG_MAPPING[model_type].from_dict(content)
    if not path.exists() and name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]()
    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def _without_weights(config: Any, dtype: Any, trust_remote_code: bool) -> Any:
    import torch
    import transformers

    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    model_class = next((each for each in named if each is not None), None)
    with torch.device("meta"):
        if model_class is not None:
            return model_class._from_config(config, dtype=dtype)
        for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel"):
            auto_class = getattr(transformers, auto)
            if type(config) in auto_class._model_mapping or (trust_remote_code and hasattr(config, "auto_map")):
                return auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    raise ValueError(f"transformers has no model class for {type(config).__name__}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 where nothing would be replaced, or an op failed its self-test; 2 for bad input.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "env":
        from ._environment_report import print_environment

        return print_environment(test=not options.no_test)
    import torch
    import transformers

    from .patching import plan

    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        parser.error(f"--dtype must be a floating point dtype of torch, got {options.dtype!r}")
    transformers.logging.set_verbosity_error()
    switches = {n.removeprefix("option_"): v for n, v in vars(options).items() if n.startswith("option_")}
    if switches["cross_entropy"]:
        switches["fused_linear_cross_entropy"] = False
    try:
        with warnings.catch_warnings(action="ignore"):
            config = _config(options.model, options.trust_remote_code)
            model = _without_weights(config, dtype, options.trust_remote_code)
        report = plan(model, batch=options.batch, length=options.length, **switches)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if options.json:
        print(json.dumps({"model": type(model).__name__, **report.as_dict()}, indent=2))
        return 0 if report.replaced else 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {parameters / 1e9:.2f} billion parameters, {options.dtype}\n")
    _print(report)
    return 0 if report.replaced else 1


def _print(report: Any) -> None:
    try:
        import rich
    except ImportError:
        print(report)
        return
    if sys.stdout.isatty():
        rich.print(report)
    else:
        print(report)


if __name__ == "__main__":
    sys.exit(main())
