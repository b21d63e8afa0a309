"""RAM blocks: what a block is, who is told of a change, and how a change is made or undone.

`block` has the block, `notifier` the listeners' protocols, `change` the events and the change that all listeners accept
or none, `parts` discards and replacements, `discards` the claims on them, and `progress` reports of long changes.
`pyvfio.ramblock.RamBlockList` makes all changes.
"""
