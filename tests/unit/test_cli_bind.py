"""Rights, persistent bindings and undo files of bind and unbind, on a tree that looks like sysfs and /dev."""

from __future__ import annotations

import doctest
import errno
import grp
import importlib
import json
import os
import pwd
import re
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from pyvfio import pci
from pyvfio.cli import bind, unbind
from pyvfio.cli.changes import Tools
from pyvfio.cli.common import guard
from pyvfio.errors import RollbackError, UnavailableError, VfioError
from pyvfio.pci.persistence import binding_of, replace_file
from tests.interruptions.points import Walk
from tests.unit.processes import open_fds
from tests.unit.sysfs import BRIDGE, SysfsTree, link

NIC, SOUND, PORT, OTHER = "0000:01:00.0", "0000:01:00.1", "0000:00:1c.0", "0000:02:00.0"
ME = f"{os.getuid()}:{os.getgid()}"
"""An owner that any user can give to a file."""


class Machine(SysfsTree):
    """Group 7: a bridge with a network and a sound device behind; group 8: another network device. A group has a node
    while vfio-pci has one of the devices, as in `vfio_create_group`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.etc = root / "etc"
        self.rules = self.etc / "udev/rules.d"
        self.rules.mkdir(parents=True)
        self.owned: list[tuple[Path, pci.Ownership]] = []
        self.refuse: Callable[[Path], OSError | None] = lambda _path: None
        self.make_node: Callable[[Path], object] = _make_node
        link(self.pci / "drivers/vfio-pci/module", self.sysfs / "module/vfio_pci")
        (self.sysfs / "class/vfio").mkdir(parents=True)
        self.add_device(PORT, driver="pcieport", group=7, class_code=BRIDGE)
        self.add_device(NIC, driver="e1000e", group=7)
        self.add_device(SOUND, driver="snd_hda_intel", group=7)
        self.add_device(OTHER, driver="igb", group=8)

    def write(self, path: Path, value: str) -> None:
        super().write(path, value)
        for group in self.sysfs.glob("kernel/iommu_groups/*"):
            node = self.dev / "vfio" / group.name
            bound = [self.driver_of(member.name) for member in (group / "devices").iterdir()]
            if "vfio-pci" not in bound:
                node.unlink(missing_ok=True)
            elif not node.exists():
                self.make_node(node)

    def own(self, path: Path, ownership: pci.Ownership) -> None:
        """Set an ownership, as chown(2) and chmod(2), with a list of all calls."""
        self.owned.append((path, ownership))
        if (error := self.refuse(path)) is not None:
            raise error
        pci.set_ownership(path, ownership)

    def bind(self, *words: str) -> int:
        """Run pyvfio bind."""
        return guard(
            lambda: bind.main(words, kernel=self.kernel, write=self.write, own=self.own, etc=self.etc),
            name=bind.NAME,
        )

    def unbind(self, *words: str) -> int:
        """Run pyvfio unbind."""
        return guard(
            lambda: unbind.main(words, kernel=self.kernel, write=self.write, own=self.own, etc=self.etc),
            name=unbind.NAME,
        )

    def give(self, bdf: str, rights: str = ME, *, patience: float = 0.0) -> pci.Binding:
        """Bind a device with rights."""
        return pci.bind(
            bdf,
            rights=pci.Rights.parse(rights),
            patience=patience,
            kernel=self.kernel,
            write=self.write,
            own=self.own,
        )

    def restore(self, binding: pci.Binding) -> pci.Binding:
        """Undo a change."""
        return pci.restore(binding, kernel=self.kernel, write=self.write, own=self.own)

    def persist(self, bdf: str, driver: str = "vfio-pci", *, rights: str | None = None) -> pci.RuleChange:
        """Write a rule file."""
        given = None if rights is None else pci.Rights.parse(rights)
        return pci.persist(bdf, driver, rights=given, kernel=self.kernel, etc=self.etc)

    def files(self) -> dict[str, str]:
        """Return all files of the directory of rules, hidden ones included."""
        return {path.name: path.read_text() for path in sorted(self.rules.iterdir())}

    def drivers(self) -> dict[str, tuple[str | None, str | None]]:
        """Return the driver and the override of each device."""
        return {bdf: (self.driver_of(bdf), self.override_of(bdf)) for bdf in (PORT, NIC, SOUND, OTHER)}


def _make_node(node: Path) -> None:
    node.touch()
    node.chmod(0o600)


def mode_of(node: Path) -> int:
    return stat.S_IMODE(node.stat().st_mode)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """The machine of most tests."""
    return Machine(tmp_path)


# --- Rights


@pytest.mark.parametrize(
    ("text", "user", "group"),
    [
        ("1000", 1000, None),
        ("1000:36", 1000, 36),
        (":36", None, 36),
        ("root", 0, None),
        ("root:root", 0, 0),
        ("0:", 0, None),
    ],
)
def test_rights_are_written_as_chown_takes_them(text: str, user: int | None, group: int | None) -> None:
    assert pci.Rights.parse(text) == pci.Rights(user, group)


@pytest.mark.parametrize("text", ["", ":", "a:b:c", "a b", "4294967295", ":4294967295", "a\n", "-1 "])
def test_other_text_is_no_rights(text: str) -> None:
    with pytest.raises(ValueError, match=r"USER, USER:GROUP or :GROUP|number of a"):
        pci.Rights.parse(text)


def test_users_and_groups_are_named_as_the_machine_names_them() -> None:
    """A user and a group of one name can have two numbers."""
    for user in pwd.getpwall():
        if re.fullmatch(r"[a-z_-]+", user.pw_name):
            assert pci.Rights.parse(user.pw_name) == pci.Rights(pwd.getpwnam(user.pw_name).pw_uid)
    for group in grp.getgrall():
        if re.fullmatch(r"[a-z_-]+", group.gr_name):
            assert pci.Rights.parse(f":{group.gr_name}") == pci.Rights(None, grp.getgrnam(group.gr_name).gr_gid)


def test_the_user_and_the_group_of_a_file_are_set(tmp_path: Path) -> None:
    """With the mode. A user who is not root can give the own ids alone."""
    user, group = (1000, 36) if os.getuid() == 0 else (os.getuid(), os.getgid())
    (tmp_path / "node").touch()
    pci.set_ownership(tmp_path / "node", pci.Ownership(user, group, 0o640))
    status = (tmp_path / "node").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (user, group, 0o640)


def test_rights_of_nobody_are_an_error() -> None:
    with pytest.raises(ValueError, match="a user, a group, or both"):
        pci.Rights()
    with pytest.raises(TypeError, match="number of a user"):
        pci.Rights(user="alice")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rights are Rights"):
        pci.bind(NIC, rights="alice")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["user", "group"])
@pytest.mark.parametrize("beside", [{}, {"user": 1}, {"group": 1}])
def test_a_user_and_a_group_are_ids(kind: str, beside: dict[str, int]) -> None:
    """The last number means none to chown(2). Each of the two is looked at, with or without the other."""
    for number in (0, 0xFFFF_FFFE):
        assert getattr(pci.Rights(**{**beside, kind: number}), kind) == number
    for number in (-1, 0xFFFF_FFFF, 1 << 32):
        with pytest.raises(ValueError, match=f"the number of a {kind} is 0 to 4294967294, not {number}"):
            pci.Rights(**{**beside, kind: number})
    for wrong in (True, 1.0, "alice"):
        with pytest.raises(TypeError, match=f"the {kind} is the number of a {kind}, not {type(wrong).__name__}"):
            pci.Rights(**{**beside, kind: wrong})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rights are text, such as 'alice' or 'alice:kvm', not int"):
        pci.Rights.parse(7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rights", "former", "mode"),
    [("7", 0o600, 0o600), (":7", 0o600, 0o660), ("7:7", 0o600, 0o660), ("7", 0o660, 0o660), ("7", 0o000, 0o600)],
)
def test_rights_are_added_and_none_is_removed(rights: str, former: int, mode: int) -> None:
    now = pci.Rights.parse(rights).applied_to(pci.Ownership(1, 2, former))
    assert now.mode == mode
    assert now.user == (1 if rights.startswith(":") else 7)
    assert now.group == (7 if ":" in rights else 2)


def test_the_nodes_of_the_group_of_the_device_and_of_iommufd_get_the_rights(machine: Machine) -> None:
    cdev, iommufd = machine.add_cdev(NIC, "vfio0"), machine.dev / "iommu"
    iommufd.chmod(0o600)
    binding = machine.give(NIC)
    group = machine.dev / "vfio/7"
    assert [(node.path, node.now) for node in binding.nodes] == machine.owned
    assert [path for path, _ownership in machine.owned] == [group, cdev, iommufd]
    assert mode_of(group) == mode_of(cdev) == mode_of(iommufd) == 0o660
    machine.restore(binding)
    assert mode_of(iommufd) == 0o600


def test_a_kernel_without_nodes_of_groups_has_the_node_of_the_device_to_give(machine: Machine) -> None:
    """CONFIG_VFIO_GROUP is off, so that nobody waits for the node of the group."""
    (machine.sysfs / "class/vfio").rmdir()
    machine.make_node = lambda _node: None
    cdev = machine.add_cdev(NIC, "vfio0")
    machine.give(NIC)
    assert [path for path, _ownership in machine.owned] == [cdev]


@pytest.mark.parametrize(
    ("rights", "former", "now"),
    [
        ("1000", (0, 0, 0o660), (1000, 0, 0o660)),
        (":36", (0, 0, 0o660), (0, 36, 0o660)),
        ("1000:36", (0, 0, 0o600), (1000, 36, 0o660)),
        ("1000", (1000, 0, 0o660), (1000, 0, 0o660)),
        ("1000", (0, 36, 0o660), (1000, 36, 0o660)),
        (":36", (1000, 0, 0o660), (1000, 36, 0o660)),
        ("1001", (1000, 0, 0o660), (1000, 0, 0o666)),
        (":37", (0, 36, 0o660), (0, 36, 0o666)),
        (":37", (0, 36, 0o600), (0, 37, 0o660)),
        (":37", (0, 36, 0o640), (0, 36, 0o666)),
        (":37", (0, 36, 0o620), (0, 36, 0o666)),
        (":37", (0, 36, 0o611), (0, 37, 0o671)),
        ("1001:37", (1000, 36, 0o660), (1000, 36, 0o666)),
        ("1001:36", (1000, 36, 0o660), (1000, 36, 0o666)),
        ("1000:37", (1000, 36, 0o660), (1000, 36, 0o666)),
        ("1001", (0, 0, 0o666), (0, 0, 0o666)),
        ("1001", (1000, 0, 0o1666), (1000, 0, 0o1666)),
        ("1001", (0, 0, 0o646), (1001, 0, 0o646)),
    ],
)
def test_the_second_user_of_iommufd_takes_nothing_from_the_first(
    rights: str, former: tuple[int, int, int], now: tuple[int, int, int]
) -> None:
    """A node has one owner and one group: with another user or group, all users get the node."""
    assert pci.Rights.parse(rights).shared_on(pci.Ownership(*former)) == pci.Ownership(*now)


def test_a_node_of_iommufd_that_all_users_have_keeps_the_owner(machine: Machine) -> None:
    machine.add_cdev(NIC, "vfio0")
    (machine.dev / "iommu").chmod(0o666)
    given: list[str] = []
    rights = pci.Rights(user=os.getuid() + 1)
    pci.bind(
        NIC,
        rights=rights,
        patience=0,
        kernel=machine.kernel,
        write=machine.write,
        own=lambda path, _ownership: given.append(path.name),
    )
    assert given == ["7", "vfio0"]


def test_iommufd_stays_with_a_user_who_has_the_node_of_another_device(machine: Machine) -> None:
    """The undo of the first device leaves the second one usable. The last undo takes the node of iommufd back."""
    first, second, iommufd = machine.add_cdev(NIC, "vfio0"), machine.add_cdev(OTHER, "vfio1"), machine.dev / "iommu"
    for node in (first, second, iommufd):
        node.chmod(0o600)
    one, other = machine.give(NIC), machine.give(OTHER)
    assert [change.path for change in other.nodes] == [machine.dev / "vfio/8", second]
    machine.restore(one)
    assert (mode_of(first), mode_of(second), mode_of(iommufd)) == (0o600, 0o660, 0o660)
    second.unlink()  # as the kernel does when the driver is unbound
    iommufd.chmod(0o600)
    again = machine.give(NIC)
    machine.restore(again)
    assert mode_of(iommufd) == 0o600


def test_an_undo_file_has_the_node_of_iommufd_and_no_other_node_outside_of_vfio(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.add_cdev(NIC, "vfio0")
    iommufd, file = machine.dev / "iommu", machine.etc.parent / "undo"
    iommufd.chmod(0o600)
    assert machine.bind("--user", ME, "--undo", str(file), NIC) == 0
    assert mode_of(iommufd) == 0o660
    text = file.read_text()
    file.write_text(text.replace(str(iommufd), str(machine.dev / "iommu2")))
    assert machine.unbind("--undo", str(file)) == 1
    assert "is not below" in capsys.readouterr().err
    file.write_text(text)
    assert machine.unbind("--undo", str(file)) == 0
    assert mode_of(iommufd) == 0o600


def test_a_kernel_without_device_nodes_shows_a_directory_without_a_number(machine: Machine) -> None:
    """CONFIG_VFIO_DEVICE_CDEV is off: the name has no node."""
    (machine.pci / "devices" / NIC / "vfio-dev/vfio0").mkdir(parents=True)
    assert [node.path.name for node in machine.give(NIC).nodes] == ["7"]


def test_a_node_that_is_late_is_waited_for(machine: Machine) -> None:
    """As where udevd, and not the kernel, makes the nodes."""
    machine.make_node = lambda node: threading.Timer(0.05, _make_node, [node]).start()
    machine.give(NIC, patience=60)
    assert mode_of(machine.dev / "vfio/7") == 0o660


def test_where_no_node_appears_the_former_driver_is_back(machine: Machine) -> None:
    before = machine.drivers()
    machine.make_node = lambda _node: None
    with pytest.raises(UnavailableError, match=r"there is no .*vfio/7, although the device is bound"):
        machine.give(NIC)
    assert machine.drivers() == before


def test_a_right_that_cannot_be_given_leaves_the_driver_and_the_other_node_as_they_were(machine: Machine) -> None:
    machine.give(SOUND)  # so that the node of the group stays
    machine.owned.clear()
    group, before = machine.dev / "vfio/7", machine.drivers()
    group.chmod(0o600)
    cdev = machine.add_cdev(NIC, "vfio0")
    machine.refuse = lambda path: PermissionError(errno.EPERM, "Operation not permitted") if path == cdev else None
    with pytest.raises(VfioError, match=f"the owner of {cdev} could not be changed: Operation not permitted"):
        machine.give(NIC)
    assert machine.drivers() == before
    assert [path for path, _ownership in machine.owned] == [group, cdev, cdev, group]
    assert mode_of(group) == mode_of(cdev) == 0o600


def test_rights_for_a_device_without_a_vfio_driver_are_refused(machine: Machine) -> None:
    before = machine.drivers()
    with pytest.raises(VfioError, match="no driver: without a VFIO driver there is no node"):
        pci.bind(NIC, pci.NO_DRIVER, rights=pci.Rights(1), kernel=machine.kernel, write=machine.write)
    assert machine.drivers() == before


def test_a_device_that_has_the_driver_already_gets_the_rights(machine: Machine) -> None:
    machine.bind(NIC)
    assert mode_of(machine.dev / "vfio/7") == 0o600
    binding = machine.give(NIC)
    assert binding.steps == ()
    assert mode_of(machine.dev / "vfio/7") == 0o660
    machine.restore(binding)
    assert mode_of(machine.dev / "vfio/7") == 0o600
    assert machine.driver_of(NIC) == "vfio-pci"


def test_restore_takes_the_rights_back_and_can_be_undone(machine: Machine) -> None:
    """The node stays: another device of the group has vfio-pci."""
    machine.bind(SOUND)
    group, before = machine.dev / "vfio/7", machine.drivers()
    binding = machine.give(NIC)
    back = machine.restore(binding)
    assert mode_of(group) == 0o600
    assert machine.drivers() == before
    machine.restore(back)
    assert mode_of(group) == 0o660
    assert machine.driver_of(NIC) == "vfio-pci"


def test_restore_leaves_a_node_that_somebody_has_changed_since(machine: Machine) -> None:
    machine.bind(SOUND)
    binding = machine.give(NIC)
    (machine.dev / "vfio/7").chmod(0o640)
    machine.restore(binding)
    assert mode_of(machine.dev / "vfio/7") == 0o640
    assert machine.driver_of(NIC) == "e1000e"


def test_a_dry_run_of_restore_leaves_the_rights(machine: Machine) -> None:
    machine.bind(SOUND)
    binding = machine.give(NIC)
    machine.owned.clear()
    planned = pci.restore(binding, dry_run=True, kernel=machine.kernel, write=machine.write, own=machine.own)
    assert (machine.owned, planned.nodes) == ([], ())
    assert mode_of(machine.dev / "vfio/7") == 0o660
    assert machine.driver_of(NIC) == "vfio-pci"


def test_restore_leaves_out_a_node_that_is_gone(machine: Machine) -> None:
    """And restores the others."""
    cdev = machine.add_cdev(NIC, "vfio0")
    machine.bind(SOUND)
    cdev.chmod(0o600)
    binding = machine.give(NIC)
    assert [change.path for change in binding.nodes[:2]] == [machine.dev / "vfio/7", cdev]
    cdev.unlink()
    back = machine.restore(binding)
    assert machine.dev / "vfio/7" in [change.path for change in back.nodes]
    assert mode_of(machine.dev / "vfio/7") == 0o600


def test_rights_that_a_user_has_are_no_change(machine: Machine) -> None:
    """Nothing is set, and nothing is to be restored."""
    machine.give(NIC)
    machine.owned.clear()
    assert machine.give(NIC).nodes == ()
    assert machine.owned == []


@pytest.mark.parametrize(
    ("number", "refusal"), [(errno.EPERM, True), (errno.EACCES, True), (errno.EROFS, True), (errno.EIO, False)]
)
def test_a_right_that_is_refused_is_told_with_what_helps(machine: Machine, number: int, *, refusal: bool) -> None:
    """Root is not advised to run as root."""
    machine.refuse = lambda path: OSError(number, os.strerror(number), str(path))
    with pytest.raises(VfioError) as caught:
        machine.give(NIC)
    group = machine.dev / "vfio/7"
    assert caught.value.message == f"the owner of {group} could not be changed: {os.strerror(number)}"
    who = "Run as root" if os.geteuid() else "A mount, a user namespace or a security module refuses root"
    assert caught.value.hint == (who if refusal else "")


def test_a_right_that_cannot_be_taken_back_is_noted_at_the_first_error(machine: Machine) -> None:
    """With the ownership that the node had."""
    cdev = machine.add_cdev(NIC, "vfio0")
    cdev.chmod(0o600)
    group = machine.dev / "vfio/7"
    machine.refuse = lambda _path: (
        OSError(errno.EIO, "Input/output error") if cdev in [each for each, _ in machine.owned] else None
    )
    with pytest.raises(VfioError, match=f"the owner of {cdev} could not be changed") as caught:
        machine.give(NIC)
    notes = "\n".join(caught.value.__notes__)
    for path in (group, cdev):
        assert f"{path} was not restored to Ownership(" in notes
    assert f"mode={0o600})" in notes


@pytest.mark.parametrize(
    ("mode", "needed"), [(0o660, True), (0o640, False), (0o620, False), (0o600, False), (0o666, True)]
)
@pytest.mark.parametrize("same", [False, True])
def test_iommufd_stays_with_a_group_that_has_the_node_of_another_device(
    machine: Machine, mode: int, *, needed: bool, same: bool
) -> None:
    """To read and to write. A user other than root keeps it in any case, as the owner of all these files."""
    first, second, iommufd = machine.add_cdev(NIC, "vfio0"), machine.add_cdev(OTHER, "vfio1"), machine.dev / "iommu"
    for node in (first, second, iommufd):
        node.chmod(0o600)
    binding = machine.give(NIC, f":{os.getgid()}")
    second.chmod(mode)
    if os.getuid() == 0 and not same:
        os.chown(second, -1, os.getgid() + 1)
    machine.restore(binding)
    stays = os.getuid() != 0 or (needed and same)
    assert mode_of(iommufd) == (0o660 if stays else 0o600)


@pytest.mark.parametrize(("owner", "stays"), [(1000, True), (1001, False), (0, False)])
def test_iommufd_stays_with_a_user_who_owns_the_node_of_another_device(
    machine: Machine, owner: int, *, stays: bool
) -> None:
    """Root needs no right. As a user who cannot give files away, with the own ones alone."""
    first, second, iommufd = machine.add_cdev(NIC, "vfio0"), machine.add_cdev(OTHER, "vfio1"), machine.dev / "iommu"
    for node in (first, second, iommufd):
        node.chmod(0o600)
    is_root = os.getuid() == 0
    binding = machine.give(NIC, "1000" if is_root else ME)
    if is_root:
        os.chown(second, owner, -1)
    machine.restore(binding)
    after = iommufd.stat()
    assert after.st_uid == (1000 if is_root and stays else os.getuid())


def test_an_unknown_user_is_one_line_and_nothing_is_changed(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert machine.bind("--user", "no-such-user", NIC, "--json") == 1
    out, err = capsys.readouterr()
    assert err == "pyvfio bind: there is no user 'no-such-user' on this machine. List the users with: getent passwd\n"
    assert json.loads(out)["results"][0]["done"] is False
    assert machine.bind("--user", ":no-such-group", NIC) == 1
    assert "there is no group 'no-such-group'" in capsys.readouterr().err
    assert machine.writes == []


def test_a_dry_run_shows_the_commands_of_the_rights(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.bind("--dry-run", "--user", "1000:36", NIC) == 0
    node = machine.dev / "vfio/7"
    assert capsys.readouterr().out.splitlines()[-2:] == [f"chown 1000:36 {node}", f"chmod ug+rw {node}"]
    assert machine.writes == []
    assert machine.owned == []


def test_a_dry_run_names_nodes_that_the_kernel_is_going_to_make(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shell finds the name of the device's own node after the bind. A node that everybody has stays as it is."""
    iommufd = machine.add_iommufd()
    assert machine.bind("--dry-run", "--user", "1000", NIC) == 0
    own = f"{machine.dev}/vfio/devices/$(ls {machine.pci}/devices/{NIC}/vfio-dev)"
    assert capsys.readouterr().out.splitlines()[-6:] == [
        f"{command} {path}"
        for path in (machine.dev / "vfio/7", own, iommufd)
        for command in ("chown 1000", "chmod u+rw")
    ]
    iommufd.chmod(0o666)
    cdev = machine.add_cdev(OTHER, "vfio0")
    assert machine.bind("--dry-run", "--user", "1000", OTHER) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"chown 1000 {cdev}", f"chmod u+rw {cdev}"]


