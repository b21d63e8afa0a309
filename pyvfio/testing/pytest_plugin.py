"""The module that the entry point `pyvfio` of pytest names.

The module names the plugin, so that pytest loads the plugin once, under each name that a user asks for.
"""

pytest_plugins = ("pyvfio.testing.plugin",)
