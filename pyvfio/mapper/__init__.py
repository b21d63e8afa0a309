"""Mappings of RAM blocks and buffers: the existing pieces, the changes to them, and a check whether a plan fits.

`policy` chooses the pieces (pure), `window` maps the pieces of one block, and `buffers` maps memory of the caller.
`regions` maps BARs of other devices, `promises` counts the mappings that blocks may still need, and `plan` checks in
advance whether blocks fit. `pyvfio.dma.DmaMapper` uses all of them.
"""
