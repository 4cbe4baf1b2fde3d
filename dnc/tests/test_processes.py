"""One process against two with the same global batch, over gloo."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dnc import NearestCentroidHead, sinkhorn
from dnc.centroids import pick_lowest
from dnc.processes import alone, rank, reduce, world_size

CLASSES, WIDTH, K, STEPS = 4, 6, 3, 10
FEWER = {"few places", "few samples", "bank", "correct only", "dead", "cold"}  # half the steps do

# Options of the head, and how a batch is dealt out to two processes.
SCENARIOS: dict[str, tuple[dict[str, Any], str]] = {
    "batch": ({"memory": "batch"}, "even"),
    "queue": ({"memory": "queue", "memory_size": 200}, "even"),
    "uneven": ({"memory": "queue", "memory_size": 200}, "uneven"),
    "uneven batch": ({"memory": "batch"}, "uneven"),
    "class on one only": ({"memory": "batch"}, "by class"),
    "nothing on one": ({"memory": "queue", "memory_size": 200}, "now and then nothing"),
    "no loss on one": ({"memory": "batch"}, "no loss"),
    "few places": ({"memory": "batch"}, "limited"),
    "few samples": ({"memory": "batch"}, "few"),
    "bank": ({"memory": "bank", "memory_size": 2}, "uneven"),
    "correct only": ({"memory": "batch", "correct_only_after": 2}, "even"),
    "dead": ({"memory": "batch", "reseed_after": 2}, "all alike"),
    "cold": ({"memory": "batch", "warm_start": False, "momentum": 0.7}, "even"),
}


def batch(step: int, deal: str) -> tuple[Tensor, Tensor, Tensor]:
    """The global batch of a step, and which of two processes has each sample."""
    generator = torch.Generator().manual_seed(step)
    n = 6 if deal == "few" else 48
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    modes = torch.randn(CLASSES, K, WIDTH, generator=torch.Generator().manual_seed(99))
    mode = torch.randint(0, K, (n,), generator=generator)
    features = modes[labels, mode] + 0.3 * torch.randn(n, WIDTH, generator=generator)
    if deal == "all alike" and step < 4:
        features[labels == 1] = modes[1, 0]
    owner = torch.arange(n) % 2
    if deal in ("uneven", "few"):
        owner = (torch.rand(n, generator=generator) < 0.2).long()
    elif deal == "by class":
        owner = torch.where(labels == 2, 1, torch.where(labels == 0, 0, owner))
    elif deal in ("now and then nothing", "no loss") and step % 3 == 1:
        owner = torch.full((n,), step % 2)
    return features, labels, owner


def steps(name: str) -> dict[str, Tensor]:
    """Some iterations in this process: all of the batch, or the part of it dealt to this one."""
    options, deal = SCENARIOS[name]
    torch.manual_seed(0)
    head = NearestCentroidHead(CLASSES, WIDTH, K, **{"momentum": 0.95, **options})
    if deal == "limited":
        head.limit_places(torch.tensor([1, 2, 3, 50]))
    found: dict[str, Tensor] = {}
    for step in range(STEPS // 2 if name in FEWER else STEPS):
        features, labels, owner = batch(step, deal)
        own = owner == rank() if world_size() > 1 else owner >= 0
        if own.any() or deal != "no loss":
            head.loss(features[own], labels[own], torch.arange(len(own))[own])
        if step == 0:
            found["seeds"] = head.centroids.clone()
        head.update()
        if deal == "all alike" and step == 3:
            found["revived"] = head.centroids.clone()
    own_only = ("memory.",)  # each process remembers its own samples
    kept = {n: v for n, v in head.state_dict().items() if not n.startswith(own_only)}
    return {**found, **kept}


def primitives() -> dict[str, Tensor]:
    """The parts below the head, where this process has some of the samples."""
    features, labels, owner = batch(0, "uneven")
    own = owner == rank() if world_size() > 1 else owner >= 0
    z = F.normalize(features[own], dim=1)
    points = F.normalize(torch.randn(K, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)
    plan = torch.zeros(len(own), K)
    plan[own] = sinkhorn(z @ points.T, labels[own], CLASSES)
    # Two equals in different processes: the first process's counts, though it comes later.
    score = torch.where(labels == 1, -5.0, features[:, 0])
    found, lowest, picked = pick_lowest(score[own], z, labels[own], CLASSES)
    return {"plan": plan, "own": own, "found": found, "lowest": lowest, "picked": picked.sum()}


def sums() -> dict[str, Tensor]:
    """Each operation on numbers that differ between processes."""
    own = torch.tensor([1.0, -2.0, 5.0]) if rank() == 0 else torch.tensor([3.0, -7.0, 4.0])
    return {
        "sum": reduce(own.clone(), "sum"),
        "max": reduce(own.clone(), "max"),
        "min": reduce(own.clone(), "min"),
        "rank": torch.tensor([rank(), world_size()]),
        **by_itself(own.clone()),
    }


def by_itself(own: Tensor) -> dict[str, Tensor]:
    """The same where the others do nothing: in turn, so that waiting for them would be seen."""
    found = {"own": own}
    if rank() == 1 or world_size() == 1:
        with alone():
            found["by itself"] = reduce(own.clone(), "sum")
            found["alone"] = torch.tensor([rank(), world_size()])
    return found


def work(own_rank: int, folder: Path) -> None:
    """What one of two processes does: everything, results into a file."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=own_rank, world_size=2)
    results = {name: steps(name) for name in SCENARIOS}
    results["primitives"], results["sums"] = primitives(), sums()
    dist.barrier()
    torch.save(results, folder / f"{own_rank}.pt")
    dist.destroy_process_group()


