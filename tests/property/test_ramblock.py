"""Blocks, notifiers and failures at random, against a model: what everybody must know, and what must be in memory."""

from __future__ import annotations

import errno
import warnings
from contextlib import suppress

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyvfio.errors import MemoryNotReturnedWarning
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.testing import FakeKernel
from pyvfio.units import PAGE_SIZE

MAX_PAGES = 6
NAMES = ("a", "b", "c")
pages = st.integers(0, MAX_PAGES)


class RefusalError(Exception):
    """A hook does not want it."""


class Follower:
    """Knows what it was told, refuses when its turn comes, and sees to it that all it was told of is memory."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.refuse_in = -1

    def _turn(self) -> None:
        self.refuse_in -= 1
        if self.refuse_in == 0:
            raise RefusalError

    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """A block has come."""
        assert block.idstr not in self.known
        assert used_length <= block.state.memory.length
        assert max_length == block.max_length
        self._turn()
        self.known[block.idstr] = used_length

    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """A block goes."""
        assert self.known[block.idstr] == used_length <= block.state.memory.length
        assert max_length == block.max_length
        self._turn()
        del self.known[block.idstr]

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """A block changes."""
        assert self.known[block.idstr] == old_length
        assert max(old_length, new_length) <= block.state.memory.length
        self._turn()
        self.known[block.idstr] = new_length


class BlocksMachine(RuleBasedStateMachine):
    """Three names for blocks of six pages at most, up to three notifiers, and calls that fail now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = FakeKernel()
        self.blocks = RamBlockList(kernel=self.kernel)
        self.followers: list[Follower] = []
        self.model: dict[str, bytearray] = {}
        self.views: dict[str, list[memoryview]] = {}
        self.veto = False

    def teardown(self) -> None:
        """All of it goes."""
        self.calm()
        self.views.clear()
        self.blocks.close()
        self.kernel.shutdown()

    def calm(self) -> None:
        """Nobody refuses, nothing fails."""
        self.kernel.clear_failures()
        for follower in self.followers:
            follower.refuse_in = -1

    @precondition(lambda self: len(self.model) < len(NAMES))
    @rule(used=pages)
    def add(self, *, used: int) -> None:
        """It reads zero; or there is no such block."""
        idstr = next(name for name in NAMES if name not in self.model)
        try:
            block = self.blocks.add(idstr, used_length=used * PAGE_SIZE, max_length=MAX_PAGES * PAGE_SIZE)
        except (RefusalError, OSError):
            self.calm()
        else:
            self.model[idstr] = bytearray(block.used_length)
            self.views[idstr] = []
        self.calm()

    @precondition(lambda self: bool(self.model))
    @rule(data=st.data())
    def remove(self, *, data: st.DataObject) -> None:
        """Unless a view of it lives or somebody refuses."""
        idstr = data.draw(st.sampled_from(sorted(self.model)))
        try:
            self.blocks[idstr].remove()
        except RefusalError:
            pass
        except BufferError:
            assert self.views[idstr]
        else:
            assert not any(self.views[idstr])
            del self.model[idstr], self.views[idstr]
        self.calm()

    @precondition(lambda self: bool(self.model))
    @rule(data=st.data(), length=pages)
    def resize(self, *, data: st.DataObject, length: int) -> None:
        """What is below stays, what is new reads zero; or all is as it was."""
        idstr = data.draw(st.sampled_from(sorted(self.model)))
        contents, new = self.model[idstr], length * PAGE_SIZE
        reached = max(map(len, self.views[idstr]), default=0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MemoryNotReturnedWarning)
                self.blocks[idstr].resize(new)
        except BufferError:
            assert new < reached
        except (RefusalError, OSError):
            assert new != len(contents)
        else:
            assert new >= reached or new == len(contents)
            self.model[idstr] = contents[:new] + bytes(max(0, new - len(contents)))
        self.calm()

    @precondition(lambda self: bool(self.model))
    @rule(data=st.data(), byte=st.integers(1, 255))
    def write(self, *, data: st.DataObject, byte: int) -> None:
        """All of a block."""
        idstr = data.draw(st.sampled_from(sorted(self.model)))
        self.model[idstr][:] = bytes([byte]) * len(self.model[idstr])
        with self.blocks[idstr].view() as view:
            view[:] = self.model[idstr]

    @precondition(lambda self: bool(self.model))
    @rule(data=st.data())
    def look(self, *, data: st.DataObject) -> None:
        """And keep the view."""
        idstr = data.draw(st.sampled_from(sorted(self.model)))
        if self.model[idstr]:
            self.views[idstr].append(self.blocks[idstr].view())

    @precondition(lambda self: any(self.views.values()))
    @rule(data=st.data())
    def look_away(self, *, data: st.DataObject) -> None:
        """Let go of one."""
        idstr = data.draw(st.sampled_from(sorted(name for name, views in self.views.items() if views)))
        self.views[idstr].pop(data.draw(st.integers(0, len(self.views[idstr]) - 1))).release()

    @precondition(lambda self: len(self.followers) < 3)
    @rule(refuse_in=st.integers(-1, 3))
    def follow(self, *, refuse_in: int) -> None:
        """A notifier comes, and is told of all; or it does not, and knows nothing."""
        follower = Follower()
        follower.refuse_in = refuse_in
        try:
            self.blocks.add_notifier(follower)
        except RefusalError:
            assert not follower.known
        else:
            self.followers.insert(0, follower)
        self.calm()

    @precondition(lambda self: bool(self.followers))
    @rule(data=st.data())
    def leave(self, *, data: st.DataObject) -> None:
        """A notifier goes, and knows nothing any more; or it stays."""
        follower = data.draw(st.sampled_from(self.followers))
        with suppress(RefusalError):
            self.blocks.remove_notifier(follower)
            assert not follower.known
            self.followers.remove(follower)
        self.calm()

    @precondition(lambda self: bool(self.followers))
    @rule(data=st.data(), turn=st.integers(1, 3))
    def will_refuse(self, *, data: st.DataObject, turn: int) -> None:
        """One of the notifiers will refuse in the next change. A second would refuse its undo: another story."""
        chosen = data.draw(st.sampled_from(self.followers))
        for follower in self.followers:
            follower.refuse_in = turn if follower is chosen else -1

    @rule(call=st.sampled_from(["mprotect", "mmap", "madvise", "munmap"]), nth=st.integers(1, 3))
    def will_fail(self, *, call: str, nth: int) -> None:
        """A system call will fail in the next change."""
        self.kernel.fail(call=call, errno=errno.ENOMEM, nth=nth)

    @invariant()
    def agrees(self) -> None:
        """List, notifiers and memory are what the model says."""
        self.blocks._check()
        lengths = {idstr: len(contents) for idstr, contents in self.model.items()}
        assert {block.idstr: block.used_length for block in self.blocks} == lengths
        for follower in self.followers:
            assert follower.known == lengths
        for idstr, contents in self.model.items():
            with self.blocks[idstr].view() as view:
                assert view == contents
            for kept in self.views[idstr]:
                assert kept == contents[: len(kept)]


BlocksMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestBlocks = BlocksMachine.TestCase
