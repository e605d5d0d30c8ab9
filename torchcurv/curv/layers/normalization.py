"""Norms and PReLU: one weight per feature, whose input is the normalised one."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from torchcurv.curv.layers.view import View


def weight_size(module: Any) -> int:
    return (module.bias if module.weight is None else module.weight).numel()


def channels_last(module: Any, x: Tensor) -> Tensor:
    """[n, C, ...] -> [n, r, C, 1]."""
    return x.reshape(*x.shape[:2], -1).transpose(1, 2).unsqueeze(-1)


def trailing(module: Any, x: Tensor) -> Tensor:
    """[n, ..., *normalized_shape] -> [n, r, features, 1]."""
    return x.reshape(x.shape[0], -1, math.prod(module.normalized_shape), 1)


def layer_norm(module: Any, x: Tensor) -> Tensor:
    return trailing(module, F.layer_norm(x, module.normalized_shape, eps=module.eps))


def rms_norm(module: Any, x: Tensor) -> Tensor:
    return trailing(module, F.rms_norm(x, module.normalized_shape, eps=module.eps))


def group_norm(module: Any, x: Tensor) -> Tensor:
    return channels_last(module, F.group_norm(x, module.num_groups, eps=module.eps))


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def uses_batch_statistics(module: Any) -> bool:
    """Whether a batch norm normalises with the statistics of the batch it is given."""
    return module.training or module.running_mean is None


def _batch_norm(module: Any, x: Tensor, of_the_batch: bool) -> Tensor:
    if of_the_batch:
        return channels_last(module, F.batch_norm(x, None, None, training=True, eps=module.eps))
    mean, var = (at.to(x.dtype) for at in (module.running_mean, module.running_var))
    return channels_last(module, F.batch_norm(x, mean, var, eps=module.eps))


def _instance_norm(module: Any, x: Tensor, of_the_sample: bool) -> Tensor:
    if of_the_sample:
        return channels_last(module, F.instance_norm(x, eps=module.eps))
    return _batch_norm(module, x, False)


def prelu_inputs(module: Any, x: Tensor) -> Tensor:
    return prelu_signal(module, x.clamp_max(0))


def prelu_signal(module: Any, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, 1, 1) if module.num_parameters == 1 else channels_last(module, x)


BATCH_NORM = View(_batch_norm, channels_last, weight_size, batch_dependent=True, mode=uses_batch_statistics)
INSTANCE_NORM = View(_instance_norm, channels_last, weight_size, mode=uses_batch_statistics)
