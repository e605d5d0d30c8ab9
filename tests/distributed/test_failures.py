"""A process that is slow changes nothing for the others; where one dies, the others raise."""

import time

from processes import network, part, together, weights
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from torchcurv import SecondOrderOptimizer

SLOW, LAST = 1, 3


def trained(rank, slow, dies):
    model = network()
    called = DistributedDataParallel(model)
    optimizer = SecondOrderOptimizer(model, loss_fn="cross_entropy", samples=None)
    for step in range(LAST + 1):
        optimizer.zero_grad()
        x, y = part(step, rank)
        nn.functional.cross_entropy(called(x), y).backward()
        if rank == 1 and step == SLOW and slow:
            time.sleep(0.5)
        if rank == 1 and step == LAST and dies:
            distributed.destroy_process_group()  # as its end does
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
            return None
        try:
            optimizer.step()
        except RuntimeError as error:
            return f"raised {type(error).__name__}"
    return weights(model).tolist()


def all_trained(rank):
    found = [trained(rank, slow, False) for slow in (False, True)]
    start = time.monotonic()
    return [*found, trained(rank, False, True), time.monotonic() - start]


def test_slow_and_dead_processes():
    (quick, late, refused, seconds), (other, other_late, *_) = together(all_trained)
    assert quick == late == other == other_late
    assert refused.startswith("raised") and seconds < 30
