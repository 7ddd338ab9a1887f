"""Folders of images: what is read, what is refused, and what is remembered."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rapa_dist.data import cache, decode, folder, load_dataset, scan
from rapa_dist.data.look import look
from rapa_dist.errors import DataError
from rapa_dist.memory import Memory

CLASSES = ("cat", "dog", "newt")
REAL = Path("~/data").expanduser()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's own data and caches out of sight."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAPA_DIST_DATA", raising=False)
    return tmp_path / "home"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of lossless images, four to train on and two to test on each."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 4), ("test", 2)):
        for name in CLASSES:
            place = tmp_path / "images" / part / name
            place.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the images of each time that images are decoded."""
    counts: list[int] = []

    def counting(paths: list[Path], place: Path, size: int | None) -> tuple[np.ndarray, str]:
        counts.append(len(paths))
        return decode.decode_all(paths, place, size)

    monkeypatch.setattr(folder, "decode_all", counting)
    return counts


def _load(place: Path, **options: int):
    return load_dataset(f"images:{place}", **options)


def test_images_come_as_they_are_by_sorted_class_and_name(images: Path) -> None:
    data = _load(images)
    assert data.name == f"images:{images}"
    assert data.classes == CLASSES
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    paths = [images / "train" / name / f"{i}.png" for name in CLASSES for i in range(4)]
    np.testing.assert_array_equal(data.train.images, np.stack([np.asarray(Image.open(path)) for path in paths]))


def test_classes_may_have_folders_of_their_own_and_hidden_ones_are_none(images: Path) -> None:
    (images / "train" / "cat" / "more").mkdir()
    (images / "train" / "cat" / "0.png").rename(images / "train" / "cat" / "more" / "0.png")
    (images / "train" / ".thumbnails").mkdir()
    (images / "train" / "notes.txt").write_text("no image")
    (images / "train" / "cat" / "notes.txt").write_text("no image")
    data = _load(images)
    assert data.classes == CLASSES
    assert len(data.train) == 12


def test_the_name_is_absolute(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images.parent)
    monkeypatch.setenv("HOME", str(images.parent))
    assert load_dataset("images:images/").name == load_dataset("images:~/images").name == f"images:{images}"


# Sizes and modes


def test_images_are_resized_and_cropped_where_a_size_is_given_and_it_is_said_once(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = np.zeros((64, 128, 3), dtype=np.uint8)
    wide[:, 32:96] = (200, 100, 50)  # the middle square
    Image.fromarray(wide).save(images / "train" / "cat" / "0.png")
    Image.fromarray(wide[::8, ::8]).save(images / "train" / "dog" / "0.png")
    for _ in range(2):  # decoded, then cached
        data = _load(images, image_size=32)
        # Apart from the very edges, which see their neighbours as they are scaled.
        assert np.all(data.train.images[0][:, 1:-1] == (200, 100, 50))
        assert data.train.images[4][16, 16].tolist() == [200, 100, 50]
        said = capsys.readouterr().err
        assert said.count("2 of 18 images") == 1
        assert "train/cat/0.png, is 128 × 64" in said


def test_images_of_several_sizes_need_a_size(images: Path) -> None:
    Image.new("RGB", (20, 10)).save(images / "train" / "dog" / "1.png")
    wanted = r"several sizes \(h × w\): 17 of 32 × 32, 1 of 10 × 20; train/dog/1.png is the first .*--image-size N"
    with pytest.raises(DataError, match=wanted):
        _load(images)
    with pytest.raises(DataError, match=wanted):
        look(f"images:{images}")
    assert look(f"images:{images}", image_size=8).image == (3, 8, 8)
    assert _load(images, image_size=8).image == (3, 8, 8)


def test_images_are_taken_as_they_are_and_each_size_has_a_cache(images: Path, decodings: list[int]) -> None:
    for path in images.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((48, 40)).save(path)
    assert look(f"images:{images}").image == (3, 40, 48)
    for _ in range(2):
        assert _load(images).train.images.shape[1:] == (40, 48, 3)
        assert _load(images, image_size=16).train.images.shape[1:] == (16, 16, 3)
    assert decodings == [18, 18]
    assert look(f"images:{images}").image == (3, 40, 48)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("P", 3)])
def test_grey_images_have_one_channel_where_there_are_no_others(images: Path, mode: str, channels: int) -> None:
    for path in images.rglob("*.png"):
        with Image.open(path) as image:
            image.convert("L").convert(mode).save(path)
    assert look(f"images:{images}").image == (channels, 32, 32)
    data = _load(images)
    assert data.image == (channels, 32, 32)
    assert data.mean.shape == (channels,)
    Image.new("RGB", (32, 32), "red").save(images / "test" / "dog" / "1.png")
    assert _load(images).image == look(f"images:{images}").image == (3, 32, 32)


