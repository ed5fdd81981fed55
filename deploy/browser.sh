#!/usr/bin/env bash
# Makes the programs available that the tests drive: Debian's chromium and chromium-driver (400 MB) for tests/browser, and
# curl for tests/serving, where we are root. Safe to repeat; when all are there it does nothing.
set -euo pipefail

PACKAGES=(chromium chromium-driver curl)

step() { printf 'browser: %s\n' "$*"; }

# CI must not pass over the tests in silence; elsewhere they say themselves that they were skipped.
give_up() {
    step "$1; tests/browser is skipped, and tests that ask by curl fail. Remedy: apt-get install ${PACKAGES[*]}" >&2
    [ -z "${CI:-}" ] && exit 0
    exit 1
}

is_installed() { command -v chromium >/dev/null && command -v chromedriver >/dev/null && command -v curl >/dev/null; }

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}" >/dev/null 2>&1 ||
        { apt-get update -qq >/dev/null 2>&1 && apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}" >/dev/null 2>&1; }
}

is_installed && exit 0
command -v apt-get >/dev/null || give_up "no apt-get here to get ${PACKAGES[*]} with"
[ "$(id -u)" -eq 0 ] || give_up "only root can install ${PACKAGES[*]}"
step "installing ${PACKAGES[*]}"
install_packages && is_installed || give_up "apt-get cannot get ${PACKAGES[*]}"
