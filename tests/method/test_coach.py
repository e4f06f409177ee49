"""The pretext and its coach: what is erased, who may learn in which step, what is handed over, and everything that is refused."""
import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from covidsev.method import infnet
from covidsev.method.coach import (RULES, CoachNet, Pretext, PretextConfig, PretextResult, RotationNet, RotationPretext, coach_cells, coach_loss, coach_step, descend, epoch_order, error_under, frozen, mask_entropy, network_step,
                                   turn)
from covidsev.method.inpainting import (GREY_STD, LAST_LAYERS, InpaintingInfNet, InpaintingNet, constrain, erase, grey_error,
                                        grey_gradient, grey_of, hard_mask, linear_head, mask_grid, normalised_grey, painted_grey,
                                        random_mask, rank_of_threshold, reconstruction_loss, region_mean, soft_mask, spread,
                                        transfer)
from covidsev.method.unets import FORMS, MultiClassUNet, build_network
from covidsev.core import CheckpointError, ConfigError, GeometryError, IntensityError, NonFiniteError
from covidsev.data.datasets import load_phantom, to_tensors
from covidsev.method.infnet import InfNet, count_parameters

from tiny import tiny_backbone

SIDE = 64  # pixels: a grid of 4 x 4 cells, of which a hard mask keeps 11
KEPT = 11


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with tiny_backbone():
        yield


@pytest.fixture(scope="module")
def slices() -> torch.Tensor:
    return to_tensors(load_phantom("train", 16, SIDE), SIDE)[0]


@pytest.fixture(scope="module")
def x(slices) -> torch.Tensor:
    return slices[:4].float() / 255


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(variant: str = "linear", seed: int = 0) -> tuple[InpaintingInfNet, CoachNet]:
    torch.manual_seed(seed)
    return InpaintingInfNet("tiny", variant=variant), CoachNet("tiny")


def play(network: nn.Module, images: torch.Tensor, config: PretextConfig, coach: CoachNet | None = None, **options) -> PretextResult:
    """A game from beginning to end."""
    game = Pretext(network, images, config, coach, **options)
    while not game.done:
        game.step()
    return game.result()


