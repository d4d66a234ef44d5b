"""``apply_liger_kernel_to_llama`` and its siblings: one function for every model type that transformers knows.

Called with a model, such a function patches it. Called without, it registers the type: every model of the type that is
made from then on is patched at the end of its ``__init__``, before its weights are loaded, until
``revert("llama")`` takes the registration back. Only then are classes of transformers touched, their ``__init__``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .._logging import logger
from .apply import apply_liger_kernel
from .options import Options

__all__ = ["PREFIX", "apply_to", "function_names", "registered_types", "unregister"]

PREFIX = "apply_liger_kernel_to_"

# Options under the names that users of other packages know.
SYNONYMS = {"swiglu": "mlp", "geglu": "mlp"}


def _key(model_type: str) -> str:
    return model_type.replace("-", "_").replace(".", "_")


@functools.cache
def _types() -> dict[str, str]:
    return {_key(model_type): model_type for model_type in CONFIG_MAPPING_NAMES}


def function_names() -> list[str]:
    """The names of all functions, sorted."""
    return sorted(PREFIX + key for key in _types())


@functools.cache
def apply_to(name: str) -> Callable[..., Any]:
    """The function of this name.

    Raises:
        AttributeError: name is none of :func:`function_names`.
    """
    model_type = _types().get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if model_type is None:
        raise AttributeError(f"{name!r}: transformers has no model type {name.removeprefix(PREFIX)!r}")

    def apply_liger_kernel_to(model: nn.Module | None = None, **options: Any) -> Any:
        for synonym, option in SYNONYMS.items():
            if synonym in options:
                value = options.pop(synonym)
                if options.setdefault(option, value) != value:
                    raise ValueError(f"{synonym}={value!r} and {option}={options[option]!r} contradict each other")
        if model is None:
            _register(model_type, options)
            return None
        _check_type(model, model_type)
        return apply_liger_kernel(model, **options)

    apply_liger_kernel_to.__name__ = apply_liger_kernel_to.__qualname__ = name
    apply_liger_kernel_to.__doc__ = f"""Patch a {model_type} model, or every one that is made from now on.

    Args:
        model: a model of type {model_type!r}, or one that holds such a model; None to register the type, which
            ``liger_trainer.revert({model_type!r})`` takes back.
        **options: as for :func:`liger_trainer.apply_liger_kernel`; ``swiglu`` and ``geglu`` mean ``mlp``.

    Returns:
        The report of :func:`liger_trainer.apply_liger_kernel`; None where a type was registered.

    Raises:
        TypeError, ValueError: as :func:`liger_trainer.apply_liger_kernel`; model is of another type, or the type has no
            model class.
    """
    return apply_liger_kernel_to


def _check_type(model: nn.Module, model_type: str) -> None:
    found = []
    for module in model.modules() if isinstance(model, nn.Module) else ():
        config = getattr(module, "config", None)
        name = getattr(config, "model_type", None)
        if name in (model_type, f"{model_type}_text") or model_type == f"{name}_text":
            return
        if name is not None and name not in found:
            found.append(name)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    raise ValueError(f"model must be of type {model_type!r}, got {type(model).__name__} of {found or 'no type'}")


@dataclass
class _Registration:
    options: dict[str, Any]
    restore: list[Callable[[], None]] = field(default_factory=list)


_registrations: dict[str, _Registration] = {}
_building = threading.local()


def registered_types() -> list[str]:
    """The types whose later models are patched."""
    return list(_registrations)


def unregister(model_type: str) -> None:
    """Leave later models of this type alone again; those that exist stay as they are.

    Args:
        model_type: as ``"llama"``. Without effect where it is not registered.

    Raises:
        ValueError: transformers has no such type.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(f"model type must be one that transformers has, got {model_type!r}")
    registration = _registrations.pop(model_type, None)
    for restore in registration.restore if registration is not None else ():
        restore()


def _register(model_type: str, options: dict[str, Any]) -> None:
    Options.parse(options)
    unregister(model_type)
    registration = _Registration(options)
    classes = list(_classes(model_type))
    if not classes:
        raise ValueError(
            f"transformers has no model class for {model_type!r} of its own; models that are loaded under this name "
            "are of another type, which can be registered, or can be patched once they exist"
        )
    for model_class in classes:
        registration.restore.append(_patch_after_init(model_class, registration))
    _registrations[model_type] = registration


def _classes(model_type: str) -> Iterator[type[PreTrainedModel]]:
    """Every model class that an Auto class makes of the type."""
    config_class = CONFIG_MAPPING[model_type]
    seen = set()
    for name, mapping in vars(modeling_auto).items():
        if not (name.startswith("MODEL_") and name.endswith("MAPPING")):
            continue
        if config_class not in mapping:
            continue
        found = mapping[config_class]
        for model_class in found if isinstance(found, tuple) else (found,):
            if model_class not in seen and getattr(model_class.config_class, "model_type", None) == model_type:
                seen.add(model_class)
                yield model_class


def _patch_after_init(model_class: Any, registration: _Registration) -> Callable[[], None]:
    """Patch what model_class makes, and return what undoes that."""
    own = vars(model_class).get("__init__")
    original = model_class.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        depth = getattr(_building, "depth", 0)
        _building.depth = depth + 1
        try:
            original(self, *args, **kwargs)
        finally:
            _building.depth = depth
        if depth == 0:  # not a model inside a model that will be patched as a whole
            try:
                apply_liger_kernel(self, **registration.options)
            except ValueError as error:
                logger.warning("%s is left alone: %s", type(self).__name__, error)

    model_class.__init__ = __init__

    def restore() -> None:
        if model_class.__init__ is not __init__:
            return  # wrapped by someone else since, who keeps a reference to this one
        if own is None:
            del model_class.__init__
        else:
            model_class.__init__ = own

    return restore
