"""Records of changes that bind and unbind make: as JSON, in words, and back from a file, to undo the changes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from pyvfio import pci
from pyvfio.cli.common import Json
from pyvfio.errors import RollbackError, VfioError
from pyvfio.kernel import Kernel
from pyvfio.pci.cdevs import iommufd_node
from pyvfio.pci.persistence import ETC, binding_of, replace_file
from pyvfio.pci.refusals import checked_name
from pyvfio.pci.sysfs import printable

SCHEMA = "pyvfio.bind/1"


class Tools(NamedTuple):
    """The kernel, and the functions and the directory through which a command changes the machine."""

    kernel: Kernel
    write: pci.SysfsWriter = pci.write_sysfs
    own: pci.NodeOwner = pci.set_ownership
    etc: Path = ETC


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a device: of the driver and the rights, of the rule file, or of both."""

    binding: pci.Binding | None = None
    rule: pci.RuleChange | None = None


def undo(change: Change, tools: Tools, *, dry_run: bool = False, force: bool = False) -> Change:
    """Undo a change, wholly or not at all. Return the change that the undo has made."""
    rule = None
    if change.rule is not None and not dry_run:
        rule = pci.restore_rule(change.rule, etc=tools.etc)
    if change.binding is None:
        return Change(None, rule)
    try:
        binding = pci.restore(
            change.binding, dry_run=dry_run, force=force, kernel=tools.kernel, write=tools.write, own=tools.own
        )
    except Exception as first:
        if rule is not None:
            undo_after(first, Change(None, rule), tools)
        raise
    return Change(binding, rule)


def undo_after(first: Exception, change: Change, tools: Tools) -> None:
    """Undo a change after a failure. Raises RollbackError if the undo fails too."""
    try:
        undo(change, tools)
    except (VfioError, OSError) as second:
        raise RollbackError("a failed change could not be undone", [first, second]) from first


# --- To JSON -----------------------------------------------------------------------------------------------------


def failed(bdf: str | None, error: Exception) -> Json:
    """Return the result of a device whose change failed, or was not begun."""
    return {"bdf": bdf, "done": False, "error": str(error)}


def as_json(bdf: str, change: Change, *, dry_run: bool) -> Json:
    """Return the result of a device whose change is done, or planned with `dry_run`."""
    result: dict[str, Json] = {"bdf": bdf, "done": not dry_run, "error": None}
    if (binding := change.binding) is not None:
        result |= {
            "driver": binding.driver,
            "former_driver": binding.former_driver,
            "former_override": binding.former_override,
            "steps": [{"path": str(step.path), "value": step.value} for step in binding.steps],
            "nodes": [_node_as_json(node) for node in binding.nodes],
        }
    if (rule := change.rule) is not None:
        result["rule"] = {
            "path": str(rule.path),
            "now": None if rule.now is None else asdict(rule.now),
            "former": None if rule.former is None else asdict(rule.former),
        }
    return result


def _node_as_json(node: pci.NodeChange) -> Json:
    return {"path": str(node.path), "now": list(node.now), "former": list(node.former)}


# --- In words ----------------------------------------------------------------------------------------------------


def in_words(change: Change) -> str:
    """Return a line about a change that is done."""
    parts = []
    if (binding := change.binding) is not None:
        driver = printable(binding.driver or "no driver")
        former = printable(binding.former_driver or "no driver")
        override = f", driver_override {printable(binding.former_override)}" if binding.former_override else ""
        parts.append(f"{driver} (was: {former}{override})" if binding.steps else f"{driver} already")
        parts += [f"{node.path} for {node.now.user}:{node.now.group}" for node in binding.nodes]
    if (rule := change.rule) is not None:
        parts.append(f"{rule.path} {'removed' if rule.now is None else 'written'}")
    return "; ".join(parts) or "unchanged"


def as_script(bdf: str, change: Change, rights: Sequence[str] = ()) -> str:
    """Return the shell commands that make a planned change. `rights` are the commands that give the nodes away."""
    lines = []
    if (binding := change.binding) is not None:
        driver = printable(binding.former_driver or "no driver")
        lines.append(f"# {bdf}, which has {driver}" if binding.steps else f"# {bdf}: {driver} already")
        lines += [*map(str, binding.steps), *rights]
    if (rule := change.rule) is not None:
        if rule.now is None:
            lines.append(f"rm {rule.path}")
        else:
            lines.append(f"cat > {rule.path} << 'END'\n{rule.now.rule}END")
    return "\n".join(lines)


