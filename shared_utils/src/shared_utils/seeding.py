"""One call that seeds everything, loader workers included."""

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function, seed_everything


def seed_all(seed: int) -> torch.Generator:
    """Seed Python, NumPy and torch (every device), and later loader workers.

    Pass the result to a `DataLoader` as `generator` and `seed_worker` as `worker_init_fn`: the
    order of samples then depends on the seed alone, not on the number of workers.
    """
    seed_everything(seed, workers=True, verbose=False)
    return torch.Generator().manual_seed(seed)


seed_worker = pl_worker_init_function
