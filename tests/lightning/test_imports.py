"""`import signsgd_lightning` needs torch alone; Lightning comes with a strategy or a callback."""

import subprocess
import sys
from pathlib import Path

import pytest

import signsgd_lightning

pytestmark = pytest.mark.multiprocess

ROOT = Path(signsgd_lightning.__file__).parents[1]

PLAIN = """
import sys, torch, signsgd_lightning
x = torch.nn.Parameter(torch.ones(3))
optimizer = signsgd_lightning.Signum([x])
x.sum().backward()
optimizer.step()
signsgd_lightning.enable_majority_vote, signsgd_lightning.gather_state, dir(signsgd_lightning)
OTHERS = ("lightning", "pytorch_lightning", "transformers", "torchft", "keras", "tensorflow", "jax", "signsgd_keras")
print([name for name in sys.modules if name.partition(".")[0] in OTHERS])
print(signsgd_lightning.MajorityVoteStrategy.__name__, "lightning" in sys.modules)
print("torchft" in sys.modules, signsgd_lightning.enable_elastic_vote.__name__, "torchft" in sys.modules)
"""

BY_NAME = """
{imports}
for name in ("majority_vote", "majority_vote_find_unused_parameters_true"):
    trainer = lightning.pytorch.Trainer(strategy=name, accelerator="cpu", devices=1, logger=False)
    print(type(trainer.strategy).__name__, trainer.strategy._ddp_kwargs)
"""

WITHOUT = """
import sys
for name in ("lightning", "transformers", "torchft"):
    sys.modules[name] = None
import signsgd_lightning
for name in ("VoteMonitor", "MajorityVoteCallback", "enable_elastic_vote"):
    try:
        getattr(signsgd_lightning, name)
    except ImportError as error:
        print(error)
"""


def printed(code: str) -> list[str]:
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_what_is_imported_when_asked_for() -> None:
    assert printed(PLAIN) == ["[]", "MajorityVoteStrategy True", "False enable_elastic_vote True"]


@pytest.mark.parametrize(
    "imports",
    [
        "import lightning.pytorch, signsgd_lightning",
        pytest.param("import signsgd_lightning, lightning.pytorch", marks=pytest.mark.nightly),
        pytest.param("import lightning.pytorch\nfrom signsgd_lightning import Signum", marks=pytest.mark.nightly),
    ],
)
def test_the_strategy_and_its_variant_by_name(imports: str) -> None:
    """Whichever of the two is imported first."""
    assert printed(BY_NAME.format(imports=imports)) == [
        "MajorityVoteStrategy {}",
        "MajorityVoteStrategy {'find_unused_parameters': True}",
    ]


def test_without_lightning_transformers_and_torchft() -> None:
    assert printed(WITHOUT) == [
        "VoteMonitor needs Lightning: pip install 'signsgd[lightning]'",
        "MajorityVoteCallback needs transformers: pip install 'signsgd[huggingface]'",
        "enable_elastic_vote needs torchft: pip install 'signsgd[elastic]'",
    ]
