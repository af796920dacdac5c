"""The networks of the published checkpoints in minimal form: module structure and names as released, random weights.

Nothing here comes from the package: plain modules, plain loops, the branch of every norm layer an index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))


class Normalize(nn.Module):
    """Mean and std as buffers under the names the authors chose."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], names: tuple[str, str] = ("mean", "std")):
        super().__init__()
        self.names = names
        self.register_buffer(names[0], torch.tensor(mean))
        self.register_buffer(names[1], torch.tensor(std))

    def forward(self, x):
        mean, std = (getattr(self, name).reshape(1, 3, 1, 1) for name in self.names)
        return (x - mean) / std


class NormList(nn.Module):
    """`count` norm layers side by side, `bn_list.0`, `bn_list.1` ..."""

    def __init__(self, width: int, count: int, kind=nn.BatchNorm2d):
        super().__init__()
        self.bn_list = nn.ModuleList([kind(width) for _ in range(count)])

    def forward(self, x, branch):
        return self.bn_list[branch](x)


class PlainNorm(nn.BatchNorm2d):
    def forward(self, x, branch):
        return super().forward(x)


def norm(width: int, count: int):
    return NormList(width, count) if count else PlainNorm(width)


class Downsample(nn.Module):
    """`downsample.conv` and `downsample.bn`, as ACL names them."""

    def __init__(self, ins, outs, stride, count):
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, 1, stride, bias=False)
        self.bn = NormList(outs, count)

    def forward(self, x, branch):
        return self.bn(self.conv(x), branch)


class Pair(nn.Sequential):
    """`.0` and `.1`, as torchvision has them."""

    def forward(self, x, branch):
        return self[1](self[0](x), branch)


class Block(nn.Module):
    def __init__(self, ins, width, stride, count, shortcut, bottleneck=False, inner=None):
        super().__init__()
        self.shortcut_name, self.bottleneck = shortcut, bottleneck
        outs, inner = (width * 4, inner or width) if bottleneck else (width, width)
        if bottleneck:
            self.conv1, self.bn1 = nn.Conv2d(ins, inner, 1, bias=False), norm(inner, count)
            self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), norm(inner, count)
            self.conv3, self.bn3 = nn.Conv2d(inner, outs, 1, bias=False), norm(outs, count)
        else:
            self.conv1, self.bn1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False), norm(outs, count)
            self.conv2, self.bn2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False), norm(outs, count)
        self.has_shortcut = stride != 1 or ins != outs
        if self.has_shortcut:
            pair = Pair(nn.Conv2d(ins, outs, 1, stride, bias=False), norm(outs, 0))
            setattr(self, shortcut, Downsample(ins, outs, stride, count) if count else pair)

    def forward(self, x, branch):
        out = torch.relu(self.bn1(self.conv1(x), branch))
        out = self.bn2(self.conv2(out), branch)
        if self.bottleneck:
            out = self.bn3(self.conv3(torch.relu(out)), branch)
        return torch.relu(out + (getattr(self, self.shortcut_name)(x, branch) if self.has_shortcut else x))


class Net(nn.Module):
    """ResNet of the authors; `count` norm layers side by side (0: plain ones).

    `head` maps names to modules that are in the file and not part of the features.
    """

    def __init__(
        self,
        widths=(8, 8, 16, 32),
        blocks=(2, 2, 2, 2),
        count=2,
        stem=3,
        padding=1,
        normalize=IMAGENET,
        shortcut="downsample",
        head=None,
        bottleneck=False,
        inner=1,
    ):
        super().__init__()
        self.count, self.stem = count, stem
        if normalize:
            self.normalize = Normalize(*normalize)
        self.conv1 = (
            nn.Conv2d(3, widths[0], 3, 1, padding, bias=False)
            if stem == 3
            else nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        )
        self.bn1 = norm(widths[0], count)
        ins = widths[0]
        for stage, (width, n) in enumerate(zip(widths, blocks, strict=True)):
            layers = []
            for i in range(n):
                stride = 2 if stage and not i else 1
                layers.append(Block(ins, width, stride, count, shortcut, bottleneck, int(width * inner)))
                ins = width * 4 if bottleneck else width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.width = ins
        for name, module in (head or {}).items():
            setattr(self, name, module)

    def features(self, x, branch=0):
        x = self.normalize(x) if hasattr(self, "normalize") else x
        x = torch.relu(self.bn1(self.conv1(x), branch))
        if self.stem == 7:
            x = torch.max_pool2d(x, 3, 2, 1)
        for stage in range(1, 5):
            for block in getattr(self, f"layer{stage}"):
                x = block(x, branch)
        return x.mean((2, 3))


