"""A trial's checkpoint as bytes: safetensors for the tensors, JSON in its header for everything else, never pickle.

A checkpoint is a few trees (dicts, lists and tuples of tensors and plain values). A tree is written as JSON in which
every tensor is a name; the tensors themselves follow under these names, so that any safetensors reader can open the
file. What is neither is refused with its path. A checksum over all tells damage from a strange model.

Equal content gives equal bytes, which is how a test can ask whether two ways of training are the same to the bit.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from hpsearch.errors import DamagedBlob, JournalError, UserCodeError
from hpsearch.job import Config

FORMAT = 1
_HEADER_KEY = "hpsearch"  # one key, since safetensors writes several in no fixed order

Tree = Any  # dicts, lists and tuples of tensors, arrays and plain values
Alive = Callable[[], None] | None  # told again and again while something takes long


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trial after some epochs. With `optimizer` or `state` it can be trained on, without it predicts."""

    trial: int
    seed: int  # the trial's
    epoch: int  # epochs behind it
    config: Config
    weights: dict[str, Tree]  # model.state_dict()
    hidden_buffers: dict[str, Tensor]  # those that state_dict leaves out (persistent=False), which training may change
    optimizer: dict[str, Tree] | None = None  # optimizer.state_dict()
    state: dict[str, Tree] | None = None  # what the user's own loop asked to keep

    @property
    def resumable(self) -> bool:
        return self.optimizer is not None or self.state is not None

    def weights_only(self) -> Checkpoint:
        """The same without what only further training needs."""
        return replace(self, optimizer=None, state=None)


