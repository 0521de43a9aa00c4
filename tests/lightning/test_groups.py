"""`signmuon_groups`: what goes where, and what is said where nothing can."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from signsgd_lightning import Signum, signmuon_groups


def where(model: nn.Module, **options: Any) -> dict[str, list[str]]:
    """Group -> the names of its parameters, once a Signum has them."""
    groups = Signum(signmuon_groups(model, **options)).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    return {group["name"]: group["param_names"] for group in groups}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 16, bias=False)
        self.embedding = nn.Embedding(16, 8)
        self.hidden = nn.Linear(8, 8)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.embedding(x)))  # type: ignore[no-any-return]


def test_a_convolutional_net() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.Linear(4, 2),
    )
    assert where(model) == {
        "matrices": ["0.weight", "4.weight"],
        "matrices, 4 in each": ["2.weight"],
        "others": ["0.bias", "1.weight", "1.bias", "2.bias", "4.bias", "5.weight", "5.bias"],
    }


def test_a_transformer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict({"bytes": nn.Embedding(16, 8), "block": layer, "head": nn.Linear(8, 16)})
    found = where(model)
    assert found["matrices, 3 in each"] == ["block.self_attn.in_proj_weight"]
    assert found["matrices"] == ["block.self_attn.out_proj.weight", "block.linear1.weight", "block.linear2.weight"]
    assert {"bytes.weight", "head.weight", "block.norm1.weight", "block.self_attn.in_proj_bias"} <= set(found["others"])


def test_attention_of_several_widths() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=6), nn.Linear(8, 2))
    assert where(model)["matrices"] == [
        "0.q_proj_weight", "0.k_proj_weight", "0.v_proj_weight", "0.out_proj.weight"
    ]  # fmt: skip


def test_recurrent_layers() -> None:
    model = nn.Sequential(nn.LSTM(4, 8, proj_size=2), nn.GRU(4, 8), nn.RNN(4, 8), nn.Linear(8, 2))
    found = where(model)
    assert found["matrices, 4 in each"] == ["0.weight_ih_l0", "0.weight_hh_l0"]
    assert found["matrices, 3 in each"] == ["1.weight_ih_l0", "1.weight_hh_l0"]
    assert found["matrices"] == ["0.weight_hr_l0", "2.weight_ih_l0", "2.weight_hh_l0"]


def test_tied_weights_are_the_output_wherever_they_stand() -> None:
    expected = {"matrices": ["hidden.weight"], "others": ["head.weight", "hidden.bias"]}
    assert where(Tied()) == where(Tied(), output=None) == expected
    named = {"embedding.weight": 1}  # the second of its names
    assert where(Tied(), matrices=named)["matrices"] == ["head.weight", "hidden.weight"]


def test_the_output_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    assert where(model, output="0")["matrices"] == ["1.weight", "2.weight"]
    assert where(model, output=None)["matrices"] == ["0.weight", "1.weight", "2.weight"]


def test_matrices_are_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.scale = nn.Linear(4, 12), nn.Parameter(torch.zeros(4, 4))

    model = nn.Sequential(Block(), Block(), nn.Linear(4, 2))
    found = where(model, matrices={"*.qkv.weight": 3, "0.scale": 1})
    assert found["matrices, 3 in each"] == ["0.qkv.weight", "1.qkv.weight"]
    assert found["matrices"] == ["0.scale"]
    assert "1.scale" in found["others"]
    assert "0.qkv.weight" in where(model, matrices={"0.qkv.weight": 0})["others"]


def test_settings() -> None:
    matrices, others = Signum(signmuon_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 0.5, 0.25)).param_groups
    assert (matrices["lr"], matrices["betas"], matrices["verdict_momentum"]) == (0.5, (0.9, 0.95), 0.0)
    assert (matrices["orthogonalize"], others["orthogonalize"]) == (True, False)
    assert (others["lr"], others["betas"], others["verdict_momentum"]) == (0.25, (0.9, 0.95), 0.0)


def test_a_wrapped_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert where(DataParallel(model, device_ids=[]))["matrices"] == ["module.0.weight"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"output": "head"}, "output must be the name of a layer, or None, got 'head': the model has '0', '1'"),
        ({"output": ""}, "output must be the name of a layer"),
        ({"matrices": {"qkv": 3}}, r"matrices names 'qkv', which is no parameter of the model: it has '0\.weight'"),
        ({"matrices": {"0.weight": 5}}, r"0\.weight of shape \(4, 4\) is to hold 5 matrices"),
        ({"matrices": {"0.bias": 1}}, r"0\.bias has the shape \(4,\)"),
        ({"matrices": {"0.weight": -1}}, r"matrices\['0.weight'\] must be a whole number of 0 or more, got -1"),
        ({"matrices": {"0.weight": None}}, r"matrices\['0.weight'\] must be a whole number of 0 or more, got None"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        where(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), **options)


def test_what_is_of_another_type() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(TypeError, match="signmuon_groups takes a model, got a generator: pass model, not its param"):
        signmuon_groups(model.parameters())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"matrices must map names to numbers, such as \{'qkv.weight': 3\}, got 3"):
        signmuon_groups(model, matrices=3)  # type: ignore[arg-type]


def test_without_matrices() -> None:
    with pytest.raises(ValueError, match="the model has no hidden matrix to orthogonalize, only 'weight', 'bias'"):
        signmuon_groups(nn.Linear(4, 2))


def test_lazy_parameters() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its lazy modules
        model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="run one batch through it first"):
        signmuon_groups(model)
