#!/bin/sh
# unpack_code.sh OMNI_PATH CODE_PATH SOURCE_ID: unpacks OMNI_PATH/code.tar.gz where it is news, and removes files that an
# earlier archive had and this one has not. Says "unpacked" or "unchanged".
set -eu
omni=$1 code=$2 source_id=$3
digest="$(sha256sum < "$omni/code.tar.gz") $code"
mkdir -p "$code"
if [ "$(cat /proc/sys/kernel/random/boot_id):$(stat -Lc %d:%i "$code")" = "$source_id" ]; then
    echo "unchanged: it is the folder that was packed"  # and so clean_up must never remove it
    echo "$digest" > "$omni/code.digest"
    exit 0
fi
if [ -f "$code/pyproject.toml" ] && [ "$(cat "$omni/code.digest" 2>/dev/null)" = "$digest" ]; then
    echo unchanged
    exit 0
fi
rm -f "$omni/code.digest"
tar -tzf "$omni/code.tar.gz" | grep -v '/$' | LC_ALL=C sort > "$omni/code.files.new"
if [ "$(cat "$omni/code.folder" 2>/dev/null)" = "$code" ]; then
    LC_ALL=C comm -23 "$omni/code.files" "$omni/code.files.new" | (cd "$code" && tr '\n' '\0' | xargs -0 -r rm -f --)
fi
# Known before the first file is there: clean_up finds all of them after a cut, too.
cp "$omni/code.files.new" "$omni/code.files"
rm "$omni/code.files.new"
echo "$code" > "$omni/code.folder"
tar --no-same-owner -xzf "$omni/code.tar.gz" -C "$code"
echo "$digest" > "$omni/code.digest"
echo unpacked
