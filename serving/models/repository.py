"""Bundle folders: those that the operator names, and those of a model repository.

Callers name a bundle by the name of its folder, never by a path. A name that is not the plain name of a folder that
lies inside the repository, links followed, does not exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perturbscope.errors import CorruptBundleError, InvalidParameterError, UnknownModelError
from perturbscope.inference.bundle import MANIFEST
from serving.settings import DEFAULT_BUNDLE, PREFIX

_LONGEST_NAME = 255


@dataclass(frozen=True)
class Snapshot:
    """The state of a bundle folder's files.

    Attributes
    ----------
    path
        The folder.
    digest
        SHA-256 of its manifest, which holds the checksums of all other files.
    signature
        Name, size and modification time of each file; changes while files are still being copied.
    """

    path: Path
    digest: str
    signature: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, path: Path) -> Snapshot:
        """Take the state of a folder. Raises CorruptBundleError if it cannot be read."""
        try:
            files = sorted((entry.name, entry.stat()) for entry in path.iterdir())
            digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
        except OSError as error:
            raise CorruptBundleError(f"{path} cannot be read: {error}. Fetch the bundle again.") from error
        return cls(path, digest, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))


@dataclass(frozen=True)
class Scan:
    """The folders of a repository at one time.

    Attributes
    ----------
    bundles
        Bundle folders by name; ``default`` comes first, the others follow by name.
    others
        Reasons why other folders are no bundles, by name.
    """

    bundles: Mapping[str, Snapshot]
    others: Mapping[str, str]


class Repository:
    """Finds bundle folders by name.

    Parameters
    ----------
    named
        Bundle folders that the settings name; a second one of the same name is called ``name-2``.
    root
        Directory of bundle folders. One with the name of a named folder is left out.
    """

    def __init__(self, named: Sequence[Path], root: Path | None) -> None:
        self.named: dict[str, Path] = {}
        for path in named:
            same = sum(path.name == other.name for other in self.named.values())
            self.named[f"{path.name}-{same + 1}" if same else path.name] = path
        self.root = root

    def find(self, name: str) -> Path:
        """Return the folder of that name.

        Raises
        ------
        InvalidParameterError
            The name is not plain, such as ``../secret`` or ``/etc``.
        UnknownModelError
            There is no such bundle folder.
        CorruptBundleError
            A file of the folder is a link that leads out of the repository.
        """
        if not is_plain(name):
            raise InvalidParameterError(
                "The name is not that of a folder in the model repository: no slashes, no leading dot.", field="name"
            )
        if name in self.named:
            return self.named[name]
        if self.root is None:
            raise UnknownModelError(
                f"No bundle {name!r} is known here, and this server has no model repository ({PREFIX}REPOSITORY).",
                field="name",
            )
        path = self.root / name
        if not self._lies_inside(path) or not (path / MANIFEST).is_file():
            raise UnknownModelError(
                f"The model repository has no bundle folder {name!r}. Copy the bundle there first.", field="name"
            )
        outside = [entry.name for entry in path.iterdir() if not self._lies_inside(entry)]
        if outside:
            raise CorruptBundleError(
                f"The file {outside[0]!r} of the bundle {name!r} is a link that leads out of the repository. Copy the "
                "file itself."
            )
        return path

    def scan(self) -> Scan:
        """Look at all folders of the repository. Names that begin with a dot are left out: writers stage so.

        Raises
        ------
        OSError
            The repository cannot be read now.
        """
        bundles, others = {}, {}
        for entry in sorted(self.root.iterdir(), key=_rank) if self.root else ():
            if entry.name.startswith(".") or entry.name in self.named:
                continue
            try:
                if not entry.is_dir():
                    continue  # a file beside the bundles
                reason = self._reason_against(entry)
                if reason:
                    others[entry.name] = reason
                else:
                    bundles[entry.name] = Snapshot.of(entry)
            except (OSError, CorruptBundleError) as error:
                # It is being moved or written right now, perhaps; the next scan will tell.
                others[entry.name] = error.message if isinstance(error, CorruptBundleError) else f"{error}."
        return Scan(bundles, others)

    def _reason_against(self, path: Path) -> str:
        """Return why a folder is no bundle; empty if it may be one. Raises OSError."""
        if not is_plain(path.name):
            return "Its name has characters that the name of a bundle folder cannot have. Rename it."
        if not self._lies_inside(path):
            return "It is a link that leads out of the repository. Copy the bundle itself."
        if not (path / MANIFEST).is_file():
            return f"The folder has no {MANIFEST}, so it is no bundle. Put one there, or move the folder elsewhere."
        return ""

    def _lies_inside(self, path: Path) -> bool:
        assert self.root is not None  # noqa: S101  callers have looked
        root = self.root.resolve()
        try:
            target = path.resolve()
        except (OSError, RuntimeError):
            return False  # links in a circle
        return target != root and target.is_relative_to(root)


def _rank(path: Path) -> tuple[bool, str]:
    return path.name != DEFAULT_BUNDLE.name, path.name


def is_plain(name: str) -> bool:
    """Whether a name can be the name of a bundle folder."""
    return (
        0 < len(name) <= _LONGEST_NAME
        and name.isprintable()
        and not name.startswith(".")
        and Path(name).name == name
        and "\\" not in name
    )
