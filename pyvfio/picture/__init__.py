"""Pictures of an IOVA space: ranges, RAM blocks, pieces and buffers, as SVG and as text for a terminal.

`DmaMapper.picture()`, `Container.picture()` and `Plan.picture()` return a `Picture`. `pyvfio draw` reads a saved one.
"""

from pyvfio.picture.gather import picture_of
from pyvfio.picture.model import SCHEMA, Picture, svg_of
from pyvfio.picture.rows import Span

__all__ = ["SCHEMA", "Picture", "Span", "picture_of", "svg_of"]
