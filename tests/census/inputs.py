"""Batches for a model of any type: tokens, and, where the type looks at images, images in the form that it takes.

Without its processor nothing says how a model wants its images, so the few forms that exist are tried in turn: the one
that the model's vision tower takes is right, and the number of features that come out is the number of placeholder
tokens that the text needs.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .configs import IMAGE, PATCH, VOCAB

__all__ = ["image_batch", "text_batch"]

ROWS, LENGTH = 2, 16
HIGHEST_TEXT_TOKEN = 150  # what lies above is special tokens


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _tokens(length: int) -> Tensor:
    return torch.randint(5, HIGHEST_TEXT_TOKEN, (ROWS, length), generator=_generator())


def text_batch(model: nn.Module) -> dict[str, Any]:
    """Token ids (2, 16) and labels, of which the first three of a row are ignored."""
    input_ids = _tokens(LENGTH)
    labels = input_ids.clone()
    labels[:, :3] = -100
    codebooks = getattr(model.config, "num_codebooks", None)
    if type(model).__name__.startswith("Musicgen"):
        audio = torch.randint(5, HIGHEST_TEXT_TOKEN, (ROWS, LENGTH, codebooks), generator=_generator())
        return {"input_ids": audio.transpose(1, 2).reshape(ROWS * codebooks, LENGTH), "labels": audio}
    batch = {"input_ids": input_ids, "labels": labels}
    takes = inspect.signature(type(model).forward).parameters
    if "bbox" in takes:
        batch["bbox"] = torch.rand(ROWS, LENGTH, 2, generator=_generator()).repeat(1, 1, 2)
    if type(model).__name__.startswith("Molmo"):  # demanded in training, also of a text
        batch["mm_token_type_ids"] = torch.zeros_like(input_ids)
    return batch


def _images(model: nn.Module) -> Iterator[dict[str, Any]]:
    config = model.config
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)
    size, patch = (
        _int(getattr(vision, name, None), default) for name, default in (("image_size", IMAGE), ("patch_size", PATCH))
    )
    channels = next(
        (v for n in ("in_channels", "num_channels", "in_chans") if isinstance(v := getattr(vision, n, None), int)), 3
    )
    frames = _int(getattr(vision, "temporal_patch_size", None), 1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=_generator())

    plain = noise(ROWS, channels, size, size)
    sizes = torch.tensor([[size, size]] * ROWS)
    grid = torch.tensor([[1, 4, 4]] * ROWS)
    n = size // patch
    yield from (
        {"pixel_values": plain},
        {"pixel_values": noise(ROWS * 16, channels * frames * patch**2), "image_grid_thw": grid},
        {"pixel_values": noise(ROWS * 16, channels * patch**2), "image_grid_thw": grid},
        {"pixel_values": noise(ROWS * 16, channels, patch, patch), "image_grid_thw": grid},
        {"pixel_values": noise(ROWS * 16, channels * patch**2), "image_grid_hws": grid[:, 1:]},
        {"pixel_values": plain, "image_sizes": sizes},
        {"pixel_values": noise(ROWS, 1, channels, size, size)},
        {"pixel_values": noise(ROWS, 3, channels, size, size), "image_sizes": sizes * torch.tensor([1, 2])},
        {"pixel_values": noise(ROWS, 2, channels, size, size), "image_sizes": sizes},
        {
            "pixel_values": noise(ROWS, n * n, channels * patch**2),
            "spatial_shapes": torch.tensor([[n, n]] * ROWS),
            "pixel_attention_mask": torch.ones(ROWS, n * n, dtype=torch.long),
        },
        {
            "pixel_values": noise(ROWS, n * n, channels * patch**2),
            "image_position_ids": torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="xy"), dim=-1)
            .reshape(1, n * n, 2)
            .repeat(ROWS, 1, 1),
        },
        {
            "pixel_values": noise(ROWS * 16, channels * frames * patch**2),
            "image_grid_thw": grid,
            "image_merge_sizes": torch.tensor([2] * ROWS),
        },
        {"flattened_patches": torch.cat([torch.ones(ROWS, 9, 2), noise(ROWS, 9, channels * patch**2)], -1)},
    )


def _int(value: Any, default: int) -> int:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _count(features: Any) -> int | None:
    """How many feature vectors an image gives, from what ``get_image_features`` returns."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, (tuple, list)):
        counts = [_count(each) for each in features]
        return None if None in counts or not counts else sum(counts)
    if isinstance(features, Tensor) and features.dim() >= 2:
        return math.prod(features.shape[:-1])
    return None


