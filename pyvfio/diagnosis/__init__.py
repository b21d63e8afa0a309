"""The obstacles between a machine, or a device, and `pyvfio.open_device`, in the order in which to remove them, each
with the commands that remove the obstacle.

`doctor` examines; `Diagnosis` and `Finding` are the result. `VfioError.explain` runs the checks that fit an error.
"""

from pyvfio.diagnosis.examination import doctor, examine, explain
from pyvfio.diagnosis.report import Diagnosis
from pyvfio.findings import Command, Finding

__all__ = ["Command", "Diagnosis", "Finding", "doctor", "examine", "explain"]
