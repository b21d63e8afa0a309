"""`scripts/unbind`: give PCI devices back to the kernel's own drivers, each wholly or not at all."""

from __future__ import annotations

from collections.abc import Sequence

from pyvfio import pci
from pyvfio.cli.bind import change_each, change_parser, chosen
from pyvfio.cli.common import driver_argument, run
from pyvfio.kernel import Kernel, LinuxKernel

NAME = "unbind"


def main(
    arguments: Sequence[str] | None = None,
    *,
    kernel: Kernel | None = None,
    write: pci.SysfsWriter = pci.write_sysfs,
) -> int:
    """Unbind what was asked for; status 0 only if all came true."""
    parser = change_parser(
        NAME,
        "Clear the driver_override of PCI devices and let the kernel's own driver take them again. Prints the former "
        "driver of each; when one fails, it is as it was before.",
    )
    parser.add_argument(
        "--driver",
        type=driver_argument,
        metavar="D",
        help=f"bind to this driver instead ({pci.NO_DRIVER}: leave without)",
    )
    options = parser.parse_args(arguments)
    kernel = kernel or LinuxKernel()

    def change(bdf: str) -> pci.Binding:
        return pci.unbind(kernel, bdf, to=options.driver, dry_run=options.dry_run, force=options.force, write=write)

    return change_each(NAME, lambda: chosen(kernel, parser, options), options, change)


if __name__ == "__main__":
    run(main, name=NAME)
