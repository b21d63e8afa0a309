# shellcheck shell=bash
# Functions for the commands in this directory. Source this file; do not run it.
#
#   need_packages PKG...    install Debian packages; return 0 when all of them are installed
#   need_vm_packages WORD...
#                           install the packages that scripts/vm needs, and those that build modules if --kernel among
#                           the words names a kernel with iommufd
#   ensure_venv PYTHON      print the python of .venv/VERSION, with the project and its dev extra
#   find_pythons            print an interpreter of each Python >= 3.11 of this machine: `python3`, then the oldest first
#   fetch_kernel PYTHON KERNEL &
#                           fetch a kernel for virtual machines while other work goes on; pyvfio waits for the fetch
#
# VERSION is the interpreter's, such as 3.11. An environment is made by uv where pip can install uv, else by pip.
# A function writes to stdout only the text that it is said to print, because callers pass their stdout to the user.

setup_checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

# With this variable set, each interpreter compiles the package again: in a virtual machine that takes seconds.
unset PYTHONDONTWRITEBYTECODE

setup_say() { printf '%s\n' "setup: $*" >&2; }

# Run a command, and show its output only if it fails.
setup_quietly() {
    local output
    if ! output=$("$@" 2>&1 </dev/null); then
        printf '%s\n' "$output" | tail -n 25 >&2
        return 1
    fi
}

