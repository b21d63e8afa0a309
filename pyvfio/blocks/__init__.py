"""RAM blocks: their state, the notifiers of changes, and the way that a change is made or undone.

* `state`: the state of a block, and each step that changes the state.
* `block`: the handle that a program holds.
* `index`: the blocks of a list, by name and by address.
* `notifier`: the protocols of notifiers.
* `change`: the events, and the change that all notifiers accept or none.
* `parts`: discards, and replacements of pages.
* `discards`: the claims on discards.
* `progress`: the reports of long changes.

`pyvfio.ramblock.RamBlockList` orders all changes.
"""
