"""The virtual machine's pure parts; tests/vm boots real ones."""

import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest

from pyvfio.cli import vm as cli
from pyvfio.testing import initramfs, kernels, packages, vm, vm_machine
from pyvfio.testing.vm_errors import KernelUnavailableError, MissingToolError, VmTimeoutError, find_tool

TARGETS = """\
http://mirror.invalid/debian/|bookworm|main|Packages
http://mirror.invalid/debian/|bookworm|main|Translations
http://mirror.invalid/debian/|bookworm-updates|main|Packages
http://security.invalid/|bookworm-security|main|Packages
http://vendor.invalid/debian/|bookworm|stable|Packages
http://vendor.invalid/apt/|bookworm-vendor|main|Packages
"""


def machine(
    iommu: str = "intel", *, icount: bool = False, memory: str = "2G", cpus: int = 1, devices: str = "edu"
) -> vm_machine.Machine:
    return vm_machine.Machine(iommu, memory, cpus, icount=icount, devices=devices, qemu_args=("-s",))


def command_line(of: vm_machine.Machine) -> list[str]:
    image, streams = Path("/k/vmlinuz"), (5, 6, 7)
    return vm_machine.qemu_command(
        "qemu", of, image, initrd="/dev/fd/9", log="/dev/fd/8", streams=streams, disk="/dev/fd/4"
    )


def option(words: list[str], name: str) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words) if word == name]


def cached_kernel(cache: Path, line: str, release: str) -> Path:
    entry = cache / "kernels" / line / release
    (entry / "modules").mkdir(parents=True)
    (entry / "vmlinuz").touch()
    return entry


def bzimage(release: str) -> bytes:
    head = bytearray(0x1000)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x600).to_bytes(2, "little")
    text = f"{release} (builder@host) #1 SMP".encode()
    head[0x800 : 0x800 + len(text)] = text
    return bytes(head)


@pytest.mark.parametrize("iommu", vm.IOMMUS)
def test_the_iommu_comes_before_the_devices_it_translates_for(iommu: str) -> None:
    devices = option(command_line(machine(iommu)), "-device")
    assert devices[0] == vm.IOMMUS[iommu].device
    assert devices[-2:] == ["edu,dma_mask=0xffffffffffffffff"] * 2


def test_a_machine_without_an_iommu_has_the_same_devices() -> None:
    """And the same command line of its kernel, but for the word that switches an IOMMU on."""
    without, with_one = command_line(machine(vm.NO_IOMMU)), command_line(machine("intel"))
    assert option(without, "-device") == option(with_one, "-device")[1:]
    assert option(without, "-append") == [option(with_one, "-append")[0].replace(" intel_iommu=on", "")]


def test_every_list_of_devices_begins_with_the_two_that_do_dma() -> None:
    for name, devices in vm.DEVICES.items():
        assert list(devices[:2]) == ["edu,dma_mask=0xffffffffffffffff"] * 2
        assert option(command_line(machine(devices=name)), "-device")[-len(devices) :] == list(devices)


def test_only_a_machine_whose_devices_refer_to_a_disk_has_one() -> None:
    for name, devices in vm.DEVICES.items():
        words = command_line(machine(devices=name))
        named = [word for word in option(words, "-blockdev") if "node-name=disk," in word]
        filed = [word for word in option(words, "-blockdev") if "filename=/dev/fd/4" in word]
        refers = any("drive=disk" in device for device in devices)
        assert (len(named), len(filed), name in vm.DISKS) == (refers, refers, refers)


def test_a_disk_is_there_before_the_devices_that_refer_to_it() -> None:
    words = command_line(machine(devices="nvme"))
    assert words.index("-object") < words.index("-blockdev") < words.index("nvme-ns,drive=disk,bus=controller,nsid=1")


def test_only_the_intel_iommus_are_switched_on_by_name() -> None:
    on = {name for name, iommu in vm.IOMMUS.items() if "intel_iommu=on" in vm_machine.kernel_parameters(iommu).split()}
    assert on == {"intel", "intel48"}


