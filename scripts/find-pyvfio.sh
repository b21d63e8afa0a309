# shellcheck shell=bash
# Finds a Python that can run the pyvfio of this checkout: to be sourced, never run.
#
#   run_pyvfio COMMAND [ARGUMENT...]   replaces the shell by `pyvfio COMMAND`
#   find_pyvfio                        prints the Python that runs pyvfio
#
# The order: $PYTHON, the active virtual environment, .venv/* of the checkout, the system's Python. If none of these has
# the two dependencies of pyvfio, a small environment with these alone is made: .venv/run-VERSION. The development tools
# are for scripts/test.

pyvfio_checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
export PYTHONPATH="$pyvfio_checkout${PYTHONPATH:+:$PYTHONPATH}"

pyvfio_say() { printf 'pyvfio: %s\n' "$*" >&2; }

# Succeeds if a Python is new enough and has the dependencies.
pyvfio_runs_with() {
    command -v "$1" >/dev/null && "$1" -c 'import importlib.util, sys
sys.exit(sys.version_info < (3, 11) or not all(map(importlib.util.find_spec, ("ioctl_opt", "pyudev"))))' 2>/dev/null
}

# Prints MAJOR.MINOR of a Python that is new enough to run pyvfio.
pyvfio_version() {
    "$1" -c 'import sys
sys.exit("too old") if sys.version_info < (3, 11) else print(*sys.version_info[:2], sep=".")' 2>/dev/null
}

# Prints the Pythons to try, the best first.
pyvfio_candidates() {
    local version environment
    if [[ ${PYTHON-} ]]; then
        # $PYTHON without the dependencies: an environment that was made from this version will do.
        printf '%s\n' "$PYTHON"
        version=$(pyvfio_version "$PYTHON") || return 0
        printf '%s\n' "$pyvfio_checkout/.venv/"{"$version","run-$version"}/bin/python
        return
    fi
    [[ ${VIRTUAL_ENV-} ]] && printf '%s\n' "$VIRTUAL_ENV/bin/python"
    for environment in "$pyvfio_checkout"/.venv/*/; do
        [[ -e $environment.pyvfio-unfinished ]] || printf '%s\n' "${environment}bin/python"
    done
    printf '%s\n' python3 python3.{11..19}
}

find_pyvfio() {
    local python candidates
    mapfile -t candidates < <(pyvfio_candidates)
    for python in "${candidates[@]}"; do
        if pyvfio_runs_with "$python"; then
            printf '%s\n' "$python"
            return
        fi
    done
    pyvfio_make_environment
}

# Makes .venv/run-VERSION and prints the Python in it.
pyvfio_make_environment() {
    local python version='' venv lock pythons=(python3 python3.{11..19})
    [[ ${PYTHON-} ]] && pythons=("$PYTHON")
    for python in "${pythons[@]}"; do
        version=$(pyvfio_version "$python") && break
    done
    if [[ ! $version ]]; then
        pyvfio_say "${PYTHON:-python3} is not a Python >= 3.11; name one: PYTHON=/path/to/python3 $0"
        return 1
    fi
    venv=$pyvfio_checkout/.venv/run-$version
    if ! mkdir -p -- "$pyvfio_checkout/.venv" || ! exec {lock}>"$venv.lock"; then
        pyvfio_say "an environment for pyvfio cannot be made in $pyvfio_checkout/.venv; use one of your own: pip install ioctl-opt pyudev"
        return 1
    fi
    if flock "$lock" && ! pyvfio_runs_with "$venv/bin/python"; then
        pyvfio_say "making ${venv#"$pyvfio_checkout"/} with ioctl-opt and pyudev, once"
        pyvfio_fill_environment "$python" "$venv" {lock}>&- || return 1
    fi
    exec {lock}>&-
    printf '%s\n' "$venv/bin/python"
}

# Runs a command, and shows the output only if the command fails.
pyvfio_quietly() {
    local output
    if ! output=$("$@" 2>&1 </dev/null); then
        printf '%s\n' "$output" | tail -n 25 >&2
        return 1
    fi
}

pyvfio_fill_environment() {
    local python=$1 venv=$2 pip
    # Debian splits ensurepip, without which no environment gets a pip, from its interpreters.
    if ! "$python" -c 'import ensurepip' 2>/dev/null && command -v apt-get >/dev/null && ((EUID == 0)); then
        # shellcheck source=scripts/setup.sh
        source "$pyvfio_checkout/scripts/setup.sh"
        need_packages "python${venv##*-}-venv" || return 1
    fi
    # A pip of its own would be nine tenths of the environment, so another installs if one is there.
    pip=("$python" -m pip --python "$venv/bin/python")
    if pyvfio_quietly "$python" -m venv --clear --without-pip "$venv" && "${pip[@]}" --version &>/dev/null; then
        :
    elif pyvfio_quietly "$python" -m venv --clear "$venv"; then
        pip=("$venv/bin/python" -m pip)
    else
        pyvfio_say "$python cannot make an environment (Debian: apt-get install python3-venv, or python3-pyudev and python3-ioctl-opt)"
        return 1
    fi
    # In a virtual machine the variables of this shell are unknown, and the environment is the same.
    printf '%s\n' "$pyvfio_checkout" >"$(echo "$venv"/lib/python*/site-packages)/pyvfio-checkout.pth"
    if ! pyvfio_quietly "${pip[@]}" install --quiet --disable-pip-version-check --no-input --no-compile \
        "ioctl-opt>=1.3" "pyudev>=0.24"; then
        pyvfio_say "ioctl-opt and pyudev could not be installed in $venv"
        rm -rf -- "$venv"
        return 1
    fi
}

run_pyvfio() {
    local python
    python=$(find_pyvfio)
    exec "$python" -m pyvfio "$@"
}
