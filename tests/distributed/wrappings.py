"""The ways in which a model is spread over processes, each behind the same few functions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from tests.distributed.group import device

LEARNING_RATE, MOMENTUM = 0.2, 0.9


@dataclass(frozen=True)
class Wrapping:
    """``kind``: ddp, fsdp1, fsdp2, zero1, zero2 or zero3. ``head``: in the "root" unit, with the final "norm", "alone".

    ``reshard`` of FSDP2; False in FSDP1 is SHARD_GRAD_OP. ``hybrid``: shards within pairs, replicates between them.
    """

    kind: str
    head: str = "root"
    reshard: bool = True
    hybrid: bool = False
    bf16: bool = False
    cpu_offload: bool = False
    original_parameters: bool = True

    def __str__(self) -> str:
        parts = [self.kind, self.head] + ([] if self.reshard else ["kept"])
        parts += [name for name in ("hybrid", "bf16", "cpu_offload") if getattr(self, name)]
        return "-".join(parts + ([] if self.original_parameters else ["flat"]))


class Plain:
    """One process: what the others are compared with. Subclasses wrap the model."""

    def __init__(
        self, model: nn.Module, wrapping: Wrapping | None = None, learning_rate: float = LEARNING_RATE
    ) -> None:
        self.model = self.inner = model
        self.wrap(wrapping)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=learning_rate, momentum=MOMENTUM)

    def wrap(self, wrapping: Any) -> None:
        pass

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor, last: bool = True) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        trained = {name: each for name, each in self.inner.named_parameters() if each.requires_grad}
        return {name: each.grad.clone() for name, each in trained.items() if each.grad is not None}

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.inner.named_parameters()}


class Ddp(Plain):
    def wrap(self, wrapping: Wrapping) -> None:
        self.model = DistributedDataParallel(self.model)

    def no_sync(self) -> Any:
        return self.model.no_sync()


def _mesh(hybrid: bool) -> Any:
    kind, size = device().type, dist.get_world_size()
    if hybrid:
        return init_device_mesh(kind, (size // 2, 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (size,))


def _layers(model: nn.Module) -> list[nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [each for layers in lists for each in layers if type(each).__name__.endswith("Layer")]


def _stock(model: nn.Module) -> Any:
    """The model of transformers, which may lie in one of peft's."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _with_the_weights_of(head: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The modules outside of ``head`` that share a parameter with it: they have to be in its unit."""
    weights, inside = {id(each) for each in head.parameters()}, set(head.modules())
    return [
        module
        for module in model.modules()
        if module not in inside and any(id(each) in weights for each in module.parameters(recurse=False))
    ]


class Fsdp1(Plain):
    def wrap(self, wrapping: Wrapping) -> None:
        units = _layers(self.model)
        if wrapping.head == "alone":
            head = _stock(self.model).get_output_embeddings()
            modules = getattr(head, "modules_to_save", None)
            units += [head] if modules is None else list(modules.values())
        strategies = {
            (True, False): ShardingStrategy.FULL_SHARD,
            (False, False): ShardingStrategy.SHARD_GRAD_OP,
            (True, True): ShardingStrategy.HYBRID_SHARD,
            (False, True): ShardingStrategy._HYBRID_SHARD_ZERO2,
        }
        mesh = _mesh(hybrid=True)
        half = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.bfloat16)
        self.model = FullyShardedDataParallel(
            self.model,
            sharding_strategy=strategies[wrapping.reshard, wrapping.hybrid],
            device_mesh=mesh if wrapping.hybrid else None,
            auto_wrap_policy=functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in units),
            mixed_precision=half if wrapping.bf16 else None,
            cpu_offload=CPUOffload(wrapping.cpu_offload),
            use_orig_params=wrapping.original_parameters,
            device_id=device(),
        )
        # FSDP1 shows gradients of original parameters alone, and gathers none from a CPU for an accelerator.
        self.shows_gradients = wrapping.original_parameters and not (wrapping.cpu_offload and device().type != "cpu")
        wrapped = FullyShardedDataParallel.fsdp_modules(self.model)
        assert len(wrapped) == 1 + len(units), [type(each.module).__name__ for each in wrapped]
        whole = sum(parameter.numel() for parameter in self.parameters().values())
        assert sum(each.numel() for each in self.model.parameters()) < whole, "nothing was sharded"

    def no_sync(self) -> Any:
        return self.model.no_sync()

    @contextmanager
    def _whole(self, **options: Any) -> Iterator[None]:
        with FullyShardedDataParallel.summon_full_params(self.model, **options):
            yield

    def gradients(self) -> dict[str, Tensor]:
        if not self.shows_gradients:
            return {}
        with self._whole(with_grads=True, writeback=False):
            return {_name(name): value for name, value in super().gradients().items()}

    def parameters(self) -> dict[str, Tensor]:
        with self._whole(writeback=False):
            return {_name(name): value for name, value in super().parameters().items()}


