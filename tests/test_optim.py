"""Optimizers by name: what a config's keys become, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpsearch.errors import UserCodeError
from hpsearch.job import Config
from hpsearch.training.optim import OPTIMIZERS, config_number, make_optimizer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def group(config: Config) -> dict[str, object]:
    (only,) = make_optimizer(net().parameters(), config).param_groups
    return only


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
        ("nadam", torch.optim.NAdam),
    ],
)
def test_every_name_of_the_contract_gives_its_optimizer_with_lr_and_weight_decay(name: str, kind: type) -> None:
    optimizer = make_optimizer(net().parameters(), {"optimizer": name, "lr": 0.25, "weight_decay": 0.5, "width": 64})
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_without_keys_it_is_adamw_at_one_thousandth_without_decay() -> None:
    optimizer = make_optimizer(net().parameters(), {})
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


def test_a_key_that_is_none_is_absent() -> None:
    assert group({"optimizer": None, "lr": None, "weight_decay": None})["lr"] == 1e-3


def test_momentum_is_that_of_sgd_and_rmsprop_and_leaves_the_adams_alone() -> None:
    assert group({"optimizer": "sgd"})["momentum"] == 0.9
    assert group({"optimizer": "sgd", "momentum": 0.5})["momentum"] == 0.5
    assert group({"optimizer": "rmsprop"})["momentum"] == 0.0
    assert group({"optimizer": "rmsprop", "momentum": 0.5})["momentum"] == 0.5
    assert group({"optimizer": "nadam", "momentum": 0.5})["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_runs_of_an_optimizer_agree_to_the_bit(name: str) -> None:
    def trained() -> list[torch.Tensor]:
        model = net()
        optimizer = make_optimizer(model.parameters(), {"optimizer": name, "lr": 0.1, "weight_decay": 0.01})
        inputs = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
        for _ in range(5):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        return [param.detach() for param in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(), trained(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_fused_kernel_gives_what_the_plain_one_gives(name: str) -> None:
    def after_steps(fused: bool) -> torch.Tensor:
        model = net()
        optimizer = make_optimizer(model.parameters(), {"optimizer": name, "lr": 0.1, "weight_decay": 0.01})
        assert optimizer.param_groups[0]["fused"] is True
        optimizer.param_groups[0]["fused"] = fused
        inputs = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
        for _ in range(5):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        return torch.cat([param.detach().flatten() for param in model.parameters()])

    torch.testing.assert_close(after_steps(True), after_steps(False), rtol=1e-5, atol=1e-6)


def test_frozen_parameters_are_left_out() -> None:
    model = net()
    model[0].requires_grad_(False)
    assert len(make_optimizer(model.parameters(), {}).param_groups[0]["params"]) == 2


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserCodeError) as caught:
        make_optimizer(net().parameters(), {"optimizer": "adamax"})
    assert str(caught.value) == (
        "error[task]: optimizer is 'adamax', which is not known (known: adamw, adam, sgd, rmsprop, nadam)\n"
        "  hint: for any other, write Task.optimizer(params, config)"
    )


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UserCodeError, match="the model has no parameters to train"):
        make_optimizer(nn.ReLU().parameters(), {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.1", "lr is '0.1', where a number is needed"),
        (True, "lr is True, where a number is needed"),
        (float("nan"), "lr is nan, where a number is needed"),
        (-1.0, r"lr is -1.0; it must be at least 0"),
    ],
)
def test_a_learning_rate_that_is_no_rate_is_refused(value: object, message: str) -> None:
    with pytest.raises(UserCodeError, match=message):
        make_optimizer(net().parameters(), {"lr": value})  # type: ignore[dict-item]


def test_a_number_at_its_upper_end_is_out_of_range() -> None:
    with pytest.raises(UserCodeError, match=r"label_smoothing is 1; it must be within \[0, 1\)"):
        config_number({"label_smoothing": 1}, "label_smoothing", default=0.0, low=0.0, high=1.0)
