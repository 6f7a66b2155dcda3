"""Features and matches of a folder of images, as .npz, as hloc's .h5, or as a COLMAP database.

All keypoints are in pixels of the stored images with the centre of the top-left pixel at (0, 0),
as hloc keeps them; COLMAP counts from the corner of that pixel, so 0.5 is added there.
"""

from __future__ import annotations

import itertools
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from scfeat_ros.errors import InputError, ScfeatError, import_optional
from scfeat_ros.extractor import Extractor
from scfeat_ros.features import Features, Matches
from scfeat_ros.images import read_file
from scfeat_ros.matcher import match_with
from scfeat_ros.memory import is_out_of_memory
from scfeat_ros.names import printable
from scfeat_ros.parameters import MatcherOptions
from scfeat_ros.sources import list_images
from scfeat_ros.staging import check_file, staged_file
from scfeat_ros.text_files import read_text

FORMATS = (".npz", ".h5", ".db")
MatchedPairs = Iterable[tuple[str, str, Matches]]


@dataclass(frozen=True)
class ExportResult:
    """The files written, and counts of images, keypoints, pairs and matches."""

    files: list[Path]
    images: int
    keypoints: int
    pairs: int
    matches: int
    left_out: list[str]
    """One error message for each image that could not be read."""


@dataclass(frozen=True)
class ColmapOptions:
    """How the images are imported into COLMAP.

    Attributes:
        camera_model: one of COLMAP's names.
        single_camera: whether all images are from one camera.
    """

    camera_model: str = "SIMPLE_RADIAL"
    single_camera: bool = False


def exhaustive_pairs(names: list[str]) -> list[tuple[str, str]]:
    """All pairs of images."""
    return list(itertools.combinations(names, 2))


def sequential_pairs(names: list[str], overlap: int) -> list[tuple[str, str]]:
    """Every image with the next `overlap` ones.

    Raises:
        InputError: an overlap below 1.
    """
    if overlap < 1:
        raise InputError(f"--sequential must be at least 1, got {overlap}")
    return [
        (name, other)
        for index, name in enumerate(names)
        for other in names[index + 1 : index + 1 + overlap]
    ]


def listed_pairs(path: Path) -> dict[int, tuple[str, str]]:
    """Pairs of a text file as hloc and COLMAP write it, by the number of their line.

    Each line holds two names; empty lines and those that start with # are ignored.

    Raises:
        InputError: the file cannot be read, or a line is not two names.
    """
    pairs = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise InputError(f"{path}, line {number}: expected two names of images, got '{line}'")
        pairs[number] = words[0], words[1]
    return pairs


def read_pairs(path: Path, names: list[str]) -> list[tuple[str, str]]:
    """Different pairs of the images `names` from a text file, see `listed_pairs`.

    Raises:
        InputError: see `listed_pairs`, or a line is not two different names of images.
    """
    known, pairs = set(names), {}
    for number, pair in listed_pairs(path).items():
        if pair[0] == pair[1]:
            raise InputError(f"{path}, line {number}: pairs '{pair[0]}' with itself")
        for name in pair:
            if name not in known:
                raise InputError(f"{path}, line {number}: there is no image '{name}' in the folder")
        # a pair counts once, in the order of its first occurrence
        pairs.setdefault(frozenset(pair), pair)
    if not pairs:
        raise InputError(f"{path}: there is no pair in it")
    return list(pairs.values())


