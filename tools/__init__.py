"""Programs of those who work on pyvfio; no part of the package that is installed."""
