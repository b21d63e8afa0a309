"""`pyvfio.ioctls` is `<linux/vfio.h>` and `pyvfio.iommufd_ioctls` is `<linux/iommufd.h>`: every name, number, size,
offset and type, proven twice.

The frozen tables ``vfio_abi.txt`` and ``iommufd_abi.txt`` were not made from these modules, and the C compiler reads
this machine's headers. What a header does not know is found by trying to compile it, name by name, and must then be
newer than the header (or older: removed) by what the table says. A machine whose headers are older than 6.2 has no
``<linux/iommufd.h>``, and so knows none of its names.
"""

from __future__ import annotations

import ctypes
import enum
import inspect
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from pyvfio import ioctls, iommufd_ioctls

C_TYPES = {"u8": "__u8", "u16": "__u16", "u32": "__u32", "u64": "__u64", "s32": "__s32", "pointer": "__u64 *"}
PYTHON_TYPES: dict[type, str] = {
    ctypes.c_uint8: "u8",
    ctypes.c_uint16: "u16",
    ctypes.c_uint32: "u32",
    ctypes.c_uint64: "u64",
    ctypes.c_int32: "s32",
    ctypes.c_void_p: "pointer",
}


@dataclass(frozen=True)
class Life:
    """Which headers have a name: from `since` up to, without, `until`."""

    since: tuple[int, int] = (0, 0)
    until: tuple[int, int] = (999, 0)

    def expected_in(self, version: tuple[int, int]) -> bool:
        return self.since <= version < self.until


@dataclass(frozen=True)
class Field:
    offset: int
    type: str
    life: Life


@dataclass(frozen=True)
class Struct:
    size: int
    life: Life
    fields: dict[str, Field] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    constants: dict[str, tuple[int, Life]] = field(default_factory=dict)
    strings: dict[str, str] = field(default_factory=dict)
    structs: dict[str, Struct] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=dict)
    joined: dict[str, Struct] = field(default_factory=dict)


@dataclass(frozen=True)
class Abi:
    """A header of the kernel, the module that is that header, and the frozen table."""

    module: ModuleType
    header: str
    table_file: str
    prefixes: tuple[str, ...]
    functions: frozenset[str] = frozenset()  # each has a test of its own below
    life: Life = Life()  # of a name without a mark in the table

    def __str__(self) -> str:
        return self.header

    @property
    def includes(self) -> str:
        """The head of a C program; a machine can lack the header."""
        optional = f"#if __has_include(<{self.header}>)\n#include <{self.header}>\n#endif\n"
        return f"#include <stddef.h>\n#include <stdio.h>\n#include <linux/version.h>\n{optional}"

    @property
    def table(self) -> Table:
        return read_table(self.table_file, self.life)

    def constants(self) -> dict[str, int]:
        """The module's public numbers, unsigned; a type such as VFIO_TYPE is a character in C and so a number there."""
        found = {name: value for name, value in vars(self.module).items() if name.startswith(self.prefixes)}
        found = {name: value for name, value in found.items() if not name.endswith("_STRING")}
        return {name: ord(value) if isinstance(value, str) else int(value) for name, value in found.items()}

    def structs(self) -> dict[str, type[ctypes.Structure]]:
        found = vars(self.module).items()
        return {name: cls for name, cls in found if self.has(cls, ctypes.Structure) and not name.startswith("_")}

    def enums(self) -> dict[str, type[enum.IntEnum | enum.IntFlag]]:
        return {name: cls for name, cls in vars(self.module).items() if self.has(cls, enum.Enum)}

    def has(self, thing: object, base: type) -> bool:
        return isinstance(thing, type) and issubclass(thing, base) and thing.__module__ == self.module.__name__


def life_of(words: list[str], unmarked: Life) -> Life:
    marks = dict(zip(words[::2], words[1::2], strict=True))
    assert marks.keys() <= {"since", "until"}, words
    bounds = {mark: tuple(map(int, version.split("."))) for mark, version in marks.items()}
    return replace(unmarked, **{mark: (bound[0], bound[1]) for mark, bound in bounds.items()})


@cache
def read_table(file: str, unmarked: Life) -> Table:
    table = Table()
    struct = Struct(0, Life())
    for line in (Path(__file__).parent / file).read_text().splitlines():
        match line.split("#")[0].split():
            case []:
                continue
            case ["constant", name, value, *rest]:
                assert name not in table.constants, line
                table.constants[name] = int(value, 0), life_of(rest, unmarked)
            case ["string", name, value]:
                table.strings[name] = value
            case ["own", name, value]:
                table.own[name] = int(value, 0)
            case ["struct" | "joined" as kind, name, size, *rest]:
                struct = Struct(int(size), life_of(rest, unmarked))
                (table.structs if kind == "struct" else table.joined)[name] = struct
            case [name, offset, type_, *rest] if line.startswith("    "):
                struct.fields[name] = Field(int(offset), type_, life_of(rest, struct.life))
            case _:
                raise AssertionError(f"{file}: {line!r}")
    return table


