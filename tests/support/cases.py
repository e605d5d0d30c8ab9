"""What the tests run over: layers, losses, models. Small, fast, float64; a new row brings its whole suite.

Every `make_*` builds a fresh, seeded object and leaves the global random state alone.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

CLASSES = 3
APPROXIMATIONS = ["full", "block", "unit", "kfac", "ekfac", "diag", "lowrank"]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """make() under its own seed, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- layers -------------------------------------------------------------------------------------------------


class LayerCase(NamedTuple):
    id: str
    make_layer: Callable[[], nn.Module]
    input_shape: tuple[int, ...]  # without the batch dimension
    make_input: Callable[..., Tensor | tuple] | None = None  # (n, seed) -> input; None: randn(n, *input_shape)

    def input_for(self, n: int, seed: int = 1) -> Tensor | tuple:
        """A batch of n samples for the layer: one tensor, or the tuple of its arguments."""
        return self.make_input(n, seed) if self.make_input else randn(n, *self.input_shape, seed=seed)


def _layer(
    id: str, make: Callable[..., nn.Module], *args, shape: tuple[int, ...], make_input=None, **kwargs
) -> LayerCase:
    return LayerCase(id, lambda: seeded(lambda: make(*args, **kwargs)), shape, make_input)


LINEAR_LAYERS = [
    _layer("linear", nn.Linear, 4, 3, shape=(4,)),
    _layer("linear_nobias", nn.Linear, 4, 3, bias=False, shape=(4,)),
    _layer("linear_1_to_1", nn.Linear, 1, 1, shape=(1,)),
    _layer("linear_seq", nn.Linear, 4, 3, shape=(5, 4)),
    _layer("linear_seq_nobias", nn.Linear, 4, 3, bias=False, shape=(5, 4)),
    _layer("linear_grid", nn.Linear, 3, 2, shape=(2, 3, 3)),
    _layer("linear_grid_nobias", nn.Linear, 3, 2, bias=False, shape=(2, 3, 3)),
]

