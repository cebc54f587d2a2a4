#!/usr/bin/env bash
# install_packages.sh PACKAGE...: install Debian packages that some tests need, where apt and root allow it; daemons are
# not started. Exit 0 also where they do not: the tests are skipped then, and say why.
set -uo pipefail

missing=()
for package in "$@"; do
  dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii ' || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "not installed: ${missing[*]} (needs root and apt-get)"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
policy=/usr/sbin/policy-rc.d # keeps dpkg from starting the daemons
made=
trap 'rm -f "$log" $made' EXIT # also when it took too long and is told to end
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && made=$policy
fi
for try in 1 2 3; do
  if apt-get -o DPkg::Lock::Timeout=120 update >"$log" 2>&1 &&
    apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "${missing[@]}" >>"$log" 2>&1; then
    exit 0
  fi
  sleep $((try * 3))
done
tail -5 "$log"
echo "could not install ${missing[*]}"
exit 0
