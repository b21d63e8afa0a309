"""What errors say and carry."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import resource

import pytest

from pyvfio import errors
from pyvfio.errors import (
    AccessDeniedError,
    CannotBePinnedWarning,
    DeviceGoneError,
    EntryLimitError,
    ForkedError,
    GroupBusyError,
    GroupMember,
    GroupNotViableError,
    Holder,
    IoctlError,
    IovaOverlapError,
    IovaRangeError,
    MemoryNotReturnedWarning,
    PersistenceWarning,
    PinLimitError,
    RegisterTimeoutError,
    RollbackError,
    UnmapSizeError,
    UnsafeNoIommuWarning,
    VfioError,
    describe_ranges,
    descriptor_hint,
    nobody_found,
    raise_collected,
)
from pyvfio.units import Iova, IovaRange
from tests.unit.processes import in_child


def ioctl_error(kind: type[IoctlError] = IoctlError) -> IoctlError:
    """ENOMEM of a map."""
    return kind(
        errno.ENOMEM,
        "no memory",
        request="VFIO_IOMMU_MAP_DMA",
        arguments={"iova": 0x1000, "how": "rw"},
        hint="Buy some",
    )


def test_every_error_is_a_vfio_error() -> None:
    """One except clause catches all that pyvfio finds wrong."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    others = {kind for kind in kinds if not issubclass(kind, VfioError) and kind.__module__ == errors.__name__}
    assert others == {
        MemoryNotReturnedWarning,
        CannotBePinnedWarning,
        PersistenceWarning,
        UnsafeNoIommuWarning,
    }
    assert len(kinds) > 15


def made() -> list[VfioError]:
    """An error of each kind that has a constructor of its own."""
    return [
        VfioError("It is broken", hint="Mend it"),
        ioctl_error(),
        ioctl_error(PinLimitError),
        AccessDeniedError("/dev/vfio/1", hint="Become root"),
        DeviceGoneError("0000:00:02.0", "it reads all ones"),
        RegisterTimeoutError("late", last=1, mask=2, value=3),
        GroupNotViableError(4, [GroupMember("0000:00:02.0", "e1000e", blocks=True)]),
        GroupBusyError(4, [Holder(1, "init")]),
        ForkedError("it", owner=1),
        UnmapSizeError(iova=0x1000, asked=2, unmapped=1),
        RollbackError("twice", [ioctl_error(), OSError(5, "no")], hint="Wait"),
    ]


def test_an_error_arrives_in_another_process_as_it_was() -> None:
    """And a copy of it is one."""
    for error in made():
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301  (our own)
            assert type(other) is type(error)
            assert str(other) == str(error)
            assert other.args == error.args or isinstance(error, RollbackError)  # errors do not compare
            assert [repr(value) for value in vars(other).values()] == [repr(value) for value in vars(error).values()]
            assert getattr(other, "errno", None) == getattr(error, "errno", None)
            assert len(getattr(other, "exceptions", ())) == len(getattr(error, "exceptions", ()))


def test_an_error_says_what_is_wrong_and_then_what_to_do() -> None:
    """The hint is part of what is printed, where there is one."""
    assert str(VfioError("It is broken", hint="Mend it")) == "It is broken. Mend it"
    assert str(VfioError("It is broken")) == "It is broken"


