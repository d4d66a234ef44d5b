"""``AutoLigerKernelForCausalLM`` and its siblings: transformers' Auto classes whose models come patched.

There is one for every ``AutoModelFor...`` of transformers: ``AutoLigerKernelFor...``.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import transformers

from ._logging import logger
from .patching import apply_liger_kernel
from .patching.options import Options

__all__ = ["PREFIX", "AutoLigerKernelForCausalLM", "auto_class"]

PREFIX = "AutoLigerKernelFor"


@functools.cache
def auto_class(name: str) -> Any:
    """The class of this name, ``AutoLigerKernelFor...``.

    Raises:
        AttributeError: transformers has no ``AutoModelFor...`` of that name.
    """
    stock = getattr(transformers, name.replace("AutoLigerKernel", "AutoModel", 1), None)
    if not name.startswith(PREFIX) or stock is None:
        raise AttributeError(f"transformers has no {name.replace('AutoLigerKernel', 'AutoModel', 1)}")

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        options, rest = _split(kwargs)
        return _patched(stock.from_pretrained(pretrained_model_name_or_path, *model_args, **rest), options)

    def from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        options, rest = _split(kwargs)
        return _patched(stock.from_config(config, **rest), options)

    documentation = f"""``transformers.{stock.__name__}`` whose models come patched.

    ``from_pretrained`` and ``from_config`` take the options of :func:`liger_trainer.apply_liger_kernel` beside their
    own arguments (``{name}.from_pretrained(path, rope=False)``). A model without a part that can be replaced
    is returned as it is, with a warning.
    """
    return type(
        name,
        (stock,),
        {
            "__doc__": documentation,
            "__module__": __name__,
            "from_pretrained": classmethod(functools.wraps(stock.from_pretrained.__func__)(from_pretrained)),
            "from_config": classmethod(functools.wraps(stock.from_config.__func__)(from_config)),
        },
    )


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options among kwargs, checked before anything is loaded, and the rest."""
    known = {each.name for each in fields(Options)}
    options = {name: value for name, value in kwargs.items() if name in known}
    Options.parse(options)
    return options, {name: value for name, value in kwargs.items() if name not in known}


def _patched(loaded: Any, options: dict[str, Any]) -> Any:
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
    try:
        apply_liger_kernel(model, **options)
    except ValueError as error:
        logger.warning("%s is left as it is: %s", type(model).__name__, error)
    return loaded


AutoLigerKernelForCausalLM = auto_class("AutoLigerKernelForCausalLM")


def __getattr__(name: str) -> Any:
    return auto_class(name)