def capture(
    model: nn.Module,
    *,
    trial: int,
    seed: int,
    epoch: int,
    config: Config,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Tree] | None = None,
    copy: bool = False,
) -> Checkpoint:
    """A model, and what it needs to be trained on, as a checkpoint.

    Args:
        copy: False: the tensors are the model's own, so it must be packed before training goes on.
    """
    weights = model.state_dict()
    hidden = {name: buffer for name, buffer in model.named_buffers() if name not in weights}
    if copy:
        weights, hidden = _copied(weights), _copied(hidden)
    return Checkpoint(
        trial=trial,
        seed=seed,
        epoch=epoch,
        config=config,
        weights=weights,
        hidden_buffers=hidden,
        optimizer=None if optimizer is None else optimizer.state_dict(),
        state=state,
    )


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Sets a fresh model of the same config to a checkpoint's weights and buffers.

    Raises:
        UserCodeError: the model has other parameters than the one that was checkpointed.
    """
    try:
        model.load_state_dict(checkpoint.weights)
        buffers = dict(model.named_buffers())
        with torch.no_grad():
            for name, value in checkpoint.hidden_buffers.items():
                buffers[name].copy_(value)
    except (RuntimeError, KeyError) as error:
        raise UserCodeError(
            f"trial {checkpoint.trial}'s checkpoint does not fit the model: {' '.join(str(error).split())}",
            hint="was model() changed since the study began? Start a new study, or change it back",
        ) from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Tree]) -> None:
    """Sets a fresh optimizer of the same config to a checkpointed state, tensors to the bit.

    Raises:
        UserCodeError: it has other parameters or groups than the one that was checkpointed.
    """
    try:
        optimizer.load_state_dict(dict(state))
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserCodeError(
            f"the checkpoint does not fit the optimizer: {' '.join(str(error).split())}",
            hint="was optimizer() or model() changed since the study began? Start a new study, or change it back",
        ) from error
    # load_state_dict casts state to its parameter's dtype, which would round a float32 average of a bfloat16 weight;
    # and state has lost the memory layout of its parameter (channels_last), which slows down every step.
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, saved in state["state"].items():
        param = params[index]
        current = optimizer.state[param]
        for name, value in saved.items():
            held = current.get(name)
            if not isinstance(value, Tensor) or not isinstance(held, Tensor):
                continue
            if held.dtype != value.dtype:
                held = current[name] = value.to(held.device)
            if held.shape == param.shape and held.stride() != param.stride():
                current[name] = torch.empty_like(param, dtype=held.dtype, device=held.device).copy_(held)


def pack(checkpoint: Checkpoint, alive: Alive = None) -> bytes:
    """A checkpoint as bytes. Tied tensors are written once; equal checkpoints give equal bytes.

    Args:
        alive: called after every tensor, since a large checkpoint takes minutes.

    Raises:
        UserCodeError: something in it is neither tensor nor plain value; its path is told.
    """
    writer = _TreeWriter(alive)
    trees = {
        "weights": writer.write(dict(checkpoint.weights), "weights"),
        "versions": writer.write(getattr(checkpoint.weights, "_metadata", None), "versions"),
        "hidden_buffers": writer.write(checkpoint.hidden_buffers, "hidden_buffers"),
        "optimizer": writer.write(checkpoint.optimizer, "optimizer"),
        "state": writer.write(checkpoint.state, "state"),
    }
    content = json.dumps(
        {
            "format": FORMAT,
            "trial": checkpoint.trial,
            "seed": checkpoint.seed,
            "epoch": checkpoint.epoch,
            "config": checkpoint.config,
            "trees": trees,
        },
        separators=(",", ":"),
    )
    header = json.dumps({"checksum": _checksum(content, writer.tensors, alive), "content": content})
    return save_tensors(writer.tensors, metadata={_HEADER_KEY: header})


def unpack(content: bytes, *, ref: str) -> Checkpoint:
    """The checkpoint that was packed; its tensors are on the CPU and nobody else's.

    Args:
        content: what `pack` gave.
        ref: the blob's reference, for the error.

    Raises:
        DamagedBlob: the bytes are not a checkpoint.
        JournalError: they are of another format.
    """
    try:
        header_size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + header_size])["__metadata__"][_HEADER_KEY])
        # Clones, for the loaded tensors lie at odd addresses, and some kernels sum in another order there.
        tensors = {name: tensor.clone() for name, tensor in load_tensors(content).items()}
        checksum, text = header["checksum"], header["content"]
        fields = json.loads(text)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedBlob(ref, "it is not a checkpoint of hpsearch's, or cut short") from error
    if checksum != _checksum(text, tensors):
        raise DamagedBlob(ref, "its checksum is wrong")
    if fields["format"] != FORMAT:
        raise JournalError(
            f"{ref} has format {fields['format']}, and this version reads {FORMAT}", hint="use the newer hpsearch"
        )
    trees = {name: _read_tree(tree, tensors) for name, tree in fields["trees"].items()}
    weights = _StateDict(trees["weights"])
    if trees["versions"] is not None:
        weights._metadata = trees["versions"]
    return Checkpoint(
        trial=fields["trial"],
        seed=fields["seed"],
        epoch=fields["epoch"],
        config=fields["config"],
        weights=weights,
        hidden_buffers=trees["hidden_buffers"],
        optimizer=trees["optimizer"],
        state=trees["state"],
    )


class _StateDict(dict[str, Any]):
    """A dict that can carry `_metadata`: the versions of modules, which load_state_dict looks for there."""

    _metadata: dict[str, Any]


def _copied(tree: Mapping[str, Tree]) -> dict[str, Tree]:
    copies = _StateDict({k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in tree.items()})
    metadata = getattr(tree, "_metadata", None)
    if metadata is not None:
        copies._metadata = metadata
    return copies


def _checksum(content: str, tensors: Mapping[str, Tensor], alive: Alive = None) -> int:
    checksum = zlib.crc32(content.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
        if alive is not None:
            alive()
    return checksum


class _TreeWriter:
    """Turns trees into JSON, and gathers their tensors under names that are paths."""

    def __init__(self, alive: Alive) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._alive = alive
        self._names: dict[tuple[object, ...], str] = {}
        self._storages: set[int] = set()

    def write(self, tree: Tree, path: str) -> object:
        if tree is None or isinstance(tree, bool | str):
            return tree
        if isinstance(tree, int | float):
            return tree if type(tree) in (int, float) else _plain_number(tree)
        if isinstance(tree, Tensor):
            return {"tensor": self._name(tree, path)}
        if isinstance(tree, np.generic):
            return self.write(tree.item(), path)
        if isinstance(tree, np.ndarray):
            return {"array": self._name(_as_tensor(tree, path), path)}
        if isinstance(tree, Mapping):
            items = []
            for key, value in tree.items():
                if not isinstance(key, str | int):  # a bool is an int
                    raise _refused(path, f"has the key {key!r}")
                items.append([key, self.write(value, f"{path}/{key}")])
            return {"dict": items}
        if isinstance(tree, list | tuple):
            kind = "list" if isinstance(tree, list) else "tuple"
            return {kind: [self.write(value, f"{path}/{index}") for index, value in enumerate(tree)]}
        raise _refused(path, f"is a {type(tree).__name__}")

    def _name(self, tensor: Tensor, path: str) -> str:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.dtype == torch.complex128:
            raise _refused(path, f"is a tensor of {tensor.layout}, {tensor.dtype}")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and view in self._names:
            return self._names[view]
        name = path if path not in self.tensors else f"{path}~{len(self.tensors)}"
        whole = tensor.cpu().contiguous()
        if self._alive is not None:
            self._alive()
        # Another view of memory that is written already: safetensors refuses two owners of it.
        shared = storage in self._storages and whole.untyped_storage().data_ptr() == storage
        self.tensors[name] = whole.clone() if shared else whole
        self._names[view] = name
        self._storages.add(storage)
        return name


def _plain_number(number: int | float) -> int | float:
    """A number of a subclass (an IntEnum, numpy's float64) as Python's own."""
    return int(number) if isinstance(number, int) else float(number)


def _as_tensor(array: np.ndarray[Any, Any], path: str) -> Tensor:
    try:
        return torch.from_numpy(array.copy())
    except TypeError:
        raise _refused(path, f"is an array of {array.dtype}") from None


def _refused(path: str, what: str) -> UserCodeError:
    return UserCodeError(
        f"{path} {what}, which a checkpoint cannot hold",
        hint="give tensors, arrays, numbers and strings, and lists, tuples and dicts of them; scheduler.state_dict(), "
        "say, rather than the scheduler",
    )


def _read_tree(tree: Any, tensors: Mapping[str, Tensor]) -> Tree:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    match kind:
        case "tensor":
            return tensors[value]
        case "array":
            return tensors[value].numpy()
        case "dict":
            return {key: _read_tree(item, tensors) for key, item in value}
        case "list":
            return [_read_tree(item, tensors) for item in value]
        case _:
            return tuple(_read_tree(item, tensors) for item in value)
