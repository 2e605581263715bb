#!/bin/sh
# Prints the Python to build the environments with: $PYTHON where it is set, else the first of 3.11, 3.12, 3.13 that runs.
# 3.11 comes first because it is the version that every package below is tried with most.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

if [ -n "$PYTHON" ]; then
    if is_supported "$PYTHON"; then
        command -v "$PYTHON"
        exit 0
    fi
    echo "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13 that runs; name another or leave PYTHON unset." >&2
    exit 1
fi
for candidate in python3.11 python3.12 python3.13 python3; do
    if is_supported "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
done
echo "No Python 3.11, 3.12 or 3.13 was found (python3 is $(python3 --version 2>&1)). Install one, on Debian 12 for example: apt-get install python3" >&2
exit 1
