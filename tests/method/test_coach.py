"""The pretext and its coach: what is erased, who may learn in which step, what is handed over, and everything that is refused."""
import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from covidsev.method import infnet
from covidsev.method.coach import (RULES, CoachNet, Pretext, PretextConfig, PretextResult,
                                   RotationNet, RotationPretext, coach_cells, coach_loss,
                                   coach_step, descend, epoch_order, error_under, frozen,
                                   mask_entropy, turn)
from covidsev.method.inpainting import (GREY_STD, InpaintingInfNet, InpaintingNet, constrain, erase,
                                        grey_gradient, hard_mask, random_mask, rank_of_threshold,
                                        reconstruction_loss, region_mean, soft_mask, spread,
                                        transfer)
from covidsev.method.unets import MultiClassUNet, build_network
from covidsev.core import (CheckpointError, ConfigError, GeometryError, IntensityError,
                           NonFiniteError)
from covidsev.data.datasets import load_phantom, to_tensors
from covidsev.method.infnet import InfNet

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


# the constraint


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(value):
    scores = torch.zeros(2, 1, 4, 4)
    scores[1, 0, 2, 3] = value
    for rule in (constrain, soft_mask, hard_mask):
        with pytest.raises(NonFiniteError, match="1 bad of 32"):
            rule(scores, 0.75)


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


def test_frozen_restores_after_an_error():
    network, _ = build()
    with pytest.raises(RuntimeError), frozen(network):
        assert not network.training and not any(weight.requires_grad for weight in network.parameters())
        raise RuntimeError
    assert network.training and all(weight.requires_grad for weight in network.parameters())


def test_alpha_sharpens_the_mask():
    scores = torch.randn(1, 1, 8, 8, generator=seeded())
    assert (soft_mask(scores, 0.75, 100) - hard_mask(scores, 0.75)).abs().mean() < 0.02
    assert (soft_mask(scores, 0.75, 1) - hard_mask(scores, 0.75)).abs().mean() > 0.2


# the heads and the loss


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
        assert (loss.erased.item(), loss.kept.item()) == pytest.approx((0.5, 0.5 if cut < 8 else 0))
    assert region_mean(error, torch.zeros_like(error)).item() == 0
    error[...], mask[..., 4:] = 0, 1
    error[..., :4] = 1  # only where it is erased
    loss, whole = (reconstruction_loss({"only": error}, mask, whole=whole) for whole in (False, True))
    assert [loss.erased.item(), loss.kept.item(), loss.total.item(), whole.total.item()] == pytest.approx([1, 0, 0.99, 0.5])


