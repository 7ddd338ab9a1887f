"""metrics.jsonl: a line for every epoch that was finished. Written by the trainer, checked here when it is read."""

from typing import Any

from rapa_dist.fields import NUMBER, OBJECT, POSITIVE, TEXT, check, listing, optional, whole
from rapa_dist.files import parse_json

_LINE = {
    "epoch": whole(1),
    "step": whole(),
    "learning_rate": POSITIVE,
    "train_images": whole(1),
    "test_images": whole(1),
    "train_loss": NUMBER,
    "train_error_percent": POSITIVE,
    "test_loss": NUMBER,
    "test_error_percent": POSITIVE,
    "device_time_s": optional(POSITIVE),
    "test_device_time_s": optional(POSITIVE),
    "similarity": optional(listing(optional(NUMBER))),
    "weights_sha256": TEXT,
    "wall": OBJECT,
}
_WALL = {
    "train_s": POSITIVE,
    "test_s": POSITIVE,
    "step_ms": optional(POSITIVE),
    "fabric": TEXT,
}
_MAY_LACK = {
    "step",
    "train_images",
    "test_images",
    "device_time_s",
    "test_device_time_s",
    "similarity",
    "step_ms",
    "weights_sha256",
    "fabric",
}


def parse_metrics(data: bytes) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, one for each epoch; one that is just being written is left out.

    Raises:
        ValueError: a line is damaged, or missing; it is named.
    """
    *lines, _ = data.split(b"\n")
    return [_parse_line(line, number) for number, line in enumerate(lines, 1)]


def _parse_line(line: bytes, number: int) -> dict[str, Any]:
    try:
        if not line.strip(b"\0 \t\r"):
            raise ValueError("it is empty" if not line else "it holds zeros or blanks alone")
        found = check(parse_json(line), _LINE, may_lack=_MAY_LACK)
        check(found["wall"], _WALL, may_lack=_MAY_LACK)
        if found["epoch"] != number:
            raise ValueError(f"it is of epoch {found['epoch']}, expected {number}")
    except ValueError as error:
        raise ValueError(f"line {number} is damaged: {str(error).rstrip('.')}") from None
    return found
