"""Images: which data sets are at hand, and how torchvision, which reads them, is here."""

from rapa_dist.check import Check
from rapa_dist.data.load import FoundDataSet, find_datasets
from rapa_dist.data.vision import VisionStatus, vision_status

_KNOWN_FAULT = "https://github.com/pytorch/vision/issues/9337"


def check_torchvision() -> Check:
    """Import torchvision, and look whether its compiled operators load."""
    return judge_torchvision(vision_status())


def judge_torchvision(status: VisionStatus) -> Check:
    """Say whether data sets can be read, and whether anything is missing that isn't needed."""
    found = {"version": status.version, "operators": status.operators}
    if status.version is None:
        fix = "Until then only --dataset builtin works."
        return Check("torchvision", "failed", "can't be imported", f"{status.problem} {fix}", found)
    if not status.operators:
        value = f"{status.version}; {status.problem}"
        fix = f"Nothing needs doing. The cause, and when it will be mended: {_KNOWN_FAULT}"
        return Check("torchvision", "warning", value, fix, found)
    return Check("torchvision", "ok", f"{status.version}, its compiled operators load", quantities=found)


def check_datasets() -> Check:
    """Look which data sets are at hand; reads and fetches none."""
    return judge_datasets(find_datasets())


def judge_datasets(datasets: list[FoundDataSet]) -> Check:
    """Say which data sets are there; only drawn shapes are a warning."""
    found = {"found": [data.name for data in datasets if data.found]}
    missing = [data for data in datasets if not data.found]
    named = [data for data in datasets if data.found]
    value = ", ".join(
        data.name if str(data.where or "") in data.name else f"{data.name} in {data.where}" for data in named
    )
    if missing:
        value += f"; not found: {', '.join(data.name for data in missing)}"
    if not any(data.found and data.name != "builtin" for data in datasets):
        fix = "; ".join(f"{data.name}: {data.how}" for data in missing)
        return Check("data sets", "warning", value, f"Runs use drawn shapes unless you add real images. {fix}", found)
    return Check("data sets", "ok", value, quantities=found)