def export(
    folder: Path,
    output: Path,
    extractor: Extractor,
    choose_pairs: Callable[[list[str]], list[tuple[str, str]]] = exhaustive_pairs,
    matching: MatcherOptions | None = None,
    colmap: ColmapOptions | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    recursive: bool = False,
) -> ExportResult:
    """Extract and match all images of a folder, and write them in the format of `output`'s suffix.

    Images that cannot be read are left out.

    Args:
        folder: with images.
        output: .npz; .h5 (features; matches go to NAME-matches.h5 next to it, and the pairs to
            NAME-pairs.txt); .db (COLMAP).
        extractor: extracts the features, which stay in memory until all pairs are matched.
        choose_pairs: names -> pairs to match.
        matching: None for the defaults.
        colmap: for .db, None for the defaults.
        overwrite: whether existing files may be replaced.
        progress: whether to show progress bars, None for "on a terminal".
        recursive: whether to include subfolders; names are then relative paths.

    Raises:
        InputError: the folder has no images, none of them can be read, or the suffix of
            `output` is unknown.
        OutputExistsError: an output file exists.
        ScfeatError: the library for that format is not installed, or cannot write the file.
    """
    matching, colmap = matching or MatcherOptions(), colmap or ColmapOptions()
    check_export(output, colmap, overwrite)
    files = {f.relative_to(folder).as_posix(): f for f in list_images(folder, recursive)}
    names = list(files)
    for name in names:
        if printable(name) != name:
            raise InputError(
                f"{folder / printable(name)}: rename this image, its name is not UTF-8"
            )
        if len(name.split()) > 1 and output.suffix != ".npz":
            raise InputError(
                f"{folder / name}: rename this image, the lists of pairs of hloc and COLMAP cannot "
                "hold a name with a blank in it"
            )
    if output.suffix == ".h5":
        _check_hloc_names(folder, names)
    pairs = choose_pairs(names)
    disable = None if progress is None else not progress
    with ExitStack() as stack:
        targets = _targets(output)
        partial = [stack.enter_context(staged_file(target, overwrite)) for target in targets]
        features: dict[str, Features] = {}
        left_out = []
        bar = tqdm(files.items(), "features", unit=" images", disable=disable, file=sys.stderr)
        for name, file in bar:
            try:
                features[name] = extractor(read_file(file))
            except InputError as error:
                left_out.append(str(error))
        if not features:
            raise InputError(f"{folder}: not a single image can be read ({left_out[0]})")
        pairs = [pair for pair in pairs if features.keys() >= set(pair)]
        counter = _Counter(_matched(features, pairs, matching, extractor, disable))
        if output.suffix == ".npz":
            _write_npz(partial[0], features, counter)
        elif output.suffix == ".h5":
            _write_h5(*partial, features, counter)
        else:
            try:
                _write_colmap(partial[0], features, counter, folder, colmap)
            except RuntimeError as error:  # COLMAP's; it does not say whether the disk is full
                if is_out_of_memory(error):
                    raise
                raise ScfeatError(
                    f"{output}: COLMAP cannot write it ({error}); is the disk full?"
                ) from error
    return ExportResult(
        files=targets,
        images=len(features),
        keypoints=sum(len(f) for f in features.values()),
        pairs=len(pairs),
        matches=counter.matches,
        left_out=left_out,
    )


def check_export(output: Path, colmap: ColmapOptions, overwrite: bool) -> None:
    """Check that the files can be written; raises as `export`."""
    if output.suffix not in FORMATS:
        raise InputError(f"{output}: the name must end with one of {', '.join(FORMATS)}")
    for target in _targets(output):
        check_file(target, overwrite)
    if output.suffix == ".h5":
        import_optional("h5py", "the .h5 format")
    elif output.suffix == ".db":
        models = import_optional("pycolmap", "the .db format").CameraModelId
        if not hasattr(models, colmap.camera_model):
            raise InputError(f"--camera-model {colmap.camera_model}: COLMAP has no such model")


def _targets(output: Path) -> list[Path]:
    """The files of an export."""
    if output.suffix != ".h5":
        return [output]
    beside = ("-matches.h5", "-pairs.txt")
    return [output, *(output.with_name(f"{output.stem}{ending}") for ending in beside)]


class _Counter:
    """Iterates over matched pairs and counts the matches."""

    def __init__(self, pairs: MatchedPairs) -> None:
        self._pairs = pairs
        self.matches = 0

    def __iter__(self) -> Iterator[tuple[str, str, Matches]]:
        for first, second, matches in self._pairs:
            self.matches += len(matches)
            yield first, second, matches


def _matched(
    features: dict[str, Features],
    pairs: list[tuple[str, str]],
    matching: MatcherOptions,
    extractor: Extractor,
    disable: bool | None,
) -> Iterator[tuple[str, str, Matches]]:
    for first, second in tqdm(pairs, "matches", unit=" pairs", disable=disable, file=sys.stderr):
        yield (
            first,
            second,
            match_with(matching, features[first], features[second], extractor.device),
        )


