"""A backbone so narrow that tests can train it."""
from collections.abc import Iterator
from contextlib import contextmanager

from covidsev.method.infnet import BACKBONES, DecoderWidths, SmallResNet


class TinyResNet(SmallResNet):
    """The small backbone at a third of its width."""

    out_channels, blocks, widths = (8, 16, 24, 32), (1, 1, 1, 1), DecoderWidths(8, 8, 16, 12, 8)


@contextmanager
def tiny_backbone() -> Iterator[None]:
    """Inside, the name "tiny" stands for it wherever a backbone is named."""
    BACKBONES["tiny"] = TinyResNet
    yield
    del BACKBONES["tiny"]
