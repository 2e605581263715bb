#!/bin/sh
# `make setup-system`: the Debian packages that the tests need and the quickstart does not. As root it installs what is missing,
# otherwise it names it and fails.
missing=
if ! command -v initdb >/dev/null && ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
    missing="$missing postgresql"
fi
for program in buildah mmdebstrap; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
command -v promtool >/dev/null && command -v prometheus >/dev/null || missing="$missing prometheus"
command -v ip >/dev/null || missing="$missing iproute2"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ]; then
    echo "The tests need Debian packages that are not installed:$missing" >&2
    echo "Install them first: sudo apt-get update && sudo apt-get install$missing" >&2
    exit 1
fi
if ! command -v apt-get >/dev/null; then
    echo "The tests need what Debian calls$missing, and there is no apt-get here: install its counterpart." >&2
    exit 1
fi
echo "Installing Debian packages:$missing"
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
if { apt-get -q update && apt-get -q -y install --no-install-recommends $missing; } >"$log" 2>&1; then
    rm -f "$log"
else
    tail -n 20 "$log" >&2
    echo "apt-get could not install$missing; the log is $log" >&2
    exit 1
fi
