"""Words for the numbers of PCI: classes, capabilities.

Source: linux/pci_ids.h, linux/pci_regs.h.
"""

from __future__ import annotations

# Classes in words; class and subclass are looked for first.
_SUBCLASSES = {
    0x0101: "IDE controller",
    0x0104: "RAID controller",
    0x0106: "SATA controller",
    0x0107: "SAS controller",
    0x0108: "NVMe controller",
    0x0200: "Ethernet controller",
    0x0300: "VGA controller",
    0x0302: "3D controller",
    0x0403: "audio device",
    0x0600: "host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0607: "CardBus bridge",
    0x0C03: "USB controller",
    0x0C05: "SMBus",
}
_CLASSES = {
    0x00: "unclassified",
    0x01: "mass storage",
    0x02: "network controller",
    0x03: "display controller",
    0x04: "multimedia",
    0x05: "memory controller",
    0x06: "bridge",
    0x07: "communication",
    0x08: "system peripheral",
    0x09: "input device",
    0x0A: "docking station",
    0x0B: "processor",
    0x0C: "serial bus",
    0x0D: "wireless",
    0x0E: "intelligent I/O",
    0x0F: "satellite",
    0x10: "encryption",
    0x11: "signal processing",
    0x12: "accelerator",
    0x13: "instrumentation",
    0x40: "coprocessor",
    0xFF: "unassigned class",
}

_CAPABILITIES = {
    0x01: "power management",
    0x02: "AGP",
    0x03: "vital product data",
    0x04: "slot number",
    0x05: "MSI",
    0x06: "CompactPCI hot swap",
    0x07: "PCI-X",
    0x08: "HyperTransport",
    0x09: "vendor-specific",
    0x0A: "debug port",
    0x0B: "CompactPCI resource control",
    0x0C: "hot plug",
    0x0D: "bridge subsystem",
    0x0E: "AGP 8x",
    0x0F: "secure device",
    0x10: "PCI Express",
    0x11: "MSI-X",
    0x12: "SATA",
    0x13: "advanced features",
    0x14: "enhanced allocation",
}
_EXTENDED_CAPABILITIES = {
    0x01: "advanced error reporting",
    0x02: "virtual channel",
    0x03: "device serial number",
    0x04: "power budgeting",
    0x05: "root complex links",
    0x07: "root complex event collector",
    0x09: "virtual channel (MFVC)",
    0x0B: "vendor-specific",
    0x0D: "access control services",
    0x0E: "alternative routing",
    0x0F: "address translation services",
    0x10: "SR-IOV",
    0x11: "MR-IOV",
    0x12: "multicast",
    0x13: "page request",
    0x15: "resizable BAR",
    0x16: "dynamic power allocation",
    0x17: "TPH requester",
    0x18: "latency tolerance",
    0x19: "secondary PCI Express",
    0x1B: "process address space",
    0x1D: "downstream port containment",
    0x1E: "L1 power substates",
    0x1F: "precision time",
    0x23: "designated vendor-specific",
    0x24: "virtual function resizable BAR",
    0x25: "data link feature",
    0x26: "16 GT/s",
    0x27: "lane margining",
    0x2A: "32 GT/s",
    0x2E: "data object exchange",
}


def class_name(class_code: int) -> str:
    """Return a 24-bit PCI class in words, or the number of a class that has none."""
    return _SUBCLASSES.get(class_code >> 8) or _CLASSES.get(class_code >> 16) or f"class {class_code:06x}"


def capability_name(identity: int, *, extended: bool) -> str:
    """Return a capability in words, or the number of a capability that has none."""
    known = _EXTENDED_CAPABILITIES if extended else _CAPABILITIES
    return known.get(identity) or f"capability {identity:#04x}"