def test_more_images_than_memory_has_room_for_are_refused_before(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "memory", lambda: Memory(10**6, 50_000, False))
    for read in (_load, lambda place: look(f"images:{place}")):
        with pytest.raises(DataError, match=r"18 images of 32 × 32 take .* MB of memory, .*--image-size"):
            read(images)


def test_a_set_of_fixed_size_is_resized_too() -> None:
    plain, data = (load_dataset("builtin", limit_train=3, limit_test=2, image_size=size) for size in (None, 16))
    assert data.image == (3, 16, 16)
    np.testing.assert_array_equal(data.train.labels, plain.train.labels)
    means = plain.train.images.reshape(3, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    assert np.abs(data.train.images - means).mean() < 8, "a triangle filter, which is nearly the mean of 2 × 2"


def test_nothing_is_said_of_images_of_the_right_size(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _load(images)
    assert capsys.readouterr().err == ""


def test_a_large_jpeg_is_scaled_about_as_if_it_were_decoded_in_full(tmp_path: Path) -> None:
    line = np.linspace(0, 255, 1024)
    large = np.stack(np.broadcast_arrays(line[:, None], line[None], 128), axis=-1).astype(np.uint8)
    Image.fromarray(large).save(tmp_path / "large.jpg", quality=95)
    picture = decode.decode(tmp_path / "large.jpg", 32)
    assert (picture.width, picture.height) == (1024, 1024)
    expected = large.reshape(32, 32, 32, 32, 3).mean(axis=(1, 3))
    assert np.abs(picture.pixels - expected).max() < 6


# What is refused


def test_missing_folders(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*/nowhere; images:FOLDER needs FOLDER/train/<class>/"):
        _load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="there is no folder"):
        _load(images / "train" / "cat" / "0.png")
    shutil.rmtree(images / "test")
    with pytest.raises(DataError, match=r"images has no folder 'test'; images:FOLDER needs"):
        _load(images)
    (images / "train").rename(images / "test")
    with pytest.raises(DataError, match=r"images has no folder 'train'"):
        _load(images)


def test_no_classes(images: Path) -> None:
    shutil.rmtree(images / "train")
    (images / "train").mkdir()
    (images / "train" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"images/train has no class folders"):
        _load(images)


def test_train_and_test_with_different_classes(images: Path) -> None:
    (images / "train" / "newt").rename(images / "train" / "owl")
    (images / "train" / "ant").mkdir()
    with pytest.raises(DataError, match=r"different classes \(only in train: ant, owl; only in test: newt\)"):
        _load(images)
    shutil.rmtree(images / "test" / "newt")
    with pytest.raises(DataError, match=r"different classes \(only in train: ant, owl\)"):
        _load(images)


def test_long_differences_are_shortened(images: Path) -> None:
    for i in range(20):
        (images / "test" / f"z{i:02}").mkdir()
    with pytest.raises(DataError, match=r"only in test: z00, .* z07 and 12 more\)"):
        _load(images)


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_class_folder_is_named(images: Path, part: str, decodings: list[int]) -> None:
    for path in (images / part / "dog").iterdir():
        path.unlink()
    (images / part / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=rf"no images in .*/images/{part}/dog; .* ending in \.jpg"):
        _load(images)
    assert decodings == []


def _no_image(path: Path) -> None:
    path.write_text("no image")


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-900])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


def _damaged_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [_no_image, _cut_short, _empty, _dangling, _damaged_header])
def test_an_undecodable_image_is_named_and_nothing_cached(images: Path, harm: Callable[[Path], None]) -> None:
    harm(images / "test" / "dog" / "1.png")
    for _ in range(2):
        with pytest.raises(DataError, match=r"can't be decoded: .*/images/test/dog/1\.png \(.+\)\. Replace or delete"):
            _load(images)
    assert not list(images.rglob("*.npz"))


def test_a_jpeg_cut_short_is_named(images: Path) -> None:
    path = images / "train" / "newt" / "photo.JPEG"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, "jpeg")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"newt/photo\.JPEG \(.*truncated"):
        _load(images)


def test_many_undecodable_images_are_counted(images: Path) -> None:
    for path in (images / "train").rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(DataError, match=r"cat/0\.png \(not an image\); .*dog/0\.png .*; and 7 more\. Replace"):
        _load(images)


