#!/bin/sh
# Removes from an installed serving set what no service uses.
# usage: scripts/slim_venv.sh VENV
set -eu
"$1/bin/pip" uninstall --yes --quiet pip setuptools
cd "$1"/lib/python3*/site-packages
strip --strip-debug ot/*/*.so
for package in numpy pandas pyarrow scipy; do
    find "$package" -name tests -type d -prune -exec rm -rf {} +
done
