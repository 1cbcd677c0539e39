"""The README's scripts for several processes, launched as it says."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

README = Path(__file__).parents[2] / "README.md"
SCRIPTS = dict(re.findall(r"^```python file=(\S+)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LAUNCHERS = {"ddp.py": TORCHRUN, "fsdp.py": TORCHRUN, "spawn.py": ()}


def launch(name: str, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / name).write_text(SCRIPTS[name].replace(":29500", f":{port}"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:mtlwrap", *LAUNCHERS[name], name],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(README.parent), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_every_script_has_a_launcher():
    assert SCRIPTS.keys() == LAUNCHERS.keys()
    assert all(len(text.splitlines()) < 40 for text in SCRIPTS.values())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_recipe(name, tmp_path):
    launch(name, tmp_path)
    if name == "ddp.py":
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert any(name.startswith("balancer.") and value.any() for name, value in saved["model"].items())
    if name == "fsdp.py":
        first = steps_in(tmp_path / "checkpoint")
        launch(name, tmp_path)  # it goes on
        assert (first, steps_in(tmp_path / "checkpoint")) == ({10.0}, {20.0})


def steps_in(checkpoint: Path) -> set[float]:
    """How many steps Adam has made for the parameters, as a checkpoint says."""
    dcp_to_torch_save(checkpoint, checkpoint / "whole.pt")
    state = torch.load(checkpoint / "whole.pt", weights_only=False)["optimizer"]["state"]
    return {moments["step"].item() for moments in state.values()}
