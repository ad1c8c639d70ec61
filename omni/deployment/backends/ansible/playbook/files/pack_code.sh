#!/bin/sh
# pack_code.sh SOURCE ARCHIVE: packs a folder of code, the same bytes for the same files, without what is made from them.
# Prints what tells this very folder from a copy.
set -eu
source=$1 archive=$2
[ -f "$source/pyproject.toml" ] || { echo "$source (services.local_code_path) has no pyproject.toml" >&2; exit 1; }
tar --sort=name --owner=0 --group=0 --numeric-owner \
    --exclude-vcs --exclude='.venv*' --exclude=__pycache__ --exclude='*.pyc' --exclude='.*_cache' --exclude='.coverage*' \
    --exclude='./logs' --exclude='./dist' --exclude='./build/dist' \
    -C "$source" -cf - . | gzip -n > "$archive.new"
mv "$archive.new" "$archive"
echo "$(cat /proc/sys/kernel/random/boot_id):$(stat -Lc %d:%i "$source")"
