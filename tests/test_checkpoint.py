"""Checkpoints: everything that goes in comes out, to the bit, or is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import nn

from hpsearch.errors import JournalError, UserCodeError
from hpsearch.training.checkpoint import Checkpoint, capture, load_optimizer, load_weights, pack, unpack


class Net(nn.Module):
    """Tied weights, buffers of several kinds, one of them hidden from state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.get_buffer("seen").add_(len(tokens))
        out: torch.Tensor = self.head(self.norm(self.embed(tokens)) * self.mask)
        return out


def trained(seed: int = 0, steps: int = 3) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(0, 7, (16,))).square().mean().backward()
        optimizer.step()
    return model, optimizer


def checkpoint_of(state: dict[str, Any] | None = None) -> Checkpoint:
    model, optimizer = trained()
    config = {"lr": 0.01, "layers": [8, 16], "name": "é", "clip": None}
    return capture(model, trial=17, seed=5, epoch=27, config=config, optimizer=optimizer, state=state)


def with_state(state: dict[str, Any]) -> dict[str, Any]:
    found = unpack(pack(checkpoint_of(state)), ref="x").state
    assert found is not None
    return found


def test_a_checkpoint_comes_back_with_its_metadata() -> None:
    found = unpack(pack(checkpoint_of()), ref="x")
    assert (found.trial, found.seed, found.epoch) == (17, 5, 27)
    assert found.config == {"lr": 0.01, "layers": [8, 16], "name": "é", "clip": None}
    assert found.resumable
    assert not found.weights_only().resumable


def test_weights_buffers_and_hidden_buffers_come_back_into_a_fresh_model() -> None:
    model, _ = trained()
    fresh, _ = trained(seed=1, steps=0)
    load_weights(fresh, unpack(pack(capture(model, trial=0, seed=0, epoch=3, config={})), ref="x"))
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    assert fresh.get_buffer("seen") == 48
    assert fresh.head.weight is fresh.embed.weight


def test_training_goes_on_to_the_bit_from_a_restored_optimizer() -> None:
    model, optimizer = trained()
    again, restored = trained(seed=1, steps=0)
    content = pack(capture(model, trial=0, seed=0, epoch=3, config={}, optimizer=optimizer))
    found = unpack(content, ref="x")
    load_weights(again, found)
    assert found.optimizer is not None
    load_optimizer(restored, found.optimizer)
    for net, optim in ((model, optimizer), (again, restored)):
        torch.manual_seed(9)
        optim.zero_grad()
        net(torch.randint(0, 7, (16,))).square().mean().backward()
        optim.step()
    assert pack(capture(model, trial=0, seed=0, epoch=4, config={}, optimizer=optimizer)) == pack(
        capture(again, trial=0, seed=0, epoch=4, config={}, optimizer=restored)
    )


def test_equal_content_gives_equal_bytes() -> None:
    assert pack(checkpoint_of()) == pack(checkpoint_of())


def test_every_tensor_is_a_sign_of_life_while_a_checkpoint_is_packed() -> None:
    signs: list[int] = []
    content = pack(checkpoint_of(), lambda: signs.append(1))
    assert len(signs) == 2 * len(load(content))  # one when it is copied, one when it is summed up
    assert content == pack(checkpoint_of())


def test_tied_weights_are_written_once_and_any_safetensors_reader_can_open_the_file() -> None:
    tensors = load(pack(checkpoint_of()))
    assert "weights/embed.weight" in tensors
    assert "weights/head.weight" not in tensors
    assert "optimizer/state/0/exp_avg" in tensors


def test_a_copy_is_no_longer_the_models_memory() -> None:
    model, _ = trained()
    shared = capture(model, trial=0, seed=0, epoch=0, config={})
    copied = capture(model, trial=0, seed=0, epoch=0, config={}, copy=True)
    before = pack(copied)
    with torch.no_grad():
        model.embed.weight.add_(1)
    assert pack(copied) == before
    assert pack(shared) != before


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64],
)
def test_tensors_of_every_kind_keep_dtype_shape_and_bits(dtype: torch.dtype) -> None:
    whole = torch.arange(12).reshape(3, 4).to(dtype)
    given_ = {"whole": whole, "turned": whole.T, "scalar": whole[1, 1], "empty": whole[:0], "row": whole[1]}
    found = with_state(given_)
    for name, value in given_.items():
        assert found[name].dtype == dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name


def test_overlapping_views_of_one_memory_come_back_as_their_own_values() -> None:
    flat = torch.arange(6.0)
    found = with_state({"a": flat[:4], "b": flat[2:], "c": flat[:4]})
    assert found["a"].tolist() == [0, 1, 2, 3]
    assert found["b"].tolist() == [2, 3, 4, 5]
    assert found["c"].tolist() == [0, 1, 2, 3]


plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.just(float("inf")))
trees = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=3),
    ),
    max_leaves=6,
)


