"""Parameter groups for SignMuon: which of a model's parameters are hidden matrices, and which are all the rest."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from signsgd_core import check_count

_BETAS = (0.9, 0.95)

_GATES = {nn.LSTM: 4, nn.GRU: 3}
"""Gates of a recurrent layer, whose matrices lie one below the other in its weights."""


def signmuon_groups(
    model: nn.Module,
    lr: float = 0.08,
    other_lr: float = 1e-3,
    *,
    output: str | None = "auto",
    matrices: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Return the parameter groups of a model for SignMuon: hidden matrices, and all other parameters.

    ``"matrices"`` has ``orthogonalize=True`` and the hidden weights of `Linear`, `Conv1d`, `Conv2d`,
    `MultiheadAttention` and recurrent layers. ``"others"`` has all else: the output layer, embeddings, norms, biases.
    Both have ``betas=(0.9, 0.95)``.

    The output layer is the last `Linear` in the order of ``model.modules()``, or one whose weight is an embedding's. A
    weight that several modules have is among the others if one of them is an embedding or the output. Fused weights are
    cut: attention's projection of queries, keys and values in three, an LSTM's in four, a convolution's in its groups.
    Each number of matrices has a group of its own. ``group["param_names"]`` says what went where.

    Args:
        model: whose parameters they are, all of them, also those without gradients.
        lr: of the matrices; first try twice the rate of `torch.optim.Muon`, without its `adjust_lr_fn`.
        other_lr: of the others; first try half of the rate that AdamW has.
        output: name of the output layer, as where that is a convolution; None if the last `Linear` is hidden.
        matrices: name of a parameter -> how many matrices it holds, where its module does not tell; 0 puts it among the
            others. Names may have wildcards, as ``"blocks.*.qkv.weight"``.

    Raises:
        ValueError: if a name is none of the model's, it has lazy parameters, or no matrix; for a number of matrices
            below 0.
        TypeError: if it is no model, or `matrices` no mapping.

    Example:
        >>> from signsgd_lightning import Signum
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(group["name"], group["param_names"]) for group in Signum(signmuon_groups(model)).param_groups]
        [('matrices', ['0.weight']), ('others', ['0.bias', '2.weight', '2.bias'])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"signmuon_groups takes a model, got a {type(model).__name__}: pass model, not its parameters")
    if not isinstance(matrices, Mapping | None):
        raise TypeError(f"matrices must map names to numbers, such as {{'qkv.weight': 3}}, got {matrices!r}")
    named = dict(model.named_parameters())
    if any(is_lazy(p) for p in named.values()):
        raise ValueError("the model has lazy parameters of unknown shapes: run one batch through it first")
    counts = _counts(model, output)
    every = dict(model.named_parameters(remove_duplicate=False))  # one that modules share has a name in each
    for pattern, count in (matrices or {}).items():
        check_count(f"matrices[{pattern!r}]", count, 0)
        found = [name for name in every if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"matrices names {pattern!r}, which is no parameter of the model: it has {_some(named)}")
        counts.update({id(every[name]): count for name in found})
    by_count: dict[int, list[Any]] = {}
    for name, p in named.items():
        by_count.setdefault(counts.get(id(p), 0), []).append((name, p))
    others = by_count.pop(0, [])
    if not by_count:
        raise ValueError(
            f"the model has no hidden matrix to orthogonalize, only {_some(named)}: name some by matrices={{name: 1}}, "
            "or take Signum(model.parameters(), betas=(0, 0), verdict_momentum=0.8)"
        )
    groups: list[dict[str, Any]] = [
        {
            "params": members,
            "name": "matrices" if count == 1 else f"matrices, {count} in each",
            "lr": lr,
            "betas": _BETAS,
            "orthogonalize": True,
            "matrices": count,
        }
        for count, members in sorted(by_count.items())
    ]
    if others:
        groups.append({"params": others, "name": "others", "lr": other_lr, "betas": _BETAS})
    return groups


def _counts(model: nn.Module, output: str | None) -> dict[int, int]:
    """Return how many hidden matrices the modules' weights hold, by parameter's id; 0 for what is none."""
    counts = dict[int, int]()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            count = _count(module, name)
            counts[id(p)] = min(count, counts.get(id(p), count))
    last = _output(model, output)
    for p in last.parameters() if last is not None else ():
        counts[id(p)] = 0
    return counts


def _count(module: nn.Module, name: str) -> int:
    """Return how many hidden matrices a module's own parameter holds."""
    if isinstance(module, nn.Linear):
        return int(name == "weight")
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return module.groups if name == "weight" else 0
    if isinstance(module, nn.MultiheadAttention):
        return 3 if name == "in_proj_weight" else int(name.endswith("_proj_weight"))
    if isinstance(module, nn.RNNBase):
        gates = next((count for kind, count in _GATES.items() if isinstance(module, kind)), 1)
        return {"weight_ih": gates, "weight_hh": gates, "weight_hr": 1}.get(name[:9], 0)
    return 0


def _output(model: nn.Module, output: str | None) -> nn.Module | None:
    """Return the output layer."""
    if output is None:
        return None
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if output == "auto":
        embedded = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        tied = [linear for linear in linears if id(linear.weight) in embedded]
        return next(iter(tied or linears[-1:]), None)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if output not in modules or not output:
        raise ValueError(f"output must be the name of a layer, or None, got {output!r}: the model has {_some(modules)}")
    return modules[output]


def _some(names: Mapping[str, object]) -> str:
    """Return a few names, for an error."""
    shown = [repr(name) for name in names if name]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
