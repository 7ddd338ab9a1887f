"""Folders of images: what their scan passes over and says, classes that are none or the same, names of any bytes."""

import errno
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hand_made import png

from rapa_dist.cli import main
from rapa_dist.data import find_datasets, load_dataset
from rapa_dist.data.look import look
from rapa_dist.data.scan import SUFFIXES, PassedOver, scan
from rapa_dist.data.vision import torchvision
from rapa_dist.doctor.data import check_datasets
from rapa_dist.errors import DataError, UsageError
from rapa_dist.names import printable

BYTES = os.fsdecode(b"caf\xe9")  # Latin-1
SMALL = ["--channels", "2,2", "--tiles", "2,1", "--epochs", "1", "--batch-size", "2", "--fabric", "serial"]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAPA_DIST_DATA", raising=False)


def invoke(arguments: list[str]) -> Result:
    return CliRunner().invoke(main, arguments)


def fill(path: Path, value: int = 0) -> None:
    """Write a PNG of one colour, and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(np.full((32, 32, 3), value), 8, 2))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of two images each, all different."""
    for i, part in enumerate(("train", "test")):
        for j, name in enumerate(("cat", "dog")):
            for k in range(2):
                fill(tmp_path / "images" / part / name / f"{k}.png", 100 * i + 10 * j + k)
    return tmp_path / "images"


def values(place: Path) -> list[int]:
    """Return the colours of the images to train on, in their order."""
    return load_dataset(f"images:{place}").train.images[:, 0, 0, 0].tolist()


# --- what is passed over


def _other_endings(train: Path) -> None:
    for i in range(3):
        (train / "cat" / f"IMG_{i}.HEIC").touch()
    (train / "dog" / "notes.txt").touch()
    (train / "dog" / "README").touch()


def _hidden_files(train: Path) -> None:
    (train / "cat" / "._0.png").write_bytes(b"\0\5\x16\7")
    (train / ".DS_Store").touch()


def _hidden_folders(train: Path) -> None:
    for name in (".thumbnails", "@eaDir", "cat/.ipynb_checkpoints", "cat/@eaDir", "dog/__MACOSX"):
        fill(train / name / "0.png", 77)


def _beside(train: Path) -> None:
    fill(train / "0.png", 77)
    (train / "labels.csv").touch()


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (
            _other_endings,
            "3 .heic, 1 .txt, 1 without an ending (the first, train/cat/IMG_0.HEIC), as images end in "
            ".jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp",
        ),
        (_hidden_files, "2 hidden files (the first, train/.DS_Store)"),
        (_hidden_folders, "5 hidden folders (the first, train/.thumbnails)"),
        (_beside, "2 files beside the class folders (the first, train/0.png)"),
    ],
)
def test_what_is_passed_over_is_said_with_a_count_and_the_first(
    images: Path, capsys: pytest.CaptureFixture[str], add: Callable[[Path], None], said: str
) -> None:
    before = load_dataset(f"images:{images}")
    assert capsys.readouterr().err == ""
    add(images / "train")
    for _ in range(2):
        after = load_dataset(f"images:{images}")
        assert capsys.readouterr().err == f"passed over in {images}: {said}\n"
    assert (after.classes, after.fingerprint) == (before.classes, before.fingerprint)
    look(f"images:{images}")
    assert said in capsys.readouterr().err


def test_the_order_is_that_of_torchvision(images: Path) -> None:
    for name in ("a/x/0.PNG", "a-b/0.jpg", "a/0.png", "B/1.tiff", "10.png", "9.Jpeg", "Z.webp", "0.gif"):
        fill(images / "train" / "cat" / name)
    theirs = torchvision().datasets.ImageFolder(str(images / "train"))
    assert torchvision().datasets.folder.IMG_EXTENSIONS == SUFFIXES
    found = scan(images, "train", PassedOver())
    ours = [str(images / file) for files in found.images.values() for file in files]
    assert ours == [path for path, _ in theirs.imgs]
    assert list(found.images) == theirs.classes