def _write_npz(path: Path, features: dict[str, Features], pairs: MatchedPairs) -> None:
    """Arrays NAME/keypoints, /scores, /descriptors, /image_size; matches/NAME/NAME/indices,
    /similarity.

    Arrays are written one at a time, to the archive format of numpy.load.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def put(key: str, array: np.ndarray) -> None:
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)

        for name, f in features.items():
            put(f"{name}/keypoints", f.keypoints)
            put(f"{name}/scores", f.scores)
            put(f"{name}/descriptors", f.descriptors)
            put(f"{name}/image_size", np.array(f.image_size))
        for first, second, matches in pairs:
            put(f"matches/{first}/{second}/indices", matches.indices)
            put(f"matches/{first}/{second}/similarity", matches.similarity)


def _write_h5(
    features_path: Path,
    matches_path: Path,
    pairs_path: Path,
    features: dict[str, Features],
    pairs: MatchedPairs,
) -> None:
    """hloc's layout: descriptors are (D, N); matches0 gives for every keypoint of the first
    image its match in the second or -1, and matching_scores0 its similarity.
    """
    with _h5_file(features_path) as file:
        for name, f in features.items():
            group = file.create_group(name)
            keypoints = group.create_dataset("keypoints", data=f.keypoints)
            # the standard deviation of a keypoint in pixels, as hloc stores it
            keypoints.attrs["uncertainty"] = 1.0
            group.create_dataset("scores", data=f.scores)
            group.create_dataset("descriptors", data=f.descriptors.T)
            group.create_dataset("image_size", data=np.array(f.image_size))
    with (
        _h5_file(matches_path) as file,
        pairs_path.open("w", encoding="utf-8") as listing,
    ):
        for first, second, matches in pairs:
            count = len(features[first])
            indices = np.full(count, -1, np.int32)
            scores = np.zeros(count, np.float16)
            indices[matches.indices[:, 0]] = matches.indices[:, 1]
            scores[matches.indices[:, 0]] = matches.similarity
            group = file.create_group(f"{_hloc_name(first)}/{_hloc_name(second)}")
            group.create_dataset("matches0", data=indices)
            group.create_dataset("matching_scores0", data=scores)
            listing.write(f"{first} {second}\n")


def _hloc_name(name: str) -> str:
    """An image's name as part of an HDF5 path: slashes, which separate groups, are replaced."""
    return name.replace("/", "-")


def _check_hloc_names(folder: Path, names: list[str]) -> None:
    """Check that names stay unique in hloc's files.

    Raises:
        InputError: two images get the same name.
    """
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(_hloc_name(name), name)
        if other != name:
            raise InputError(
                f"{folder / name}: rename this image, in the names of hloc's pairs it is the same "
                f"as {folder / other}"
            )


@contextmanager
def _h5_file(path: Path) -> Iterator[Any]:
    import h5py

    try:
        with h5py.File(path, "w", libver="latest") as file:
            yield file
    except (OSError, RuntimeError) as error:
        # closing the file on a full disk fails again; h5py's message is long, errno's is not
        cause = error if isinstance(error, OSError) else error.__context__
        number = getattr(cause, "errno", None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number)) from error


def _write_colmap(
    database_path: Path,
    features: dict[str, Features],
    pairs: MatchedPairs,
    folder: Path,
    options: ColmapOptions,
) -> None:
    """Cameras, images, keypoints, matches and verified two-view geometries for COLMAP's mapper."""
    import pycolmap

    pycolmap.logging.minloglevel = pycolmap.logging.Level.ERROR.value
    with pycolmap.Database.open(database_path):
        pass  # create the file, which import_images needs
    mode = pycolmap.CameraMode.SINGLE if options.single_camera else pycolmap.CameraMode.AUTO
    pycolmap.import_images(
        database_path,
        folder,
        mode,
        image_names=list(features),
        options=pycolmap.ImageReaderOptions(camera_model=options.camera_model),
    )
    with TemporaryDirectory(prefix="scfeat-") as scratch:
        listing = Path(scratch) / "pairs.txt"
        with (
            pycolmap.Database.open(database_path) as database,
            listing.open("w", encoding="utf-8") as file,
        ):
            ids = {image.name: image.image_id for image in database.read_all_images()}
            missing = [name for name in features if name not in ids]
            if missing:
                raise InputError(
                    f"{folder / missing[0]}: COLMAP cannot take this image"
                    + (" (is it of another size?)" if options.single_camera else "")
                )
            for name, f in features.items():
                database.write_keypoints(ids[name], f.keypoints + np.float32(0.5))
            for first, second, matches in pairs:
                indices = matches.indices.astype(np.uint32)
                database.write_matches(ids[first], ids[second], indices)
                file.write(f"{first} {second}\n")
        pycolmap.verify_matches(database_path, listing)
