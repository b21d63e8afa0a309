"""Programs that follow resizable RAM blocks with something else than VFIO."""
