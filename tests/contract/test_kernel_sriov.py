"""The demands of a kernel on a program that opens functions of SR-IOV (kernel: `vfio_pci_validate_vf_token`)."""

from __future__ import annotations

import errno
import struct
import uuid

import pytest

import pyvfio
from pyvfio import ioctls
from tests.contract.world import Attached, Sriov, refused

GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
TOKEN, OTHER = (uuid.UUID(f"bd8d9d2b-5a5f-4f5a-a211-f591514ba1f{last}") for last in (3, 4))


class Pair:
    """An open physical function and a virtual one, in one container."""

    def __init__(self, sriov: Sriov) -> None:
        self.world = physical = sriov.physical
        attached = Attached.of(physical, ioctls.VFIO_TYPE1v2_IOMMU)
        self.groups = {"physical": attached.group}
        self.names = {"physical": physical.bdf}
        self.held = self.open("physical", option(uuid.uuid4()))
        self.virtual = virtual = sriov.make_virtual()
        self.names["virtual"] = virtual.bdf
        self.groups["virtual"] = virtual.open(str(virtual.group))
        virtual.set_container(self.groups["virtual"], attached.container)

    def open(self, which: str, options: str = "") -> int:
        """Open one of the functions; `options` follow the name."""
        return self.world.open_device(self.groups[which], self.names[which] + options)

    def set_token(self, fd: int, token: bytes, *, how: int = SET) -> None:
        """Call VFIO_DEVICE_FEATURE_PCI_VF_TOKEN."""
        argument = bytearray(struct.pack("=II", 8 + len(token), how | ioctls.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN) + token)
        assert self.world.ioctl(fd, ioctls.VFIO_DEVICE_FEATURE, argument) == 0


def option(token: uuid.UUID) -> str:
    """Return the text behind a device's name."""
    return f" vf_token={token}"


@pytest.fixture
def pair(sriov: Sriov) -> Pair:
    """A pair whose virtual function is opened with a secret token."""
    return Pair(sriov)


def test_a_virtual_function_is_opened_with_the_token_of_its_physical_one_and_no_other(pair: Pair) -> None:
    for options in ("", option(TOKEN)):
        with refused(errno.EACCES):
            pair.open("virtual", options)
    pair.open("physical", option(TOKEN))
    for options in ("", option(OTHER)):
        with refused(errno.EACCES):
            pair.open("virtual", options)
    fd = pair.open("virtual", option(TOKEN))
    assert pair.world.kernel.pread(fd, 2, ioctls.VFIO_PCI_CONFIG_REGION_INDEX << 40) == b"\x36\x1b"


def test_a_token_is_36_characters_in_either_case_with_blanks_around(pair: Pair) -> None:
    pair.open("physical", option(TOKEN))
    for text in (" vf_token=", " vf_token=x", f"{option(TOKEN)}x", f"{option(TOKEN)}{option(TOKEN)}", " token=1"):
        with refused(errno.EINVAL):
            pair.open("virtual", text)
    for text in (option(TOKEN)[:-1], option(TOKEN).replace("-", "_"), f" vf_token={{{TOKEN}}}"):
        with refused(errno.EINVAL):
            pair.open("virtual", text)
    pair.open("virtual", f"   vf_token={str(TOKEN).upper()}  ")


def test_the_token_is_looked_at_before_the_container_and_outlives_the_descriptor_that_set_it(pair: Pair) -> None:
    physical = pair.open("physical", option(TOKEN))
    pair.world.ioctl(pair.groups["virtual"], ioctls.VFIO_GROUP_UNSET_CONTAINER)
    for closed in ((), (physical, pair.held)):
        for fd in closed:
            pair.world.close(fd)
        for options in ("", option(OTHER)):
            with refused(errno.EACCES):
                pair.open("virtual", options)
        with refused(errno.EINVAL):
            pair.open("virtual", option(TOKEN))