def test_a_link_to_a_folder_above_is_refused_and_others_are_followed(images: Path, tmp_path: Path) -> None:
    shutil.move(images / "train" / "cat", tmp_path / "cat")
    (images / "train" / "cat").symlink_to(tmp_path / "cat")
    fill(tmp_path / "more" / "9.png", 55)
    (tmp_path / "cat" / "more").symlink_to(tmp_path / "more")
    assert values(images) == [0, 1, 55, 10, 11]
    (tmp_path / "more" / "loop").symlink_to(tmp_path / "cat")
    with pytest.raises(DataError, match=r"train/cat/more/loop is a link to a folder that it lies in\. Remove the link"):
        load_dataset(f"images:{images}")
    (tmp_path / "more" / "loop").unlink()
    (tmp_path / "more" / "loop").symlink_to("loop")
    with pytest.raises(DataError, match=f"can't be read: .*{os.strerror(errno.ELOOP)}"):
        load_dataset(f"images:{images}")


# --- classes


def test_a_single_class_is_refused(images: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(images / part / "dog")
        fill(images / part / ".dog" / "0.png")
    for command in (load_dataset, look):
        with pytest.raises(DataError, match=r"has a single class, cat; a network needs two or more to tell apart"):
            command(f"images:{images}")


def test_an_empty_class_says_what_lies_there(images: Path) -> None:
    for path in (images / "test" / "dog").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"no images in .*/test/dog; .* needs .*\.webp; other files there: 2 \.heic"):
        load_dataset(f"images:{images}")


FORMS = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]


@pytest.mark.parametrize("forms", [FORMS, FORMS[::-1]])
def test_unicode_forms_of_a_class_are_one_name(images: Path, forms: list[str]) -> None:
    for part, form in zip(("train", "test"), forms, strict=True):
        (images / part / "cat").rename(images / part / form)
        (images / part / "dog").rename(images / part / "f")  # é is behind f by its sign, and before it by its letter
    data = load_dataset(f"images:{images}")
    assert data.classes == ("f", FORMS[0])
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 1, 1]
    assert values(images) == [10, 11, 0, 1]


def test_unicode_forms_in_one_part_are_one_class_and_said(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "test"):
        (images / part / "cat").rename(images / part / FORMS[0])
    fill(images / "train" / FORMS[1] / "7.png", 7)
    data = load_dataset(f"images:{images}")
    assert data.classes == ("dog", FORMS[0])
    assert values(images) == [10, 11, 7, 0, 1]
    said = capsys.readouterr().err
    assert "names differ in their Unicode form alone are one class" in said
    assert r"'train/e\u0301' and 'train/\xe9'" in said


def test_files_whose_names_have_another_form_are_the_same_images(images: Path) -> None:
    for form in FORMS:
        fill(images.parent / form / "train" / "cat" / f"{form}.png", 50)
        fill(images.parent / form / "train" / "cat" / "f.png", 51)
        fill(images.parent / form / "train" / "dog" / "0.png")
        shutil.copytree(images / "test", images.parent / form / "test")
    found = [load_dataset(f"images:{images.parent / form}").fingerprint for form in FORMS]
    assert found[0] == found[1]


def test_classes_that_differ_in_case_alone_are_named(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "train" / "cat").rename(images / "train" / "Cat")
    with pytest.raises(DataError, match=r"only in train: Cat; only in test: cat\).*upper and lower case alone: rename"):
        load_dataset(f"images:{images}")
    fill(images / "train" / "cat" / "0.png")
    fill(images / "test" / "Cat" / "0.png")
    assert load_dataset(f"images:{images}").classes == ("Cat", "cat", "dog")
    assert "differ in upper and lower case alone: Cat and cat" in capsys.readouterr().err


