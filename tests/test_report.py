"""The report: everything on one page that needs no network, and that a browser shows without complaint."""

import json
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from rapa_dist.cli import main
from rapa_dist.coordinator.run_directory import RunDirectory

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_TIMEOUT_S = 90
_QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--v=0",
]
_PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const missing = images.filter(image => !image.complete || image.naturalWidth === 0).length;
  const empty = [...document.querySelectorAll("figure svg")].filter(svg => svg.getBBox().width === 0).length;
  document.documentElement.dataset.seen = JSON.stringify({images: images.length, missing, empty});
});
</script>"""


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small tiled run, trained for three epochs."""
    folder = tmp_path_factory.mktemp("report") / "a <run> & more"
    options = ["--dataset", "builtin", "--limit-train", 60, "--limit-test", 40, "--epochs", 3, "--fabric", "serial"]
    done = invoke("train", *options, "--tiles", "16,4,1", "--channels", "8,6,4", "--run-dir", folder)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def page(run, tmp_path):
    written = tmp_path / "page.html"
    scaling = Path(__file__).parent.parent / "results" / "scaling.json"
    done = invoke("report", run, "--output", written, "--scaling", scaling)
    assert done.exit_code == 0, done.output
    return written


def look(page: Path, tmp_path: Path, *options: str) -> tuple[str, list[str]]:
    """Open a page in a browser; return its document at the end, and what was said on the console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.fail("No browser: install chromium (scripts/test does where it is root and there is apt-get).")
    profile = tmp_path / "profile"
    process = subprocess.Popen(
        [browser, *_QUIET, f"--user-data-dir={profile}", *options, "--dump-dom", page.as_uri()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        document, log = process.communicate(timeout=_TIMEOUT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(profile, ignore_errors=True)
    return document, [line for line in log.splitlines() if "CONSOLE" in line]


def probed(page: Path, tmp_path: Path) -> Path:
    """Return a copy of a page that says what it sees of its pictures; its policy allows the probe alone."""
    text = page.read_text()
    assert "default-src 'none';" in text
    copy = tmp_path / "probed.html"
    allowed = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    copy.write_text(allowed.replace("</body>", f"{_PROBE}</body>"))
    return copy


def what_was_seen(document: str) -> dict:
    (text,) = re.findall(r'data-seen="([^"]*)"', document)
    return json.loads(text.replace("&quot;", '"'))


@pytest.mark.timeout(300)
def test_a_browser_shows_all_of_it_without_a_word_on_the_console(page, tmp_path):
    document, console = look(page, tmp_path)
    assert console == []
    assert "Similarity over time" in document
    document, console = look(probed(page, tmp_path), tmp_path)
    assert console == []
    seen = what_was_seen(document)
    assert seen["images"] >= 17, "16 tiles and the plot of the scaling"
    assert (seen["missing"], seen["empty"]) == (0, 0)


@pytest.mark.timeout(300)
def test_what_looks_at_the_page_sees_what_is_wrong(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</main>", '<img src="data:image/png;base64,AAAA" alt="x"></main>'))
    document, _ = look(probed(broken, tmp_path), tmp_path)
    assert what_was_seen(document)["missing"] == 1
    broken.write_text(page.read_text().replace("</main>", '<img src="elsewhere.png" alt="x"></main>'))
    assert look(broken, tmp_path)[1], "the policy forbids it, and the browser says so"


class Places(HTMLParser):
    """Collects what a page refers to, and the ids in it."""

    def __init__(self):
        super().__init__()
        self.references, self.ids, self.unnamed = [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag != "svg":
            names = ("src", "href", "xlink:href", "srcset", "poster", "action")
            self.references += [given[name] for name in names if given.get(name)]
        self.ids += [given["id"]] if "id" in given else []
        if tag in ("img", "svg") and not (given.get("alt") or given.get("aria-label")):
            self.unnamed.append(given)


def test_it_needs_nothing_from_elsewhere_and_names_every_picture(page):
    text = page.read_text()
    places = Places()
    places.feed(text)
    assert all(reference.startswith(("#", "data:")) for reference in places.references)
    assert not re.search(r"url\((?!#)", text.partition("<style>")[2].partition("</style>")[0])
    assert "@import" not in text
    assert "<script" not in text
    assert len(set(places.ids)) == len(places.ids)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(places.ids)
    assert places.unnamed == []


def test_it_tells_the_figures_of_the_run(page, run):
    text = page.read_text()
    lines = RunDirectory(run).metrics()
    for line in lines:
        for number in (
            f"{line['test_error_percent']:.2f}",
            f"{line['train_loss']:.4f}",
            f"{line['similarity'][0]:.4f}",
        ):
            assert number in text
    for word in ("16,4,1", "random", "lr_decay_every", "torch", "L0/T015", "a &lt;run&gt; &amp; more"):
        assert word in text
    assert "a <run>" not in text


def test_it_is_written_into_the_run_directory_and_again(run):
    for _ in range(2):
        done = invoke("report", run, "--json")
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        assert Path(result["report"]) == run / "report.html"
        assert result["bytes"] == (run / "report.html").stat().st_size
        assert result["missing"] == []


def test_processor_time_that_is_not_known_is_not_shown_as_none(run, tmp_path):
    """Tiles of the fabric `batched` have none of their own."""
    text = written(run, tmp_path)
    assert "processor time (s)" in text
    assert "Processor time is not known" not in text
    batched = tmp_path / "batched"
    shutil.copytree(run, batched)
    tiles = json.loads((batched / "tiles.json").read_text())
    tiles["tiles"] = [tile | {"busy_s": 0.0, "utilisation": 0.0} for tile in tiles["tiles"]]
    (batched / "tiles.json").write_text(json.dumps(tiles))
    text = written(batched, tmp_path)
    assert "Processor time is not known" in text
    assert "processor time (s)" not in text
    row = re.search(r'<tr><th scope="row">L0/T000</th>(.*?)</tr>', text)[1]
    assert row.count("<td>–</td>") == 2


def written(run, tmp_path):
    done = invoke("report", run, "--output", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    return (tmp_path / "report.html").read_text()


def test_a_run_without_epochs_or_checkpoints_is_described_as_far_as_it_goes(run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    for path in ("metrics.jsonl", "tiles.json", "environment.json"):
        (bare / path).unlink()
    shutil.rmtree(bare / "checkpoints")
    done = invoke("report", bare, "--json")
    assert done.exit_code == 0, done.output
    missing = " ".join(json.loads(done.stdout)["missing"])
    assert "No epoch is finished yet" in missing
    assert "checkpoint" in missing
    assert "Configuration" in (bare / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("nowhere",), ("is no run directory",)),
        (("RUN", "--output", "no/such/folder/page.html"), ("Can't write no/such/folder/page.html", "--output")),
        (("RUN", "--output", "page.pdf"), ("ends in .html", "page.pdf")),
        (("RUN", "--checkpoint", "worst"), ("no checkpoint “worst”",)),
        (("RUN", "--scaling", "no.json"), ("no.json",)),
    ],
)
def test_bad_input_is_refused(run, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    result = invoke("report", *(run if argument == "RUN" else argument for argument in arguments))
    assert result.exit_code in (1, 2), result.output
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
