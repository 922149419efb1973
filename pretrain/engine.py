"""DeepSpeed around a plain module, at any ZeRO stage. This is the only file that imports deepspeed.

At stage 3 the model is built under `zero.Init`: each parameter is cut into one piece per rank as soon as its module
exists, so no rank ever holds the whole model. Below that every rank builds and holds it whole, and stages 1 and 2 split
the fp32 weights that the optimizer works on, with its state. `pieces` says, for every stage, which stretch of which
parameter lies where in the optimizer's tensors; what a checkpoint needs of the engine (`fragments`) and gives back to
it (`load_fragments`) follows from that.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import nn

from configs.schema import OptimizerConfig
from pretrain.checkpoint import Fragment
from pretrain.optim import make_optimizer
from pretrain.optimizers.lamb import Lamb
from pretrain.optimizers.muon import Muon
from pretrain.optimizers.slices import Layout, Slice
from pretrain.refused_updates import refuse_when_not_finite

# Two warnings per collective, about names that deepspeed calls and torch 2.13 has renamed; nothing a user can do.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

# DeepSpeed compiles a shared-memory all-reduce at its first start on a CPU (60 s, needs a compiler). ZeRO-3 moves its
# data by all-gather and reduce-scatter, which that op does not serve, so it is left out; the other stages use gloo's.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# At stages 1 and 2 in bf16 it prints some twenty lines of memory use, whatever the logger's level.
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter in one of the tensors that the optimizer updates on this rank."""

    name: str
    parameter: Any  # an nn.Parameter with DeepSpeed's attributes
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # the stretch's first element in the flattened parameter
    length: int  # in elements; at stage 3 it may be 0
    master: torch.Tensor  # fp32; at stage 0 the parameter itself, else flat and with other parameters' stretches
    offset: int  # the stretch's first element in the flattened master


def initialize(
    build: Callable[[], nn.Module],
    optimizer: OptimizerConfig,
    json: dict[str, Any],
    in_pieces: bool = True,
    layer_decay: float = 1.0,
) -> Any:
    """Build the model and return the DeepSpeed engine that trains it at the ZeRO stage of `json`.

    At stage 3 it is built in pieces; without `in_pieces` each rank builds the whole model before it is cut, as
    transformers' from_pretrained needs it. With a `layer_decay` below 1 lower layers learn slower, see optim.py.

    Every rank calls it with the same arguments, after `runtime.start` and with the same torch seed. The module may have
    `external_parameters()`: the (module, parameter) pairs in which a module uses a parameter of another, as with tied
    embeddings; ZeRO-3 has to gather those by name.
    """
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed()
    stage = json["zero_optimization"]["stage"]
    with deepspeed.zero.Init(config_dict_or_path=json, enabled=in_pieces and stage == 3):
        model = build()
    for module in model.modules():
        if getattr(module, "is_compiled", False):  # its weights are gathered together, outside of what is compiled
            deepspeed.utils.set_z3_leaf_module(module, True)
    if stage == 3:
        for module, parameter in getattr(model, "external_parameters", list)():
            deepspeed.zero.register_external_parameter(module, parameter)
    plain = make_optimizer(model, optimizer, layer_decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=plain, config=json)
    if stage > 0 and isinstance(plain, (Lamb, Muon)):
        plain.layouts.update(_layouts(engine))
    refuse_when_not_finite(engine, optimizer.grad_clip)
    return engine


def backward(engine: Any, loss: torch.Tensor) -> None:
    """Add the gradient of `loss`, this rank's share of the global mean, to those of the step so far.

    DeepSpeed divides by the number of ranks and of accumulation steps, which is the right mean only if all micro
    batches have equally many targets. `loss` is already divided by the global count, so both divisions are undone.
    """
    engine.backward(loss * engine.world_size, scale_wrt_gas=False)


@contextmanager
def without_reduction(engine: Any) -> Iterator[None]:
    """Inside, forward and `torch.autograd.grad` leave the engine as it is, also where blocks are compiled.

    DeepSpeed reduces the gradients of a block whose weights it gathers together by a backward hook of the block, which
    autograd.grad calls too; those of other parameters when they are accumulated, which autograd.grad does not do.
    """
    kept = [(module, module._backward_hooks) for module in deepspeed.utils.get_z3_leaf_modules(engine.module)]
    for module, _ in kept:
        module._backward_hooks = OrderedDict()
    try:
        yield
    finally:
        for module, hooks in kept:
            module._backward_hooks = hooks


