"""Names of modules before and after entries of a `ModuleList` are deleted: `blocks.5` becomes `blocks.4`."""

from __future__ import annotations

from collections.abc import Iterable

from diffaccel.pruning.groups import Group


class Numbering:
    """Names in a network, old and new, for a set of deleted list entries (`transformer_blocks.3`, ...)."""

    def __init__(self, deleted: Iterable[str]):
        self._deleted: dict[str, set[int]] = {}  # by the old name of the list
        for name in deleted:
            parent, _, index = name.rpartition(".")
            self._deleted.setdefault(parent, set()).add(int(index))

    def new(self, name: str) -> str | None:
        """New name of what had the old `name` (a module, a parameter); None if it was deleted."""
        old: list[str] = []
        new: list[str] = []
        for part in name.split("."):
            gone = self._deleted.get(".".join(old), ())
            old.append(part)
            if part.isdigit() and int(part) in gone:
                return None
            new.append(str(int(part) - sum(index < int(part) for index in gone)) if part.isdigit() and gone else part)
        return ".".join(new)

    def old(self, name: str) -> str:
        """Old name of what has the new `name`."""
        old: list[str] = []
        for part in name.split("."):
            gone = self._deleted.get(".".join(old), ())
            if part.isdigit() and gone:
                index = int(part)
                for lost in sorted(gone):
                    index += lost <= index
                part = str(index)
            old.append(part)
        return ".".join(old)


def numbering_of(gone: Iterable[Group]) -> Numbering:
    """Names before and after: blocks and layers are deleted from their lists, other modules leave something behind."""
    return Numbering(name for group in gone if group.kind in ("block", "layer") for name in group.modules)
