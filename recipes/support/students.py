"""Smaller models made from a larger one, to be taught by it."""

from __future__ import annotations

import copy
import re

import torch
from transformers import PreTrainedModel

LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")


def fewer_layers(teacher: PreTrainedModel, count: int) -> PreTrainedModel:
    """A copy of `teacher` with `count` of its decoder layers, evenly spaced, the first and the last among them.

    Everything else, embeddings, last norm and head, is copied whole: the way in which DistilBERT's student was begun
    (Sanh et al., 2019, section 2).

    Args:
        teacher: a causal language model whose weights are named ``…layers.<number>.…``. Left as it is.
        count: layers to keep, from 1 to the teacher's.

    Raises:
        ValueError: `count` is out of range, or the teacher's weights aren't named so.
    """
    total = teacher.config.num_hidden_layers
    if not 1 <= count <= total:
        raise ValueError(f"count must be between 1 and the teacher's {total} layers, got {count}")
    kept = [round(place * (total - 1) / max(count - 1, 1)) for place in range(count)]
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[layer] for layer in kept]

    weights: dict[str, torch.Tensor] = {}
    found = set()
    for name, weight in teacher.state_dict().items():
        match = LAYER.search(name)
        if match is None:
            weights[name] = weight
            continue
        layer = int(match[2])
        found.add(layer)
        if layer in kept:
            weights[LAYER.sub(rf"\g<1>layers.{kept.index(layer)}.", name, count=1)] = weight
    if found != set(range(total)):
        raise ValueError(
            f"{type(teacher).__name__} has no weights named ...layers.<number>... for each of its {total} layers: "
            "build its student by hand"
        )
    student = type(teacher)(config).to(teacher.dtype)
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student
