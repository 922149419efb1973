"""DeepSpeed ZeRO-3 around a plain module. This is the only file that imports deepspeed.

The model is built under `zero.Init`: each parameter is cut into one piece per rank as soon as its module exists, so no
rank ever holds the whole model. What a checkpoint needs of the engine (this rank's piece of every parameter and of
its optimizer state) comes out of `fragments` and goes back in through `load_fragments`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from configs.schema import OptimizerConfig
from pretrain.checkpoint import Fragment
from pretrain.optim import make_optimizer

# Two warnings per collective, about names that deepspeed calls and torch 2.13 has renamed; nothing a user can do.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

# DeepSpeed compiles a shared-memory all-reduce at its first start on a CPU (60 s, needs a compiler). ZeRO-3 moves its
# data by all-gather and reduce-scatter, which that op does not serve, so it is left out.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def initialize(
    build: Callable[[], nn.Module], optimizer: OptimizerConfig, json: dict[str, Any], in_pieces: bool = True
) -> Any:
    """Build the model in pieces and return the DeepSpeed engine that trains it.

    Without `in_pieces` each rank builds the whole model before it is cut, as transformers' from_pretrained needs it.

    Every rank calls it with the same arguments, after `runtime.start` and with the same torch seed. The module may have
    `external_parameters()`: the (module, parameter) pairs in which a module uses a parameter of another, as with tied
    embeddings; ZeRO-3 has to gather those by name.
    """
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed()
    with deepspeed.zero.Init(config_dict_or_path=json, enabled=in_pieces):
        model = build()
    for module, parameter in getattr(model, "external_parameters", list)():
        deepspeed.zero.register_external_parameter(module, parameter)
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, optimizer), config=json)
    return engine


def backward(engine: Any, loss: torch.Tensor) -> None:
    """Add the gradient of `loss`, this rank's share of the global mean, to those of the step so far.

    DeepSpeed divides by the number of ranks and of accumulation steps, which is the right mean only if all micro
    batches have equally many targets. `loss` is already divided by the global count, so both divisions are undone.
    """
    engine.backward(loss * engine.world_size, scale_wrt_gas=False)


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def grad_norm(engine: Any) -> float:
    """The L2 norm of the last step's whole gradient, before clipping."""
    return float(engine.get_global_grad_norm())


def fragments(engine: Any) -> Iterator[Fragment]:
    """This rank's piece of every trained parameter with its optimizer state; at least one step must have been made."""
    for name, parameter in _trained(engine):
        start, length = _own_range(engine, parameter)
        tensors = {"master": safe_get_local_fp32_param(parameter)}
        tensors |= {key: safe_get_local_optimizer_state(parameter, key) for key in _state_keys(engine, parameter)}
        yield Fragment(name, tuple(parameter.ds_shape), start, {key: t[:length] for key, t in tensors.items()})


def load_fragments(engine: Any, read: Callable[[str, str, int, int], torch.Tensor], optimizer_step: int) -> None:
    """Fill weights and optimizer state from `read(parameter name, "master" or a key of the state, start, length)`.

    `read` returns the flat fp32 elements [start, start + length) of the whole parameter, so a checkpoint of any number
    of ranks can stand behind it. Called right after `initialize`, before the first forward.
    """
    _make_state(engine, optimizer_step)
    for name, parameter in _trained(engine):
        start, length = _own_range(engine, parameter)
        for key in ("master", *_state_keys(engine, parameter)):
            piece = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32)  # the last rank's piece is padded
            piece[:length] = read(name, key, start, length)
            if key == "master":
                safe_set_local_fp32_param(parameter, piece)
                parameter.ds_tensor.data.copy_(piece)
            else:
                safe_set_local_optimizer_state(parameter, piece, key)


def gather_weights(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole parameters one after the other, as CPU tensors; every rank iterates, one is in memory at once."""
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            yield name, parameter.detach().cpu().clone()


def close(engine: Any) -> None:
    """Free what the engine holds, so that another one can be made in this process."""
    engine.destroy()


def _trained(engine: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _state_keys(engine: Any, parameter: Any) -> list[str]:
    """The names of the optimizer's per-element tensors; what it has one of, as the step, follows from `TrainState`."""
    group, *_ = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
    flat = engine.optimizer.fp32_partitioned_groups_flat[group]
    return [key for key, value in engine.optimizer.optimizer.state[flat].items() if value.shape == flat.shape]


def _make_state(engine: Any, num_updates: int) -> None:
    """Let the optimizer allocate its state, whatever it is, by an update with rate and gradient 0."""
    optimizer = engine.optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    set_lr(engine, 0.0)
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        flat.grad = torch.zeros_like(flat)
        optimizer._optimizer_step(number)
        flat.grad = None
        state = optimizer.optimizer.state[flat]
        state |= {key: value.fill_(num_updates) for key, value in state.items() if value.shape != flat.shape}
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _own_range(engine: Any, parameter: Any) -> tuple[int, int]:
    """First element and number of elements of this rank's piece, without the padding at the end."""
    size = parameter.ds_tensor.numel()
    start = min(engine.global_rank * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)