def test_the_fingerprint_knows_no_place(images: Path, tmp_path: Path) -> None:
    first = load_dataset(f"images:{images}").fingerprint
    for place in (tmp_path / "zzz" / "é" / "a b", tmp_path / ".hidden" / "0"):
        shutil.copytree(images, place, ignore=shutil.ignore_patterns(".rapa*"))
        assert load_dataset(f"images:{place}").fingerprint == first
    (tmp_path / "link").symlink_to(images)
    assert load_dataset(f"images:{tmp_path / 'link'}").fingerprint == first


# --- names


def test_names_are_printable() -> None:
    assert printable(Path(f"/a b/é/猫/{BYTES}")) == r"/a b/é/猫/caf\xe9"
    assert printable("\x1b[2J\n\u202e\ud800") == r"\x1b[2J\n\u202e\ud800"


def test_an_image_of_any_name_is_read_and_one_that_is_damaged_is_named(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = images / "train" / "cat" / f"{BYTES}\x1b[2J.png"
    (images / "train" / "cat" / "0.png").rename(odd)
    (images / "train" / "cat" / f"{BYTES}.txt").touch()
    first = load_dataset(f"images:{images}")
    assert sorted(first.train.images[:, 0, 0, 0].tolist()) == [0, 1, 10, 11]
    assert r"train/cat/caf\xe9.txt" in capsys.readouterr().err
    assert load_dataset(f"images:{images}").fingerprint == first.fingerprint  # out of the cache
    odd.write_bytes(b"")
    with pytest.raises(DataError, match=r"cat/caf\\xe9\\x1b\[2J\.png \(it is empty\)"):
        load_dataset(f"images:{images}")


def test_a_class_whose_name_can_not_be_stored_is_refused(images: Path) -> None:
    for part in ("train", "test"):
        (images / part / "cat").rename(images / part / BYTES)
    for command in (load_dataset, look):
        with pytest.raises(DataError, match=r"class folder .*/train/caf\\xe9 is not named in UTF-8.*Rename it"):
            command(f"images:{images}")


def test_a_folder_of_images_whose_name_can_not_be_stored_is_refused_before_anything_is_made(
    images: Path, tmp_path: Path
) -> None:
    odd = tmp_path / BYTES
    images.rename(odd)
    with pytest.raises(UsageError, match="is not named in UTF-8"):
        load_dataset(f"images:{odd}")
    run = tmp_path / "run"
    for options in ([], ["--json"], ["--dry-run"]):
        done = invoke(["train", "--dataset", f"images:{odd}", "--run-dir", str(run), *SMALL, *options])
        assert done.exit_code == 2, done.output
        assert r"/caf\xe9 is not named in UTF-8" in done.stderr
        assert not run.exists()
    (tmp_path / "link").symlink_to(odd)
    done = invoke(["train", "--dataset", f"images:{tmp_path / 'link'}", "--run-dir", str(run), *SMALL])
    assert done.exit_code == 0, done.output


def test_data_and_a_home_in_folders_of_any_name_do_no_harm(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recorded of them gets into files, and back."""
    odd = tmp_path / BYTES
    monkeypatch.setenv("HOME", str(odd))
    shutil.copytree(images, odd / "data")
    assert f"images:{odd}/data" in [found.name for found in find_datasets()]
    run = str(tmp_path / "run")
    start = ["train", "--dataset", "builtin", "--limit-train", "8", "--limit-test", "4", "--data-dir", str(odd), *SMALL]
    page = tmp_path / "page.html"
    for command in (
        [*start, "--run-dir", run],
        ["train", "--resume", run, "--epochs", "2", "--fabric", "serial"],
        ["evaluate", run, "--json"],
        ["report", run, "--output", str(page)],
    ):
        done = invoke(command)
        assert done.exit_code == 0, (command, done.output)
    assert json.loads(Path(run, "environment.json").read_text())["data_dir"] == str(odd)
    assert r"/caf\xe9" in printable(check_datasets().value)
