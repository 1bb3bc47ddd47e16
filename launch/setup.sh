#!/usr/bin/env bash
# Make or refresh .venv with this project and the versions in constraints.txt: bash launch/setup.sh [EXTRA ...]
# Extras are those of pyproject.toml (test, tensorboard). PYTHON names the interpreter of a new .venv, default python3.
# When nothing changed it returns at once; an interrupted one is repaired by the next.
set -euo pipefail
case ${1:-} in -h | --help)
    sed -n '2,/^[^#]/s/^# //p' "$0"
    exit 0
    ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=${PYTHON:-python3}
stamp=$venv/.installed # fingerprint, then the extras; written last, so it is there only when all went well

stop() {
    echo "$1" >&2
    exit 2
}

version_of() { "$1" -IS -c 'import sys; print(sys.version)' 2>/dev/null; }

same_python() { [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv/bin/python")" ]; }

# A changed dependency, another Python or a moved folder (the scripts in .venv/bin hold its path) all ask for work.
fingerprint() {
    "$venv/bin/python" -IS - "$root" "$root/pyproject.toml" "$root/constraints.txt" 2>/dev/null <<'PYTHON'
import hashlib, sys
digest = hashlib.sha256(repr((sys.version, sys.argv[1])).encode())
for path in sys.argv[2:]:
    with open(path, "rb") as file:
        digest.update(file.read())
print(digest.hexdigest())
PYTHON
}

installed_extras() { if [ -f "$stamp" ]; then sed -n 2p "$stamp"; fi; }

up_to_date() { # EXTRA ...
    local extra have
    [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$(fingerprint)" ] || return 1
    same_python || return 1
    have=$(installed_extras)
    for extra in "$@"; do
        case " $have " in *" $extra "*) ;; *) return 1 ;; esac
    done
}

check_tools() {
    [ -n "$(version_of "$python")" ] ||
        stop "$python does not run; install Python 3.10 or newer (Debian package: python3) or name one: PYTHON=... $0"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        stop "$python is $("$python" -V), but 3.10 or newer is needed (Debian package: python3, of Debian 12 or newer); name one: PYTHON=... $0"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$python has no venv module; install it (Debian package: python3-venv)"
}

make_venv() {
    # Kept when it works, lies where it was made and has the Python that was asked for.
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1 && grep -qF "$venv/bin/" "$venv/bin/pip" && same_python; then
        return
    fi
    # All but the lock, which another setup may be waiting on.
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    "$python" -m venv "$venv"
}

install() { # EXTRA ...
    local extras site quiet=()
    extras=$(IFS=,; echo "$*")
    # pip writes RECORD last: a package without it was being installed when pip was stopped, and pip would take it as
    # installed. A name that begins with ~ is one that pip was removing.
    for site in "$venv"/lib/python*/site-packages; do
        find "$site" -maxdepth 1 -name '~*' -exec rm -rf {} +
        find "$site" -maxdepth 1 -name '*.dist-info' -exec sh -c '[ -f "$1/RECORD" ] || rm -rf "$1"' _ {} \;
    done
    [ -t 1 ] || quiet=(--quiet)
    echo "Installing into .venv; the first time this takes minutes."
    "$venv/bin/python" -m pip install --disable-pip-version-check "${quiet[@]}" \
        --editable "$root${extras:+[$extras]}" --constraint "$root/constraints.txt"
}

for extra in "$@"; do
    grep -q "^$extra = \[" "$root/pyproject.toml" || stop "no extra is called '$extra'; pyproject.toml names test and tensorboard"
done
if up_to_date "$@"; then exit 0; fi
check_tools
mkdir -p "$venv"
exec 9>>"$venv/.lock"
if command -v flock >/dev/null; then flock 9; fi # a second setup waits for the first, then finds nothing to do
if up_to_date "$@"; then exit 0; fi

read -r -a extras <<<"$(installed_extras) $*"
mapfile -t extras < <(printf '%s\n' "${extras[@]}" | sort -u | sed '/^$/d')
rm -f "$stamp"
make_venv
install "${extras[@]}"
printf '%s\n%s\n' "$(fingerprint)" "${extras[*]}" >"$stamp.new"
mv "$stamp.new" "$stamp"
