"""Mistakes in how windows of BARs are mapped and dropped: tests/unit/test_windows.py has to notice each."""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutant import Mutant, Suite

_MUTANTS = (
    # A write that ends decoding is not known as such.
    Mutant("ConfigSpace._effect", "offset <= PCI_COMMAND < end", "offset == PCI_COMMAND"),
    Mutant("ConfigSpace._effect", "else _Effect.STOP\n", "else _Effect.NONE\n"),
    Mutant("ConfigSpace._effect", "offset <= at < end", "offset == at"),
    Mutant("_BYTES", "(_PM, _PM_CONTROL, _PM_STATE, _Effect.STOP)", "(_PM, _PM_CONTROL + 1, _PM_STATE, _Effect.STOP)"),
    Mutant("_BYTES", "    (_AF, _AF_CONTROL, _AF_FLR, _Effect.RESET),\n", ""),
    # Another is taken for one.
    Mutant("ConfigSpace._effect", "data[PCI_COMMAND - offset] & PCI_COMMAND_MEMORY", "False"),
    # Decoding begins between the look at the device and the write.
    Mutant("ConfigSpace._write", "            self._start(offset, data)\n", "            self._pwrite(offset, data)\n"),
    # A write is not looked at.
    Mutant("ConfigSpace._put", "self._watched_bytes >> offset & (1 << width) - 1", "False"),
    Mutant("ConfigSpace._put", "(1 << width) - 1", "1"),
    Mutant("ConfigSpace._find_watched", ", 1 << PCI_COMMAND)", ", 0)"),
    # Windows go when the device answers no more.
    Mutant(
        "Windows._change",
        '        attempt_all("unmapping registers", [partial(region.drop, keep=keep) for region in regions])\n',
        "",
    ),
    # A thread maps a window between the drop and the change.
    Mutant("Windows._change", "    @guarded\n    def _change", "    def _change"),
    # What was refused is taken for done.
    Mutant("Windows._change", "            self.low_power = before\n", ""),
    # Another device reaches a BAR that goes.
    Mutant("Windows._change", "            return []\n", "            pass\n"),
    # An access that meets a window which is dropped fails.
    Mutant("Region._check_dropped", "if window in self._windows:", "if True:"),
    Mutant("Region.read32", "except (IndexError, ValueError):", "except IndexError:"),
    Mutant("Region.write32", "except (IndexError, ValueError, TypeError):", "except (IndexError, TypeError):"),
    # Another register is reached.
    Mutant("Region.read32", "offset >= start and not offset & 3", "not offset & 3"),
    Mutant("Region.write32", "offset >= start and not offset & 3", "offset >= start"),
    Mutant("Region._load", "offset < start or offset % width", "offset < start"),
    Mutant("Region.read32", "numbers[offset - start >> 2]", "numbers[offset >> 2]"),
    Mutant("MappedRegisters.numbers", "[: size // width]", "[:]"),
    Mutant("Register.read", "        except ValueError:\n", "        except KeyError:\n"),
    # The wrong part is mapped.
    Mutant("Region._part", "min(start + size, window + _WINDOW_SIZE) - first", "_WINDOW_SIZE + _WINDOW_SIZE"),
    Mutant("Region.mappable", "self.size < PAGE_SIZE and self.info.sparse is None", "False"),
    # A window is made while a touch is SIGBUS.
    Mutant("Region._open_window", "        if self._device.windows.low_power:\n            return None\n", ""),
    Mutant("Region._open_window", "        self._check_decoding()\n", ""),
    Mutant("ConfigSpace.why_silent", "state := self.read8(power + _PM_CONTROL) & _PM_STATE", "state := 0"),
    # A child of this process reaches the device.
    Mutant("_after_fork", "        thing.forget()\n", "        pass\n"),
    Mutant("CallbackRegisters.forget", "        self._closed = True\n", "        pass\n"),
    Mutant("_Usable.forget", "        self.fd = -1\n", "        pass\n"),
    # A window is unmapped under an access.
    Mutant("MappedRegisters.close", "        self.forget()\n", ""),
    Mutant("MappedRegisters.forget", "*self._cells.values(), ", ""),
    Mutant("MappedRegisters.numbers", "        self._parts.append(view)\n", ""),
    # A device that has gone is taken for one that is there.
    Mutant("Region._check_ones", "            self._device.check_present()\n", "            pass\n"),
    Mutant("Region.read32", "                        self._check_ones()\n", "                        pass\n"),
    Mutant("ConfigSpace.check_present", "status | _STATUS_CAP_LIST == _NO_DEVICE", "status == 0xABCD"),
    Mutant("Device._reset_unless_removed", "error.errno != errno.EAGAIN", "True"),
    Mutant("poll", "            raise RegisterTimeoutError(", "            raise ValueError("),
)


def _rounds(_mutant: Mutant) -> list[list[str]]:
    return [["tests/unit/test_windows.py"]]


SUITE = Suite(Path("pyvfio"), _MUTANTS, _rounds)
