"""`python -m pyvfio`: the command `pyvfio` for a shell whose PATH lacks the script."""

from pyvfio.cli.main import entry

entry()
