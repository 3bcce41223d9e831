#!/usr/bin/env bash
# Makes .venv, the virtual environment of this repository, from requirements.lock. `make demo` and `make test` call it.
#
#   ./setup_env.sh            nothing to do (0.1 s) when .venv already holds this lock for a Python that still runs
#
# Takes the first CPython 3.10 to 3.12 it finds and installs with uv where there is one (half a minute when uv has the
# packages in its cache), or else with pip (5 to 10 minutes), both with the settings (index, proxy, certificates) they
# have on this machine. A set-up that was cut off is done again; an environment that this script did not make is left
# alone, and one that it did make is back if the set-up of the next fails.
#
#   PYTHON=/path/to/python3.11   this interpreter, or none
#   INSTALLER=uv|pip             this installer, or none
#   VENV=.venv                   where to
#   MIN_FREE_GB=8                refuse to start with less free space (the environment takes 7 GB)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly LOCK=requirements.lock
VENV=$(realpath -m "${VENV:-.venv}")
readonly VENV
readonly STAMP=$VENV/setup.stamp
readonly LOG=$VENV/setup.log
readonly BEGUN=$VENV.begun OLD=$VENV.old # there while this script fills .venv
readonly MIN_FREE_GB=${MIN_FREE_GB:-8}

fail() {
    printf 'setup_env.sh: %s\n' "$*" >&2
    exit 1
}

# What .venv was made from: the lock, the interpreter, and the place, since scripts in bin/ name it.
stamp_for() { # VERSION
    printf '%s python%s %s\n' "$(sha256sum <"$LOCK" | cut -d ' ' -f 1)" "$1" "$VENV"
}