def test_no_kernel_outlives_its_oops() -> None:
    parameters = vm_machine.kernel_parameters(vm.IOMMUS["amd"]).split()
    assert {"oops=panic", "panic=-1"} <= set(parameters)
    assert "-no-reboot" in command_line(machine())


def test_the_hosts_root_is_handed_out_read_only() -> None:
    (shared,) = option(command_line(machine()), "-virtfs")
    assert {"path=/", "readonly=on"} <= set(shared.split(","))


def test_the_users_arguments_come_last_so_that_they_prevail() -> None:
    assert command_line(machine())[-1] == "-s"


def test_the_clock_counts_instructions_only_when_asked_to() -> None:
    assert option(command_line(machine(icount=True)), "-icount") == ["shift=0,sleep=off"]
    assert "-icount" not in command_line(machine())


def test_the_processor_suits_the_accelerator() -> None:
    words = {accel: command_line(vm_machine.Machine(accel=accel)) for accel in ("kvm", "tcg")}
    assert {accel: option(line, "-accel") for accel, line in words.items()} == {"kvm": ["kvm"], "tcg": ["tcg"]}
    assert option(words["kvm"], "-cpu") != option(words["tcg"], "-cpu")


def test_each_stream_is_a_port_of_its_own() -> None:
    words = command_line(machine())
    sockets = [word for word in option(words, "-chardev") if word.startswith("socket")]
    assert sockets == ["socket,id=stdout,fd=5", "socket,id=stderr,fd=6", "socket,id=status,fd=7"]