# --- Files -------------------------------------------------------------------------------------------------------


class UndoFile:
    """A file with the document of all changes that a command has made so far, written again after each change.

    Raises: VfioError if the file exists already, or if the directory is missing or not writable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results: list[Json] = []
        if path.exists() or path.is_symlink():
            raise VfioError(
                f"{path} exists already, and may be the only record of former drivers",
                hint=f"Undo the changes first: pyvfio unbind --undo {path}; or name another file",
            )
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise VfioError(f"{path} cannot be written: {path.parent} is missing, or is not writable")

    def add(self, bdf: str, change: Change) -> None:
        """Add a change. Raises VfioError if the file cannot be written; the file then holds the former changes."""
        results = [*self._results, as_json(bdf, change, dry_run=False)]
        try:
            if not self._results:
                self._path.touch(0o644, exist_ok=False)  # another process can have made the file since the check
            replace_file(self._path, json.dumps({"schema": SCHEMA, "results": results}, indent=2) + "\n")
        except OSError as error:
            raise VfioError(f"{self._path} could not be written: {error.strerror}") from error
        self._results = results


def read_changes(path: Path, kernel: Kernel) -> dict[str, Change]:
    """Return the changes in the document of a bind or unbind by BDF, in reverse order. Failed results are left out.

    Raises: VfioError if the file cannot be read, or is not a document of bind.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        results = _results_of(document)
        found = {pci.parse_bdf(str(each["bdf"])): _change_of(each, kernel) for each in results if each["done"]}
    except OSError as error:
        raise VfioError(f"{path} could not be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise VfioError(
            f"{path} is not a document of pyvfio bind: {type(error).__name__}, {error}",
            hint=f"Such a file comes from pyvfio bind --undo FILE or --json, and begins with schema {SCHEMA}",
        ) from error
    return dict(reversed(found.items()))


def _results_of(document: dict[str, Json]) -> list[dict[str, object]]:
    if document["schema"] != SCHEMA:
        raise ValueError(f"the schema is {document['schema']!r}")
    results: list[dict[str, object]] = document["results"]  # type: ignore[assignment]
    return results


def remove_done(path: Path) -> None:
    """Remove a file whose changes are all undone."""
    with suppress(OSError):
        path.unlink()


def _change_of(fields: Mapping[str, object], kernel: Kernel) -> Change:
    binding = None
    bdf = pci.parse_bdf(str(fields["bdf"]))
    if "former_driver" in fields:
        driver, former, override = (_name(fields[key]) for key in ("driver", "former_driver", "former_override"))
        nodes = fields.get("nodes", [])
        if not isinstance(nodes, list):
            raise TypeError("nodes is a list")
        binding = pci.Binding(bdf, driver, former, override, (), tuple(_node_of(node, kernel) for node in nodes))
    rule = fields.get("rule")
    return Change(binding, _rule_of(bdf, rule) if isinstance(rule, dict) else None)


def _name(value: object) -> str | None:
    return None if value is None else checked_name(str(value))


def _node_of(fields: Mapping[str, object], kernel: Kernel) -> pci.NodeChange:
    path = Path(str(fields["path"]))
    # The file can come from elsewhere: no file changes the owner of anything but a node of VFIO.
    if ".." in path.parts or (kernel.dev / "vfio" not in path.parents and path != iommufd_node(kernel)):
        raise ValueError(f"{path} is not below {kernel.dev / 'vfio'}, and is not {iommufd_node(kernel)}")
    return pci.NodeChange(path, _ownership_of(fields["now"]), _ownership_of(fields["former"]))


def _ownership_of(numbers: object) -> pci.Ownership:
    if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
        raise TypeError("an ownership is a user, a group and a mode")
    user, group, mode = numbers
    return pci.Ownership(user, group, mode)


def _rule_of(bdf: str, fields: Mapping[str, object]) -> pci.RuleChange:
    now, former = (None if (value := fields[key]) is None else _persistent(value) for key in ("now", "former"))
    if any(each is not None and each.bdf != bdf for each in (now, former)) or now is former is None:
        raise ValueError(f"the rule is not of {bdf}")
    return pci.RuleChange(Path(str(fields["path"])), now, former)


def _persistent(value: object) -> pci.PersistentBinding:
    if not isinstance(value, dict):
        raise TypeError("a persistent binding is an object")
    return binding_of(value)