def update(engine: Any, is_wanted: bool = True) -> bool:
    """After the last backward of a step: clip, update the weights and clear the gradient; returns whether it updated.

    A gradient that is not finite, or `is_wanted` False, leaves weights, optimizer state and average bitwise as they
    were, at every stage. Every rank calls it with the same `is_wanted`, and all get the same answer.
    """
    engine.is_update_wanted, engine.measured_norm = is_wanted, None
    engine.step()
    engine.is_update_wanted = True
    is_applied = bool(engine.was_step_applied())
    if not is_applied:
        engine._global_grad_norm = engine.measured_norm  # DeepSpeed says "infinite", whatever it was
    return is_applied


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def set_accumulation(engine: Any, num_micro_batches: int) -> None:
    """The next update comes after so many micro batches of this rank, counted from now; every rank gives the same."""
    engine.set_train_batch_size(num_micro_batches * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
    engine.micro_steps = 0  # DeepSpeed updates where the count of all micro batches so far divides


def grad_norm(engine: Any) -> float:
    """The L2 norm of the last step's whole gradient, before clipping; NaN if an element of it was."""
    return float(engine.get_global_grad_norm())


def gradients(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole gradient of each trained parameter, between the last backward of a step and its update.

    Every rank iterates; one is in memory at once.
    """
    for name, parameter in _trained(engine):
        yield name, deepspeed.utils.safe_get_full_grad(parameter)


def pieces(engine: Any) -> list[Piece]:
    """This rank's piece of every trained parameter, in the order of the model.

    Stages 1 and 2 cut the parameters of a group laid end to end, so a rank may have no piece of a parameter. At stage 0
    every rank has all of them.
    """
    return [p for name, parameter in _trained(engine) if (p := _piece(engine, name, parameter)) is not None]


def shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every trained parameter; at stage 3 the parameter itself is empty."""
    return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in _trained(engine)}


def fragments(engine: Any) -> Iterator[Fragment]:
    """This rank's part of the fp32 weights and of the optimizer's state; over all ranks, each element once.

    The tensors are views of the engine's own: the next step changes them.
    """
    _make_state(engine)
    for piece in pieces(engine):
        skipped, length = (0, piece.length) if engine.zero_optimization_stage() else _share(engine, piece.length)
        low = piece.offset + skipped
        tensors = {key: whole.view(-1)[low : low + length] for key, whole in _tensors(engine, piece).items()}
        yield Fragment(piece.name, piece.shape, piece.start + skipped, tensors)


@torch.no_grad()
def load_fragments(engine: Any, read: Callable[[str, str, int, int], torch.Tensor], num_updates: int) -> None:
    """Fill weights and optimizer state from `read(parameter name, "master" or a key of the state, start, length)`.

    `read` returns the flat fp32 elements [start, start + length) of the whole parameter, so a checkpoint of any number
    of ranks and any ZeRO stage can stand behind it. Every rank calls it, between two steps or before the first.
    """
    _make_state(engine)
    for master in _masters(engine):
        state = _plain(engine).state[master]
        for key, whole in (state | {"master": master}).items():
            whole.fill_(num_updates if key == "step" else 0)  # zero is for the padding, which is in no piece
    for piece in pieces(engine):
        for key, whole in _tensors(engine, piece).items():
            target = whole.view(-1)[piece.offset : piece.offset + piece.length]
            target.copy_(read(piece.name, key, piece.start, piece.length))
    _use_masters(engine)


@contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Inside, the model has the moving average of its weights ("ema"), for evaluation; every rank enters it."""
    _swap_average(engine)
    try:
        yield
    finally:
        _swap_average(engine)


def whole_weights(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole parameters one after the other, in the model's dtype, as this rank has or gathers them.

    Every rank iterates. A tensor is that of the engine and is gone with the next one.
    """
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            yield name, parameter.detach()


def gather_weights(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole parameters one after the other, as CPU tensors; every rank iterates, one is in memory at once."""
    for name, weight in whole_weights(engine):
        yield name, weight.cpu().clone()


def unlike_masters(engine: Any) -> list[str]:
    """Parameters of which this rank's piece, in the model's dtype, is not bitwise its fp32 weights, rounded.

    Between two steps there are none, unless memory was changed by something else.
    """
    unlike = []
    for piece in pieces(engine):
        used = piece.parameter.ds_tensor.view(-1)[: piece.length] if engine.zero_optimization_stage() == 3 else None
        if used is None:
            used = piece.parameter.detach().view(-1)[piece.start : piece.start + piece.length]
        master = piece.master.detach().view(-1)[piece.offset : piece.offset + piece.length].to(used.dtype)
        if not torch.equal(used.view(torch.uint8), master.view(torch.uint8)):
            unlike.append(piece.name)
    return unlike


def close(engine: Any) -> None:
    """Free what the engine holds, so that another one can be made in this process."""
    engine.destroy()


def _trained(engine: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _plain(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that `make_optimizer` made; above stage 0 DeepSpeed's is around it."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _masters(engine: Any) -> list[torch.Tensor]:
    """The fp32 tensors that the optimizer updates."""
    if engine.zero_optimization_stage() == 3:  # whose groups have none between two steps
        return engine.optimizer.fp32_partitioned_groups_flat
    return [master for group in engine.optimizer.param_groups for master in group["params"]]


def _piece(engine: Any, name: str, parameter: Any) -> Piece | None:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return Piece(name, parameter, tuple(parameter.shape), 0, parameter.numel(), parameter, 0)
    if stage == 3:
        group, offset, _ = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        size = parameter.ds_tensor.numel()  # with the padding that makes all ranks' pieces equally long
        start = min(engine.global_rank * size, parameter.ds_numel)
        length = min(size, parameter.ds_numel - start)
        return Piece(name, parameter, tuple(parameter.ds_shape), start, length, _masters(engine)[group], offset)
    found = parameter._hp_mapping  # of the low precision parameter into the high precision (hp) partition
    if found is None:
        return None
    in_parameter, in_master = found.lp_fragment_address, found.hp_fragment_address
    master = _masters(engine)[found.param_group_index]
    return Piece(
        name, parameter, tuple(parameter.shape), in_parameter.start, in_parameter.numel, master, in_master.start
    )


def _layouts(engine: Any) -> dict[torch.Tensor, Layout]:
    """For each of the optimizer's tensors, which stretch of it is which parameter's and what the other ranks have."""
    masters = _masters(engine)
    numbers = {id(master): number for number, master in enumerate(masters)}
    own = {piece.name: (numbers[id(piece.master)], piece.offset, piece.length) for piece in pieces(engine)}
    of_ranks: list[Any] = [None] * engine.world_size
    torch.distributed.all_gather_object(of_ranks, own)
    slices: list[list[Slice]] = [[] for _ in masters]
    for name, shape in shapes(engine).items():
        lengths = tuple(of_rank[name][2] if name in of_rank else 0 for of_rank in of_ranks)
        (number,) = {of_rank[name][0] for of_rank in of_ranks if name in of_rank}
        offset = own[name][1] if name in own else 0
        slices[number].append(Slice(name, shape, offset, lengths))
    return {m: Layout(tuple(s), engine.global_rank) for m, s in zip(masters, slices, strict=True)}


def _tensors(engine: Any, piece: Piece) -> dict[str, torch.Tensor]:
    """The fp32 weights, "master", and the optimizer's tensors of the same shape. Its "step" is in `TrainState`."""
    state = _plain(engine).state[piece.master]
    return {"master": piece.master.detach()} | {key: whole for key, whole in state.items() if key != "step"}


def _share(engine: Any, length: int) -> tuple[int, int]:
    """First element and length of this rank's part of what every rank holds."""
    size = -(-length // engine.world_size)
    start = min(engine.global_rank * size, length)
    return start, min(size, length - start)


@torch.no_grad()
def _swap_average(engine: Any) -> None:
    _make_state(engine)
    for master in _masters(engine):
        average = _plain(engine).state[master]["ema"]
        weights = master.clone()
        master.copy_(average)
        average.copy_(weights)
    _use_masters(engine)


def _use_masters(engine: Any) -> None:
    """Give the model, in its own dtype, the weights that now are in the optimizer's tensors."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # what is whole here is let go, or it would stay as it was
        for piece in pieces(engine):
            part = piece.parameter.ds_tensor
            part.data.copy_(piece.master[piece.offset : piece.offset + part.numel()])
        engine.optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        engine.optimizer.update_lp_params()  # each rank's weights in the model's dtype, to all


def _make_state(engine: Any) -> None:
    """Let the optimizer allocate its state, whatever that is, by an update with rate and gradient 0."""
    plain, masters = _plain(engine), _masters(engine)
    if plain.state:  # there has been an update
        return
    rates = [group["lr"] for group in plain.param_groups]
    set_lr(engine, 0.0)
    for master in masters:
        master.grad = torch.zeros_like(master)
    if engine.zero_optimization_stage() == 3:
        for number in range(len(masters)):
            engine.optimizer._optimizer_step(number)
    else:
        plain.step()
    for master in masters:
        master.grad = None
        plain.state[master]["step"].zero_()
    for group, rate in zip(plain.param_groups, rates, strict=True):
        group["lr"] = rate
