"""Names, limits and the substitute."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rapa_dist.data import builtin, download, load_dataset, official
from rapa_dist.data.load import check_name
from rapa_dist.errors import DataError, UsageError
from rapa_dist.streams import Purpose, stream


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's own data and caches out of sight, and be without a network."""

    def refuse(url: str) -> None:
        raise download.Unreachable("no connection to example.org (Name or service not known)")

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAPA_DIST_DATA", raising=False)
    monkeypatch.setattr(official, "reach", refuse)
    return tmp_path / "home"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw few images where no limit is given."""
    monkeypatch.setattr(builtin, "DEFAULT", (50, 20))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Forty images to train on and twenty to test on, each of a grey of its own."""
    for part, n in (("train", 40), ("test", 20)):
        for i in range(n):
            place = tmp_path / "images" / part / f"class{i % 4}"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("L", (32, 32), 5 * i).save(place / f"{i:02}.png")
    return tmp_path / "images"


# Names


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("cifar-10", "Did you mean 'cifar10'?"),
        ("CIFAR100", "Did you mean 'cifar100'?"),
        ("cifra10", "Did you mean 'cifar10'?"),
        ("shvn", "Did you mean 'svhn'?"),
        ("built-in", "Did you mean 'builtin'?"),
        ("imagenet", ""),
        ("", ""),
    ],
)
def test_unknown_names_get_a_suggestion_and_the_list(name: str, suggestion: str) -> None:
    with pytest.raises(UsageError) as error:
        load_dataset(name)
    message = str(error.value)
    assert f"there is no data set {name!r}." in message
    assert message.endswith("There are: builtin, cifar10, cifar100, svhn, mnist, fashion-mnist, images:FOLDER.")
    assert suggestion in message
    assert ("Did you mean" in message) == bool(suggestion)


def test_a_folder_without_the_prefix(images: Path) -> None:
    with pytest.raises(UsageError, match=f"Did you mean 'images:{images}'"):
        load_dataset(str(images))


def test_images_without_a_folder() -> None:
    with pytest.raises(UsageError, match=r"images: lacks the folder; images:FOLDER needs FOLDER/train"):
        load_dataset("images:")


def test_names_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_name("svhn") == "svhn"
    assert check_name("images:x/../y/") == f"images:{tmp_path}/y"


# Limits


@pytest.mark.parametrize("limit", [0, -3])
@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", ["builtin", "images:/nowhere", None])
def test_limits_below_one(limit: int, part: str, name: str | None) -> None:
    with pytest.raises(UsageError, match=f"--limit-{part} is a number of images, at least 1; got {limit}"):
        load_dataset(name, **{f"limit_{part}": limit})


def test_a_limit_takes_the_first_of_a_fixed_order(images: Path) -> None:
    name = f"images:{images}"
    everything = load_dataset(name)
    for part, n in (("train", 40), ("test", 20)):
        order = stream(0, Purpose.SUBSET, ("train", "test").index(part)).permutation(n)
        for limit in (1, 7, n - 1):
            few = getattr(load_dataset(name, **{f"limit_{part}": limit}), part)
            np.testing.assert_array_equal(few.images, getattr(everything, part).images[order[:limit]])
            np.testing.assert_array_equal(few.labels, getattr(everything, part).labels[order[:limit]])
    np.testing.assert_array_equal(load_dataset(name, limit_train=40).train.labels, everything.train.labels)


def test_mean_and_fingerprint_are_of_the_images_in_use(images: Path) -> None:
    name = f"images:{images}"
    some = load_dataset(name, limit_train=10)
    np.testing.assert_allclose(some.mean, (some.train.images / 255).mean(axis=(0, 1, 2)), rtol=1e-6)
    fingerprints = {
        data.fingerprint for data in (some, load_dataset(name), load_dataset(name, limit_train=10, limit_test=3))
    }
    assert len(fingerprints) == 3
    assert load_dataset(name, limit_train=10).fingerprint == some.fingerprint


def test_a_limit_beyond_the_data_set_takes_all_and_says_so(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load_dataset(f"images:{images}", limit_train=41, limit_test=5000)
    assert (len(data.train), len(data.test)) == (40, 20)
    said = capsys.readouterr().err
    assert "41 train images are wanted, and there are 40; all are used" in said
    assert "5,000 test images are wanted, and there are 20; all are used" in said
    load_dataset(f"images:{images}", limit_train=40, limit_test=20)
    assert capsys.readouterr().err == ""


# The built-in set


def test_builtin_is_drawn_to_measure() -> None:
    data = load_dataset("builtin", limit_train=30, limit_test=12)
    assert data.name == "builtin"
    assert data.classes == builtin.CLASSES
    np.testing.assert_array_equal(data.train.images, builtin.draw(builtin.TRAIN, 30).images)
    np.testing.assert_array_equal(data.test.images, builtin.draw(builtin.TEST, 12).images)


def test_builtin_has_5000_and_1000_images_and_draws_more_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert builtin.DEFAULT == (5000, 1000)
    assert builtin.MOST == (50_000, 10_000)
    monkeypatch.setattr(builtin, "DEFAULT", (20, 10))
    monkeypatch.setattr(builtin, "MOST", (60, 30))
    data = load_dataset("builtin")
    assert (len(data.train), len(data.test)) == (20, 10)
    data = load_dataset("builtin", limit_train=60, limit_test=31)
    assert (len(data.train), len(data.test)) == (60, 30)
    assert "31 test images are wanted, and there are 30" in capsys.readouterr().err


# No name


@pytest.mark.usefixtures("few")
def test_without_a_name_the_builtin_set_stands_in_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    data = load_dataset(None)
    assert data.name == "builtin"
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("warning: CIFAR-10 is not in ")
    assert "no connection to" in err
    assert "cifar-10-python.tar.gz into" in err
    assert "built-in set" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("few")
def test_the_warning_points_to_images_at_hand(images: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir()
    images.rename(home / "data")
    load_dataset(None)
    assert "--dataset images:~/data)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "images:/nowhere"])
def test_what_is_asked_for_by_name_is_never_substituted(name: str) -> None:
    with pytest.raises(DataError):
        load_dataset(name)


def test_the_same_images_every_time() -> None:
    one, two = (load_dataset("builtin", limit_train=25, limit_test=10) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    np.testing.assert_array_equal(one.mean, two.mean)
