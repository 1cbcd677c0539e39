"""The README's recipes train as the plain loop does, and its table is what the tests declare."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.testing import assert_close

from mtlwrap import MultiTaskModel
from tests.processes.test_recipes import SCRIPTS
from tests.test_readme import README, blocks
from tests.trainers import processes, table

# What the recipe of a trainer imports, and no other.
RECIPES = {
    "lightning": "import lightning",
    "ignite": "from ignite.engine import create_supervised_trainer",
    "accelerate": "from accelerate import",
    "transformers": "from transformers import",
}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*pin_memory")


def block_with(line: str) -> str:
    (found,) = (code for _, code in blocks("python") if re.search(rf"^{line}", code, re.MULTILINE))
    return found


def plain_loop(model: MultiTaskModel, batches: Sequence[Sequence[Tensor]], *, clips_all: bool) -> None:
    """What every recipe says: Adam, two batches to a step, clipping, of the balancer's gradients too or not."""
    optimizer = torch.optim.Adam(model.param_groups(lr=1e-3, balancer_lr=1e-2))
    for number, (x, kind, size) in enumerate(batches, start=1):
        predictions = model(x)
        losses = {"kind": cross_entropy(predictions["kind"], kind), "size": mse_loss(predictions["size"], size)}
        (model.scalarize(losses) / 2).backward()
        if number % 2 == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters() if clips_all else model.model_parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("trainer", RECIPES)
def test_recipe(trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = block_with(RECIPES[trainer])
    assert recipe.count("\n") < 30
    namespace: dict[str, Any] = {"__name__": "readme"}
    for code in (block_with("from mtlwrap import IMTL, MultiTaskModel"), block_with("class Objective")):
        exec(code, namespace)
    namespace["model"].zero_grad()  # backbone and heads were trained before
    data, expected = namespace["loader"].dataset.tensors, copy.deepcopy(namespace["model"])
    seen: list[Tensor] = []
    hook = namespace["model"].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().cpu()))
    exec(recipe, namespace)
    hook.remove()
    # Some trainers shuffle: the plain loop takes the rows in the order in which they came.
    rows = [(data[0][None] == x[:, None]).all(2).int().argmax(1) for x in seen]
    assert sorted(torch.cat(rows).tolist()) == list(range(len(data[0])))
    batches = [[column[chosen] for column in data] for chosen in rows]
    plain_loop(expected, batches, clips_all=trainer == "transformers")
    found = {name: value.cpu() for name, value in namespace["model"].state_dict().items()}
    assert_close(found, dict(expected.state_dict()), rtol=0, atol=0)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "checkpoints"])


def make_recipe_of_processes() -> dict[str, Any]:
    """The function of the README's script, a model, and a batch for each process: in the second nobody has a kind."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(SCRIPTS["ddp.py"], namespace)
    torch.manual_seed(0)
    backbone, heads = nn.Sequential(nn.Linear(16, 8), nn.Tanh()), {"kind": nn.Linear(8, 3), "size": nn.Linear(8, 1)}
    namespace["model"] = model = MultiTaskModel(backbone, heads, balancer="imtl")
    namespace["optimizer"] = torch.optim.Adam(model.param_groups(lr=1e-3, balancer_lr=1e-2))
    kinds = torch.randint(3, (5,)), torch.full((5,), -1)
    namespace["batches"] = [(torch.randn(5, 16), kind, torch.randn(5, 1)) for kind in kinds]
    return namespace


def run_recipe(rank: int, size: int) -> dict[str, Tensor]:
    torch.distributed.init_process_group("gloo")
    recipe = make_recipe_of_processes()
    recipe["train"](recipe["model"], recipe["optimizer"], [recipe["batches"][rank]])
    return recipe["model"].state_dict()


def test_recipe_of_processes() -> None:
    first, second = processes.run("recipe", 2, run_recipe)
    assert_close(first, second, rtol=0, atol=0)
    recipe = make_recipe_of_processes()
    model, optimizer, (one, other) = recipe["model"], recipe["optimizer"], recipe["batches"]
    predictions = model(torch.cat([one[0], other[0]]))
    kind = cross_entropy(predictions["kind"][:5], one[1]) / 2
    model.backward({"kind": kind, "size": mse_loss(predictions["size"], torch.cat([one[2], other[2]]))})
    optimizer.step()
    assert_close(first, model.state_dict(), rtol=1e-5, atol=1e-7)


def test_the_table_is_what_the_tests_declare() -> None:
    assert table.render(table.declared()) in README.read_text(encoding="utf-8")


def test_a_cell_that_fails_is_shown() -> None:
    cells = table.declared() | {("ignite", "clipping"): False, ("Accelerate", "fp16 + scaler"): False}
    shown = table.render(cells).splitlines()
    assert sum(line.count("✗") for line in shown) == 2
    assert shown[-1].startswith("(a) The `Trainer` leaves precision to Accelerate")