def test_algorithm_2_is_the_mean_entropy_of_the_whole_slice_through_the_network(x):
    (network, coach), entropy = build(), nn.functional.binary_cross_entropy_with_logits
    loss = coach_loss(coach, network, x, 0.75, RULES["cross_entropy"])
    with frozen(network):
        said = network(erase(x, spread(soft_mask(coach(x), 0.75), x.shape[-2:])))
        edge = (GREY_STD * grey_gradient(x)).clamp(max=1)
        expected = 1 - torch.stack([*(entropy(one, x) for one in said[:4]), entropy(said.edge, edge)]).mean()
    torch.testing.assert_close(loss, expected)
    mine, theirs = (torch.autograd.grad(each, list(coach.parameters())) for each in (loss, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


# handing over


def spoil(weight: torch.Tensor) -> None:
    weight.data[0, 0, 0, 0] = math.nan


@pytest.mark.parametrize("change, error, words", [
    (lambda pretext, network: InfNet("tiny", channels=4), CheckpointError, "another network"),
    (lambda pretext, network: nn.Conv2d(1, 1, 1), CheckpointError, "lacks a last layer"),
    (lambda pretext, network: network.add_module("extra", nn.Conv2d(1, 1, 1)), CheckpointError, "extra.weight"),
    (lambda pretext, network: pretext.add_module("surplus", nn.Conv2d(1, 1, 1)), CheckpointError, "surplus.weight"),
    (lambda pretext, network: spoil(pretext.rfb_5.merge.conv.weight), NonFiniteError, "rfb_5.merge.conv.weight")])
def test_a_network_that_does_not_fit_is_left_alone(change, error, words):
    pretext, network = build()[0], InfNet("tiny")
    network = change(pretext, network) or network
    before = state_of(network)
    with pytest.raises(error, match=words):
        transfer(pretext, network)
    assert equal(before, network.state_dict())


@pytest.mark.parametrize("model", ["unet", "segnet", "multi"])
def test_comparators_inpaint_and_hand_over_all_but_their_head(model, slices):
    torch.manual_seed(0)
    network, channels = (MultiClassUNet("small"), 2) if model == "multi" else (build_network(model, "small"), 1)
    before, pretext = state_of(network), InpaintingNet(network, channels)
    images = torch.cat([slices, slices // 2], dim=1)[:4, :channels]
    play(pretext, images, PretextConfig(masks="random", warmup_epochs=1, rounds=0, batch_size=4))
    assert equal(before, network.state_dict())  # the pretext has a copy
    report, after = transfer(pretext, network), network.state_dict()
    assert report.fresh == report.left == ("head.weight", "head.bias")
    assert set(report.loaded) == set(after) - set(report.fresh)
    assert all(torch.equal(after[name], before[name]) for name in report.fresh)
    assert all(torch.equal(after[name], pretext.body.state_dict()[name]) for name in report.loaded)
    weights = [name for name, _ in network.named_parameters() if name not in report.fresh]
    assert all(not torch.equal(after[name], before[name]) for name in weights)  # all of them had learnt
    assert "head 2" in str(report) and f"{report.values:,} values" in str(report)


# the game

def same(first: PretextResult, second: PretextResult) -> None:
    """Two games that do not differ in a bit."""
    assert first.history.equals(second.history) and torch.equal(first.masks, second.masks)
    assert equal(first.network_state, second.network_state) and equal(first.pictures, second.pictures)
    assert equal(first.coach_state or {}, second.coach_state or {})


def repainted(network: nn.Module, watched: torch.Tensor, result: PretextResult) -> bool:
    """Whether the last picture is what the network paints into the last masks."""
    last = max(result.pictures)
    x = watched.float() / 255
    with torch.no_grad(), frozen(network):
        again = network.painted(network(erase(x, spread(result.masks[last].float(), (SIDE, SIDE)))))
    return torch.equal((255 * again).round().to(torch.uint8), result.pictures[last])



@pytest.mark.parametrize("options", [
    {"masks": "random"}, {"augment": "paper", "coach_loss": "through_network"},
    {"coach_loss": "cross_entropy", "precision": "bfloat16"}])
def test_two_runs_are_the_same_and_leave_the_global_generator_alone(slices, options):
    config = PretextConfig(warmup_epochs=1, rounds=1, network_epochs=1, batch_size=8, seed=3, **options)
    results = []
    for _ in range(2):
        network, coach = build()
        torch.manual_seed(len(results))  # whatever the caller has drawn before
        state = torch.get_rng_state()
        results.append(play(network, slices, config, coach if config.masks == "coach" else None))
        assert torch.equal(state, torch.get_rng_state())
    same(*results)
    assert (results[0].coach_state is None) == (config.masks != "coach")
    assert config.precision == "bfloat16" or repainted(network, slices[:8], results[1])


@pytest.mark.parametrize("masks, after", [("coach", 5), ("random", 2)])
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
    same(whole.result(), other.result())


def test_the_later_rate_applies_after_the_warm_up(slices):
    config = PretextConfig(masks="random", learning_rate=0.01, later_rate=0.3, warmup_epochs=1, rounds=1,
                           network_epochs=1, batch_size=16)
    game, rates = Pretext(build()[0], slices, config, watched=slices[:2]), []
    while not game.done:
        game.step()
        rates.append(game.optimisers["network"].param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.003])


# bad input

BYTES = torch.zeros(4, 1, 64, 80, dtype=torch.uint8)


@pytest.mark.parametrize("images, error, message", [
    (BYTES.float(), IntensityError, "8-bit"), (BYTES[0], GeometryError, "stack of slices"),
    (BYTES[..., :70], GeometryError, "resize to 64 x 64"), (BYTES[:3], ConfigError, "set batch_size to 3 or less"),
    (BYTES[:0], ConfigError, "fewer images than a batch")])
def test_images_that_cannot_be_used(images, error, message):
    network, coach = build()
    before = state_of(network)
    with pytest.raises(error, match=message):
        play(network, images, PretextConfig(batch_size=4), coach)
    with pytest.raises(error, match=message):
        RotationPretext(RotationNet("tiny"), images, PretextConfig(masks="none", batch_size=4))
    assert equal(before, network.state_dict())


@pytest.mark.parametrize("options", [
    {"keep": 0.0}, {"keep": 1.5}, {"keep": math.nan}, {"batch_size": 0}, {"rounds": -1}, {"coach_epochs": 0},
    {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"images_per_epoch": -1}, {"augment": "papre"}, {"later_rate": math.inf}])
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


@given(st.integers(8, 40), st.integers(1, 8), st.integers(0, 100))
def test_an_epoch_holds_whole_batches_and_draws_each_image_as_often_as_any_other(count, batch, wanted):
    order = epoch_order(count, batch, seeded(), wanted)
    drawn = max(batch, wanted or count) // batch * batch
    assert order.shape == (drawn // batch, batch)
    often = torch.bincount(order.flatten(), minlength=count)
    assert often.sum() == drawn and len(often) == count and often.max() <= drawn // count + 1


# entropies

@given(st.integers(1, 12), st.integers(0, 99))
def test_entropies_lie_between_0_and_1(count, seed):
    spatial, cell = mask_entropy(random_mask(count, (4, 4), 0.75, seeded(seed)))
    assert 0 <= spatial <= 1 + 1e-12 and -1e-12 <= cell <= 1
    assert count > 1 or (cell == pytest.approx(0) and spatial == pytest.approx(math.log2(5) / 4))


# rotation

def turned(network: RotationNet, images: torch.Tensor) -> RotationPretext:
    """The rotation pretext to its end."""
    game = RotationPretext(network, images, PretextConfig(masks="none", warmup_epochs=12, rounds=0, batch_size=4,
                                                          learning_rate=3e-3))
    while not game.done:
        game.step()
    return game


@pytest.mark.parametrize("options", [{"masks": "random"}, {"masks": "coach"}, {"masks": "none", "augment": "paper"}])
def test_rotation_refuses_masks_and_flips(slices, options):
    with pytest.raises(ConfigError, match="rotation erases nothing"):
        RotationPretext(RotationNet("tiny"), slices, PretextConfig(**options))


def test_rotation_learns_repeats_and_hands_over_its_backbone(slices):
    tables = []
    for _ in range(2):
        torch.manual_seed(0)
        network = RotationNet("tiny")
        tables.append(turned(network, slices).result().history)
    # a third of the first loss, with any seed; after four epochs it could still be above it
    assert tables[0].equals(tables[1]) and tables[0].loss.iloc[-1] < 0.6 * tables[0].loss.iloc[0]
    with torch.no_grad(), frozen(network):
        right = [network(turn(slices[:8].float() / 255, torch.full((8,), k))).argmax(1) == k for k in range(4)]
    assert tables[0].accuracy.iloc[-1] == pytest.approx(torch.stack(right).float().mean().item())
    target = InfNet("tiny")
    report = transfer(network, target)
    assert {name.split(".")[0] for name in report.loaded} == {"backbone"} and report.left == ("classifier.weight", "classifier.bias")
    assert equal(network.backbone.state_dict(), target.backbone.state_dict())


def test_looking_at_masks_and_errors_changes_nothing(x):
    network, coach = build()
    before, coach_before = state_of(network), state_of(coach)
    mask = spread(coach_cells(coach, x, 0.75), x.shape[-2:])
    assert not mask.requires_grad and coach.training
    assert error_under(network, x, mask) == error_under(network, x, mask) and network.training
    assert equal(before, network.state_dict()) and equal(coach_before, coach.state_dict())


def test_a_gradient_that_is_not_finite_changes_no_weight():
    layer = nn.Linear(1, 1, bias=False)
    before, root = layer.weight.clone(), (layer.weight - layer.weight.detach()).abs().sqrt()
    with pytest.raises(NonFiniteError, match="gradient norm"):
        descend(root.sum(), torch.optim.SGD(layer.parameters(), 0.1))
    assert torch.equal(before, layer.weight)
