"""A bundle on disk: written at once or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .errors import ForeshardExportError

FORMAT = "foreshard.bundle/1"


class Files:
    """The files of a bundle to be, by path inside it."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}

    def add(self, file: str, data: bytes) -> dict[str, str]:
        """Takes the file in and returns its entry for the manifest."""
        self.contents[file] = data
        return {"file": file, "sha256": hashlib.sha256(data).hexdigest()}

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.contents.values()))


def check_target(path: Path) -> None:
    """Refuses to write over anything that is not a bundle."""
    if not path.exists() and not path.is_symlink():
        return
    if not is_bundle(path):
        raise ForeshardExportError(
            f"path: {str(path)!r} exists and is not a bundle, so it is left alone; choose another path or remove it"
        )


def is_bundle(path: Path) -> bool:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        return path.is_dir() and str(manifest["format"]).startswith("foreshard.bundle/")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(path: Path, manifest: dict[str, Any], files: Files) -> None:
    """Writes beside `path`, then renames: whoever looks sees the old bundle or the new one, never half."""
    check_target(path)
    files.add("manifest.json", to_json(manifest).encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = work / "new"
        for file, data in files.contents.items():
            target = new / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        if path.exists():
            os.rename(path, work / "old")
        os.rename(new, path)
    except BaseException:
        if (work / "old").exists() and not path.exists():
            os.rename(work / "old", path)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def to_json(manifest: dict[str, Any]) -> str:
    """JSON with one line for each tensor, so that a manifest can be read and compared."""
    entries = []
    for key, value in manifest.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        entries.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"
