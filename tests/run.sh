#!/bin/sh
# Sets up all that the tests need, and runs them: sh tests/run.sh [arguments for pytest]
#
# Needs git, python3 (3.11 or later) and python3-venv. The real servers, Prosody and ejabberd,
# are installed by apt when that is possible without asking for a password; otherwise the tests
# with them are skipped, and this says so. Everything else goes into .venv, and no service of
# the machine is started or stopped.
set -eu
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*" >&2; }

# Beside PATH for users: Debian puts servers where only root's PATH looks.
has() { PATH="$PATH:/usr/sbin" command -v "$1" >/dev/null 2>&1; }

install_servers() {
    lacking=
    has prosody || lacking="$lacking prosody lua-sec"
    has ejabberdctl || lacking="$lacking ejabberd"
    has debootstrap || lacking="$lacking debootstrap"
    has systemd-nspawn || lacking="$lacking systemd-container"
    [ -n "$lacking" ] || return 0

    if ! has apt-get; then
        say "no apt-get here: the tests with real servers that lack are skipped:$lacking"
        return 0
    fi
    if [ "$(id -u)" -eq 0 ]; then
        as_root=
    elif has sudo && sudo -n true 2>/dev/null; then
        as_root='sudo -n'
    else
        say "not root, and sudo wants a password: the tests with real servers that lack are" \
            "skipped; to run them: apt-get install$lacking"
        return 0
    fi

    say "installing$lacking"
    # The packages would start their services and take ports of the machine. Debian asks this
    # program first (invoke-rc.d(8)); 101 means no. One that is there already is the
    # administrator's: it stays, and decides.
    policy=/usr/sbin/policy-rc.d
    made=
    if [ ! -e "$policy" ]; then
        made=yes
        # shellcheck disable=SC2086 - as_root is nothing, or a command with its option
        printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
        # shellcheck disable=SC2064,SC2086
        trap "$as_root rm -f $policy" EXIT
        trap 'exit 130' INT TERM
        $as_root chmod 755 "$policy"
    fi
    # shellcheck disable=SC2086
    if ! { $as_root apt-get -q update &&
        $as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get -q -y --no-install-recommends install $lacking; }; then
        say "apt-get failed: the tests with real servers that lack are skipped:$lacking"
    fi
    if [ -n "$made" ]; then
        $as_root rm -f "$policy"
        trap - EXIT INT TERM
    fi
    # Nor are they to start with the machine: the tests run their own.
    if has systemctl; then
        for package in $lacking; do
            case $package in
            prosody | ejabberd) $as_root systemctl --quiet disable "$package" 2>/dev/null || : ;;
            esac
        done
    fi
}

install_servers

if [ ! -x .venv/bin/python ]; then
    say "making .venv"
    python3 -m venv .venv
fi
say "installing what tests/constraints.txt names"
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint tests/constraints.txt --editable '.[test]'

# All of them run, so that one run shows all there is to mend.
failed=0
say "ruff"
.venv/bin/ruff check . || failed=$?
say "mypy"
.venv/bin/mypy || failed=$?
say "pytest"
.venv/bin/pytest "$@" || failed=$?
exit "$failed"
