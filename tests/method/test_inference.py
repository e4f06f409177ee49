"""From weights to maps at native size: values, memory, folding, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from covidsev.method.unets import build_network
from covidsev.core import CheckpointError, ConfigError
from covidsev.data.datasets import SliceSet
from covidsev.method.inference import (
    fold_batch_norm,
    iterate_logits,
    load_for_inference,
    predict,
    predict_logits,
    predict_slices,
    to_native,
)
from covidsev.method.losses import SideOutputs
from covidsev.method.training import save_checkpoint, weights_hash


class Watched(nn.Module):
    """A convolution with batch normalisation that notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.batches, self.graphs = (
            nn.Conv2d(1, 1, 3, padding=1),
            nn.BatchNorm2d(1),
            [],
            [],
        )
        with torch.no_grad():
            self.norm.running_mean.fill_(0.2)
            self.norm.running_var.fill_(0.5)

    def forward(self, images: torch.Tensor) -> SideOutputs:
        logits = self.norm(self.conv(images))
        self.batches.append(len(images))
        self.graphs.append(logits.requires_grad)
        return SideOutputs(s_3=logits)


def watched() -> Watched:
    torch.manual_seed(0)
    return Watched()


def noise(count: int, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, size, size), generator=torch.Generator().manual_seed(count)).to(
        torch.uint8
    )


def test_memory_is_bounded_by_the_batch_and_nothing_is_recorded_or_learnt():
    network, images = watched().train(), noise(7)
    before = weights_hash(network)
    probs = predict(network, images, batch_size=3)
    assert network.batches == [3, 3, 1] and not any(network.graphs)
    assert weights_hash(network) == before and not network.training
    assert probs.dtype == np.float32 and probs.shape == (7, 16, 16) and 0 <= probs.min() <= probs.max() <= 1
    first = next(iterate_logits(network, images, 2))
    assert (
        first.shape == (2, 16, 16) and len(network.batches) == 4
    )  # a batch is computed when it is asked for


def test_values_do_not_depend_on_batches_layout_or_folding():
    network, images = watched(), noise(5)
    expected = predict_logits(network, images, batch_size=5)
    for options in (
        {"batch_size": 2},
        {"channels_last": False},
        {"fold": True},
    ):
        np.testing.assert_allclose(predict_logits(network, images, **options), expected, atol=1e-5)
    np.testing.assert_allclose(predict(network, images), 1 / (1 + np.exp(-expected)), atol=1e-6)


def test_mirror_images_give_mirror_maps():
    network, images = watched(), noise(2)
    four = predict(network, images, tta=True)
    for axes in ((-1,), (-2,), (-1, -2)):
        np.testing.assert_allclose(
            np.flip(predict(network, images.flip(axes), tta=True), axes), four, atol=1e-6
        )
    assert np.abs(four - predict(network, images)).max() > 1e-4


@pytest.mark.parametrize("model, backbone", [("infnet", "small"), ("infnet", "res2net50"), ("unet", "small")])
def test_folding_takes_every_normalisation_and_keeps_the_values(model, backbone):
    torch.manual_seed(0)
    network, batch = (
        build_network(model, backbone),
        torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)),
    )
    with torch.no_grad():
        network.train()(batch)  # running statistics that are not the initial ones
    before = weights_hash(network)
    folded = fold_batch_norm(network, batch)
    with torch.inference_mode():
        other = torch.rand(
            1, 1, 64, 96, generator=torch.Generator().manual_seed(2)
        )  # not the example, not its size
        for mine, theirs in zip(folded(other), network.eval()(other), strict=True):
            if theirs is not None:
                assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max().clamp(min=1)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert weights_hash(network) == before


def test_a_convolution_that_is_used_twice_is_left_alone():
    class Twice(Watched):
        def forward(self, images):
            return SideOutputs(s_3=self.norm(self.conv(self.conv(images))))

    torch.manual_seed(0)
    network, batch = Twice(), torch.rand(1, 1, 8, 8)
    folded = fold_batch_norm(network, batch)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert torch.allclose(folded(batch).s_3, network.eval()(batch).s_3)


@given(st.integers(2, 12), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_native_maps_have_the_shape_stay_in_range_and_keep_constants(side, height, width, seed):
    logits = np.random.default_rng(seed).normal(0, 4, (side, side)).astype(np.float32)
    native = to_native(logits, (height, width), kind="logits")
    probs = 1 / (1 + np.exp(-logits))
    assert native.shape == (height, width) and native.dtype == np.float32
    assert probs.min() - 1e-6 <= native.min() and native.max() <= probs.max() + 1e-6
    np.testing.assert_allclose(to_native(np.full((side, side), 0.25), (height, width)), 0.25, rtol=1e-6)


def test_logits_are_resized_before_the_sigmoid():
    logits = np.array([[-4.0, 4.0], [-4.0, 4.0]], np.float32)
    native = to_native(logits, (2, 4), kind="logits")
    np.testing.assert_allclose(native[0], 1 / (1 + np.exp([4.0, 2.0, -2.0, -4.0])), rtol=1e-5)
    probs = to_native(1 / (1 + np.exp(-logits)), (2, 4), kind="probs")
    assert abs(probs[0, 1] - native[0, 1]) > 0.1
    with pytest.raises(ConfigError, match="did you mean 'logits'"):
        to_native(logits, (2, 2), kind="logit")


class Brightness(nn.Module):
    """Calls bright pixels infected: the right answer is known at any size."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(40.0))

    def forward(self, images: torch.Tensor) -> SideOutputs:
        return SideOutputs(s_3=self.gain * (images - 0.5))


def test_maps_come_back_in_order_at_the_size_of_each_slice():
    shapes = [(40, 60), (64, 33), (32, 32), (100, 50)]
    images = []
    for number, (height, width) in enumerate(shapes):
        image = np.zeros((height, width), np.uint8)
        image[: height // 2, : width // (number + 1)] = 255
        images.append(image)
    slices = SliceSet(
        "test",
        "phantom",
        list("abcd"),
        images,
        [(image > 0).astype(np.uint8) for image in images],
        list("abcd"),
    )
    maps = predict_slices(Brightness(), slices, size=32, batch_size=3, fold=False)
    assert [found.shape for found in maps] == shapes
    for found, image in zip(maps, images, strict=True):
        assert ((found > 0.5) == (image > 127)).mean() > 0.95


@pytest.mark.parametrize("images", [noise(2).float(), noise(2)[:, 0], noise(2).expand(2, 3, 16, 16)])
def test_images_that_are_not_grey_bytes_are_refused(images):
    with pytest.raises(ConfigError, match="not uint8"):
        predict(watched(), images)


def test_no_slices_give_no_maps():
    assert predict(watched(), noise(1)[:0]).shape == (0, 16, 16)


def test_inference_without_sound_weights_of_this_network_stops(tmp_path):
    with pytest.raises(ConfigError, match="needs trained weights") as caught:
        load_for_inference(watched(), None)
    assert caught.value.exit_code == 2
    path = tmp_path / "best.pt"
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_for_inference(watched(), path)
    save_checkpoint(path, {"weights": Brightness().state_dict()})
    with pytest.raises(CheckpointError, match="another network"):
        load_for_inference(watched(), path)
    trained = watched()
    save_checkpoint(path, {"weights": trained.state_dict()})
    loaded = load_for_inference(Watched().train(), path)
    assert weights_hash(loaded) == weights_hash(trained) and not loaded.training
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        load_for_inference(watched(), path)
