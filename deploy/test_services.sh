#!/usr/bin/env bash
# Makes the programs available that tests/deploy drives, where we are root: Debian's PostgreSQL, without a cluster that runs,
# and the docker client with its compose plugin, which reads deploy/compose.yaml without an engine. Where the distribution
# at hand has no compose 2 (Debian 12), both come from the next one, Debian 13, verified by apt and unpacked, not installed.
# Safe to repeat; when all are there it does nothing.
set -euo pipefail

CREATE_CLUSTER=/etc/postgresql-common/createcluster.conf
NEXT_SUITE=trixie
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
PLUGINS=/usr/local/lib/docker/cli-plugins

step() { printf 'test services: %s\n' "$*"; }

# CI stops here; elsewhere the tests that need what is missing fail, and say so.
give_up() {
    step "$1; tests/deploy cannot run whole. Remedy: apt-get install postgresql, and docker with its compose plugin" >&2
    [ -z "${CI:-}" ] && exit 0
    exit 1
}

has_postgres() { command -v pg_ctlcluster >/dev/null && compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null; }
has_compose() { docker compose version >/dev/null 2>&1; }

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 ||
        { apt-get update -qq >/dev/null 2>&1 && apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1; }
}

# The package would make a cluster named main and start it; the tests make their own.
install_postgres() {
    mkdir -p "${CREATE_CLUSTER%/*}"
    grep -qs '^create_main_cluster' "$CREATE_CLUSTER" || printf 'create_main_cluster = false\n' >>"$CREATE_CLUSTER"
    DPKG_FORCE=confold apt_install postgresql
}

# Unpacks packages of Debian's next release into a folder. A list of sources of its own, so that nothing else is upgraded.
unpack_next() (
    folder=$1
    shift
    mkdir -p "$folder"/{sources,lists/partial,cache/archives/partial,packages}
    cat >"$folder/sources/next.sources" <<END
Types: deb
URIs: http://deb.debian.org/debian
Suites: $NEXT_SUITE
Components: main
Signed-By: $KEYRING
END
    apt_next() {
        apt-get -qq -o APT::Sandbox::User=root -o Dir::Etc::sourcelist=/nothing -o Dir::Etc::sourceparts="$folder/sources" \
            -o Dir::State::Lists="$folder/lists" -o Dir::Cache="$folder/cache" -o Acquire::AllowInsecureRepositories=false \
            "$@" >/dev/null 2>&1
    }
    cd "$folder/packages"
    apt_next update && apt_next download "$@" || exit 1
    for package in *.deb; do dpkg -x "$package" "$folder/unpacked" || exit 1; done
)

install_next_compose() {
    local work plugin status=0
    work=$(mktemp -d)
    if unpack_next "$work" docker-compose docker-cli &&
        plugin=$(find "$work/unpacked" -type f -path '*/cli-plugins/docker-compose' | grep -m 1 .); then
        command -v docker >/dev/null || install -m 755 "$work/unpacked/usr/bin/docker" /usr/local/bin/docker
        install -D -m 755 "$plugin" "$PLUGINS/docker-compose"
    else
        status=1
    fi
    rm -rf "$work"
    return "$status"
}

# docker-compose-v2 is Ubuntu's name for it; Debian 12 has a docker-compose too, which is the old one.
install_compose() {
    case $(. /etc/os-release && echo "$ID-${VERSION_ID:-}") in
        debian-12) install_next_compose ;;
        ubuntu-*) apt_install docker-compose-v2 ;;
        *) apt_install docker-cli docker-compose ;;
    esac
}

has_postgres && has_compose && exit 0
command -v apt-get >/dev/null || give_up "no apt-get here to get the programs with"
[ "$(id -u)" -eq 0 ] || give_up "only root can install PostgreSQL and docker's compose plugin"
if ! has_postgres; then
    step "installing PostgreSQL"
    { install_postgres && has_postgres; } || give_up "apt-get cannot get postgresql"
fi
if ! has_compose; then
    step "installing docker's compose plugin"
    { install_compose && has_compose; } || give_up "apt-get cannot get docker's compose plugin"
fi
