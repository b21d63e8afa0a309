"""Dirty memory: the pages that devices may have written (`tracking`), and the parts of blocks to copy again (`log`)."""

from pyvfio.dirty.log import DirtyBlock, DirtyLog
from pyvfio.dirty.tracking import DirtyPages, DirtyTracking

__all__ = ["DirtyBlock", "DirtyLog", "DirtyPages", "DirtyTracking"]