def test_a_dry_run_names_no_node_of_iommufd_that_the_device_does_not_need(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """A device of VFIO without a node of its own gets none; one whose /dev lacks iommufd cannot use it."""

    def shown(bdf: str) -> list[str]:
        capsys.readouterr()
        assert machine.bind("--dry-run", "--user", "1000", bdf) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("ch")]

    machine.bind(NIC)
    iommufd, group = machine.add_iommufd(), machine.dev / "vfio/7"
    assert shown(NIC) == [f"chown 1000 {group}", f"chmod u+rw {group}"]
    cdev = machine.add_cdev(NIC, "vfio0")
    iommufd.unlink()
    assert shown(NIC) == [f"{command} {path}" for path in (group, cdev) for command in ("chown 1000", "chmod u+rw")]


def test_a_dry_run_names_the_node_of_a_group_that_comes_later(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a word: the number is the kernel's choice."""
    (machine.sysfs / "class/iommu/0000:00:03.0").mkdir(parents=True)
    machine.add_device("0000:04:00.0", late_group=9)
    assert machine.bind("--dry-run", "--user", "1000", "0000:04:00.0") == 0
    node = machine.dev / "vfio/GROUP"
    assert capsys.readouterr().out.splitlines()[-2:] == [f"chown 1000 {node}", f"chmod u+rw {node}"]


# --- Persistent bindings


def test_a_persistent_binding_is_one_file_that_forget_removes(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    (machine.rules / "60-other.rules").write_text("# somebody else's\n")
    before = machine.files()
    assert machine.bind("--persist", "--user", ME, NIC, OTHER) == 0
    assert machine.files().keys() - before == {f"60-pyvfio-{bdf}.rules" for bdf in (NIC, OTHER)}
    assert machine.bind("--forget", NIC, OTHER) == 0
    assert machine.files() == before
    assert machine.driver_of(NIC) == "vfio-pci"
    assert f"{NIC}: {machine.rules}/60-pyvfio-{NIC}.rules removed" in capsys.readouterr().out


def test_a_rule_file_says_whose_it_is_and_how_to_remove_it(machine: Machine) -> None:
    path = machine.persist(NIC).path
    assert path.read_text().startswith(f"# Written by pyvfio bind --persist. Remove with: pyvfio bind --forget {NIC}\n")
    assert mode_of(path) == 0o644


def test_a_persistent_binding_is_read_back_from_the_file(machine: Machine) -> None:
    wanted = machine.persist(NIC, rights="1000:36").now
    assert pci.persisted(etc=machine.etc) == (wanted,)
    assert wanted == pci.PersistentBinding(NIC, 0x8086, 0x10D3, "vfio-pci", "vfio_pci", pci.Rights(1000, 36))


def test_a_rule_names_the_device_by_address_and_by_id(machine: Machine) -> None:
    """So that another device, which a change of hardware moves to the address, keeps the own driver."""
    rule = machine.persist(NIC).path.read_text()
    for line in (f'KERNEL!="{NIC}", GOTO', 'ATTR{vendor}!="0x8086", GOTO', 'ATTR{device}!="0x10d3", GOTO'):
        assert rule.index(line) < rule.index("ATTR{driver_override}=")
    assert 'TEST!="subsystem/drivers/vfio-pci", RUN{builtin}+="kmod load vfio_pci"\n' in rule


def test_a_rule_without_rights_leaves_the_nodes_alone(machine: Machine) -> None:
    assert 'SUBSYSTEM=="vfio"' not in machine.persist(NIC).path.read_text()
    machine.persist(NIC, rights="1000")
    rule = machine.persist(NIC, rights="1000").path.read_text()
    assert f'SUBSYSTEM=="vfio", TEST=="/sys/kernel/iommu_groups/%k/devices/{NIC}", OWNER:="1000"\n' in rule
    assert f'SUBSYSTEM=="vfio-dev", KERNELS=="{NIC}", OWNER:="1000"\n' in rule
    # A second file, with another user, gives the node of iommufd to everybody.
    assert (
        'SUBSYSTEM=="misc", KERNEL=="iommu", ENV{.PYVFIO_IOMMUFD}=="?*", ENV{.PYVFIO_IOMMUFD}!="1000", MODE:="0666"\n'
        'SUBSYSTEM=="misc", KERNEL=="iommu", ENV{.PYVFIO_IOMMUFD}=="", OWNER="1000", ENV{.PYVFIO_IOMMUFD}="1000"\n'
    ) in rule


def test_a_rule_for_no_driver_probes_none(machine: Machine) -> None:
    rule = machine.persist(NIC, pci.NO_DRIVER).path.read_text()
    assert 'ATTR{driver_override}="none"' in rule
    assert "driver/unbind" in rule
    assert "drivers_probe" not in rule
    assert "kmod" not in rule


def test_a_driver_that_is_built_in_has_no_module_to_load(machine: Machine) -> None:
    (machine.pci / "drivers/vfio-pci/module").unlink()
    rule = machine.persist(NIC).path.read_text()
    assert "kmod" not in rule
    assert "drivers_probe" in rule


def test_a_driver_whose_name_would_end_a_rule_is_refused(machine: Machine) -> None:
    machine.add_driver('x", RUN+="reboot')
    with pytest.raises(VfioError, match="cannot stand in a udev rule"):
        machine.persist(NIC, 'x", RUN+="reboot')
    assert machine.files() == {}


def test_persisting_again_replaces_the_file(machine: Machine) -> None:
    former = machine.persist(NIC).now
    change = machine.persist(NIC, rights="1000")
    assert change.former == former
    assert [each.rights for each in pci.persisted(etc=machine.etc)] == [pci.Rights(1000)]


def test_a_persistent_binding_leaves_no_descriptor_open(machine: Machine) -> None:
    before = open_fds()
    machine.persist(NIC)
    machine.persist(NIC, rights="1000")
    pci.forget(NIC, etc=machine.etc)
    assert open_fds() == before
    assert machine.files() == {}


def test_a_change_of_a_rule_is_undone_to_the_former_file(machine: Machine) -> None:
    """Or to none. The undo can be undone."""
    first = machine.persist(NIC)
    text = first.path.read_text()
    second = machine.persist(NIC, rights="1000")
    back = pci.restore_rule(second, etc=machine.etc)
    assert first.path.read_text() == text
    assert (back.path, back.now, back.former) == (first.path, first.now, second.now)
    assert pci.restore_rule(first, etc=machine.etc).now is None
    assert machine.files() == {}
    pci.restore_rule(back, etc=machine.etc)
    gone = pci.forget(NIC, etc=machine.etc)
    assert (gone.now, gone.former) == (None, second.now)
    pci.restore_rule(gone, etc=machine.etc)
    assert [each.rights for each in pci.persisted(etc=machine.etc)] == [pci.Rights(1000)]


def test_a_rule_that_cannot_be_written_is_told_with_what_helps(machine: Machine) -> None:
    """The directory of rules is a file."""
    machine.rules.rmdir()
    machine.rules.touch()
    with pytest.raises(VfioError, match=rf"60-pyvfio-{NIC}.rules could not be changed: ") as caught:
        machine.persist(NIC)
    assert caught.value.hint == ("Run as root" if os.geteuid() else "Is the file system read-only?")


def test_files_of_other_names_are_no_persistent_bindings(machine: Machine) -> None:
    """Such as the copies that editors make."""
    name = machine.persist(NIC).path.name
    for other in (f"{name}~", f".{name}", f"{name}.bak", "60-pyvfio-.rules", f"61{name[2:]}"):
        (machine.rules / other).write_text("mine")
    assert [each.bdf for each in pci.persisted(etc=machine.etc)] == [NIC]
    machine.persist(OTHER)
    assert [each.bdf for each in pci.persisted(etc=machine.etc)] == [NIC, OTHER]


FIELDS: dict[str, object] = {"bdf": NIC, "vendor": 1, "device": 2, "driver": "vfio-pci", "module": "m", "rights": None}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bdf", 7),
        ("bdf", "zz"),
        ("bdf", None),
        ("vendor", "1"),
        ("vendor", None),
        ("device", "2"),
        ("device", None),
        ("driver", None),
        ("driver", 7),
        ("driver", ""),
        ("driver", 'x", RUN+="reboot'),
        ("module", 7),
        ("module", ""),
        ("module", "a b"),
        ("rights", {"user": "alice"}),
        ("rights", {"user": None, "group": None}),
        ("rights", {"owner": 1}),
    ],
)
def test_fields_that_make_no_persistent_binding_are_refused(field: str, value: object) -> None:
    """Each of them, in the head of a rule file or in an undo file."""
    with pytest.raises((TypeError, ValueError)):
        binding_of({**FIELDS, field: value})
    assert binding_of(FIELDS) == pci.PersistentBinding(NIC, 1, 2, "vfio-pci", "m", None)
    made = binding_of({**FIELDS, "module": None, "rights": {"user": 1, "group": None}})
    assert made == pci.PersistentBinding(NIC, 1, 2, "vfio-pci", None, pci.Rights(1))


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text + "# mine\n",
        lambda _text: "",
        lambda text: text.replace("0x8086", "*"),
        lambda text: text.replace('"driver": "vfio-pci"', '"driver": "uio_pci_generic"'),
        lambda text: text.replace('{"bdf"', '{{"bdf"'),
        lambda text: text.replace("Written by", "Edited after"),
        lambda _text: pci.PersistentBinding(OTHER, 0x8086, 0x10D3, "vfio-pci", None).rule,
    ],
)
def test_a_file_that_was_edited_or_is_another_is_left_alone(
    machine: Machine, capsys: pytest.CaptureFixture[str], edit: Callable[[str], str]
) -> None:
    path = machine.persist(NIC).path
    path.write_text(edit(path.read_text()))
    before = machine.files()
    for words in (["--persist", NIC], ["--forget", NIC], ["--persisted"]):
        assert machine.bind(*words) == 1
        assert f"{path} was not written by pyvfio, or was edited since" in capsys.readouterr().err
    assert machine.files() == before
    assert machine.writes == []


