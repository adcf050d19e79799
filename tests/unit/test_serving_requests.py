"""What a served model makes of a request, without a server: images, limits, options, answers, and engines opened once."""

from __future__ import annotations

import gzip
import re
import shutil
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from factories import CountingEngine, banded, make_bundle, make_spec, nearest, write_case

from segrt.arrays import Array
from segrt.bundle import Bundle
from segrt.engines import Engine
from segrt.errors import BackendError, InputError, SpecError
from segrt.io import read_volume
from segrt.io.peek import count_voxels
from segrt.memory import case_bytes
from segrt.predictor import Predictor
from segrt.protocol import Report, RequestOptions
from segrt.serving import windows
from segrt.serving.answers import answer
from segrt.serving.attention import Abandoned, Attention, outcome_of
from segrt.serving.fatal import check_fatal, fatal_in, image_in, mark_of, working_on
from segrt.serving.files import plain_name
from segrt.serving.limits import Limits, check_answer
from segrt.serving.predictors import Predictors
from segrt.serving.requests import read_request
from segrt.serving.windows import PatchCaller, Watched
from segrt.spec import Channel, NoNorm, PreviousStage, SpacingTarget
from segrt.volume import Grid

ROOMY = Limits(voxels=10**6, bytes=2**34)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def file_tensors(*paths: Path) -> dict[str, Array]:
    contents = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
    return {"FILE": np.concatenate(contents), "FILE_SIZES": np.array([len(part) for part in contents])}


@pytest.mark.parametrize(("name", "dtype"), [("IMAGE", np.float32), ("IMAGE_INT16", np.int16)])
def test_an_array_keeps_its_type_and_place_and_is_copied(bundle: Bundle, name: str, dtype: type) -> None:
    data = banded((4, 5, 6)).astype(dtype)[None]
    data.flags.writeable = False
    turned = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    tensors = {name: data, "SPACING": np.array([3.0, 2.0, 1.0]), "ORIGIN": np.array([7.0, 8.0, 9.0]), "DIRECTION": turned}
    asked = read_request(tensors, RequestOptions(), bundle, ROOMY)
    np.testing.assert_array_equal(asked.volume.data, data)
    assert asked.volume.data.dtype == dtype
    assert asked.volume.data.flags.writeable
    # the first column of the direction is the image's x axis
    assert asked.volume.grid == Grid((4, 5, 6), (3.0, 2.0, 1.0), (7.0, 8.0, 9.0), ((0.0, -1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)))
    assert asked.previous is None


def test_a_picture_s_array_has_a_picture_s_spacing(bundle: Bundle) -> None:
    asked = read_request({"IMAGE": np.ones((1, 1, 5, 6), np.float32)}, RequestOptions(), bundle, ROOMY)
    assert asked.volume.grid.spacing == (999.0, 1.0, 1.0)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_file_is_what_its_bytes_say(bundle: Bundle, tmp_path: Path, suffix: str) -> None:
    """The name is for sentences alone."""
    path = write_case(tmp_path / f"case{suffix}", banded((4, 5, 6)), (3.0, 2.0, 1.0), origin=(1.0, 2.0, 3.0))
    asked = read_request({"FILE": file_tensors(path)["FILE"]}, RequestOptions(name="/else/where.png"), bundle, ROOMY)
    expected = read_volume(path)
    np.testing.assert_array_equal(asked.volume.data, expected.data)
    assert asked.volume.grid == expected.grid
    assert asked.volume.name.startswith("where.")