@settings(max_examples=50)
@given(tree=st.dictionaries(st.text(), trees, max_size=4))
def test_any_tree_of_plain_values_comes_back_with_its_types(tree: dict[str, Any]) -> None:
    content = Checkpoint(trial=0, seed=0, epoch=1, config={}, weights={}, hidden_buffers={}, state=tree)
    found = unpack(pack(content), ref="x").state
    assert found == tree
    assert repr(found) == repr(tree)  # == takes 1 for 1.0 and True


def test_keys_that_look_alike_do_not_take_each_others_tensor() -> None:
    found = with_state({"a": {1: torch.tensor(1), "1": torch.tensor(2)}, "a/1": torch.tensor(3)})
    assert (found["a"][1], found["a"]["1"], found["a/1"]) == (1, 2, 3)


def test_arrays_and_numpy_scalars_come_back() -> None:
    found = with_state({"array": np.arange(3, dtype=np.int16), "scalar": np.float32(0.5), "nan": float("nan")})
    assert found["array"].dtype == np.int16
    assert found["array"].tolist() == [0, 1, 2]
    assert found["scalar"] == 0.5
    assert found["nan"] != found["nan"]


def test_what_is_neither_tensor_nor_plain_is_refused_with_its_path() -> None:
    with pytest.raises(UserCodeError) as caught:
        pack(checkpoint_of({"schedule": [1, {"fn": len}]}))
    assert caught.value.message == (
        "state/schedule/1/fn is a builtin_function_or_method, which a checkpoint cannot hold"
    )
    with pytest.raises(UserCodeError, match="state has the key"):
        pack(checkpoint_of({(1, 2): 3}))  # type: ignore[dict-item]
    with pytest.raises(UserCodeError, match=r"state/x is a tensor of torch.sparse_coo, torch.float32"):
        pack(checkpoint_of({"x": torch.eye(2).to_sparse()}))
    with pytest.raises(UserCodeError, match="state/x is an array of object"):
        pack(checkpoint_of({"x": np.array([None])}))


@given(where=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(where: int, bit: int) -> None:
    content = bytearray(PACKED)
    content[where % len(content)] ^= 1 << bit
    # A bool is a byte, of which one bit is looked at.
    assert packed_again(bytes(content)) in ("JournalError: checkpoints/trial-0017.safetensors", PACKED)


def packed_again(content: bytes) -> bytes | str:
    """The bytes of what was read, or what reading them raised and names."""
    try:
        return pack(unpack(content, ref="checkpoints/trial-0017.safetensors"))
    except JournalError as error:
        return f"JournalError: {error.message.split()[0]}"


PACKED = pack(checkpoint_of())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", PACKED[:-1], PACKED[:100], b"\x00" * 64])
def test_damaged_bytes_are_named_by_their_reference(content: bytes) -> None:
    with pytest.raises(JournalError) as caught:
        unpack(content, ref="checkpoints/trial-0017-e0027.safetensors")
    assert str(caught.value) == (
        "error[journal]: checkpoints/trial-0017-e0027.safetensors is damaged: "
        "it is not a checkpoint of hpsearch's, or cut short\n"
        "  hint: hpsearch launch --resume makes it again"
    )


def test_a_model_of_another_shape_is_told_that_the_checkpoint_does_not_fit() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(UserCodeError, match=r"trial 17's checkpoint does not fit the model: .*Missing key"):
        load_weights(model, unpack(PACKED, ref="x"))
    found = unpack(PACKED, ref="x")
    assert found.optimizer is not None
    with pytest.raises(UserCodeError, match="the checkpoint does not fit the optimizer: "):
        load_optimizer(torch.optim.AdamW(model.parameters()), found.optimizer)


def test_state_kept_in_another_dtype_than_its_parameter_is_not_rounded() -> None:
    class Master(torch.optim.SGD):
        """Keeps a float32 copy of a bfloat16 weight, as mixed-precision optimizers do."""

    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = Master([weight], lr=0.1)
    master = torch.tensor([1.000001, 2.000001, 3.000001])
    optimizer.state[weight]["master"] = master.clone()
    found = unpack(
        pack(capture(nn.Identity(), trial=0, seed=0, epoch=0, config={}, optimizer=optimizer)), ref="x"
    ).optimizer
    fresh = Master([weight], lr=0.1)
    assert found is not None
    load_optimizer(fresh, found)
    assert torch.equal(fresh.state[weight]["master"], master)
    assert fresh.state[weight]["master"].dtype == torch.float32


def test_optimizer_state_gets_its_parameters_memory_layout_back() -> None:
    def net() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, torch.optim.Adam(model.parameters())

    model, optimizer = net()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    found = unpack(pack(capture(model, trial=0, seed=0, epoch=1, config={}, optimizer=optimizer)), ref="x")
    again, restored = net()
    assert found.optimizer is not None
    load_weights(again, found)
    load_optimizer(restored, found.optimizer)
    weight = next(again.parameters())
    assert restored.state[weight]["exp_avg"].stride() == weight.stride()
    assert torch.equal(restored.state[weight]["exp_avg"], optimizer.state[next(model.parameters())]["exp_avg"])
