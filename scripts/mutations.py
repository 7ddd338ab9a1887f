"""What can be done to the files of a run directory: bytes, types of fields, links, pipes. Drawn from a seed.

Each mutation takes a random generator, the run directory and the folder of others' files beside it, and returns what
it did in a few words. It changes nothing outside the run directory.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

FILES = (
    "config.toml",
    "environment.json",
    "metrics.jsonl",
    "tiles.json",
    "log",
    ".lock",
    "report.html",
    "scaling.json",
)
SPARSE_BYTES = 1 << 40
Mutation = Callable[[random.Random, Path, Path], str]


def mutate(rng: random.Random, run: Path, others: Path) -> str:
    """Do one thing to a run directory, and say what."""
    mutation = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    return mutation(rng, run, others)


# --- bytes


def _target(rng: random.Random, run: Path) -> Path:
    """Draw a file of the run: one by its name, or one of its checkpoints, of which the newest matters most."""
    checkpoints = sorted((run / "checkpoints").glob("step-*")) if (run / "checkpoints").is_dir() else []
    if checkpoints and rng.random() < 0.5:
        return rng.choice(checkpoints[-2:] if rng.random() < 0.7 else checkpoints)
    names = [name for name in FILES[:6] if (run / name).is_file() and (run / name).stat().st_size] or [FILES[0]]
    return run / rng.choice(names)


def _read(path: Path) -> bytearray:
    """Return the contents of a regular file that is not huge; nothing of anything else."""
    about = os.stat(path) if path.exists() else None
    if about is None or not stat.S_ISREG(about.st_mode) or about.st_size > 1 << 24:
        return bytearray()
    return bytearray(path.read_bytes())


def _write(path: Path, data: bytes) -> None:
    """Write a file of the run's own: what is a link is replaced, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def damage_bytes(rng: random.Random, run: Path, others: Path) -> str:
    """Flip bits, cut, zero, repeat, shuffle."""
    path = _target(rng, run)
    data = _read(path)
    kind = rng.choice(
        ("flip", "cut", "empty", "zeros", "zero line", "cut line", "twice", "swap lines", "noise", "tail")
    )
    at = rng.randrange(len(data) + 1)
    lines = bytes(data).splitlines(keepends=True)
    number = rng.randrange(len(lines)) if lines else 0
    match kind:
        case "flip":
            for _ in range(rng.choice((1, 1, 8))):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "cut":
            del data[at:]
        case "empty":
            data.clear()
        case "zeros":
            data[at : at + 100] = bytes(len(data[at : at + 100]))
        case "noise":
            data[at : at + 20] = rng.randbytes(20)
        case "tail":
            data += rng.choice((b"\0" * 300, b"\n\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b'{"epoch": 1'))
        case _ if lines:
            if kind == "zero line":
                lines[number] = bytes(len(lines[number]))
            elif kind == "cut line":
                lines[number] = lines[number][: rng.randrange(len(lines[number]))]
            elif kind == "twice":
                lines.insert(number, lines[number])
            else:
                rng.shuffle(lines)
            data = bytearray(b"".join(lines))
    if rng.random() < 0.5:
        _vouch(path, data)
    _write(path, data)
    return f"{kind} in {path.relative_to(run)}"


def _vouch(path: Path, data: bytes) -> None:
    """Make a checkpoint's sidecar vouch for other tensors, as somebody would who forges it."""
    sidecar = path.with_suffix(".json")
    if path.suffix == ".safetensors" and (text := _read(sidecar)):
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            about = json.loads(text) | {"sha256": hashlib.sha256(data).hexdigest()}
            _write(sidecar, _sealed(about).encode(errors="replace"))


def _sealed(about: Any) -> str:
    """Return a sidecar with a checksum of its own contents that fits."""
    if not isinstance(about, dict):
        return _deep_json(about)
    plain = {str(key): value for key, value in about.items() if key != "sidecar_sha256"}
    with contextlib.suppress(ValueError, RecursionError):  # else nobody could read it
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        return _deep_json(plain | {"sidecar_sha256": digest})
    return _deep_json(plain)


# --- fields


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def _other(rng: random.Random, old: Any) -> Any:
    """Return something else than a field holds, as a program or a person might leave there."""
    near = [old + 1, old - 1, -old, float(old), old * 1000, str(old)] if isinstance(old, int | float) else []
    if isinstance(old, list):
        near = [old[:-1], old + old, list(map(str, old)), {"0": old}, [[item] for item in old]]
    if isinstance(old, str):
        near = [old + "x", "", old.upper(), [old], f"../{old}", f"{old}\0", "é\u202e" + old]
    odd = (
        *(None, True, 0, -1, 2**31, 2**64, 10**30, 10**400, 1.5, 1e308, -1e-320, float("nan"), float("inf")),
        *("", "x" * 5000, "\0", "images:\0", "images:", "/", "../../..", "<script>", "[red]", "\ud800", "1", "nan"),
        *([], [None], ["a"], [1, 2], [-1], [0], {}, {"a": 1}, {"a": {"b": [1]}}, _nested(50), _nested(100_000)),
    )
    return rng.choice([*near, *near, *odd] if near else odd)


def _places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all fields of a document, nested ones too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in items:
        found += [(*before, key), *_places(inner, (*before, key))]
    return found


def _change_field(rng: random.Random, document: Any, only: str = "") -> tuple[Any, str]:
    """Change, remove or add a field; return the document and what was done."""
    places = [place for place in _places(document) if not only or only in place]
    if not places:
        return document, "nothing"
    *above, key = rng.choice(places)
    holder = document
    for step in above:
        holder = holder[step]
    where = ".".join(map(str, (*above, key)))
    kind = rng.choice(("change", "change", "change", "change", "remove", "add"))
    if kind == "remove":
        del holder[key]
        return document, f"without {where}"
    if kind == "add" and isinstance(holder, dict):
        holder["surprise"] = _other(rng, 0)
        return document, f"surprise beside {where}"
    holder[key] = value = _other(rng, holder[key])
    return document, f"{where} = {'something deep' if _is_deep(value) else repr(value)[:40]}"


def _is_deep(value: Any) -> bool:
    for _ in range(40):
        if not isinstance(value, list) or not value:
            return False
        value = value[0]
    return True


def _deep_json(value: Any) -> str:
    """Write JSON with brackets as deep as they are: `json` gives up at some hundreds."""
    depth, inner = 0, value
    while isinstance(inner, list) and len(inner) == 1:
        depth, inner = depth + 1, inner[0]
    if depth > 40:
        return "[" * depth + _deep_json(inner) + "]" * depth
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_deep_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_deep_json, value)) + "]"
    return json.dumps(value)