@pytest.mark.parametrize(
    ("of", "words"),
    [
        (machine("sparc"), "sparc"),
        (machine(devices="gpu"), "gpu"),
        (machine(memory="lots"), "lots"),
        (machine(memory="0G"), "0G"),
        (machine(cpus=0), "processors"),
    ],
)
def test_what_can_never_be_right_is_a_value_error(of: vm_machine.Machine, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vm.check_arguments(["true"], "6.12", of, None)


@pytest.mark.parametrize("command", [[], "true", ["a\0b"]])
def test_a_command_is_a_sequence_of_words(command: list[str]) -> None:
    with pytest.raises(ValueError, match="command"):
        vm.check_arguments(command, "6.12", machine(), None)


@pytest.mark.parametrize(
    ("accel", "words"), [("kvm", "KVM cannot count instructions"), ("xen", "'xen'.*auto, kvm, tcg")]
)
def test_kvm_does_not_count_instructions_and_other_accelerators_are_unknown(accel: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vm.check_arguments(["true"], "6.12", machine(icount=True), None, accel=accel)


def test_a_time_out_leaves_time() -> None:
    with pytest.raises(ValueError, match="time-out"):
        vm.check_arguments(["true"], "6.12", machine(), 0)


def test_virtio_on_6_1_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"virtio.*6\.12"):
        vm.run(["true"], kernel="6.1", iommu="virtio", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_gets_the_passed_variables_and_what_is_added() -> None:
    host = {"PATH": "/bin", "CI": "1", "SECRET": "x", "OTHER": "y"}
    assert vm.guest_environment(host, {"OTHER": "z"}) == {"PATH": "/bin", "HOME": "/root", "CI": "1", "OTHER": "z"}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_stream_is_whole_however_it_is_cut(size: int) -> None:
    mark, text = b"aab", b"aaaa\0ab\naa"
    stream, found = vm.Stream(mark), b""
    sent = text + mark
    for start in range(0, len(sent), size):
        assert not stream.ended
        found += stream.feed(sent[start : start + size])
    assert (found, stream.ended) == (text, True)


def test_a_stream_keeps_nothing_back_that_cannot_be_the_mark() -> None:
    assert vm.Stream(b"mark").feed(b"prompt> ") == b"prompt> "


@pytest.mark.parametrize(
    ("log", "panicked"),
    [
        ("[ 1.0] Kernel panic - not syncing: Attempted to kill init!\n", True),
        ("[ 1.0] Oops: 0002 [#1] PREEMPT SMP\n", True),
        ("[ 1.0] DMAR: [DMA Write NO_PASID] fault addr 0x1000\n", False),
        ("", False),
    ],
)
def test_a_log_tells_a_panic_from_a_loss(log: str, panicked: bool) -> None:  # noqa: FBT001 - a table's column
    assert vm.has_panicked(log) is panicked


def test_a_time_out_is_a_timeout_error_with_the_kernels_log() -> None:
    error = VmTimeoutError("late", log="[ 1.0] text")
    assert isinstance(error, TimeoutError)
    assert (str(error), error.log) == ("late", "[ 1.0] text")


def test_a_missing_tool_names_its_package_and_the_command() -> None:
    with pytest.raises(MissingToolError, match=r"no-such-program is missing.*apt-get install some-package"):
        find_tool("no-such-program", package="some-package", environ={"PATH": "/nowhere"})


# -- the initramfs


@pytest.mark.skipif(shutil.which("cpio") is None and shutil.which("busybox") is None, reason="needs cpio or busybox")
def test_an_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    entries = [initramfs.CpioEntry("d", None), initramfs.CpioEntry("d/odd", b"12345", 0o640)]
    entries.append(initramfs.CpioEntry("empty", b""))
    program = ["cpio"] if shutil.which("cpio") else ["busybox", "cpio"]
    subprocess.run([*program, "-i"], input=initramfs.cpio_archive(entries), cwd=tmp_path, check=True)
    assert (tmp_path / "d/odd").read_bytes() == b"12345"
    assert (tmp_path / "d/odd").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "empty").read_bytes() == b""


def test_archives_can_follow_one_another() -> None:
    assert len(initramfs.cpio_archive([initramfs.CpioEntry("odd", b"1")])) % 4 == 0


MODULES_DEP = """\
kernel/a/top.ko.xz: kernel/a/middle.ko.xz kernel/a/bottom.ko.xz
kernel/a/middle.ko.xz: kernel/a/bottom.ko.xz
kernel/a/bottom.ko.xz:
kernel/a/vfio-pci.ko.xz: kernel/a/bottom.ko.xz
kernel/a/unrelated.ko.xz:
"""


def test_a_module_is_loaded_after_what_it_needs_and_once() -> None:
    order = initramfs.load_order(MODULES_DEP, ["top", "vfio_pci", "middle"])
    assert [initramfs.module_name(path) for path in order] == ["bottom", "middle", "top", "vfio_pci"]


def test_a_module_that_is_not_there_may_be_built_in() -> None:
    assert initramfs.load_order(MODULES_DEP, ["overlay"]) == []


def test_virtio_iommu_is_loaded_before_all_that_it_translates_for() -> None:
    after = initramfs.MODULES[initramfs.MODULES.index("virtio_iommu") + 1 :]
    assert {"vfio-pci", "vfio_iommu_type1", "9pnet_virtio"} <= set(after)


def test_a_module_of_an_unknown_compression_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "a.ko.zst"
    path.touch()
    with pytest.raises(KernelUnavailableError, match="zst"):
        initramfs.read_module(path)


def test_an_interpreter_that_needs_a_loader_is_not_static() -> None:
    assert not initramfs.is_static(b"#!/bin/sh\n")
    assert not initramfs.is_static(Path("/bin/sh").read_bytes())


def test_init_is_a_script_that_a_shell_can_parse() -> None:
    subprocess.run(["sh", "-n"], input=initramfs.INIT.encode(), check=True)


def test_a_commands_words_reach_the_machine_as_they_are() -> None:
    archive = initramfs.command_archive(["echo", "it's", "$HOME", ""], cwd="/a b", environ={}, token="", settings={})
    assert b"""sh '/a b' echo 'it'"'"'s' '$HOME' ''\n""" in archive


# -- kernels


def test_a_suite_that_the_machine_lacks_comes_from_the_mirror_of_its_own() -> None:
    text = packages.source_list(kernels.LINES["7"].suites, TARGETS)
    assert text.endswith(" http://mirror.invalid/debian/ trixie-backports main\n")
    assert "signed-by=" in text


def test_security_updates_come_from_their_own_mirror() -> None:
    lines = packages.source_list(kernels.LINES["6.1"].suites, TARGETS).splitlines()
    assert [line.split()[-3:] for line in lines] == [
        ["http://mirror.invalid/debian/", "bookworm", "main"],
        ["http://mirror.invalid/debian/", "bookworm-updates", "main"],
        ["http://security.invalid/", "bookworm-security", "main"],
    ]


def test_a_machine_without_security_updates_does_without() -> None:
    targets = TARGETS.splitlines()[0]
    assert "security" not in packages.source_list(kernels.LINES["6.1"].suites, targets)


def test_without_a_debian_repository_there_is_no_line_to_be_had() -> None:
    with pytest.raises(KernelUnavailableError, match="no Debian repository"):
        packages.source_list(kernels.LINES["6.12"].suites, "http://vendor.invalid/|nodistro|main|Packages\n")


def test_the_newest_kernel_is_found_by_its_numbers() -> None:
    names = ["linux-image-6.1.0-9-amd64", "linux-image-6.1.0-10-amd64", "linux-image-6.12.1+deb12-amd64"]
    names += ["linux-image-6.1.0-11-rt-amd64", "linux-image-6.1.0-12-amd64-dbg", "linux-image-6.1.0-13-cloud-amd64"]
    assert kernels.newest_image(kernels.LINES["6.1"], names) == "linux-image-6.1.0-10-amd64"
    assert kernels.newest_image(kernels.LINES["6.12"], names) == "linux-image-6.12.1+deb12-amd64"
    assert kernels.newest_image(kernels.LINES["7"], names) is None


def test_a_kernel_in_several_packages_is_found_whole() -> None:
    records = {
        "linux-image-7.9-amd64": "Package: x\nDepends: linux-base-7.9-amd64, linux-modules-7.9-amd64 (= 1), kmod\n",
        "linux-base-7.9-amd64": "Depends: linux-base (>= 4), linux-binary-7.9-amd64 (= 1) | linux-binary-other\n",
    }
    found = kernels.kernel_packages("linux-image-7.9-amd64", lambda name: packages.parse_depends(records.get(name, "")))
    parts = ("image", "base", "binary", "modules")
    assert set(found) == {f"linux-{part}-7.9-amd64" for part in parts}
    assert len(found) == len(parts)


def test_both_layouts_of_unpacked_packages_are_understood(tmp_path: Path) -> None:
    merged, classic = tmp_path / "merged", tmp_path / "classic"
    (merged / "usr/lib/modules/7.9/kernel").mkdir(parents=True)
    (merged / "usr/lib/modules/7.9/vmlinuz").touch()
    (classic / "lib/modules/6.9/kernel").mkdir(parents=True)
    (classic / "boot").mkdir()
    (classic / "boot/vmlinuz-6.9").touch()
    for root, release in ((merged, "7.9"), (classic, "6.9")):
        entry = kernels.arrange(root, release, tmp_path / f"entry-{release}")
        assert (entry / "vmlinuz").is_file()
        assert (root / "lib/modules" / release / "kernel").is_dir()


def test_packages_without_an_image_are_no_kernel(tmp_path: Path) -> None:
    with pytest.raises(KernelUnavailableError, match="no image"):
        kernels.arrange(tmp_path, "6.9", tmp_path / "entry")


def test_a_half_made_cache_entry_is_not_used(tmp_path: Path) -> None:
    cached_kernel(tmp_path, "6.12", ".making-x")
    assert kernels.cached_kernels(kernels.LINES["6.12"], tmp_path) == []


def test_the_newest_cached_kernel_is_used(tmp_path: Path) -> None:
    for release in ("6.12.9+deb12-amd64", "6.12.10+deb12-amd64"):
        cached_kernel(tmp_path, "6.12", release)
    assert kernels.find_kernel("6.12", cache=tmp_path).release == "6.12.10+deb12-amd64"


def test_kernels_of_one_release_with_and_without_iommufd_are_kept_apart(tmp_path: Path) -> None:
    """So are the files that are made for them: removing those of one leaves those of the other."""
    for line in ("6.12", "6.12+iommufd"):
        for release in ("6.12.8", "6.12.9"):
            cached_kernel(tmp_path, line, release)
    found = {name: kernels.find_kernel(name, cache=tmp_path) for name in ("6.12", "6.12+iommufd")}
    assert {kernel.release for kernel in found.values()} == {"6.12.9"}
    assert {name: kernel.image.parents[1].name for name, kernel in found.items()} == {name: name for name in found}
    (tmp_path / "initramfs").mkdir()
    images = [tmp_path / "initramfs" / name for name in ("6.12.8-0123.cpio", "6.12.8+iommufd-4567.cpio")]
    for image in images:
        image.touch()
    assert kernels.prune(kernels.LINES["6.12"], tmp_path) == ["6.12.8"]
    assert [image.exists() for image in images] == [False, True]
    assert kernels.prune(kernels.LINES["6.12+iommufd"], tmp_path) == ["6.12.8"]
    assert [image.exists() for image in images] == [False, False]


def test_a_release_belongs_to_the_line_with_iommufd_as_to_the_packaged_line() -> None:
    """A kernel does not say in its release with which modules it runs."""
    assert [name for name, line in kernels.LINES.items() if line.has("6.12.9+deb12-amd64")] == ["6.12", "6.12+iommufd"]


def test_pruning_leaves_the_newest_kernel_and_those_in_use(tmp_path: Path) -> None:
    line = kernels.LINES["6.12"]
    for release in ("6.12.7", "6.12.8", "6.12.9"):
        cached_kernel(tmp_path, "6.12", release)
    (tmp_path / "initramfs").mkdir()
    (tmp_path / "initramfs/6.12.8-0123.cpio").touch()
    with kernels.in_use(kernels.cached_kernels(line, tmp_path)[2], flock=fcntl.LOCK_SH):
        assert kernels.prune(line, tmp_path) == ["6.12.8"]
    assert [kernel.release for kernel in kernels.cached_kernels(line, tmp_path)] == ["6.12.9", "6.12.7"]
    assert list((tmp_path / "initramfs").iterdir()) == []


def test_what_is_neither_a_line_nor_a_file_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(KernelUnavailableError, match=r"5\.10.*6\.1, 6\.12, 7"):
        kernels.find_kernel("5.10", cache=tmp_path)


def test_a_kernel_of_ones_own_says_its_release_and_finds_its_modules(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    image = tmp_path / "boot/vmlinuz-9.9.9-mine"
    image.write_bytes(bzimage("9.9.9-mine"))
    assert kernels.find_kernel(str(image)) == kernels.GuestKernel("9.9.9-mine", image, None)
    modules = tmp_path / "lib/modules/9.9.9-mine"
    modules.mkdir(parents=True)
    (modules / "modules.dep").touch()
    assert kernels.find_kernel(str(image)).modules == modules


def test_a_file_that_is_no_kernel_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(KernelUnavailableError, match="not an x86 bzImage"):
        kernels.find_kernel(str(tmp_path / "text"))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({"XDG_CACHE_HOME": "/c"}, Path("/c/pyvfio")), ({"XDG_CACHE_HOME": "c"}, Path.home() / ".cache/pyvfio")],
)
def test_the_cache_is_where_the_base_directory_specification_says(environ: dict[str, str], expected: Path) -> None:
    assert kernels.cache_directory(environ) == expected