def test_a_file_per_channel_is_joined(tmp_path: Path) -> None:
    channels = tuple(Channel(name=name, normalization=NoNorm()) for name in ("T1", "T2"))
    bundle = make_bundle(tmp_path / "bundle", make_spec(channels=channels))
    paths = [write_case(tmp_path / f"x_{n:04d}.nii.gz", banded((4, 5, 6), seed=n)) for n in range(2)]
    asked = read_request(file_tensors(*paths), RequestOptions(), bundle, ROOMY)
    np.testing.assert_array_equal(asked.volume.data, read_volume(paths).data)
    with pytest.raises(InputError, match=r"has 1 channel, model needs 2 \(T1, T2\)"):
        read_request(file_tensors(paths[0]), RequestOptions(), bundle, ROOMY)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("case_7.nii.gz", "case_7"),
        ("../../etc/passwd", "passwd"),
        (r"C:\scans\a b.mha", "a b"),
        ("..", "image"),
        ("", "image"),
        ("a\nb\0c", "a_b_c"),
        ("ü" * 255, "ü" * 60),
        (".nii.gz", "nii.gz"),
    ],
)
def test_a_name_is_never_a_path(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_what_a_header_announces_is_refused_before_it_is_read(bundle: Bundle, tmp_path: Path) -> None:
    """A million million voxels compress well enough for a header to be believed."""
    content = bytearray(write_case(tmp_path / "case.nii", banded((4, 5, 6))).read_bytes())
    struct.pack_into("<4h", content, 40, 3, 10_000, 10_000, 10_000)
    for file in (bytes(content), gzip.compress(content + bytes(2**24))):
        with pytest.raises(InputError, match="announces 10000 x 10000 x 10000"):
            read_request({"FILE": np.frombuffer(file, np.uint8)}, RequestOptions(), bundle, ROOMY)


def test_all_axes_and_components_of_a_file_count(tmp_path: Path) -> None:
    picture = write_case(tmp_path / "x.png", banded((1, 5, 6)).astype(np.uint8), dimensions=2)
    assert np.prod(count_voxels(picture)) == 30
    content = bytearray(write_case(tmp_path / "x.nii", banded((4, 5, 6))).read_bytes())
    struct.pack_into("<5h", content, 40, 4, 6, 5, 2, 2)
    (tmp_path / "x.nii").write_bytes(content)
    assert np.prod(count_voxels(tmp_path / "x.nii")) == 120
    assert np.prod(count_voxels(write_case(tmp_path / "x.nrrd", banded((4, 5, 6))))) == 120
    assert np.prod(count_voxels(write_case(tmp_path / "x.mha", banded((4, 5, 6))))) == 120


def test_an_image_that_would_grow_is_refused(tmp_path: Path) -> None:
    """A few voxels of a metre each are many millimetres."""
    bundle = make_bundle(tmp_path / "bundle", make_spec(target=SpacingTarget(spacing=(1.0, 1.0, 1.0))))
    image = {"IMAGE": np.ones((1, 8, 8, 8), np.float32)}
    read_request({**image, "SPACING": np.ones(3)}, RequestOptions(), bundle, ROOMY)
    with pytest.raises(InputError, match=r"needs .* GB while it is worked on, this server has 16.0; its spacing is"):
        read_request({**image, "SPACING": np.full(3, 1000.0)}, RequestOptions(), bundle, ROOMY)
    with pytest.raises(InputError, match=r"takes [0-9]+ windows"):
        read_request({**image, "SPACING": np.full(3, 40.0)}, RequestOptions(step=0.01), bundle, ROOMY)
    with pytest.raises(InputError, match="announces 1 x 8 x 8 x 8 voxels, this server takes at most 511"):
        read_request({**image, "SPACING": np.ones(3)}, RequestOptions(), bundle, Limits(511, 0))


def test_files_of_an_image_share_its_limit(tmp_path: Path) -> None:
    channels = tuple(Channel(name=name, normalization=NoNorm()) for name in ("T1", "T2"))
    bundle = make_bundle(tmp_path / "bundle", make_spec(channels=channels))
    paths = [write_case(tmp_path / f"x_{number:04d}.nii.gz", banded((4, 5, 6))) for number in range(2)]
    read_request(file_tensors(*paths), RequestOptions(), bundle, Limits(240, 0))
    with pytest.raises(
        InputError, match=r"image_0001\.nii\.gz announces 6 x 5 x 4 x 1 voxels beside 120 of other channels, this server takes at most 239"
    ):
        read_request(file_tensors(*paths), RequestOptions(), bundle, Limits(239, 0))


def test_limits_follow_the_machine_unless_they_are_given() -> None:
    assert Limits.here(1000).voxels == 1000
    alone, shared = Limits.here(), Limits.here(sharing=8)
    assert alone.voxels > 10**6
    assert shared.bytes < alone.bytes / 4
    assert shared.left() > shared.bytes


def test_images_that_are_worked_on_at_once_share_the_memory(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", make_spec(target=SpacingTarget(spacing=(1.0, 1.0, 1.0))))
    image = {"IMAGE": np.ones((1, 8, 8, 8), np.float32), "SPACING": np.full(3, 20.0)}
    needed = case_bytes(bundle.spec, Grid((8, 8, 8), (20.0, 20.0, 20.0)), 4)
    with pytest.raises(InputError, match=r"this server has [0-9.]+ for each of 4 images at once; its spacing is"):
        read_request(image, RequestOptions(), bundle, Limits(10**6, needed - 1, sharing=4))
    # that is no fault of the image
    with pytest.raises(BackendError, match=r"[0-9.]+ are free now: other images or programs have the rest; try again later"):
        read_request(image, RequestOptions(), bundle, Limits(10**6, needed, left=lambda: needed - 1))
    read_request(image, RequestOptions(), bundle, Limits(10**6, needed, left=lambda: needed))


def test_an_answer_that_shared_memory_has_no_room_for_is_refused_before_the_work(bundle: Bundle, tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    # room that an earlier answer took is used again, so one that takes it all may find it
    check_answer("image", bundle, Grid((total // 1000, 1000, 1)), probabilities=False, shared=tmp_path)
    large = Grid((total // 1000 + 1, 1000, 1))
    with pytest.raises(BackendError, match=rf"needs [0-9]+ MB of the server's shared memory, {tmp_path} has [0-9]+; give it more"):
        check_answer("image", bundle, large, probabilities=False, shared=tmp_path)
    check_answer("image", bundle, large, probabilities=False, shared=Path("/nowhere"))


def test_an_image_is_known_by_a_mark_that_its_process_bears_while_it_is_worked_on() -> None:
    large = np.random.default_rng(0).normal(size=(1, 40, 50, 60)).astype(np.float32)
    image, options = {"IMAGE": large, "SPACING": np.ones(3)}, RequestOptions(name="a")
    mark = mark_of(image, options)
    # a repeat has less time, and may have another name
    assert mark_of({**image}, options.model_copy(update={"timeout_s": 3.0, "name": "b"})) == mark
    others = ({**image, "SPACING": np.full(3, 2.0)}, {**image, "IMAGE": large + 1}, {"IMAGE": large[:, :39], "SPACING": np.ones(3)})
    assert len({mark, mark_of(image, RequestOptions(name="a", step=0.9)), *(mark_of(other, options) for other in others)}) == 5
    name = Path("/proc/self/comm")
    before = name.read_text()
    with working_on(mark):
        assert image_in(name.read_text().strip()) == mark
    assert name.read_text() == before
    assert image_in(before.strip()) is None


def test_an_image_that_is_fatal_is_refused() -> None:
    fatal = fatal_in({"parameters": {"FATAL": {"string_value": "abc,def"}}})
    check_fatal("ghi", fatal, "image")
    with pytest.raises(InputError, match="process died twice while it worked on image"):
        check_fatal("def", fatal, "image")
    assert fatal_in({}) == {""}


class ServerModule(ModuleType):
    """What the server gives its models to call others with, where every network fails in one way."""

    class TritonError:
        INTERNAL, INVALID_ARG, UNAVAILABLE = range(3)

        def __init__(self, code: int, text: str) -> None:
            self.code, self.message = (lambda: code), (lambda: text)

    class Tensor:
        @staticmethod
        def from_dlpack(name: str, capsule: object) -> tuple[str, object]:
            return name, capsule

    def __init__(self, code: int, text: str) -> None:
        super().__init__("triton_python_backend_utils")
        self.failure, self.asked = self.TritonError(code, text), 0

    def InferenceRequest(self, **_: object) -> ServerModule:  # noqa: N802 - the server's name
        return self

    def exec(self) -> ServerModule:
        self.asked += 1
        return self

    def has_error(self) -> bool:
        return True

    def error(self) -> ServerModule.TritonError:
        return self.failure


@pytest.mark.parametrize(
    ("code", "text", "tries"),
    [
        (ServerModule.TritonError.INTERNAL, "Stub process 'organ_patch_0_0' is not healthy.", 4),
        (ServerModule.TritonError.UNAVAILABLE, "busy", 4),
        (ServerModule.TritonError.INVALID_ARG, "patches are (1, 8, 8, 9)", 1),
        (ServerModule.TritonError.INTERNAL, "the server failed on this image (KeyError)", 1),
    ],
)
def test_windows_are_sent_again_only_where_that_may_help(monkeypatch: pytest.MonkeyPatch, code: int, text: str, tries: int) -> None:
    server = ServerModule(code, text)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    monkeypatch.setattr(windows, "_WAITS_S", (0.0, 0.0, 0.0))
    patches, gone = np.zeros((1, 1, 8, 8, 8), np.float32), list[float]()
    with pytest.raises(BackendError, match=re.escape(text)):
        PatchCaller("organ_patch", 1, batch=1, told=gone.append, check=lambda: None)(patches)
    assert server.asked == tries
    # nobody waits any more by the second try
    attention = Attention(lambda: server.asked == tries + 1, clock=iter(range(100)).__next__)
    with pytest.raises((Abandoned, BackendError)):
        PatchCaller("organ_patch", 1, batch=1, told=gone.append, check=attention.check)(patches)
    assert server.asked == tries + 1


def test_a_request_nobody_waits_for_is_abandoned() -> None:
    now = [0.0]
    attention = Attention(lambda: False, 5.0, clock=lambda: now[0])
    attention.check()
    now[0] = 5.1
    with pytest.raises(Abandoned, match="gave up after 5 s") as late:
        attention.check()
    with pytest.raises(Abandoned, match="was cancelled") as cancelled:
        Attention(lambda: True).check()
    Attention(lambda: False).check()
    assert outcome_of(late.value)[:2] == ("late", "UNAVAILABLE")
    assert outcome_of(cancelled.value)[:2] == ("cancelled", "CANCELLED")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (InputError("a"), ("refused", "INVALID_ARG", "a")),
        (SpecError("a"), ("refused", "INVALID_ARG", "a")),
        (BackendError("a"), ("failed", "UNAVAILABLE", "a")),
    ],
)
def test_a_sentence_of_ours_reaches_the_client(error: Exception, outcome: tuple[str, str, str]) -> None:
    assert outcome_of(error) == outcome


def test_what_went_wrong_inside_stays_inside() -> None:
    assert outcome_of(KeyError("secret"))[1:] == ("INTERNAL", "the server failed on this image (KeyError); its log says more")
    assert outcome_of(MemoryError())[:2] == ("failed", "UNAVAILABLE")


class Opener:
    """Opens function engines and remembers for what."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.engines: list[CountingEngine] = []

    def __call__(self, bundle: Bundle, member: str) -> Engine:
        self.asked.append((bundle.path.name, member))
        self.engines.append(CountingEngine(nearest(range(bundle.spec.classes))))
        return self.engines[-1]


def test_engines_are_opened_once_whatever_is_asked_for(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", make_spec(members=("0", "1"), mirror_axes=(1,)))
    opener, image = Opener(), (banded((9, 10, 11)), (1.0, 1.0, 1.0))
    predictors = Predictors(bundle, opener)
    for options in ({}, {"tta": False}, {"step": 0.9}, {"postprocess": False}):
        found = predictors.choose(RequestOptions(**options))(image, probabilities=True)
        expected = Predictor(bundle, device="cpu", **options)(image, probabilities=True)
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    assert predictors.choose(RequestOptions(name="other", timeout_s=3)) is predictors.choose(RequestOptions())
    for number in range(100):
        predictors.choose(RequestOptions(step=0.5 + number / 1000))
    assert opener.asked == [("bundle", "0"), ("bundle", "1")]
    predictors.close()
    assert [engine.closed for engine in opener.engines] == [1, 1]


def test_a_first_stage_s_engines_are_opened_once_too(tmp_path: Path) -> None:
    first = make_bundle(tmp_path / "first")
    spec = make_spec(previous=PreviousStage(values=(1, 2)))
    bundle, opener = make_bundle(tmp_path / "second", spec, previous=first), Opener()
    predictors = Predictors(bundle, opener)
    for options in ({}, {"tta": False}, {"step": 0.9}):
        predictors.choose(RequestOptions(**options))((banded((9, 10, 11)), (1.0, 1.0, 1.0)))
    assert opener.asked == [("second", "0"), ("previous", "0")]


def test_a_partner_s_engines_are_opened_once_too(tmp_path: Path) -> None:
    bundle, opener = make_bundle(tmp_path / "pair", partner=make_bundle(tmp_path / "other")), Opener()
    predictors, image = Predictors(bundle, opener), (banded((9, 10, 11)), (1.0, 1.0, 1.0))
    for options in ({}, {"tta": False}):
        found = predictors.choose(RequestOptions(**options))(image)
        np.testing.assert_array_equal(found.labels, Predictor(bundle, device="cpu", **options)(image).labels)
    assert opener.asked == [("pair", "0"), ("partner", "0")]


def test_a_watched_engine_stops_before_it_runs() -> None:
    engine, gone, now = CountingEngine(nearest(range(3)), batch=2), [False], [0.0]
    attention = Attention(lambda: gone[0], clock=lambda: now[0])
    watched = Watched(engine, attention.check)
    patches = np.ones((2, 1, 8, 8, 8), np.float32)
    np.testing.assert_array_equal(watched(patches), engine(patches))
    assert (watched.batch, watched.device, watched.name) == (2, "cpu", "function")
    gone[0], now[0] = True, 1.0
    with pytest.raises(Abandoned):
        watched(patches)
    assert engine.calls == [2, 2]


def test_only_what_is_wanted_is_answered(bundle: Bundle) -> None:
    segmentation = Predictor(bundle, device="cpu")((banded((9, 10, 11)), (3.0, 2.0, 1.0)), probabilities=True)
    everything = ("LABELS", "PROBABILITIES", "LABEL_FILE", "REPORT")
    how: dict[str, Any] = {"bundle_sha": "abc", "version": "2"}
    assert set(answer(segmentation, RequestOptions(), bundle.spec, everything, **how)) == {"LABELS", "PROBABILITIES", "REPORT"}
    assert set(answer(segmentation, RequestOptions(format=".nii"), bundle.spec, ["LABEL_FILE"], **how)) == {"LABEL_FILE"}
    report = Report.model_validate_json(answer(segmentation, RequestOptions(), bundle.spec, everything, **how)["REPORT"].tobytes())
    assert (report.bundle_sha, report.version, report.spacing) == ("abc", "2", (3.0, 2.0, 1.0))
    assert report.voxels == segmentation.voxels()
