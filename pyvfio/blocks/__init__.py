"""RAM blocks: their state, the notifiers that are told of a change, and how a change is made or undone.

`state` has all that a block is, and each step that changes it; `block` the handle that a program holds; `notifier` the
protocols of notifiers; `change` the events, and the change that all notifiers accept or none; `parts` discards and
replacements of pages; `discards` the claims on discards; `progress` reports of long changes.
`pyvfio.ramblock.RamBlockList` orders all changes.
"""