Results = list[dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of two processes; this file is also the program that they run."""
    folder = tmp_path_factory.mktemp("pair")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(own_rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own_rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=500)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{own_rank}.pt", weights_only=True) for own_rank in range(2)]


def test_a_process_alone_needs_no_group() -> None:
    assert (rank(), world_size()) == (0, 1)
    own = torch.tensor([1, 2])
    assert reduce(own, "sum") is own
    assert own.tolist() == [1, 2]


def test_sums_maxima_and_minima(pair: Results) -> None:
    for own_rank, results in enumerate(pair):
        found = results["sums"]
        assert found["sum"].tolist() == [4.0, -9.0, 9.0]
        assert found["max"].tolist() == [3.0, -2.0, 5.0]
        assert found["min"].tolist() == [1.0, -7.0, 4.0]
        assert found["rank"].tolist() == [own_rank, 2]
    second = pair[1]["sums"]
    assert torch.equal(second["by itself"], second["own"])
    assert second["alone"].tolist() == [0, 1]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_end_where_one_does(pair: Results, name: str) -> None:
    alone = steps(name)
    first, second = (results[name] for results in pair)
    assert first.keys() == second.keys() == alone.keys()
    for key, expected in alone.items():
        assert torch.equal(first[key], second[key]), f"{key} differs between processes"
        if expected.is_floating_point():
            torch.testing.assert_close(first[key], expected, rtol=0, atol=1e-5)
        else:
            assert torch.equal(first[key], expected), key
    assert torch.equal(first["seeds"], alone["seeds"])  # real samples, to the bit
    assert not torch.equal(alone["centroids"], alone["seeds"])


def test_the_scenarios_are_what_they_say() -> None:
    """Of each kind of batch the case that it is there for occurs."""
    owners = {deal: [batch(s, deal)[2] for s in range(STEPS)] for _, deal in SCENARIOS.values()}
    assert all(abs(int(o.sum()) * 2 - 48) > 12 for o in owners["uneven"])
    nothing = [set(o.tolist()) for o in owners["now and then nothing"]]
    assert {0} in nothing
    assert {1} in nothing
    _, labels, owner = batch(0, "by class")
    assert owner[labels == 2].all()
    assert not owner[labels == 0].any()
    counts = torch.bincount(batch(0, "few")[1], minlength=CLASSES)
    assert (counts < K).any()
    assert steps("few places")["seeded"].sum(1).tolist() == [1, 2, 3, 3]
    assert steps("correct only")["usage"].sum() < 48 * STEPS // 2
    assert steps("bank")["updates"].max() == 2
    dead = steps("dead")
    assert not torch.equal(dead["revived"], dead["seeds"])


def test_parts_of_a_plan_are_the_plan(pair: Results) -> None:
    alone = primitives()
    first, second = (results["primitives"] for results in pair)
    assert not (first["own"] & second["own"]).any()
    torch.testing.assert_close(first["plan"] + second["plan"], alone["plan"], rtol=0, atol=1e-6)
    torch.testing.assert_close(alone["plan"].sum(1), torch.ones(48), rtol=0, atol=1e-6)


def test_one_process_has_the_lowest_sample(pair: Results) -> None:
    alone = primitives()
    first, second = (results["primitives"] for results in pair)
    features, labels, owner = batch(0, "uneven")
    for found in (first, second):
        assert found["found"].all()
        assert torch.equal(found["lowest"], first["lowest"])
    assert first["picked"] + second["picked"] == CLASSES
    others = [0, 2, 3]
    assert torch.equal(first["lowest"][others], alone["lowest"][others])
    z = F.normalize(features, dim=1)
    tied = z[(labels == 1) & (owner == 0)][0]
    assert torch.equal(first["lowest"][1], tied)
    assert (owner[labels == 1] == 1).any()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