find_pythons() {
    local name version seen=" "
    # pyenv has a folder for each version; the shims of pyenv on PATH show only the selected ones.
    for name in python3 python3.{11..19} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3; do
        version=$("$name" -c 'import sys
print(*sys.version_info[:2], sep=".")
sys.exit(sys.version_info < (3, 11))' 2>/dev/null) || continue
        [[ $seen == *" $version "* ]] && continue
        seen+="$version "
        printf '%s\n' "$name"
    done
}

setup_is_installed() {
    [[ $(dpkg-query -W -f='${db:Status-Status}' -- "$1" 2>/dev/null) == installed ]]
}

# Print the packages that are not installed.
setup_missing() {
    local package
    for package in "$@"; do
        setup_is_installed "$package" || printf '%s\n' "$package"
    done
}

need_packages() {
    local missing
    mapfile -t missing < <(setup_missing "$@")
    ((${#missing[@]})) || return 0
    if ! command -v apt-get >/dev/null; then
        setup_say "these Debian packages, or your distribution's like them, are missing: ${missing[*]}; there is no" \
            "apt-get here to install them with"
        return 1
    fi
    if ((EUID != 0)); then
        setup_say "these Debian packages are missing; install them with: sudo apt-get install ${missing[*]}"
        return 1
    fi
    # apt-get can wait for the lock of dpkg, but not for the lock of the package lists.
    mkdir -p -- "$setup_checkout/.venv" || return 1
    (
        flock 9
        mapfile -t missing < <(setup_missing "$@")
        ((${#missing[@]} == 0)) || setup_install "${missing[@]}" 9>&-
    ) 9>"$setup_checkout/.venv/packages.lock"
}

setup_install() {
    local -x DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get -q -y -o DPkg::Lock::Timeout=300)
    setup_say "installing $*"
    # A fresh machine has no package lists, and old lists name files that the mirror has deleted.
    if ! setup_quietly "${apt[@]}" update; then
        setup_say "apt-get update failed"
        return 1
    fi
    if ! setup_quietly "${apt[@]}" install --no-install-recommends "$@"; then
        setup_say "apt-get could not install $*"
        return 1
    fi
}

# Return 0 if the words, up to "--", choose a kernel whose modules are built here.
setup_builds_modules() {
    while (($#)); do
        case $1 in
        --) return 1 ;;
        --kernel=*+iommufd) return 0 ;;
        --kernel) [[ ${2-} != *+iommufd ]] || return 0 ;;
        esac
        shift
    done
    return 1
}

# Without root or apt-get this installs nothing: the command then names the packages that are missing.
need_vm_packages() {
    ((EUID == 0)) && command -v apt-get >/dev/null || return 0
    if setup_builds_modules "$@"; then
        command -v make >/dev/null || need_packages make
        command -v gcc >/dev/null || need_packages gcc
        command -v xz >/dev/null || need_packages xz-utils
    fi
    command -v qemu-system-x86_64 >/dev/null || need_packages qemu-system-x86
    command -v busybox >/dev/null || need_packages busybox-static
    command -v depmod >/dev/null || need_packages kmod
}

# Nothing is printed, and a failure is ignored: the command that needs the kernel fetches again and says why it cannot.
# The fetch ends with the process that started it, since a background job of a script ignores Ctrl-C.
fetch_kernel() {
    PYTHONPATH=$setup_checkout exec setpriv --pdeathsig TERM -- "$1" -c '
import sys
from pyvfio.testing import kernels
kernels.find_kernel(sys.argv[1])' "$2" >/dev/null 2>&1 </dev/null
}

# Print a digest of all that an environment depends on. Another digest means that the environment must be made again.
setup_stamp() {
    local python=$1
    {
        cat -- "$setup_checkout/pyproject.toml"
        printf '%s\n' "$setup_checkout"
        "$python" -c 'import os, sys; print(sys.version, os.path.realpath(sys.base_prefix))'
    } | sha256sum | cut -d' ' -f1
}

# Run pip with the interpreter: its own pip, else the pip that ensurepip has for new environments.
setup_pip() {
    local python=$1 wheel=''
    if ! "$python" -c 'import pip' 2>/dev/null; then
        # Debian keeps the wheels of ensurepip in a directory of its own.
        wheel=$("$python" -c 'import ensurepip, glob
print(*glob.glob(f"{ensurepip.__path__[0]}/_bundled/pip-*.whl"), *glob.glob("/usr/share/python-wheels/pip-*.whl"),
      sep="\n")' 2>/dev/null | head -n 1)
        [[ $wheel ]] || return 1
    fi
    # These two settings of a user would forbid --target.
    PYTHONPATH=$wheel${PYTHONPATH:+${wheel:+:}$PYTHONPATH} PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 \
        "$python" -m pip --disable-pip-version-check --no-input "${@:2}" 2>/dev/null </dev/null
}

# Print the path of uv: the user's own, or a copy that pip installs once for all checkouts. Return 1 if there is none.
setup_uv() {
    local python=$1 base=${XDG_CACHE_HOME-} uv folder new
    if uv=$(type -P uv) && "$uv" --version >/dev/null 2>&1; then
        printf '%s\n' "$uv"
        return
    fi
    # The base directory specification says that a relative path is ignored.
    [[ $base == /* ]] || base=${HOME:-/nonexistent}/.cache
    folder=$base/pyvfio/uv-$(uname -m)
    if ! "$folder/bin/uv" --version >/dev/null 2>&1; then
        mkdir -p -- "$base/pyvfio" 2>/dev/null && new=$(mktemp -d -- "$base/pyvfio/.making-uv-XXXXXX") || return 1
        # The rename makes the copy appear whole. If another process has just made one, the rename fails and that is used.
        if setup_pip "$python" install --quiet --no-compile --only-binary :all: --target "$new" 'uv>=0.5' >/dev/null; then
            "$folder/bin/uv" --version >/dev/null 2>&1 || rm -rf -- "$folder"
            mv -T -- "$new" "$folder" 2>/dev/null
        fi
        rm -rf -- "$new"
        "$folder/bin/uv" --version >/dev/null 2>&1 || return 1
    fi
    printf '%s\n' "$folder/bin/uv"
}

# Print pip's settings as NAME=VALUE lines for the environment of uv, which does not read pip's configuration.
# A variable of uv that the user has set stays.
setup_uv_settings() {
    setup_pip "$1" config list | "$1" -c '
import ast, os, sys

ORDER = ("global", "install", ":env:")  # a later section prevails
NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "no-index": "UV_NO_INDEX",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
}
found = {}
for line in sys.stdin:
    key, _, value = line.strip().partition("=")
    section, _, name = key.partition(".")
    if section in ORDER and name in NAMES:
        found[ORDER.index(section), NAMES[name]] = " ".join(ast.literal_eval(value).split())
settings = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # the newest release of all indexes, as pip takes it
settings |= {name: value for (_, name), value in sorted(found.items())}
for name, value in settings.items():
    if name not in os.environ:
        print(f"{name}={value}")
'
}

# A virtual machine reads compiled files and cannot keep any: so they are made here.
setup_fill_by_uv() {
    local python=$1 venv=$2 project=$3 uv settings
    uv=$(setup_uv "$python") && mapfile -t settings < <(setup_uv_settings "$python") || return 1
    if [[ -e $venv/.pyvfio-unfinished ]] || ! "$venv/bin/python" -c '' 2>/dev/null; then
        setup_quietly "$python" -m venv --clear --without-pip "$venv" || return 1
    fi
    setup_begin "$venv" || return 1
    env "${settings[@]}" "$uv" pip install --quiet --no-progress --compile-bytecode --python "$venv/bin/python" \
        --editable "$project" >/dev/null 2>&1 </dev/null
}

setup_fill_by_pip() {
    local python=$1 venv=$2 project=$3
    if [[ -e $venv/.pyvfio-unfinished ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        setup_quietly "$python" -m venv --clear "$venv" || return 1
    fi
    setup_begin "$venv" || return 1
    setup_quietly "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
        --editable "$project"
}

# The mark exists from the first change to the last: an environment with the mark is half made.
setup_begin() {
    : >"$1/.pyvfio-unfinished" && rm -f -- "$1/.pyvfio-stamp"
}

setup_fill_venv() {
    local python=$1 venv=$2 project="${setup_checkout}[dev]"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        # Debian has ensurepip in a package apart from the interpreter.
        need_packages "python$(setup_version "$python")-venv" || return 1
    fi
    setup_fill_by_uv "$python" "$venv" "$project" || setup_fill_by_pip "$python" "$venv" "$project" || return 1
    "$venv/bin/python" -m compileall -q "$setup_checkout/pyvfio" >/dev/null 2>&1
    setup_stamp "$python" >"$venv/.pyvfio-stamp" && rm -f -- "$venv/.pyvfio-unfinished"
}

# Print the interpreter's version. Return 1 if pyvfio cannot run with the interpreter.
setup_version() {
    local version
    if ! version=$("$1" -c 'import sys
print(*sys.version_info[:2], sep=".")
sys.exit(sys.version_info < (3, 11))' 2>/dev/null); then
        setup_say "$1 is not a Python >= 3.11 that runs here${version:+ (it is $version)}"
        return 1
    fi
    printf '%s\n' "$version"
}

ensure_venv() {
    local version
    version=$(setup_version "$1") && setup_ensure "$1" "$setup_checkout/.venv/$version"
}

setup_ensure() {
    local python=$1 venv=$2 lock status=0
    if ! setup_is_current "$python" "$venv"; then
        # One lock for all environments: setuptools writes into the checkout.
        mkdir -p -- "$setup_checkout/.venv" && exec {lock}>"$setup_checkout/.venv/environments.lock" || return 1
        # Of several that wait for the lock, the first makes the environment.
        if flock "$lock" && ! setup_is_current "$python" "$venv"; then
            setup_say "making ${venv#"$setup_checkout"/} with $python"
            setup_fill_venv "$python" "$venv" {lock}>&- || status=1
        fi
        exec {lock}>&-
    fi
    ((status == 0)) || { setup_say "$venv could not be made"; return 1; }
    printf '%s\n' "$venv/bin/python"
}

setup_is_current() {
    [[ -x $2/bin/python && ! -e $2/.pyvfio-unfinished ]] &&
        [[ $(cat -- "$2/.pyvfio-stamp" 2>/dev/null) == "$(setup_stamp "$1")" ]]
}
