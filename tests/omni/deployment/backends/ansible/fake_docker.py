"""A `docker` that keeps one container as a file, notes what it is asked, and runs `exec` on this machine."""

import sys
from pathlib import Path

_SCRIPT = """#!/bin/sh
d={folder}
echo "$*" >> $d/calls
case "$1 $2" in
    "image inspect") [ -f $d/image ] || exit 1; echo '[{{}}]' ;;
    "container inspect") cat $d/container 2>/dev/null || {{ echo "Error: No such container: $3" >&2; exit 1; }} ;;
    pull*) echo "$http_proxy" > $d/image ;;
    rm*) [ -f $d/container ] || {{ echo "No such container" >&2; exit 1; }}; rm $d/container; echo "$3" ;;
    start*) sed -i 's/false/true/' $d/container ;;
    run*)
        for word in "$@"; do case "$word" in omni.digest=*) digest=${{word#*=}} ;; esac; done
        labels='{{"omni.digest": "'$digest'"}}'
        echo '[{{"Id": "'$$'", "State": {{"Running": true}}, "Config": {{"Labels": '$labels'}}}}]' > $d/container ;;
    exec*)
        shift; [ "$1" = --workdir ] && shift 2; shift
        [ "$1 $2 $3" = "python3 -m pip" ] && exit 0
        if [ "$1" = python3 ]; then shift; exec {python} "$@"; fi
        exec "$@" ;;
esac
"""


class FakeDocker:
    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.program = folder / "docker"
        self.program.write_text(_SCRIPT.format(folder=folder, python=sys.executable))
        self.program.chmod(0o755)

    def calls(self, word: str) -> list[list[str]]:
        """What it was asked, by first word; and forgotten with this."""
        calls = self._folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line.split() for line in lines if line.startswith(word)]

    def forget(self) -> None:
        (self._folder / "calls").unlink(missing_ok=True)

    def end_container(self) -> None:
        file = self._folder / "container"
        file.write_text(file.read_text().replace("true", "false"))

    @property
    def proxy_of_pull(self) -> str:
        return (self._folder / "image").read_text().strip()