def test_a_refused_call_is_an_oserror_with_the_kernels_errno() -> None:
    """Code that knows nothing of pyvfio finds errno and strerror where it looks for them."""
    error = ioctl_error()
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror) == (errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_a_refused_call_says_its_request_arguments_errno_and_hint() -> None:
    """Numbers are in hex."""
    text = str(ioctl_error())
    assert text == "VFIO_IOMMU_MAP_DMA(iova=0x1000, how=rw): ENOMEM, no memory. Buy some"


def test_an_errno_without_a_name_is_said_as_its_number() -> None:
    """EHWPOISON is not in the errno module of every Python."""
    assert ": 4095, odd" in str(IoctlError(4095, "odd", request="x", arguments={}))


def test_an_oserror_without_an_errno_is_explained_as_one_of_0() -> None:
    """Code between pyvfio and the kernel can raise one."""
    error = IoctlError.of(OSError("odd"), "why", request="x", arguments={})
    assert (error.errno, str(error)) == (0, "x(): 0, why")


def test_the_arguments_of_an_error_do_not_change_after_it_was_raised() -> None:
    """The error has a copy."""
    arguments: dict[str, int | str] = {"iova": 1}
    error = IoctlError(errno.EINVAL, "no", request="x", arguments=arguments)
    arguments["iova"] = 2
    assert error.arguments == {"iova": 1}


@pytest.mark.parametrize("kind", [PinLimitError, EntryLimitError, IovaOverlapError, IovaRangeError])
def test_an_oserror_is_explained_with_its_errno_kept(kind: type[IoctlError]) -> None:
    """`of` makes the subclass that it is called on."""
    error = kind.of(OSError(errno.ENOSPC, "full"), "why", request="x", arguments={"size": 1}, hint="do")
    assert type(error) is kind
    assert (error.errno, error.message, error.request, error.arguments, error.hint) == (
        errno.ENOSPC,
        "why",
        "x",
        {"size": 1},
        "do",
    )


def test_the_numbers_of_one_error_are_not_those_of_another() -> None:
    """What is set on an error stays with it."""
    one = ioctl_error(IovaRangeError)
    assert isinstance(one, IovaRangeError)
    one.ranges = (IovaRange(Iova(0), Iova(1)),)
    assert IovaRangeError(errno.EINVAL, "x", request="x", arguments={}).ranges == ()


def test_a_wrong_unmap_size_says_how_much_was_asked_and_how_much_went() -> None:
    """All three numbers, in hex and as attributes."""
    error = UnmapSizeError(iova=0x10000, asked=0x3000, unmapped=0x1000)
    assert (error.iova, error.asked, error.unmapped) == (0x10000, 0x3000, 0x1000)
    assert "0x3000 bytes at IOVA 0x10000 and unmapped 0x1000" in str(error)


def test_an_unmap_that_can_only_fail_says_which_mappings_it_would_cut() -> None:
    """With the range, both ends inclusive, and that nothing has been done."""
    error = UnmapSizeError(iova=0x10000, asked=0x3000, unmapped=0, known="0x10000-0x13fff", refused=True)
    assert (error.iova, error.asked, error.unmapped) == (0x10000, 0x3000, 0)
    assert error.message == ("IOVA 0x10000-0x12fff cannot be unmapped: the mappings in this range are: 0x10000-0x13fff")
    assert error.hint.startswith("Nothing has been unmapped")


def test_a_group_that_is_not_viable_names_only_the_members_that_block_it() -> None:
    """And the command that would free them."""
    error = GroupNotViableError(
        7,
        [
            GroupMember("0000:00:01.0", "e1000", blocks=True),
            GroupMember("0000:00:02.0", "vfio-pci", blocks=False),
        ],
    )
    assert "0000:00:01.0 (e1000)" in str(error)
    assert "pyvfio bind 0000:00:01.0" in error.hint
    assert "0000:00:02.0" not in str(error)
    assert (error.group, len(error.members)) == (7, 2)


def test_a_busy_group_names_its_holders_where_they_can_be_seen() -> None:
    """Where none can be seen, it says why that may be."""
    assert "qemu (pid 12)" in str(GroupBusyError(7, [Holder(12, "qemu")]))
    assert "me (pid 13, this process)" in str(GroupBusyError(7, [Holder(13, "me", is_this_process=True)]))
    assert "no process was found" in str(GroupBusyError(7, []))


@pytest.mark.parametrize(
    ("holders", "hint"),
    [
        ([Holder(12, "qemu")], "close the devices of the group in that process, or end the process"),
        ([Holder(12, "qemu"), Holder(13, "me", is_this_process=True)], "space=device.space"),
        ([Holder(13, "me", is_this_process=True)], "container=device.container"),
        ([], "Processes that hold only a device descriptor are not found"),
    ],
)
def test_the_hint_of_a_busy_group_fits_its_holders(holders: list[Holder], hint: str) -> None:
    """Only this process can share the address space."""
    error = GroupBusyError(7, holders)
    assert hint in error.hint
    assert error.hint.startswith("A group can be open only once at a time")
    assert (error.group, error.holders) == (7, tuple(holders))


def test_root_is_not_told_to_look_as_root() -> None:
    """Any other user is."""
    is_root = os.geteuid() == 0
    assert ("look as root, or from outside" in nobody_found()) == (not is_root)
    assert ("root" in nobody_found()) == (not is_root)

    def look() -> None:
        os.seteuid(65534)
        assert "look as root, or from outside" in nobody_found()

    assert not is_root or in_child(look) == 0


def test_access_that_is_denied_is_a_permission_error() -> None:
    """With EACCES and the path."""
    error = AccessDeniedError("/dev/vfio/7", hint="chown it")
    assert isinstance(error, PermissionError)
    assert (error.errno, error.path) == (errno.EACCES, "/dev/vfio/7")
    assert str(error) == "/dev/vfio/7 may not be opened by this user. chown it"


def test_a_forked_handle_says_both_processes() -> None:
    """The owner and the child."""
    assert "process 1, and this is its child 2" in str(ForkedError("the device", owner=1, child=2))


def test_a_failed_rollback_is_a_group_of_the_failure_and_those_of_its_undo() -> None:
    """`except*` finds each of them, and `str` says all."""
    error = RollbackError("resizing", [ioctl_error(), VfioError("undo")], hint="Look")
    assert isinstance(error, ExceptionGroup)
    assert str(error) == f"resizing: {ioctl_error()}; then undo. Look"
    caught: list[str] = []
    try:
        raise error
    except* OSError as matched:
        caught += [type(each).__name__ for each in matched.exceptions]
    except* VfioError as rest:
        caught += [str(each) for each in rest.exceptions]
    assert caught == ["IoctlError", "undo"]


def test_a_part_of_a_failed_rollback_is_one_too() -> None:
    """`split` and `subgroup` keep the type, the message and the hint."""
    twice = RollbackError("resizing", [VfioError("no", hint="Wait"), VfioError("no", hint="Wait")], hint="Look")
    assert str(twice) == "resizing: no. Wait. Look"
    part = RollbackError("resizing", [ioctl_error(), VfioError("undo")], hint="Look").subgroup(OSError)
    assert isinstance(part, RollbackError)
    assert (part.message, part.hint, len(part.exceptions)) == ("resizing", "Look", 1)


def test_collected_failures_are_raised_as_few_as_they_are() -> None:
    """None is no exception, one is itself, more are a group."""
    one, two = VfioError("one"), ValueError("two")
    raise_collected("closing", [])
    with pytest.raises(VfioError) as raised:
        raise_collected("closing", [one])
    assert raised.value is one
    with pytest.raises(RollbackError) as all_of_them:
        raise_collected("closing", [one, two])
    assert all_of_them.value.exceptions == (one, two)


def test_only_a_want_of_descriptors_has_a_hint_about_them() -> None:
    """Of the process, with both limits, or of the machine."""
    assert str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) in descriptor_hint(errno.EMFILE)
    assert "fs.file-max" in descriptor_hint(errno.ENFILE)
    assert [descriptor_hint(number) for number in (0, errno.ENFILE - 1, errno.EMFILE + 1, errno.EIO)] == [""] * 4


def test_the_ranges_of_an_iommu_are_a_sentence() -> None:
    """For hints."""
    assert describe_ranges([IovaRange(Iova(0), Iova(0xFFF))]) == "The IOMMU offers 0x0-0xfff"
    assert describe_ranges([]) == "The IOMMU offers none"
