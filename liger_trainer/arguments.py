"""Training arguments with ``use_liger`` and ``liger_config``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers

from . import callback as _callback  # noqa: F401  puts the callback that reads these fields into Trainer's defaults
from ._config import reject_liger_kernel, resolve_liger_config

__all__ = ["LigerArguments", "TrainingArguments"]


@dataclass
class LigerArguments:
    """The two fields that liger_trainer adds to a Trainer's arguments, as a mixin.

    Put it before any subclass of ``transformers.TrainingArguments``, TRL's configs included:

    ```python
    @dataclass
    class MyConfig(LigerArguments, SFTConfig): ...
    ```

    Arguments with ``use_liger=True`` patch the model of every Trainer that gets them, transformers' and TRL's own
    included.

    Attributes:
        use_liger: patch the model with liger_trainer's kernels.
        liger_config: keyword options for :func:`liger_trainer.apply_liger_kernel`. A mapping, a JSON object as a
            string, or the path of a JSON or YAML file; after construction a dict with the options that were given, or
            None.

    Raises:
        ValueError: `liger_config` is text that does not parse, or a path that is not a file; ``use_liger`` goes
            together with transformers' ``use_liger_kernel``.
        TypeError: `liger_config` has an unknown option, or an option's value has the wrong type.
    """

    use_liger: bool = field(
        default=False,
        metadata={"help": "Replace the model's norms, MLPs, rotary embeddings and loss by liger_trainer's kernels."},
    )
    # `dict | str | None` in this order is the spelling that HfArgumentParser reads as "a string on the command line".
    liger_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Options of liger_trainer.apply_liger_kernel, as a JSON object ('{\"rope\": false}') or the "
            "path of a JSON or YAML file."
        },
    )

    def __post_init__(self) -> None:
        if self.liger_config is not None:
            self.liger_config = resolve_liger_config(self.liger_config)
        if self.use_liger:
            reject_liger_kernel(self)
        post_init = getattr(super(), "__post_init__", None)
        if post_init is not None:
            post_init()

    def liger_options(self) -> dict[str, Any] | None:
        """Keyword options for :func:`liger_trainer.apply_liger_kernel`, or None if ``use_liger`` is off.

        Reads the fields as they are now, so that they may be set after construction.
        """
        return resolve_liger_config(self.liger_config) if self.use_liger else None


@dataclass
class TrainingArguments(LigerArguments, transformers.TrainingArguments):
    """``transformers.TrainingArguments`` with :class:`LigerArguments`' two fields.

    Example:
        ``TrainingArguments("out", use_liger=True, liger_config={"rope": False})``
    """