CONV_LAYERS = [
    _layer("conv1d", nn.Conv1d, 2, 3, 3, shape=(2, 6)),
    _layer("conv1d_nobias", nn.Conv1d, 2, 3, 3, bias=False, shape=(2, 6)),
    _layer("conv1d_pointwise", nn.Conv1d, 3, 2, 1, shape=(3, 4)),
    _layer("conv1d_stride_pad", nn.Conv1d, 2, 3, 3, stride=2, padding=2, shape=(2, 6)),
    _layer("conv1d_same_dilated", nn.Conv1d, 2, 2, 3, padding="same", dilation=2, shape=(2, 5)),
    _layer("conv1d_valid_dilated", nn.Conv1d, 2, 2, 2, padding="valid", dilation=3, shape=(2, 6)),
    _layer("conv1d_groups", nn.Conv1d, 4, 6, 2, groups=2, padding=1, shape=(4, 4)),
    _layer("conv1d_depthwise", nn.Conv1d, 3, 3, 3, groups=3, padding=1, shape=(3, 5)),
    _layer("conv1d_circular", nn.Conv1d, 2, 2, 3, padding=1, padding_mode="circular", shape=(2, 5)),
    _layer("conv1d_circular_same_even", nn.Conv1d, 2, 2, 2, padding="same", padding_mode="circular", shape=(2, 5)),
    _layer("conv2d", nn.Conv2d, 2, 3, 2, shape=(2, 4, 3)),
    _layer("conv2d_nobias", nn.Conv2d, 2, 3, 2, bias=False, shape=(2, 4, 3)),
    _layer("conv2d_pointwise", nn.Conv2d, 3, 2, 1, shape=(3, 2, 3)),
    _layer("conv2d_one_position", nn.Conv2d, 2, 3, 3, shape=(2, 3, 3)),
    _layer("conv2d_3x3_pad", nn.Conv2d, 2, 2, 3, padding=1, shape=(2, 4, 4)),
    _layer("conv2d_stride_pad", nn.Conv2d, 2, 2, 3, stride=2, padding=1, shape=(2, 5, 4)),
    _layer("conv2d_stride_over_kernel", nn.Conv2d, 2, 2, 2, stride=3, shape=(2, 6, 5)),
    _layer(
        "conv2d_uneven",
        *(nn.Conv2d, 2, 3, (3, 2)),
        stride=(2, 1),
        padding=(1, 0),
        dilation=(1, 2),
        shape=(2, 5, 5),
    ),
    _layer("conv2d_pad_over_kernel", nn.Conv2d, 2, 2, 2, padding=(3, 2), shape=(2, 2, 2)),
    _layer("conv2d_same", nn.Conv2d, 2, 2, 3, padding="same", shape=(2, 3, 4)),
    _layer("conv2d_same_dilated", nn.Conv2d, 2, 2, (3, 2), padding="same", dilation=2, shape=(2, 3, 4)),
    _layer("conv2d_valid", nn.Conv2d, 2, 2, (1, 3), padding="valid", shape=(2, 2, 4)),
    _layer("conv2d_groups", nn.Conv2d, 4, 4, 2, groups=2, shape=(4, 3, 3)),
    _layer("conv2d_groups_nobias", nn.Conv2d, 4, 6, 2, groups=2, bias=False, stride=2, padding=1, shape=(4, 3, 3)),
    _layer("conv2d_depthwise", nn.Conv2d, 3, 3, 2, groups=3, padding=1, shape=(3, 3, 2)),
    _layer("conv2d_depthwise_multiplier", nn.Conv2d, 2, 4, 3, groups=2, padding=1, dilation=2, shape=(2, 4, 4)),
    _layer("conv2d_circular", nn.Conv2d, 2, 2, 3, padding=(1, 2), padding_mode="circular", shape=(2, 3, 4)),
    _layer("conv2d_reflect", nn.Conv2d, 2, 2, 3, padding=(2, 1), padding_mode="reflect", shape=(2, 4, 3)),
    _layer("conv2d_replicate", nn.Conv2d, 2, 2, 3, padding=1, stride=2, padding_mode="replicate", shape=(2, 4, 4)),
    _layer("conv3d", nn.Conv3d, 2, 2, 2, shape=(2, 3, 2, 3)),
    _layer(
        "conv3d_uneven",
        *(nn.Conv3d, 2, 2, (1, 2, 3)),
        stride=(1, 2, 1),
        padding=(0, 1, 2),
        dilation=(1, 2, 1),
        shape=(2, 2, 3, 2),
    ),
    _layer("conv3d_groups_same", nn.Conv3d, 4, 2, (3, 1, 3), groups=2, padding="same", shape=(4, 2, 2, 3)),
    _layer(
        "conv3d_depthwise_nobias",
        nn.Conv3d,
        2,
        2,
        2,
        groups=2,
        bias=False,
        stride=2,
        padding=1,
        shape=(2, 2, 2, 3),
    ),
    _layer(
        "conv3d_circular",
        nn.Conv3d,
        1,
        2,
        (2, 3, 2),
        padding=(0, 1, 2),
        padding_mode="circular",
        shape=(1, 2, 3, 2),
    ),
]

LAYERS = LINEAR_LAYERS + CONV_LAYERS

# torch warns at the forward pass of these ("even kernel lengths"): tests over them need
# @pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning").
LAYERS_SAME_EVEN = [
    _layer("conv1d_same_even", nn.Conv1d, 2, 2, 4, padding="same", shape=(2, 5)),
    _layer("conv2d_same_even", nn.Conv2d, 2, 2, (2, 4), padding="same", groups=2, shape=(2, 3, 4)),
]

