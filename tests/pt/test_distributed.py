"""DistributedDataParallel on two processes computes what one process does on the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from roberta_pln.pt import RobertaPreLayerNormForMaskedLM
from tests.contract import random_ids, tiny_config

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
torch.set_num_threads(1)
model = RobertaPreLayerNormForMaskedLM(tiny_config()).double()
ids = torch.from_numpy(random_ids(4))
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
parallel = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    mine = ids[2 * rank : 2 * rank + 2]
    parallel(mine, labels=mine).loss.backward()
    optimizer.step()
torch.save(model.state_dict(), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    from roberta_pln.pt import RobertaPreLayerNormForMaskedLM
    from tests.contract import random_ids, tiny_config

    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PROGRAM]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=root) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]

    torch.manual_seed(0)
    model = RobertaPreLayerNormForMaskedLM(tiny_config()).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.from_numpy(random_ids(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()  # as many labels in both halves: the mean of means is the mean
        optimizer.step()
    for rank in range(2):
        states = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(states[name], value, rtol=0, atol=1e-14)  # roundings of 1e-16 of numbers near 1
    assert any((before[name] - value).abs().max() > 1e-3 for name, value in model.state_dict().items())