version_of() { # INTERPRETER
    "$1" -S -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

is_up_to_date() {
    local version
    [[ -f $STAMP ]] || return 1
    version=$(version_of "$VENV/bin/python") || return 1
    [[ -z ${PYTHON:-} || $version == "$(version_of "$PYTHON")" ]] || return 1
    [[ $(<"$STAMP") == "$(stamp_for "$version")" ]]
}

# One line: "ok PATH", the interpreter behind shims and virtual environments, or else why it will not do.
probe() { # INTERPRETER
    "$1" -I - 2>/dev/null <<'PYTHON_CODE' || printf 'does not run\n'
import os, platform, sys

found = "%s %d.%d.%d" % ((platform.python_implementation(),) + sys.version_info[:3])
if platform.python_implementation() != "CPython" or not (3, 10) <= sys.version_info[:2] <= (3, 12):
    print("is " + found)
elif sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2**32:
    print("is for %s %s, not Linux x86_64" % (sys.platform, platform.machine()))
else:
    print("ok " + (sys.executable if sys.prefix == sys.base_prefix else os.path.realpath(sys.executable)))
PYTHON_CODE
}

candidates() {
    if [[ -n ${PYTHON:-} ]]; then
        printf '%s\n' "$PYTHON"
        return
    fi
    local name path
    for name in python3 python3.12 python3.11 python3.10 python; do
        if path=$(command -v "$name"); then printf '%s\n' "$path"; fi
    done
    # A pyenv shim runs only the versions that are switched on; the others are here.
    for path in "${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}"/versions/3.1[012].*/bin/python3; do
        if [[ -x $path ]]; then printf '%s\n' "$path"; fi
    done
}

find_python() {
    local candidate answer refused=""
    while IFS= read -r candidate; do
        answer=$(probe "$candidate")
        if [[ $answer == "ok "* ]]; then
            printf '%s\n' "${answer#ok }"
            return
        fi
        refused+="; $candidate $answer"
    done < <(candidates)
    fail "no CPython 3.10, 3.11 or 3.12 for Linux x86_64${refused:-; no python3 on PATH}." \
        "Install one, or name it: make setup PYTHON=/path/to/python3.11"
}

find_installers() {
    if [[ -n ${INSTALLER:-} ]]; then
        [[ $INSTALLER == uv || $INSTALLER == pip ]] || fail "INSTALLER is '$INSTALLER'; it must be uv or pip"
        printf '%s\n' "$INSTALLER"
        return
    fi
    if uv --version >/dev/null 2>&1; then printf 'uv\n'; fi
    printf 'pip\n'
}

is_ours() {
    [[ -f $STAMP || -f $LOG || -f $BEGUN ]]
}

check_place() {
    local parent free_kb
    if [[ -e $VENV && ! -f $VENV/pyvenv.cfg && -n $(ls -A "$VENV" 2>/dev/null) ]]; then
        fail "$VENV is in the way and is no virtual environment; move it, or choose another place with VENV=..."
    fi
    if [[ -f $VENV/pyvenv.cfg ]] && ! is_ours; then
        fail "$VENV is a virtual environment that this script did not finish; remove it, or choose another place with VENV=..."
    fi
    parent=$(dirname "$VENV")
    mkdir -p "$parent"
    free_kb=$(df -Pk "$parent" | awk 'NR == 2 { print $4 }')
    if ((free_kb < MIN_FREE_GB * 1024 * 1024)); then
        fail "$((free_kb / 1024 / 1024)) GB are free in $parent, $MIN_FREE_GB GB are needed;" \
            "free some, or try with less: make setup MIN_FREE_GB=$((free_kb / 1024 / 1024))"
    fi
}

# The old .venv waits under another name. One that waits already is that of a set-up that was cut off.
set_aside() {
    : >"$BEGUN"
    if [[ -e $VENV && ! -e $OLD ]]; then mv "$VENV" "$OLD"; fi
}

put_back() {
    rm -rf "$VENV"
    if [[ -e $OLD ]]; then mv "$OLD" "$VENV"; fi
    rm -f "$BEGUN"
}

install_with_uv() { # INTERPRETER
    uv venv --python "$1" "$VENV" && uv pip sync --python "$VENV/bin/python" "$LOCK"
}

# The lock is the whole set, so pip need not look for dependencies. What is never imported need not be compiled.
install_with_pip() { # INTERPRETER
    "$1" -m venv "$VENV" &&
        "$VENV/bin/python" -m pip install --disable-pip-version-check --no-compile --no-deps --use-pep517 \
            --requirement "$LOCK"
}

# True if INSTALLER filled an empty .venv. Its output goes to a log, and its end to the terminal if that went wrong.
install() { # INSTALLER INTERPRETER
    local log
    log=$(mktemp)
    rm -rf "$VENV"
    printf 'setup_env.sh: %s packages for Python %s into %s with %s; to watch: tail -f %s\n' \
        "$(grep -c '^[a-z]' "$LOCK")" "$(version_of "$2")" "$VENV" "$1" "$log" >&2
    if "install_with_$1" "$2" >"$log" 2>&1; then
        mv "$log" "$LOG"
        return
    fi
    tail -n 15 "$log" >&2
    printf 'setup_env.sh: %s failed; all it said: %s\n' "$1" "$log" >&2
    return 1
}

install_with_any() { # INTERPRETER
    local installer installers
    installers=$(find_installers)
    for installer in $installers; do
        if install "$installer" "$1"; then return; fi
    done
    put_back
    fail "could not install $LOCK with ${installers//$'\n'/ or }; see above, then run the same command again"
}

main() {
    local python started=$SECONDS
    case ${1:-} in
        -h | --help) exec sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" ;;
        ?*) fail "unknown argument '$1'; ./setup_env.sh --help tells what it takes" ;;
    esac
    if is_up_to_date; then return; fi
    [[ -f $LOCK ]] || fail "$LOCK is missing from $PWD; a complete checkout has it: git checkout $LOCK"
    python=$(find_python)
    check_place
    set_aside
    install_with_any "$python"
    stamp_for "$(version_of "$VENV/bin/python")" >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    rm -rf "$OLD" "$BEGUN"
    printf 'setup_env.sh: %s is ready after %d s\n' "$VENV" "$((SECONDS - started))" >&2
}

# Two commands started at once wait for each other here.
if command -v flock >/dev/null; then
    exec 9<"${BASH_SOURCE[0]}"
    flock 9
fi
main "$@"