TRANSPOSED_LAYERS = [
    _layer("transposed1d", nn.ConvTranspose1d, 3, 2, 3, shape=(3, 4)),
    _layer("transposed1d_nobias", nn.ConvTranspose1d, 3, 2, 3, bias=False, shape=(3, 4)),
    _layer("transposed1d_pointwise", nn.ConvTranspose1d, 3, 2, 1, shape=(3, 4)),
    _layer("transposed1d_stride_pad", nn.ConvTranspose1d, 2, 3, 3, 2, 1, 1, shape=(2, 3)),
    _layer("transposed1d_dilated", nn.ConvTranspose1d, 2, 2, 3, padding=1, dilation=2, shape=(2, 3)),
    _layer("transposed1d_stride_over_kernel", nn.ConvTranspose1d, 2, 2, 2, 4, 0, 2, shape=(2, 3)),
    _layer("transposed1d_pad_over_kernel", nn.ConvTranspose1d, 2, 3, 2, padding=2, shape=(2, 6)),
    _layer("transposed1d_groups", nn.ConvTranspose1d, 4, 6, 2, groups=2, shape=(4, 3)),
    _layer("transposed1d_depthwise", nn.ConvTranspose1d, 3, 3, 3, padding=1, groups=3, shape=(3, 4)),
    _layer("transposed2d", nn.ConvTranspose2d, 2, 3, 2, shape=(2, 3, 2)),
    _layer("transposed2d_nobias", nn.ConvTranspose2d, 2, 3, 2, bias=False, shape=(2, 3, 2)),
    _layer("transposed2d_one_position", nn.ConvTranspose2d, 2, 3, 3, padding=2, shape=(2, 3, 3)),
    _layer("transposed2d_stride_pad", nn.ConvTranspose2d, 2, 2, 3, 2, 1, 1, shape=(2, 2, 3)),
    _layer("transposed2d_stride_over_kernel", nn.ConvTranspose2d, 2, 2, 2, 3, shape=(2, 2, 2)),
    _layer("transposed2d_pad_over_kernel", nn.ConvTranspose2d, 2, 2, 2, padding=(2, 3), shape=(2, 5, 7)),
    _layer(
        "transposed2d_uneven",
        *(nn.ConvTranspose2d, 2, 3, (3, 2)),
        stride=(2, 1),
        padding=(1, 0),
        output_padding=(0, 1),
        dilation=(1, 2),
        shape=(2, 3, 2),
    ),
    _layer("transposed2d_groups", nn.ConvTranspose2d, 4, 4, 2, groups=2, shape=(4, 2, 3)),
    _layer("transposed2d_groups_nobias", nn.ConvTranspose2d, 4, 6, 2, 2, 1, 1, groups=2, bias=False, shape=(4, 2, 3)),
    _layer("transposed2d_depthwise", nn.ConvTranspose2d, 3, 3, 2, padding=1, groups=3, shape=(3, 3, 4)),
    _layer("transposed2d_depthwise_multiplier", nn.ConvTranspose2d, 2, 4, 2, dilation=2, groups=2, shape=(2, 2, 2)),
    _layer("transposed3d", nn.ConvTranspose3d, 2, 3, 2, padding=1, shape=(2, 3, 2, 3)),
    _layer(
        "transposed3d_uneven",
        *(nn.ConvTranspose3d, 2, 2, (1, 2, 3)),
        stride=(1, 3, 2),
        padding=(0, 1, 2),
        output_padding=(0, 2, 1),
        dilation=(1, 2, 1),
        shape=(2, 2, 2, 3),
    ),
    _layer("transposed3d_groups", nn.ConvTranspose3d, 4, 2, (2, 1, 2), groups=2, shape=(4, 2, 1, 2)),
    _layer(
        "transposed3d_depthwise_nobias", nn.ConvTranspose3d, 2, 2, 2, 2, 1, groups=2, bias=False, shape=(2, 2, 2, 2)
    ),
]


def _randomized(make: type[nn.Module], *args, train: bool = False, **kwargs) -> nn.Module:
    """In eval mode unless `train`; parameters of size at least 0.3 and of both signs, running statistics at random."""
    layer = make(*args, **kwargs).train(train)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape))
            param.add_(0.3 * param.sign())
        for name, buffer in layer.named_buffers():
            if name == "running_mean":
                buffer.normal_()
            elif name == "running_var":
                buffer.uniform_(0.5, 2.0)
    return layer


def _norm(id: str, make: type[nn.Module], *args, shape: tuple[int, ...], **kwargs) -> LayerCase:
    return _layer(id, _randomized, make, *args, shape=shape, **kwargs)


