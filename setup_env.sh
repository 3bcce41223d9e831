#!/usr/bin/env bash
# Makes .venv, the virtual environment of this repository, from requirements.lock. `make setup` calls it.
#
# Needs Linux x86_64, a package index, and CPython 3.10 to 3.12; where there is none, uv tries to download one.
# Installs with uv. Where there is no uv, pip first fetches it into .venv.uv. uv does not read pip's configuration,
# so this script passes pip's indexes, proxy and certificates on; uv's own environment variables come first.
# One to two minutes from an empty cache (3 GB to download), ten seconds from a full one, nothing once it is done.
# If the set-up fails or is interrupted, the environment from before is put back.
#
#   PYTHON=/path/to/python3.11   this interpreter
#   VENV=.venv                   where to
#   MIN_FREE_GB=8                refuse to start with less free space (the environment takes 7 GB)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
VENV=$(realpath -m "${VENV:-.venv}")
STAMP=$VENV/setup.stamp # empty until the environment is complete

fail() { printf 'setup_env.sh: %s\n' "$*" >&2; exit 1; }

probe() { # INTERPRETER. Prints its version, and its path behind shims and virtual environments.
    "$1" -IS -c 'import os, sys; print("%d.%d.%d" % sys.version_info[:3], os.path.realpath(sys.executable))' 2>/dev/null
}

stamp() { # VERSION. Prints what .venv is made from: the lock, the Python, and the place, since scripts in bin/ name it.
    printf '%s python%s %s\n' "$(sha256sum <requirements.lock | cut -d ' ' -f 1)" "$1" "$VENV"
}

[[ ${1:-} != --help ]] || exec sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' setup_env.sh
(($# == 0)) || fail "unknown argument '$1'; ./setup_env.sh --help says what it takes"
exec 9<requirements.lock
flock 9 # of two commands started at once, the second waits here

wanted="" request='cpython>=3.10,<3.13'
if [[ -n ${PYTHON:-} ]]; then
    read -r wanted request < <(probe "$PYTHON") || fail "PYTHON=$PYTHON does not run; name a Python 3.10, 3.11 or 3.12"
    [[ $wanted =~ ^3\.1[012]\. ]] || fail "PYTHON=$PYTHON is Python $wanted; name a Python 3.10, 3.11 or 3.12"
fi
if [[ -f $STAMP ]] && read -r found _ < <(probe "$VENV/bin/python"); then
    if [[ ${wanted:-$found} == "$found" && $(<"$STAMP") == "$(stamp "$found")" ]]; then exit; fi
fi

[[ $(uname -sm) == "Linux x86_64" ]] || fail "requirements.lock is for Linux x86_64; this is $(uname -sm)"
[[ ! -e $VENV || -f $STAMP || -z $(ls -A "$VENV") ]] ||
    fail "$VENV was not made by this script; move it, or choose another place with VENV=..."
mkdir -p "${VENV%/*}"
free_gb=$(df -Pk "${VENV%/*}" | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
((free_gb >= ${MIN_FREE_GB:-8})) ||
    fail "$free_gb GB are free for $VENV, it needs ${MIN_FREE_GB:-8}; to try with less: make setup MIN_FREE_GB=$free_gb"

uv=uv
"$uv" --version &>/dev/null || uv=$VENV.uv/bin/uv
"$uv" --version &>/dev/null || { "${PYTHON:-python3}" -m venv --clear "$VENV.uv" &&
    "$VENV.uv/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.8,<1'; } >&2 ||
    fail "pip could not fetch uv, see above; install uv, or name a Python with venv and pip: make setup PYTHON=..."
pip_settings=$({ pip config list || pip3 config list || "${PYTHON:-python3}" -m pip config list; } 2>/dev/null || true)
for pair in UV_INDEX_URL=index-url UV_EXTRA_INDEX_URL=extra-index-url UV_FIND_LINKS=find-links UV_NO_INDEX=no-index \
    UV_INSECURE_HOST=trusted-host UV_HTTP_TIMEOUT=default-timeout SSL_CERT_FILE=cert ALL_PROXY=proxy; do
    name=${pair%=*}
    # pip's variables (:env:) are listed before its files (global); \n stands between the lines of a list.
    value=$(sed -nE "/^(:env:|global)\.${pair#*=}='(\\\\n)?(.*)'$/{s//\3/;s/\\\\n/ /g;p;q}" <<<"$pip_settings")
    if [[ $name == UV_FIND_LINKS ]]; then value=${value// /,}; fi
    if [[ -n $value && -z ${!name:-} ]]; then export "$name=$value"; fi
done
# pip takes the best version of all its indexes; uv by default looks only into the first that has the package.
[[ $pip_settings != *extra-index-url=* ]] || export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"

rm -rf "$VENV.old"
trap 'rm -rf "$VENV"; [[ ! -e $VENV.old ]] || mv "$VENV.old" "$VENV"' EXIT
[[ ! -e $VENV ]] || mv "$VENV" "$VENV.old"
mkdir "$VENV"
: >"$STAMP"
printf 'setup_env.sh: installing requirements.lock into %s\n' "$VENV" >&2
"$uv" venv --allow-existing --python "$request" "$VENV" ||
    fail "no CPython 3.10, 3.11 or 3.12, see above; install one, or name it: make setup PYTHON=/path/to/python3.11"
"$uv" pip sync --python "$VENV/bin/python" requirements.lock ||
    fail "could not install requirements.lock, see above; run the same command again"
stamp "$(probe "$VENV/bin/python" | cut -d ' ' -f 1)" >"$STAMP"
trap - EXIT
rm -rf "$VENV.old"
printf 'setup_env.sh: %s is ready after %d s\n' "$VENV" "$SECONDS" >&2
