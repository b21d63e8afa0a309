"""`pyvfio.ioctls` is `<linux/vfio.h>`: every name, number, size, offset and type, proven twice.

The frozen table ``vfio_abi.txt`` was not made from `pyvfio.ioctls`, and the C compiler reads this machine's header.
What that header does not know is found by trying to compile it, name by name, and must then be newer than the header
(or older: removed) by what the table says.
"""

from __future__ import annotations

import ctypes
import enum
import inspect
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pyvfio import ioctls

HEADER = "#include <stddef.h>\n#include <stdio.h>\n#include <linux/version.h>\n#include <linux/vfio.h>\n"
C_TYPES = {"u8": "__u8", "u16": "__u16", "u32": "__u32", "u64": "__u64", "s32": "__s32", "pointer": "__u64 *"}
PYTHON_TYPES: dict[type, str] = {
    ctypes.c_uint8: "u8",
    ctypes.c_uint16: "u16",
    ctypes.c_uint32: "u32",
    ctypes.c_uint64: "u64",
    ctypes.c_int32: "s32",
    ctypes.c_void_p: "pointer",
}
# Each has a test of its own below.
FACTORIES = {"feature_dma_buf", "irq_set_eventfds", "pci_hot_reset", "pci_hot_reset_info"}


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


def life_of(words: list[str]) -> Life:
    marks = dict(zip(words[::2], words[1::2], strict=True))
    assert marks.keys() <= {"since", "until"}, words
    bounds = {mark: tuple(map(int, version.split("."))) for mark, version in marks.items()}
    return Life(**{mark: (bound[0], bound[1]) for mark, bound in bounds.items()})


def read_table() -> Table:
    table = Table()
    struct = Struct(0, Life())
    for line in (Path(__file__).parent / "vfio_abi.txt").read_text().splitlines():
        match line.split("#")[0].split():
            case []:
                continue
            case ["constant", name, value, *rest]:
                assert name not in table.constants, line
                table.constants[name] = int(value, 0), life_of(rest)
            case ["string", name, value]:
                table.strings[name] = value
            case ["own", name, value]:
                table.own[name] = int(value, 0)
            case ["struct" | "joined" as kind, name, size, *rest]:
                struct = Struct(int(size), life_of(rest))
                (table.structs if kind == "struct" else table.joined)[name] = struct
            case [name, offset, type_, *rest] if line.startswith("    "):
                struct.fields[name] = Field(int(offset), type_, life_of(rest))
            case _:
                raise AssertionError(f"vfio_abi.txt: {line!r}")
    return table


TABLE = read_table()


def python_constants() -> dict[str, int]:
    """The public numbers of `pyvfio.ioctls`, unsigned; VFIO_TYPE is a character in C and so a number there."""
    found = {n: v for n, v in vars(ioctls).items() if n.startswith("VFIO_") and not n.endswith("_STRING")}
    return {name: ord(value) if isinstance(value, str) else int(value) for name, value in found.items()}


def python_structs() -> dict[str, type[ctypes.Structure]]:
    found = vars(ioctls).items()
    return {name: cls for name, cls in found if is_class(cls, ctypes.Structure) and not name.startswith("_")}


def python_enums() -> dict[str, type[enum.IntEnum | enum.IntFlag]]:
    return {name: cls for name, cls in vars(ioctls).items() if is_class(cls, enum.Enum)}


def is_class(thing: object, base: type) -> bool:
    return isinstance(thing, type) and issubclass(thing, base) and thing.__module__ == ioctls.__name__


def python_fields(struct: type[ctypes.Structure]) -> dict[str, tuple[int, int, str]]:
    """Its own fields by name: offset, size and type; those of an anonymous union under their own names."""
    return dict(flat_fields(struct._fields_, struct))


def flat_fields(fields: object, owner: type) -> Iterator[tuple[str, tuple[int, int, str]]]:
    assert isinstance(fields, list)
    for name, type_ in fields:
        if is_class(type_, ctypes.Union):
            yield from flat_fields(type_._fields_, owner)
        else:
            place = getattr(owner, name)
            yield name, (place.offset, place.size, PYTHON_TYPES.get(type_, type_.__name__))


# --------------------------------------------------------------------------------------- against the frozen table


def test_every_public_name_is_in_the_table_or_covered_by_its_members() -> None:
    names = {
        name
        for name, value in vars(ioctls).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", ioctls.__name__) == ioctls.__name__
        and name != "annotations"
    }
    described = {*TABLE.constants, *TABLE.strings, *TABLE.structs, *TABLE.own, *TABLE.joined}
    assert names - described - python_enums().keys() == FACTORIES
    assert described - names == set(), "the table has names that pyvfio.ioctls has not"


@pytest.mark.parametrize("name", TABLE.constants)
def test_a_constant_has_the_number_in_the_table(name: str) -> None:
    assert python_constants()[name] == TABLE.constants[name][0]


def test_a_string_is_that_in_the_table() -> None:
    assert {name: getattr(ioctls, name) for name in TABLE.strings} == TABLE.strings


def test_the_sizes_before_structures_grew_are_those_in_the_table() -> None:
    assert {name: python_constants()[name] for name in TABLE.own} == TABLE.own


@pytest.mark.parametrize("name", [*TABLE.structs, *TABLE.joined])
def test_a_structure_has_the_layout_in_the_table(name: str) -> None:
    struct, frozen = python_structs()[name], {**TABLE.structs, **TABLE.joined}[name]
    assert ctypes.sizeof(struct) == frozen.size
    layout = [(field, offset, type_) for field, (offset, _, type_) in python_fields(struct).items()]
    assert layout == [(field, there.offset, there.type) for field, there in frozen.fields.items()]


