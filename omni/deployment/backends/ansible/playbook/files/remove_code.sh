#!/bin/sh
# remove_code.sh OMNI_PATH: removes the files that unpack_code.sh has unpacked, and a virtual environment of ours.
set -eu
omni=$1
if [ -f "$omni/venv.made" ]; then
    rm -rf -- "$(cat "$omni/venv.made")"
    rm -f "$omni/venv.made"
    echo "virtual environment removed"
fi
if [ -f "$omni/code.folder" ] && cd "$(cat "$omni/code.folder")" 2>/dev/null; then
    tr '\n' '\0' < "$omni/code.files" | xargs -0 -r rm -f --
    # What Python has made beside them, then their folders from the deepest, where nothing else is in them.
    while read -r file; do dirname "$file"; done < "$omni/code.files" | LC_ALL=C sort -ru | while read -r folder; do
        rm -rf -- "$folder/__pycache__"
        [ "$folder" = . ] || rmdir -p -- "$folder" 2>/dev/null || true
    done
    cd /
    rmdir -- "$(cat "$omni/code.folder")" 2>/dev/null || true
    rm -f "$omni/code.folder" "$omni/code.files" "$omni/code.digest"
    echo "code removed"
fi