# -- the command


def test_what_follows_the_dashes_is_the_command_whatever_it_looks_like() -> None:
    options = cli.parse(["--iommu", "amd", "--", "--iommu", "--", "x"])
    assert (options.iommu, options.command) == ("amd", ["--iommu", "--", "x"])


def test_the_dashes_may_be_left_out() -> None:
    assert cli.parse(["--cpus", "2", "sh", "-c", "--", "x"]).command == ["sh", "-c", "--", "x"]


def test_an_argument_for_qemu_may_begin_with_a_dash() -> None:
    """In two words as in one; a command without `--` keeps its own words."""
    options = cli.parse(["--qemu-arg", "-device", "--qemu-arg=edu", "--qemu-arg", "-s", "--cpus", "2", "--", "x"])
    assert (options.qemu_arg, options.cpus, options.command) == (["-device", "edu", "-s"], 2, ["x"])
    named = cli.parse(["--qemu-arg", "-name", "--qemu-arg", "guest=a b,process=--", "--accel", "tcg", "x"])
    assert (named.qemu_arg, named.accel, named.command) == (["-name", "guest=a b,process=--"], "tcg", ["x"])
    assert cli.parse(["--qemu-arg", "-s", "sh", "--qemu-arg", "-s"]).command == ["sh", "--qemu-arg", "-s"]


