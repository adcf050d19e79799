"""What happens to a patch before the network sees it, and what its targets are."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from factories import UNET_2D, UNET_3D, make_spec

from segrt.errors import SpecError
from segrt.spec import Channel, Head, Label, NoNorm, PreviousStage, ZScoreNorm
from segrt.train import article, augment
from segrt.train.augment import Augment, Rotation, initial_patch, plan_rotation
from segrt.train.cascade import append_labels, disturb_labels, remove_component
from segrt.train.config import Transforms, make_config
from segrt.train.sampler import Sample
from segrt.train.targets import class_names, class_values, label_values, make_targets

PATCH = (12, 14, 16)


def _sample(shape=PATCH, *, channels: int = 1, values=(0, 1, 2), previous: bool = False, seed: int = 0) -> Sample:
    """Blocks of labels; the image is the label plus 1, and a channel of noise for each further one."""
    rng = np.random.default_rng(seed)
    small = rng.choice(values, [-(-n // 4) for n in shape])
    labels = small.repeat(4, 0).repeat(4, 1).repeat(4, 2)[tuple(slice(n) for n in shape)].astype(np.int16)
    data = np.concatenate([labels[None] + 1, rng.normal(size=(channels - 1, *shape))]).astype(np.float32)
    return Sample("a", data, labels, labels.copy() if previous else None)


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ------------------------------------------------------------------ targets
def test_targets_are_class_indices_whatever_the_values() -> None:
    """SEEDS 2.12 q: labels had to be consecutive."""
    spec = make_spec(values=(0, 7, 300))
    labels = torch.tensor([[[0, 7, 300, -1, 7]]], dtype=torch.int16)
    [target] = make_targets(labels, spec, [(1, 1, 1)])
    assert target.tolist() == [[[0, 1, 2, 0, 1]]]
    assert target.dtype == torch.int16


def test_what_nobody_annotated_is_minus_one() -> None:
    labels = torch.tensor([[[0, 1, 2, 3, -1]]], dtype=torch.int16)
    [target] = make_targets(labels, make_spec(ignore=3), [(1, 1, 1)])
    assert target.tolist() == [[[0, 1, 2, -1, 0]]]
    regions = make_spec(
        values=(1, 2),
        activation="sigmoid",
        labels=(Label(name="whole", values=(1, 2)), Label(name="core", values=(2,))),
        ignore=3,
    )
    [target] = make_targets(labels, regions, [(1, 1, 1)])
    assert target.tolist() == [[[[0, 1, 1, -1, 0]]], [[[0, 0, 1, -1, 0]]]]
    assert target.dtype == torch.int8


def test_targets_become_the_datasets_own_values_again() -> None:
    """The picture of samples showed 1, 2, ... whatever the label maps hold."""
    spec = make_spec(values=(0, 7, 300), ignore=9)
    labels = torch.tensor([[[0, 7, 300, 9, -1]]], dtype=torch.int16)
    [target] = make_targets(labels, spec, [(1, 1, 1)])
    assert label_values(target.numpy(), spec).tolist() == [[[0, 7, 300, -1, 0]]]
    assert dict(zip(class_values(spec), class_names(spec), strict=True)) == {value: spec.labels[i].name for i, value in enumerate((7, 300))}
    regions = make_spec(
        values=(4, 2),
        activation="sigmoid",
        labels=(Label(name="whole", values=(2, 4)), Label(name="core", values=(2,))),
        ignore=3,
    )
    labels = torch.tensor([[[0, 2, 4, 3, -1]]], dtype=torch.int16)
    [target] = make_targets(labels, regions, [(1, 1, 1)])
    assert label_values(target.numpy(), regions).tolist() == [[[0, 2, 4, -1, 0]]]
    assert dict(zip(class_values(regions), class_names(regions), strict=True)) == {4: "whole", 2: "core"}


def test_coarser_targets_take_the_nearest_voxel() -> None:
    labels = torch.arange(8, dtype=torch.int16).clamp(max=2).reshape(1, 1, 8).repeat(4, 6, 1)
    fine, coarse = make_targets(labels, make_spec(), [(1.0, 1.0, 1.0), (1.0, 0.5, 0.5)])
    assert fine.shape == (4, 6, 8)
    torch.testing.assert_close(coarse, labels[:, 1::2, 1::2])  # voxel centres map to 0.5, 2.5, ...: the upper one is nearest-exact's


def test_outputs_of_one_size_share_a_target() -> None:
    labels = torch.zeros(4, 4, 4, dtype=torch.int16)
    assert len(make_targets(labels, make_spec(), [(1.0, 1.0, 1.0)] * 4)) == 1


# ------------------------------------------------------------------ none
def test_without_augmentation_the_patch_stays_as_it_is() -> None:
    sample = _sample()
    data, [target] = Augment(make_spec(patch=PATCH), "none")(sample, _rng())
    np.testing.assert_array_equal(data, sample.data)
    np.testing.assert_array_equal(target, sample.labels)


def test_slices_lose_their_axis() -> None:
    spec = make_spec(patch=(1, 14, 16), network=UNET_2D)
    for kind in ("none", "nnunet"):
        shape = initial_patch(spec, kind)
        data, targets = Augment(spec, kind, ((1.0, 1.0), (0.5, 0.5)))(_sample(shape), _rng())
        assert data.shape == (1, 14, 16)
        assert [target.shape for target in targets] == [(14, 16), (7, 8)]


# ------------------------------------------------------------------ nnU-Net's
@pytest.mark.parametrize(
    ("patch", "rotation", "initial"),
    [
        ((40, 56, 40), Rotation(30, in_plane=False), (73, 80, 64)),
        ((28, 256, 256), Rotation(180, in_plane=True), (28, 301, 301)),
        ((1, 256, 256), Rotation(180, in_plane=False), (1, 301, 301)),
        ((1, 96, 160), Rotation(15, in_plane=False), (1, 157, 188)),
    ],
)
def test_rotation_and_the_patch_it_needs_are_nnunets(patch, rotation: Rotation, initial) -> None:
    assert plan_rotation(patch[1:] if patch[0] == 1 else patch) == rotation
    spec = make_spec(patch=patch, network=UNET_2D if patch[0] == 1 else UNET_3D)
    assert initial_patch(spec, "nnunet") == initial
    assert initial_patch(spec, "none") == patch


def test_the_transforms_are_nnunets_in_its_order() -> None:
    spec = make_spec(patch=PATCH, network=UNET_3D, mirror_axes=(0, 1, 2))
    transforms = augment._nnunet_transforms(spec, (0, 1, 2))
    names = [type(getattr(t, "transform", t)).__name__.removesuffix("Transform") for t in transforms]
    chances = [getattr(t, "apply_probability", 1) for t in transforms]
    assert dict(enumerate(zip(names, chances, strict=True))) == dict(
        enumerate(
            [
                ("Spatial", 1),
                ("GaussianNoise", 0.1),
                ("GaussianBlur", 0.2),
                ("MultiplicativeBrightness", 0.15),
                ("Contrast", 0.15),
                ("SimulateLowResolution", 0.25),
                ("Gamma", 0.1),
                ("Gamma", 0.3),
                ("Mirror", 1),
            ]
        )
    )
    flat = augment._nnunet_transforms(make_spec(patch=(4, 16, 16), network=UNET_3D), ())
    assert [type(t).__name__ for t in flat[:3]] == ["Convert3DTo2DTransform", "SpatialTransform", "Convert2DTo3DTransform"]


def test_augmented_patches_follow_their_generator_alone() -> None:
    spec = make_spec(patch=PATCH, network=UNET_3D, mirror_axes=(0, 1, 2))
    transform, shape = Augment(spec, "nnunet"), initial_patch(spec, "nnunet")
    results = []
    for seed in (1, 2, 1):
        torch.rand(3)
        results.append(transform(_sample(shape), _rng(seed)))
    assert torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][1][0], results[2][1][0])
    assert not torch.equal(results[0][0], results[1][0])
    for data, [target] in results:
        assert data.shape == (1, *PATCH)
        assert torch.isfinite(data).all()
        assert set(target.unique().tolist()) <= {0, 1, 2}


def test_the_callers_generators_and_threads_are_left_alone() -> None:
    spec = make_spec(patch=PATCH, network=UNET_3D)
    legacy = np.random.mtrand._rand  # NumPy's global generator
    before = torch.get_rng_state(), legacy.get_state()[1].copy(), torch.get_num_threads()
    Augment(spec, "nnunet")(_sample(initial_patch(spec, "nnunet")), _rng())
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(legacy.get_state()[1], before[1])
    assert torch.get_num_threads() == before[2]


def _often(spec, kind: str = "nnunet", count: int = 40, **options):
    transform, shape = Augment(spec, kind), initial_patch(spec, kind)
    for seed in range(count):
        sample = _sample(shape, seed=seed, **options)
        yield sample, *transform(sample, _rng(seed))


def test_patches_are_mirrored_over_the_allowed_axes_only() -> None:
    ramp = np.arange(np.prod(PATCH), dtype=np.float32).reshape(1, *PATCH)
    for axes in ((), (2,), (0, 1, 2)):
        spec = make_spec(patch=PATCH, network=UNET_3D, mirror_axes=axes)
        mirror = augment._nnunet_transforms(spec, axes)[8:]
        assert len(mirror) == bool(axes)
        found = set()
        with augment._drawing_from(_rng(3)):
            for _ in range(60):
                turned = torch.from_numpy(ramp)
                for transform in mirror:
                    turned = transform(image=turned, segmentation=turned)["image"]
                found.add(
                    tuple(bool(turned[0].select(axis, 0).flatten()[0] > turned[0].select(axis, -1).flatten()[0]) for axis in range(3))
                )
        assert len(found) == 2 ** len(axes)
        assert {axis for way in found for axis in range(3) if way[axis]} == set(axes)


def test_outside_the_nonzero_region_masked_channels_become_zero() -> None:
    channels = (Channel(name="T1", normalization=ZScoreNorm(masked=True)), Channel(name="T2", normalization=NoNorm()))
    spec = make_spec(patch=PATCH, network=UNET_3D.model_copy(update={"in_channels": 2}), channels=channels)
    transform, shape = Augment(spec, "nnunet"), initial_patch(spec, "nnunet")
    changed = 0
    for seed in range(10):
        sample = _sample(shape, channels=2, values=(-1, 0, 1), seed=seed)
        sample.data[1] += 9
        data, [target] = transform(sample, _rng(seed))
        assert set(target.unique().tolist()) <= {0, 1}  # -1 is background now
        changed += int((data[0] == 0).sum())
        assert (data[1] == 0).float().mean() < 0.2
    assert changed > 0


def test_a_flat_patch_is_rotated_within_its_slices() -> None:
    """A patch much longer than deep: what is in one slice stays in it."""
    spec = make_spec(patch=(4, 16, 16), network=UNET_3D)
    transform, shape = Augment(spec, "nnunet"), initial_patch(spec, "nnunet")
    assert shape[0] == 4
    for seed in range(20):
        labels = np.zeros(shape, np.int16)
        labels[1] = 1
        _, [target] = transform(Sample("a", labels[None].astype(np.float32), labels, None), _rng(seed))
        assert (target[[0, 2, 3]] == 0).all()
        assert (target[1] == 1).float().mean() > 0.9


# ------------------------------------------------------------------ the article's
def test_rotated_labels_are_labels() -> None:
    """SEEDS 2.12 b: {0, 13} became all of 0..13 by linear interpolation."""
    spec = make_spec(values=(0, 13), patch=(16, 16, 16), network=UNET_3D.model_copy(update={"out_channels": 2}))
    for sample, _, [target] in _often(spec, "article", values=(0, 13)):
        assert set(np.unique(sample.labels)) == {0, 13}
        assert set(target.unique().tolist()) == {0, 1}


def test_the_articles_image_and_labels_move_together() -> None:
    spec = make_spec(patch=(16, 16, 16), network=UNET_3D)
    for _, data, [target] in _often(spec, "article", count=20):
        nearest = (data[0] - 1).round()
        inside = data[0] > 0.99
        assert (nearest == target)[inside].float().mean() > 0.8  # linear against nearest: they differ at edges
        assert data.shape == (1, 16, 16, 16)


def test_turns_by_a_quarter_are_exact() -> None:
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 6, 6, 6)).astype(np.float32))
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 9, (1, 6, 6, 6)).astype(np.int16))
    for axis, plane in enumerate([(2, 3), (1, 3), (1, 2)]):
        for degrees, turns in ((0, 0), (90, 1), (-90, -1), (180, 2)):
            turned, same = article.rotate(image, labels, degrees, axis)
            found = [k for k in (turns, -turns) if torch.allclose(turned, torch.rot90(image, k, plane), atol=1e-5)]
            assert found, (axis, degrees)
            assert torch.equal(same, torch.rot90(labels, found[0], plane))


def test_what_is_rotated_in_is_no_label_and_no_intensity() -> None:
    image, labels = torch.ones(1, 8, 8, 8), torch.ones(1, 8, 8, 8, dtype=torch.int16)
    turned, same = article.rotate(image, labels, 45, 0)
    assert turned[0, 0, 0, 0] == 0
    assert same[0, 0, 0, 0] == -1
    assert turned[0, 4, 4, 4] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(16, 16, 16), (9, 20, 14), (1, 30, 30)])
def test_crops_are_boxes_of_about_the_volume(shape) -> None:
    rng, volumes = _rng(), []
    for _ in range(300):
        start, sides = article._box(shape, rng)
        assert all(s >= 0 and s + n <= m for s, n, m in zip(start, sides, shape, strict=True))
        volumes.append(np.prod(sides) / np.prod(shape))
    assert max(volumes) <= 1.0
    if shape == (16, 16, 16):
        assert min(volumes) > 0.7


def test_the_article_turns_no_slices() -> None:
    with pytest.raises(SpecError, match="augmentation: 'article' turns volumes and tiny sees slices"):
        Augment(make_spec(patch=(1, 8, 8), network=UNET_2D), "article")


# ------------------------------------------------------------------ grey
def test_some_samples_become_grey_and_the_others_stay_as_they_were() -> None:
    colours = tuple(Channel(name=name, normalization=NoNorm()) for name in ("red", "green", "blue"))
    spec = make_spec(patch=PATCH, channels=colours, network=UNET_3D.model_copy(update={"in_channels": 3}))
    never, half = Augment(spec, "nnunet"), Augment(spec, "nnunet", grey=0.5)
    sample = _sample(initial_patch(spec, "nnunet"), channels=3)

    def correlation(augment: Augment, seed: int) -> float:
        image = augment(sample, _rng(seed))[0].reshape(3, -1).numpy()
        return float(np.corrcoef(image)[np.triu_indices(3, 1)].min())

    # its channels differ by what nnU-Net does to each, no longer by what they show
    grey = [correlation(half, seed) > 0.5 for seed in range(40)]
    assert 10 < sum(grey) < 30
    assert all(correlation(never, seed) < 0.5 for seed in range(40))
    assert sample.data[1].std() > 0.5
    assert not np.array_equal(sample.data[0], sample.data[1])


def test_the_channel_that_grey_samples_show_may_be_chosen() -> None:
    colours = tuple(Channel(name=name, normalization=NoNorm()) for name in ("red", "green", "blue"))
    spec = make_spec(patch=PATCH, channels=colours, network=UNET_3D.model_copy(update={"in_channels": 3}))
    sample = _sample(initial_patch(spec, "nnunet"), channels=3)
    sample.data[[0, 2]] = 0
    image = Augment(spec, "nnunet", grey=1.0, grey_channel="green")(sample, _rng())[0]
    assert all(channel.std() > 0.3 for channel in image)
    with pytest.raises(SpecError, match="grey_channel: expected one of red, green, blue, got 'violet'"):
        Augment(spec, "nnunet", grey=0.1, grey_channel="violet")


@pytest.mark.parametrize(("channels", "kind"), [(1, "nnunet"), (3, "none")])
def test_grey_samples_need_colours_and_transforms(channels: int, kind: str) -> None:
    colours = tuple(Channel(name=str(n), normalization=NoNorm()) for n in range(channels))
    spec = make_spec(patch=PATCH, channels=colours, network=UNET_3D.model_copy(update={"in_channels": channels}))
    with pytest.raises(SpecError, match="grey: expected several channels and augmentation 'nnunet', got"):
        Augment(spec, kind, grey=0.1)


# ------------------------------------------------------------------ cascade
def test_labels_of_the_stage_before_become_channels() -> None:
    image, labels = torch.full((1, 2, 2, 2), 7.0), torch.tensor([[[0, 5], [9, -1]], [[5, 5], [0, 9]]], dtype=torch.int16)
    extended = append_labels(image, labels, (5, 9))
    assert extended.shape == (3, 2, 2, 2)
    assert torch.equal(extended[1], (labels == 5).float())
    assert torch.equal(extended[2], (labels == 9).float())


@pytest.mark.parametrize("kind", ["none", "nnunet", "article"])
def test_the_stage_before_moves_with_the_image(kind: str) -> None:
    previous = {"previous": PreviousStage(values=(1, 2)), "network": UNET_3D.model_copy(update={"in_channels": 3})}
    spec = make_spec(patch=(16, 16, 16), mirror_axes=(0, 1, 2), **previous)
    same = 0.0
    for _, data, [target] in _often(spec, kind, count=12, previous=True):
        assert data.shape == (3, 16, 16, 16)
        assert set(data[1:].unique().tolist()) <= {0.0, 1.0}
        assert (data[1:].sum(0) <= 1).all()
        same += float((data[1] == (target == 1)).float().mean())
    assert same / 12 > (0.999 if kind != "nnunet" else 0.8)  # nnU-Net disturbs them


def test_small_components_are_removed_and_large_ones_kept() -> None:
    """SEEDS 2.12 k: the two numbers were swapped, so a size limit of 0 removed nothing."""
    assert inspect.signature(remove_component).parameters["largest_share"].default == 0.15
    mask = torch.zeros(10, 10, 10)
    mask[:, :, :2] = 1  # 20 %
    mask[0, 0, 9] = mask[1, 1, 8] = 1  # one component by a corner
    mask[9, 9, 9] = 1
    gone = set()
    for seed in range(30):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left = mask.clone()
            remove_component(left)
        assert (left <= mask).all()  # nothing is put anywhere
        assert (left[:, :, :2] == 1).all()
        gone.add(int((mask - left).sum()))
    assert gone == {1, 2}
    only_large = torch.zeros(10, 10, 10)
    only_large[:2] = 1
    remove_component(only_large)
    assert only_large.sum() == 200


def test_disturbed_labels_stay_one_hot_and_follow_their_generator() -> None:
    labels = torch.from_numpy(_sample((24, 24, 24)).labels)
    start = append_labels(torch.full((1, 24, 24, 24), 3.0), labels, (1, 2))
    results, changed = [], 0
    for seed in (*range(12), 3):
        image = start.clone()
        with augment._drawing_from(_rng(seed)):
            disturb_labels(image, 2)
        assert torch.equal(image[0], start[0])
        assert (image[1:].sum(0) <= 1).all()
        changed += not torch.equal(image, start)
        results.append(image)
    assert torch.equal(results[3], results[-1])
    assert 3 <= changed <= 12


def test_a_head_may_name_its_values_in_any_order() -> None:
    spec = make_spec().model_copy(update={"head": Head(activation="softmax", values=(2, 0, 1))})
    [target] = make_targets(torch.tensor([[[0, 1, 2, -1]]], dtype=torch.int16), spec, [(1, 1, 1)])
    assert target.tolist() == [[[1, 2, 0, 1]]]


def test_the_articles_transforms_in_other_numbers() -> None:
    image, labels = torch.rand(1, 8, 8, 8), torch.randint(0, 3, (1, 8, 8, 8), dtype=torch.int16)
    same = article.augment(image, labels, (8, 8, 8), _rng(), Transforms(scale=None, degrees=0, flip=0))
    assert torch.equal(same[0], image)
    assert torch.equal(same[1], labels)
    rng = _rng()
    for _ in range(20):
        found = article.augment(image, labels, (8, 8, 8), rng, Transforms(scale=None, degrees=0, flip=1))[0]
        assert any(torch.equal(found, image.flip(axis)) for axis in (1, 2, 3))
    rng = _rng()
    for _ in range(50):
        _, sides = article._box((32, 32, 32), rng, Transforms(scale=(0.2, 0.3), ratio=(1, 1)))
        shorter, same_length, whole = sorted(sides)
        assert shorter == same_length
        assert whole == 32
        assert 0.17 < (shorter / 32) ** 3 < 0.33


def test_the_configurations_numbers_reach_the_transforms() -> None:
    spec = make_spec(patch=(8, 8, 8), network=UNET_3D)
    data = np.random.default_rng(0).normal(size=(spec.in_channels, 8, 8, 8)).astype(np.float32)
    sample = Sample("a", data, np.ones((8, 8, 8), np.int16), None)
    still = make_config("vnet", transforms=Transforms(scale=None, degrees=0, flip=0))
    np.testing.assert_array_equal(Augment(spec, still.augment)(sample, _rng())[0].numpy(), sample.data)
    moved = Augment(spec, make_config("vnet").augment)(sample, _rng())[0].numpy()
    assert not np.array_equal(moved, sample.data)
    assert make_config("nnunet").augment == "nnunet"
