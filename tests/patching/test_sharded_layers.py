"""Joined, chunked and recomputed layers inside of FSDP1 and FSDP2, on two processes: the gradients of one."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from liger_trainer import apply_liger_kernel, kernels
from tests.patching.conftest import build, errors, loss_and_gradients

OPTIONS = {"recompute": "cheap", "mlp_chunk_tokens": 4, "check": False}
# How the model is sharded, and whether its layers are checkpointed.
CASES = [("layers", True), ("layers and projections", False), ("patched afterwards", True), ("FSDP1", True)]


def sharded(how):
    mesh = init_device_mesh("cpu", (2,))
    model = build("Llama")
    if how != "patched afterwards":
        apply_liger_kernel(model, **OPTIONS)
    layers = model.model.layers
    if how == "FSDP1":
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(layers[0])})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)
    for layer in layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.down_proj) if "projections" in how else ():
            fully_shard(projection, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if how == "patched afterwards":
        apply_liger_kernel(model, **OPTIONS)
    return model


def compare(how, checkpointed, batch, theirs):
    model, calls, add_rms_norm = sharded(how), [], kernels.add_rms_norm
    if checkpointed:
        inner = model.module if how == "FSDP1" else model
        inner.gradient_checkpointing_enable({"use_reentrant": False})

    def counted(*args, **options):
        calls.append(args)
        return add_rms_norm(*args, **options)

    kernels.add_rms_norm = counted
    try:
        loss = model(**batch).loss
        loss.backward()
    finally:
        kernels.add_rms_norm = add_rms_norm
    if how == "FSDP1":
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            ours = {n.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for n, p in model.named_parameters()}
    else:
        ours = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert float(errors({"loss": loss.detach(), **ours}, theirs).max()) < 1e-5, (how, checkpointed)
    assert len(calls) == 2 * (1 + checkpointed), (how, checkpointed)


def work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.clone()}
    theirs = loss_and_gradients(build("Llama"), batch)
    try:
        for how, checkpointed in CASES:
            compare(how, checkpointed, batch, theirs)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_gradients_are_those_of_one_process(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"),), nprocs=2)
