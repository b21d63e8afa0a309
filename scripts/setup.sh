# shellcheck shell=bash
# Set-up for the commands in this directory: to be sourced, never run.
#
#   need_packages PKG...   the Debian packages are installed when this returns 0
#   need_vm_packages       those that scripts/vm needs
#   ensure_venv PYTHON     prints the python of .venv/<major.minor>, with the project and its dev extra in it
#
# Nothing is written to stdout but what a function is said to print: callers hand their stdout on to a user's pipe.

setup_checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

# Each of the many interpreters that the commands start would compile the package anew; in a virtual machine for seconds.
unset PYTHONDONTWRITEBYTECODE

setup_say() { printf '%s\n' "setup: $*" >&2; }

# Runs a command whose output only matters when it fails.
setup_quietly() {
    local output
    if ! output=$("$@" 2>&1 </dev/null); then
        printf '%s\n' "$output" | tail -n 25 >&2
        return 1
    fi
}

setup_is_installed() {
    [[ $(dpkg-query -W -f='${db:Status-Status}' -- "$1" 2>/dev/null) == installed ]]
}

# Prints those of the packages that are not installed.
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
        setup_say "this needs what Debian packages as: ${missing[*]}; there is no apt-get here to install it with"
        return 1
    fi
    if ((EUID != 0)); then
        setup_say "these Debian packages are missing; install them with: sudo apt-get install ${missing[*]}"
        return 1
    fi
    # apt-get waits for dpkg's lock when told to, but never for that of the lists.
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
    # A fresh machine has no package lists, and old lists name files that the mirror no longer has.
    if ! setup_quietly "${apt[@]}" update; then
        setup_say "apt-get update failed"
        return 1
    fi
    if ! setup_quietly "${apt[@]}" install --no-install-recommends "$@"; then
        setup_say "apt-get could not install $*"
        return 1
    fi
}

# What a virtual machine takes. Who cannot install is told what to install by the command itself.
need_vm_packages() {
    ((EUID == 0)) && command -v apt-get >/dev/null || return 0
    command -v qemu-system-x86_64 >/dev/null || need_packages qemu-system-x86
    command -v busybox >/dev/null || need_packages busybox-static
    command -v depmod >/dev/null || need_packages kmod
}

# What an environment depends on; an environment made from anything else is made again.
setup_stamp() {
    local python=$1
    {
        cat -- "$setup_checkout/pyproject.toml"
        printf '%s\n' "$setup_checkout"
        "$python" -c 'import os, sys; print(sys.version, os.path.realpath(sys.base_prefix))'
    } | sha256sum | cut -d' ' -f1
}

setup_make_venv() {
    local python=$1 venv=$2
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        # Debian splits ensurepip from its interpreters.
        need_packages "python$(basename "$venv")-venv" || return 1
    fi
    setup_quietly "$python" -m venv --clear "$venv"
}

# The mark is there from the first change to the last: an environment that has it was left half made.
setup_fill_venv() {
    local python=$1 venv=$2 mark=$2/.pyvfio-unfinished
    if [[ -e $mark ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        setup_make_venv "$python" "$venv" || return 1
    fi
    : >"$mark" && rm -f -- "$venv/.pyvfio-stamp" || return 1
    setup_quietly "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
        --editable "${setup_checkout}[dev]" || return 1
    setup_stamp "$python" >"$venv/.pyvfio-stamp" && rm -f -- "$mark"
}

ensure_venv() {
    local python=$1 version venv lock status=0
    if ! version=$("$python" -c 'import sys
print(*sys.version_info[:2], sep=".")
sys.exit(sys.version_info < (3, 11))' 2>/dev/null); then
        setup_say "$python is not a Python >= 3.11 that runs here${version:+ (it is $version)}"
        return 1
    fi
    venv=$setup_checkout/.venv/$version
    if ! setup_is_current "$python" "$venv"; then
        mkdir -p -- "$setup_checkout/.venv" && exec {lock}>"$venv.lock" || return 1
        # The one who waited finds the work done.
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