def _image_token(config: Any) -> int | None:
    for name in ("image_token_id", "image_token_index", "media_placeholder_token_id", "im_patch_id", "image_patch_id"):
        value = getattr(config, name, None)
        if isinstance(value, int) and 0 <= value < VOCAB + 64:
            return value
    return None


def image_batch(model: nn.Module) -> tuple[dict[str, Any] | None, str]:
    """A batch with images through which gradients reach the vision tower, and why there is none otherwise."""
    why = "no form of images fits"
    for pixels in _images(model):
        try:
            counted = _features(model, pixels)
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        for batch in _texts(model, pixels, counted):
            try:
                return _tried(model, batch), ""
            except Exception as error:
                why = f"{type(error).__name__}: {str(error)[:120]}"
                said = re.search(r"features: (\d+)", str(error))
                counted = int(said[1]) if said else counted
        for batch in _texts(model, pixels, counted):  # with the number that the model has given by now
            try:
                return _tried(model, batch), ""
            except Exception as error:
                why = f"{type(error).__name__}: {str(error)[:120]}"
    return None, why


def _tried(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    with torch.random.fork_rng([]), torch.no_grad():
        model(**batch).loss.item()
    return batch


def _features(model: nn.Module, pixels: dict[str, Any]) -> int | None:
    for owner in (model, getattr(model, "model", None)):
        function = getattr(owner, "get_image_features", None)
        if callable(function):
            accepted = inspect.signature(function).parameters
            offered = {"qformer_input_ids": _tokens(6), **pixels}
            with torch.no_grad():
                return _count(function(**{k: v for k, v in offered.items() if k in accepted}))
    return None


def _texts(model: nn.Module, pixels: dict[str, Any], features: int | None) -> Iterator[dict[str, Any]]:
    takes = inspect.signature(type(model).forward).parameters
    token = _image_token(model.config)
    # What a model does not tell of its features: one for four patches, or one for each, or as many as are queried.
    counts = [features // ROWS, features, 0] if features is not None else [0, 4, 16]
    if token is None and "image_embeds_position_mask" not in takes:
        counts = [0]
    for count in counts:
        ids = _tokens(LENGTH)
        if count:
            filler = torch.full((ROWS, count), HIGHEST_TEXT_TOKEN if token is None else token)
            ids = torch.cat([ids[:, :4], filler, ids[:, 4:]], dim=1)
        labels = ids.clone()
        labels[:, :3] = -100
        if token is not None:
            labels[ids == token] = -100
        batch = {"input_ids": ids, "labels": labels, **pixels}
        kinds = (ids == (HIGHEST_TEXT_TOKEN if token is None else token)).long()
        options: dict[str, Any] = {}
        for name in ("token_type_ids", "mm_token_type_ids", "image_embeds_position_mask", "image_sizes_mask"):
            if name in takes or (name == "mm_token_type_ids" and "kwargs" in takes):
                options[name] = kinds
        if "qformer_input_ids" in takes:
            options["qformer_input_ids"] = _tokens(6)
        if "aspect_ratio_ids" in takes and pixels.get("pixel_values", ids).dim() == 4:
            tiles, image = model.config.vision_config.max_num_tiles, pixels["pixel_values"]
            options |= {
                "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long),
                "aspect_ratio_mask": torch.ones(ROWS, 1, tiles, dtype=torch.long),
                "cross_attention_mask": torch.ones(ROWS, ids.shape[1], 1, tiles, dtype=torch.long),
                "pixel_values": image[:, None, None].expand(ROWS, 1, tiles, *image.shape[1:]).contiguous(),
            }
        if "image_attention_mask" in takes:
            options["image_attention_mask"] = torch.ones(ROWS, ids.shape[1], 1, dtype=torch.long)
        yield batch | options
        if options:
            yield batch
        if "input_ids" not in takes or takes["input_ids"].default is None:
            yield {name: value for name, value in batch.items() if name != "input_ids"}
