#!/usr/bin/env bash
# Makes the pictures of tests/data/test_stamps.py available: Debian's package tuxpaint-stamps-default (160 MB),
# installed where we are root, else unpacked below .cache/. Safe to repeat; when they are there it does nothing.
set -euo pipefail

PACKAGE=tuxpaint-stamps-default
STAMPS=usr/share/tuxpaint/stamps

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

step() { printf 'test data: %s\n' "$*"; }

# CI must not pass over the tests in silence; elsewhere they say themselves that they were skipped.
give_up() {
    step "$1; tests/data/test_stamps.py is skipped. Remedy: apt-get install $PACKAGE" >&2
    [ -z "${CI:-}" ] && exit 0
    exit 1
}

# A folder alone may be what an installation that was stopped has left.
is_installed() {
    [ -d "/$STAMPS" ] || return 1
    ! command -v dpkg-query >/dev/null || dpkg-query -W -f '${db:Status-Status}\n' "$PACKAGE" 2>/dev/null | grep -qx installed
}

install_package() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "$PACKAGE" >/dev/null 2>&1 ||
        { apt-get update -qq >/dev/null 2>&1 && apt-get install -y -qq --no-install-recommends "$PACKAGE" >/dev/null 2>&1; }
}

unpack_package() (
    mkdir -p .cache
    printf '*\n' >.cache/.gitignore
    work=$(mktemp -d -p "$PWD/.cache")
    trap 'rm -rf "$work"' EXIT
    cd "$work"
    apt-get download -qq "$PACKAGE" >/dev/null 2>&1 && dpkg -x "$PACKAGE"_*.deb unpacked || exit 1
    # Moved into place in one step: a run that is stopped leaves nothing that looks whole.
    rm -rf ../"$PACKAGE" && mv unpacked ../"$PACKAGE"
)

is_installed && exit 0
[ -d ".cache/$PACKAGE/$STAMPS" ] && exit 0
command -v apt-get >/dev/null && command -v dpkg >/dev/null || give_up "no apt-get here to get the package $PACKAGE with"
step "getting the package $PACKAGE (160 MB)"
if [ "$(id -u)" -eq 0 ] && install_package && is_installed; then exit 0; fi
if unpack_package && [ -d ".cache/$PACKAGE/$STAMPS" ]; then exit 0; fi
give_up "apt-get cannot get the package $PACKAGE"
