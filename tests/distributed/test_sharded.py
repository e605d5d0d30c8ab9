"""What is sharded over processes and not replicated: what is refused, and with which words; what trains as it is."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torchcurv import SecondOrderOptimizer


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of one process, in which tensors are sharded all the same."""
    store = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def sharded(mesh):
    own = model()
    fully_shard(own, mesh=mesh)
    return own


def split(mesh):
    return parallelize_module(model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


HOW = {"fully_shard": sharded, "tensor parallelism": split}
over_how = pytest.mark.parametrize("how", HOW)


@over_how
def test_a_curvature_of_sharded_parameters_is_refused(alone, how):
    with pytest.raises(ValueError, match=r"DTensors .* wrap the model in DistributedDataParallel .*approx=None"):
        SecondOrderOptimizer(HOW[how](alone), loss_fn="cross_entropy")


@over_how
def test_they_train_with_the_plain_gradient_as_whole_ones_do(alone, how):
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    found = []
    for own in (HOW[how](alone), model()):
        optimizer = SecondOrderOptimizer(own, loss_fn="cross_entropy", approx=None, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(own(x), y).backward()
            optimizer.step()
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in own.parameters()]
        found.append((torch.cat([p.detach().flatten() for p in whole]), optimizer.metrics()))
    (ours, numbers), (truth, same) = found
    torch.testing.assert_close(ours, truth)
    assert numbers == pytest.approx(same)


def test_an_optimizer_that_shards_another_is_named_in_the_refusal(alone):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own scripts
        from torch.distributed.optim import ZeroRedundancyOptimizer
    with pytest.raises(TypeError, match=r"ZeroRedundancyOptimizer.*DistributedDataParallel"):
        ZeroRedundancyOptimizer(model().parameters(), optimizer_class=SecondOrderOptimizer, loss_fn="cross_entropy")