@pytest.mark.parametrize("words", [[], ["--iommu", "sparc", "--", "true"], ["--json", "--", "true"], ["--nonsense"]])
def test_wrong_arguments_end_with_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse(words)
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


def test_a_variable_without_a_value_takes_the_callers() -> None:
    assert cli.environment(["A=b=c", "PATH", "NO_SUCH_VARIABLE"]) == {"A": "b=c", "PATH": os.environ["PATH"]}


def test_a_variable_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="name is missing"):
        cli.environment(["=x"])


def test_the_statuses_of_a_failed_machine_are_distinct_and_documented() -> None:
    statuses = [cli.STATUS_PANIC, cli.STATUS_LOST, cli.STATUS_TIMEOUT, cli.STATUS_NO_MACHINE]
    helped = subprocess.run(
        [sys.executable, "-m", "pyvfio.cli.vm", "--help"], capture_output=True, text=True, check=True
    )
    assert len({*statuses, 0, 2}) == len(statuses) + 2
    assert all(str(status) in helped.stdout for status in statuses)


def test_the_list_of_kernels_asks_for_nothing_but_the_cache(tmp_path: Path) -> None:
    cached_kernel(tmp_path, "7", "7.9.1")
    states = {state.kernel: state for state in kernels.describe(tmp_path)}
    assert list(states) == ["6.1", "6.12", "7", "6.12+iommufd", "7+iommufd"]
    assert (states["7"].cached, states["6.1"].cached, states["7+iommufd"].cached) == (("7.9.1",), (), ())


def test_a_sink_gets_bytes_as_they_come() -> None:
    file, kept = io.BytesIO(), bytearray()
    vm.sink(file, kept)(b"one")
    vm.sink(None, kept)(b"two")
    assert (file.getvalue(), bytes(kept)) == (b"one", b"two")


def _children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_a_ctrl_c_while_qemu_is_started_leaves_no_process(tmp_path: Path) -> None:
    """The parent's death would end that process only from the exec of setpriv on."""
    qemu, kernel = tmp_path / "qemu", kernels.GuestKernel("6.1.0", tmp_path / "vmlinuz", None)
    qemu.write_text("#!/bin/sh\nexec sleep 1000\n")
    qemu.chmod(0o755)

    def press(frame: FrameType, event: str, argument: object) -> None:
        del argument
        if event == "return" and frame.f_code.co_name == "_execute_child":
            signal.raise_signal(signal.SIGINT)

    former, before = signal.signal(signal.SIGINT, signal.default_int_handler), _children()
    try:
        sys.setprofile(press)
        with pytest.raises(KeyboardInterrupt):
            vm._Running(str(qemu), machine(), kernel, b"")
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, former)
        left = [pid for pid in _children() if pid not in before]
        for pid in left:
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)
    assert not left