def test_a_folder_that_may_not_be_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(part: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(part))

    monkeypatch.setattr(scan, "class_folders", refuse)
    with pytest.raises(DataError, match=r"images can't be read: .*Permission denied"):
        _load(images)


# The cache


def test_decoded_once(images: Path, decodings: list[int]) -> None:
    first = _load(images)
    second = _load(images)
    assert decodings == [18]
    assert first.fingerprint == second.fingerprint
    assert second.classes == CLASSES
    assert [path.name for path in (images / cache.BESIDE).iterdir()] == ["images.npz"]


def _add(images: Path) -> None:
    shutil.copy(images / "train" / "cat" / "0.png", images / "train" / "cat" / "9.png")


def _remove(images: Path) -> None:
    (images / "train" / "cat" / "0.png").unlink()


def _rename(images: Path) -> None:
    (images / "train" / "cat" / "0.png").rename(images / "train" / "cat" / "9.png")


def _exchange(images: Path) -> None:
    """Another image of the same name; its time differs."""
    status = (images / "test" / "cat" / "0.png").stat()
    Image.new("RGB", (32, 32)).save(images / "test" / "cat" / "0.png")
    os.utime(images / "test" / "cat" / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def _rename_class(images: Path) -> None:
    for part in ("train", "test"):
        (images / part / "newt").rename(images / part / "owl")


@pytest.mark.parametrize("change", [_add, _remove, _rename, _exchange, _rename_class])
def test_a_change_is_seen(images: Path, decodings: list[int], change: Callable[[Path], None]) -> None:
    before = _load(images)
    change(images)
    after = _load(images)
    assert len(decodings) == 2
    assert (before.fingerprint, before.classes) != (after.fingerprint, after.classes)
    shutil.rmtree(images / cache.BESIDE)
    assert _load(images).fingerprint == after.fingerprint


def test_a_class_that_becomes_empty_is_seen(images: Path) -> None:
    _load(images)
    for part in ("train", "test"):
        (images / part / "owl").mkdir()
    with pytest.raises(DataError, match=r"no images in .*/train/owl"):
        _load(images)


def _nothing_left(data: bytes) -> bytes:
    return data[:0]


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _one_pixel(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _something_else(data: bytes) -> bytes:
    return b"something else entirely" * (len(data) // 20)


@pytest.mark.parametrize("damage", [_nothing_left, _half, _one_pixel, _something_else])
def test_a_damaged_cache_is_built_anew(
    images: Path, decodings: list[int], capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
) -> None:
    whole = _load(images)
    path = images / cache.BESIDE / "images.npz"
    path.write_bytes(damage(path.read_bytes()))
    assert _load(images).fingerprint == whole.fingerprint
    assert decodings == [18, 18]
    assert "images.npz is damaged" in capsys.readouterr().err
    _load(images)
    assert decodings == [18, 18]
    assert capsys.readouterr().err == ""


def test_a_cache_is_never_unpickled(images: Path, decodings: list[int]) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(images / "harm"),)

    _load(images)
    path = images / cache.BESIDE / "images.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["classes"] = np.array([Harmful()], dtype=object)
    np.savez(path, **arrays)
    _load(images)
    assert decodings == [18, 18]
    assert not (images / "harm").exists()


def test_where_the_data_cannot_be_written_to_the_cache_is_at_home(
    images: Path, home: Path, decodings: list[int]
) -> None:
    (images / cache.BESIDE).write_text("in the way, for root too")
    _load(images)
    _load(images)
    assert decodings == [18]
    assert len(list((home / ".cache" / "rapa-dist").glob("images-*.npz"))) == 1


def test_without_any_place_for_a_cache_it_is_said_and_works(
    images: Path, home: Path, decodings: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    (images / cache.BESIDE).write_text("in the way")
    home.write_text("in the way")
    assert len(_load(images).train) == 12
    assert "can't be cached and will be decoded again" in capsys.readouterr().err
    _load(images)
    assert decodings == [18, 18]


def test_a_failed_write_leaves_no_file(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "savez", full)
    _load(images)
    assert list((images / cache.BESIDE).iterdir()) == []


def test_an_interrupt_ends_decoding_soon_and_leaves_no_file(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, size: int | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _load(images)
    assert not (images / cache.BESIDE).exists()


@pytest.mark.skipif(not folder.is_image_folder(REAL), reason="the real CIFAR-10 images are not in ~/data")
def test_real_images() -> None:
    data = _load(REAL, limit_train=1000, limit_test=500)
    assert len(data.classes) == 10
    assert np.bincount(data.train.labels).min() > 70
    np.testing.assert_allclose(data.mean, [0.491, 0.482, 0.447], atol=0.02)