def test_a_device_of_driverctl_is_refused_before_any_change(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    place = machine.etc / "driverctl.d" / f"pci-{NIC}"
    place.parent.mkdir()
    place.write_text("uio_pci_generic\n")
    assert machine.bind("--persist", NIC) == 1
    assert f"driverctl --noprobe unset-override {NIC}" in capsys.readouterr().err
    assert machine.writes == []
    assert machine.files() == {}


def test_a_machine_without_udev_is_told_so_and_nothing_is_changed(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    before = machine.drivers()
    machine.rules.rmdir()
    machine.rules.parent.rmdir()
    assert machine.bind("--persist", NIC) == 1
    assert "this machine has no udev" in capsys.readouterr().err
    assert machine.drivers() == before
    assert machine.writes == []


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_binding_that_could_not_be_made_is_not_made_persistent(machine: Machine, *, dry_run: bool) -> None:
    """A driver that is not loaded, a bridge, a machine without udev: no rule file is written, or planned."""

    def persist(bdf: str, driver: str) -> None:
        pci.persist(bdf, driver, dry_run=dry_run, kernel=machine.kernel, etc=machine.etc)

    with pytest.raises(UnavailableError, match="no PCI driver other is loaded"):
        persist(NIC, "other")
    with pytest.raises(VfioError, match=f"{PORT} is a PCI bridge"):
        persist(PORT, "vfio-pci")
    assert machine.files() == {}
    (machine.etc / "driverctl.d").mkdir()
    (machine.etc / f"driverctl.d/pci-{NIC}").touch()
    with pytest.raises(VfioError, match=f"driverctl already has a persistent driver for {NIC}"):
        persist(NIC, "vfio-pci")
    assert machine.files() == {}
    machine.rules.rmdir()
    (machine.etc / "udev").rmdir()
    with pytest.raises(UnavailableError, match="this machine has no udev"):
        persist(OTHER, "vfio-pci")


def test_the_directory_of_rules_is_made(machine: Machine) -> None:
    machine.rules.rmdir()
    machine.persist(NIC)
    assert list(machine.files()) == [f"60-pyvfio-{NIC}.rules"]


def test_a_driver_that_does_not_bind_is_not_persistent(machine: Machine) -> None:
    machine.unwilling.add("vfio-pci")
    before = machine.drivers()
    assert machine.bind("--persist", NIC) == 1
    assert machine.files() == {}
    assert machine.drivers() == before


def test_a_rule_that_cannot_be_written_brings_the_former_driver_and_rights_back(machine: Machine) -> None:
    """The directory becomes a file while the driver is changed."""
    machine.bind(SOUND)
    before = machine.drivers()

    def break_directory(name: str, _value: str) -> None:
        if name.endswith("drivers_probe"):
            machine.rules.rmdir()
            machine.rules.touch()

    machine.fail = break_directory
    assert machine.bind("--persist", "--user", ME, NIC) == 1
    assert machine.drivers() == before
    assert mode_of(machine.dev / "vfio/7") == 0o600


def test_forget_needs_no_device(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """A card that was removed, or replaced."""
    rule = machine.persist(NIC).path
    (machine.pci / "devices" / NIC).unlink()
    assert machine.bind("--persisted", "--json") == 0
    (shown,) = json.loads(capsys.readouterr().out)["devices"]
    assert (shown["present"], shown["driver_now"]) == (False, None)
    assert machine.bind("--forget", NIC) == 0
    assert not rule.exists()


def test_forgetting_a_device_without_a_rule_names_those_with_one(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.persist(OTHER)
    assert machine.bind("--forget", NIC) == 1
    assert f"{NIC} has no persistent binding. Devices with one: {OTHER}" in capsys.readouterr().err


def test_persistent_bindings_are_listed(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.persist(NIC, rights="1000")
    assert machine.bind("--persisted") == 0
    assert capsys.readouterr().out.splitlines() == [
        "BDF           ID         DRIVER    USER  GROUP  NOW",
        f"{NIC}  8086:10d3  vfio-pci  1000  -      e1000e",
    ]
    assert machine.bind("--persisted", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "schema": "pyvfio.persisted/1",
        "devices": [
            {
                "bdf": NIC,
                "vendor": "8086",
                "device": "10d3",
                "driver": "vfio-pci",
                "user": 1000,
                "group": None,
                "rule": str(machine.rules / f"60-pyvfio-{NIC}.rules"),
                "present": True,
                "driver_now": "e1000e",
            }
        ],
    }


def test_a_dry_run_shows_the_rule_file(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.bind("--dry-run", "--persist", "--user", "1000", NIC) == 0
    shown = capsys.readouterr().out
    assert machine.files() == {}
    assert machine.writes == []
    rule = machine.persist(NIC, rights="1000").path
    assert f"cat > {rule} << 'END'\n{rule.read_text()}END\n" in shown
    assert machine.bind("--dry-run", "--forget", NIC) == 0
    assert capsys.readouterr().out == f"rm {rule}\n"
    assert rule.exists()


def test_unbinding_a_persistent_device_warns_of_the_next_boot(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.bind("--persist", NIC)
    capsys.readouterr()
    assert machine.unbind(NIC) == 0
    out, err = capsys.readouterr()
    assert out == f"{NIC}: e1000e (was: vfio-pci, driver_override vfio-pci)\n"
    assert f"{NIC} will be bound to vfio-pci at the next boot; to end this: pyvfio bind --forget {NIC}" in err


def test_a_file_is_replaced_wholly_or_not_at_all(tmp_path: Path) -> None:
    """Without space, the former text stays and nothing else."""
    path = tmp_path / "file"
    path.write_text("former")
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "x" * 100_000 + "\udcff")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"file": "former"}


# --- Undo


def test_unbind_undoes_all_changes_of_a_bind(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drivers, overrides, rights and rules. The record is removed, so that the two commands can be repeated."""
    machine.bind(SOUND)
    machine.persist(OTHER)
    before = machine.drivers(), machine.files(), mode_of(machine.dev / "vfio/7")
    record = tmp_path / "undo.json"
    for _ in range(2):
        words = ["--persist", "--user", ME, "--undo", str(record)]
        assert machine.bind(*words, NIC, OTHER) == 0
        assert (machine.driver_of(NIC), machine.driver_of(OTHER)) == ("vfio-pci", "vfio-pci")
        assert len(machine.files()) == 2
        assert mode_of(machine.dev / "vfio/7") == 0o660
        capsys.readouterr()
        assert machine.unbind("--undo", str(record)) == 0
        undone = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()]
        assert undone == [OTHER, NIC]
        assert (machine.drivers(), machine.files(), mode_of(machine.dev / "vfio/7")) == before
        assert not record.exists()


def test_the_record_is_the_document_that_bind_prints(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, before = tmp_path / "undo.json", machine.drivers()
    assert machine.bind("--undo", str(record), "--json", "--user", ME, "--persist", NIC) == 0
    printed = capsys.readouterr().out
    assert json.loads(record.read_text()) == json.loads(printed)
    record.write_text(printed)
    assert machine.unbind("--undo", str(record)) == 0
    assert machine.drivers() == before


def test_the_record_of_an_unbind_binds_again(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.bind(NIC)
    capsys.readouterr()
    machine.unbind("--json", NIC)
    record = tmp_path / "undo.json"
    record.write_text(capsys.readouterr().out)
    assert machine.unbind("--undo", str(record)) == 0
    assert (machine.driver_of(NIC), machine.override_of(NIC)) == ("vfio-pci", "vfio-pci")


def test_a_record_that_exists_is_not_overwritten(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be the only record of the former drivers."""
    record = tmp_path / "undo.json"
    record.write_text("former")
    assert machine.bind("--undo", str(record), NIC) == 1
    assert f"{record} exists already" in capsys.readouterr().err
    assert machine.bind("--undo", str(tmp_path / "missing/undo.json"), NIC) == 1
    assert "is missing, or is not writable" in capsys.readouterr().err
    assert record.read_text() == "former"
    assert machine.writes == []


def test_a_record_that_another_process_makes_meanwhile_is_not_overwritten(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file appears after the first check: the change is undone, as the file cannot be written."""
    record = tmp_path / "undo.json"

    def make_record(name: str, _value: str) -> None:
        if name.endswith("drivers_probe"):
            record.write_text("of another process")

    machine.fail = make_record
    assert machine.bind("--undo", str(record), NIC) == 1
    assert "undo.json could not be written: File exists" in capsys.readouterr().err
    assert record.read_text() == "of another process"
    assert (machine.driver_of(NIC), machine.override_of(NIC)) == ("e1000e", None)


def test_a_change_that_cannot_be_recorded_is_undone(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The directory disappears while the second driver is changed: the first change stays."""
    place = tmp_path / "records"
    place.mkdir()

    def break_directory(name: str, value: str) -> None:
        if name.endswith("drivers_probe") and OTHER in value:
            place.rename(tmp_path / "elsewhere")

    machine.fail = break_directory
    assert machine.bind("--undo", str(place / "undo.json"), "--persist", NIC, OTHER) == 1
    assert "undo.json could not be written: No such file or directory" in capsys.readouterr().err
    assert machine.driver_of(NIC) == "vfio-pci"
    assert (machine.driver_of(OTHER), machine.override_of(OTHER)) == ("igb", None)
    assert list(machine.files()) == [f"60-pyvfio-{NIC}.rules"]
    (kept,) = json.loads((tmp_path / "elsewhere/undo.json").read_text())["results"]
    assert kept["bdf"] == NIC


def test_a_device_that_cannot_be_restored_keeps_the_rule_and_the_record(machine: Machine, tmp_path: Path) -> None:
    """The other devices are restored; the command can be repeated."""
    record, before = tmp_path / "undo.json", machine.drivers()
    machine.bind("--undo", str(record), "--persist", NIC, OTHER)
    rules = machine.files()
    machine.unwilling.add("igb")
    machine.fail = lambda name, _value: OSError(errno.EBUSY, "busy") if name.endswith("igb/bind") else None
    assert machine.unbind("--undo", str(record)) == 1
    assert machine.driver_of(NIC) == "e1000e"
    assert machine.driver_of(OTHER) == "vfio-pci"
    assert machine.files() == {name: text for name, text in rules.items() if OTHER in name}
    assert record.exists()
    machine.fail = lambda _name, _value: None
    machine.unwilling.clear()
    assert machine.unbind("--undo", str(record)) == 0
    assert machine.drivers() == before
    assert machine.files() == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda _document: "[",
        lambda _document: [],
        lambda document: document | {"schema": "pyvfio.list/1"},
        lambda document: document | {"results": 3},
        lambda document: {"schema": document["schema"]},
        lambda document: with_result(document, bdf="eth0"),
        lambda document: with_result(document, former_driver="../../x"),
        lambda document: with_result(
            document, nodes=[{"path": "/etc/shadow", "now": [0, 0, 0], "former": [0, 0, 0o666]}]
        ),
        lambda document: with_result(document, nodes=[{"path": "DEV/vfio/../x", "now": [0, 0, 0], "former": [1, 2]}]),
        lambda document: with_result(document, nodes=[{"path": "DEV/vfio/7", "now": "x", "former": [1, 2, 3]}]),
        lambda document: with_result(document, rule={"path": "/etc/passwd", "now": None, "former": None}),
        lambda document: with_result(document, rule={"path": "", "now": {"bdf": OTHER}, "former": None}),
    ],
)
def test_a_file_that_is_no_record_is_one_line_and_nothing_is_changed(
    machine: Machine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, object]], object],
) -> None:
    """Also one that somebody has changed: no owner of any other file is changed, no rule of another text written."""
    record = tmp_path / "undo.json"
    machine.bind("--undo", str(record), "--user", ME, NIC)
    before = machine.drivers()
    changed = change(json.loads(record.read_text()))
    text = changed if isinstance(changed, str) else json.dumps(changed).replace("DEV", str(machine.dev))
    record.write_text(text)
    machine.writes.clear()
    machine.owned.clear()
    capsys.readouterr()
    assert machine.unbind("--undo", str(record)) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert machine.drivers() == before
    assert machine.writes == []
    assert machine.owned == []
    assert record.exists()


def with_result(document: dict[str, object], **fields: object) -> dict[str, object]:
    """Return the document with other fields in the only result."""
    results = document["results"]
    assert isinstance(results, list)
    return document | {"results": [results[0] | fields]}


def test_a_dry_run_of_an_undo_changes_nothing(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "undo.json"
    machine.bind("--undo", str(record), "--persist", NIC)
    before, rules = machine.drivers(), machine.files()
    capsys.readouterr()
    assert machine.unbind("--dry-run", "--undo", str(record)) == 0
    assert f"echo {NIC} > {machine.pci}/drivers/e1000e/bind" in capsys.readouterr().out
    assert (machine.drivers(), machine.files()) == (before, rules)
    assert record.exists()


# --- Usage and signals


@pytest.mark.parametrize(
    "words",
    [
        ["--persisted", NIC],
        ["--persisted", "--group", "7"],
        ["--persisted", "--forget"],
        ["--persisted", "--user", "1"],
        ["--forget"],
        ["--forget", "--persist", NIC],
        ["--forget", "--user", "1", NIC],
        ["--forget", "--undo", "x", NIC],
        ["--forget", "--driver", "igb", NIC],
        ["--undo", "x"],
        ["--undo", "x", "--dry-run", NIC],
        ["--user", "a:b:c", NIC],
        ["--user", "4294967295", NIC],
    ],
)
def test_options_that_exclude_each_other_are_wrong_usage(
    machine: Machine, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """One line on stderr names the help."""
    assert machine.bind(*words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("pyvfio bind: ")
    assert err.endswith("; see pyvfio bind --help\n")
    assert machine.writes == []


@pytest.mark.parametrize("words", [[NIC], ["--group", "7"], ["--driver", "igb"]])
def test_an_undo_takes_the_devices_from_the_file(
    machine: Machine, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Naming a device, a group or a driver too is wrong usage."""
    assert machine.unbind("--undo", "x", *words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "takes the devices and drivers from FILE" in err
    assert err.endswith("; see pyvfio unbind --help\n")
    assert machine.writes == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bind_has_finished_the_device_and_not_begun_the_next(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """Driver, rights, rule and record of the first; nothing of the second."""
    record = tmp_path / "undo.json"

    def press(name: str, _value: str) -> None:
        if name.endswith("drivers_probe"):
            signal.raise_signal(number)

    machine.fail = press
    words = ["--persist", "--user", ME, "--undo", str(record), NIC, OTHER]
    assert machine.bind(*words) == 128 + number
    assert machine.driver_of(NIC) == "vfio-pci"
    assert machine.driver_of(OTHER) == "igb"
    assert mode_of(machine.dev / "vfio/7") == 0o660
    assert list(machine.files()) == [f"60-pyvfio-{NIC}.rules"]
    assert [each["bdf"] for each in json.loads(record.read_text())["results"]] == [NIC]


class HandledError(Exception):
    """Raised by a handler."""


def _handle(_number: int, _frame: object) -> None:
    raise HandledError


@pytest.fixture
def handler() -> Iterator[None]:
    """The handler of SIGINT raises."""
    former = signal.signal(signal.SIGINT, _handle)
    yield
    signal.signal(signal.SIGINT, former)


def _operation(machine: Machine, name: str) -> Callable[[], object]:
    if name == "rights":
        return lambda: machine.give(NIC)
    if name == "restore":
        binding = machine.give(NIC)
        return lambda: machine.restore(binding)
    machine.persist(NIC)
    if name == "persist":
        return lambda: machine.persist(NIC, rights="1000")
    return lambda: pci.forget(NIC, etc=machine.etc)


@pytest.mark.long
@pytest.mark.usefixtures("handler")
@pytest.mark.parametrize("name", ["rights", "restore", "persist", "forget"])
def test_a_handler_that_raises_leaves_driver_rights_and_rules_as_they_were(tmp_path: Path, name: str) -> None:
    """At any point of the operation; the caller hears of no change."""

    def look(machine: Machine) -> object:
        return machine.drivers(), machine.files(), mode_of(machine.dev / "vfio/7")

    def prepared(root: Path) -> tuple[Machine, Callable[[], object]]:
        machine = Machine(root)
        machine.bind(SOUND)  # so that the node of the group stays
        return machine, _operation(machine, name)

    dry = Walk()
    dry.run(prepared(tmp_path / "dry")[1])
    for point in range(1, dry.count + 1, max(1, dry.count // 20)):
        machine, operation = prepared(tmp_path / str(point))
        before = look(machine)
        walk = Walk({point: lambda: signal.raise_signal(signal.SIGINT)})
        try:
            walk.run(operation)
        except HandledError:
            assert look(machine) == before, walk.where
        else:
            assert not walk.where  # this time the operation had fewer points


def test_a_rule_that_is_not_restored_after_a_handler_raised_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The handler is called when the file is written, and the directory is a file since."""
    made: list[Machine] = []

    def handle(_number: int, _frame: object) -> None:
        made[-1].rules.rename(made[-1].etc / "former")
        made[-1].rules.touch()
        raise HandledError

    former = signal.signal(signal.SIGINT, handle)
    try:
        dry = Walk()
        dry.run(partial(Machine(tmp_path / "dry").persist, NIC))
        for point in range(1, dry.count + 1, max(1, dry.count // 20)):
            made.append(Machine(tmp_path / str(point)))
            with suppress(HandledError, VfioError):
                Walk({point: lambda: signal.raise_signal(signal.SIGINT)}).run(partial(made[-1].persist, NIC))
    finally:
        signal.signal(signal.SIGINT, former)
    said = [record.getMessage() for record in caplog.records]
    assert said
    assert set(said) <= {f"{machine.rules}/60-pyvfio-{NIC}.rules was not restored" for machine in made}


def test_a_failed_undo_is_reported_with_both_failures(machine: Machine, tmp_path: Path) -> None:
    """The record cannot be written, and the former driver refuses the device."""
    place = tmp_path / "records"
    place.mkdir()

    def fail(name: str, _value: str) -> OSError | None:
        if name.endswith("drivers_probe"):
            place.rename(tmp_path / "elsewhere")
        return OSError(errno.EBUSY, "busy") if name.endswith("e1000e/bind") else None

    machine.fail = fail
    binder = bind._Binder(
        bind.make_parser().parse_args(["--undo", str(place / "undo.json"), NIC]),
        Tools(machine.kernel, machine.write, machine.own, machine.etc),
    )
    binder.prepare()
    with pytest.raises(RollbackError) as caught:
        binder(NIC)
    assert "could not be undone" in str(caught.value)
    assert [type(error) for error in caught.value.exceptions] == [VfioError, VfioError]
    assert "undo.json could not be written" in str(caught.value.exceptions[0])
    assert "refused" in str(caught.value.exceptions[1])


# --- Examples


def test_the_commands_of_the_page_on_binding_run(machine: Machine, tmp_path: Path) -> None:
    """Those about rights, rules and records, one after the other, with a user that this machine has."""
    machine.add_device("0000:00:02.0", driver="e1000e", group=9)
    page = (Path(__file__).parents[2] / "docs/binding.md").read_text(encoding="utf-8")
    text = page[page.index("## Open") :].replace("alice", ME).replace("FILE", str(tmp_path / "undo.json"))
    lines = re.findall(r"^pyvfio (\w+) ([^#\n]*)#", text, re.MULTILINE)
    assert [name for name, _words in lines] == ["bind", "bind", "bind", "bind", "unbind"]
    for name, words in lines:
        assert {"bind": machine.bind, "unbind": machine.unbind}[name](*words.split()) == 0, words
    assert machine.driver_of("0000:00:02.0") == "vfio-pci"
    assert machine.driver_of(NIC) == "e1000e"
    assert machine.files() == {}


@pytest.mark.parametrize("name", ["binding", "groups", "persistence", "rights", "sysfs"])
def test_the_examples_of_the_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"pyvfio.pci.{name}")
    failures, examples = doctest.testmod(module)
    assert failures == 0
    assert examples > 0