def change_json(rng: random.Random, run: Path, others: Path) -> str:
    """Change a field of a JSON file that nothing vouches for."""
    name = rng.choice(
        ("environment.json", "tiles.json", "tiles.json", "metrics.jsonl", "metrics.jsonl", "metrics.jsonl")
    )
    path = run / name
    lines = bytes(_read(path)).splitlines() if name.endswith("l") else [bytes(_read(path))]
    number = rng.randrange(len(lines)) if lines else 0
    try:
        document, what = _change_field(rng, json.loads(lines[number]))
        lines[number] = _deep_json(document).encode()
    except (ValueError, IndexError, RecursionError):
        return f"{name} was no JSON"
    _write(path, b"".join(line + b"\n" for line in lines))
    return f"{name}: {what}"


def replace_json(rng: random.Random, run: Path, others: Path) -> str:
    """Put something else where a JSON object is expected."""
    name = rng.choice(("environment.json", "tiles.json", "metrics.jsonl", "scaling.json"))
    value = _other(rng, rng.choice((0, "", [])))
    _write(run / name, _deep_json(value).encode() + b"\n")
    return f"all of {name}"


def _toml(config: dict[str, Any]) -> bytes:
    """Return TOML of what it can hold."""
    try:
        return tomli_w.dumps(config).encode()
    except (TypeError, ValueError, RecursionError):
        flat = {key: value for key, value in config.items() if not isinstance(value, dict | list) and value is not None}
        return "".join(f"{key} = {_deep_json(value)}\n" for key, value in flat.items()).encode(errors="replace")