# A layer stays in the mode that make_layer gives it: model.train() or model.eval() would change what it computes.
NORM_LAYERS = [
    _norm("batchnorm1d", nn.BatchNorm1d, 3, shape=(3,)),
    _norm("batchnorm1d_seq", nn.BatchNorm1d, 3, eps=0.1, shape=(3, 4)),
    _norm("batchnorm2d", nn.BatchNorm2d, 3, shape=(3, 2, 3)),
    _norm("batchnorm3d", nn.BatchNorm3d, 2, eps=0.1, shape=(2, 2, 1, 3)),
    _norm("layernorm", nn.LayerNorm, 4, shape=(4,)),
    _norm("layernorm_nobias", nn.LayerNorm, 4, bias=False, shape=(4,)),
    _norm("layernorm_seq", nn.LayerNorm, 4, eps=0.1, shape=(3, 4)),
    _norm("layernorm_2_dims", nn.LayerNorm, (2, 3), shape=(2, 3)),
    _norm("layernorm_2_dims_seq", nn.LayerNorm, (2, 3), shape=(4, 2, 3)),
    _norm("layernorm_2_dims_seq_nobias", nn.LayerNorm, (2, 3), bias=False, eps=0.1, shape=(4, 2, 3)),
    _norm("rmsnorm", nn.RMSNorm, 4, shape=(4,)),
    _norm("rmsnorm_seq_eps", nn.RMSNorm, 4, eps=0.1, shape=(3, 4)),
    _norm("rmsnorm_2_dims", nn.RMSNorm, (2, 3), eps=0.1, shape=(2, 2, 3)),
    _norm("groupnorm_vector", nn.GroupNorm, 2, 6, shape=(6,)),
    _norm("groupnorm_seq", nn.GroupNorm, 2, 4, eps=0.1, shape=(4, 3)),
    _norm("groupnorm_map", nn.GroupNorm, 2, 4, shape=(4, 2, 3)),
    _norm("groupnorm_one_group", nn.GroupNorm, 1, 3, shape=(3, 2, 2)),
    _norm("instancenorm1d", nn.InstanceNorm1d, 3, affine=True, shape=(3, 4)),
    _norm("instancenorm2d", nn.InstanceNorm2d, 3, affine=True, eps=0.1, shape=(3, 2, 3)),
    _norm("instancenorm3d", nn.InstanceNorm3d, 2, affine=True, shape=(2, 2, 2, 2)),
    _norm("instancenorm1d_running", nn.InstanceNorm1d, 3, affine=True, track_running_stats=True, shape=(3, 4)),
    _norm("instancenorm2d_running", nn.InstanceNorm2d, 3, affine=True, track_running_stats=True, shape=(3, 2, 3)),
    _norm("instancenorm3d_running", nn.InstanceNorm3d, 2, affine=True, track_running_stats=True, shape=(2, 2, 1, 2)),
]

# The output of a sample depends on the other samples: the gradient is a sum over samples, the curvature is not.
BATCH_STATISTICS_LAYERS = [
    _norm("batchnorm1d_train", nn.BatchNorm1d, 3, train=True, shape=(3,)),
    _norm("batchnorm1d_seq_train", nn.BatchNorm1d, 3, train=True, eps=0.1, shape=(3, 4)),
    _norm("batchnorm2d_train", nn.BatchNorm2d, 3, train=True, shape=(3, 2, 3)),
    _norm("batchnorm3d_train", nn.BatchNorm3d, 2, train=True, shape=(2, 2, 1, 3)),
    _norm("batchnorm1d_untracked", nn.BatchNorm1d, 3, track_running_stats=False, shape=(3,)),
    _norm("batchnorm1d_seq_untracked", nn.BatchNorm1d, 3, track_running_stats=False, shape=(3, 4)),
    _norm("batchnorm2d_untracked", nn.BatchNorm2d, 3, track_running_stats=False, eps=0.1, shape=(3, 2, 3)),
    _norm("batchnorm3d_untracked", nn.BatchNorm3d, 2, track_running_stats=False, shape=(2, 2, 1, 3)),
    _norm("batchnorm2d_untracked_train", nn.BatchNorm2d, 3, track_running_stats=False, train=True, shape=(3, 2, 3)),
]

ELEMENTWISE_LAYERS = [
    _norm("prelu", nn.PReLU, shape=(4,)),
    _norm("prelu_map", nn.PReLU, shape=(3, 2, 2)),
    _norm("prelu_channels", nn.PReLU, 4, shape=(4,)),
    _norm("prelu_channels_seq", nn.PReLU, 3, shape=(3, 4)),
    _norm("prelu_channels_map", nn.PReLU, 3, shape=(3, 2, 2)),
]


def _pairs(*left: int) -> Callable[..., tuple]:
    """(n, seed) -> ([n, *left], [n, *left[:-1], 3])."""
    return lambda n, seed=1: (randn(n, *left, seed=seed), randn(n, *left[:-1], 3, seed=seed + 100))


