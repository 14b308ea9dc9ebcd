"""The network: a small residual one, and around it what the shipped graph adds."""

import torch
from torch import nn
from torch.nn import functional as F

MEAN = [0.5, 0.5, 0.5]
STD = [0.25, 0.25, 0.25]


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in 0..1, [N, 3, H, W], to the network's input."""
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = conv(inputs, outputs, 3, stride)
        self.second = conv(outputs, outputs, 3)
        self.skip = nn.Sequential()
        if stride > 1:
            self.skip = nn.Sequential(nn.AvgPool2d(stride), conv(inputs, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.skip(x))


class LesionNet(nn.Module):
    """[N, 3, 112, 112] to logits [N, 7]."""

    def __init__(self, classes: int):
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Sequential(conv(3, 48, 7, 4), nn.ReLU()),
                nn.Sequential(Block(48, 96, 2), Block(96, 96, 1)),
                Block(96, 128, 2),
            ]
        )
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(128, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and the pooled features of every stage. Strangers show in the early ones
        (colour, edges), which the last stage has learned to ignore."""
        pooled = []
        for stage in self.stages:
            x = stage(x)
            pooled.append(x.mean((2, 3)))
        return self.head(self.drop(pooled[-1])), torch.sqrt(torch.cat(pooled, 1) + 1e-4)


class Bundle(nn.Module):
    """The shipped graph: logits and the out-of-distribution score, the Mahalanobis distance of the
    pooled features to the nearest class mean, per square root of dimension (Lee et al. 2018)."""

    def __init__(self, network: LesionNet, shift: torch.Tensor, whiten: torch.Tensor, means: torch.Tensor):
        super().__init__()
        self.network = network
        for name, value in (("shift", shift), ("whiten", whiten), ("means", means)):
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = self.network(x)
        gap = ((features - self.shift) @ self.whiten).unsqueeze(1) - self.means
        return logits, (gap * gap).mean(2).min(1).values.sqrt()