def change_config(rng: random.Random, run: Path, others: Path) -> str:
    """Change a field of the configuration, sometimes in the checkpoints as well."""
    try:
        config, what = _change_field(rng, tomllib.loads(bytes(_read(run / "config.toml")).decode()))
    except ValueError:
        return "config.toml was no TOML"
    _write(run / "config.toml", _toml(config))
    if rng.random() < 0.5:
        return f"config.toml: {what}"
    with contextlib.suppress(ValueError, RecursionError):  # what TOML made of it, so that both are the same
        config = tomllib.loads((run / "config.toml").read_text())
    for path in _tensors(run):
        _forge(path, lambda about: about | {"config": config})
    return f"config.toml and checkpoints: {what}"


def _tensors(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    return sorted(folder.glob("step-*.safetensors")) if folder.is_dir() and not folder.is_symlink() else []


def _forge(path: Path, change: Callable[[Any], Any], header_of: Callable[[Any], Any] = lambda header: header) -> None:
    """Change what a checkpoint says of itself, in the sidecar and in the tensors, and vouch for it."""
    data, text = _read(path), _read(path.with_suffix(".json"))
    length = int.from_bytes(data[:8], "little")
    try:
        about = change(json.loads(text))
        header = json.loads(bytes(data[8 : 8 + length]))
        named = json.loads(header["__metadata__"]["rapa_dist"]).keys() | about.keys() - json.loads(text).keys()
        header["__metadata__"]["rapa_dist"] = _deep_json({key: about[key] for key in named if key in about})
        head = _deep_json(header_of(header)).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    whole = len(head).to_bytes(8, "little") + head + bytes(data[8 + length :])
    _write(path, whole)
    sealed = _sealed(about | {"sha256": hashlib.sha256(whole).hexdigest()})
    _write(path.with_suffix(".json"), sealed.encode(errors="replace"))


def forge_checkpoint(rng: random.Random, run: Path, others: Path) -> str:
    """Change a field of a checkpoint so that sidecar, tensors and checksum agree."""
    if not (found := _tensors(run)):
        return "no checkpoint to forge"
    path, said = found[-1] if rng.random() < 0.8 else rng.choice(found), ""
    part = rng.choice(("progress", "progress", "progress", "config", ""))

    def change(about: Any) -> Any:
        nonlocal said
        about, said = _change_field(rng, about, part)
        return about

    _forge(path, change)
    return f"{path.stem} forged: {said}"


def forge_tensors(rng: random.Random, run: Path, others: Path) -> str:
    """Change shapes, types, offsets or values of tensors, and vouch for them."""
    if not (found := _tensors(run)):
        return "no tensors to forge"
    path, said = found[-1], ""
    if rng.random() < 0.4:
        data = _read(path)
        length = 8 + int.from_bytes(data[:8], "little")
        value = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\0\0\0\0"))
        span = len(data[length:]) // 4 if rng.random() < 0.5 else 1
        at = length + 4 * rng.randrange(max(1, (len(data) - length) // 4 - span + 1))
        data[at : at + 4 * span] = value * span
        _write(path, data)
        _vouch(path, data)
        return f"{span} weights of {path.stem} = {value.hex()}"

    def header_of(header: Any) -> Any:
        nonlocal said
        names = [name for name in header if name != "__metadata__"]
        if not names:
            return header
        name = rng.choice(names)
        kind = rng.choice(("dtype", "shape", "data_offsets", "name", "less", "field"))
        said = f"{name} {kind}"
        if kind == "dtype":
            header[name]["dtype"] = rng.choice(("F64", "F16", "BF16", "I32", "F8_E4M3", "BOOL", "X", 1))
        elif kind == "name":
            header[rng.choice(("layers.9.tiles", "", "head.weight", "\ud800"))] = header.pop(name)
        elif kind == "less":
            del header[name]
        elif kind == "field":
            header[name] = _other(rng, 0)
        else:
            header[name][kind] = _other(rng, header[name][kind])
        return header

    _forge(path, lambda about: about, header_of)
    return f"{path.stem} header: {said}"


# --- links, pipes, folders


def replace_file(rng: random.Random, run: Path, others: Path) -> str:
    """Put something else in the place of a file or folder of the run."""
    newest = _tensors(run)[-1:]
    names = [*FILES, "checkpoints", "checkpoints", "ray-logs", *(f"checkpoints/{path.name}" for path in newest)]
    names += [f"checkpoints/{path.stem}.json" for path in newest]
    name = rng.choice([*names, "checkpoints/step-999999999-epoch-00009.json", ".metrics.jsonl.1-00000000.partial"])
    path = run / name
    if path.parent.is_symlink() or not path.parent.is_dir():
        return f"no place for {name}"
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    kinds = [
        "nothing",
        "folder",
        "full folder",
        "pipe",
        "socket",
        "device",
        "link",
        "dangling",
        "loop",
        "self",
        "sparse",
    ]
    kind = rng.choice([*kinds, "hard link", "unreadable", "stranger's", "link", "link"])
    match kind:
        case "folder" | "full folder":
            path.mkdir()
            if kind == "full folder":
                (path / "file").write_text("mine")
        case "pipe":
            os.mkfifo(path)
        case "socket":
            _make_socket(path)
        case "device":
            _make_device(path, rng.choice(((1, 3), (1, 5), (1, 7), (1, 9))))
        case "link" | "hard link":
            theirs = others / "run" / name
            if name.startswith("checkpoints/"):
                theirs = max((others / "run" / "checkpoints").glob(f"*{path.suffix}"))
            if not theirs.exists() or rng.random() < 0.2:
                theirs = others / rng.choice(("secret.txt", "folder"))
            if kind == "link" or theirs.is_dir():
                path.symlink_to(theirs)
            else:
                os.link(theirs, path)
        case "dangling":
            path.symlink_to(others / "new")
        case "loop":
            path.symlink_to(path.name)
        case "self":
            path.symlink_to(".")
        case "sparse":
            with path.open("wb") as file:
                file.truncate(SPARSE_BYTES)
        case "unreadable" | "stranger's":
            path.write_bytes(b"" if rng.random() < 0.5 else b"{}\n")
            path.chmod(0)
            if kind == "stranger's" and os.geteuid() == 0:
                os.chown(path, 12345, 12345)
    return f"{name} is {kind}"


def _make_socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)  # names of sockets are short
    try:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def _make_device(path: Path, number: tuple[int, int]) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(*number))
    except OSError:  # for root alone
        os.mkfifo(path)


def rename_checkpoint(rng: random.Random, run: Path, others: Path) -> str:
    """Give a checkpoint, or half of one, another name."""
    if not (found := _tensors(run)):
        return "no checkpoint to rename"
    path = rng.choice(found)
    odd = ("step-", "step-000000001-epoch-99999", "step-x\n", "step-\udcff", "step-9", f"{path.stem}.partial")
    name = rng.choice((*odd, found[0].stem))
    for suffix in rng.choice(([".json"], [".safetensors"], [".json", ".safetensors"])):
        if path.with_suffix(suffix).is_file():
            path.with_suffix(suffix).rename(path.with_name(name + suffix))
    return f"{path.stem} renamed {name!r}"


_SHARES: dict[Mutation, int] = {
    damage_bytes: 20,
    change_json: 22,
    replace_json: 4,
    change_config: 14,
    forge_checkpoint: 18,
    forge_tensors: 8,
    replace_file: 26,
    rename_checkpoint: 4,
}