FACTORIES = frozenset({"feature_dma_buf", "irq_set_eventfds", "pci_hot_reset", "pci_hot_reset_info"})
VFIO = Abi(ioctls, "linux/vfio.h", "vfio_abi.txt", ("VFIO_",), FACTORIES)
IOMMUFD = Abi(iommufd_ioctls, "linux/iommufd.h", "iommufd_abi.txt", ("IOMMU_", "IOMMUFD_"), life=Life(since=(6, 2)))
ABIS = (VFIO, IOMMUFD)
of_both = pytest.mark.parametrize("abi", ABIS, ids=str)


def python_fields(struct: type[ctypes.Structure]) -> dict[str, tuple[int, int, str]]:
    """Its own fields by name: offset, size and type; those of an anonymous union under their own names."""
    return dict(flat_fields(struct._fields_, struct))


def flat_fields(fields: object, owner: type) -> Iterator[tuple[str, tuple[int, int, str]]]:
    assert isinstance(fields, list)
    for name, type_ in fields:
        if issubclass(type_, ctypes.Union):
            yield from flat_fields(type_._fields_, owner)
        else:
            place = getattr(owner, name)
            yield name, (place.offset, place.size, type_name(type_))


def type_name(type_: type) -> str:
    if issubclass(type_, ctypes.Array):
        made = vars(type_)  # type checkers know these two of instances only
        return f"{type_name(made['_type_'])}[{made['_length_']}]"
    return PYTHON_TYPES.get(type_, type_.__name__)


# --------------------------------------------------------------------------------------- against the frozen table