def _name(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


class Fsdp2(Plain):
    def wrap(self, wrapping: Wrapping) -> None:
        options: dict[str, Any] = {"mesh": _mesh(wrapping.hybrid), "reshard_after_forward": wrapping.reshard}
        if wrapping.bf16:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if wrapping.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device().type != "cpu")
        for layer in _layers(self.model):
            fully_shard(layer, **options)
        stock = _stock(self.model)
        head = stock.get_output_embeddings()
        unit = {"root": [], "norm": [head], "alone": [head]}[wrapping.head]
        if unit:
            unit += _with_the_weights_of(head, self.model)
        if wrapping.head == "norm":
            unit.insert(0, stock.model.norm)
        if unit:
            fully_shard(unit if len(unit) > 1 else head, **options)
        fully_shard(self.model, **options)
        assert all(isinstance(each, FSDPModule) for each in [self.model, *_layers(self.model), *unit])
        whole = [each for each in self.model.parameters() if each.numel() > 1]
        assert all(each.to_local().numel() < each.numel() for each in whole), "nothing was sharded"

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.model.set_requires_gradient_sync(False)
        yield
        self.model.set_requires_gradient_sync(True)

    def gradients(self) -> dict[str, Tensor]:
        return {name: value.full_tensor() for name, value in super().gradients().items()}

    def parameters(self) -> dict[str, Tensor]:
        return {name: value.full_tensor() for name, value in super().parameters().items()}


class Zero(Plain):
    def __init__(
        self, model: nn.Module, wrapping: Wrapping, learning_rate: float = LEARNING_RATE, steps: int = 1
    ) -> None:
        import deepspeed

        self.inner = model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": steps,
            # Of ZeRO-3 nothing stays gathered that is not in use: a model this small would never be taken apart.
            "zero_optimization": {
                "stage": int(wrapping.kind[-1]),
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # its default is 1
            "bf16": {"enabled": wrapping.bf16},
        }
        if wrapping.cpu_offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        optimizer = torch.optim.SGD(trained, lr=learning_rate, momentum=MOMENTUM)
        self.steps = steps
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if wrapping.kind == "zero3":
            assert all(each.numel() == 0 for each in model.parameters()), "nothing was sharded"

    def backward(self, loss: Tensor, last: bool = True) -> None:
        self.model.backward(loss * self.steps)  # which divides it by them
        if not last:
            self.model.step()  # counts, as long as the parts of a step are not through

    def step(self) -> None:
        self.model.step()

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(each) for name, each in self.inner.named_parameters() if each.requires_grad}
        return {name: each.clone() for name, each in found.items() if each is not None}

    def parameters(self) -> dict[str, Tensor]:
        import deepspeed

        with ExitStack() as stack:
            parameters = list(self.inner.parameters())
            if hasattr(parameters[0], "ds_id"):
                stack.enter_context(deepspeed.zero.GatheredParameters(parameters))
            return super().parameters()


def wrapped(model: nn.Module, wrapping: Wrapping | None, **options: Any) -> Plain:
    kinds: dict[str, Any] = {"ddp": Ddp, "fsdp1": Fsdp1, "fsdp2": Fsdp2, "zero1": Zero, "zero2": Zero, "zero3": Zero}
    if wrapping is None or not wrapping.kind.startswith("zero"):
        options.pop("steps", None)
    return (Plain if wrapping is None else kinds[wrapping.kind])(model, wrapping, **options)