def test_every_flag_and_index_is_reachable_under_its_name_in_the_header() -> None:
    for cls in python_enums().values():
        assert {name: getattr(ioctls, name) for name in cls.__members__} == dict(cls.__members__)
        assert all(type(getattr(ioctls, name)) is cls for name in cls.__members__)


def test_every_request_is_0x3b64_plus_its_number() -> None:
    requests = {name: value for name, value in python_constants().items() if 0x3B00 <= value < 0x3C00}
    source = inspect.getsource(ioctls)
    numbers = {name: int(number) for name, number in re.findall(r"^(VFIO_\w+) = _io\((\d+)\)", source, re.MULTILINE)}
    assert requests == {name: 0x3B64 + number for name, number in numbers.items()}
    assert len(requests) == 28


def test_a_structure_says_which_fields_it_has_to_the_type_checker() -> None:
    for name, struct in python_structs().items():
        fields = {field for field in python_fields(struct) if not field.startswith("__")}
        assert fields <= struct.__annotations__.keys() <= {*fields, "devices"}, name


# --------------------------------------------------------------------------------------- against the C compiler


@dataclass(frozen=True)
class Header:
    """What the compiler found in this machine's <linux/vfio.h>; a struct's size has the field name ''."""

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
        pytest.fail(f"<linux/vfio.h> cannot be compiled: install the package linux-libc-dev\n{answer.stderr}")
    return answer


def unknown_to_header(expressions: list[str], directory: Path) -> set[str]:
    """Those that do not compile: each is on a line of its own, and the compiler names the lines."""
    first = HEADER.count("\n") + 1
    lines = [f"enum {{ probe{number} = !sizeof({text}) }};\n" for number, text in enumerate(expressions)]
    (directory / "probe.c").write_text(HEADER + "".join(lines))
    answer = run_compiler(["-fsyntax-only", "-fmax-errors=0", "probe.c"], directory, check=False)
    guilty = {int(line) - first for line in re.findall(r"^probe\.c:(\d+):\d+: error:", answer.stderr, re.MULTILINE)}
    assert all(number in range(len(expressions)) for number in guilty), answer.stderr
    return {expressions[number] for number in guilty}


def kind(value: str) -> str:
    choices = ", ".join(f'{c_type}: "{name}"' for name, c_type in C_TYPES.items())
    return f'_Generic(({value}), {choices}, default: "struct")'


@pytest.fixture(scope="session")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    """One C program that prints all that the table names and the header knows."""
    directory = tmp_path_factory.mktemp("abi")
    members = {(name, each): f"((struct {name} *)0)->{each}" for name in TABLE.structs for each in python_names(name)}
    sizes = {(name, ""): f"struct {name}" for name in TABLE.structs}
    unknown = unknown_to_header([*TABLE.constants, *members.values(), *sizes.values()], directory)
    program = [HEADER, "int main(void) {\n", 'printf("version %d %d\\n", LINUX_VERSION_CODE >> 16, ']
    program += ["(LINUX_VERSION_CODE >> 8) & 255);\n"]
    program += [f'printf("{c} %u\\n", (unsigned)({c}));\n' for c in TABLE.constants if c not in unknown]
    program += [f'printf("%s %s string\\n", "{name}", {name});\n' for name in TABLE.strings]
    program += [
        f'printf("{name}. 0 %zu size\\n", sizeof({c}));\n' for (name, _), c in sizes.items() if c not in unknown
    ]
    for (name, each), value in members.items():
        if value not in unknown:
            place = f"offsetof(struct {name}, {each}), sizeof({value}), {kind(value)}"
            program.append(f'printf("{name}.{each} %zu %zu %s\\n", {place});\n')
    (directory / "print.c").write_text("".join([*program, "return 0; }\n"]))
    run_compiler(["-o", "print", "print.c"], directory, check=True)
    return read_header(subprocess.run([directory / "print"], capture_output=True, text=True, check=True).stdout)


def python_names(struct: str) -> list[str]:
    return list(python_fields(python_structs()[struct]))


def read_header(printed: str) -> Header:
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
    return Header(version, constants, strings, structs)


def test_the_header_has_nothing_of_the_table_in_another_shape(header: Header) -> None:
    expected = {name: value for name, value in python_constants().items() if name in header.constants}
    assert header.constants == expected
    assert header.strings == TABLE.strings
    for (name, member), there in header.structs.items():
        if member:
            offset, size, type_ = python_fields(python_structs()[name])[member]
            assert there == (offset, size, type_ if type_ in C_TYPES else "struct"), f"{name}.{member}"


def test_a_structure_is_as_long_as_the_header_says_unless_the_header_lacks_fields(header: Header) -> None:
    for name, struct in python_structs().items():
        if (name, "") not in header.structs:
            continue
        size = header.structs[name, ""][1]
        if all((name, member) in header.structs for member in python_fields(struct)):
            assert size == ctypes.sizeof(struct), name
        else:
            assert size <= ctypes.sizeof(struct), name


def test_what_the_header_does_not_know_is_newer_or_was_removed_by_the_table(header: Header) -> None:
    # A distribution may carry newer names under an old version, so a name that is known is never held against it.
    version, missing = header.version, []
    for name, (_, life) in TABLE.constants.items():
        if name not in header.constants and life.expected_in(version):
            missing.append(name)
    for name, struct in TABLE.structs.items():
        if (name, "") not in header.structs:
            missing += [name] if struct.life.expected_in(version) else []
            continue
        for member, there in struct.fields.items():
            if (name, member) not in header.structs and there.life.expected_in(version):
                missing.append(f"{name}.{member}")
    assert missing == [], f"<linux/vfio.h> of {version} should know these"


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