BILINEAR_LAYERS = [
    _layer("bilinear", nn.Bilinear, 2, 3, 4, shape=(2,), make_input=_pairs(2)),
    _layer("bilinear_nobias", nn.Bilinear, 2, 3, 4, bias=False, shape=(2,), make_input=_pairs(2)),
    _layer("bilinear_seq", nn.Bilinear, 2, 3, 2, shape=(3, 2), make_input=_pairs(3, 2)),
    _layer("bilinear_grid_nobias", nn.Bilinear, 2, 3, 2, bias=False, shape=(2, 2, 2), make_input=_pairs(2, 2, 2)),
]

WORDS = 5


def _words(shape: tuple[int, ...], seed: int, padding: int | None) -> Tensor:
    """Random tokens, none of them `padding`."""
    x = torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(seed))
    return x if padding is None else torch.where(x == padding, (padding + 1) % WORDS, x)


def _tokens(*shape: int, padding: int | None = None) -> Callable[..., Tensor]:
    """(n, seed) -> tokens [n, *shape]; the last two of a sample are equal; `padding` in front, and all of sample 1."""

    def make_input(n: int, seed: int = 1) -> Tensor:
        x = _words((n, *shape), seed, padding)
        if shape:
            x[..., -1] = x[..., -2]
        if padding is not None:
            x[..., :1] = padding
            if shape:
                x[1:2] = padding
        return x

    return make_input


def _weighted_tokens(r: int, padding: int | None = None) -> Callable[..., tuple]:
    """(n, seed) -> the arguments of an EmbeddingBag with per_sample_weights."""
    return lambda n, seed=1: (_tokens(r, padding=padding)(n, seed), None, randn(n, r, seed=seed))


def _bags(include_last: bool = False, padding: int | None = None, weighted: bool = False) -> Callable[..., tuple]:
    """(n, seed) -> (tokens, offsets[, weights]) of bags of 3, 0, 2, 1, 3, 0, ... tokens, `padding` in front of each."""

    def make_input(n: int, seed: int = 1) -> tuple:
        offsets = [0]
        for k in range(n):
            offsets.append(offsets[-1] + (3, 0, 2, 1)[k % 4])
        x = _words((offsets[-1],), seed, padding)
        x[1] = x[2]
        if padding is not None:
            x[[start for start in offsets if start < len(x)]] = padding
        weights = (randn(len(x), seed=seed),) if weighted else ()
        return x, torch.tensor(offsets if include_last else offsets[:-1]), *weights

    return make_input


def _embedding(id: str, make_input, shape: tuple[int, ...] = (), **kwargs) -> LayerCase:
    return _layer(id, nn.Embedding, WORDS, 3, shape=shape, make_input=make_input, **kwargs)


def _embedding_bag(id: str, make_input, shape: tuple[int, ...] = (), **kwargs) -> LayerCase:
    return _layer(id, nn.EmbeddingBag, WORDS, 3, shape=shape, make_input=make_input, **kwargs)


# input_shape is () where a sample is one token or has no shape of its own.
EMBEDDING_LAYERS = [
    _embedding("embedding", _tokens(4), shape=(4,)),
    _embedding("embedding_vector", _tokens()),
    _embedding("embedding_grid", _tokens(2, 3), shape=(2, 3)),
    _embedding("embedding_padding", _tokens(4, padding=1), shape=(4,), padding_idx=1),
    _embedding("embedding_padding_last", _tokens(4, padding=WORDS - 1), shape=(4,), padding_idx=-1),
    _embedding("embedding_vector_padding", _tokens(padding=0), padding_idx=0),
    # the padding row is an output all the same, but gets no gradient
    _layer(
        "embedding_padding_not_zero",
        *(_randomized, nn.Embedding, WORDS, 3),
        padding_idx=1,
        shape=(4,),
        make_input=_tokens(4, padding=1),
    ),
]

BAG_LAYERS = [
    _embedding_bag("bag_sum", _tokens(4), shape=(4,), mode="sum"),
    _embedding_bag("bag_mean", _tokens(4), shape=(4,), mode="mean"),
    _embedding_bag("bag_sum_weights", _weighted_tokens(4), shape=(4,), mode="sum"),
    _embedding_bag("bag_sum_padding", _tokens(4, padding=1), shape=(4,), mode="sum", padding_idx=1),
    _embedding_bag("bag_mean_padding", _tokens(4, padding=4), shape=(4,), mode="mean", padding_idx=-1),
    _embedding_bag("bag_sum_weights_padding", _weighted_tokens(4, padding=1), shape=(4,), mode="sum", padding_idx=1),
    _embedding_bag("bag_sum_offsets", _bags(), mode="sum"),
    _embedding_bag("bag_mean_offsets", _bags(), mode="mean"),
    _embedding_bag("bag_sum_offsets_weights", _bags(weighted=True), mode="sum"),
    _embedding_bag("bag_mean_offsets_padding", _bags(padding=1), mode="mean", padding_idx=1),
    _embedding_bag("bag_sum_offsets_last", _bags(True), mode="sum", include_last_offset=True),
    _embedding_bag("bag_mean_offsets_last", _bags(True), mode="mean", include_last_offset=True),
]