@of_both
def test_every_public_name_is_in_the_table_or_covered_by_its_members(abi: Abi) -> None:
    home = abi.module.__name__
    names = {
        name
        for name, value in vars(abi.module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", home) == home
        and name != "annotations"
    }
    table = abi.table
    described = {*table.constants, *table.strings, *table.structs, *table.own, *table.joined}
    assert names - described - abi.enums().keys() == abi.functions
    assert described - names == set(), f"the table has names that {home} has not"


@pytest.mark.parametrize(("abi", "name"), [(abi, name) for abi in ABIS for name in abi.table.constants], ids=str)
def test_a_constant_has_the_number_in_the_table(abi: Abi, name: str) -> None:
    assert abi.constants()[name] == abi.table.constants[name][0]


@of_both
def test_a_string_is_that_in_the_table(abi: Abi) -> None:
    assert {name: getattr(abi.module, name) for name in abi.table.strings} == abi.table.strings


@of_both
def test_the_sizes_before_structures_grew_are_those_in_the_table(abi: Abi) -> None:
    assert {name: abi.constants()[name] for name in abi.table.own} == abi.table.own


STRUCTS = [(abi, name) for abi in ABIS for name in [*abi.table.structs, *abi.table.joined]]


@pytest.mark.parametrize(("abi", "name"), STRUCTS, ids=str)
def test_a_structure_has_the_layout_in_the_table(abi: Abi, name: str) -> None:
    struct, frozen = abi.structs()[name], {**abi.table.structs, **abi.table.joined}[name]
    assert ctypes.sizeof(struct) == frozen.size
    layout = [(field, offset, type_) for field, (offset, _, type_) in python_fields(struct).items()]
    assert layout == [(field, there.offset, there.type) for field, there in frozen.fields.items()]


@of_both
def test_every_flag_and_index_is_reachable_under_its_name_in_the_header(abi: Abi) -> None:
    for cls in abi.enums().values():
        assert {name: getattr(abi.module, name) for name in cls.__members__} == dict(cls.__members__)
        assert all(type(getattr(abi.module, name)) is cls for name in cls.__members__)


def test_every_request_is_0x3b64_plus_its_number() -> None:
    requests = {name: value for name, value in VFIO.constants().items() if 0x3B00 <= value < 0x3C00}
    source = inspect.getsource(ioctls)
    numbers = {name: int(number) for name, number in re.findall(r"^(VFIO_\w+) = _io\((\d+)\)", source, re.MULTILINE)}
    assert requests == {name: 0x3B64 + number for name, number in numbers.items()}
    assert len(requests) == 28


def test_every_request_of_iommufd_is_0x3b00_plus_the_command_of_its_name() -> None:
    requests = {name: value for name, value in IOMMUFD.constants().items() if 0x3B00 <= value < 0x3C00}
    commands = iommufd_ioctls.IommufdCmd.__members__
    expected = {name.replace("IOMMUFD_CMD_", "IOMMU_"): 0x3B00 + number for name, number in commands.items()}
    assert requests == expected
    assert list(requests.values()) == list(range(0x3B80, 0x3B96))


@of_both
def test_a_structure_says_which_fields_it_has_to_the_type_checker(abi: Abi) -> None:
    for name, struct in abi.structs().items():
        fields = {field for field in python_fields(struct) if not field.startswith("__")}
        assert fields <= struct.__annotations__.keys() <= {*fields, "devices"}, name


# --------------------------------------------------------------------------------------- against the C compiler


@dataclass(frozen=True)
class Header:
    """What the compiler found in this machine's header; a struct's size has the field name ''."""

    abi: Abi
    version: tuple[int, int]
    constants: dict[str, int]
    strings: dict[str, str]
    structs: dict[tuple[str, str], tuple[int, int, str]]


def run_compiler(arguments: list[str], directory: Path, *, check: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}  # its complaints are read below
    try:
        answer = subprocess.run(
            ["cc", *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.fail("There is no C compiler 'cc' to check the ABI with: install the packages gcc and linux-libc-dev")
    if "fatal error" in answer.stderr or (check and answer.returncode):
        pytest.fail(f"The kernel's headers cannot be compiled: install the package linux-libc-dev\n{answer.stderr}")
    return answer


def unknown_to_header(abi: Abi, expressions: list[str], directory: Path) -> set[str]:
    """Those that do not compile: each is on a line of its own, and the compiler names the lines."""
    first = abi.includes.count("\n") + 1
    lines = [f"enum {{ probe{number} = !sizeof({text}) }};\n" for number, text in enumerate(expressions)]
    (directory / "probe.c").write_text(abi.includes + "".join(lines))
    answer = run_compiler(["-fsyntax-only", "-fmax-errors=0", "probe.c"], directory, check=False)
    guilty = {int(line) - first for line in re.findall(r"^probe\.c:(\d+):\d+: error:", answer.stderr, re.MULTILINE)}
    assert all(number in range(len(expressions)) for number in guilty), answer.stderr
    return {expressions[number] for number in guilty}


def kind(value: str) -> str:
    choices = ", ".join(f'{c_type}: "{name}"' for name, c_type in C_TYPES.items())
    return f'_Generic(({value}), {choices}, default: "struct")'


@pytest.fixture(scope="session", params=ABIS, ids=str)
def header(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Header:
    """One C program that prints all that the table names and the header knows."""
    abi: Abi = request.param
    table, directory = abi.table, tmp_path_factory.mktemp("abi")
    fields = [(name, each, type_) for name in table.structs for each, type_ in python_types(abi, name)]
    members = {(name, each): f"((struct {name} *)0)->{each}" for name, each, _ in fields}
    # An array is printed by the first element: what is no array then does not compile.
    items = {(name, each): members[name, each] + ("[0]" if "[" in type_ else "") for name, each, type_ in fields}
    sizes = {(name, ""): f"struct {name}" for name in table.structs}
    unknown = unknown_to_header(abi, [*table.constants, *items.values(), *sizes.values()], directory)
    program = [abi.includes, "int main(void) {\n", 'printf("version %d %d\\n", LINUX_VERSION_CODE >> 16, ']
    program += ["(LINUX_VERSION_CODE >> 8) & 255);\n"]
    program += [f'printf("{c} %u\\n", (unsigned)({c}));\n' for c in table.constants if c not in unknown]
    program += [f'printf("%s %s string\\n", "{name}", {name});\n' for name in table.strings]
    program += [
        f'printf("{name}. 0 %zu size\\n", sizeof({c}));\n' for (name, _), c in sizes.items() if c not in unknown
    ]
    for (name, each), value in members.items():
        if (item := items[name, each]) not in unknown:
            place = f"offsetof(struct {name}, {each}), sizeof({value}), {kind(item)}"
            length = f"sizeof({value}) / sizeof({item})"
            program.append(
                f'printf("{name}.{each} %zu %zu %s[%zu]\\n", {place}, {length});\n'
                if item != value
                else f'printf("{name}.{each} %zu %zu %s\\n", {place});\n'
            )
    (directory / "print.c").write_text("".join([*program, "return 0; }\n"]))
    run_compiler(["-o", "print", "print.c"], directory, check=True)
    return read_header(abi, subprocess.run([directory / "print"], capture_output=True, text=True, check=True).stdout)


def python_types(abi: Abi, struct: str) -> list[tuple[str, str]]:
    return [(name, type_) for name, (_, _, type_) in python_fields(abi.structs()[struct]).items()]


def read_header(abi: Abi, printed: str) -> Header:
    version = (0, 0)
    constants: dict[str, int] = {}
    strings: dict[str, str] = {}
    structs: dict[tuple[str, str], tuple[int, int, str]] = {}
    for line in printed.splitlines():
        match line.split():
            case ["version", major, minor]:
                version = int(major), int(minor)
            case [name, value, "string"]:
                strings[name] = value
            case [name, value]:
                constants[name] = int(value)
            case [name, offset, size, type_]:
                struct, _, member = name.partition(".")
                structs[struct, member] = int(offset), int(size), type_
    return Header(abi, version, constants, strings, structs)


def test_the_header_has_nothing_of_the_table_in_another_shape(header: Header) -> None:
    abi = header.abi
    expected = {name: value for name, value in abi.constants().items() if name in header.constants}
    assert header.constants == expected
    assert header.strings == abi.table.strings
    for (name, member), there in header.structs.items():
        # An older header can have more reserved bytes, in the place of fields that came later.
        if not member or (
            member.startswith("__") and not abi.table.structs[name].fields[member].life.expected_in(header.version)
        ):
            continue
        offset, size, type_ = python_fields(abi.structs()[name])[member]
        is_plain = type_.partition("[")[0] in C_TYPES
        assert there == (offset, size, type_ if is_plain else "struct"), f"{name}.{member}"


def test_a_structure_is_as_long_as_the_header_says_unless_the_header_lacks_fields(header: Header) -> None:
    for name, struct in header.abi.structs().items():
        if (name, "") not in header.structs:
            continue
        size = header.structs[name, ""][1]
        if all((name, member) in header.structs for member in python_fields(struct)):
            assert size == ctypes.sizeof(struct), name
        else:
            assert size <= ctypes.sizeof(struct), name


def test_what_the_header_does_not_know_is_newer_or_was_removed_by_the_table(header: Header) -> None:
    # A distribution may carry newer names under an old version, so a name that is known is never held against it.
    version, table, missing = header.version, header.abi.table, []
    for name, (_, life) in table.constants.items():
        if name not in header.constants and life.expected_in(version):
            missing.append(name)
    for name, struct in table.structs.items():
        if (name, "") not in header.structs:
            missing += [name] if struct.life.expected_in(version) else []
            continue
        for member, there in struct.fields.items():
            if (name, member) not in header.structs and there.life.expected_in(version):
                missing.append(f"{name}.{member}")
    assert missing == [], f"<{header.abi.header}> of {version} should know these"


# --------------------------------------------------------------------------------------- the functions


def test_irq_set_eventfds_puts_the_fds_after_the_20_bytes() -> None:
    flags = ioctls.VFIO_IRQ_SET_DATA_EVENTFD | ioctls.VFIO_IRQ_SET_ACTION_TRIGGER
    made = ioctls.irq_set_eventfds(flags=flags, index=ioctls.VFIO_PCI_MSIX_IRQ_INDEX, start=1, eventfds=[7, -1])
    assert bytes(made) == bytes.fromhex("1c000000 24000000 02000000 01000000 02000000 07000000 ffffffff")


def test_irq_set_eventfds_of_none_is_the_bare_structure() -> None:
    made = ioctls.irq_set_eventfds(flags=0x21, index=2, start=0, eventfds=[])
    assert bytes(made) == bytes.fromhex("14000000 21000000 02000000 00000000 00000000")


def test_feature_dma_buf_puts_the_ranges_after_the_16_bytes() -> None:
    made = ioctls.feature_dma_buf(region_index=2, open_flags=0x80002, ranges=[(0x1000, 0x2000), (0x8000, 0x1000)])
    words = "02000000 02000800 00000000 02000000 0010000000000000 0020000000000000 0080000000000000 0010000000000000"
    assert bytes(made) == bytes.fromhex(words)


def test_pci_hot_reset_puts_the_fds_of_the_groups_after_the_12_bytes() -> None:
    made = ioctls.pci_hot_reset(group_fds=[5, 6])
    assert bytes(made) == bytes.fromhex("14000000 00000000 02000000 05000000 06000000")


def test_pci_hot_reset_info_has_room_for_8_bytes_a_device() -> None:
    made = ioctls.pci_hot_reset_info(count=2)
    assert (ctypes.sizeof(made), made.argsz, made.count) == (28, 28, 0)
    ctypes.memmove(ctypes.addressof(made) + 20, bytes.fromhex("0d000000 0100 02 18"), 8)
    second = made.devices[1]
    assert (second.group_id, second.devid, second.segment, second.bus, second.devfn) == (13, 13, 1, 2, 0x18)
