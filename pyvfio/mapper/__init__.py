"""Mappings of RAM blocks and buffers: which pieces there are, what changes them, and whether a plan fits.

`policy` chooses the pieces (pure), `window` maps the pieces of one block, `buffers` maps memory of the caller's own,
`regions` maps BARs of other devices, and `plan` says beforehand whether blocks fit. `pyvfio.dma.DmaMapper` uses all of
them.
"""