TOKEN_LAYERS = EMBEDDING_LAYERS + BAG_LAYERS

NEW_LAYERS = TRANSPOSED_LAYERS + NORM_LAYERS + ELEMENTWISE_LAYERS + BILINEAR_LAYERS + TOKEN_LAYERS


class ConvSetting(NamedTuple):
    """One draw of `conv_settings`: make_layer() and make_input()."""

    dims: int
    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    padding_mode: str
    dilation: tuple[int, ...]
    bias: bool
    batch: int
    size: tuple[int, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.in_channels, *self.size)

    def make_layer(self) -> nn.Module:
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dims - 1]
        return seeded(
            lambda: make(
                self.in_channels,
                self.out_channels,
                self.kernel,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                groups=self.groups,
                bias=self.bias,
                padding_mode=self.padding_mode,
            )
        )

    def make_input(self, seed: int = 1) -> Tensor:
        return randn(self.batch, *self.input_shape, seed=seed)


@st.composite
def conv_settings(draw, max_dims: int = 3, padding_modes=("zeros", "circular")) -> ConvSetting:
    """Any valid small convolution; zero padding "same" only where torch pads evenly (it warns elsewhere)."""
    d = draw(st.integers(1, max_dims))
    groups = draw(st.integers(1, 3))
    per_dim = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(d))  # noqa: E731
    kernel, dilation = per_dim(1, 3), per_dim(1, 2)
    mode = draw(st.sampled_from(padding_modes))
    reach = [dilation[j] * (kernel[j] - 1) for j in range(d)]
    kinds = ["valid", "ints"]
    if mode != "zeros" or all(total % 2 == 0 for total in reach):
        kinds.append("same")
    padding = draw(st.sampled_from(kinds))
    stride = (1,) * d if padding == "same" else per_dim(1, 3)
    if padding == "ints":
        padding = per_dim(0, 2)
    pads = [0] * d if padding == "valid" else [-(-t // 2) for t in reach] if padding == "same" else list(padding)
    needed = [0 if padding == "same" else reach[j] + 1 - 2 * pads[j] for j in range(d)]
    wraps = [0 if mode == "zeros" else pads[j] + (mode == "reflect") for j in range(d)]
    size = tuple(max(1, needed[j], wraps[j]) + draw(st.integers(0, 2)) for j in range(d))
    return ConvSetting(
        dims=d,
        in_channels=groups * draw(st.integers(1, 2)),
        out_channels=groups * draw(st.integers(1, 2)),
        groups=groups,
        kernel=kernel,
        stride=stride,
        padding=padding,
        padding_mode=mode,
        dilation=dilation,
        bias=draw(st.booleans()),
        batch=draw(st.integers(1, 3)),
        size=size,
    )


# --- losses -------------------------------------------------------------------------------------------------


class LossCase(NamedTuple):
    id: str
    loss: nn.Module
    make_target: Callable[[Tensor, torch.Generator], Tensor]
    output: str  # a key of OUTPUT_SHAPES


OUTPUT_SHAPES = {"vector": (CLASSES,), "sequence": (CLASSES, 4), "map": (CLASSES, 2, 2), "scalar": (1,)}


def target_for(case: LossCase, output: Tensor, seed: int = 0) -> Tensor:
    return case.make_target(output.detach(), torch.Generator().manual_seed(seed))


def labels(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(output.shape[1], (output.shape[0], *output.shape[2:]), generator=generator)


def labels_some_ignored(ignore_index: int) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Every third label, from the second on, is ignored."""

    def make(output, generator):
        y = labels(output, generator)
        y.view(-1)[1::3] = ignore_index
        return y

    return make


def probabilities(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(output.shape, generator=generator, dtype=output.dtype).softmax(1)


def reals(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(output.shape, generator=generator, dtype=output.dtype)


def bits(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, output.shape, generator=generator).to(output.dtype)


def fractions(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(output.shape, generator=generator, dtype=output.dtype)


def _weights(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


CLASS_WEIGHTS = _weights(0.5, 2.0, 1.3)
ELEMENT_WEIGHTS = _weights(0.4, 1.0, 2.5)
POS_WEIGHTS = _weights(3.0, 0.7, 1.0)


def _both(id: str, make: Callable[..., nn.Module], target, output: str, **options) -> list[LossCase]:
    """The case with reduction mean and with reduction sum."""
    return [
        LossCase(f"{id}_{reduction}", make(reduction=reduction, **options), target, output)
        for reduction in ("mean", "sum")
    ]


CE, NLL, MSE, BCE = nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.BCEWithLogitsLoss

EVERYTHING = {"weight": CLASS_WEIGHTS, "ignore_index": -1, "label_smoothing": 0.1}
POSITIVES = {"weight": ELEMENT_WEIGHTS, "pos_weight": POS_WEIGHTS}
POSITIVES_SEQ = {"weight": ELEMENT_WEIGHTS[:, None], "pos_weight": POS_WEIGHTS[:, None]}

LOSSES = [
    *_both("ce", CE, labels, "vector"),
    *_both("ce_weight", CE, labels, "vector", weight=CLASS_WEIGHTS),
    *_both("ce_ignore", CE, labels_some_ignored(-100), "vector"),
    *_both("ce_ignore_class", CE, labels_some_ignored(1), "vector", ignore_index=1),
    *_both("ce_smooth", CE, labels, "vector", label_smoothing=0.2),
    *_both("ce_soft", CE, probabilities, "vector"),
    *_both("ce_soft_weight_smooth", CE, probabilities, "vector", weight=CLASS_WEIGHTS, label_smoothing=0.2),
    *_both("ce_weight_ignore_smooth", CE, labels_some_ignored(-1), "vector", **EVERYTHING),
    *_both("ce_seq", CE, labels, "sequence"),
    *_both("ce_seq_weight_ignore_smooth", CE, labels_some_ignored(-1), "sequence", **EVERYTHING),
    *_both("ce_seq_soft_weight", CE, probabilities, "sequence", weight=CLASS_WEIGHTS),
    *_both("ce_map_ignore", CE, labels_some_ignored(-100), "map"),
    *_both("nll", NLL, labels, "vector"),
    *_both("nll_weight_ignore", NLL, labels_some_ignored(0), "vector", weight=CLASS_WEIGHTS, ignore_index=0),
    *_both("nll_seq_weight", NLL, labels, "sequence", weight=CLASS_WEIGHTS),
    *_both("mse", MSE, reals, "vector"),
    *_both("mse_scalar", MSE, reals, "scalar"),
    *_both("mse_seq", MSE, reals, "sequence"),
    *_both("bce", BCE, bits, "vector"),
    *_both("bce_scalar", BCE, bits, "scalar"),
    *_both("bce_soft", BCE, fractions, "vector"),
    *_both("bce_weight", BCE, bits, "vector", weight=ELEMENT_WEIGHTS),
    *_both("bce_pos_weight", BCE, bits, "vector", pos_weight=POS_WEIGHTS),
    *_both("bce_soft_weight_pos_weight", BCE, fractions, "vector", **POSITIVES),
    *_both("bce_seq_weight_pos_weight", BCE, bits, "sequence", **POSITIVES_SEQ),
]


# --- models -------------------------------------------------------------------------------------------------


class ModelCase(NamedTuple):
    id: str
    make_model: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


class MeanPool(nn.Module):
    """The mean over the shared positions: [n, r, i] -> [n, i]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class WeightedPool(nn.Module):
    """sum_r weight_r x_r with unequal weights: the positions no longer get equal signals."""

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.linspace(-1, 2, x.shape[1], dtype=x.dtype, device=x.device)
        return torch.einsum("r,nri->ni", weight, x)


class ClassFirst(nn.Module):
    """[n, t, c] -> [n, c, t], as the losses of torch want it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


class Residual(nn.Module):
    """x + f(x), with f called `times` times in a row (times > 1: its layers are shared)."""

    def __init__(self, body: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.body, self.times = body, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.body(x)
        return x


class FirstOfSeveral(nn.Sequential):
    """Sequential whose first module is called with all the arguments."""

    def forward(self, *args) -> Tensor:
        first, *rest = self
        x = first(*args)
        for part in rest:
            x = part(x)
        return x


def net_around(
    layer: nn.Module, input_shape, output_shape=(CLASSES,), before: bool = False, seed: int = 1, x=None
) -> nn.Module:
    """[Flatten, Linear, Tanh, Unflatten if `before`,] "layer", Tanh, Flatten, Linear, Unflatten.

    x: an input of the layer, needed where zeros [1, *input_shape] are none (see `LayerCase.input_for`). If it is a
    tuple the net is called with as many arguments; `before` is for one floating point tensor only.
    """
    size, outputs = math.prod(input_shape), math.prod(output_shape)
    several = isinstance(x, tuple)
    x = torch.zeros(1, *input_shape, dtype=torch.float64) if x is None else x
    with torch.no_grad():
        trial = copy.deepcopy(layer)  # its running statistics may move
        features = trial(*(x if several else (x,)))[0].numel()

    def make():
        parts = OrderedDict()
        if before:
            parts["before"] = nn.Sequential(
                nn.Flatten(), nn.Linear(size, size), nn.Tanh(), nn.Unflatten(1, tuple(input_shape))
            )
        parts["layer"] = layer
        parts["tanh"] = nn.Tanh()
        parts["flatten"] = nn.Flatten()
        parts["head"] = nn.Linear(features, outputs)
        parts["shape"] = nn.Unflatten(1, tuple(output_shape))
        return FirstOfSeveral(parts) if several else nn.Sequential(parts)

    return seeded(make, seed)


def net_for(case: LossCase, inputs: int = 4, seed: int = 0) -> nn.Module:
    """Linear(inputs, 5), Tanh, Linear to the output that the loss wants, log_softmax for NLLLoss."""
    shape = OUTPUT_SHAPES[case.output]

    def make():
        end = [nn.LogSoftmax(1)] if isinstance(case.loss, nn.NLLLoss) else []
        return nn.Sequential(
            nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, math.prod(shape)), nn.Unflatten(1, shape), *end
        )

    return seeded(make, seed)


def _model(id: str, make, input_shape, output_shape=(CLASSES,)) -> ModelCase:
    return ModelCase(id, lambda: seeded(make), input_shape, output_shape)


MODELS = [
    _model(
        "mlp",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)),
        (4,),
    ),
    _model(
        "mlp_relu_inplace",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
        (4,),
    ),
    _model(
        "cnn",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)),
        ),
        (1, 4, 6),
    ),
    _model(
        "cnn_groups",
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 2, groups=2, bias=False), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=4, padding=1)),
            *(nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        ),
        (2, 4, 3),
    ),
    _model(
        "conv1d_seq",
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding="same"), nn.Tanh(), nn.Conv1d(4, 3, 1)),
        (2, 5),
        (3, 5),
    ),
    _model(
        "deep_linear",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3)),
        (4,),
    ),
    _model(
        "deep_linear_seq",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3), ClassFirst()),
        (5, 4),
        (3, 5),
    ),
    _model(
        "pooled_linear",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), MeanPool(), nn.Linear(4, 3)),
        (6, 4),
    ),
    _model(
        "weighted_pool",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), WeightedPool(), nn.Linear(4, 3)),
        (6, 4),
    ),
    _model(
        "linear_convs",
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Conv1d(3, 3, 2), nn.Flatten(), nn.Linear(12, 3)),
        (2, 6),
    ),
    _model(
        "conv_before_pool",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        (2, 3, 4),
    ),
    _model(
        "per_position",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), ClassFirst()),
        (4, 4),
        (3, 4),
    ),
    _model(
        "shared_layer",
        lambda: nn.Sequential(
            nn.Linear(3, 4), Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), times=2), nn.Linear(4, 3)
        ),
        (3,),
    ),
    _model(
        "residual",
        lambda: nn.Sequential(
            nn.Linear(3, 4),
            nn.Tanh(),
            Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))),
            nn.Linear(4, 3),
        ),
        (3,),
    ),
    _model("softmax_regression", lambda: nn.Linear(4, 3), (4,)),
]


def model_case(id: str) -> ModelCase:
    return next(case for case in MODELS if case.id == id)


def ids(cases) -> list[str]:
    """For pytest.mark.parametrize(..., ids=ids(CASES))."""
    return [case.id for case in cases]