def test_a_physical_function_wants_the_token_while_a_virtual_one_is_open_and_takes_a_new_one_otherwise(
    pair: Pair,
) -> None:
    pair.open("physical", option(TOKEN))
    virtual = pair.open("virtual", option(TOKEN))
    for options in ("", option(OTHER)):
        with refused(errno.EACCES):
            pair.open("physical", options)
    pair.open("physical", option(TOKEN))
    pair.world.close(virtual)
    pair.open("physical")
    pair.open("physical", option(OTHER))
    with refused(errno.EACCES):
        pair.open("virtual", option(TOKEN))
    pair.open("virtual", option(OTHER))


def test_the_token_is_a_feature_that_can_be_set_and_not_read(pair: Pair) -> None:
    physical = pair.open("physical", option(TOKEN))
    for how in (PROBE, PROBE | SET):
        pair.set_token(physical, OTHER.bytes, how=how)
    for how, token in ((GET, OTHER.bytes), (PROBE | GET, b""), (0, OTHER.bytes), (SET, OTHER.bytes[:15])):
        with refused(errno.EINVAL):
            pair.set_token(physical, token, how=how)
    virtual = pair.open("virtual", option(TOKEN))
    pair.set_token(physical, OTHER.bytes)
    for how in (SET, PROBE):
        with refused(errno.ENOTTY):
            pair.set_token(virtual, OTHER.bytes, how=how)
    with refused(errno.EACCES):
        pair.open("virtual", option(TOKEN))
    pair.open("virtual", option(OTHER))


def test_a_device_without_sriov_wants_no_token(v2: Attached) -> None:
    for options in (option(TOKEN), " vf_token=x", " x"):
        with refused(errno.EINVAL):
            v2.world.open_device(v2.group, v2.world.bdf + options)
    v2.world.open_device(v2.group, f"{v2.world.bdf}  ")


# ------------------------------------------------------------------------------------------ what pyvfio makes of it


def test_pyvfio_opens_a_virtual_function_with_a_token_and_says_whose_is_wanted(sriov: Sriov) -> None:
    kernel, physical = sriov.physical.kernel, sriov.physical.bdf
    with pyvfio.Container(kernel=kernel) as container:
        opened = pyvfio.open_device(physical, container=container, vf_token=TOKEN)
        virtual = sriov.make_virtual().bdf
        for token in (None, OTHER):
            with pytest.raises(pyvfio.IoctlError, match=rf"EACCES, .*{physical}, the physical function of"):
                pyvfio.open_device(virtual, container=container, vf_token=token)
        device = pyvfio.open_device(virtual, container=container, vf_token=str(TOKEN))
        assert device.config.read32(0) == 0x00101B36
        with pytest.raises(
            pyvfio.IoctlError, match=r"EACCES, .*Virtual functions of .* are open: pass the token .* vf_token"
        ):
            opened.group.get_device_fd(physical)
        opened.set_vf_token(OTHER)
        device.close()
        pyvfio.open_device(virtual, container=container, vf_token=OTHER)


def test_pyvfio_reads_the_capabilities_of_a_physical_function_and_of_a_virtual_one(sriov: Sriov) -> None:
    kernel = sriov.physical.kernel
    with pyvfio.Container(kernel=kernel) as container:
        physical = pyvfio.open_device(sriov.physical.bdf, container=container, vf_token=TOKEN)
        virtual = pyvfio.open_device(sriov.make_virtual().bdf, container=container, vf_token=TOKEN)
        for device in (physical, virtual):
            found = device.capabilities
            assert found.power is not None
            assert (found.power.state, found.power.states, found.power.keeps_state) == (0, (0, 3), True)
            assert found.pcie is not None
            assert (found.pcie.speed, found.pcie.width, found.pcie.can_flr) == (2.5, 1, True)
            assert found.msix is not None
            assert (found.msix.vectors > 1, found.msix.enabled) == (device is physical, False)
            assert (found.msix.table_bar, found.msix.table_offset, found.msix.pba_offset) == (0, 0x2000, 0x3000)
            assert [each.id for each in found.extended] == ([0xE, 0x10] if device is physical else [0xE])
