"""What the entry point `pyvfio` of pytest names: the plugin's own name, under which pytest loads it only once."""

pytest_plugins = ("pyvfio.testing.plugin",)
