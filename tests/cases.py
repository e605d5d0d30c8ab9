"""What the tests run over: layers, losses, models. Small, fast, float64; a new row brings its whole suite.

Every `make_*` builds a fresh, seeded object and leaves the global random state alone.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

CLASSES = 3


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


def _layer(id: str, make: type[nn.Module], *args, shape: tuple[int, ...], **kwargs) -> LayerCase:
    return LayerCase(id, lambda: seeded(lambda: make(*args, **kwargs)), shape)


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


def net_around(
    layer: nn.Module, input_shape, output_shape=(CLASSES,), before: bool = False, seed: int = 1
) -> nn.Module:
    """[Flatten, Linear, Tanh, Unflatten if `before`,] "layer", Tanh, Flatten, Linear, Unflatten."""
    size, outputs = math.prod(input_shape), math.prod(output_shape)
    with torch.no_grad():
        features = layer(torch.zeros(1, *input_shape, dtype=torch.float64)).numel()

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
        return nn.Sequential(parts)

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