def state_of(module: nn.Module) -> dict:
    return copy.deepcopy(module.state_dict())


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Copy(nn.Module):
    """Copies what it sees: the error is what was erased, and nothing else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(1, affine=False)

    def forward(self, x):
        self.norm(x)  # only to have statistics that a leak would change
        return x * self.weight

    def errors(self, outputs, x, kind="squares"):
        return {"copy": (outputs - x).square()}


# the constraint

@pytest.mark.parametrize("cells, kept", [(64, 47), (484, 362), (16, 11), (36, 26), (144, 107)])
def test_cells_kept_at_three_quarters(cells, kept):
    side = math.isqrt(cells)
    assert rank_of_threshold(cells, 0.75) - 1 == kept
    assert hard_mask(torch.randn(3, 1, side, side, generator=seeded()), 0.75).sum(dim=(1, 2, 3)).tolist() == [kept] * 3
    assert random_mask(3, (side, side), 0.75, seeded()).sum(dim=(1, 2, 3)).tolist() == [kept] * 3


scores_of = st.builds(lambda seed, scale, digits, shape: (scale * torch.randn(shape, generator=seeded(seed))).round(decimals=digits),
                      st.integers(0, 999), st.sampled_from([0.0, 1e-6, 1.0, 1e6]), st.integers(0, 3),
                      st.tuples(st.integers(1, 3), st.just(1), st.integers(3, 9), st.integers(3, 9)))


@given(scores_of, st.floats(0.3, 0.97))
def test_the_budget_holds_for_every_score(scores, keep):
    """Also for equal scores, where the published rule keeps fewer, or nothing."""
    cells = scores.shape[2] * scores.shape[3]
    mask = hard_mask(scores, keep)
    assert mask.sum(dim=(1, 2, 3)).tolist() == [rank_of_threshold(cells, keep) - 1] * len(scores)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    lowest_kept = torch.where(mask > 0, scores, torch.inf).amin(dim=(1, 2, 3))
    assert (torch.where(mask > 0, -torch.inf, scores).amax(dim=(1, 2, 3)) <= lowest_kept).all()


@given(st.integers(0, 999), st.floats(0.3, 0.97), st.floats(0.1, 50))
def test_hard_and_soft_agree_where_scores_differ(seed, keep, alpha):
    scores = torch.randperm(49, generator=seeded(seed)).view(1, 1, 7, 7).float()
    soft = soft_mask(scores, keep, alpha)
    assert torch.equal(soft > 0.5, hard_mask(scores, keep) > 0) and 0 <= soft.min() and soft.max() <= 1
    assert int((constrain(scores, keep) == 0).sum()) == 1  # the K-th itself


@given(scores_of, st.floats(0.3, 0.95), st.floats(0.3, 0.95))
def test_more_budget_never_erases_more(scores, one, other):
    low, high = sorted((one, other))
    assert (hard_mask(scores, low) <= hard_mask(scores, high)).all()


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_keep_outside_0_and_1(keep):
    with pytest.raises(ConfigError, match="fraction kept"):
        constrain(torch.zeros(1, 1, 4, 4), keep)
    with pytest.raises(ConfigError, match="keep is out of range"):
        PretextConfig(keep=keep)


def test_a_budget_that_keeps_no_cell_is_refused():
    with pytest.raises(GeometryError, match="erase the whole image"):
        hard_mask(torch.zeros(1, 1, 4, 4), 0.12)  # K = 1: nothing would be kept
    assert hard_mask(torch.zeros(1, 1, 4, 4), 0.125).sum() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(value):
    scores = torch.zeros(2, 1, 4, 4)
    scores[1, 0, 2, 3] = value
    for rule in (constrain, soft_mask, hard_mask):
        with pytest.raises(NonFiniteError, match="1 bad of 32"):
            rule(scores, 0.75)


@pytest.mark.parametrize("size, near", [((100, 96), "96 x 96"), ((8, 16), "16 x 16"), ((350, 352), "352 x 352")])
def test_sizes_that_do_not_divide_into_cells(size, near):
    with pytest.raises(GeometryError, match=f"resize to {near}"):
        mask_grid(size)


def test_spread_repeats_each_cell_and_passes_gradients():
    cells = torch.rand(2, 1, 4, 6, generator=seeded(), requires_grad=True)
    pixels = spread(cells, (64, 96))
    assert torch.equal(pixels, nn.functional.interpolate(cells, scale_factor=16, mode="nearest"))
    pixels.sum().backward()
    assert torch.equal(cells.grad, torch.full_like(cells, 256))
    with pytest.raises(GeometryError, match="4 x 6 cells, 96 x 64 pixels"):
        spread(cells, (96, 64))


# the degenerate solution

def erased_after(constrained: bool, x: torch.Tensor, steps: int = 40) -> list[float]:
    """Fractions erased while a coach plays against `Copy`, the error taken over the whole slice."""
    torch.manual_seed(0)
    coach, network, fractions = CoachNet("tiny"), Copy(), []
    optimiser = torch.optim.Adam(coach.parameters(), 1e-2)
    for _ in range(steps):
        scores = coach(x)
        mask = spread(soft_mask(scores, 0.75) if constrained else torch.sigmoid(scores), x.shape[-2:])
        optimiser.zero_grad()
        (1 - network.errors(erase(x, mask), x)["copy"].mean()).backward()
        optimiser.step()
        kept = hard_mask(scores, 0.75) if constrained else (scores > 0).float()
        fractions.append(1 - float(kept.mean()))
    return fractions


def test_without_the_constraint_everything_is_erased(x):
    assert erased_after(False, x)[-1] == 1


def test_with_the_constraint_the_budget_is_never_exceeded(x):
    assert set(erased_after(True, x)) == {1 - KEPT / 16}


def test_a_coach_that_died_still_keeps_its_budget(slices):
    _, coach = build()
    with torch.no_grad():
        for weight in coach.parameters():
            weight.zero_()
    assert coach_cells(coach, slices.float() / 255, 0.75).sum(dim=(1, 2, 3)).tolist() == [KEPT] * 16


# who learns when

@pytest.mark.parametrize("variant, rule", [("linear", "squares"), ("linear", "through_network"), ("linear", "cross_entropy"),
                                           ("as_published", "through_network")])
def test_nothing_leaks_into_the_network_in_a_coach_step(x, variant, rule):
    network, coach = build(variant)
    network.rfb_3.eval()  # a mixed mode must come back as it was, too
    network.rfb_4.requires_grad_(False)
    before, coach_before = state_of(network), state_of(coach)
    optimiser = torch.optim.SGD(coach.parameters(), 0.1)
    coach_step(coach, network, optimiser, x, PretextConfig(coach_loss=rule))
    assert all(weight.grad is None for weight in network.parameters())
    assert equal(before, network.state_dict())
    assert not equal(coach_before, coach.state_dict())
    assert network.training and not network.rfb_3.training
    assert not any(weight.requires_grad for weight in network.rfb_4.parameters())
    assert all(weight.requires_grad for weight in network.decoder.parameters())


def test_the_coach_is_untouched_in_a_network_step(x):
    network, coach = build()
    before = state_of(coach)
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    network_before = state_of(network)
    network_step(network, optimiser, x, spread(coach_cells(coach.train(), x, 0.75), x.shape[-2:]), PretextConfig())
    assert equal(before, coach.state_dict()) and coach.training
    assert all(weight.grad is None for weight in coach.parameters())
    assert not equal(network_before, network.state_dict())


def test_frozen_restores_after_an_error():
    network, _ = build()
    with pytest.raises(RuntimeError), frozen(network):
        assert not network.training and not any(weight.requires_grad for weight in network.parameters())
        raise RuntimeError
    assert network.training and all(weight.requires_grad for weight in network.parameters())


def test_coach_loss_is_one_minus_the_error_and_pushes_towards_it(x):
    """With constant errors the gradient lowers the score of the cell where the error is largest, and of no other as much."""
    class Known(nn.Module):
        def forward(self, x):
            return x

        def errors(self, outputs, x, kind="squares"):
            error = torch.full_like(x, 0.1)
            error[:, :, 16:32, 32:48] = 1.0  # cell (1, 2)
            return {"known": error}

    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Parameter(torch.linspace(0, 0.1, 16).view(1, 1, 4, 4))

        def forward(self, x):
            return self.scores.expand(len(x), 1, 4, 4)

    free = Free()
    loss = coach_loss(free, Known(), x, 0.75)
    loss.backward()
    assert 0 < loss.item() < 0.9  # 1 - L_rec, and L_rec lies between the two errors
    assert int(free.scores.grad.argmax()) == 6  # descending lowers it: erased


def test_alpha_sharpens_the_mask():
    scores = torch.randn(1, 1, 8, 8, generator=seeded())
    assert (soft_mask(scores, 0.75, 100) - hard_mask(scores, 0.75)).abs().mean() < 0.02
    assert (soft_mask(scores, 0.75, 1) - hard_mask(scores, 0.75)).abs().mean() > 0.2


# the heads and the loss

def test_last_layers_are_linear_and_nothing_else_differs():
    network, plain = build()[0], InfNet("tiny")
    own, other = network.state_dict(), plain.state_dict()
    heads = tuple(f"{name}." for name in LAST_LAYERS)
    assert {name: v.shape for name, v in own.items() if not name.startswith(heads)} == \
        {name: v.shape for name, v in other.items() if not name.startswith(heads)}
    assert {type(network.get_submodule(name)) for name in LAST_LAYERS} == {nn.Conv2d}
    assert count_parameters(network) - count_parameters(plain) == -4  # four heads lose two of normalisation and gain one of bias


@pytest.mark.parametrize("backbone", ["resnet50", "small"])
def test_every_backbone_has_an_inpainting_form(backbone):
    with torch.device("meta"):
        network = InpaintingInfNet(backbone)
        outputs = network(torch.zeros(2, 1, 96, 64, device="meta"))
        scores = CoachNet(backbone)(torch.zeros(2, 1, 96, 64, device="meta"))
    assert all(value.shape == (2, 1, 96, 64) for value in outputs) and scores.shape == (2, 1, 6, 4)


def test_as_published_heads_do_not_touch_the_old_forward(x):
    """The old heads still make the coarse maps, exactly as Inf-Net does."""
    network = build("as_published")[0].eval()
    plain = InfNet("tiny").eval()
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if not name.startswith("inpainting.")})
    with torch.no_grad():
        hidden = plain.decoder.refine  # the input of the last layer
        kept = []
        hook = hidden.register_forward_hook(lambda module, given, made: kept.append(made))
        plain(x)
        hook.remove()
        expected = torch.tanh(torch.tanh(network.inpainting["s_g"](kept[0])))
        torch.testing.assert_close(network(x).s_g, infnet.resize_map(expected, x.shape[-2:]))
    assert all(value.shape == (4, 3, SIDE, SIDE) and value.abs().max() <= 1 for value in network(x))


def test_region_means_ignore_how_large_the_region_is():
    error = torch.full((3, 1, 8, 8), 0.25)
    for cut in (1, 3, 8):
        mask = torch.ones(3, 1, 8, 8)
        mask[..., :cut] = 0
        loss = reconstruction_loss({"a": error, "b": 3 * error}, mask)
        assert loss.erased.item() == pytest.approx(0.5)
        assert loss.kept.item() == pytest.approx(0.5 if cut < 8 else 0)
    assert region_mean(error, torch.zeros_like(error)).item() == 0


def test_the_loss_looks_only_where_it_should():
    error = torch.zeros(1, 1, 32, 32)
    error[..., :16, :16] = 1  # only in the cell that is erased
    mask = spread(torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]]), (32, 32))
    loss, whole = (reconstruction_loss({"only": error}, mask, whole=whole) for whole in (False, True))
    assert (loss.erased.item(), loss.kept.item(), loss.total.item()) == pytest.approx((1, 0, 0.99))
    assert whole.total.item() == pytest.approx(0.25)  # algorithm 2: all four cells


@given(st.integers(0, 99))
def test_gradient_target_follows_flips_and_is_zero_on_flat_images(seed):
    image = torch.rand(1, 1, 9, 12, generator=seeded(seed))
    torch.testing.assert_close(grey_gradient(image.flip(-1)), grey_gradient(image).flip(-1))
    torch.testing.assert_close(grey_gradient(image.mT), grey_gradient(image).mT)
    torch.testing.assert_close(grey_gradient(image + 0.5), grey_gradient(image), rtol=1e-3, atol=1e-4)
    assert grey_gradient(torch.full_like(image, 0.7)).abs().max() == 0


def test_erased_pixels_are_the_mean_grey_and_the_input_is_not_changed(x):
    before = x.clone()
    mask = spread(random_mask(len(x), (4, 4), 0.75, seeded()), x.shape[-2:])
    seen = erase(x, mask)
    assert torch.equal(x, before) and torch.equal(seen[mask == 1], x[mask == 1])
    assert normalised_grey(seen)[mask == 0].abs().max() < 1e-6


def test_linear_head_keeps_kernel_and_size():
    conv = linear_head(infnet.ConvBN(5, 7, 3), 2)
    assert conv(torch.zeros(1, 5, 6, 4)).shape == (1, 2, 6, 4) and conv.bias is not None and conv.kernel_size == (3, 3)


def test_both_errors_are_smallest_where_the_picture_is_right(x):
    grey = x.clamp(0.02, 0.98)
    for kind, right in (("squares", normalised_grey(grey)), ("cross_entropy", torch.logit(grey))):
        assert torch.allclose(painted_grey(right, kind), grey, atol=1e-5)
        least = grey_error(right, grey, kind)
        assert all((grey_error(right + off, grey, kind) >= least).all() for off in (-0.5, 0.5))
    assert grey_error(normalised_grey(grey), grey).abs().max() == 0
    assert grey_error(torch.full_like(x, 100.0), grey).min() == 2  # clipped
    entropy = -(grey * grey.log() + (1 - grey) * (1 - grey).log())
    torch.testing.assert_close(grey_error(torch.logit(grey), grey, "cross_entropy"), entropy, rtol=1e-4, atol=1e-5)


def test_algorithm_2_is_the_mean_entropy_of_the_whole_slice_through_the_network(x):
    network, coach = build()
    rule = RULES["cross_entropy"]
    loss = coach_loss(coach, network, x, 0.75, rule)
    mask = spread(soft_mask(coach(x), 0.75), x.shape[-2:])
    with frozen(network):
        said = network(erase(x, mask))
        terms = [nn.functional.binary_cross_entropy_with_logits(one, x) for one in said[:4]]
        edge = (GREY_STD * grey_gradient(x)).clamp(max=1)
        expected = 1 - torch.stack([*terms, nn.functional.binary_cross_entropy_with_logits(said.edge, edge)]).mean()
    torch.testing.assert_close(loss, expected)
    for weight, mine in zip(coach.parameters(), torch.autograd.grad(loss, list(coach.parameters()), retain_graph=True)):
        weight.grad = mine
    theirs = torch.autograd.grad(expected, list(coach.parameters()))
    for weight, other in zip(coach.parameters(), theirs):
        torch.testing.assert_close(weight.grad, other, rtol=1e-3, atol=1e-6)


# handing over

def heads_of(state: dict) -> set[str]:
    return {name for name in state if name.startswith(tuple(f"{layer}." for layer in LAST_LAYERS))}


@pytest.mark.parametrize("variant", ["linear", "as_published"])
def test_everything_but_the_last_layers_is_transferred(variant):
    pretext, network = build(variant)[0], InfNet("tiny")
    before = state_of(network)
    report = transfer(pretext, network)
    after, given_ = network.state_dict(), pretext.state_dict()
    assert set(report.fresh) == heads_of(after) and set(report.loaded) == set(after) - heads_of(after)
    assert set(report.left) == set(given_) - set(report.loaded)
    assert all(torch.equal(after[name], given_[name]) for name in report.loaded)
    assert all(torch.equal(after[name], before[name]) for name in report.fresh)
    assert report.values == sum(after[name].numel() for name in report.loaded)
    assert "decoder.head 2" in str(report) and f"{report.values:,} values" in str(report)


def test_transferred_weights_are_copies():
    pretext, network = build()[0], InfNet("tiny")
    transfer(pretext, network)
    before = state_of(pretext)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(1)
    assert equal(before, pretext.state_dict())


@pytest.mark.parametrize("wrong", [lambda: InfNet("tiny", channels=4), lambda: InfNet("small"), lambda: nn.Conv2d(1, 1, 1)])
def test_a_network_that_does_not_fit_is_left_alone(wrong):
    pretext, network = build()[0], wrong()
    before = state_of(network)
    with pytest.raises(CheckpointError):
        transfer(pretext, network)
    assert equal(before, network.state_dict())


def test_an_extra_layer_on_either_side_is_refused():
    pretext, network = build()[0], InfNet("tiny")
    network.extra = nn.Conv2d(1, 1, 1)
    with pytest.raises(CheckpointError, match="extra.weight"):
        transfer(pretext, network)
    pretext.surplus = nn.Conv2d(1, 1, 1)
    with pytest.raises(CheckpointError, match="surplus.weight"):
        transfer(pretext, InfNet("tiny"))


def test_weights_with_nan_are_not_handed_over():
    pretext, network = build()[0], InfNet("tiny")
    before = state_of(network)
    pretext.rfb_5.merge.conv.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="rfb_5.merge.conv.weight"):
        transfer(pretext, network)
    assert equal(before, network.state_dict())


@pytest.mark.parametrize("kind", FORMS)
def test_the_multiclass_network_goes_the_same_way(kind):
    torch.manual_seed(0)
    pretext, network = InpaintingNet(MultiClassUNet(kind), channels=2), MultiClassUNet(kind)
    head = network.head.weight.clone()
    report = transfer(pretext, network)
    own = network.state_dict()
    assert report.fresh == report.left == ("head.weight", "head.bias")
    assert sorted(report.loaded + report.fresh) == sorted(own) and torch.equal(network.head.weight, head)
    assert all(torch.equal(own[name], pretext.body.state_dict()[name]) for name in report.loaded)
    assert report.values == sum(own[name].numel() for name in report.loaded) and "head 2" in str(report)


def test_multiclass_forms_are_not_mixed():
    network = MultiClassUNet("small")
    before = state_of(network)
    with torch.device("meta"):
        pretext = InpaintingNet(MultiClassUNet("published"), channels=2)
    with pytest.raises(CheckpointError, match="another network"):
        transfer(pretext, network)
    assert equal(before, network.state_dict())


@pytest.mark.parametrize("model", ["unet", "segnet"])
def test_comparators_inpaint_and_hand_over_all_but_their_head(model, slices):
    torch.manual_seed(0)
    network = build_network(model, "small")
    before, pretext = state_of(network), InpaintingNet(network)
    play(pretext, slices[:4], PretextConfig(masks="random", warmup_epochs=1, rounds=0, batch_size=4))
    assert equal(before, network.state_dict())  # the pretext has a copy
    report = transfer(pretext, network)
    after = network.state_dict()
    assert set(report.fresh) == {"head.weight", "head.bias"} and set(report.loaded) == set(after) - set(report.fresh)
    assert all(torch.equal(after[name], before[name]) for name in report.fresh)
    assert all(torch.equal(after[name], pretext.body.state_dict()[name]) for name in report.loaded)
    weights = [name for name, _ in network.named_parameters() if name not in report.fresh]
    assert all(not torch.equal(after[name], before[name]) for name in weights)  # all of them had learnt


def test_a_network_without_one_head_is_refused():
    for network in (InfNet("tiny"), nn.Conv2d(1, 1, 1)):
        with pytest.raises(ConfigError, match="cannot inpaint"):
            InpaintingNet(network)


# the game

GAME = PretextConfig(warmup_epochs=12, rounds=2, coach_epochs=3, network_epochs=1, learning_rate=5e-3, coach_learning_rate=5e-3,
                     later_rate=0.1, batch_size=4, precision="float32")


@pytest.fixture(scope="module")
def played(slices, tiny):
    network, coach = build()
    return network, coach, play(network, slices, GAME, coach)


def test_masks_of_the_coach_become_harder_than_random_ones(played):
    _, _, result = played
    after_a_turn = result.history[(result.history.phase == "coach") & (result.history.phase.shift(-1) != "coach")]
    assert len(after_a_turn) == 2 and (after_a_turn.rec_coach > 1.15 * after_a_turn.rec_random).all()


def test_the_coach_step_is_what_makes_them_harder(played):
    history = played[2].history
    warm, first = history[history.phase == "warm-up"].iloc[-1], history[history.phase == "coach"].iloc[2]
    assert first.rec_coach > 1.15 * warm.rec_coach and first.rec_random == warm.rec_random  # the network stood still


def test_the_network_learns_to_paint(played):
    history = played[2].history
    assert history.rec_random.iloc[-1] < 0.7 * history.rec_random.iloc[0]


def test_the_history_is_complete(played):
    network, coach, result = played
    history = result.history
    assert list(history.columns) == ["epoch", "phase", "loss", "erased", "rec_random", "rec_coach", "spatial_entropy", "cell_entropy"]
    assert history.phase.tolist() == GAME.phases and history.epoch.tolist() == list(range(len(history)))
    assert history.erased.isna().tolist() == (history.phase == "coach").tolist()
    assert history.erased.dropna().tolist() == pytest.approx([1 - KEPT / 16] * 14)
    assert history[["spatial_entropy", "cell_entropy"]].to_numpy().min() >= 0
    assert history[["spatial_entropy", "cell_entropy"]].to_numpy().max() <= 1
    assert result.masks.shape == (len(history), 8, 1, 4, 4) and (result.masks.sum(dim=(2, 3, 4)) == KEPT).all()
    assert equal(result.network_state, network.state_dict()) and equal(result.coach_state, coach.state_dict())


@pytest.mark.parametrize("options", [{"masks": "coach"}, {"masks": "random"}, {"masks": "coach", "augment": "paper", "coach_loss": "through_network"},
                                     {"masks": "coach", "coach_loss": "cross_entropy", "precision": "bfloat16"}])
def test_two_runs_are_the_same_and_leave_the_global_generator_alone(slices, options):
    config = PretextConfig(warmup_epochs=1, rounds=1, network_epochs=1, batch_size=8, seed=3, **options)
    results = []
    for _ in range(2):
        network, coach = build()
        torch.manual_seed(len(results))  # whatever the caller has drawn before
        state = torch.get_rng_state()
        results.append(play(network, slices, config, coach if config.masks == "coach" else None))
        assert torch.equal(state, torch.get_rng_state())
    first, second = results
    assert first.history.equals(second.history) and equal(first.network_state, second.network_state)
    assert torch.equal(first.masks, second.masks) and (first.coach_state is None) == (config.masks != "coach")
    assert first.coach_state is None or equal(first.coach_state, second.coach_state)


@pytest.mark.parametrize("masks, after", [("coach", 1), ("coach", 5), ("random", 2)])
def test_a_run_can_stop_after_any_batch_and_go_on_with_the_same_bits(slices, masks, after):
    config = PretextConfig(warmup_epochs=1, rounds=1, network_epochs=1, batch_size=4, augment="strong", seed=2, masks=masks)

    def new(seed: int) -> Pretext:
        torch.manual_seed(seed)
        coach = CoachNet("tiny") if masks == "coach" else None
        return Pretext(InpaintingInfNet("tiny"), slices[:8], config, coach, watched=slices[:2])

    whole, stopped, other = new(0), new(0), new(1)
    while not whole.done:
        whole.step()
    for _ in range(after):  # in the middle of an epoch, or at its end; two batches each
        stopped.step()
    kept = copy.deepcopy(stopped.state())
    other.restore(kept)
    stopped.step()  # whatever the first one does afterwards
    while not other.done:
        other.step()
    first, second = whole.result(), other.result()
    assert first.history.equals(second.history) and torch.equal(first.masks, second.masks)
    assert equal(first.network_state, second.network_state)
    assert first.coach_state is None or equal(first.coach_state, second.coach_state)
    assert list(first.pictures) == list(second.pictures) and all(torch.equal(first.pictures[k], second.pictures[k]) for k in first.pictures)


def test_the_state_of_another_network_is_refused(slices):
    game = Pretext(build()[0], slices, PretextConfig(masks="random"), watched=slices[:2])
    state = game.state()
    other = Pretext(InpaintingInfNet("tiny", variant="as_published"), slices, PretextConfig(masks="random"), watched=slices[:2])
    before = state_of(other.network)
    with pytest.raises(CheckpointError, match="another network"):
        other.restore(state)
    assert equal(before, other.network.state_dict())


def test_pictures_are_kept_at_the_end_of_each_phase(played, slices):
    result = played[2]
    assert sorted(result.pictures) == [11, 14, 15, 18, 19]
    assert all(picture.shape == (8, 1, SIDE, SIDE) and picture.dtype == torch.uint8 for picture in result.pictures.values())
    mask = spread(result.masks[19].float(), (SIDE, SIDE))
    x = slices[:8].float() / 255
    with torch.no_grad(), frozen(played[0]):
        again = grey_of(played[0](erase(x, mask)).s_3)
    assert torch.equal((255 * again).round().to(torch.uint8), result.pictures[19])


def test_the_later_rate_applies_after_the_warm_up(slices):
    network, _ = build()
    config = PretextConfig(masks="random", learning_rate=0.01, later_rate=0.3, warmup_epochs=1, rounds=1, network_epochs=1, batch_size=16)
    game, rates = Pretext(network, slices, config, watched=slices[:2]), []
    for _ in range(2):
        game.step()
        rates.append(game.optimisers["network"].param_groups[0]["lr"])
    assert game.done and rates == pytest.approx([0.01, 0.003])


def test_images_are_not_changed(slices):
    before = slices.clone()
    play(*(build()[0], slices, PretextConfig(warmup_epochs=1, rounds=0, masks="random", augment="strong")))
    assert torch.equal(before, slices)


def test_no_epochs_change_nothing(slices):
    network, coach = build()
    before = state_of(network)
    result = play(network, slices, PretextConfig(warmup_epochs=0, rounds=0), coach)
    assert equal(before, result.network_state) and len(result.history) == 0


# bad input

@pytest.mark.parametrize("images, error, message", [
    (torch.zeros(4, 1, 64, 64), IntensityError, "8-bit"),
    (torch.zeros(4, 64, 64, dtype=torch.uint8), GeometryError, "stack of slices"),
    (torch.zeros(4, 1, 64, 70, dtype=torch.uint8), GeometryError, "resize to 64 x 64"),
    (torch.zeros(3, 1, 64, 64, dtype=torch.uint8), ConfigError, "set batch_size to 3 or less"),
    (torch.zeros(0, 1, 64, 64, dtype=torch.uint8), ConfigError, "fewer images than a batch"),
    (torch.full((4, 1, 64, 64), math.nan), IntensityError, "8-bit"),
])
def test_images_that_cannot_be_used(images, error, message):
    network, coach = build()
    before = state_of(network)
    with pytest.raises(error, match=message):
        play(network, images, PretextConfig(batch_size=4), coach)
    with pytest.raises(error, match=message):
        RotationPretext(RotationNet("tiny"), images, PretextConfig(masks="none", batch_size=4))
    assert equal(before, network.state_dict())


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"batch_size": 0}, {"rounds": -1}, {"coach_epochs": 0}, {"learning_rate": 0.0},
                                     {"learning_rate": math.nan}, {"coach_loss": "entropy"}, {"images_per_epoch": -1},
                                     {"masks": "coches"}, {"augment": "papre"}, {"later_rate": math.inf}])
def test_settings_that_cannot_work(options):
    with pytest.raises(ConfigError):
        PretextConfig(**options)


@pytest.mark.parametrize("masks, given_coach", [("coach", False), ("random", True), ("none", False)])
def test_coach_and_masks_must_fit(slices, masks, given_coach):
    network, coach = build()
    with pytest.raises(ConfigError, match="coach and masks do not fit"):
        play(network, slices, PretextConfig(masks=masks), coach if given_coach else None)


def test_a_missing_gpu_is_named(slices):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="device"):
        play(build()[0], slices, PretextConfig(masks="random"), device="cuda")


@pytest.mark.parametrize("who", ["network", "coach"])
def test_nan_stops_the_run_before_a_step(slices, who):
    network, coach = build()
    broken = network if who == "network" else coach
    next(broken.parameters()).data[0] = math.nan
    weights = [weight.clone() for weight in network.parameters()]
    config = PretextConfig(warmup_epochs=1 if who == "network" else 0, rounds=1)
    with pytest.raises(NonFiniteError, match=r"epoch 0 \((warm-up|coach)\), batch 0, slices first\d"):
        play(network, slices, config, coach, ids=[f"first{k}" for k in range(16)])
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(weights, network.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_changes_no_weight():
    layer = nn.Linear(1, 1, bias=False)
    before = layer.weight.clone()
    with pytest.raises(NonFiniteError, match="gradient norm"):
        descend((layer.weight - layer.weight.detach()).abs().sqrt().sum(), torch.optim.SGD(layer.parameters(), 0.1))
    assert torch.equal(before, layer.weight)


@given(st.integers(8, 40), st.integers(1, 8), st.integers(0, 100))
def test_an_epoch_holds_whole_batches_and_draws_each_image_as_often_as_any_other(count, batch, wanted):
    order = epoch_order(count, batch, seeded(), wanted)
    drawn = max(batch, wanted or count) // batch * batch
    assert order.shape == (drawn // batch, batch)
    often = torch.bincount(order.flatten(), minlength=count)
    assert often.sum() == drawn and len(often) == count and often.max() <= drawn // count + 1


def test_two_pools_give_equal_steps_and_the_larger_one_is_seen_over_the_epochs(slices):
    counts, used = {}, set()
    for name, images in (("few", slices[:6]), ("many", slices)):
        config = PretextConfig(masks="random", warmup_epochs=3, rounds=1, network_epochs=1, batch_size=4, images_per_epoch=8)
        game, counts[name] = Pretext(build()[0], images, config, watched=slices[:1]), 0
        while not game.done:
            game.step()
            counts[name] += 1
            used |= set(game.order.flatten().long().tolist()) if name == "many" else set()
    assert counts["few"] == counts["many"] == 2 * 4 and len(used) > 8  # drawn afresh in each epoch


# entropies

@given(st.integers(1, 12), st.integers(0, 99))
def test_entropies_lie_between_0_and_1(count, seed):
    spatial, cell = mask_entropy(random_mask(count, (4, 4), 0.75, seeded(seed)))
    assert 0 <= spatial <= 1 + 1e-12 and -1e-12 <= cell <= 1
    assert count > 1 or (cell == pytest.approx(0) and spatial == pytest.approx(math.log2(5) / 4))


def test_entropy_of_masks_that_erase_nothing():
    assert mask_entropy(torch.ones(3, 1, 4, 4)) == (0, 0)


# several channels

def test_the_multiclass_network_plays_too(slices):
    torch.manual_seed(0)
    network, two = InpaintingNet(MultiClassUNet("small"), channels=2), torch.cat([slices, slices // 2], dim=1)[:4]
    config = PretextConfig(warmup_epochs=2, rounds=1, network_epochs=1, batch_size=4)
    result = play(network, two, config, CoachNet("tiny"))
    assert result.history.loss[:2].is_monotonic_decreasing and (result.masks.sum(dim=(2, 3, 4)) == KEPT).all()
    assert len(network.errors(network(two / 255.0), two / 255.0)) == 2
    assert all(picture.shape == (4, 1, SIDE, SIDE) for picture in result.pictures.values())


# rotation

def turned(network: RotationNet, images: torch.Tensor, epochs: int = 4, **options) -> RotationPretext:
    """The rotation pretext to its end."""
    config = PretextConfig(masks="none", warmup_epochs=epochs, rounds=0, batch_size=4, learning_rate=3e-3, **options)
    game = RotationPretext(network, images, config)
    while not game.done:
        game.step()
    return game


def test_rotation_counts_its_steps_like_inpainting(slices):
    torch.manual_seed(0)
    game = turned(RotationNet("tiny"), slices, images_per_epoch=8)
    history = game.result().history
    assert history.phase.tolist() == ["warm-up"] * 4 and history[["erased", "rec_random", "rec_coach"]].isna().all(axis=None)
    assert list(history.columns) == [*Pretext.columns, "accuracy"]


@pytest.mark.parametrize("options", [{"masks": "random"}, {"masks": "coach"}, {"masks": "none", "augment": "paper"}])
def test_rotation_refuses_masks_and_flips(slices, options):
    with pytest.raises(ConfigError, match="rotation erases nothing"):
        RotationPretext(RotationNet("tiny"), slices, PretextConfig(**options))
    if options["masks"] == "none":
        with pytest.raises(ConfigError, match="coach and masks do not fit"):
            Pretext(build()[0], slices, PretextConfig(masks="none"))


@given(st.integers(0, 3), st.integers(0, 3))
def test_turns_add_up_exactly(one, other):
    image = torch.rand(2, 1, 6, 6, generator=seeded())
    once, whole = turn(image, torch.full((2,), one)), turn(image, torch.full((2,), (one + other) % 4))
    assert torch.equal(turn(once, torch.full((2,), other)), whole)


def test_rotation_learns_repeats_and_hands_over_its_backbone(slices):
    tables = []
    for _ in range(2):
        torch.manual_seed(0)
        network = RotationNet("tiny")
        tables.append(turned(network, slices, epochs=12).result().history)
    # a third of the first loss, with any seed; after four epochs it could still be above it
    assert tables[0].equals(tables[1]) and tables[0].loss.iloc[-1] < 0.6 * tables[0].loss.iloc[0]
    with torch.no_grad(), frozen(network):
        right = [network(turn(slices[:8].float() / 255, torch.full((8,), k))).argmax(1) == k for k in range(4)]
    assert tables[0].accuracy.iloc[-1] == pytest.approx(torch.stack(right).float().mean().item())
    target = InfNet("tiny")
    report = transfer(network, target)
    assert {name.split(".")[0] for name in report.loaded} == {"backbone"} and report.left == ("classifier.weight", "classifier.bias")
    assert equal(network.backbone.state_dict(), target.backbone.state_dict())


def test_error_under_a_mask_uses_evaluation_mode(x):
    network, _ = build()
    before = state_of(network)
    mask = spread(random_mask(len(x), (4, 4), 0.75, seeded()), x.shape[-2:])
    assert error_under(network, x, mask) == error_under(network, x, mask) and network.training
    assert equal(before, network.state_dict())