class WideBlock(nn.Module):
    def __init__(self, ins, outs, stride, count):
        super().__init__()
        self.bn1, self.conv1 = norm(ins, count), nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = norm(outs, count), nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        if ins != outs:
            self.convShortcut = nn.Conv2d(ins, outs, 1, stride, bias=False)

    def forward(self, x, branch):
        active = torch.relu(self.bn1(x, branch))
        out = self.conv2(torch.relu(self.bn2(self.conv1(active), branch)))
        return out + (self.convShortcut(active) if hasattr(self, "convShortcut") else x)


class Group(nn.Module):
    def __init__(self, ins, outs, n, stride, count):
        super().__init__()
        self.layer = nn.Sequential(*[WideBlock(outs if i else ins, outs, 1 if i else stride, count) for i in range(n)])


class WideNet(nn.Module):
    """TRADES' wide ResNet, and RCS' with norm layers side by side."""

    def __init__(self, depth=10, width=2, count=0, head=None, buffers=None, unused=False):
        super().__init__()
        chs, n = [16, 16 * width, 32 * width, 64 * width], (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = Group(chs[0], chs[1], n, 1, count)
        if unused:
            self.sub_block1 = Group(chs[0], chs[1], n, 1, count)
        self.block2, self.block3 = Group(chs[1], chs[2], n, 2, count), Group(chs[2], chs[3], n, 2, count)
        self.bn1 = norm(chs[3], count)
        self.width, self.buffer_names = chs[3], list(buffers or {})
        for name, value in (buffers or {}).items():
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1))
        for name, module in (head or {}).items():
            setattr(self, name, module)

    def features(self, x, branch=0):
        if self.buffer_names:
            mean, std = (getattr(self, name) for name in self.buffer_names)
            x = (x - mean) / std
        x = self.conv1(x)
        for group in (self.block1, self.block2, self.block3):
            for block in group.layer:
                x = block(x, branch)
        return torch.relu(self.bn1(x, branch)).mean((2, 3))


class AclProjector(nn.Module):
    def __init__(self, width, count, layers=3):
        super().__init__()
        for i in range(1, layers + 1):
            setattr(self, f"fc{i}", nn.Linear(width, width, bias=i == 1))
            setattr(self, f"bn{i}", NormList(width, count, nn.BatchNorm1d))


def advcl_heads(width: int) -> dict[str, nn.Module]:
    heads: dict[str, nn.Module] = {f"fc_{n:03d}": nn.Linear(width, n) for n in (2, 10, 50, 100, 500)}
    for name, ins, outs in (("head_ce", width, 10), ("head_proj", width, 128), ("head_pred", 128, 128)):
        heads[name] = nn.Sequential(nn.Linear(ins, ins), nn.BatchNorm1d(ins), nn.ReLU(), nn.Linear(ins, outs))
    return heads


class Attacked(nn.Module):
    """The robustness library's model: network, normaliser, and an attacker that holds both again."""

    def __init__(self, model: nn.Module, mean, std):
        super().__init__()
        mean, std = ([[[value]] for value in values] for values in (mean, std))
        self.normalizer = Normalize(mean, std, ("new_mean", "new_std"))
        self.model = model
        self.attacker = nn.Module()
        self.attacker.normalize = Normalize(mean, std, ("new_mean", "new_std"))
        self.attacker.model = model

    def features(self, x, branch=0):
        return self.model.features(self.normalizer(x))


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every norm layer with scales and statistics of its own."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return net.eval()


def prefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in tensors.items()}
