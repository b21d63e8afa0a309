"""Records of a device: the text format, and the seam that writes down each access.

`format` has the lines of a record, as objects and as text. `log` keeps the last events in memory and writes them to a
file. `seam` is a `Kernel` that makes the calls of one device through another kernel and reports each access to a log.
`pyvfio.device.recording` puts the seam into an open device. docs/recording.md describes the format.
"""
