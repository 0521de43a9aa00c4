"""Wrong settings are refused at construction, with a sentence."""

from typing import Any

import pytest
import torch

from signsgd_lightning import Signum
from tests.lightning.options import parameters, take_step


@pytest.mark.parametrize("betas", [("0.9", "0.9"), "00"])
def test_betas_of_text_are_refused_at_construction(betas: Any) -> None:
    with pytest.raises(ValueError, match="betas must be a pair of numbers"):
        Signum(parameters(), betas=betas)


def test_betas_of_a_list_are_kept() -> None:
    optimizer = Signum(parameters(), betas=[0.9, 0.99])  # type: ignore[arg-type]
    take_step(optimizer, 0)
    assert tuple(optimizer.param_groups[0]["betas"]) == (0.9, 0.99)


def test_auto_warmup_that_would_never_end_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="would need over"):
        Signum(parameters(), betas=(0.9, 0.9999999), warmup_steps="auto")


def test_bad_default_is_refused_even_where_every_group_has_its_own() -> None:
    """As torch's own optimizers do: a group added later would take it."""
    with pytest.raises(ValueError, match="lr must be 0 or more and finite, got -1.0"):
        Signum([{"params": parameters(), "lr": 0.1}], lr=-1.0)


def test_group_that_is_no_dict_is_refused_with_torchs_sentence() -> None:
    with pytest.raises(TypeError, match="param_group must be a dict, but got <class 'list'>"):
        Signum(parameters()).add_param_group(parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": "0.1"},
        {"lr": None},
        {"weight_decay": "0.1"},
        {"verdict_momentum": "0.5"},
        {"warmup_steps": None},
        {"warmup_steps": float("inf")},
        {"warmup_steps": float("nan")},
    ],
    ids=str,
)
def test_what_is_no_number_is_refused_with_a_sentence(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must "):
        Signum(parameters(), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float32, "bfloat16", 2], ids=str)
def test_other_momentum_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"momentum_dtype must be None, .* or torch.bfloat16, got "):
        Signum(parameters(), momentum_dtype=dtype)
    optimizer = Signum(parameters())
    with pytest.raises(ValueError, match="momentum_dtype"):
        optimizer.add_param_group({"params": parameters(), "momentum_dtype": dtype})
    assert len(optimizer.param_groups) == 1


def test_integer_parameters_are_not_called_complex() -> None:
    with pytest.raises(ValueError, match="got torch.int32$"):
        Signum([torch.zeros(2, dtype=torch.int32)])


@pytest.mark.parametrize("lr", [float("nan"), -1.0])
def test_a_tensor_lr_that_is_changed_in_place_is_checked(lr: float) -> None:
    optimizer = Signum(parameters(), lr=torch.tensor(0.1))
    take_step(optimizer, 0)
    before = [p.clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.param_groups[0]["lr"].fill_(lr)
    with pytest.raises(
        ValueError, match=r"lr must be 0 or more and finite, got (nan|tensor\(nan\)|-1\.0|tensor\(-1\.\))"
    ):
        take_step(optimizer, 1)
    assert all(map(torch.equal, before, optimizer.param_groups[0]["params"]))
