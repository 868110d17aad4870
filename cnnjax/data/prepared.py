"""Sets in a tfds directory: found or prepared there, decoded once, and cached as arrays."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cnnjax.data.cache import (
    CACHE,
    Facts,
    read_arrays,
    read_facts,
    remove_cache,
    remove_partial_files,
    write_arrays,
    write_facts,
)
from cnnjax.data.description import read_description
from cnnjax.data.folders import check_free, exclusive, prepared_folder, publish, staging, versions
from cnnjax.data.image_folder import FILES, pixels_of, prepare_folder
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.sources import NamedSet, fetch
from cnnjax.data.stored import Examples, Fit, StoredSet, digest
from cnnjax.data.tfds_format import (
    class_names,
    decode,
    inspect_set,
    write_tfds,
)
from cnnjax.data.tfds_prepare import check_preparable, prepare_other
from cnnjax.errors import UserError, option


class _Wanted(NamedTuple):
    """A set that is wanted, see `load_dataset`."""

    name: str
    fit: Fit  # For images of several sizes.
    test_split: str | None
    say: Callable[[str], None]
    named: NamedSet | None = None
    stream: bool | None = False
    final: Fit = Fit()  # How training brings the stored images to one shape, see `ImageDataset.fit`.

    def decoded(self, available: tuple[str, ...]) -> list[str]:
        """Returns the splits to decode."""
        return ["train", *(split for split in ("validation", self.test_split or "test") if split in available)]


def load_tfds(
    dataset: str,
    data_dir: Path,
    say: Callable[[str], None],
    *,
    version: str | None = None,
    fit: Fit = Fit(),  # noqa: B008  Immutable.
    test_split: str | None = None,
    stream: bool | None = False,
) -> StoredSet:
    """Finds a tfds set in `data_dir`, downloading and preparing it if necessary; see `load_dataset`.

    Args:
      dataset: "name", "name/config", or either with ":version".
      fit: for a set of images of several sizes.
      stream: see `load_dataset`.
    """
    name, exact = _name_and_version(dataset, data_dir)
    named = NAMED_SETS.get(name)
    version = exact or version
    wanted = _Wanted(name, fit, test_split, say, named, stream, fit)
    folder = prepared_folder(name, data_dir, version, exact=bool(exact))
    if folder is not None and (streamed := _streamed(wanted, folder, f"the prepared tfds directory {folder}")):
        return streamed
    if folder is not None and (cached := _cached(wanted, folder)):
        return cached
    is_new = folder is None
    if is_new:
        _make_data_dir(name, data_dir, say)
    with exclusive(name, data_dir, say) as locked:
        folder = prepared_folder(name, data_dir, version, exact=bool(exact))  # Perhaps by another process.
        if folder is None:
            return _prepare(wanted, data_dir, locked)
        source = f"the prepared tfds directory {folder}"
        if is_new and (streamed := _streamed(wanted, folder, source, locked)):
            return streamed
        if cached := _cached(wanted, folder):
            return cached
        _remove_partial_files(folder, locked)
        return _decode_all(wanted, folder, source)


def prepare_tfds(dataset: str, data_dir: Path, say: Callable[[str], None]) -> Path:
    """Finds a set in `data_dir` that only tfds or the user can fetch, or prepares it there; decodes no image.

    Returns:
      The folder of the prepared version.
    """
    name, exact = _name_and_version(dataset, data_dir)
    if (folder := prepared_folder(name, data_dir, exact)) is not None:
        return folder
    _make_data_dir(name, data_dir, say)
    try:
        with exclusive(name, data_dir, say) as locked, staging(name, data_dir, locked) as stage:
            return prepared_folder(name, data_dir) or prepare_other(name, data_dir, stage, say)
    except OSError as error:
        raise _not_writable(data_dir, error) from error


def _name_and_version(dataset: str, data_dir: Path) -> tuple[str, str]:
    """Returns the parts of "name:version", which must be prepared or can be fetched; the version may be empty."""
    name, _, exact = dataset.partition(":")
    named = NAMED_SETS.get(name)
    if exact and exact not in (found := versions(name, data_dir)) and (named is None or named.version != exact):
        rule = f"a version that is prepared in {data_dir} ({', '.join(found) or 'none is'})"
        rule += "" if named is None else f" or can be downloaded ({named.version})"
        raise UserError(f"`dataset` must name {rule}, got {dataset}. Write {name} for the newest.")
    return name, exact


def _make_data_dir(name: str, data_dir: Path, say: Callable[[str], None]) -> None:
    """Makes the tfds directory, if a set that is not there can be prepared."""
    if name not in NAMED_SETS:
        check_preparable(name, data_dir)
    if not data_dir.exists():
        say(f"{data_dir} does not exist yet, so {name} is prepared there")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(data_dir, error) from error


def load_folder(
    path: Path,
    data_dir: Path,
    say: Callable[[str], None],
    *,
    version: str | None,
    fit: Fit,
    skip_unreadable: bool,
    test_split: str | None = None,
    stream: bool | None = False,
) -> StoredSet:
    """Reads a folder or a list of images, and keeps it as a prepared set in `data_dir`; see `load_dataset`."""
    folder = prepare_folder(
        path,
        data_dir,
        image_shape=fit.shape_of(()),
        resize=fit.resize,
        interpolation=fit.interpolation,
        skip_unreadable=skip_unreadable,
        version=version,
        say=say,
    )
    wanted = _Wanted(str(path), Fit(), test_split, say, None, stream, fit)
    if streamed := _streamed(wanted, folder, f"the image files of {path}"):
        return streamed
    if found := _cached(wanted, folder):
        return found
    with exclusive(folder.parent.name, data_dir, say) as locked:
        _remove_partial_files(folder, locked)
        return _cached(wanted, folder) or _decode_all(wanted, folder, f"the image files of {path}")


def _remove_partial_files(folder: Path, locked: bool) -> None:
    """Removes what killed processes left of arrays and indexes, if this process has locked the set."""
    for cache in folder.glob("cnnjax_*") if locked else ():
        remove_partial_files(cache)


def _cached(wanted: _Wanted, folder: Path) -> StoredSet | None:
    """Returns a set whose splits have been decoded and checked, or None."""
    description = read_description(folder)
    one_size = description is None or None not in description.image_shape[:2]
    for cache in [_cache_name(wanted.fit), *([CACHE] if one_size else [])]:
        if (facts := read_facts(folder / cache)) is None:
            continue
        pinned = {} if wanted.named is None else wanted.named.sha256
        if pinned in ({}, facts.sha256) and {*facts.splits} >= facts.sha256.keys() >= {*wanted.decoded(facts.splits)}:
            return _stored(wanted, folder / cache, facts)
    return None


def _streamed(wanted: _Wanted, folder: Path, source: str, locked: bool = False) -> StoredSet | None:
    """Returns a set whose images stay on disk, or None if it is used in memory.

    Args:
      source: where the pixels came from, in words, if that is not known yet.
      locked: whether this process has locked the set.
    """
    if wanted.stream is False or (wanted.stream is None and _fits(wanted, folder)):
        return None
    from cnnjax.data.records import Records
    from cnnjax.data.stream_index import index_folder, stream_splits

    counts, one_size = inspect_set(folder)
    available = tuple(counts)
    stored_fit = Fit() if one_size else wanted.fit
    cache = folder / _cache_name(stored_fit)
    splits = {split: Records(folder, split, stored_fit, wanted.final) for split in wanted.decoded(available)}
    shape = splits["train"].stored_shape
    for split, records in splits.items():
        if records.stored_shape != shape:
            raise _other_shape(folder, split, shape, records.stored_shape)
    known = read_facts(cache)
    facts = known or Facts(source, class_names(folder), shape, {}, available)
    pinned = {} if wanted.named is None else wanted.named.sha256

    def check(split: str, expected: str, got: str) -> None:
        if (expected := pinned.get(split, expected)) != got:
            raise _mismatch(wanted, split, f"{folder}, from {facts.source}", expected, got)

    name = wanted.name if not (folder / FILES).exists() else folder.parent.name
    data_dir = folder.parents[len(Path(name).parts)]
    with nullcontext(locked) if locked else exclusive(name, data_dir, wanted.say) as is_locked:
        _remove_partial_files(folder, is_locked)
        facts, streams = stream_splits(index_folder(folder, wanted.final), splits, facts, check, wanted.say)
    return replace(_stored(wanted, cache, facts), stream=streams.__getitem__)


def _fits(wanted: _Wanted, folder: Path) -> bool:
    """Returns whether the decoded splits of a set would take at most half of the memory.

    That is the memory of the host and, if jax has started, of its device: reading a set must not start it.
    """
    import jax
    from jax._src import xla_bridge

    from cnnjax.memory import device_memory, host_memory

    limits = [host_memory()]
    if xla_bridge.backends_are_initialized():
        limits.append(device_memory(jax.local_devices()[0]))
    available = min((limit for limit in limits if limit is not None), default=None)
    if available is None or (description := read_description(folder)) is None:
        return True
    needed = description.decoded_bytes(wanted.decoded(tuple(description.counts)), wanted.final)
    if needed > available // 2 and description.file_format != "array_record":
        wanted.say(
            f"{wanted.name} needs more than half of the memory and is kept there: only sets in the format array_record "
            f"can be streamed, and this one is in {description.file_format}"
        )
        return True
    return needed <= available // 2


def _cache_name(fit: Fit) -> str:
    """Returns the name of the folder of arrays of a set whose images have several sizes."""
    if fit.image_size is None:
        return CACHE
    size = "x".join(map(str, (*fit.image_size, fit.channels or "")))
    return f"{CACHE}_{size}_{fit.resize}_{fit.interpolation}"


def _stored(wanted: _Wanted, cache: Path, facts: Facts) -> StoredSet:
    folder = cache.parent
    content = folder.parent.name.rpartition("_")[2] if (folder / FILES).exists() else ""
    return StoredSet(
        name=wanted.name,
        source=facts.source,
        class_names=facts.class_names,
        image_shape=facts.image_shape,
        sha256=facts.sha256,
        version=content or folder.name,
        load=partial(_load, wanted, cache, facts),
        folder=folder,
        splits=facts.splits,
        pixels=pixels_of(folder, facts.files) if content else (),
    )


def _load(wanted: _Wanted, cache: Path, facts: Facts, split: str) -> Examples:
    """Returns a split, with the digest that `facts` names.

    If the cached arrays are missing or damaged, decodes the shards and writes the arrays again.

    Raises:
      UserError: the shards hold different images or labels than before.
    """
    examples = read_arrays(cache, split)
    if examples is None or digest(examples) != facts.sha256[split]:
        examples = decode(cache.parent, split, Fit() if cache.name == CACHE else wanted.fit)
        got = digest(examples)
        if got != facts.sha256[split]:
            raise _mismatch(wanted, split, f"{cache.parent}, from {facts.source}", facts.sha256[split], got)
        if read_facts(cache) is not None:  # Without them, the arrays would not be used.
            with suppress(OSError):
                write_arrays(cache, split, examples)
    return examples


def _prepare(wanted: _Wanted, data_dir: Path, locked: bool) -> StoredSet:
    """Prepares a set in `data_dir`; what was fetched gets its place there after its digests are verified."""
    name, named, say = wanted.name, wanted.named, wanted.say
    try:
        with staging(name, data_dir, locked) as stage:
            if named is None:
                folder = prepare_other(name, data_dir, stage, say)
                if streamed := _streamed(wanted, folder, "its official source", locked):
                    return streamed
                return _cached(wanted, folder) or _decode_all(wanted, folder, "its official source")
            check_free(data_dir / name / named.version)
            downloads = data_dir / "downloads" / "cnnjax" / name
            if locked:
                remove_partial_files(downloads)
            raw, source = fetch(named, downloads, say)
            folder = write_tfds(named, raw, stage, say)
            del raw
            say(f"{name} was served by {source}")
            decoded = _decode_all(wanted, folder, source)
            folder = publish(folder, stage, data_dir)
            facts = Facts(source, decoded.class_names, decoded.image_shape, decoded.sha256, decoded.splits)
            return _streamed(wanted, folder, source, locked) or _stored(wanted, folder / CACHE, facts)
    except OSError as error:
        raise _not_writable(data_dir, error) from error


def _not_writable(data_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"`data_dir` must be a directory that can be written, got {data_dir} ({error}). "
        f"Fix this, or choose another one: {option('data_dir', 'DIR')}."
    )


def _decode_all(wanted: _Wanted, folder: Path, source: str) -> StoredSet:
    """Decodes and verifies the splits, and caches the arrays and the facts next to the shards."""
    wanted.say(f"decoding {wanted.name} {folder.name} (once)")
    counts, one_size = inspect_set(folder)
    available = tuple(counts)
    cache, fit = folder / (CACHE if one_size else _cache_name(wanted.fit)), Fit() if one_size else wanted.fit
    files: list[str] = []
    decoded = {
        split: decode(folder, split, fit, files if split == "train" else None) for split in wanted.decoded(available)
    }
    sha256 = {split: digest(examples) for split, examples in decoded.items()}
    pinned = wanted.named.sha256 if wanted.named else {}
    for split, got in sha256.items():
        if (expected := pinned.get(split, got)) != got:
            raise _mismatch(wanted, split, source, expected, got)
    train = decoded["train"].image.shape[1:]
    for split, examples in decoded.items():
        if (shape := examples.image.shape[1:]) != train:
            raise _other_shape(folder, split, train, shape)
    facts = Facts(source, class_names(folder), train, sha256, available, tuple(files))
    try:
        for split, examples in decoded.items():
            write_arrays(cache, split, examples)
        if (known := read_facts(cache)) is not None:  # Known for another `test_split`.
            facts = replace(facts, sha256={**known.sha256, **sha256})
        write_facts(cache, facts)
    except OSError as error:
        remove_cache(cache)
        wanted.say(f"the decoded arrays cannot be cached ({error}): every start will decode {wanted.name} again")
    return _stored(wanted, cache, facts)


def _other_shape(folder: Path, split: str, train: tuple[int, ...], got: tuple[int, ...]) -> UserError:
    return UserError(f"{folder} must hold {split} images of the same shape {train} as its training images, got {got}.")


def _mismatch(wanted: _Wanted, split: str, source: str, expected: str | None, got: str) -> UserError:
    return UserError(
        f"The {split} split of {wanted.name!r} from {source} is not the known one: the SHA-256 of its images and "
        f"labels must be {expected}, got {got}. Move the prepared directory away if it exists, and run the command "
        "again to fetch the set again."
    )
